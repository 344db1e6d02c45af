"""The Triton kernels against the plain-torch reference.

Without a GPU they run in Triton's interpreter, which reads and writes CPU tensors through the same
functions, and are compiled for GPUs that are not there. The last tests need a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_cpu import CHANGES, Twice
from tier_model import arguments_of
from torch import Tensor
from torch.nn.utils import parametrize

from mec_embed import CodeLayout, CompressedEmbedding, CompressedEmbeddingBag, ops
from mec_embed.ops import driver, reference
from mec_embed.packing import pack
from mec_embed.tiers import TieredEmbedding, TierMap

triton = pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
import triton.language as tl  # noqa: E402

from mec_embed.ops import gpu  # noqa: E402


def _interpreted() -> ModuleType:
    """A second copy of ``gpu``, whose kernels are interpreted.

    Triton decides at each ``@triton.jit`` whether to interpret. Its own functions were compiled
    ones when it was imported, so kernels that call those, such as ``tl.sum``, could not be tested.
    """
    spec = importlib.util.spec_from_file_location("mec_embed.ops._interpreted", gpu.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module._add_product = triton.jit(_add_product_of_floats)
    return module


def _add_product_of_floats(total: Any, one: Any, other: Any) -> Any:
    """The interpreter would multiply the bits of bfloat16 as integers."""
    return tl.dot(one.to(tl.float32), other.to(tl.float32), total)


kernels: Any = _interpreted()

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
#: Tiles of one line or a few, so that short inputs take several programs, and as they are.
TILES = [
    (64, 64, 16, 1),
    (kernels.TILE, kernels.ROW_ENTRIES, kernels.CHUNKS, kernels.BAG_CHUNKS),
]


class Case:
    """A filled table and the arguments of the operators for it."""

    def __init__(self, layout: CodeLayout, device: str = "cpu", seed: int = 0, **options: Any):
        torch.manual_seed(seed)
        self.layout = layout
        table = CompressedEmbedding(layout, **options)
        if layout.bits:
            shape = (layout.num_embeddings, layout.num_subvectors)
            table.codes.copy_(pack(torch.randint(layout.codebook_size, shape), layout.bits))
        shape = (layout.num_subvectors, layout.codebook_size, layout.subvector_dim)
        table.codebook_set.store(torch.randn(shape))
        self.table = table.to(device)
        self.padding = -1 if table.padding_idx is None else table.padding_idx

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.layout.num_embeddings, shape, device=self.table.codes.device)

    def _tensors(self) -> tuple[Any, ...]:
        books, layout = self.table.codebook_set, self.layout
        tensors = (self.table.codes, books.codebooks.detach(), books.scales)
        return (*tensors, layout.num_embeddings, layout.embedding_dim, layout.bits, self.padding)

    def lookup(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        return (ids, *self._tensors(), self.table.zero_padding, False, dtype, "t")

    def bag(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
        mode: str = "sum",
        last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Any, ...]:
        return (ids, offsets, weights, *self._tensors(), mode, last, False, dtype, "t")

    def backward(
        self, ids: Tensor, grad: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, ...]:
        layout = self.layout
        if grad is None:
            grad = torch.randn(*ids.shape, layout.embedding_dim, device=ids.device)
        shape = (layout.num_subvectors, layout.codebook_size, layout.subvector_dim)
        return (
            grad,
            ids,
            self.table.codes,
            layout.num_embeddings,
            layout.embedding_dim,
            layout.bits,
            self.padding,
            *shape,
            dtype,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["additive", "product", "rows"]))
    rows = draw(st.integers(1, 200))
    count = draw(st.integers(1, 8))
    width = draw(st.integers(1, 129 // count)) if kind == "product" else draw(st.integers(1, 129))
    dim = width * count if kind == "product" else width
    size = draw(st.sampled_from([2, 3, 16, 20, 256, 300, 2048]))
    dtype = draw(st.sampled_from([*FLOATS, torch.int8]))
    if kind == "rows":
        count, size = 1, rows
    padding = draw(st.sampled_from([None, rows // 2]))
    layout = CodeLayout(kind, rows, dim, count, size, dtype)
    return Case(layout, padding_idx=padding, zero_padding=draw(st.booleans()))


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to ``dtype`` as the interpreter does it: it cuts off what bfloat16 cannot hold."""
    if dtype is torch.bfloat16:
        rows = (rows.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return rows.to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=TILES, ids=["small tiles", "tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "TILE", "ROW_ENTRIES", "CHUNKS", "BAG_CHUNKS"
    for name, entries in zip(names, request.param, strict=True):
        monkeypatch.setattr(kernels, name, entries)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran."""
    names: list[str] = []
    launch = kernels._Launcher.__call__

    def record(launcher: Any, *arguments: Any) -> None:
        names.append(launcher.function.__name__)
        launch(launcher, *arguments)

    monkeypatch.setattr(kernels._Launcher, "__call__", record)
    return names


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(deadline=None, max_examples=40)
@given(
    case=cases(),
    shape=st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3)]),
    wide=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_outputs_are_those_of_the_reference_bit_for_bit(
    case: Case, shape: Any, wide: bool, dtype: torch.dtype
) -> None:
    ids = case.ids(*shape)
    found = kernels.lookup(*case.lookup(ids if wide else ids.int(), dtype))
    assert found.shape == (*shape, case.layout.embedding_dim)
    assert torch.equal(found, rounded(reference.lookup(*case.lookup(ids)), dtype))


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_any_width(bits: int, launched: list[str]) -> None:
    case = Case(CodeLayout("product", 21, 10, 5, 1 << bits))
    ids = torch.arange(21)
    expected = reference.lookup(*case.lookup(ids))
    assert torch.equal(kernels.lookup(*case.lookup(ids)), expected)
    assert launched == ["_rows_kernel"]


@pytest.mark.parametrize("dim", [1, 2, 31, 64, 65, 129])
def test_tiles_of_any_size_cover_the_output(dim: int, tiles: None) -> None:
    case = Case(CodeLayout("additive", 50, dim, 2, 3), padding_idx=4)
    ids = case.ids(33)
    assert torch.equal(kernels.lookup(*case.lookup(ids)), reference.lookup(*case.lookup(ids)))
    arguments = case.backward(ids)
    close(kernels.lookup_backward(*arguments), reference.lookup_backward(*arguments))
    arguments = case.bag(ids.view(11, 3))
    close(kernels.bag(*arguments), reference.bag(*arguments))


@settings(deadline=None, max_examples=25)
@given(
    case=cases(),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    kind=st.sampled_from(["sum", "mean", "weights"]),
    last=st.booleans(),
    wide=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_bags_are_those_of_the_reference(
    case: Case, lengths: list[int], kind: str, last: bool, wide: bool, dtype: torch.dtype
) -> None:
    ids = case.ids(sum(lengths))
    kinds = torch.int64 if wide else torch.int32
    offsets = torch.tensor([0, *lengths[: None if last else -1]]).cumsum(0)
    weights = torch.randn(len(ids)) if kind == "weights" else None
    mode = "mean" if kind == "mean" else "sum"
    arguments = case.bag(ids.to(kinds), offsets.to(kinds), weights, mode, last)
    expected = reference.bag(*arguments)
    found = kernels.bag(*arguments)
    assert found.shape == (len(lengths), case.layout.embedding_dim)
    close(found, expected)
    narrow = kernels.bag(*case.bag(ids.to(kinds), offsets.to(kinds), weights, mode, last, dtype))
    assert torch.equal(narrow, rounded(found, dtype))


@pytest.mark.parametrize("mode", ["sum", "mean", "weights"])
@pytest.mark.parametrize("kind", ["additive", "product"])
@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (3, 0), (0, 3)], ids=str)
def test_bags_of_one_length(
    shape: Any, kind: str, mode: str, tiles: None, launched: list[str]
) -> None:
    case = Case(CodeLayout(kind, 9, 12, 3, 5), padding_idx=2)
    ids = case.ids(*shape)
    weights = torch.rand(shape).half() if mode == "weights" else None
    arguments = case.bag(ids, None, weights, "sum" if weights is not None else mode)
    found = kernels.bag(*arguments)
    counted = kind == "additive" and weights is None
    assert launched == ["_counted_bags_kernel" if counted else "_bags_kernel"] * min(1, shape[0])
    rows = reference.lookup(*case.lookup(ids)) * ids.ne(2)[..., None]
    if weights is not None:
        rows = rows * weights.float()[..., None]
    expected = rows.sum(1)
    if mode == "mean":
        expected = expected / ids.ne(2).sum(1, keepdim=True).clamp(min=1)
    close(found, expected)


@pytest.mark.parametrize(
    ("count", "size", "dtype", "mode"),
    [(2, 2, torch.float32, "mean"), (3, 4, torch.int8, "sum"), (5, 7, torch.float16, "sum"),
     (13, 12, torch.bfloat16, "sum"), (32, 16, torch.int8, "sum"), (8, 32, torch.float32, "sum"),
     (9, 25, torch.float32, "mean")],
)  # fmt: skip
def test_bags_that_count_codewords(
    count: int, size: int, dtype: torch.dtype, mode: str, launched: list[str]
) -> None:
    """Also of more ids than a count holds: 255."""
    case = Case(CodeLayout("additive", 50, 20, count, size, dtype), padding_idx=3)
    ids = case.ids(300)
    ids[:260], ids[265:270] = 7, 3
    arguments = case.bag(ids, torch.tensor([0, 262, 262, 299]), mode=mode)
    expected = reference.bag(*arguments)
    torch.testing.assert_close(kernels.bag(*arguments), expected, rtol=1e-5, atol=1e-3)
    assert launched == ["_counted_bags_kernel"]


def test_programs_that_count_codewords_take_more_bags_where_there_are_many() -> None:
    tables = {width: Case(CodeLayout("additive", 50, width, 3, 5)).backward for width in (64, 65)}
    found = {}
    for width, arguments in tables.items():
        table = kernels._Table.of(*arguments(torch.zeros(1, dtype=torch.long))[2:6], 3, 5, width)
        for bags in (100, 1 << 12, 1 << 14, 1 << 15):
            for dtype in (torch.float32, torch.int8):
                grid, launch = kernels._counted(table, bags, dtype, 0)
                tile = launch.constants
                assert grid == (-(-bags // tile["BAGS"]), -(-width // 64))
                found[width, bags, dtype] = tile["BAGS"], tile["UNROLL"]
    assert found[64, 100, torch.int8] == (16, 4) and found[64, 1 << 12, torch.int8] == (32, 4)
    assert found[64, 1 << 14, torch.int8] == (64, 4)
    assert found[64, 1 << 15, torch.int8] == (128, 4)
    assert found[64, 1 << 15, torch.float32] == (128, 1)
    assert found[65, 1 << 15, torch.float32] == (64, 4)


@pytest.mark.parametrize("layout", [("additive", 13, 30), ("additive", 5, 3), ("product", 5, 300)])
def test_codes_that_start_at_any_byte(layout: Any, launched: list[str]) -> None:
    """Whole words cannot be loaded from there; a row is read in two parts where it is long."""
    case = Case(CodeLayout(layout[0], 40, 20, *layout[1:]), padding_idx=3)
    codes, ids = case.table.codes, case.ids(31)
    expected = [
        reference.lookup(*case.lookup(ids)),
        reference.bag(*case.bag(ids[None])),
        reference.lookup_backward(*case.backward(ids, torch.ones(31, 20))),
    ]
    for start in range(8):
        room = torch.full((len(codes) + 16,), 255, dtype=torch.uint8)
        first = start - room.data_ptr() % 8 + 8
        case.table.code_table.codes = room[first : first + len(codes)].copy_(codes)
        assert case.table.codes.data_ptr() % 8 == start
        assert torch.equal(kernels.lookup(*case.lookup(ids)), expected[0])
        close(kernels.bag(*case.bag(ids[None])), expected[1])
        close(kernels.lookup_backward(*case.backward(ids, torch.ones(31, 20))), expected[2])
    assert len(launched) == 24


def test_a_bag_of_padding_only_is_zero() -> None:
    case = Case(CodeLayout("additive", 9, 12, 3, 5), padding_idx=2, zero_padding=False)
    for mode in ("sum", "mean"):
        assert kernels.bag(*case.bag(torch.full((2, 3), 2), mode=mode)).eq(0).all()


@settings(deadline=None, max_examples=30)
@given(
    case=cases(),
    count=st.integers(0, 40),
    wide=st.booleans(),
    given_dtype=st.sampled_from(FLOATS),
    copies=st.booleans(),
)
def test_gradients_are_those_of_the_reference(
    case: Case, count: int, wide: bool, given_dtype: torch.dtype, copies: bool
) -> None:
    ids = case.ids(count)
    grad = torch.randn(count, case.layout.embedding_dim).to(given_dtype)
    arguments = case.backward(ids if wide else ids.int(), grad)
    with pytest.MonkeyPatch.context() as patch:
        if copies:
            patch.setattr(kernels, "COPY_LOOKUPS", 1)
            patch.setattr(kernels, "CHUNKS", 16)
        found = kernels.lookup_backward(*arguments)
    close(found, reference.lookup_backward(*arguments))


@settings(deadline=None, max_examples=40)
@given(
    case=cases(),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    kind=st.sampled_from(["2-D", "offsets", "last offset"]),
    how=st.sampled_from(["sum", "mean", "weights"]),
    wide=st.booleans(),
    given_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_gradients_of_bags_are_those_of_the_reference(
    case: Case,
    lengths: list[int],
    kind: str,
    how: str,
    wide: bool,
    given_dtype: torch.dtype,
) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    shape = (len(lengths), lengths[0]) if kind == "2-D" else (int(ends[-1]),)
    ids = case.ids(*shape) if wide else case.ids(*shape).int()
    offsets = {"2-D": None, "offsets": ends[:-1], "last offset": ends}[kind]
    grad, table = torch.randn(len(lengths), case.layout.embedding_dim), case.backward(ids)[2:]
    arguments = (
        ids,
        offsets,
        torch.randn(shape) if how == "weights" else None,
        *table[:5],
        "mean" if how == "mean" else "sum",
        kind == "last offset",
        *table[5:],
    )
    found = kernels.bag_backward(grad.to(given_dtype), *arguments)
    close(found, reference.bag_backward(grad.to(given_dtype).float(), *arguments))


@pytest.mark.parametrize("kind", ["additive", "product"])
@pytest.mark.parametrize("how", ["sum", "mean", "weights"])
def test_deterministic_gradients_of_bags(kind: Any, how: str, deterministic: None) -> None:
    case = Case(CodeLayout(kind, 30, 6, 3, 5), padding_idx=4)
    ids, offsets = case.ids(9), torch.tensor([0, 2, 2, 7])
    ids[1] = 4
    table = case.backward(ids)[2:]
    weights = torch.randn(9) if how == "weights" else None
    mode = "mean" if how == "mean" else "sum"
    arguments = (torch.randn(4, 6), ids, offsets, weights, *table[:5], mode, False, *table[5:])
    close(kernels.bag_backward(*arguments), reference.bag_backward(*arguments))


def test_hot_codewords_are_summed_in_several_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CodeLayout("additive", 30, 6, 2, 3))
    copies: list[Tensor] = []
    launch = kernels._Launcher.__call__

    def record(launcher: Any, grid: Any, *arguments: Any) -> None:
        launch(launcher, grid, *arguments)
        copies.append(arguments[5].view(arguments[-1], -1))

    monkeypatch.setattr(kernels._Launcher, "__call__", record)
    monkeypatch.setattr(kernels, "COPY_LOOKUPS", 5)
    monkeypatch.setattr(kernels, "CHUNKS", 16)
    arguments = case.backward(case.ids(50))
    found = kernels.lookup_backward(*arguments)
    assert len(copies[0]) == 3 and copies[0].ne(0).any(1).all()
    close(found, reference.lookup_backward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_many_lookups_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Ones added one by one would stick at 256 or 2048 in a narrow dtype."""
    case = Case(CodeLayout("additive", 2, 1, 1, 2))
    ids, grad = torch.zeros(10_000, dtype=torch.long), torch.ones(10_000, 1, dtype=dtype)
    found = kernels.lookup_backward(*case.backward(ids, grad, dtype))
    assert found.dtype is dtype and found.max().item() == pytest.approx(10_000, rel=1e-2)


@pytest.mark.parametrize("kind", ["additive", "product"])
@pytest.mark.parametrize("wide", [False, True])
def test_deterministic_gradients(
    kind: str, wide: bool, tiles: None, launched: list[str], deterministic: None
) -> None:
    """No atomics, whose order would be another each time: one program writes each codeword."""
    case = Case(CodeLayout(kind, 30, 6, 2, 5), padding_idx=4)
    ids = case.ids(50)
    arguments = case.backward(ids if wide else ids.int())
    found = kernels.lookup_backward(*arguments)
    assert launched == ["_keys_kernel", "_segments_kernel"]
    close(found, reference.lookup_backward(*arguments))
    assert torch.equal(kernels.lookup_backward(*arguments), found)


def test_deterministic_gradients_of_rows_are_those_of_torch(
    launched: list[str], deterministic: None
) -> None:
    case = Case(CodeLayout("rows", 30, 6, 1, 30))
    arguments = case.backward(case.ids(50))
    assert torch.equal(kernels.lookup_backward(*arguments), reference.lookup_backward(*arguments))
    assert not launched


@pytest.mark.parametrize("kind", ["additive", "rows"])
def test_ids_out_of_range_are_the_nearest_row(kind: str) -> None:
    case = Case(CodeLayout(kind, 30, 6, *((1, 30) if kind == "rows" else (3, 5))))
    ids = torch.tensor([-1, 30, 2**40, -(2**63), 2**63 - 1])
    nearest = torch.tensor([0, 29, 29, 0, 29])
    assert torch.equal(kernels.lookup(*case.lookup(ids)), reference.lookup(*case.lookup(nearest)))
    grad = torch.randn(5, 6)
    ids[0] = -2  # -1 is no id, and passes no gradient
    close(
        kernels.lookup_backward(*case.backward(ids, grad)),
        reference.lookup_backward(*case.backward(nearest, grad)),
    )
    # Nor do offsets lead outside of the ids.
    found = kernels.bag(*case.bag(ids, torch.tensor([0, -7, 99])))
    everything = reference.lookup(*case.lookup(nearest)).sum(0)
    close(found, torch.stack([torch.zeros(6), everything, torch.zeros(6)]))


def test_damaged_codes_are_the_last_codeword() -> None:
    case = Case(CodeLayout("additive", 30, 6, 3, 20))
    case.table.codes[:-8] = 255  # code 31 of 20
    found = kernels.lookup(*case.lookup(torch.arange(30)))
    close(found, case.table.codebooks.detach()[:, -1].sum(0).expand(30, 6))
    case.table.code_table.codes = case.table.codes[:20]
    with pytest.raises(IndexError):
        kernels.lookup(*case.lookup(torch.arange(30)))


def virtual(count: int, dtype: Any) -> Tensor:
    """Zeros that take memory only where they are written."""
    return torch.from_numpy(np.zeros(count, dtype))


def test_codes_beyond_two_gigabytes(launched: list[str]) -> None:
    rows, books, bits = (1 << 31) // 4 + 5, 2, 16  # 4 bytes a row
    case = Case(CodeLayout("additive", 3, 4, books, 1 << bits))
    codes = virtual(rows * 4 + 8, np.uint8)
    codes[-20:-8] = case.table.codes[:-8]  # the last three rows
    ids = torch.tensor([rows - 3, rows - 2, rows - 1, 0], dtype=torch.int32)
    expected = reference.lookup(*case.lookup(torch.arange(3)))
    case.table.code_table.codes = codes
    case.layout = CodeLayout("additive", rows, 4, books, 1 << bits)
    found = kernels.lookup(*case.lookup(ids))
    assert torch.equal(found[:3], expected)
    close(kernels.bag(*case.bag(ids[:3, None])), expected)
    grad = torch.randn(4, 4)
    assert kernels.lookup_backward(*case.backward(ids, grad)).ne(0).sum() == 4 * books * 4
    assert launched == ["_rows_kernel", "_bags_kernel", "_add_kernel"]


def test_codebooks_beyond_two_gigabytes(launched: list[str]) -> None:
    rows, dim = (1 << 31) // 64 + 3, 64
    books = virtual(rows * dim, np.float16).view(1, rows, dim)
    books[0, -1] = 7
    tensors = (torch.zeros(0, dtype=torch.uint8), books, None)
    ids = torch.tensor([rows - 1, 5, rows + 9])
    found = kernels.lookup(ids, *tensors, rows, dim, 0, 5, True, False, torch.float32, "t")
    assert found.eq(torch.tensor([7.0, 0, 7])[:, None]).all()
    assert launched == ["_rows_kernel"]


@pytest.mark.parametrize(("rows", "width"), [(1 << 16, 1 << 15), (1 << 16, (1 << 15) - 1)])
def test_a_codebook_beyond_the_offsets_within_one_goes_to_the_reference(
    rows: int, width: int
) -> None:
    """Also where it is the only one: places of codewords are int32."""
    books = torch.empty(1, rows, width, device="meta")
    assert kernels._takes_books(books, None, torch.float32) == (rows * width < 1 << 31)


def test_int8_codebooks_are_made_floats_where_lookups_are_more_than_codewords(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table kept as rows would be written as a whole, four times as large."""
    monkeypatch.setattr(kernels, "UNPACK_ENTRIES", 20 * 6)
    for rows, unpacked in ((20, True), (21, False)):
        case = Case(CodeLayout("rows", rows, 6, 1, rows, torch.int8))
        for ids, kernel in ((case.ids(20), "_rows_kernel"), (case.ids(4, 5), "_bags_kernel")):
            arguments = case.lookup(ids) if ids.dim() == 1 else case.bag(ids)
            operator = "lookup" if ids.dim() == 1 else "bag"
            launched.clear()
            found = getattr(kernels, operator)(*arguments)
            close(found, getattr(reference, operator)(*arguments))
            assert launched == ["_floats_kernel"] * unpacked + [kernel]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(2, 1000),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    sort=st.booleans(),
    wide=st.booleans(),
    shape=st.sampled_from([(), (0,), (7,), (3, 5), (1500,)]),
)
def test_tiers_are_those_of_the_reference(
    rows: int, share: float, sort: bool, wide: bool, shape: Any
) -> None:
    popular = torch.rand(rows) < share
    tier_map = TierMap.of(popular.sort(descending=True)[0] if sort else popular)
    ids = torch.randint(rows, shape, dtype=torch.int64 if wide else torch.int32)
    buffers = (tier_map.starts, tier_map.before, tier_map.bitmap, rows, "t")
    found, expected = kernels.tiers(ids, *buffers), reference.tiers(ids, *buffers)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    outside = kernels.tiers(torch.tensor([-5, rows + 2**40]), *buffers)
    nearest = reference.tiers(torch.tensor([0, rows - 1]), *buffers)
    assert all(torch.equal(one, other) for one, other in zip(outside, nearest, strict=True))


#: Kind, codebooks, codewords of each and dtype of a tier.
TIERS = {
    "additive": ("additive", 3, 5, torch.float32),
    "int8": ("additive", 9, 32, torch.int8),
    "product": ("product", 3, 300, torch.float16),
    "one row": ("shared", 1, 1, torch.float32),
    "one int8 row": ("shared", 1, 1, torch.int8),
    "rows": ("rows", 1, None, torch.bfloat16),
}


def in_tiers(
    popular: Tensor, dim: int, head: str, tail: str, device: str = "cpu", **options: Any
) -> TieredEmbedding:
    """A table in tiers of these kinds, with random values."""
    tiers = []
    for seed, (name, count) in enumerate(
        ((head, int(popular.sum())), (tail, int((~popular).sum())))
    ):
        kind, books, size, dtype = TIERS[name]
        layout = CodeLayout(kind, count, dim, books, size or count, dtype)
        tiers.append(Case(layout, seed=seed).table)
    return TieredEmbedding(TierMap.of(popular), *tiers, **options).to(device)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 400),
    sort=st.booleans(),
    dim=st.sampled_from([3, 12, 33, 48]),
    head=st.sampled_from(["additive", "int8", "product", "rows"]),
    tail=st.sampled_from(list(TIERS)),
    shape=st.sampled_from([(), (0,), (7,), (3, 5), (400,)]),
    wide=st.booleans(),
    padding=st.booleans(),
    zero=st.booleans(),
    unpack=st.booleans(),
)
def test_rows_of_tiers_are_those_of_the_reference(
    rows: int,
    sort: bool,
    dim: int,
    head: str,
    tail: str,
    shape: Any,
    wide: bool,
    padding: bool,
    zero: bool,
    unpack: bool,
) -> None:
    popular = torch.rand(rows) < 0.3
    popular[0], popular[-1] = True, False
    popular = popular.sort(descending=True)[0] if sort else popular
    options = {"padding_idx": rows // 2 if padding else None, "zero_padding": zero}
    table = in_tiers(popular, dim, head, tail, **options)
    ids = torch.randint(rows, shape, dtype=torch.int64 if wide else torch.int32)
    arguments = arguments_of(table, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "UNPACK_ENTRIES", 1 if unpack else 1 << 25)
        found = kernels.tiered(*arguments)
    assert torch.equal(found, reference.tiered(*arguments))


def test_rows_of_tiers_out_of_range_are_the_nearest() -> None:
    table = in_tiers(torch.arange(30) < 9, 12, "additive", "product")
    ids = torch.tensor([-1, 30, 2**40, -(2**63)])
    nearest = torch.tensor([0, 29, 29, 0])
    expected = reference.tiered(*arguments_of(table, nearest))
    assert torch.equal(kernels.tiered(*arguments_of(table, ids)), expected)


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("padding", [None, 4])
def test_ids_that_pass_no_gradient(repeatable: bool, padding: int | None) -> None:
    case = Case(CodeLayout("additive", 30, 6, 3, 5), padding_idx=padding)
    ids = torch.tensor([0, -1, 4, 29, -1]) if padding is None else torch.tensor([0, 4, 4, 29])
    torch.use_deterministic_algorithms(repeatable)
    try:
        arguments = case.backward(ids)
        found = kernels.lookup_backward(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    close(found, reference.lookup_backward(*arguments))
    kept = ids != case.padding
    same = case.backward(ids[kept], arguments[0][kept])
    close(found, reference.lookup_backward(*same))


def test_runs_that_do_not_start_at_the_first_row_are_not_read_before_their_start() -> None:
    starts, empty = torch.tensor([99, 5])[1:], torch.zeros(0, dtype=torch.uint8)
    arguments = (torch.tensor([2]), starts, torch.tensor([0]), empty, 9, "t")
    popular, place = kernels.tiers(*arguments)
    assert popular.tolist() == [True] and place.tolist() == [0]


def test_views_are_read_as_they_look() -> None:
    case = Case(CodeLayout("additive", 30, 6, 3, 5))
    ids = case.ids(6, 8)
    for view in (ids.T, ids[:, ::2], ids[1:, 3]):
        arguments = case.lookup(view)
        assert torch.equal(kernels.lookup(*arguments), reference.lookup(*arguments))
        arguments = case.backward(view, torch.ones(1).expand(*view.shape, 6))
        close(kernels.lookup_backward(*arguments), reference.lookup_backward(*arguments))


def test_what_the_kernels_cannot_do_goes_to_the_reference(launched: list[str]) -> None:
    double = Case(CodeLayout("additive", 30, 6, 3, 5, torch.float64))
    single = Case(CodeLayout("additive", 30, 6, 3, 5))
    ids = single.ids(2, 4)
    for arguments in (double.lookup(ids), single.lookup(ids, torch.float64)):
        assert torch.equal(kernels.lookup(*arguments), reference.lookup(*arguments))
    for arguments in (double.bag(ids), single.bag(ids, dtype=torch.float64)):
        assert torch.equal(kernels.bag(*arguments), reference.bag(*arguments))
    for grad in (torch.float32, torch.float64):
        arguments = double.backward(ids, torch.ones(2, 4, 6, dtype=grad), torch.float64)
        found = kernels.lookup_backward(*arguments)
        assert torch.equal(found, reference.lookup_backward(*arguments))
    with pytest.raises(TypeError, match="'t'"):
        kernels.lookup(*single.lookup(ids.short()))
    with pytest.raises((RuntimeError, ValueError)):
        kernels.bag(*single.bag(ids, torch.tensor([0, 1])))
    with pytest.raises(RuntimeError):
        kernels.lookup_backward(*single.backward(ids, torch.ones(4, 6)))
    assert not launched


@pytest.mark.parametrize(
    "name", ["lookup", "lookup_backward", "bag", "bag_backward", "tiers", "tiered"]
)
def test_each_operator_is_registered_with_the_arguments_of_its_schema(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: dict[str, Any] = {}

    def record(device: str, *functions: Any) -> None:
        assert device == "cuda"
        registered.update({function.__name__: function for function in functions})

    monkeypatch.setattr(gpu, "serve", record)
    monkeypatch.setattr(ops.fast, "on_gpu", None)
    gpu.register()
    schema = getattr(torch.ops.mec_embed, name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert list(inspect.signature(registered[name]).parameters) == names


def test_kernels_are_compiled_once_for_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(gpu.triton, "jit", lambda function, **options: asked.update(options))

    def example(ids: tl.tensor, lines: tl.int64, size: tl.int32, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def,name-defined]  # noqa: F821
        """Nothing."""

    gpu.kernel(example)
    assert asked.pop("do_not_specialize") == ["lines", "size"]
    assert asked == {"do_not_specialize_on_alignment": ["ids"]}


class GpuKernel:
    """Stands for the C kernel, for tensors that are to be taken for such on a GPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def fast_rows(self, *arguments: Any) -> None:
        return None

    def rows_on_gpu(
        self,
        places: tuple[Any, ...],
        codebooks: tuple[Tensor, ...],
        ready: Any,
        ids: Tensor,
        zero_id: int,
    ) -> int | None:
        if type(ids) is not Tensor or any(guard() for guard in ops.schema.GUARDS):
            return None
        for number in range(0, len(places), 5):
            held, key, value, where, address = places[number : number + 5]
            if held.get(key) is not value or (where and where() != address):
                return 0
        trained = any(one.requires_grad for one in codebooks)
        return 2 if torch.is_grad_enabled() and trained else 1


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Make modules take tensors for such on a GPU, and interpreted kernels for compiled ones."""
    if not ops.cpu.available():
        pytest.skip("the C kernel was not built")
    patch.setattr(ops.cpu, "kernel", GpuKernel(ops.cpu.kernel))
    patch.setattr(ops.fast, "on_gpu", kernels)
    patch.setattr(torch.Tensor, "is_cuda", True)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins :func:`stand_in` where the test wants it to."""
    return lambda: stand_in(monkeypatch)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_the_short_cut_of_modules(padding_idx: int | None, sparse: bool, as_on_gpu: Any) -> None:
    case = Case(CodeLayout("additive", 30, 6, 2, 8), padding_idx=padding_idx)
    table, ids = case.table, case.ids(4, 5)
    table.sparse = sparse
    ids[0] = 3
    weights = torch.randn(4, 5, 6)

    def results() -> tuple[Tensor, Tensor]:
        rows = table(ids)
        return rows, torch.autograd.grad((rows * weights).sum(), table.codebooks)[0]

    expected = results()
    as_on_gpu()
    found = results()
    assert type(found[0].grad_fn).__name__ == "_TrainedRowsBackward"
    assert found[1].is_sparse == sparse
    for one, other in zip(found, expected, strict=True):
        close(one.to_dense(), other.to_dense())
    with torch.no_grad():
        close(table._fast.rows(table, ids), expected[0])
        table.codebook_set.store(2 * table.codebooks)
        close(table._fast.rows(table, ids), 2 * expected[0])
        table.oov_row = 3
        assert table._fast.rows(table, ids) is None


def test_parametrized_codebooks_have_no_short_cut(as_on_gpu: Any) -> None:
    case = Case(CodeLayout("additive", 30, 6, 2, 8), padding_idx=None)
    table, ids = case.table, case.ids(4, 5)
    expected = table(ids)
    parametrize.register_parametrization(table.codebook_set, "codebooks", Twice())
    as_on_gpu()
    assert table._fast.rows(table, ids) is None
    close(table(ids), 2 * expected)


def test_nothing_is_made_ready_where_something_watches(as_on_gpu: Any) -> None:
    """It would be made of what the mode gives for tensors."""
    case = Case(CodeLayout("additive", 30, 6, 2, 8), padding_idx=None)
    table, ids = case.table, case.ids(4, 5)
    as_on_gpu()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert table._fast.rows(table, ids) is None
    assert table._fast._rows is None
    assert table._fast.rows(table, ids) is not None


def test_another_thread_forgets_what_is_ready(as_on_gpu: Any) -> None:
    case = Case(CodeLayout("additive", 30, 6, 2, 8), padding_idx=None)
    table, ids = case.table, case.ids(4, 5)
    expected = table(ids)
    as_on_gpu()
    kernel = ops.cpu.kernel
    check = kernel.rows_on_gpu

    def interrupted(*arguments: Any) -> int:
        state = check(*arguments)
        table._fast.forget()
        return state

    kernel.rows_on_gpu = interrupted
    found = table._fast.rows(table, ids)
    close(found, expected)
    assert found.requires_grad


def some_popular(kind: str) -> Tensor:
    return torch.arange(300) < 60 if kind == "runs" else torch.rand(300) < 0.2


@pytest.mark.parametrize("kind", ["bitmap", "runs"])
def test_the_short_cut_of_tiers(kind: str, as_on_gpu: Any) -> None:
    table = in_tiers(some_popular(kind), 6, "additive", "additive", padding_idx=7)
    ids = torch.randint(300, (5, 9))
    ids[0] = 7
    expected = table(ids).detach()
    as_on_gpu()
    with torch.no_grad():
        for given, wanted in ((ids, expected), (ids.int(), expected), (ids[:0], expected[:0])):
            found = table._fast.rows(table, given)
            assert found is not None
            close(found, wanted)
        table.tier_map.before.add_(1)  # in place: also of the kernel
        assert not torch.equal(table._fast.rows(table, ids), expected)
        table.tier_map.before = table.tier_map.before - 1
        close(table._fast.rows(table, ids), expected)
        table.tail.codebook_set.store(2 * table.tail.codebooks)
        close(table._fast.rows(table, ids), table._decode(ids))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["bitmap", "runs"]),
    head=st.sampled_from(["additive", "product", "rows"]),
    tail=st.sampled_from(["additive", "product", "one row", "rows"]),
    sparse=st.booleans(),
    padding=st.booleans(),
    repeatable=st.booleans(),
    copies=st.booleans(),
    shape=st.sampled_from([(5, 9), (0, 3), (400,), "column"]),
)
def test_gradients_on_the_short_cut_of_tiers(
    kind: str,
    head: str,
    tail: str,
    sparse: bool,
    padding: bool,
    repeatable: bool,
    copies: bool,
    shape: Any,
) -> None:
    table = in_tiers(some_popular(kind), 12, head, tail, padding_idx=7 if padding else None)
    table.head.sparse = table.tail.sparse = sparse
    ids = torch.randint(300, (50, 3))[:, 1] if shape == "column" else torch.randint(300, shape)
    ids[:1] = 7
    weights = torch.randn(*ids.shape, 12)
    books = table.head.codebooks, table.tail.codebooks

    def results() -> tuple[Tensor, ...]:
        rows = table(ids)
        return (rows, *torch.autograd.grad((rows * weights).sum(), books))

    torch.use_deterministic_algorithms(repeatable)
    try:
        expected = results()
        with pytest.MonkeyPatch.context() as patch:
            if copies:
                patch.setattr(kernels, "COPY_LOOKUPS", 1)
                patch.setattr(kernels, "CHUNKS", 16)
            stand_in(patch)
            found = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert type(found[0].grad_fn).__name__ == "_TrainedRowsBackward"
    assert found[1].is_sparse == sparse
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-2, atol=1e-2)


