"""compress() and plan(): bytes, errors that change nothing, optimizers, determinism."""

import copy
import dataclasses
import gc
import importlib
import weakref
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from click_model import ClickModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mec_embed import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressionConfig,
    FrequencyStats,
    compress,
    load,
    outcome,
    plan,
    save,
    tables,
)
from mec_embed.reader import Reader

FAST = CompressionConfig(num_subvectors=2, codebook_size=4, min_rows=8, epochs=0)
PLANNED = CompressionConfig(ratio=6, epochs=0)
TABLE_KINDS = (nn.Embedding, nn.EmbeddingBag, CompressedEmbedding, CompressedEmbeddingBag)


def run(model, freq_stats=None, config=FAST, **options):
    return compress(model, freq_stats, config, progress=False, **options)


def small(rows=(300, 200), dim=8):
    torch.manual_seed(0)
    return ClickModel(rows, dim)


def ids_for(model, batch=16):
    generator = torch.Generator().manual_seed(5)
    rows = [t.num_embeddings for t in model.embeddings.values()]
    return torch.stack([torch.randint(n, (batch,), generator=generator) for n in rows], 1)


def table_bytes(model):
    """Bytes of all distinct tensors inside the embedding modules of a model."""
    tensors = {}
    for module in model.modules():
        if isinstance(module, TABLE_KINDS):
            for tensor in [*module.parameters(), *module.buffers()]:
                tensors[id(tensor)] = tensor.nbytes
    return sum(tensors.values())


def snapshot(model, *optimizers):
    """Everything that a failed compression must leave: modules, values, groups, state."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer_states = [copy.deepcopy(one.state_dict()) for one in optimizers]
    params = [[id(p) for g in one.param_groups for p in g["params"]] for one in optimizers]
    return modules, values, optimizer_states, params


def assert_unchanged(before, model, *optimizers):
    after = snapshot(model, *optimizers)
    assert before[0] == after[0] and before[3] == after[3]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=0)


@pytest.fixture(scope="module")
def planned():
    """(model before, model, report) of a click model at a ratio with real counts."""
    torch.manual_seed(0)
    before = ClickModel((1500, 400), 8)
    counts = {
        name: 1 + 1000 // (1 + np.arange(module.num_embeddings))
        for name, module in before.named_modules()
        if isinstance(module, nn.Embedding)
    }
    model = copy.deepcopy(before)
    return before, model, run(model, counts, PLANNED), counts


def test_model_is_compressed_in_place(planned):
    before, model, report, _ = planned
    assert all(isinstance(t, CompressedEmbedding) for t in model.embeddings.values())
    assert {t.name for t in report.tables} == {
        name for name, module in before.named_modules() if isinstance(module, nn.Embedding)
    }
    ids = ids_for(model)
    assert model(ids).shape == before(ids).shape
    for name, old in before.named_modules():
        if isinstance(old, nn.Embedding):
            new = model.get_submodule(name)
            assert (new.num_embeddings, new.embedding_dim) == old.weight.shape


def test_budget_is_met_and_bytes_are_real(planned):
    before, model, report, _ = planned
    assert report.bytes_before == table_bytes(before)
    assert report.bytes_after == table_bytes(model)
    assert report.ratio >= 6
    assert report.bytes_after > 0.8 * report.bytes_before / 6  # the budget is used


def test_plan_has_the_bytes_and_layouts_of_compress(planned):
    before, _, report, counts = planned
    state = snapshot(before)
    expected = plan(before, counts, PLANNED)
    assert_unchanged(state, before)
    assert expected.bytes_after == report.bytes_after and expected.seconds is None
    for a, b in zip(expected.tables, report.tables, strict=True):
        assert (a.name, a.layout, a.code_bytes, a.codebook_bytes) == (
            b.name,
            b.layout,
            b.code_bytes,
            b.codebook_bytes,
        )


def test_errors_in_the_report_are_those_of_the_model(planned):
    before, model, report, counts = planned
    for row in report.tables:
        dense = before.get_submodule(row.name).weight.detach().double()
        decoded = model.get_submodule(row.name).dequantize().double()
        weights = torch.from_numpy(np.sqrt(counts[row.name]))
        weights = weights / weights.sum()
        centred = dense - weights @ dense
        error = (weights @ (dense - decoded).square().sum(1)) / (weights @ centred.square().sum(1))
        assert row.weighted_error == pytest.approx(error.item(), rel=1e-3)
        assert row.learned_error <= row.start_error * (1 + 1e-6)


def test_first_order_tables_share_codes():
    model = small()
    report = run(model)
    for field in model.embeddings:
        vector, first = model.embeddings[field], model.first_order[field]
        assert vector.codes is first.codes and vector.codebooks is not first.codebooks
    row = next(t for t in report.tables if t.name == "first_order.f0")
    assert row.shares_codes_with == "embeddings.f0" and row.code_bytes == 0
    assert report.bytes_after == table_bytes(model)


def test_plan_for_many_tables():
    """A hundred tables of many sizes, whose bytes are those of the plan."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(130 + 7 * i, 4 + 4 * (i % 3)) for i in range(100)])
    report = plan(model, None, CompressionConfig(ratio=5))
    assert len(report.tables) == 100 and report.ratio >= 5
    assert report.bytes_before == table_bytes(model)


