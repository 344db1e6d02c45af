"""Tables in tiers: the map, the modules beside torch's, and tiers through the life of a model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_model import FEW, TIERED, Shop, arguments_of, config, counts, ids, shop
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressionConfig,
    compress,
    decompress,
    distill,
    keep_row_steps,
    ops,
    outcome,
    plan,
)
from mec_embed.packing import pack
from mec_embed.regularization import embedding_penalty, rows_per_codeword
from mec_embed.tiers import MOST_RUNS, TieredEmbedding, TieredEmbeddingBag, TierMap

# --- the map ------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """Popular rows: at random, or sorted but for some exceptions."""
    rows = draw(st.integers(2, 1000))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    if draw(st.booleans()):
        popular = random.random(rows) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    else:
        popular = np.arange(rows) < draw(st.integers(0, rows))
        if draw(st.booleans()):
            popular = ~popular
        exceptions = random.integers(rows, size=draw(st.integers(0, 9)))
        popular[exceptions] ^= True
    return torch.from_numpy(popular)


def reference(popular: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flag and place of every row."""
    mask = popular.numpy()
    place = np.where(mask, mask.cumsum() - 1, (~mask).cumsum() - 1)
    return popular, torch.from_numpy(place)


@settings(max_examples=200, deadline=None)
@given(masks(), st.sampled_from([torch.int32, torch.int64]))
def test_the_map_finds_flag_and_place_of_every_row(
    popular: torch.Tensor, dtype: torch.dtype
) -> None:
    tier_map = TierMap.of(popular)
    rows = torch.arange(len(popular), dtype=dtype)
    found = tier_map(rows, "user")
    assert [one.dtype for one in found] == [torch.bool, torch.int64]
    for got, wanted in zip(found, reference(popular), strict=True):
        assert torch.equal(got, wanted)


@settings(max_examples=200, deadline=None)
@given(masks())
def test_the_map_takes_the_bytes_that_were_planned(popular: torch.Tensor) -> None:
    tier_map = TierMap.of(popular)
    state = tier_map.state_dict()
    assert tier_map.nbytes == TierMap.nbytes_of(popular) == sum(t.nbytes for t in state.values())
    changes = int((popular[1:] != popular[:-1]).sum())
    assert (tier_map.runs is None) is (changes + 1 + int(not popular[0]) > MOST_RUNS)
    other = TierMap(tier_map.rows, tier_map.runs)
    other.load_state_dict(state, strict=True)
    rows = torch.arange(len(popular))
    for got, wanted in zip(other(rows, ""), tier_map(rows, ""), strict=True):
        assert torch.equal(got, wanted)


