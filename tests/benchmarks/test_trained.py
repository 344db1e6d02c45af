"""Baselines trained with the task: bytes, outputs and what each method promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.quality.common import PARTS, Base, embedding_bytes, tables
from benchmarks.quality.trained import (
    TRAINED,
    Clustered,
    Clusters,
    Coded,
    CodeShape,
    Dense,
    Hashed,
    Modulo,
    Narrow,
    Partition,
    Quantized,
    QuotientRemainder,
    Sum,
    _build,
    _stored,
    _train,
)
from examples.ctr.base import build_model
from examples.ctr.data import counts
from examples.ctr.generator import generate
from examples.ctr.models import DNN
from examples.ctr.settings import SETTINGS
from examples.ctr.training import train

RATIOS = (4, 16)
PLANS = (
    Narrow(3),
    Modulo(100),
    Partition(120),
    CodeShape(4, 13, 1.0, 1),
    CodeShape(4, 24, 0.1, 4),
    Clusters(20, 4),
)


@pytest.fixture(scope="module")
def base():
    data = generate(examples=3000, fields=4, max_rows=2000)
    settings = dataclasses.replace(SETTINGS["generator"], epochs=1, dim=8, batch_size=512)
    model = build_model(data.fields, data.rows, settings)
    train(model, data, epochs=1, batch_size=512, progress=False)
    return Base(data, settings, model, counts(data), seed=0)


@pytest.fixture(scope="module")
def made(base):
    """(method, ratio) -> the model, or None."""
    return {(name, ratio): TRAINED[name](base, ratio) for name in TRAINED for ratio in RATIOS}


def _modules(model, kind):
    held = [getattr(model, part) for part in PARTS if hasattr(model, part)]
    return [module for part in held for module in part.values() if isinstance(module, kind)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", TRAINED)
def test_models_fit_their_budget_and_answer(base, made, name, ratio):
    model = made[name, ratio]
    if model is None:
        assert (name, ratio) == ("smaller_dim", 16)  # even one column has 4 bytes a row with FM's
        return
    # Trained anew and whole, in half the bytes.
    assert embedding_bytes(model) <= base.budget(2 if name == "retrained" else ratio)
    assert not model.training
    logits = model(base.data.ids["valid"])
    assert logits.shape == base.data.labels["valid"].shape
    assert logits.dtype is torch.float32
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("name", TRAINED)
def test_floats_are_stored_as_float16_and_rows_come_as_float32(made, name):
    model = made[name, 4]
    for table in _modules(model, torch.nn.Module):
        floats = [t for t in table.state_dict().values() if t.is_floating_point()]
        assert floats
        assert all(tensor.dtype is torch.float16 for tensor in floats)
        assert table(torch.zeros(2, 3, dtype=torch.int64)).shape[:2] == (2, 3)
        assert table(torch.zeros(1, dtype=torch.int64)).dtype is torch.float32


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_seed_gives_the_same_model(base, made, name):
    torch.manual_seed(123)  # what happened before does not matter
    again = TRAINED[name](base, 4).state_dict()
    first = made[name, 4].state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = TRAINED[name](dataclasses.replace(base, seed=1), 4).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_base_is_left_as_it_was_and_a_model_without_first_order_will_do(base):
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    settings = base.settings
    dnn = DNN(base.data.fields, base.data.rows, settings.dim, settings.hidden)
    model = TRAINED["hashing"](dataclasses.replace(base, model=dnn), 4)
    assert type(model) is DNN
    for name in TRAINED:
        TRAINED[name](base, 16)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "retrained"])
def test_nothing_fits_no_budget(base, name):
    assert TRAINED[name](base, 1e6) is None


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_plans_count_the_bytes_that_are_stored(base, plan):
    shapes = [(table.num_embeddings, table.embedding_dim) for _, _, table in tables(base.model)]
    expected = sum(min(plan.cost(*shape), 2 * shape[0] * shape[1]) for shape in shapes)
    dim = plan.dim if isinstance(plan, Narrow) else None
    assert embedding_bytes(_stored(_build(base, plan, dim))) == expected


def test_small_tables_stay_dense(base):
    model = _build(base, Modulo(100))
    kinds = [type(table) for table in model.embeddings.values()]
    assert base.data.rows[1] < 100 < base.data.rows[2]
    assert kinds == [Dense, Dense, Hashed, Hashed]


def test_smaller_dim_takes_the_largest_that_fits(base, made):
    dims = {table.table.embedding_dim for table in made["smaller_dim", 4].embeddings.values()}
    assert dims == {3}  # 36 bytes a row / 4 = 2 bytes * (3 + the first-order weight) + 1


def test_hashing_shares_rows_of_equal_remainder_only(base, made):
    table = made["hashing", 16].embeddings["field_03"]
    rows = table.table.num_embeddings
    ids = torch.arange(base.data.rows[3])
    assert isinstance(table, Hashed)
    assert rows < base.data.rows[3]
    assert torch.equal(table(ids), table(ids % rows))
    assert len(table(ids).unique(dim=0)) == rows


def test_quotients_and_remainders_tell_all_rows_apart(base, made):
    tables_made = _modules(made["qr", 16], QuotientRemainder)
    assert tables_made
    table = made["qr", 16].embeddings["field_03"]
    rows = table(torch.arange(base.data.rows[3]))
    assert len(rows.unique(dim=0)) == base.data.rows[3]


def test_partitions_cover_all_rows_with_as_many_remainders_as_fit():
    for rows in (1, 2, 7, 100, 101, 2000):
        pairs = [(-(-rows // count), count) for count in range(1, rows + 1)]
        fewest = min(map(sum, pairs))
        for most in (1, fewest, fewest + 1, rows // 2, rows, 2 * rows):
            allowed = [pair for pair in pairs if sum(pair) <= max(most, fewest)]
            assert Partition(most).split(rows) == max(allowed, key=lambda pair: pair[1])


@pytest.mark.parametrize("shape", [CodeShape(4, 16, 1.0, 1), CodeShape(2, 64, 0.1, 4)])
def test_packed_codes_decode_to_what_training_gave(base, shape):
    model = _train(base, _build(base, shape))
    quantized = _modules(model, Quantized)
    assert len(quantized) >= 2
    for table in quantized:
        ids = torch.arange(table.queries.num_embeddings)
        trained = table(ids)
        assert torch.equal(table.stored()(ids), trained.half().float())
        assert len(trained.unique(dim=0)) > 1


def test_gradients_go_straight_to_the_queries_and_pull_the_codewords():
    torch.manual_seed(0)
    table = Quantized([(20, 4)], dim=6, parts=2)
    ids = torch.tensor([3, 5, 3])
    slopes = torch.randn(3, 6)
    out = table(ids)
    (out * slopes).sum().backward()
    expected = torch.zeros(20, 6).index_add_(0, ids, slopes)
    assert torch.allclose(table.queries.weight.grad, expected)
    assert torch.allclose(out, table.eval()(ids))
    pull = torch.zeros_like(table.codebooks)
    codes = table.encode(ids)
    for row, part in [(row, part) for row in range(3) for part in range(2)]:
        query = table.queries.weight[ids[row]].view(2, 3)[part]
        code = codes[row, part]
        pull[part, code] += (table.codebooks[part, code] - query).detach() / 3
    assert torch.allclose(table.codebooks.grad, pull)


def test_the_tail_uses_fewer_codewords_and_bits(base):
    shape = CodeShape(2, 64, 0.1, 4)
    table = _train(base, _build(base, shape)).embeddings["field_03"]
    stored = table.stored()
    rows = base.data.rows[3]
    codes = stored.codes(torch.arange(rows))
    head = torch.cat([torch.arange(199), torch.tensor([rows - 1])])
    tail = torch.arange(199, rows - 1)
    assert torch.equal(codes, table.encode(torch.arange(rows)))
    assert codes[tail].max() < 16 <= codes[head].max()
    assert isinstance(stored, Coded)
    assert len(stored.codes_0) == 200 * 2 * 6 / 8 + 8
    assert len(stored.codes_1) == 1800 * 2 * 4 / 8 + 8


def test_mgqe_has_two_tiers_and_dpq_one(made):
    assert {len(table.tiers) for table in _modules(made["dpq", 4], Coded)} == {1}
    assert {len(table.tiers) for table in _modules(made["mgqe", 4], Coded)} == {2}


def test_clustering_changes_the_assignment_and_little_of_the_rows():
    torch.manual_seed(0)
    table = Clustered(rows=500, dim=8, clusters=40, chunks=4)
    ids = torch.arange(500)
    rows, codes, hashes = table(ids), table.codes.clone(), table.helper.hashes(ids)
    table.cluster(seed=0)
    assert (table.codes != codes).float().mean() > 0.5
    assert (table.helper.hashes(ids) != hashes).float().mean() > 0.5
    assert (table(ids) - rows).square().mean() < 0.2 * rows.var()
    stored = table.stored()
    assert isinstance(stored, Sum)
    assert torch.equal(stored.first.codes(ids), table.codes)


def test_cce_is_trained_after_its_last_clustering(base, monkeypatch):
    steps = []
    cluster = Clustered.cluster
    monkeypatch.setattr(
        Clustered, "cluster", lambda table, seed: (steps.append("cluster"), cluster(table, seed))
    )
    monkeypatch.setattr(
        "benchmarks.quality.trained.train",
        lambda *given, **options: (steps.append(options["epochs"]), train(*given, **options)),
    )
    settings = dataclasses.replace(base.settings, epochs=3)
    model = TRAINED["cce"](dataclasses.replace(base, settings=settings), 4)
    count = len(_modules(model, Sum))
    assert steps == [1, *["cluster"] * count, 1, *["cluster"] * count, 1]