@pytest.mark.parametrize("config", [FAST, CompressionConfig(ratio=5, min_rows=8, epochs=0)])
def test_left_alone_tables_count(config):
    model = nn.ModuleDict(
        {
            "big": nn.Embedding(600, 8),
            "tiny": nn.Embedding(5, 8),
            "normed": nn.Embedding(20, 8, max_norm=1.0),
        }
    )
    before = table_bytes(model)
    report = run(model, config=config)
    assert report.bytes_before == before and report.bytes_after == table_bytes(model)
    reasons = {t.name: t.reason for t in report.tables}
    assert reasons["big"] is None
    assert "min_rows" in reasons["tiny"] and "max_norm" in reasons["normed"]
    assert type(model["tiny"]) is nn.Embedding


def test_tied_tables_are_counted_once():
    """Two tables over one parameter are one tensor, before and after."""
    model = nn.ModuleDict({n: nn.Embedding(300, 8) for n in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    before = table_bytes(model)
    assert before == 2 * 300 * 8 * 4
    report = run(model)
    assert report.bytes_before == before
    assert report.bytes_after == table_bytes(model)


def test_max_bytes():
    model = small()
    report = run(model, config=CompressionConfig(max_bytes=3000, epochs=0))
    assert report.bytes_after == table_bytes(model) <= 3000


@pytest.mark.parametrize("codes", ["additive", "product"])
@pytest.mark.parametrize("codebook_dtype", [None, "float16", "bfloat16", "int8"])
def test_plan_equals_compress(codes, codebook_dtype):
    config = CompressionConfig(ratio=3, codes=codes, codebook_dtype=codebook_dtype, epochs=0)
    model = small((500, 180))
    expected = plan(model, None, config).bytes_after
    report = run(model, config=config)
    assert expected == report.bytes_after == table_bytes(model)
    assert report.ratio >= 3


@pytest.mark.parametrize("codes", ["additive", "product"])
def test_explicit_layout(codes):
    config = CompressionConfig(num_subvectors=4, codebook_size=8, codes=codes, epochs=0)
    model = small()
    report = run(model, config=config)
    for row, table in zip(report.tables, model.embeddings.values(), strict=False):
        assert row.layout == f"{codes} 4x8"
        layout = table.layout
        assert (layout.kind, layout.num_subvectors, layout.codebook_size) == (codes, 4, 8)


def test_product_codes_must_divide_the_columns():
    config = CompressionConfig(num_subvectors=3, codebook_size=8, codes="product")
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match="embeddings.f0.*num_subvectors=3"):
        run(model, config=config)
    assert_unchanged(before, model)


def test_codes_that_take_more_leave_the_table():
    model = nn.ModuleDict({"a": nn.Embedding(300, 8), "b": nn.Embedding(10, 2)})
    config = CompressionConfig(num_subvectors=2, codebook_size=64, min_rows=1, epochs=0)
    report = run(model, config=config)
    assert type(model["b"]) is nn.Embedding and report.tables[1].layout == "as it was"
    assert report.tables[1].reason and report.bytes_after == table_bytes(model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(None, torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_codebook_dtype(name, dtype):
    config = CompressionConfig(
        num_subvectors=2, codebook_size=16, codebook_dtype=name, epochs=1, min_rows=8
    )
    model = small()
    run(model, config=config)
    table = model.embeddings["f0"]
    assert table.codebooks.dtype is dtype and table.codebooks.requires_grad
    assert table(torch.tensor([1])).dtype is torch.float32
    model(ids_for(model)).sum().backward()
    assert table.codebooks.grad.dtype is dtype


def test_an_optimizer_that_is_left_empty_is_told_of():
    model = small()
    tables = torch.optim.Adagrad(model.embeddings.parameters())
    network = torch.optim.Adam(model.mlp.parameters())
    config = CompressionConfig(num_subvectors=2, codebook_size=16, codebook_dtype="int8", epochs=0)
    report = run(model, config=config, optimizer=[tables, network])
    (note,) = [note for note in report.notes if "holds no parameter any more" in note]
    assert "Adagrad" in note and "GradScaler" in note


def test_an_optimizer_that_the_model_holds_and_was_not_given_is_told_of():
    model = nn.Module()
    model.inner = small()
    model.optimizer = torch.optim.Adam(model.parameters())
    model.other = torch.optim.Adam(model.inner.mlp.parameters())
    notes = plan(model, None).notes
    (note,) = [note for note in notes if "was not given" in note]
    assert "'optimizer'" in note and "inner.embeddings.f0" in note
    assert not any("was not given" in n for n in plan(model, None, optimizer=model.optimizer).notes)


def test_codebooks_are_not_shared_where_that_is_not_wanted():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Embedding(3000, 8) for _ in range(3))
    for share in (True, False):
        one, config = copy.deepcopy(model), CompressionConfig(20, epochs=0, share_codebooks=share)
        report = compress(one, None, config, progress=False)
        assert (one[0].codebook_set is one[1].codebook_set) is share
        assert any(table.shares_codebooks_with for table in report.tables) is share
        assert report.ratio >= 20


def test_int8_codebooks_leave_the_optimizer():
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    config = CompressionConfig(num_subvectors=2, codebook_size=16, codebook_dtype="int8", epochs=0)
    report = run(model, config=config, optimizer=optimizer)
    table = model.embeddings["f0"]
    assert table.codebooks.dtype is torch.int8 and table.codebook_set.scales is not None
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert kept == {id(p) for p in model.mlp.parameters()}
    before = table.codebooks.clone()
    model(ids_for(model)).sum().backward()
    optimizer.step()
    assert torch.equal(table.codebooks, before)
    assert report.bytes_after == table_bytes(model)


def test_small_ratio_may_keep_rows_in_a_narrow_dtype():
    model = nn.Sequential(nn.Embedding(2000, 8))
    weight = model[0].weight.detach().clone()
    report = run(model, config=CompressionConfig(ratio=1.9, codebook_dtype="float16", epochs=0))
    assert report.ratio >= 1.9 and report.bytes_after == table_bytes(model)
    assert report.tables[0].layout == "rows float16"
    torch.testing.assert_close(model[0].dequantize(), weight.half().float())
    assert report.tables[0].weighted_error < 1e-3


def test_rows_that_the_dtype_cannot_hold_are_an_error():
    model = nn.Sequential(nn.Embedding(2000, 8))
    with torch.no_grad():
        model[0].weight.mul_(1e5)
    before = model[0]
    config = CompressionConfig(ratio=1.9, codebook_dtype="float16", epochs=0)
    assert plan(model, None, config).tables[0].layout == "rows float16"
    with pytest.raises(ValueError, match="table '0': its codebooks do not fit into float16"):
        run(model, config=config)
    assert model[0] is before


def naming(model, kind):
    counts = np.arange(1.0, 301)
    return {
        "FrequencyStats": FrequencyStats.from_counts({"inner.user": counts}),
        "full": {"inner.user": counts},
        "last part": {"user": torch.from_numpy(counts)},
        "list": {"user": counts.tolist()},
    }[kind]


@pytest.mark.parametrize("kind", ["FrequencyStats", "full", "last part", "list"])
def test_counts_reach_their_table(kind):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"user": nn.Embedding(300, 8)})})
    report = run(model, naming(model, kind))
    assert report.tables[0].lookups == 300 * 301 / 2
    assert report.tables[0].popularity == "sqrt" and not report.notes