def test_no_gradient_is_summed_for_a_tier_that_is_not_trained(as_on_gpu: Any) -> None:
    """Of a tier kept as rows, the sums are as large as its table."""
    table = in_tiers(some_popular("bitmap"), 12, "rows", "additive", padding_idx=7)
    table.head.codebooks.requires_grad_(False)
    ids, books = torch.randint(300, (9,)), table.tail.codebooks
    expected = torch.autograd.grad(table._decode(ids).square().sum(), books)[0]
    as_on_gpu()
    rows = table(ids)
    assert type(rows.grad_fn).__name__ == "_TrainedRowsBackward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels._Sums, "of", None)
        close(torch.autograd.grad(rows.square().sum(), books)[0], expected)


def test_tensors_on_the_cpu_take_the_places_of_those_on_a_gpu() -> None:
    table = Case(CodeLayout("additive", 300, 6, 2, 8)).table
    ids = torch.arange(3)
    with torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch)
            expected = table(ids)
            assert table._fast._rows is not None
        state = {name: values.clone() for name, values in table.state_dict().items()}
        table.load_state_dict(state, assign=True)
        found = table._fast.rows(table, ids)
    assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize("padding", [None, 0, 299])
def test_ids_out_of_range_of_tiers_pass_the_same_gradients_both_ways(
    padding: int | None, as_on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = in_tiers(some_popular("bitmap"), 6, "additive", "additive", padding_idx=padding)
    as_on_gpu()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr(ops.schema, "tiers", kernels.tiers)
    monkeypatch.setattr(ops.schema, "_lookup_backward", kernels.lookup_backward)
    rows = table(torch.tensor([-1, -5, 300, 2**40, 7]))
    grad = torch.randn(5, 6)
    found = torch.autograd.grad(rows, list(table.parameters()), grad, retain_graph=True)
    for one, other in zip(
        found, ops.schema.grads_tiered(rows.grad_fn, grad, (True, True)), strict=True
    ):
        close(one, other)


@pytest.mark.parametrize("in_parts", [False, True])
def test_gradients_of_gradients_on_the_short_cut(in_parts: bool, as_on_gpu: Any) -> None:
    table: Any = Case(CodeLayout("additive", 300, 6, 2, 8), padding_idx=None).table
    if in_parts:
        table = in_tiers(some_popular("bitmap"), 6, "additive", "additive")
    ids, books = torch.randint(300, (4, 5)), list(table.parameters())

    def results() -> tuple[Tensor, ...]:
        rows = table(ids)
        first = torch.autograd.grad(rows.square().sum(), books, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), books)

    expected = results()
    as_on_gpu()
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_parts", [False, True])
def test_many_gradients_at_once_on_the_short_cut(in_parts: bool, as_on_gpu: Any) -> None:
    table: Any = Case(CodeLayout("additive", 300, 6, 2, 8), padding_idx=None).table
    if in_parts:
        table = in_tiers(some_popular("bitmap"), 6, "additive", "additive")
    ids, books = torch.randint(300, (20,)), list(table.parameters())
    weights = torch.randn(3, 20, 6)

    def results() -> tuple[Tensor, ...]:
        return torch.autograd.grad(table(ids), books, weights, is_grads_batched=True)

    expected = results()
    as_on_gpu()
    for one, other in zip(results(), expected, strict=True):
        close(one, other)