SHUFFLED = torch.from_numpy(np.random.default_rng(0).random(1000) < 0.2)
MAPS = {
    "bitmap": SHUFFLED,
    "runs": torch.arange(1000) < 100,
    "from the end": torch.arange(1000) > 7,
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_any_shape_of_ids(kind: str, shape: tuple[int, ...]) -> None:
    rows = torch.randint(1000, shape, generator=torch.Generator().manual_seed(0))
    popular, place = TierMap.of(MAPS[kind])(rows, "user")
    wanted = reference(MAPS[kind])
    assert popular.shape == place.shape == shape
    assert torch.equal(popular, wanted[0][rows]) and torch.equal(place, wanted[1][rows])


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("wrong", [-1, 1000, 10**6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_id_out_of_range_names_the_table(kind: str, wrong: int, dtype: torch.dtype) -> None:
    with pytest.raises(IndexError, match=f"'user'.*{wrong}"):
        TierMap.of(MAPS[kind])(torch.tensor([0, wrong], dtype=dtype), "user")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_ids_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="'user'"):
        TierMap.of(SHUFFLED)(torch.zeros(2, dtype=dtype), "user")


STRIDES = {
    "plain": lambda rows: rows,
    "turned": lambda rows: rows.T,
    "every second": lambda rows: rows[:, ::2],
    "scalar": lambda rows: rows[0, 0],
    "none": lambda rows: rows[:0],
}


@pytest.mark.parametrize("kind", ["bitmap", "runs"])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(kind: str, strides: str, dtype: torch.dtype) -> None:
    tier_map = TierMap.of(MAPS[kind])
    rows = STRIDES[strides](torch.arange(20, dtype=dtype).view(4, 5) * 50)
    args = (rows, tier_map.starts, tier_map.before, tier_map.bitmap, 1000, "user")
    torch.library.opcheck(torch.ops.mec_embed.tiers.default, args)


# --- the modules --------------------------------------------------------------------------------

DIM = 6
POPULAR = torch.from_numpy(np.random.default_rng(1).random(60) < 0.3)
POPULAR[7], POPULAR[41] = True, False
IDS = torch.tensor([[3, 59, 0, 3], [7, 7, 41, 21]])


def coded(
    kind: str, rows: int, dtype: torch.dtype, books: torch.dtype, sparse: bool, seed: int
) -> CompressedEmbedding:
    """A tier with random codes and codebooks."""
    shapes = {"additive": (3, 8), "product": (2, 5), "shared": (1, 1)}
    layout = CodeLayout(kind, rows, DIM, *shapes[kind], books)
    module = CompressedEmbedding(layout, sparse=sparse, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    module.codebook_set.store(torch.randn(module.codebooks.shape, generator=generator))
    if layout.bits:
        codes = (rows, layout.num_subvectors)
        drawn = torch.randint(layout.codebook_size, codes, generator=generator)
        module.codes.copy_(pack(drawn, layout.bits))
    return module


def tiered(
    cls: type = TieredEmbedding,
    popular: torch.Tensor = POPULAR,
    kinds: tuple[str, str] = ("additive", "product"),
    dtype: torch.dtype = torch.float32,
    books: torch.dtype | None = None,
    sparse: bool = False,
    seed: int = 0,
    **options,
):
    """A module in tiers with random values."""
    sizes = int(popular.sum()), int((~popular).sum())
    head, tail = (
        coded(kind, rows, dtype, books or dtype, sparse, seed + i)
        for i, (kind, rows) in enumerate(zip(kinds, sizes, strict=True))
    )
    return cls(TierMap.of(popular), head, tail, name="user", **options)


def dense_of(module, popular: torch.Tensor = POPULAR) -> torch.Tensor:
    """The table, put together from the tiers; the padding row without gradient."""
    table = module._like().new_zeros(module.num_embeddings, DIM)
    table = table.index_put((popular.nonzero()[:, 0],), module.head.weight)
    table = table.index_put(((~popular).nonzero()[:, 0],), module.tail.weight)
    if module.padding_idx is None:
        return table
    fixed = torch.zeros(DIM) if module.zero_padding else table[module.padding_idx].detach()
    return table.index_put((torch.tensor([module.padding_idx]),), fixed.to(table.dtype))


def gradients(module, out: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    factor = torch.randn(out.shape, generator=generator).to(out.dtype)
    books = [tier.codebooks for tier in module.tiers]
    found = torch.autograd.grad((out * factor).sum(), books, allow_unused=True)
    return [
        torch.zeros_like(book) if grad is None else grad.to_dense()
        for book, grad in zip(books, found, strict=True)
    ]


PADDINGS = [(None, True), (0, True), (7, True), (7, False), (41, False)]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("padding_idx", "zero"), PADDINGS)
@pytest.mark.parametrize("kinds", [("additive", "product"), ("product", "shared")], ids=str)
def test_embedding(kinds, padding_idx, zero, sparse) -> None:
    module = tiered(kinds=kinds, sparse=sparse, padding_idx=padding_idx, zero_padding=zero)
    for rows in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0], IDS.T[::2]):
        table = dense_of(module)
        out = module(rows)
        assert out.dtype is torch.float32 and out.shape == (*rows.shape, DIM)
        torch.testing.assert_close(out, table[rows.long()], rtol=0, atol=0)
        torch.testing.assert_close(
            gradients(module, out), gradients(module, table[rows.long()]), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(module.weight, dense_of(module), rtol=0, atol=0)
    torch.testing.assert_close(module.dequantize(), dense_of(module).detach(), rtol=0, atol=0)
    assert (module.num_embeddings, module.embedding_dim) == (60, DIM)
    assert module.sparse is sparse and module.trainable


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("padding_idx", [7, 41])
def test_padding_passes_no_gradient(padding_idx: int, zero: bool) -> None:
    module = tiered(padding_idx=padding_idx, zero_padding=zero)
    out = module(torch.tensor([padding_idx, padding_idx]))
    assert bool(out.eq(0).all()) is zero
    out.square().sum().backward()
    assert all(tier.codebooks.grad.eq(0).all() for tier in module.tiers)


@pytest.mark.parametrize("padding_idx", [None, 0, 7])
@pytest.mark.parametrize("kinds", [("additive", "product"), ("product", "shared")], ids=str)
def test_first_and_second_derivative(kinds, padding_idx) -> None:
    module = tiered(kinds=kinds, dtype=torch.float64, padding_idx=padding_idx)
    books = [tier.codebooks.detach().requires_grad_() for tier in module.tiers]

    def function(*books: torch.Tensor) -> torch.Tensor:
        return ops.tiered(*arguments_of(module, IDS, *books))

    def square(*books: torch.Tensor) -> torch.Tensor:
        return function(*books).square()

    for made in (function, square):
        assert gradcheck(made, books)
        assert gradgradcheck(made, books)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("popular", [POPULAR, torch.arange(60) < 9], ids=["bitmap", "runs"])
@pytest.mark.parametrize("kinds", [("additive", "product"), ("product", "shared")], ids=str)
def test_opcheck_tiered(kinds, popular, dtype) -> None:
    module = tiered(kinds=kinds, popular=popular, dtype=dtype, padding_idx=7)
    torch.library.opcheck(torch.ops.mec_embed.tiered.default, arguments_of(module, IDS))


def test_sparse_tables_get_sparse_gradients() -> None:
    module = tiered(sparse=True)
    module(IDS).sum().backward()
    assert all(tier.codebooks.grad.is_sparse for tier in module.tiers)


@pytest.mark.parametrize("books", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_tables_of_other_dtypes(dtype, books, padding_idx) -> None:
    module = tiered(dtype=dtype, books=books, padding_idx=padding_idx)
    out = module(IDS)
    assert out.dtype is dtype
    torch.testing.assert_close(out, dense_of(module)[IDS], rtol=0, atol=0)
    if books is None:
        out.float().square().sum().backward()
        assert all(tier.codebooks.grad.dtype is dtype for tier in module.tiers)


@pytest.mark.parametrize("popular", [POPULAR, torch.arange(60) < 9], ids=["bitmap", "runs"])
@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_to_dtype_moves_the_output_and_leaves_the_map(popular, move) -> None:
    module = tiered(popular=popular)
    before = module(IDS)
    kept = {key: value.clone() for key, value in module.tier_map.state_dict().items()}
    moved = move(copy.deepcopy(module))
    out = moved(IDS)
    assert out.dtype is moved.head.codebooks.dtype is not torch.float32
    torch.testing.assert_close(out.float(), before, rtol=0.01, atol=0.01)
    for key, value in moved.tier_map.state_dict().items():
        assert value.dtype is kept[key].dtype and torch.equal(value, kept[key])


def test_deepcopy_is_independent() -> None:
    module = tiered()
    clone = copy.deepcopy(module)
    assert torch.equal(clone(IDS), module(IDS)) and clone.head is not module.head
    with torch.no_grad():
        for tensor in clone.state_dict().values():
            tensor.zero_()
    assert module(IDS).abs().min() > 0


@pytest.mark.parametrize("books", [torch.float32, torch.int8])
@pytest.mark.parametrize("popular", [POPULAR, torch.arange(60) < 18], ids=["bitmap", "runs"])
def test_state_dict_round_trip(popular, books) -> None:
    module = tiered(popular=popular, books=books)
    turned = popular.flip(0)
    other = tiered(popular=turned, books=books, seed=9)
    if other.tier_map.runs != module.tier_map.runs:
        with pytest.raises(RuntimeError, match="tier_map.starts"):
            other.load_state_dict(module.state_dict())
        other = tiered(popular=popular, books=books, seed=9)
    assert not torch.equal(module(IDS), other(IDS))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(IDS), other(IDS))


@pytest.mark.parametrize("cls", [TieredEmbedding, TieredEmbeddingBag])
def test_rows_of_both_tiers_are_as_long(cls) -> None:
    head, tail = (CompressedEmbedding(CodeLayout("additive", 5, dim, 2, 8)) for dim in (6, 4))
    with pytest.raises(ValueError, match="'items': rows of the tiers have 6 and 4 entries"):
        cls(TierMap.of(torch.arange(10) < 5), head, tail, name="items")


@pytest.mark.parametrize("cls", [TieredEmbedding, TieredEmbeddingBag])
def test_wrong_ids(cls) -> None:
    module = tiered(cls)
    with pytest.raises(IndexError, match="'user'.*60.*0..59"):
        module(torch.tensor([[0, 60]]))
    with pytest.raises(TypeError, match="'user'"):
        module(torch.zeros(1, 2))


FLAT = IDS.flatten()
BAG_CALLS = {
    "2-D": lambda m, w=None: m(IDS, per_sample_weights=w),
    "1-D": lambda m, w=None: m(
        FLAT, torch.tensor([0, 3, 3]), per_sample_weights=None if w is None else w.flatten()
    ),
    "last offset": lambda m, w=None: m(
        FLAT, torch.tensor([0, 0, 3, 8]), per_sample_weights=None if w is None else w.flatten()
    ),
}


@pytest.mark.parametrize("padding_idx", [None, 7, 3])
@pytest.mark.parametrize("call", BAG_CALLS)
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
def test_bag(mode, call, padding_idx, weighted) -> None:
    options = {"mode": mode, "include_last_offset": call == "last offset"}
    module = tiered(TieredEmbeddingBag, padding_idx=padding_idx, zero_padding=False, **options)
    table = module.dequantize()
    dense = nn.EmbeddingBag(60, DIM, padding_idx=padding_idx, _weight=table, **options)
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    args = (weights,) if weighted else ()
    out, expected = BAG_CALLS[call](module, *args), BAG_CALLS[call](dense, *args)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    # What reaches the rows of the dense table reaches the codebooks through the decoded rows.
    books = [tier.codebooks for tier in module.tiers]
    wanted = torch.autograd.grad(dense_of(module), books, grad_outputs=dense.weight.grad)
    assert max(grad.abs().max() for grad in wanted) > 0
    for book, grad in zip(books, wanted, strict=True):
        torch.testing.assert_close(book.grad, grad, rtol=1e-4, atol=1e-4)


COMPILED = {
    "bitmap": lambda: (tiered(padding_idx=7), (IDS,)),
    "runs": lambda: (tiered(popular=torch.arange(60) < 9), (IDS.int(),)),
    "turned ids": lambda: (tiered(), (IDS.T,)),
    "shared": lambda: (tiered(kinds=("additive", "shared")), (IDS,)),
    "bag": lambda: (tiered(TieredEmbeddingBag, mode="sum", padding_idx=7), (IDS,)),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compile_without_graph_breaks(case) -> None:
    module, args = COMPILED[case]()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*args), module(*args)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(module, out), gradients(module, expected))


@pytest.mark.parametrize("case", COMPILED)
def test_export(case) -> None:
    module, args = COMPILED[case]()
    exported = torch.export.export(nn.Sequential(module), args)
    assert torch.equal(exported.module()(*args), module(*args))
    assert any("mec_embed.tiered" in str(node.target) for node in exported.graph.nodes)


# --- compress() ---------------------------------------------------------------------------------

MADE = {
    "float32, one row": (None, 36),
    "float32, codes": (None, 20),
    "int8, one row": ("int8", 40),
    "int8, codes": ("int8", 30),
}
KINDS = list(MADE)


@pytest.fixture(scope="module")
def made():
    """Name -> model before, model after, report; not to be changed."""
    return {name: shop(*options) for name, options in MADE.items()}


def by_name(report):
    return {table.name: table for table in report.tables}


@pytest.mark.parametrize("kind", KINDS)
def test_plan_report_and_tensors_agree_in_bytes(kind, made) -> None:
    dense, model, report = made[kind]
    dtype, ratio = MADE[kind]
    planned = by_name(plan(dense, counts(), config(dtype, ratio)))
    for table in report.tables:
        sizes = (table.code_bytes, table.codebook_bytes, table.other_bytes)
        before = planned[table.name]
        assert sizes == (before.code_bytes, before.codebook_bytes, before.other_bytes)
        assert before.layout == table.layout
    tensors = {
        (t.data_ptr(), t.dtype): t.nbytes
        for key, t in model.state_dict().items()
        if not key.startswith("out.")
    }
    assert sum(tensors.values()) == report.bytes_after
    assert ratio <= report.ratio < 1.1 * ratio


@pytest.mark.parametrize("kind", KINDS)
def test_popular_rows_are_those_that_occur_most(kind, made) -> None:
    _, model, report = made[kind]
    found = [name for name in TIERED if " | " in by_name(report)[name].layout]
    assert {"shuffled", "first", "sorted"} <= set(found)
    for name in found:
        module = getattr(model, name)
        often = torch.from_numpy(counts()[name])
        popular, _ = module.tier_map(torch.arange(len(often)), name)
        assert [tier.num_embeddings for tier in module.tiers] == [popular.sum(), (~popular).sum()]
        assert often[popular].min() > often[~popular].max()
    assert model.shuffled.tier_map.runs is None
    assert model.sorted.tier_map.runs == 2
    assert model.again is model.shuffled and type(model.shuffled) is TieredEmbedding
    assert type(model.small) is not TieredEmbedding, "a table without counts has no tiers"


def test_a_bag_in_tiers_keeps_its_options(made) -> None:
    _, model, report = made["float32, codes"]
    assert type(model.tags) is TieredEmbeddingBag and " | " in by_name(report)["tags"].layout
    assert model.tags.mode == "sum" and model.tags.padding_idx == 3 and model.tags.zero_padding


@pytest.mark.parametrize("kind", KINDS)
def test_reported_errors_are_those_of_the_rows(kind, made) -> None:
    dense, model, report = made[kind]
    for name in TIERED:
        often = torch.from_numpy(counts()[name]).double().clamp(min=0.1)
        share = (often.sqrt() / often.sqrt().sum())[:, None]
        x = getattr(dense, name).weight.detach().double()
        error = (share * (x - getattr(model, name).dequantize().double()).square()).sum()
        variance = (share * (x - (share * x).sum(0)).square()).sum()
        assert by_name(report)[name].weighted_error == pytest.approx(
            float(error / variance), rel=1e-4
        )


def test_popular_rows_are_kept_better(made) -> None:
    dense, model, _ = made["float32, codes"]
    for name in ("shuffled", "sorted"):
        module, x = getattr(model, name), getattr(dense, name).weight.detach()
        popular, _ = module.tier_map(torch.arange(len(x)), name)
        error = (x - module.dequantize()).square().sum(1)
        assert error[popular].mean() < 0.7 * error[~popular].mean()


def test_padding_stays_zero(made) -> None:
    for _, model, _ in made.values():
        assert model.shuffled(torch.tensor([0])).eq(0).all()
        assert model.tags(torch.tensor([[3, 3]])).eq(0).all()


def test_paired_tables_share_map_and_codes(made) -> None:
    _, model, report = made["float32, one row"]
    assert by_name(report)["first"].shares_codes_with == "shuffled"
    assert by_name(report)["first"].other_bytes == 0 < by_name(report)["shuffled"].other_bytes
    assert model.first.tier_map is model.shuffled.tier_map
    assert model.first.head.code_table is model.shuffled.head.code_table


@pytest.mark.parametrize("names", [["shuffled"], ["first"], ["sorted", "tags"]], ids=str)
def test_one_row_is_the_mean_by_popularity(names, made) -> None:
    dense, model, _ = made["float32, one row"]
    means = []
    for name in names:
        module, often = getattr(model, name), torch.from_numpy(counts()[name]).double()
        assert module.tail.layout.kind == "shared"
        popular, _ = module.tier_map(torch.arange(len(often)), name)
        share = often[~popular].sqrt() / often[~popular].sqrt().sum()
        means.append(share @ getattr(dense, name).weight.detach()[~popular].double())
    # Tables of the same counts that share the row weigh the same.
    expected = torch.stack(means).mean(0).float()
    for name in names:
        found = getattr(model, name).tail.codebooks[0, 0].detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_tails_of_several_tables_may_share_one_row(dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({f"t{i}": nn.Embedding(400, 16) for i in range(6)})
    often = np.where(np.arange(400) < 80, 1000, 1)
    dense = copy.deepcopy(model)
    report = compress(
        model, dict.fromkeys(model, often), config(dtype, None, max_bytes=1000), progress=False
    )
    assert {type(table) for table in model.values()} == {TieredEmbedding}
    tails = [table.tail for table in model.values()]
    assert {tail.layout.kind for tail in tails} == {"shared"}
    assert len({id(tail.codebook_set) for tail in tails}) == 1
    mean = torch.stack([table.weight[80:].mean(0) for table in dense.values()]).mean(0)
    found = tails[0](torch.tensor([0]))[0]
    torch.testing.assert_close(found, mean, rtol=0, atol=0.02 if dtype else 1e-5)
    unique = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    assert sum(unique.values()) == report.bytes_after <= 1000


@pytest.mark.parametrize(
    ("often", "options"),
    [
        (counts(), {"tiers": False}),
        (counts(), {"ratio": None, "num_subvectors": 2, "codebook_size": 16}),
        (None, {}),
        ({"sorted": np.full(FEW, 7)}, {}),
    ],
    ids=["tiers=False", "explicit", "no counts", "equal counts"],
)
def test_where_there_are_no_tiers(often, options) -> None:
    torch.manual_seed(0)
    model = Shop()
    report = compress(model, often, config(**options), progress=False)
    assert any(isinstance(m, CompressedEmbedding) for m in model.modules())
    assert not any(isinstance(m, TierMap) for m in model.modules())
    assert not any("|" in table.layout for table in report.tables)


def test_frozen_tables_stay_frozen_in_both_tiers() -> None:
    torch.manual_seed(0)
    model = Shop()
    model.sorted.requires_grad_(False)
    compress(model, counts(), config(), progress=False)
    assert not model.sorted.trainable and model.shuffled.trainable
    for frozen, free in zip(model.sorted.tiers, model.shuffled.tiers, strict=True):
        assert not frozen.codebooks.requires_grad and free.codebooks.requires_grad
        assert frozen.codebook_set is not free.codebook_set
    decompress(model)
    assert not model.sorted.weight.requires_grad and model.shuffled.weight.requires_grad


def test_an_error_leaves_the_model_as_it_was(monkeypatch) -> None:
    torch.manual_seed(0)
    model = Shop()
    optimizer = torch.optim.Adam(model.parameters())
    before = dict(model.named_modules(remove_duplicate=False))
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    def broken(module, *args):
        seen.append(type(module))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(outcome, "table_error", broken)
    with pytest.raises(KeyboardInterrupt):
        compress(model, counts(), config(), optimizer=optimizer, progress=False)
    assert TieredEmbedding in seen
    now = dict(model.named_modules(remove_duplicate=False))
    assert now.keys() == before.keys() and all(now[name] is before[name] for name in now)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_decompress_puts_the_same_values_back(kind, made) -> None:
    model = copy.deepcopy(made[kind][1])
    expected = {name: getattr(model, name).dequantize() for name in TIERED}
    before = model(ids())
    assert decompress(model) == sum(table.compressed for table in made[kind][2].tables)
    assert not any(isinstance(m, TierMap) for m in model.modules())
    for name, table in expected.items():
        module = getattr(model, name)
        assert type(module) is type(getattr(made[kind][0], name))
        assert torch.equal(module.weight, table) and module.weight.requires_grad
        assert module.padding_idx == getattr(made[kind][0], name).padding_idx
    assert model.again is model.shuffled and model.tags.mode == "sum"
    torch.testing.assert_close(model(ids()), before)


# --- training -----------------------------------------------------------------------------------


def test_the_optimizer_takes_the_codebooks_of_both_tiers() -> None:
    torch.manual_seed(0)
    model = Shop()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(ids()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    compress(model, counts(), config(ratio=20), optimizer=optimizer, progress=False)
    held = optimizer.param_groups[0]["params"]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    parts = [tier for name in TIERED for tier in getattr(model, name).tiers]
    before = [tier.codebooks.detach().clone() for tier in parts]
    kept = {k: v.clone() for k, v in model.state_dict().items() if "codes" in k or "tier_map" in k}
    model(ids()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(t.codebooks, b) for t, b in zip(parts, before, strict=True))
    assert kept and all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    decompress(model, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}


def penalty_of(model) -> torch.Tensor:
    """Each codeword once for each row that uses it, of every table and tier once."""
    total = torch.zeros(())
    for name in TIERED:
        for tier in getattr(model, name).tiers:
            total = total + (rows_per_codeword(tier) * tier.codebooks.square().sum(2)).sum()
    if isinstance(model.small, CompressedEmbedding):
        total = total + embedding_penalty(model.small)
    return total


def test_rows_of_both_tiers_are_counted(made) -> None:
    _, model, _ = made["float32, one row"]
    for name in ("shuffled", "first", "sorted"):
        head, tail = getattr(model, name).tiers
        assert rows_per_codeword(head).sum(1).eq(head.num_embeddings).all()
        assert rows_per_codeword(tail).tolist() == [[tail.num_embeddings]]
    torch.testing.assert_close(embedding_penalty(model), penalty_of(model))


def test_penalty_of_one_row_is_that_of_all_rows_that_are_it(made) -> None:
    _, model, _ = made["float32, one row"]
    only = nn.ModuleList([model.sorted.tail, model.first.tail])
    expected = sum(table.weight.square().sum() for table in only)
    torch.testing.assert_close(embedding_penalty(only), expected)
    assert expected > only[0].codebooks.square().sum() * 500


@pytest.mark.parametrize("later", [False, True], ids=["optimizer=", "keep_row_steps"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_sgd_moves_the_rows_of_both_tiers_as_dense_ones(later: bool, decay: float) -> None:
    """By the mean of the steps of the rows; weight decay is that of all rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"sorted": Shop().sorted})
    options = {"lr": 0.1, "weight_decay": decay}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    compress(
        model,
        {"sorted": counts()["sorted"]},
        config(ratio=60),
        optimizer=None if later else optimizer,
        progress=False,
    )
    if later:
        optimizer = torch.optim.SGD(model.parameters(), **options)
        keep_row_steps(optimizer, model)
    head, tail = model["sorted"].tiers
    assert tail.layout.kind == "shared"
    before = [tier.codebooks.detach().clone() for tier in (head, tail)]
    model["sorted"](torch.arange(0, FEW, 3)).sin().sum().backward()
    grads = [tier.codebooks.grad.clone() for tier in (head, tail)]
    optimizer.step()
    for tier, start, grad in zip((head, tail), before, grads, strict=True):
        rows = rows_per_codeword(tier)[:, :, None].clamp(min=1)
        moved = start - 0.1 * (grad / rows + decay * start) / len(start)
        torch.testing.assert_close(tier.codebooks.detach(), moved)
        assert not torch.equal(tier.codebooks, start)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_distill_trains_both_tiers(dtype: str | None) -> None:
    teacher, model, _ = shop(dtype, 20 if dtype is None else 30)
    kept = {k: v.clone() for k, v in model.state_dict().items() if "codes" in k or "tier_map" in k}
    parts = [tier for name in TIERED for tier in getattr(model, name).tiers]
    before = [(tier.codebooks.dtype, tier.dequantize()) for tier in parts]
    batches = [ids(500, i) for i in range(8)]
    losses = distill(model, teacher, batches, epochs=3, lr=0.01, progress=False)
    assert losses[-1] < losses[0]
    for tier, (books, rows) in zip(parts, before, strict=True):
        assert tier.codebooks.dtype is books and not torch.equal(tier.dequantize(), rows)
    assert kept and all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_compress_reads_gradients_of_batches_and_still_makes_tiers() -> None:
    torch.manual_seed(0)
    model = Shop()
    batches = [ids(300, i) for i in range(3)]
    report = compress(model, counts(), config(), batches=batches, progress=False)
    assert type(model.shuffled) is TieredEmbedding
    assert by_name(report)["shuffled"].popularity == "linear"
    assert by_name(plan(Shop(), counts(), config()))["shuffled"].popularity == "sqrt"
    named = CompressionConfig(ratio=40, popularity="log")
    assert by_name(plan(Shop(), counts(), named, batches=batches))["sorted"].popularity == "log"
    assert report.bytes_after <= report.bytes_before / 40 and len(model(ids())) == 200


# --- maps that contradict themselves ------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(masks(), st.data())
def test_a_map_knows_its_popular_rows_and_any_change_shows(
    popular: torch.Tensor, data: st.DataObject
) -> None:
    tier_map = TierMap.of(popular)
    count = int(popular.sum())
    assert tier_map.popular_rows() == count
    name = data.draw(st.sampled_from([n for n, held in tier_map.named_buffers() if len(held)]))
    held = dict(tier_map.named_buffers())[name]
    place = data.draw(st.integers(0, len(held) - 1))
    if name == "bitmap":
        held[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        held[place] += data.draw(st.sampled_from([-1, 1, 1000]))
    assert tier_map.popular_rows() != count
