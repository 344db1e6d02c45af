"""Click logs of many ids, and training that moves the rows of a batch only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.quality import big_generator
from benchmarks.quality.big_generator import (
    GENERATOR_SETTINGS,
    TOTAL_IDS,
    generate_ids,
    generate_named,
    train_sparse,
)
from benchmarks.quality.common import tables
from benchmarks.quality.models import MODELS, build
from examples.ctr.data import counts
from examples.ctr.generator import generate
from examples.ctr.settings import Settings
from examples.ctr.training import evaluate, train_with

SETTINGS = Settings(hidden=(8,), l2=1e-4, dim=4, lr=1e-2, batch_size=256, epochs=1)


@pytest.fixture(scope="module")
def data():
    return generate_ids(20_000, examples=6000)


def _state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("total", [104, 1000, 20_000, 1_000_000])
def test_rows_add_up_to_what_was_asked_and_are_log_spaced(total):
    made = generate_ids(total, examples=100)
    assert len(made.fields) == 26
    assert abs(sum(made.rows) - total) < 26
    assert made.rows[0] == 4
    steps = np.diff(np.log(made.rows))
    assert np.allclose(steps, steps.mean(), atol=0.25)  # small row counts are rounded


def test_too_few_ids_are_refused():
    with pytest.raises(ValueError, match="104 ids at least, not 103"):
        generate_ids(103)


def test_examples_follow_the_ids_up_to_a_limit(monkeypatch):
    asked = []
    monkeypatch.setattr(
        big_generator,
        "generate",
        lambda **given: (asked.append(given["examples"]), generate(examples=500, fields=2))[1],
    )
    generate_ids(1000)
    generate_ids(5_000_000)
    assert asked == [2000, 3_000_000]


def test_names_are_those_of_the_settings(monkeypatch):
    assert TOTAL_IDS.keys() == GENERATOR_SETTINGS.keys()
    monkeypatch.setitem(TOTAL_IDS, "generator_1m", 300)
    made = generate_named("generator_1m")
    assert made.name == "generator_1m"
    assert made.best_auc > 0.7
    assert torch.equal(made.ids["test"], generate_ids(300).ids["test"])


@pytest.mark.parametrize("name", MODELS)
def test_training_beats_chance_and_leaves_rows_without_examples_alone(data, name):
    model = build(name, data, SETTINGS, 0)
    before = _state(model)
    chance = evaluate(model, data, "valid").auc
    (metrics,) = train_sparse(model, data, SETTINGS)
    assert not model.training
    assert metrics == evaluate(model, data, "valid")
    assert metrics.auc > max(chance, 0.5) + 0.05
    occurrences = counts(data)
    for part, field, table in tables(model):
        prefix = "embeddings" if part is model.embeddings else "first_order"
        moved = (table.weight.detach() != before[f"{prefix}.{field}.weight"]).any(dim=1)
        assert np.array_equal(moved.numpy(), occurrences[field] > 0)
    assert not moved.all()  # the largest field has rows without examples


def test_tables_are_like_those_of_any_other_model_afterwards(data):
    model = build("DeepFM", data, SETTINGS, 0)
    names = list(model.state_dict())
    weights = [table.weight for _, _, table in tables(model)]
    train_sparse(model, data, SETTINGS)
    assert list(model.state_dict()) == names
    for (_, _, table), weight in zip(tables(model), weights, strict=True):
        assert table.sparse is False
        assert table.weight is weight
        assert weight.requires_grad and weight.grad is None
    F.binary_cross_entropy_with_logits(model(data.ids["valid"]), data.labels["valid"]).backward()
    assert not any(weight.grad.is_sparse for weight in weights)


def test_the_sparse_flag_is_set_back_after_an_error(data, monkeypatch):
    model = build("DeepFM", data, SETTINGS, 0)
    monkeypatch.setattr(big_generator, "_penalised", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_sparse(model, data, SETTINGS)
    assert not any(table.sparse for _, _, table in tables(model))


def test_where_all_rows_are_looked_up_it_is_dense_training():
    data = generate(examples=3000, fields=3, min_rows=4, max_rows=8, exponent=0.5)
    settings = dataclasses.replace(SETTINGS, l2=1e-2, batch_size=1000)
    dense, sparse = (build("DeepFM", data, settings, 0) for _ in range(2))
    train_with(settings, dense, data)
    train_sparse(sparse, data, settings)
    assert all(occurrences.min() > 0 for occurrences in counts(data).values())
    for key, value in dense.state_dict().items():
        # SparseAdam's epsilon weighs more in the first steps; without the penalty: 3e-2.
        torch.testing.assert_close(sparse.state_dict()[key], value, rtol=0, atol=5e-4)


def test_a_penalty_shrinks_the_rows_that_are_looked_up(data):
    free, shrunk = (build("DeepFM", data, SETTINGS, 0) for _ in range(2))
    train_sparse(free, data, SETTINGS)
    train_sparse(shrunk, data, dataclasses.replace(SETTINGS, l2=0.1))
    norms = [model.embeddings["field_00"].weight.norm().item() for model in (free, shrunk)]
    assert norms[1] < 0.5 * norms[0]


def test_the_best_epoch_by_validation_is_kept(data):
    settings = dataclasses.replace(
        SETTINGS, lr=0.05, l2=0.0, dropout=0.1, batch_norm=True, epochs=6, patience=6
    )
    model = build("DeepFM", data, settings, 0)
    history = [metrics.auc for metrics in train_sparse(model, data, settings)]
    best = int(np.argmax(history))
    assert len(history) == 6
    assert best < 5  # it over-fits, so a state that is not the last has to come back
    assert evaluate(model, data, "valid").auc == history[best]
    shorter = build("DeepFM", data, settings, 0)
    train_sparse(shorter, data, dataclasses.replace(settings, epochs=best + 1))
    assert _same(shorter.state_dict(), model.state_dict())


def test_patience_ends_training_and_the_rate_decays(data, monkeypatch):
    scores = iter([0.6, 0.7, 0.65, 0.66, 0.9])
    monkeypatch.setattr(
        big_generator,
        "evaluate",
        lambda *given: dataclasses.replace(evaluate(*given), auc=next(scores)),
    )
    rates = []
    real = big_generator._train_epoch

    def spy(model, data, settings, heads, optimizers, seed):
        rates.append([group["lr"] for one in optimizers for group in one.param_groups])
        real(model, data, settings, heads, optimizers, seed)

    monkeypatch.setattr(big_generator, "_train_epoch", spy)
    settings = dataclasses.replace(SETTINGS, epochs=9, patience=2, lr_decay=0.1)
    history = train_sparse(build("DeepFM", data, settings, 0), data, settings)
    assert [metrics.auc for metrics in history] == [0.6, 0.7, 0.65, 0.66]
    assert np.allclose(rates, [[1e-2] * 2] * 3 + [[1e-3] * 2])


def test_the_same_seed_gives_the_same_model_and_another_another(data):
    settings = dataclasses.replace(SETTINGS, dropout=0.5)
    models = [build("DeepFM", data, settings, 0) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(1)  # what happened before does not matter
        train_sparse(model, data, settings, seed)
    states = [model.state_dict() for model in models]
    assert _same(states[0], states[1])
    assert not _same(states[0], states[2])


def test_optimizers_hold_state_for_trained_rows_only(data, monkeypatch):
    made = []
    real = big_generator._optimizers
    monkeypatch.setattr(
        big_generator, "_optimizers", lambda *given: made.append(real(*given)) or made[-1]
    )
    model = build("DeepFM", data, SETTINGS, 0)
    train_sparse(model, data, SETTINGS)
    rows = [len(state["exp_avg"]) for state in made[0][0].state.values()]
    trained = [int((occurrences > 0).sum()) for occurrences in counts(data).values()]
    assert rows == 2 * trained
    assert sum(trained) < 0.5 * sum(data.rows)