def test_backends_names_triton_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert ops.backends()["cuda"] == "torch"
    monkeypatch.setattr(ops, "_gpu", gpu)
    monkeypatch.setattr(gpu, "available", lambda: True)
    assert ops.backends()["cuda"] == "triton"
    monkeypatch.setattr(ops, "_gpu", None)
    assert ops.backends()["cuda"] == "torch"


def test_without_a_compiler_or_a_gpu_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CodeLayout("additive", 30, 6, 3, 5))
    arguments = case.lookup(case.ids(4))
    assert torch.equal(gpu.lookup(*arguments), reference.lookup(*arguments))
    serves = gpu._serves.__wrapped__
    device = torch.device("cuda", 0)
    assert not serves(torch.device("cpu"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert serves(device)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert not serves(device)
    monkeypatch.setenv("CC", "cc")
    assert serves(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not serves(device)


def test_an_older_triton_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(ImportError, match="3.1.0"):
        _interpreted()
    monkeypatch.delitem(sys.modules, "mec_embed.ops.gpu")
    monkeypatch.delattr(ops, "gpu")
    assert ops._import_gpu() is None


LAYOUTS = {
    "additive": CodeLayout("additive", 300, 40, 5, 20),
    "product": CodeLayout("product", 300, 40, 5, 300, torch.bfloat16),
    "int8": CodeLayout("product", 300, 129, 3, 300, torch.int8),
    "rows": CodeLayout("rows", 300, 33, 1, 300, torch.float16),
    "one": CodeLayout("additive", 1, 4, 2, 1),
}


def launches(name: str) -> list[tuple[Any, ...]]:
    """What the operators launch on tables of the layout ``name``, without launching it."""
    found: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_serves", lambda device: True)
        patch.setattr(
            gpu._Launcher,
            "__call__",
            lambda launcher, grid, *arguments: found.append(
                (launcher.function, arguments, launcher.constants)
            ),
        )
        patch.setattr(gpu, "COUNTED_BAGS", ((3, 128), (0, 32)))
        patch.setattr(gpu, "UNPACK_ENTRIES", 300 * 129)
        case = Case(LAYOUTS[name], padding_idx=0)
        ids = case.ids(1 if name == "one" else 300)
        some = ids.view(1, 1) if name == "one" else ids.view(60, 5)
        gpu.lookup(*case.lookup(ids, torch.bfloat16))
        offsets = torch.tensor([0] if name == "one" else [0, 4])
        gpu.bag(*case.bag(ids, offsets, torch.rand(len(ids))))
        gpu.bag(*case.bag(ids, offsets))
        gpu.bag(*case.bag(some.int(), mode="mean", dtype=torch.float16))
        if name != "int8":
            arguments = case.backward(ids)
            gpu.lookup_backward(*arguments)
            table = gpu._Table.of(*arguments[2:6], *arguments[7:10])
            given = gpu._Gradient(arguments[0])
            gpu._sum_sorted(table, given, ids, 3, torch.float32)
            gpu._sum_atomically(table, given, ids, 3, torch.float32)
            bags = torch.zeros_like(ids)
            for share in (None, torch.rand(len(ids))):
                given = gpu._Gradient(arguments[0][:1], bags, share)
                gpu._sum_sorted(table, given, ids, 3, torch.float32)
                gpu._sum_atomically(table, given, ids, 3, torch.float32)
        maps = (torch.arange(300) < 9, torch.arange(300) % 3 == 0)
        for popular in maps if name == "additive" else ():
            tier_map = TierMap.of(popular)
            gpu.tiers(ids, tier_map.starts, tier_map.before, tier_map.bitmap, 300, "t")
            for tail in TIERS:
                table = in_tiers(popular, 48, "int8", tail, padding_idx=0)
                gpu.tiered(*arguments_of(table, ids))
    return found


def compiled(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, int], arch: int) -> Any:
    """``kernel`` compiled as a launch with these arguments would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    signature = dict.fromkeys(constants, "constexpr")
    aligned = {}
    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        if value is None:
            constants[parameter.name] = None
        # As a launch does with numbers that are 1: the kernel sees no tensor then.
        if isinstance(value, int) and value == 1:
            constants[parameter.name] = 1
        if parameter.name in constants:
            kind = "constexpr"
        else:
            kind = parameter.annotation_type or mangle_type(value)
        signature[parameter.name] = kind
        if isinstance(value, Tensor):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_compile_for_gpus(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, arguments, constants in launches(name):
        for arch in (80, 90):
            built = compiled(kernel, arguments, constants, arch)
            assert built.asm["cubin"]
            # What a program takes of the memory that it shares with others on a processor.
            counted = kernel.__name__ == "_counted_bags_kernel"
            assert built.metadata.shared <= (96 << 10 if counted else 16 << 10)
        code = built.asm["ttir"]
        assert ("tt.atomic_rmw" in code) == (kernel.__name__ == "_add_kernel")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE_LAYOUTS = {
    "additive": CodeLayout("additive", 3000, 40, 5, 20),
    "product": CodeLayout("product", 3000, 48, 6, 300),
    "rows": CodeLayout("rows", 3000, 33, 1, 3000),
    "narrow": CodeLayout("additive", 3000, 40, 5, 20, torch.bfloat16),
    "int8": CodeLayout("additive", 3000, 40, 5, 20, torch.int8),
}
TRAINABLE = [name for name in DEVICE_LAYOUTS if name != "int8"]


def on_gpu(name: str, **options: Any) -> tuple[Case, Tensor]:
    """A table and ids (500, 7), a fifth of them padding, which makes some codewords hot."""
    case = Case(DEVICE_LAYOUTS[name], "cuda", padding_idx=7, **options)
    ids = case.ids(500, 7)
    ids[::5] = 7
    return case, ids


@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", DEVICE_LAYOUTS)
def test_gpu_outputs(name: str, dtype: torch.dtype) -> None:
    assert ops.backends()["cuda"] == "triton"
    case, ids = on_gpu(name)
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    expected = reference.lookup(*case.lookup(ids))
    torch.testing.assert_close(ops.lookup(*case.lookup(ids, dtype)).float(), expected, **near)
    for arguments in ((ids,), (ids, None, torch.rand(ids.shape, device="cuda")), (ids.int(),)):
        found = ops.bag(*case.bag(*arguments, dtype=dtype)).float()
        torch.testing.assert_close(found, reference.bag(*case.bag(*arguments)), **near)
    offsets = torch.arange(0, 3500, 50, device="cuda")
    found = ops.bag(*case.bag(ids.flatten(), offsets, mode="mean", dtype=dtype)).float()
    expected = reference.bag(*case.bag(ids.flatten(), offsets, mode="mean"))
    torch.testing.assert_close(found, expected, **near)


@needs_gpu
@pytest.mark.parametrize("copies", [1, 10_000])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gpu_gradients(name: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "COPY_LOOKUPS", copies)
    case, ids = on_gpu(name)
    arguments = case.backward(ids)
    found = torch.ops.mec_embed.lookup_backward(*arguments)
    expected = reference.lookup_backward(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("name", TRAINABLE)
def test_gpu_deterministic_gradients_are_repeatable(name: str, deterministic: None) -> None:
    case, ids = on_gpu(name)
    arguments = case.backward(ids)
    found = [torch.ops.mec_embed.lookup_backward(*arguments) for _ in range(10)]
    assert all(torch.equal(one, found[0]) for one in found)
    expected = reference.lookup_backward(*arguments)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("name", TRAINABLE)
def test_gpu_nothing_makes_the_host_wait(name: str, repeatable: bool) -> None:
    case, ids = on_gpu(name)
    bags = CompressedEmbeddingBag(
        case.layout,
        mode="mean",
        code_table=case.table.code_table,
        codebook_set=case.table.codebook_set,
    ).cuda()
    torch.use_deterministic_algorithms(repeatable)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.table(ids).sum().backward()
        bags(ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_gpu_tiers() -> None:
    ids = torch.randint(1000, (5000,), device="cuda")
    for popular in (torch.arange(1000) < 90, torch.rand(1000) < 0.3):
        tier_map = TierMap.of(popular).cuda()
        arguments = (ids, tier_map.starts, tier_map.before, tier_map.bitmap, 1000, "t")
        pairs = zip(ops.tiers(*arguments), reference.tiers(*arguments), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@needs_gpu
@pytest.mark.parametrize("tail", TIERS)
@pytest.mark.parametrize("count", [9, 100_000])
def test_gpu_rows_of_tiers(tail: str, count: int) -> None:
    popular = torch.rand(3000) < 0.3
    table = in_tiers(popular, 48, "additive", tail, "cuda", padding_idx=7)
    ids = torch.randint(3000, (count,), device="cuda")
    out, expected = table(ids), reference.tiered(*arguments_of(table, ids))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    books = [tier.codebooks for tier in table.tiers if tier.codebooks.requires_grad]
    factor = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad((out * factor).sum(), books),
        torch.autograd.grad((expected * factor).sum(), books),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@needs_gpu
@pytest.mark.parametrize("name", TRAINABLE)
def test_gpu_graphs_replay_on_other_ids(name: str) -> None:
    case, ids = on_gpu(name)
    grad = torch.randn(500, 7, case.layout.embedding_dim, device="cuda")

    def run() -> tuple[Tensor, ...]:
        rows = ops.lookup(*case.lookup(ids))
        bags = ops.bag(*case.bag(ids))
        return rows, bags, torch.ops.mec_embed.lookup_backward(*case.backward(ids, grad))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    ids.copy_(case.ids(500, 7))
    graph.replay()
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("name", DEVICE_LAYOUTS)
def test_gpu_compile(name: str) -> None:
    case, ids = on_gpu(name)
    torch._dynamo.reset()
    compiled = torch.compile(case.table, fullgraph=True)
    out, expected = compiled(ids), case.table(ids)
    torch.testing.assert_close(out, expected)
    if name != "int8":
        books = case.table.codebooks
        (grad,) = torch.autograd.grad(out.float().square().sum(), books)
        (wanted,) = torch.autograd.grad(expected.float().square().sum(), books)
        torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=1e-2)


@needs_gpu
@pytest.mark.parametrize("name", DEVICE_LAYOUTS)
def test_gpu_opcheck(name: str) -> None:
    case, ids = on_gpu(name)
    operators = torch.ops.mec_embed
    calls = [(operators.lookup, case.lookup(ids[:9])), (operators.bag, case.bag(ids[:9]))]
    if name != "int8":
        calls.append((operators.lookup_backward, case.backward(ids[:9])))
    for operator, arguments in calls:
        for argument in arguments:
            if name != "int8" and isinstance(argument, Tensor) and argument.is_floating_point():
                argument.requires_grad_()
        torch.library.opcheck(operator.default, arguments)


def of_table(table: CompressedEmbedding, ids: Tensor) -> tuple[Any, ...]:
    """What a table passes to the operator."""
    layout, books = table.layout, table.codebook_set
    shape = layout.num_embeddings, layout.embedding_dim, layout.bits
    options = table.padding_idx, table.zero_padding, False, table.output_dtype.dtype, "t"
    return (ids, table.codes, books.codebooks.detach(), books.scales, *shape, *options)


@needs_gpu
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_gpu_short_cut_follows_what_changes(change: str | None) -> None:
    # Of 16 codewords, any bits are codes.
    table = Case(CodeLayout("additive", 300, 12, 3, 16), "cuda", padding_idx=7).table
    ids = torch.randint(300, (50, 7), device="cuda")
    with torch.no_grad():
        table(ids)
        if change:
            CHANGES[change](table)
        for given in (ids, ids.int(), ids.t(), ids[:0], ids[0, 0], ids.flatten()[:1]):
            found = table._fast.rows(table, given)
            assert found is not None and found.dtype is table.output_dtype.dtype
            assert torch.equal(found, table._decode(given))
            plain = reference.lookup(*of_table(table, given))
            torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-2)
    books = table.codebooks
    weights = torch.randn(*ids.shape, 12, device="cuda", dtype=table.output_dtype.dtype)
    for again in (False, True):
        gradients = [
            torch.autograd.grad((given * weights).sum(), books, create_graph=again)[0]
            for given in (table._fast.rows(table, ids), table._decode(ids))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


@needs_gpu
def test_gpu_short_cut_leaves_the_rest_to_the_operators() -> None:
    case, ids = on_gpu("additive")
    table, rows = case.table, case.layout.num_embeddings
    with torch.no_grad():
        expected = table(ids)
        assert table._fast.rows(table, ids.short()) is None
        with pytest.raises(TypeError, match="int32 or int64"):
            table(ids.short())
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            assert torch.equal(table(ids), expected)
        table.oov_row = 2
        assert torch.equal(table(ids + rows), table(torch.full_like(ids, 2)))
        table.cpu()
        assert torch.equal(table(ids.cpu()), expected.cpu())
        table.cuda()
        table.oov_row = None
        assert torch.equal(table(ids), expected)
        seen = []

        class Operators(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        with Operators():
            assert torch.equal(table(ids), expected)
        assert any("mec_embed.lookup" in name for name in seen)


@needs_gpu
@pytest.mark.parametrize("kind", ["bitmap", "runs"])
def test_gpu_short_cut_of_tiers(kind: str) -> None:
    popular = torch.arange(3000) < 600 if kind == "runs" else torch.rand(3000) < 0.2
    tiers = [
        Case(CodeLayout("additive", int(rows), 40, count, 20), "cuda").table
        for rows, count in ((popular.sum(), 6), ((~popular).sum(), 2))
    ]
    table = TieredEmbedding(TierMap.of(popular).cuda(), *tiers, padding_idx=7)
    ids = torch.randint(3000, (500, 7), device="cuda")
    with torch.no_grad():
        found = table._fast.rows(table, ids)
        assert found is not None
        torch.testing.assert_close(found, table._decode(ids))
        popular_ids, places = reference.tiers(ids, *arguments_of(table, ids)[1:4], 3000, "t")
        rows = [tier._decode(places.clamp(max=tier.num_embeddings - 1)) for tier in tiers]
        expected = torch.where(popular_ids[..., None], *rows)
        torch.testing.assert_close(found, expected.masked_fill((ids == 7)[..., None], 0))
    weights, books = torch.randn(500, 7, 40, device="cuda"), list(table.parameters())
    gradients = [
        torch.autograd.grad((given * weights).sum(), books)
        for given in (table._fast.rows(table, ids), table._decode(ids))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@needs_gpu
def test_gpu_threads() -> None:
    """A thread that has not asked for a device before, with a kernel that is ready."""
    case, ids = on_gpu("additive")
    with torch.no_grad():
        expected = [case.table(ids) for _ in range(2)][1]
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(torch.no_grad()(case.table), ids).result()
    assert torch.equal(found, expected)


@needs_gpu
def test_gpu_compiled_kernels_are_launched_by_the_driver() -> None:
    table, ids = on_gpu("additive")[0].table, torch.arange(3, device="cuda")
    with torch.no_grad():
        table(ids)
    assert (table._fast._rows[0].ready[2] is not None) == (driver._driver() is not None)
