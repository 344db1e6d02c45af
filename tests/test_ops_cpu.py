"""The C kernel against the plain-torch reference: bit for bit where sums are made in float32."""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import gc
import mmap
import os
import pickle
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_model import arguments_of
from torch import Tensor
from torch.nn.utils import parametrize, prune

from mec_embed import CodeLayout, CompressedEmbedding, CompressedEmbeddingBag, ops
from mec_embed.modules import DecodedBags
from mec_embed.ops import backends, cpu, reference
from mec_embed.packing import pack
from mec_embed.tiers import TieredEmbedding, TieredEmbeddingBag, TierMap

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C kernel was not built")


@pytest.fixture(scope="module", params=[64, 32, 16], autouse=True)
def _vectors(request: pytest.FixtureRequest) -> Iterator[None]:
    """All by the code for AVX-512, for AVX2, and for any processor, where this one runs it."""
    cpu.kernel.limit_vectors(request.param)
    yield
    cpu.kernel.limit_vectors(64)


def _table(layout: CodeLayout, seed: int = 0, **options: Any) -> CompressedEmbedding:
    torch.manual_seed(seed)
    table = CompressedEmbedding(layout, **options)
    if layout.bits:
        codes = torch.randint(layout.codebook_size, (layout.num_embeddings, layout.num_subvectors))
        table.codes.copy_(pack(codes, layout.bits))
    shape = layout.num_subvectors, layout.codebook_size, layout.subvector_dim
    table.codebook_set.store(torch.randn(shape))
    return table


def _arguments(table: CompressedEmbedding, ids: Tensor) -> tuple[Any, ...]:
    layout, books = table.layout, table.codebook_set
    padding = -1 if table.padding_idx is None else table.padding_idx
    return (
        ids,
        table.codes,
        books.codebooks.detach(),
        books.scales,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        padding,
        table.zero_padding,
        False,
        table.output_dtype.dtype,
        "t",
    )