def test_counts_matter():
    """Rows that are used are stored better than those that are not."""
    model = nn.Sequential(nn.Embedding(400, 8))
    weight = model[0].weight.detach().clone()
    counts = np.where(np.arange(400) < 20, 1e6, 0)
    run(model, {"0": counts})
    errors = (model[0].dequantize() - weight).square().sum(1)
    assert errors[:20].mean() < 0.8 * errors[20:].mean()


@pytest.mark.parametrize("popularity", ["sqrt", "linear", "log", "none"])
@pytest.mark.parametrize("count", [0, 1])
def test_counts_of_all_zeros_or_ones(popularity, count):
    config = CompressionConfig(
        num_subvectors=2, codebook_size=4, min_rows=8, epochs=0, popularity=popularity
    )
    model = nn.Sequential(nn.Embedding(100, 8))
    report = run(model, {"0": np.full(100, count)}, config)
    assert model[0].dequantize().isfinite().all() and report.tables[0].weighted_error < 1


@pytest.mark.parametrize("config", [FAST, CompressionConfig(ratio=4, epochs=0)], ids=["M", "ratio"])
def test_one_table_never_used_and_one_without_counts(config):
    model = nn.ModuleDict({"a": nn.Embedding(400, 8), "b": nn.Embedding(300, 8)})
    report = run(model, {"a": np.zeros(400)}, config)
    for row in report.tables:
        assert 0 < row.weighted_error < 1
    assert model["b"].dequantize().isfinite().all()


def test_a_table_that_is_read_but_never_looked_up_keeps_its_rows():
    """As positions are, whose weight the forward adds: all zeros say nothing about its use."""
    model = nn.ModuleDict({"item": nn.Embedding(400, 8), "position": nn.Embedding(50, 8)})
    counts = {"item": np.arange(400), "position": np.zeros(50)}
    config = CompressionConfig(ratio=5, epochs=0)
    report = plan(model, counts, config)
    without = plan(model, {"item": counts["item"]}, config)
    assert [t.bytes_after for t in report.tables] == [t.bytes_after for t in without.tables]
    (note,) = report.notes
    assert "no lookup of position:" in note and "exclude" in note


def test_no_counts_adds_a_note():
    model = small()
    assert any("freq_stats" in note for note in plan(model, None, FAST).notes)
    some = {"embeddings.f0": np.ones(300)}
    notes = plan(model, some, FAST).notes
    assert any("embeddings.f1" in note for note in notes)
    assert not any("embeddings.f0" in note for note in notes)


def test_counts_for_an_alias_of_a_table_left_alone():
    """Counts of tables that are not compressed are allowed, whatever name they go by."""
    tiny = nn.Embedding(3, 8)
    model = nn.ModuleDict({"a": tiny, "b": tiny, "c": nn.Embedding(300, 8)})
    for name in ("a", "b"):
        assert len(plan(model, {name: np.ones(3), "c": np.ones(300)}, FAST).tables) == 2


class NoOptimizer:
    pass


