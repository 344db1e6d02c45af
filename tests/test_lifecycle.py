"""New rows, changed rows and drift, with the codebooks as they were learned."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressionConfig,
    compress,
    drift,
    extend,
    lifecycle,
    load,
    save,
    update,
)
from mec_embed.learning.fit import CHUNK_BYTES
from mec_embed.learning.quantizers import quantizer_for
from mec_embed.packing import pack
from mec_embed.regularization import rows_per_codeword
from mec_embed.tiers import TieredEmbedding, TierMap


def _table(layout: CodeLayout, kind: Any = CompressedEmbedding, **options: Any) -> Any:
    torch.manual_seed(0)
    table = kind(layout, **options)
    shape = layout.num_subvectors, layout.codebook_size, layout.subvector_dim
    if layout.bits and "code_table" not in options:
        codes = torch.randint(layout.codebook_size, (layout.num_embeddings, shape[0]))
        table.codes.copy_(pack(codes, layout.bits))
    table.codebook_set.store(torch.randn(shape))
    return table


def _whole(table: Any) -> Tensor:
    with torch.no_grad():
        return table.weight


LAYOUTS = st.builds(
    CodeLayout,
    kind=st.sampled_from(["additive", "product"]),
    num_embeddings=st.integers(1, 40),
    embedding_dim=st.just(12),
    num_subvectors=st.sampled_from([1, 2, 3, 4, 6]),
    codebook_size=st.sampled_from([2, 3, 16, 20, 300]),
    codebook_dtype=st.sampled_from([torch.float32, torch.int8]),
)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, count=st.integers(0, 20))
def test_rows_that_codewords_make_up_are_found_again(layout: CodeLayout, count: int) -> None:
    table = _table(layout)
    before = _whole(table)
    known = before[torch.randint(len(before), (count,))]
    ids = extend(table, known)
    assert (ids.start, ids.stop) == (len(before), len(before) + count)
    assert torch.equal(_whole(table)[: len(before)], before)
    assert table.num_embeddings == table.layout.num_embeddings == len(before) + count
    assert table.codes.numel() == table.layout.code_bytes
    # A beam search need not find the very codes, but no row is far from the one asked for.
    errors = (_whole(table)[len(before) :] - known).square().sum(1)
    assert (errors <= known.square().sum(1) + 1e-4).all()
    if layout.kind == "product":
        torch.testing.assert_close(_whole(table)[len(before) :], known)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, data=st.data())
def test_an_update_changes_its_rows_only(layout: CodeLayout, data: st.DataObject) -> None:
    table = _table(layout)
    before = _whole(table)
    rows = len(before)
    ids = torch.tensor(
        data.draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows)), dtype=torch.int64
    )
    wanted = torch.randn(len(ids), 12)
    size, ending = table.codes.numel(), table.codes[-8:].clone()
    changed = update(table, ids, wanted)
    after = _whole(table)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(after[others], before[others])
    assert table.codes.numel() == size and torch.equal(table.codes[-8:], ending)
    assert changed >= int((after != before).any(1).sum())
    other = copy.deepcopy(table)
    with torch.no_grad():
        assert torch.equal(other(ids), after[ids])
    # The same rows appended have no better codes, and none where those before were no better.
    new = extend(other, wanted)
    errors = (_whole(other)[new.start :] - wanted).square().sum(1)
    assert ((after[ids] - wanted).square().sum(1) <= errors * (1 + 1e-5) + 1e-6).all()


def test_an_update_makes_no_row_worse() -> None:
    table = _table(CodeLayout("additive", 500, 12, 8, 8, torch.float32))
    before, ids = _whole(table), torch.arange(500)
    assert update(table, ids, before) == 0 and torch.equal(_whole(table), before)
    wanted = before + 2 * torch.randn_like(before)
    assert update(table, ids, wanted) > 0
    errors = [(rows - wanted).square().sum(1) for rows in (before, _whole(table))]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["additive", "product"])
def test_rows_with_a_large_common_mean_are_encoded_as_well(kind: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3000, 4)
    errors = []
    for mean in (0.0, 2000.0):
        model = nn.Sequential(nn.Embedding.from_pretrained(rows + mean, freeze=False))
        config = CompressionConfig(num_subvectors=2, codebook_size=16, codes=kind, epochs=0)
        report = compress(model, None, config, progress=False)
        learned = report.tables[0].weighted_error
        table = model[0]
        assert drift(table, rows + mean, learned).error == pytest.approx(learned, rel=0.05)
        new = extend(table, rows + mean)
        found = _whole(table)[new.start :] - (rows + mean)
        errors.append(float(found.square().mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_plan_of_codes_that_were_replaced_meanwhile_is_not_read(monkeypatch: Any) -> None:
    """As another thread may extend the table while its plan is packed."""
    table = _table(CodeLayout("additive", 400, 12, 3, 16, torch.float32))
    ids, before = torch.arange(400), _whole(table)
    pack_plan, old = CompressedEmbedding._pack_plan, table.codes

    def pack_slowly(module: Any) -> Any:
        plan = pack_plan(module)
        if module.codes is old:
            module.code_table.codes = old.clone()
            old.fill_(0)  # what a plan of them would read
        return plan

    monkeypatch.setattr(CompressedEmbedding, "_pack_plan", pack_slowly)
    table._fast.forget()
    table.codebooks.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(table(ids), before) and torch.equal(table(ids), before)
    assert table.codes is not old and not old.any()


class Pair(nn.Module):
    def __init__(self, rows: int = 3000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors, self.weights = nn.Embedding(rows, 16), nn.Embedding(rows, 1)
        with torch.no_grad():
            latent = torch.randn(rows, 4)
            self.vectors.weight.copy_(latent @ torch.randn(4, 16))
            self.weights.weight.copy_(latent @ torch.randn(4, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.vectors(ids).sum(-1) + self.weights(ids)[..., 0]


@pytest.fixture(scope="module")
def pair() -> tuple[Pair, Pair, Any]:
    dense = Pair()
    model = copy.deepcopy(dense)
    counts = (3000 / (1 + np.arange(3000))).astype(int) + 1
    config = CompressionConfig(ratio=10, codebook_dtype="int8")
    report = compress(model, {"vectors": counts, "weights": counts}, config, progress=False)
    return dense, model, report


def test_tables_that_share_codes_change_together(
    pair: tuple[Pair, Pair, Any], tmp_path: Path
) -> None:
    dense, model = pair[0], copy.deepcopy(pair[1])
    parts = [list(table._tables()) for table in (model.vectors, model.weights)]
    assert parts[0][0].code_table is parts[1][0].code_table
    before = model(torch.arange(3000))
    gc.collect()
    with pytest.raises(ValueError, match=r"shares its codes with \['weights'\]; give all of them"):
        extend(model.vectors, torch.randn(2, 16))
    with pytest.raises(ValueError, match="shares its codes"):
        update(model.weights, torch.tensor([4]), torch.randn(1, 1))
    assert torch.equal(model(torch.arange(3000)), before)
    both = [model.vectors, model.weights]
    rows = [dense.vectors.weight[:50].detach(), dense.weights.weight[:50].detach()]
    ids = torch.tensor(list(extend(both, rows, popular=True)))
    assert torch.equal(model(torch.arange(3000)), before)
    assert (model.vectors(ids) - rows[0]).square().mean() < rows[0].var() / 4
    update(both, ids[:7].int(), [row[20:27] for row in rows])
    assert (model.vectors(ids[:7]) - rows[0][20:27]).square().mean() < rows[0].var() / 4
    # What was extended is saved and loaded as any model.
    save(model, tmp_path / "m.safetensors")
    again = load(Pair(3050), tmp_path / "m.safetensors")
    assert torch.equal(again(torch.arange(3050)), model(torch.arange(3050)))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("popular", [False, True])
def test_tiers_grow(sort: bool, popular: bool) -> None:
    torch.manual_seed(1)
    mask = torch.rand(300) < 0.3
    mask = mask.sort(descending=True)[0] if sort else mask
    count = int(mask.sum())
    head = _table(CodeLayout("additive", count, 12, 4, 16))
    tail = _table(CodeLayout("additive", 300 - count, 12, 1, 8))
    table = TieredEmbedding(TierMap.of(mask), head, tail)
    before = _whole(table)
    ids = extend(table, before[mask][:5], popular=popular)
    assert table.num_embeddings == 305 and head.num_embeddings == count + 5 * popular
    after = _whole(table)
    assert torch.equal(after[:300], before)
    assert table.tier_map.popular_rows() == count + 5 * popular
    changed = torch.tensor([int(mask.nonzero()[0]), int((~mask).nonzero()[0]), ids[0]])
    update(table, changed, torch.zeros(3, 12))
    others = torch.ones(305, dtype=torch.bool)
    others[changed] = False
    assert torch.equal(_whole(table)[others], after[others])
    assert (_whole(table)[changed].norm(dim=1) <= after[changed].norm(dim=1) + 1e-5).all()


def test_one_row_for_all_cannot_grow() -> None:
    mask = torch.arange(300) < 30
    head = _table(CodeLayout("additive", 30, 12, 4, 16))
    table = TieredEmbedding(TierMap.of(mask), head, _table(CodeLayout("shared", 270, 12, 1, 1)))
    with pytest.raises(ValueError, match="stored as one; use popular=True"):
        extend(table, torch.zeros(1, 12))
    with pytest.raises(ValueError, match="row 40 is one of those"):
        update(table, torch.tensor([3, 40]), torch.zeros(2, 12))
    assert extend(table, torch.zeros(1, 12), popular=True) == range(300, 301)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_rows_kept_as_they_are(dtype: torch.dtype) -> None:
    table = _table(CodeLayout("rows", 50, 12, 1, 50, dtype))
    new = torch.randn(3, 12)
    assert extend(table, new) == range(50, 53)
    torch.testing.assert_close(_whole(table)[50:], new, atol=0.03, rtol=0.01)
    assert update(table, torch.tensor([7]), new[:1]) == 1
    torch.testing.assert_close(_whole(table)[7], new[0], atol=0.03, rtol=0.01)


def test_bags_grow() -> None:
    bag = _table(CodeLayout("additive", 50, 12, 3, 16), CompressedEmbeddingBag, mode="sum")
    ids = extend(bag, _whole(bag)[:2])
    with torch.no_grad():
        assert bag(torch.tensor([[ids[0], ids[1]]])).shape == (1, 12)


BAD: dict[str, tuple[Any, str]] = {
    "dense": (
        lambda t: extend(nn.Embedding(3, 12), torch.zeros(1, 12)),
        "table, got Embedding",
    ),
    "columns": (lambda t: extend(t, torch.zeros(1, 11)), r"'t': rows have the shape \(1, 11\)"),
    "nan": (
        lambda t: extend(t, torch.tensor([[0.0], [torch.nan]]).repeat(1, 12)),
        "'t': row 1 of those given holds NaN or infinity, expected finite values; leave it out",
    ),
    "integers": (
        lambda t: extend(t, torch.zeros(1, 12, dtype=torch.int64)),
        "'t': rows are torch.int64, expected floating",
    ),
    "array": (lambda t: extend(t, np.zeros((5, 12))), "'t': rows must be a tensor, got ndarray"),
    "list of ids": (
        lambda t: update(t, [1, 2], torch.zeros(2, 12)),
        "'t': ids must be a tensor, got list",
    ),
    "counts": (lambda t: extend([t], [torch.zeros(1, 12)] * 2), "1 tables need as many arrays"),
    "others": (lambda t: extend([t, _table(t.layout)], [torch.zeros(1, 12)] * 2), "do not share"),
    "ids": (lambda t: update(t, torch.tensor([50]), torch.zeros(1, 12)), r"0\.\.49, got 50\.\.50"),
    "twice": (
        lambda t: update(t, torch.tensor([3, 3]), torch.zeros(2, 12)),
        "id 3 is given 2 times",
    ),
    "float ids": (lambda t: update(t, torch.tensor([3.0]), torch.zeros(1, 12)), "int32 or int64"),
    "weights": (
        lambda t: drift(t, torch.randn(9, 12), 0.1, torch.zeros(9)),
        "weights must be 9 finite numbers.* sum 0",
    ),
    "infinite weights": (
        lambda t: drift(t, torch.randn(2, 12), 0.1, torch.tensor([1.0, torch.inf])),
        "weights must be 2 finite numbers.* sum inf",
    ),
    "matrix of weights": (
        lambda t: drift(t, torch.randn(9, 12), 0.1, torch.ones(9, 1)),
        r"weights must be 9 finite numbers.* shape \(9, 1\)",
    ),
    "list of weights": (
        lambda t: drift(t, torch.randn(2, 12), 0.1, [1.0, 2.0]),
        "'t': weights must be a tensor, got list",
    ),
    "one row": (lambda t: drift(t, torch.randn(1, 12), 0.1), "'t': the rows are all equal"),
    "no error": (lambda t: drift(t, torch.randn(9, 12), None), "'t': the expected error is None"),
    "nan error": (
        lambda t: drift(t, torch.randn(9, 12), torch.nan),
        "'t': the expected error is nan, expected a finite number of at least 0; take weighted",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_changes(name: str) -> None:
    table = _table(CodeLayout("additive", 50, 12, 3, 16), name="t")
    before = pickle.dumps(table.state_dict())
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call(table)
    assert pickle.dumps(table.state_dict()) == before


def test_rows_that_the_dtype_cannot_hold_change_nothing() -> None:
    table = _table(CodeLayout("rows", 50, 12, 1, 50, torch.float16), name="t")
    before, rows = pickle.dumps(table.state_dict()), torch.zeros(2, 12)
    rows[1, 3] = -1e5
    for call in (extend, lambda t, given: update(t, torch.tensor([4, 5]), given)):
        with pytest.raises(ValueError, match="'t': row 1 of those given holds 100000, expected at"):
            call(table, rows)
    assert pickle.dumps(table.state_dict()) == before


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_longer_rows_stay_in_their_optimizer(kind: Any) -> None:
    table, other = _table(CodeLayout("rows", 50, 12, 1, 50)), nn.Linear(12, 1)
    optimizer = kind([*other.parameters(), *table.parameters()], lr=0.1)

    def train() -> None:
        optimizer.zero_grad()
        other(table(torch.arange(table.num_embeddings))).sum().backward()
        optimizer.step()

    train()
    held = [id(one) for one in optimizer.param_groups[0]["params"]]
    extend(table, torch.randn(3, 12), optimizer=optimizer)
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [
        *held[:-1],
        id(table.codebooks),
    ]
    assert all(
        one.shape in ((), (1,), (1, 12), (1, 53, 12))
        for state in optimizer.state.values()
        for one in state.values()
        if isinstance(one, Tensor)
    )
    before = _whole(table).clone()
    train()
    assert (_whole(table) != before).all()


def test_an_optimizer_that_is_none_changes_nothing() -> None:
    table = _table(CodeLayout("rows", 50, 12, 1, 50), name="t")
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got str"):
        extend(table, torch.randn(3, 12), optimizer="Adam")
    with pytest.raises(ValueError, match="holds the rows of table 't', expected one that trains"):
        extend(table, torch.randn(3, 12), optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()))
    assert table.num_embeddings == 50


def test_wide_rows_are_encoded_in_small_chunks(monkeypatch) -> None:
    """Several arrays of a chunk live together: bytes are bounded, not rows."""
    table = _table(CodeLayout("additive", 50, 512, 2, 4))
    quantizer, sizes = quantizer_for("additive"), []

    class Watched:
        def encode(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
            sizes.append(x.nbytes)
            return quantizer.encode(x, *args)

    monkeypatch.setattr(lifecycle, "quantizer_for", lambda kind: Watched())
    extend(table, torch.randn(20_000, 512))
    assert sum(sizes) == 20_000 * 512 * 4 and max(sizes) <= CHUNK_BYTES


def test_drift_says_when_the_codebooks_no_longer_fit(pair: tuple[Pair, Pair, Any]) -> None:
    dense, model, report = pair
    expected = report.tables[0].weighted_error
    same = drift(model.vectors, dense.vectors.weight.detach()[:500], expected)
    assert not same.drifted and same.expected == expected
    other = drift(model.vectors, torch.randn(500, 16) * 3, expected)
    assert other.drifted and other.error > 1.5 * expected


@pytest.mark.parametrize("kind", ["additive", "rows", "shared"])
def test_drift_measures_each_row_in_its_tier(kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.rand(300) < 0.2
    few = int(mask.sum())
    layouts = {
        "additive": CodeLayout("additive", 300 - few, 12, 1, 4),
        "rows": CodeLayout("rows", 300 - few, 12, 1, 300 - few),
        "shared": CodeLayout("shared", 300 - few, 12, 1, 1),
    }
    head, tail = _table(CodeLayout("additive", few, 12, 4, 16)), _table(layouts[kind])
    table = TieredEmbedding(TierMap.of(mask), head, tail)
    rows, ids = torch.randn(300, 12), torch.randperm(300)
    found = drift(table, rows[ids], 0.1, ids=ids)
    changed = ids[mask[ids]] if kind == "shared" else ids
    update(table, changed, rows[changed])  # encodes each in its tier; the shared row stays
    error = (rows - _whole(table)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert found.error == pytest.approx(float(error), rel=1e-4)
    assert found.error != drift(table, rows[ids], 0.1).error
    often = torch.randint(300, (900,))  # a sample by popularity holds some rows many times
    weighed = drift(table, rows, 0.1, torch.bincount(often, minlength=300), ids=torch.arange(300))
    assert drift(table, rows[often], 0.1, ids=often).error == pytest.approx(weighed.error)
    with pytest.raises(ValueError, match=r"0\.\.299, got 0\.\.300"):
        drift(table, rows[:2], 0.1, ids=torch.tensor([0, 300]))


def test_copies_hold_their_own_codes(pair: tuple[Pair, Pair, Any]) -> None:
    model = copy.deepcopy(pair[1])
    other = pickle.loads(pickle.dumps(model))
    for one in (model, other):
        head = one.vectors._tables()[0]
        assert {part.name for part in head.code_table.holders} == {"vectors", "weights"}
        assert head in head.code_table.holders


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_rows_change_alike_in_any_mode(mode: Any, tmp_path: Path) -> None:
    def changed(mode: Any) -> Any:
        table = _table(CodeLayout("additive", 40, 12, 3, 16))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(20, 12, generator=generator)
        with mode():
            extend(table, rows)
            update(table, torch.arange(20), rows)
        return table

    expected, table = changed(torch.no_grad), changed(mode)
    assert torch.equal(table.codes, expected.codes)
    assert not any(tensor.is_inference() for tensor in table.state_dict().values())
    model = nn.ModuleDict({"table": table})
    save(model, tmp_path / "model.safetensors")
    with mode():
        again = load(nn.ModuleDict({"table": nn.Embedding(60, 12)}), tmp_path / "model.safetensors")
    again["table"](torch.arange(60)).sum().backward()
    assert again["table"].codebooks.grad is not None


def test_penalties_count_rows_that_were_added_where_codes_were_before() -> None:
    table = _table(CodeLayout("additive", 40, 12, 3, 16))
    for _ in range(30):
        assert rows_per_codeword(table).sum() == 3 * table.num_embeddings
        extend(table, torch.randn(8, 12))
        extend(table, torch.randn(8, 12))