@st.composite
def _layouts(draw: st.DrawFn) -> CodeLayout:
    kind = draw(st.sampled_from(["additive", "product", "rows"]))
    rows = draw(st.integers(1, 200))
    count = draw(st.integers(1, 20))
    width = draw(st.integers(1, 129 // count)) if kind == "product" else draw(st.integers(1, 129))
    dim = width * count if kind == "product" else width
    size = draw(st.sampled_from([2, 3, 16, 20, 256, 300, 2048]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]))
    if kind == "rows":
        return CodeLayout("rows", rows, dim, 1, rows, dtype)
    return CodeLayout(kind, rows, dim, count, size, dtype)


@settings(deadline=None, max_examples=150)
@given(
    layout=_layouts(),
    wide=st.booleans(),
    shape=st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (600,)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    padding=st.booleans(),
    zero=st.booleans(),
)
def test_outputs_are_those_of_the_reference_bit_for_bit(
    layout: CodeLayout, wide: bool, shape: Any, dtype: torch.dtype, padding: bool, zero: bool
) -> None:
    padding_idx = layout.num_embeddings // 2 if padding else None
    table = _table(layout, padding_idx=padding_idx, zero_padding=zero, dtype=dtype)
    ids = torch.randint(layout.num_embeddings, shape)
    arguments = _arguments(table, ids if wide else ids.int())
    found = cpu.lookup(*arguments)
    assert found.dtype is dtype and found.shape == (*shape, layout.embedding_dim)
    assert torch.equal(found, reference.lookup(*arguments))


@settings(deadline=None, max_examples=60)
@given(layout=_layouts(), count=st.integers(0, 300), padding=st.booleans())
def test_gradients_are_those_of_the_reference(
    layout: CodeLayout, count: int, padding: bool
) -> None:
    table = _table(layout)
    ids = torch.randint(layout.num_embeddings, (count,))
    arguments = (
        torch.randn(count, layout.embedding_dim),
        ids,
        table.codes,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        layout.num_embeddings // 2 if padding else -1,
        layout.num_subvectors,
        layout.codebook_size,
        layout.subvector_dim,
        torch.float32,
    )
    torch.testing.assert_close(
        cpu.lookup_backward(*arguments),
        reference.lookup_backward(*arguments),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(deadline=None, max_examples=100)
@given(
    layout=_layouts(),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    kind=st.sampled_from(["2-D", "offsets", "last offset"]),
    how=st.sampled_from(["sum", "mean", "weights"]),
    padding=st.booleans(),
    wide=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_gradients_of_bags_are_those_of_the_reference(
    layout: CodeLayout,
    lengths: list[int],
    kind: str,
    how: str,
    padding: bool,
    wide: bool,
    dtype: torch.dtype,
) -> None:
    table = _table(layout)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    shape = (len(lengths), lengths[0]) if kind == "2-D" else (int(ends[-1]),)
    ids = torch.randint(layout.num_embeddings, shape, dtype=torch.int64 if wide else torch.int32)
    offsets = {"2-D": None, "offsets": ends[:-1], "last offset": ends}[kind]
    grad = torch.randn(len(lengths), layout.embedding_dim).to(dtype)
    arguments = (
        ids,
        offsets,
        torch.randn(shape) if how == "weights" else None,
        table.codes,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        layout.num_embeddings // 2 if padding else -1,
        "mean" if how == "mean" else "sum",
        kind == "last offset",
        layout.num_subvectors,
        layout.codebook_size,
        layout.subvector_dim,
        torch.float32,
    )
    torch.testing.assert_close(
        cpu.bag_backward(grad, *arguments),
        reference.bag_backward(grad.double(), *arguments),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("offsets", [[1, 5], [0, 5000], [0, -1], [0, 9, 4]])
def test_gradients_of_bags_whose_offsets_do_not_fit(offsets: list[int]) -> None:
    table, ids = _table(CodeLayout("additive", 300, 16, 2, 16)), torch.randint(300, (900,))
    grad, starts = torch.ones(len(offsets), 16), torch.tensor(offsets)
    layout = (300, 16, 4, -1, "sum", False, 2, 16, 16, torch.float32)
    with pytest.raises((ValueError, IndexError), match="offsets"):
        cpu.bag_backward(grad, ids, starts, None, table.codes, *layout)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=100)
@given(
    dim=st.sampled_from([1, 7, 8, 10, 16, 33, 40, 64, 72, 128, 200]),
    count=st.sampled_from([1, 2, 3, 8, 9, 20, 40]),
    size=st.sampled_from([2, 5, 32]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    rows=st.sampled_from([50, 3001]),
    ids=st.sampled_from([0, 1, 127, 128, 129, 3001]),
    padding=st.booleans(),
    wide=st.booleans(),
)
def test_calls_of_many_ids_work_in_rounds_or_unpack_the_table(
    dim: int,
    count: int,
    size: int,
    dtype: torch.dtype,
    rows: int,
    ids: int,
    padding: bool,
    wide: bool,
) -> None:
    table = _table(
        CodeLayout("additive", rows, dim, count, size, dtype),
        padding_idx=3 if padding else None,
        requires_grad=False,
    )
    table.codebook_set.store(torch.randn(count, size, dim))
    columns = torch.randint(rows, (ids, 2), dtype=torch.int64 if wide else torch.int32)
    for view in (columns.reshape(-1), columns[:, 1]):
        expected = reference.lookup(*_arguments(table, view))
        assert torch.equal(cpu.lookup(*_arguments(table, view)), expected)
        assert torch.equal(table._fast.rows(table, view), expected)


@given(
    count=st.integers(2, 40),
    size=st.sampled_from([5, 60, 300]),
    dim=st.integers(1, 130) | st.sampled_from([249, 256]),
    apart=st.integers(0, 9),
    scales=st.sampled_from(["powers", "powers of codewords", "any", "one is zero"]),
    padding=st.sampled_from([-1, 7]),
    length=st.integers(1, 400),
    threads=st.integers(1, 2),
    many=st.sampled_from([30, 2500]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=100)
def test_whole_numbers_are_added_exactly(
    count: int,
    size: int,
    dim: int,
    apart: int,
    scales: str,
    padding: int,
    length: int,
    threads: int,
    many: int,
    seed: int,
) -> None:
    """Of int8 codebooks whose scales are powers of two, in 16 bits where these do not overflow."""
    table = _table(CodeLayout("additive", 9000, dim, count, size, torch.int8), seed)
    books = table.codebook_set
    extremes = torch.tensor([-128, -127, 127], dtype=torch.int8)
    books.codebooks.copy_(extremes[torch.randint(3, books.codebooks.shape)])
    # The sum of the first codewords is the largest.
    books.codebooks[:, 0] = -128 if seed % 2 else 127
    each = size if scales == "powers of codewords" else 1
    found = torch.exp2(torch.randint(-3, apart - 2, (count, each)).float())
    if not scales.startswith("powers"):
        found = found * (1 + torch.rand(found.shape))
    books.scales.copy_(found)
    if scales == "one is zero":
        books.scales[-1, -1] = 0
    table.codes.copy_(pack(torch.randint(size, (9000, count)), table.layout.bits))
    table.codes[: 100 * table.layout.row_bits // 8] = 0
    ids = torch.cat([torch.randint(9000, (2000,)), torch.randint(100, (500,))])[-many:]
    if padding >= 0:
        ids[::3] = padding
    arguments = list(_arguments(table, ids))
    arguments[7:9] = padding, padding >= 0
    expected = reference.lookup(*arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.lookup(*arguments), expected)
        offsets = torch.arange(0, len(ids), length)
        rest = (padding, "sum", False, False, torch.float32, "t")
        found = cpu.bag(ids, offsets, None, *arguments[1:7], *rest)
    finally:
        torch.set_num_threads(before)
    bags = torch.stack([one.double().sum(0) for one in expected.split(length)])
    most = count * length * 128 << apart
    if scales == "powers" and most < 1 << 24:  # exact in float32
        assert torch.equal(found.double(), bags)
    else:
        torch.testing.assert_close(found.double(), bags, rtol=1e-4, atol=1e-6 * most)


@pytest.mark.parametrize("count", [30, 2500])
@pytest.mark.parametrize("exponent", [110, 121, 127])
def test_sums_that_are_no_floats_are_as_in_the_reference(exponent: int, count: int) -> None:
    """Numbers of 16 bits stay finite where floats do not."""
    table = _table(CodeLayout("additive", 2500, 64, 8, 4, torch.int8))
    books = table.codebook_set
    books.codebooks.copy_(torch.tensor([127, -128] * 4, dtype=torch.int8)[:, None, None])
    books.scales.fill_(2.0**exponent)
    ids = torch.arange(count)
    expected = reference.lookup(*_arguments(table, ids))
    assert bool(expected.isfinite().all()) == (exponent == 110)
    torch.testing.assert_close(
        cpu.lookup(*_arguments(table, ids)), expected, rtol=0, atol=0, equal_nan=True
    )


def _before_a_wall(values: Tensor) -> Tensor:
    """A copy that ends where the next byte must not be read."""
    page, count = mmap.PAGESIZE, values.numel() * values.element_size()
    size = -(-count // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(start + size, page, 0) == 0
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=size - count)
    return copy.view(values.shape).copy_(values)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for a page")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("dim", [8, 10, 26, 32, 40, 57, 64, 88, 120, 128, 136, 250, 384])
@pytest.mark.parametrize("padding", [-1, 3])
def test_nothing_is_read_behind_the_codebooks(dim: int, dtype: torch.dtype, padding: int) -> None:
    """Codewords that stay where they are are read by whole vectors."""
    table = _table(CodeLayout("additive", 5000, dim, 3, 8, dtype))
    books = table.codebook_set
    for count in (1, 30, 4000):
        ids = torch.arange(count) % 50
        arguments = list(_arguments(table, ids))
        arguments[2] = _before_a_wall(books.codebooks.detach())
        if books.scales is not None:
            arguments[3] = _before_a_wall(books.scales)
        arguments[7:9] = padding, padding >= 0
        expected = reference.lookup(*arguments)
        assert torch.equal(cpu.lookup(*arguments), expected)
        offsets = torch.arange(0, count, 7)
        rest = (padding, "sum", False, False, torch.float32, "t")
        found = cpu.bag(ids, offsets, None, *arguments[1:7], *rest)
        bags = torch.stack([one.sum(0) for one in expected.split(7)])
        torch.testing.assert_close(found, bags, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 10, 40, 120, 128, 250])
@pytest.mark.parametrize("work", ["rows", "bags", "tiers"])
@pytest.mark.parametrize("count", [3, 20])
def test_nothing_is_written_behind_the_output(
    dim: int, work: str, count: int, threads: Any
) -> None:
    threads(2)
    table = _table(CodeLayout("additive", 300, dim, count, 16, torch.int8), requires_grad=False)
    plan = table._pack_plan()
    if work == "tiers":
        tier_map, popular = _popular(300)
        head = _table(CodeLayout("additive", popular, dim, 4, 16), requires_grad=False)
        tail = _table(CodeLayout("additive", 300 - popular, dim, 1, 16), requires_grad=False)
        plan = TieredEmbedding(tier_map, head, tail)._pack_plan()
    ids = torch.randint(300, (1500,))
    free = 0.1  # no sum of int8 codewords, whose scales are powers of two
    out = torch.full((1600, dim), free)
    if work == "bags":
        arguments = (0, 0, 300, 5, 0, 0, out.data_ptr(), 2)
        assert not cpu.kernel.bags(plan, ids.data_ptr(), 8, 1500, -1, *arguments)
    else:
        assert not cpu.kernel.rows(plan, ids.data_ptr(), 8, 1500, -1, out.data_ptr(), 2)
    written = 300 if work == "bags" else 1500
    assert (out[written:] == free).all() and (out[:written] != free).all()


@pytest.fixture(params=["OpenMP", "pool"])
def kinds_of_threads(request: pytest.FixtureRequest) -> Any:
    """The threads of torch's OpenMP runtime, where it has some, and those of the kernel."""
    if request.param == "OpenMP" and not cpu._open_mp():
        pytest.skip("torch runs on no OpenMP runtime that offers its threads")
    cpu.kernel.share_threads(cpu._open_mp() if request.param == "OpenMP" else 0)
    yield request.param
    cpu.kernel.share_threads(cpu._open_mp())


@pytest.mark.usefixtures("kinds_of_threads")
@pytest.mark.parametrize("size", [32, 2048])  # codewords that are widened, and too many for that
@pytest.mark.parametrize("count", [1025, 1500, 20_000])
def test_threads_share_the_work_and_change_nothing(size: int, count: int, threads: Any) -> None:
    tier_map, popular = _popular(50_000)
    parts = [
        _table(CodeLayout("additive", rows, 40, codes, size, torch.int8), requires_grad=False)
        for rows, codes in ((50_000, 5), (popular, 3), (50_000 - popular, 1))
    ]
    bags = CompressedEmbeddingBag(
        parts[0].layout, code_table=parts[0].code_table, codebook_set=parts[0].codebook_set
    )
    tables = [parts[0], TieredEmbedding(tier_map, *parts[1:]), bags]
    ids = torch.randint(50_000, (count // 5, 5))
    threads(1)
    alone = [table(ids) for table in tables]
    by_operator = cpu.lookup(*_arguments(parts[0], ids))
    for number in (2, 3, 4):
        threads(number)
        for _ in range(20):
            assert torch.equal(cpu.lookup(*_arguments(parts[0], ids)), by_operator)
            for table, expected in zip(tables, alone, strict=True):
                assert torch.equal(table(ids), expected)


@pytest.mark.usefixtures("kinds_of_threads")
def test_several_python_threads_may_look_up_at_once(threads: Any) -> None:
    threads(2)
    table = _table(CodeLayout("additive", 5000, 40, 5, 32))
    ids = torch.randint(5000, (8, 4000))
    expected = reference.lookup(*_arguments(table, ids))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda one: cpu.lookup(*_arguments(table, one)), ids))
            assert torch.equal(torch.stack(found), expected)


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(),
    reason="torch runs on no GNU OpenMP here",
)
def test_no_threads_are_started_beside_those_of_torch(threads: Any) -> None:
    threads(3)
    torch.ones(1 << 20).add_(1)
    before = len(os.listdir("/proc/self/task"))
    table = _table(CodeLayout("additive", 5000, 40, 5, 32))
    ids = torch.randint(5000, (20_000,))
    assert torch.equal(
        cpu.lookup(*_arguments(table, ids)), reference.lookup(*_arguments(table, ids))
    )
    assert len(os.listdir("/proc/self/task")) <= before


@pytest.mark.usefixtures("kinds_of_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_look_up(monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    threads(1)  # torch's own threads would not survive the fork
    monkeypatch.setattr(cpu, "threads_for", lambda count, columns: 2)
    table = _table(CodeLayout("additive", 5000, 40, 5, 32))
    ids = torch.randint(5000, (4000,))
    expected = cpu.lookup(*_arguments(table, ids))
    child = os.fork()
    if not child:
        same = torch.equal(cpu.lookup(*_arguments(table, ids)), expected)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
@pytest.mark.parametrize("count", [1, 5000])
def test_ids_out_of_range_are_named(bad: int, count: int, threads: Any) -> None:
    threads(2)
    table = _table(CodeLayout("additive", 300, 40, 5, 32))
    ids = torch.randint(300, (count,))
    ids[count // 2] = bad
    with pytest.raises(IndexError, match=f"table 't': id {bad} is out of range, expected 0..299"):
        cpu.lookup(*_arguments(table, ids))


@pytest.mark.parametrize("count", [1, 2, 5, 13])
@pytest.mark.parametrize("ids", [3, 300])
def test_damaged_codes_are_refused_not_followed(count: int, ids: int) -> None:
    table = _table(CodeLayout("additive", 300, 40, count, 20), requires_grad=False)
    table.codes[:-8] = 255  # code 31 of 20
    with pytest.raises(IndexError, match="table 't': its codes name codewords"):
        cpu.lookup(*_arguments(table, torch.arange(ids)))
    assert table._fast.rows(table, torch.arange(ids)) is None


@pytest.mark.parametrize("kind", ["additive", "product"])
@pytest.mark.parametrize("asked", [False, True])
def test_damaged_codes_of_rows_that_nobody_asks_for(kind: Any, asked: bool) -> None:
    """Ids are so many that the whole table is unpacked."""
    table = _table(CodeLayout(kind, 300, 40, 8, 20), requires_grad=False)
    table.codes[299 * 5 : 300 * 5] = 255  # code 31 of 20 in the last row
    ids = torch.randint(300 if asked else 299, (30_000,))
    arguments = _arguments(table, ids)
    if asked:
        with pytest.raises(IndexError, match="table 't': its codes name codewords"):
            cpu.lookup(*arguments)
        assert table._fast.rows(table, ids) is None
    else:
        assert torch.equal(cpu.lookup(*arguments), reference.lookup(*arguments))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dim", [1, 4])
def test_tables_of_few_columns_are_unpacked_to_8_mb_at_most(dim: int) -> None:
    """A row takes a whole cache line there: 16 times its bytes, of one column."""
    table = _table(CodeLayout("additive", 500_000, dim, 8, 16), requires_grad=False)
    ids = torch.randint(500_000, (2_000_000,), dtype=torch.int32)
    arguments = _arguments(table, ids)
    cpu.lookup(*arguments)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest is that of now
    except OSError as error:
        pytest.skip(str(error))
    before = _kilobytes("VmRSS")
    out = cpu.lookup(*arguments)
    assert _kilobytes("VmHWM") - before < out.nbytes // 1024 + (12 << 10)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to ask for"
)
@pytest.mark.parametrize("what", ["rows", "bags"])
def test_large_outputs_are_in_huge_pages(what: str) -> None:
    table = _table(CodeLayout("additive", 1000, 64, 3, 16), requires_grad=False)
    ids = torch.randint(1000, ((33 << 20) // (64 * 4),))
    if what == "bags":
        shared = {"code_table": table.code_table, "codebook_set": table.codebook_set}
        out = CompressedEmbeddingBag(table.layout, mode="sum", **shared)(ids[:, None])
    else:
        out = table(ids)
    assert torch.equal(out, reference.lookup(*_arguments(table, ids)))
    assert "hg" in _flags_of_memory(out.data_ptr() + out.nbytes // 2)


def _flags_of_memory(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place, _, rest = line.partition(" ")
        if "-" in place:
            begin, end = (int(part, 16) for part in place.split("-"))
            inside = begin <= address < end
        elif inside and place == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


def test_damaged_codes_are_named_by_the_reference() -> None:
    table = _table(CodeLayout("additive", 300, 40, 5, 20))
    table.codes[:-8] = 255
    ids = torch.arange(300)
    with pytest.raises(IndexError, match="table 't': its codes name codewords"):
        cpu.lookup(*_arguments(table, ids))
    with pytest.raises(IndexError, match="damaged"):
        cpu.lookup_backward(
            torch.ones(300, 40), ids, table.codes, 300, 40, 5, -1, 5, 20, 40, torch.float32
        )
    short = table.codes[:100]
    with pytest.raises(IndexError):
        cpu.lookup(*[short if a is table.codes else a for a in _arguments(table, ids)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_views_are_read_as_they_look(dtype: torch.dtype) -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16), requires_grad=False)
    ids = torch.randint(300, (600, 8), dtype=dtype)
    for view in (ids.T, ids[:, ::2], ids[1:, 3], ids[0, 0].expand(5), ids[:0, 3]):
        expected = reference.lookup(*_arguments(table, view))
        assert torch.equal(cpu.lookup(*_arguments(table, view)), expected)
        assert torch.equal(table(view), expected)
    column = ids[1:, 3]
    assert torch.equal(table._fast.rows(table, column), table._decode(column))


def test_what_the_kernel_cannot_do_goes_to_the_reference() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16)).double()
    ids = torch.randint(300, (9,))
    assert torch.equal(cpu.lookup(*_arguments(table, ids)), table(ids))
    assert table(ids).dtype is torch.float64


def test_without_the_kernel_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.randint(300, (9,))
    expected = table(ids).detach()
    assert backends()["cpu"] == "native"
    monkeypatch.setattr(cpu, "kernel", None)
    assert backends()["cpu"] == "torch"
    with torch.no_grad():
        assert torch.equal(table(ids), expected)
    table(ids).sum().backward()
    assert table.codebooks.grad is not None


def _bag(layout: CodeLayout, **options: Any) -> CompressedEmbeddingBag:
    table = _table(layout)
    return CompressedEmbeddingBag(
        layout, code_table=table.code_table, codebook_set=table.codebook_set, **options
    )


@settings(deadline=None, max_examples=150)
@given(
    layout=_layouts(),
    mode=st.sampled_from(["sum", "mean", "max"]),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=30),
    weighted=st.booleans(),
    padding=st.booleans(),
    last=st.booleans(),
    wide=st.booleans(),
)
def test_bags_are_those_of_torch(
    layout: CodeLayout,
    mode: str,
    lengths: list[int],
    weighted: bool,
    padding: bool,
    last: bool,
    wide: bool,
) -> None:
    padding_idx = layout.num_embeddings // 2 if padding else None
    bag = _bag(layout, mode=mode, padding_idx=padding_idx, include_last_offset=last)
    ids = torch.randint(layout.num_embeddings, (sum(lengths),))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    offsets = ends if last else ends[:-1]
    if not wide:
        ids, offsets = ids.int(), offsets.int()
    weights = torch.randn(len(ids)) if weighted and mode == "sum" else None
    with torch.no_grad():
        found = bag(ids, offsets, weights)
        expected = DecodedBags._reduce(bag, ids, offsets, weights)
        plan = bag._fast.bags(bag, ids, offsets, weights)
    assert plan is not None, "the kernel did not take the call"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_train_as_in_torch(mode: str, weighted: bool) -> None:
    layout = CodeLayout("additive", 300, 12, 3, 16)
    bag, ids = _bag(layout, mode=mode, padding_idx=7), torch.randint(300, (9, 5))
    ids[2] = 7
    weights = torch.rand(9, 5, requires_grad=True) if weighted and mode == "sum" else None
    dense = torch.nn.EmbeddingBag.from_pretrained(
        bag.weight.detach(), freeze=False, mode=mode, padding_idx=7
    )
    grad = torch.randn(9, 12)
    rows = dense(ids, per_sample_weights=weights)
    rows.backward(grad)
    expected = None if weights is None else weights.grad.clone()
    if weights is not None:
        weights.grad = None
    found = bag(ids, per_sample_weights=weights)
    torch.testing.assert_close(found, rows)
    found.backward(grad)
    lookups = _table(layout)
    lookups(torch.arange(300)).backward(dense.weight.grad)
    torch.testing.assert_close(bag.codebooks.grad, lookups.codebooks.grad)
    if weights is not None:
        torch.testing.assert_close(weights.grad, expected)


@pytest.mark.parametrize("case", ["offsets", "2-D", "weights", "mean"])
def test_opcheck_bag(case: str) -> None:
    table = _table(CodeLayout("additive", 30, 6, 3, 8), padding_idx=3)
    ids, weights = torch.randint(30, (6,)), None
    offsets = torch.tensor([0, 2, 2])
    if case == "2-D":
        ids, offsets = ids.view(3, 2), None
    if case == "weights":
        weights = torch.rand(6, requires_grad=True)
    layout = table.layout
    arguments = (
        ids,
        offsets,
        weights,
        table.codes,
        table.codebooks,
        None,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        3,
        "mean" if case == "mean" else "sum",
        False,
        False,
        torch.float32,
        "t",
    )
    torch.library.opcheck(torch.ops.mec_embed.bag.default, arguments)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dim", [1, 10, 40, 128])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [300, 3000])
def test_bags_of_all_lengths_cross_rounds(
    mode: str, dim: int, weighted: bool, rows: int, threads: Any
) -> None:
    bag = _bag(CodeLayout("additive", rows, dim, 9, 16, torch.int8), mode=mode, padding_idx=5)
    lengths = torch.tensor([0, 0, 1, 700, 0, 2, 127, 128, 129, 0, *[20] * 40, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    ids = torch.randint(rows, (int(lengths.sum()),))
    ids[::7] = 5
    weights = torch.randn(len(ids)) if weighted and mode == "sum" else None
    expected = DecodedBags._reduce(bag, ids, offsets, weights)
    for number in (1, 2):
        threads(number)
        with torch.no_grad():
            found = bag._fast.bags(bag, ids, offsets, weights)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bad", [-1, 300, 2**31 - 1])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [40, 400])
def test_ids_of_bags_out_of_range_are_named(bad: int, wide: bool, count: int) -> None:
    """Of few ids, and of so many that all rows of the table are made first."""
    bag = _bag(CodeLayout("additive", 300, 16, 9, 16), mode="sum", name="tags")
    ids = torch.randint(300, (count, 20), dtype=torch.int64 if wide else torch.int32)
    with torch.no_grad():
        expected = DecodedBags._reduce(bag, ids.flatten(), torch.arange(0, 20 * count, 20), None)
        torch.testing.assert_close(bag(ids), expected, rtol=1e-5, atol=1e-4)
        ids[count // 2, 7] = bad
        with pytest.raises(IndexError, match=f"table 'tags': id {bad} is out of range"):
            bag(ids)


_OFFSETS = torch.tensor([0, 3, 3, 40])
_BAGS = {
    "a matrix": (torch.arange(60).view(12, 5), None),
    "a matrix on its side": (torch.arange(60).view(5, 12).t(), None),
    "every other column": (torch.arange(60).view(5, 12)[:, ::2], None),
    "every other id": (torch.arange(120)[::2], _OFFSETS),
    "offsets that are apart": (torch.arange(60), torch.stack([_OFFSETS, _OFFSETS], 1)[:, 0]),
    "narrow offsets": (torch.arange(60), _OFFSETS.int()),
    "narrow ids": (torch.arange(60).int(), _OFFSETS),
    "offsets that are a parameter": (
        torch.arange(60),
        torch.nn.Parameter(_OFFSETS, requires_grad=False),
    ),
    "no bags": (torch.zeros(0, 5, dtype=torch.int64), None),
    "no ids": (torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("bags", _BAGS.values(), ids=list(_BAGS))
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_bags_have_a_short_cut_however_they_are_in_memory(
    bags: tuple[Tensor, Tensor | None], mode: str, padding_idx: int | None
) -> None:
    ids, offsets = bags
    layout = CodeLayout("additive", 300, 40, 3, 16, torch.int8)
    bag = _bag(layout, mode=mode, padding_idx=padding_idx)
    with torch.no_grad():
        found = bag._fast.bags(bag, ids, offsets, None)
        expected = bag._reduce(ids, offsets, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("books", [3, 16, 64, 128])
@pytest.mark.parametrize("padded", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_rows_of_zeros_stand_anywhere_in_bags(books: int, padded: float, length: int) -> None:
    """Between them are runs of one row, of two, of none."""
    layout = CodeLayout("additive", 300, 40, books, 16, torch.int8)
    bag = _bag(layout, mode="sum", padding_idx=7)
    ids = torch.randint(300, (90, length))
    ids[torch.rand(ids.shape) < padded] = 7
    with torch.no_grad():
        found = bag._fast.bags(bag, ids, None, None)
        expected = bag._reduce(ids, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [5, 64, 1000])
def test_a_table_of_one_row_is_read_by_the_kernel(count: int) -> None:
    table = _table(CodeLayout("shared", 300, 16, 1, 1), requires_grad=False)
    ids = torch.randint(300, (count,))
    found = table._fast.rows(table, ids)
    assert found is not None
    assert torch.equal(found, table.weight[ids])


def test_nested_ids_are_refused_by_the_operators() -> None:
    bag = _bag(CodeLayout("additive", 300, 16, 2, 16), mode="sum")
    ids = torch.nested.nested_tensor([torch.arange(3), torch.arange(4)])
    with torch.no_grad():
        assert bag._fast.bags(bag, ids, torch.tensor([0, 3]), None) is None


@pytest.mark.parametrize("apart", [False, True])
def test_the_last_offset_is_where_ids_end(apart: bool) -> None:
    layout = CodeLayout("additive", 300, 16, 2, 16)
    bag = _bag(layout, mode="sum", include_last_offset=True, name="tags")
    ids, offsets = torch.arange(60), torch.tensor([0, 3, 59])
    if apart:
        offsets = torch.stack([offsets, offsets], 1)[:, 0]
    with torch.no_grad():
        assert bag._fast.bags(bag, ids, offsets, None) is None
        assert bag._fast.bags(bag, ids[:59], offsets, None) is not None
        assert bag._fast.bags(bag, ids[:0], offsets[:0], None) is None


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "offsets"),
        (7, "offsets has to be a 1D Tensor"),
        ([0, 5000], "offsets"),
        ([0, -1], r"table 'tags': offsets go from 0 to -1 at bag 0"),
        ([0, 9, 4], r"table 'tags': offsets go from 9 to 4 at bag 1"),
        ([0, -(2**50), 7], r"table 'tags': offsets go from 0 to"),
    ],
)
def test_offsets_that_do_not_fit_are_errors(
    mode: str, grad: bool, offsets: Any, message: str
) -> None:
    """Torch's own bags read outside of their ids where offsets fall."""
    bag = _bag(CodeLayout("additive", 300, 16, 2, 16), mode=mode, name="tags")
    ids = torch.randint(300, (900,))
    with torch.set_grad_enabled(grad):
        assert bag._fast.bags(bag, ids, torch.tensor(offsets), None) is None
        with pytest.raises((ValueError, RuntimeError), match=message):
            bag(ids, torch.tensor(offsets))


def _popular(rows: int) -> tuple[TierMap, int]:
    popular = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.2
    return TierMap.of(popular), int(popular.sum())


@pytest.mark.parametrize("dtypes", ["int8", "float32", "mixed"])
@pytest.mark.parametrize("tail", ["additive", "product", "shared"])
@pytest.mark.parametrize("count", [5, 3000, 30_000])
@pytest.mark.parametrize("dim", [1, 12, 40])
def test_tiers_are_read_in_one_pass(dtypes: str, tail: str, count: int, dim: int) -> None:
    if dim % 2 and tail == "product":
        return
    tier_map, popular = _popular(1000)
    head_dtype = torch.float32 if dtypes == "float32" else torch.int8
    tail_dtype = torch.int8 if dtypes == "int8" else torch.float32
    shape = (1, 1) if tail == "shared" else (2, 8)
    head = _table(CodeLayout("additive", popular, dim, 4, 16, head_dtype), requires_grad=False)
    rest = CodeLayout(tail, 1000 - popular, dim, *shape, tail_dtype)  # type: ignore[arg-type]
    others = _table(rest, requires_grad=False)
    ids = torch.randint(1000, (count,))
    table = TieredEmbedding(tier_map, head, others, padding_idx=3)
    assert table._fast.rows(table, ids) is not None
    expected = reference.tiered(*arguments_of(table, ids))
    assert torch.equal(table(ids), expected) and torch.equal(table._decode(ids), expected)
    bags = ids.view(-1, 5)
    for mode in ("sum", "mean", "max"):
        bag = TieredEmbeddingBag(tier_map, head, others, padding_idx=3, mode=mode)
        assert bag._fast.bags(bag, bags, None, None) is not None
        torch.testing.assert_close(bag(bags), DecodedBags._reduce(bag, bags, None, None))


@pytest.mark.parametrize("count", [5, 3000])
@pytest.mark.parametrize("wrong", [-1, -(2**24), 2**24])
@pytest.mark.parametrize("runs", [False, True])
def test_a_map_that_names_rows_outside_of_its_tiers(runs: bool, wrong: int, count: int) -> None:
    """As of a state_dict that was not made by compress(): nothing outside of the codes is read."""
    tier_map, popular = _popular(1000)
    if runs:
        tier_map, popular = TierMap.of(torch.arange(1000) < 200), 200
    parts = [
        _table(CodeLayout("additive", rows, 8, 4, 16), requires_grad=False)
        for rows in (popular, 1000 - popular)
    ]
    table = TieredEmbedding(tier_map, *parts)
    tier_map.before += wrong
    ids = torch.arange(count) % 1000
    assert table._fast.rows(table, ids) is None
    with pytest.raises(IndexError, match="out of range"):
        table(ids)


CHANGES: dict[str, Any] = {
    "half": lambda table: table.half(),
    "there and back": lambda table: table.half().bfloat16().float(),
    "data": lambda table: setattr(table.codebooks, "data", torch.randn_like(table.codebooks)),
    "in place": lambda table: table.codebooks.data.add_(1),
    "codes": lambda table: table.code_table.codes.copy_(table.codes.roll(1)),
    "other codes": lambda table: setattr(
        table.code_table, "codes", torch.cat([table.codes[:-8].roll(1), table.codes[-8:]])
    ),
    "assigned": lambda table: table.load_state_dict(
        {name: value.clone().flip(0) for name, value in table.state_dict().items()}, assign=True
    ),
    "thawed": lambda table: table.codebook_set.thaw(),
    "shared": lambda table: table.share_memory(),
    "padding": lambda table: setattr(table, "padding_idx", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_short_cut_follows_what_changes(change: str) -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.arange(300)
    with torch.no_grad():
        table(ids)
        CHANGES[change](table)
        assert table._fast.rows(table, ids) is not None
        assert torch.equal(table(ids), table._decode(ids))


def test_copies_have_a_short_cut_of_their_own() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.arange(300)
    with torch.no_grad():
        before = table(ids)
        copies = copy.deepcopy(table), pickle.loads(pickle.dumps(table))
        table.codebooks.zero_()
        for one in copies:
            assert torch.equal(one(ids), before)
            assert torch.equal(one._fast.rows(one, ids), before)


class Twice(torch.nn.Module):
    """Twice what is given."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * given


def test_codebooks_that_are_made_anew_have_no_short_cut() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.arange(300)
    with torch.no_grad():
        expected = 2 * table(ids)
        parametrize.register_parametrization(table.codebook_set, "codebooks", Twice())
        assert table._fast.rows(table, ids) is None
        assert torch.equal(table(ids), expected)
    table(ids).sum().backward()
    table.codebook_set.parametrizations["codebooks"].original.data.zero_()
    assert not table(ids).any()
    pruned = _table(CodeLayout("additive", 300, 12, 3, 16))
    prune.random_unstructured(pruned.codebook_set, "codebooks", 0.5)
    for trained in (True, False):
        with torch.set_grad_enabled(trained):
            assert torch.equal(pruned(ids), pruned._decode(ids))


def test_no_plan_keeps_the_graph_that_codebooks_were_computed_by() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.arange(300)
    books = torch.randn(3, 16, 12, requires_grad=True) * 1
    node = weakref.ref(books)
    found = torch.func.functional_call(table, {"codebook_set.codebooks": books}, (ids,))
    assert found.requires_grad
    del books, found
    gc.collect()
    assert node() is None


def test_the_short_cut_gives_what_the_operator_gives() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.randint(300, (9,))
    with torch.no_grad():
        short = table(ids)
    long = table(ids)
    assert long.requires_grad and not short.requires_grad
    assert torch.equal(short, long)


def test_replicas_have_no_short_cut() -> None:
    """Their tensors are those of another device, and no attributes of a module as its are."""
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.arange(300)
    with torch.no_grad():
        table(ids)
        replica = table._replicate_for_data_parallel()
        assert replica._fast.rows(replica, ids) is None
        assert replica._fast.bags(replica, ids[None], None, None) is None
        assert table._fast.rows(table, ids) is not None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("watch", ["vmap", "function mode", "dispatch mode", "fake ids"])
def test_the_short_cut_is_not_taken_where_something_watches(watch: str, trained: bool) -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16), requires_grad=trained)
    ids, seen = torch.randint(300, (4, 2)), []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    expected = table(ids)
    if watch == "vmap":
        with torch.no_grad():
            assert torch.equal(torch.vmap(table)(ids), expected)
        return
    if watch == "fake ids":
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(ids)
        with torch.no_grad():
            assert table._fast.rows(table, ids) is not None
            assert table._fast.rows(table, fake) is None
        return
    with Functions() if watch == "function mode" else Operators():
        rows = table(ids)
        assert torch.equal(rows, expected)
        if trained:
            rows.sum().backward()
    assert any("mec_embed" in name and "lookup" in name for name in seen)
    # Torch leaves modes of functions out in the backward pass.
    expects_gradient = trained and watch == "dispatch mode"
    assert any("lookup_backward" in name for name in seen) == expects_gradient


def test_gradients_past_the_dispatcher_are_those_of_the_operators() -> None:
    """Once and twice; and the dispatcher is not asked."""
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    ids = torch.randint(300, (4, 2))
    weights = torch.randn(4, 2, 12, requires_grad=True)

    def gradients(look_up: Any) -> list[torch.Tensor]:
        rows = look_up(ids)
        (first,) = torch.autograd.grad((rows * weights).sum(), table.codebooks, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weights)
        return [rows, first, second]

    def dispatched(ids: torch.Tensor) -> torch.Tensor:
        operator = torch.ops.mec_embed.lookup
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "lookup", operator)
            return table._decode(ids)

    expected = gradients(dispatched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.schema, "_SERVING", {})
        no_backend = gradients(table)
    with torch.profiler.profile() as profile:
        found = gradients(table)
    assert not [event for event in profile.events() if event.name.startswith("mec_embed::")]
    for one, other, third in zip(found, expected, no_backend, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_gradients_that_are_not_in_memory_as_they_are() -> None:
    """Many at once, negated when read, and zeros that are nowhere."""
    table = _table(CodeLayout("additive", 300, 12, 3, 16))
    bags = _bag(CodeLayout("additive", 300, 12, 3, 16), mode="sum")
    ids, weights = torch.randint(300, (4, 2)), torch.rand(4, 2, requires_grad=True)
    for rows, inputs in (
        (table(ids), [table.codebooks]),
        (bags(ids, None, weights), [bags.codebooks, weights]),
    ):

        def gradients(grad: Tensor, rows: Any = rows, inputs: Any = inputs, **many: Any) -> Any:
            return torch.autograd.grad(rows, inputs, grad, retain_graph=True, **many)

        several = torch.randn(3, *rows.shape)
        expected = list(zip(*(gradients(one) for one in several), strict=True))
        for found, one in zip(gradients(several, is_grads_batched=True), expected, strict=True):
            torch.testing.assert_close(found, torch.stack(one))
        for found, one in zip(gradients(torch._neg_view(several[0])), expected, strict=True):
            assert torch.equal(found, -one[0])
        assert not any(one.any() for one in gradients(torch._efficientzerotensor(rows.shape)))


@pytest.mark.parametrize("trained", [False, True])
def test_codebooks_and_weights_that_are_negated_when_read(trained: bool) -> None:
    bags = _bag(CodeLayout("additive", 300, 12, 3, 16), mode="sum")
    ids, weights = torch.randint(300, (4, 2)), torch.rand(4, 2)
    swapped = {"codebook_set.codebooks": torch._neg_view(bags.codebooks.detach())}
    with torch.set_grad_enabled(trained):
        expected = bags(ids, None, weights)
        assert torch.equal(bags(ids, None, torch._neg_view(weights)), -expected)
        found = torch.func.functional_call(bags, swapped, (ids, None, weights))
        assert torch.equal(found, -expected)
        assert torch.equal(bags(ids, None, weights), expected)


def test_the_short_cut_is_not_taken_where_a_tracer_watches() -> None:
    table = _table(CodeLayout("additive", 300, 12, 3, 16), requires_grad=False)
    ids = torch.randint(300, (9,))
    traced = torch.jit.trace(table, ids, check_trace=False)
    other = torch.randint(300, (9,))
    assert torch.equal(traced(other), table(other))
    graph = torch.fx.experimental.proxy_tensor.make_fx(table)(ids)
    assert torch.equal(graph(other), table(other))
    compiled = torch.compile(table, fullgraph=True, backend="eager")
    assert torch.equal(compiled(other), table(other))


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(2, 1000),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    sort=st.booleans(),
    wide=st.booleans(),
    shape=st.sampled_from([(), (0,), (7,), (3, 5), (3000,)]),
)
def test_tiers_are_those_of_the_reference(
    rows: int, share: float, sort: bool, wide: bool, shape: Any
) -> None:
    popular = torch.rand(rows) < share
    tier_map = TierMap.of(popular.sort(descending=True)[0] if sort else popular)
    ids = torch.randint(rows, shape, dtype=torch.int64 if wide else torch.int32)
    arguments = (ids, tier_map.starts, tier_map.before, tier_map.bitmap, rows, "t")
    found, expected = cpu.tiers(*arguments), reference.tiers(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(IndexError, match=f"table 't': id {rows} is out of range"):
        cpu.tiers(torch.tensor([0, rows]), *arguments[1:])