BAD = {
    "unknown name": ({"nothing": np.ones(3)}, FAST, {}, ValueError, "nothing"),
    "ambiguous name": ({"f0": np.ones(300)}, FAST, {}, ValueError, "several"),
    "wrong length": ({"embeddings.f0": np.ones(3)}, FAST, {}, ValueError, "embeddings.f0.*3 for"),
    "negative": ({"embeddings.f0": -np.ones(300)}, FAST, {}, ValueError, "embeddings.f0"),
    "counts of no mapping": ([1, 2], FAST, {}, TypeError, "freq_stats"),
    "config": (None, {"ratio": 50}, {}, TypeError, "config"),
    "optimizer": (None, FAST, {"optimizer": NoOptimizer()}, TypeError, "optimizer"),
    "optimizers": (None, FAST, {"optimizer": [NoOptimizer()]}, TypeError, "optimizer"),
    "budget": (None, CompressionConfig(max_bytes=10), {}, ValueError, "least possible"),
    "ratio": (None, CompressionConfig(ratio=1e6), {}, ValueError, "least possible"),
    "left alone": (
        None,
        CompressionConfig(ratio=4, exclude=["embeddings.*"]),
        {},
        ValueError,
        "left alone",
    ),
    "nothing": (None, CompressionConfig(include=["x"]), {}, ValueError, "embeddings.f0"),
    "device": (None, FAST, {"device": "nowhere"}, ValueError, "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_change_nothing(case):
    counts, config, options, error, message = BAD[case]
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        run(model, counts, config, **{"optimizer": optimizer, **options})
    assert_unchanged(before, model, optimizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [FAST, PLANNED], ids=["explicit", "ratio"])
@pytest.mark.parametrize("name", ["embeddings.f1", "first_order.f0"])
def test_rows_that_are_not_finite_are_named(name, config, value):
    model = small()
    with torch.no_grad():
        model.get_submodule(name).weight[77, 0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name}.*row 77"):
        run(model, config=config)
    assert_unchanged(before, model)


def _damaged(zero):
    """A model with NaN and infinite entries, or with zeros in their place."""
    model = small()
    with torch.no_grad():
        for name, row, column, value in (
            ("embeddings.f1", 77, 0, float("nan")),
            ("embeddings.f1", 77, 3, float("inf")),
            ("embeddings.f1", 0, slice(None), -float("inf")),
            ("first_order.f0", 299, 0, float("nan")),
        ):
            model.get_submodule(name).weight[row, column] = 0 if zero else value
    return model


@pytest.mark.parametrize("with_batches", [False, True])
@pytest.mark.parametrize("config", [FAST, PLANNED], ids=["explicit", "ratio"])
def test_entries_that_are_not_finite_may_be_taken_as_zero(config, with_batches):
    model, zeros = _damaged(zero=False), _damaged(zero=True)
    ids = torch.stack([torch.arange(200), torch.arange(200)], 1)
    options = {"batches": list(ids.split(50))} if with_batches else {}
    config = dataclasses.replace(config, nonfinite="zero")
    report = run(model, None, config, **options)
    other = run(zeros, None, config, **options)
    torch.testing.assert_close(model.state_dict(), zeros.state_dict(), rtol=0, atol=0)
    assert report.tables[0].weighted_error == other.tables[0].weighted_error
    notes = [note for note in report.notes if "NaN or infinity" in note]
    assert len(notes) == 2 and not any("NaN" in note for note in other.notes)
    assert "'embeddings.f1': 2 rows hold" in str(report)
    assert "'first_order.f0': 1 rows hold" in str(report)


def test_missing_faiss_names_the_extra(monkeypatch):
    real = importlib.import_module

    def without_faiss(name, *args):
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_faiss)
    model = small()
    before = snapshot(model)
    assert plan(model, None, FAST).bytes_after > 0  # needs none
    with pytest.raises(RuntimeError, match=r"mec-embed\[cpu\]"):
        run(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_while_learning_changes_nothing(monkeypatch, error):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return fit(*args, **kwargs)

    fit = outcome.fit_codes
    monkeypatch.setattr(outcome, "fit_codes", interrupted)
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    model(ids_for(model)).sum().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(error):
        run(model, optimizer=optimizer)
    assert len(calls) == 2
    assert_unchanged(before, model, optimizer)
    monkeypatch.undo()
    run(model, optimizer=optimizer)  # and it can be done again
    assert isinstance(model.embeddings["f0"], CompressedEmbedding)


@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_of_another_model_is_refused(several):
    model, other = small(), torch.optim.Adam(small().parameters())
    before = snapshot(model, other)
    given = [torch.optim.Adam(model.parameters()), other] if several else other
    for call in (run, plan):
        with pytest.raises(ValueError, match="Adam holds .* parameters, none of them of the model"):
            call(model, None, FAST, optimizer=given)
    assert_unchanged(before, model, other)


def test_an_optimizer_of_other_parameters_of_the_model_is_fine():
    model = small()
    for table in model.embeddings.values():
        table.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.mlp.parameters())
    before = snapshot(model.mlp, optimizer)
    run(model, optimizer=optimizer)
    assert_unchanged(before, model.mlp, optimizer)


@pytest.mark.parametrize("device", ["nothing", "cuda:99", "meta", 3.5])
def test_a_device_that_is_not_there_is_named(device):
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"device {device!r} cannot be used .* such as 'cpu'"):
        run(model, device=device)
    assert_unchanged(before, model)


@pytest.mark.parametrize("scale", [1e20, 1e36])
def test_rows_that_are_too_large_to_square_are_named(scale):
    model = small()
    with torch.no_grad():
        model.embeddings["f1"].weight[77] = scale
    with pytest.raises(
        ValueError, match=rf"'embeddings.f1': row 77 holds {scale:.0e}".replace("+", r"\+")
    ):
        run(model)


def step(model, optimizers, ids=None):
    loss = model(ids_for(model) if ids is None else ids).square().sum()
    for one in optimizers:
        one.zero_grad()
    loss.backward()
    for one in optimizers:
        one.step()
    return loss.item()


MAKERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_training_goes_on(maker):
    """State of dense tables is dropped, of other layers kept; codebooks are in the same group."""
    model = small()
    tables = [*model.embeddings.parameters(), *model.first_order.parameters()]
    groups = [
        {"params": list(model.mlp.parameters())},
        {"params": tables, "lr": 0.02, "weight_decay": 0.0},
    ]
    optimizer = MAKERS[maker](groups)
    step(model, [optimizer])
    kept = {id(p): optimizer.state[p] for p in model.mlp.parameters()}
    run(model, optimizer=optimizer)
    books = {id(t.codebooks) for t in model.modules() if isinstance(t, CompressedEmbedding)}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == books
    assert optimizer.param_groups[1]["lr"] == 0.02
    state = {id(p): s for p, s in optimizer.state.items()}
    # Adagrad's constructor starts the state of its parameters, so that of codebooks is there.
    fresh = [state.pop(key) for key in books & state.keys()]
    assert len(fresh) == (len(books) if maker == "adagrad" else 0)
    assert all(float(one["step"]) == 0 and not one["sum"].any() for one in fresh)
    assert state.keys() == kept.keys()
    assert all(optimizer.state[p] is kept[id(p)] for p in model.mlp.parameters())
    before = model.embeddings["f0"].codebooks.detach().clone()
    codes = model.embeddings["f0"].codes.clone()
    losses = [step(model, [optimizer]) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not torch.equal(model.embeddings["f0"].codebooks, before)
    assert torch.equal(model.embeddings["f0"].codes, codes)


def test_codebooks_are_shared_within_a_group_only():
    """A table of another learning rate keeps a codebook of its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"t{i}": nn.Embedding(1500, 8) for i in range(4)})
    params = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    report = run(model, config=CompressionConfig(ratio=20, epochs=0), optimizer=optimizer)
    for group, names in zip(optimizer.param_groups, (("t0", "t1"), ("t2", "t3")), strict=True):
        expected = {id(model[name].codebooks) for name in names}
        held = [id(p) for p in group["params"]]
        assert set(held) == expected and len(held) == len(expected)
    assert report.bytes_after == table_bytes(model)


def test_sharing_codebooks_between_tables():
    """Many equal tables at a high ratio share, and each stays as the report says."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"t{i}": nn.Embedding(400, 8) for i in range(6)})
    optimizer = torch.optim.Adam(model.parameters())
    report = run(model, config=CompressionConfig(ratio=20, epochs=0), optimizer=optimizer)
    shared = [t for t in report.tables if t.shares_codebooks_with]
    assert shared
    for row in shared:
        assert model[row.name].codebooks is model[row.shares_codebooks_with].codebooks
    assert report.bytes_after == table_bytes(model)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert len(held) == len(set(held)) == len(set(map(id, model.parameters())))


def test_frozen_tables_stay_frozen():
    model = small()
    model.embeddings["f0"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model, optimizer=optimizer)
    frozen, free = (model.embeddings[name].codebooks for name in ("f0", "f1"))
    assert not frozen.requires_grad and free.requires_grad
    before = frozen.clone(), free.detach().clone()
    step(model, [optimizer])
    assert torch.equal(frozen, before[0]) and not torch.equal(free, before[1])


class SparseModel(nn.Module):
    """Tables with sparse gradients and a dense layer, for two optimizers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 8, sparse=True)
        self.bag = nn.EmbeddingBag(300, 8, sparse=True, mode="sum")
        self.layer = nn.Linear(8, 1)

    def forward(self, ids):
        return self.layer(self.table(ids[:, 0]) + self.bag(ids))[:, 0]


def test_two_optimizers_and_sparse_gradients():
    model = SparseModel()
    ids = torch.randint(300, (16, 3), generator=torch.Generator().manual_seed(0))
    sparse = torch.optim.SparseAdam([model.table.weight, model.bag.weight], lr=0.05)
    dense = torch.optim.Adam(model.layer.parameters(), lr=0.05)
    step(model, [sparse, dense], ids)
    run(model, optimizer=[sparse, dense])
    assert not sparse.state and len(dense.state) == 2
    assert len(sparse.param_groups[0]["params"]) == 2
    before = model.table.codebooks.detach().clone()
    losses = [step(model, [sparse, dense], ids) for _ in range(8)]
    assert model.table.codebooks.grad.is_sparse and model.bag.codebooks.grad.is_sparse
    assert losses[-1] < losses[0]
    assert not torch.equal(model.table.codebooks, before)


def state_bytes(optimizer):
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("config", [FAST, PLANNED], ids=["explicit", "ratio"])
def test_old_tables_are_freed(config):
    """No reference to a dense table survives; the optimizer's state shrinks with it."""
    model = small((600, 400))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, [optimizer])
    state = state_bytes(optimizer)
    refs = [
        weakref.ref(thing)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for thing in (module, module.weight)
    ]
    assert len(refs) == 8
    report = run(model, config=config, optimizer=optimizer)
    gc.collect()
    compressed = {t.name for t in report.tables if t.compressed}
    assert len(compressed) == 4
    assert [ref() for ref in refs] == [None] * 8
    step(model, [optimizer])
    assert state_bytes(optimizer) < state / 2


def codes_of(model):
    return {name: value for name, value in model.state_dict().items() if "cod" in name}


@pytest.mark.parametrize("config", [FAST, PLANNED], ids=["explicit", "ratio"])
def test_same_seed_same_codes(config):
    config = CompressionConfig.from_dict({**config.to_dict(), "epochs": 1, "seed": 3})
    found = []
    for other in (1, 2):
        model = small()
        torch.manual_seed(other)  # the global generator has no say
        np.random.seed(other)
        run(model, config=config)
        found.append(codes_of(model))
    assert found[0]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_global_random_state_is_left_alone():
    model = small()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(model, config=CompressionConfig.from_dict({**FAST.to_dict(), "epochs": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_allowed():
    models = [small(), small()]
    for seed, model in enumerate(models):
        run(model, config=CompressionConfig.from_dict({**FAST.to_dict(), "seed": seed}))
    assert not torch.equal(models[0].embeddings["f0"].codes, models[1].embeddings["f0"].codes)


def test_compressing_twice_takes_only_what_is_left():
    model = small()
    run(model, config=CompressionConfig.from_dict({**FAST.to_dict(), "include": ["*.f0"]}))
    first = model.embeddings["f0"]
    report = run(model)
    assert model.embeddings["f0"] is first
    assert {t.name for t in report.tables if t.compressed} == {"embeddings.f1", "first_order.f1"}
    done = "embeddings.f0, embeddings.f1, first_order.f0, first_order.f1"
    with pytest.raises(ValueError, match=f"{done} are compressed already; call decompress"):
        run(model)


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("config", [FAST, PLANNED], ids=["explicit", "ratio"])
def test_table_of_equal_rows(config, value):
    model = nn.Sequential(nn.Embedding(300, 8))
    with torch.no_grad():
        model[0].weight.fill_(value)
    run(model, config=config)
    torch.testing.assert_close(model[0].dequantize(), torch.full((300, 8), value))


def test_nonzero_padding_row_is_learned():
    model = nn.Sequential(nn.Embedding(300, 8, padding_idx=0))
    with torch.no_grad():
        model[0].weight[0] = 3.0
    run(model, {"0": np.where(np.arange(300) == 0, 1e8, 1)})
    row = model[0](torch.tensor([0]))
    assert (row - 3).abs().max() < 0.5
    row.sum().backward()
    assert model[0].codebooks.grad.eq(0).all()


def test_report_is_text_and_json(planned):
    report = planned[2]
    assert "embeddings.f0" in str(report) and max(map(len, str(report).splitlines())) <= 120
    assert f'"bytes_after": {report.bytes_after}' in report.to_json()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def zoos(draw):
    """(model, shape) of random tables, some shared, some padded, some bags."""
    model = nn.ModuleDict()
    for i in range(draw(st.integers(1, 4))):
        bag = draw(st.booleans())
        options = {
            "padding_idx": draw(st.sampled_from([None, 0, -1])),
            "dtype": draw(st.sampled_from(DTYPES)),
        }
        rows, dim = draw(st.integers(2, 90)), draw(st.integers(1, 9))
        if bag:
            module = nn.EmbeddingBag(
                rows, dim, mode=draw(st.sampled_from(["sum", "mean", "max"])), **options
            )
        else:
            module = nn.Embedding(rows, dim, **options)
        model[f"t{i}"] = module
        if draw(st.booleans()):
            model[f"again{i}"] = nn.Sequential(module)
    return model, (draw(st.integers(1, 4)), draw(st.integers(2, 9)))


def outputs(model):
    """What each table of a zoo gives for a batch of bags."""
    found = []
    for module in model.values():
        inner = module[0] if isinstance(module, nn.Sequential) else module
        generator = torch.Generator().manual_seed(0)
        found.append(module(torch.randint(inner.num_embeddings, (3, 4), generator=generator)))
    return found


@given(zoos())
@settings(deadline=None, max_examples=30)
def test_any_small_model(case):
    model, (subvectors, size) = case
    before = [(out.shape, out.dtype) for out in outputs(model)]
    dense_bytes = table_bytes(model)
    config = CompressionConfig(num_subvectors=subvectors, codebook_size=size, min_rows=1, epochs=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = run(model, config=config, optimizer=optimizer)
    assert report.bytes_before == dense_bytes and report.bytes_after == table_bytes(model)
    after = outputs(model)
    assert [(out.shape, out.dtype) for out in after] == before
    assert all(out.isfinite().all() for out in after)
    for name, module in model.items():
        if name.startswith("again"):
            assert module[0] is model[f"t{name.removeprefix('again')}"]
        elif module.padding_idx is not None:
            assert module.weight[module.padding_idx].eq(0).all()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))
    sum(out.float().square().sum() for out in after).backward()
    optimizer.step()
    assert all(out.isfinite().all() for out in outputs(model))


SCALES = [1e-4, 1e-2, 1e2, 1e5]


@pytest.mark.parametrize("codebook_dtype", [None, "int8", "float16"])
@pytest.mark.parametrize("scale", SCALES)
def test_error_does_not_depend_on_the_unit(codebook_dtype, scale):
    """Scaled rows are stored as well as the rows; where they cannot be, that is an error."""
    config = CompressionConfig(
        num_subvectors=4, codebook_size=16, codebook_dtype=codebook_dtype, epochs=0
    )
    errors = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(300, 8))
        with torch.no_grad():
            model[0].weight.mul_(factor)
        try:
            errors.append(run(model, config=config).tables[0].weighted_error)
        except ValueError as error:
            assert "'0'" in str(error) and codebook_dtype == "float16" and factor == 1e5
            return
        assert model[0].dequantize().isfinite().all()
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


LEARNING = CompressionConfig.from_dict({**FAST.to_dict(), "epochs": 1})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_learning_without_grad_mode(context):
    """Evaluation code often runs in such a context; codebooks stay trainable after it."""
    model = nn.Sequential(nn.Embedding(300, 8))
    with context():
        run(model, config=LEARNING)
    model(torch.tensor([1])).sum().backward()
    assert model[0].codebooks.grad.abs().sum() > 0


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
def test_other_default_dtype(table_dtype):
    model = nn.Sequential(nn.Embedding(300, 8, dtype=table_dtype))
    torch.set_default_dtype(torch.float64)
    try:
        run(model, config=LEARNING)
        out = model(torch.tensor([1]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype is table_dtype


@pytest.mark.parametrize("codebook_dtype", [None, "int8"])
def test_names_of_parameters_in_the_optimizer_follow(codebook_dtype):
    """Optimizers made from named_parameters() keep one name for each parameter."""
    model = nn.ModuleDict({"table": nn.Embedding(300, 8), "layer": nn.Linear(8, 1)})
    optimizer = torch.optim.Adam(model.named_parameters())
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch does not keep the names")
    config = CompressionConfig.from_dict({**FAST.to_dict(), "codebook_dtype": codebook_dtype})
    run(model, config=config, optimizer=optimizer)
    expected = {id(param): name for name, param in model.named_parameters()}
    group = optimizer.param_groups[0]
    assert group["param_names"] == [expected[id(param)] for param in group["params"]]


def test_codes_are_learned_from_a_view_with_strides():
    """Weights that are not contiguous read as any others."""
    whole = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    reports = []
    for weight in (whole.T, whole.T.contiguous()):
        model = nn.Sequential(nn.Embedding.from_pretrained(weight))
        reports.append(run(model).tables[0].weighted_error)
    assert reports[0] == pytest.approx(reports[1])


ROWS_OF = {
    "random": lambda rows: torch.randn(rows, 4),
    "equal": lambda rows: torch.full((rows, 4), 0.3),
    "zero": lambda rows: torch.zeros(rows, 4),
    "two of them": lambda rows: torch.randn(2, 4)[torch.arange(rows) % 2],
}


@pytest.mark.parametrize("kind", ROWS_OF)
@pytest.mark.parametrize("rows", [1, 2, 9, 70])
@pytest.mark.parametrize("codebook_size", [2, 64])
def test_few_rows_of_any_kind_under_any_name(rows, kind, codebook_size, tmp_path):
    """More codewords than rows, too; saved, loaded, read, and compressed once more."""
    torch.manual_seed(0)
    names = ["a", "用户 id", "é\n", "x" * 300, "type", "weight", "0", "b/", "😀"]
    config = CompressionConfig(
        num_subvectors=2, codebook_size=codebook_size, codebook_dtype="int8", min_rows=1, epochs=1
    )

    def model():
        made = nn.ModuleDict({"large": nn.Embedding(400, 4)})
        for name in names:  # not by add_module(), which refuses "type"
            made._modules[name] = nn.Embedding(rows, 4, _weight=ROWS_OF[kind](rows))
        return made

    old = model()
    report = run(old, None, config)
    save(old, tmp_path / "model")
    loaded, reader = load(model(), tmp_path / "model"), Reader(tmp_path / "model")
    for table in report.tables:
        if table.compressed:
            expected = old._modules[table.name].dequantize()
            assert torch.equal(loaded._modules[table.name].dequantize(), expected)
            found = reader.rows(table.name, np.arange(table.rows))
            np.testing.assert_array_equal(found, expected.numpy())
            assert np.isfinite(table.weighted_error)
    again = run(model(), None, config, start_from=old)
    assert again.bytes_after == report.bytes_after


# --- whole models in what is around them ---------------------------------------------------------


def shared_model(dtype=None):
    """A compressed model of equal tables, of which several share codebooks, codes or maps."""
    model = small(rows=(400,) * 6, dim=8)
    config = CompressionConfig(ratio=12, epochs=0, codebook_dtype=dtype)
    counts = {f"{part}.f{i}": np.arange(400, 0, -1) for i in range(6) for part in PARTS}
    report = run(model, counts, config)
    assert any(t.shares_codebooks_with or t.shares_codes_with for t in report.tables)
    return model


PARTS = ("embeddings", "first_order")


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_functional_calls_of_a_whole_model_leave_it_alone(dtype):
    model = shared_model(dtype)
    ids, held = ids_for(model), dict(model.named_parameters())
    before = model(ids).detach()
    values = {name: parameter.detach() * 2 for name, parameter in held.items()}

    changed = torch.func.functional_call(model, values, (ids,))
    twin = copy.deepcopy(model)
    twin.load_state_dict(values, strict=False)
    assert torch.allclose(changed, twin(ids)) and not torch.allclose(changed, before)
    gradients = torch.func.grad(
        lambda values: torch.func.functional_call(model, values, (ids,)).sum()
    )(values)
    twin(ids).sum().backward()
    for name, parameter in twin.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(gradients[name], expected, atol=1e-5), name

    assert torch.equal(model(ids), before)
    after = dict(model.named_parameters())
    assert after.keys() == held.keys() and all(after[name] is held[name] for name in held)
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_codes_are_as_good_within_autocast():
    outside, inside = small(rows=(2000, 300)), small(rows=(2000, 300))
    first = run(outside, config=PLANNED)
    with torch.autocast("cpu", torch.bfloat16):
        second = run(inside, config=PLANNED)
    for one, other in zip(first.tables, second.tables, strict=True):
        assert one.weighted_error == pytest.approx(other.weighted_error, rel=1e-4)
    for name, value in outside.state_dict().items():
        assert torch.allclose(value.float(), inside.state_dict()[name].float(), atol=1e-5), name


@pytest.mark.parametrize("to", ["float", "half", "double", "bfloat16"])
def test_int8_models_of_another_dtype_are_saved_and_loaded(to, tmp_path):
    model = shared_model("int8")
    books = {id(m.codebook_set): m.codebook_set for m in model.modules() if hasattr(m, "layout")}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    getattr(model, to)()
    wanted = getattr(torch.ones(1), to)().dtype
    assert model.embeddings["f0"](torch.tensor([3])).dtype is wanted
    for store in books.values():
        assert store.scales is None or store.scales.dtype is torch.bfloat16
    save(model, tmp_path / "model.safetensors")
    again = load(getattr(small(rows=(400,) * 6), to)(), tmp_path / "model.safetensors")
    for name, tensor in again.state_dict().items():
        if "codebook_set" in name and tensor.dtype in (torch.int8, torch.bfloat16):
            assert torch.equal(tensor, model.state_dict()[name])
            assert tensor.dtype is not torch.int8 or torch.equal(tensor, before[name])


def test_tables_that_an_attribute_holds_too_stay():
    model = small()
    model.listed = [*model.embeddings.values()]
    report = run(model)
    stayed = {table.name: table.reason for table in report.tables}
    assert "the attribute 'listed' holds it too" in stayed["embeddings.f0"]
    assert isinstance(model.embeddings["f1"], nn.Embedding)
    assert isinstance(model.first_order["f0"], CompressedEmbedding)


class _Reader:
    """A plain object that looks up in a table."""

    def __init__(self, table):
        self.table = table


@pytest.mark.parametrize(
    "held",
    [
        lambda tables: {str(i): table for i, table in enumerate(tables)},
        lambda tables: [(i, table) for i, table in enumerate(tables)],
        lambda tables: {"all": {"vectors": tuple(tables)}},
        lambda tables: [table.weight for table in tables],
        lambda tables: [table.forward for table in tables],
        lambda tables: [partial(torch.add, table.weight) for table in tables],
        lambda tables: {_Reader(table) for table in tables},
    ],
    ids=["dict", "pairs", "nested", "weights", "methods", "partial", "objects"],
)
def test_tables_that_are_held_in_any_other_way_stay(held):
    model = small()
    model.mlp.held = held([*model.embeddings.values()])
    stayed = {t.name: t.reason for t in run(model).tables if t.reason}
    assert sorted(stayed) == ["embeddings.f0", "embeddings.f1"]
    assert "the attribute 'mlp.held' holds it" in stayed["embeddings.f1"]


def test_what_holds_no_table_is_no_matter():
    model = small()
    model.optimizer = torch.optim.Adam(model.parameters())
    model.itself, model.numbers = _Reader(model), list(range(200_000))
    model.loop = loop = []
    loop.append(loop)
    model.average = _Reader({name: param for name, param in model.named_parameters()})
    model.mlp.odd = [_Odd(), _Files(), weakref.proxy(_Reader(None))]
    assert not [table.name for table in run(model).tables if table.reason]


class _Odd:
    """Has no attributes, and fails when asked for any."""

    __slots__ = ()

    def __getattr__(self, name):
        raise RuntimeError(name)


class _Files(Mapping):
    """Reads a file for each value."""

    def __getitem__(self, name):
        raise OSError(name)

    def __iter__(self):
        return iter("ab")

    def __len__(self):
        return 2


def test_parts_that_share_much_are_searched_once(monkeypatch):
    model, shared = small(), [(number,) for number in range(2000)]
    for module in model.modules():
        module.log = shared
    asked = []
    held_by = tables._held_by
    monkeypatch.setattr(tables, "_held_by", lambda one: asked.append(one) or held_by(one))
    tables.find_tables(model, FAST)
    assert 2000 <= len(asked) < 2100


def test_patterns_that_name_no_table_are_told():
    config = dataclasses.replace(FAST, exclude=("embedings.*", "*.f1"))
    [note] = [note for note in plan(small(), None, config).notes if "include and exclude" in note]
    assert "name no table by embedings.*; there are embeddings.f0, " in note
    assert not any("name no table" in note for note in plan(small(), None, FAST).notes)


def test_tables_that_no_given_optimizer_trains_are_told():
    model = small()
    vectors = torch.optim.SGD(model.embeddings.parameters(), 0.1)
    rest = [p for n, p in model.named_parameters() if not n.startswith("embeddings")]
    others = torch.optim.Adam(rest)
    for one in (others, [others]):
        [note] = [n for n in plan(model, None, FAST, optimizer=one).notes if "optimizer" in n]
        assert "holds embeddings.f0, embeddings.f1" in note
    for one in (None, [others, vectors]):
        assert not [n for n in plan(model, None, FAST, optimizer=one).notes if "optimizer" in n]


def test_bfloat16_counts():
    stats = FrequencyStats.from_counts({"a": torch.ones(4, dtype=torch.bfloat16)})
    assert stats["a"].tolist() == [1.0] * 4
