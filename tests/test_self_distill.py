"""Self-distillation before compressing: which rows move, how, and what stays."""

from __future__ import annotations

import copy
import math
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from click_model import ClickModel
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from examples.ctr.data import counts
from examples.ctr.generator import generate
from examples.ctr.models import DeepFM
from examples.ctr.training import evaluate, iterate_batches, train
from mec_embed import CompressionConfig, FrequencyStats, compress, self_distill

ROWS = (600, 60)
RARE = 8


def _model(seed: int = 0) -> ClickModel:
    torch.manual_seed(seed)
    return ClickModel(rows=ROWS, dim=8)


def _batches(count: int = 6, rows: int = 128) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    # Squares of even draws: small ids are popular, most are rare.
    drawn = torch.rand(count * rows, 2, generator=generator).square()
    ids = (drawn * torch.tensor(ROWS)).long()
    labels = torch.randint(2, (count * rows,), generator=generator).float()
    return list(zip(ids.split(rows), labels.split(rows), strict=True))


def _run(model: nn.Module, batches: Any = None, stats: Any = None, **options: Any) -> list[float]:
    batches = _batches() if batches is None else batches
    stats = FrequencyStats.from_batches(model, _batches()) if stats is None else stats
    options = {"labels": lambda batch: batch[1], "rare": RARE, "progress": False} | options
    return self_distill(model, stats, batches, **options)


def _counts(field: int) -> Tensor:
    return torch.cat([ids for ids, _ in _batches()])[:, field].bincount(minlength=ROWS[field])


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_one_step_is_that_of_adam_on_the_rows_of_the_batch(l2):
    model, batch = _model(), _batches(1)[0]
    expected, teacher = copy.deepcopy(model), copy.deepcopy(model)
    _run(model, [batch], epochs=1, lr=1e-2, rare=0, l2=l2)

    ids, labels = batch
    target = teacher(ids).sigmoid().detach().lerp(labels, 0.5)
    F.binary_cross_entropy_with_logits(expected(ids), target).backward()
    # Adam's first step is the learning rate, here at the start of its rise, times the sign.
    rate, eps = 1e-2 * 1e-3 / 0.05, 1e-8 / math.sqrt(1 - 0.999)
    for part in ("embeddings", "first_order"):
        for column, table in enumerate(getattr(expected, part).values()):
            gradient = table.weight.grad.clone()
            seen = torch.zeros(len(gradient), 1).index_fill_(0, ids[:, column], 1.0)
            gradient += l2 * seen * table.weight.detach()
            wanted = table.weight.detach() - rate * gradient / (gradient.abs() + eps)
            found = list(getattr(model, part).values())[column].weight
            assert torch.allclose(found, wanted, rtol=0, atol=1e-7)
            assert not torch.equal(found, table.weight)


def test_rare_rows_stay_and_popular_ones_move():
    model = _model()
    before = copy.deepcopy(model)
    history = _run(model, epochs=2)
    assert len(history) == 2
    for part in ("embeddings", "first_order"):
        for field in range(2):
            popular = _counts(field) >= RARE
            moved = (
                getattr(model, part)[f"f{field}"].weight
                != getattr(before, part)[f"f{field}"].weight
            )
            assert 0 < popular.sum() < len(popular)
            assert moved[popular].any(dim=1).all() and not moved[~popular].any()
    assert not torch.equal(model.mlp[0].weight, before.mlp[0].weight)


def test_rare_ids_tell_the_network_nothing():
    """Their rows hold their labels; the network must not learn to read them."""
    torch.manual_seed(0)
    model = ClickModel(rows=(2000, 4), dim=8)
    ids = torch.stack([torch.arange(2000), torch.randint(4, (2000,))], 1)
    labels = torch.randint(2, (2000,)).float()
    with torch.no_grad():
        model.embeddings["f0"].weight[:, 0] = labels * 2 - 1
    batches = list(zip(ids.split(100), labels.split(100), strict=True))
    stats = FrequencyStats.from_batches(model, batches)

    def auc_of_heart(rare: int) -> float:
        tuned = copy.deepcopy(model)
        self_distill(
            tuned, stats, batches, labels=lambda batch: batch[1], rare=rare, l2=0.0, lr=1e-2,
            progress=False,
        )  # fmt: skip
        with torch.no_grad():
            logits = tuned(ids)
        return float((logits[labels == 1][:, None] > logits[labels == 0]).float().mean())

    with torch.no_grad():
        logits = model(ids)
    before = float((logits[labels == 1][:, None] > logits[labels == 0]).float().mean())
    assert auc_of_heart(0) > before + 0.1
    assert abs(auc_of_heart(10) - before) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    model = _model()
    for table in [*model.embeddings.values(), *model.first_order.values()]:
        table.to(dtype)

    def forward(one: nn.Module, batch: Any) -> Tensor:
        columns = batch[0].unbind(1)
        vectors = [t(c).float() for t, c in zip(one.embeddings.values(), columns, strict=True)]
        return one.mlp(torch.cat(vectors, 1))

    before = copy.deepcopy(model)
    stats = FrequencyStats.from_batches(model, _batches(), forward=forward)
    _run(model, stats=stats, forward=forward, lr=1e-2)
    for name, table in model.embeddings.items():
        assert table.weight.dtype is dtype
        popular = _counts(int(name[1])) >= RARE
        moved = (table.weight != before.embeddings[name].weight).any(dim=1)
        assert moved[popular].all() and not moved[~popular].any()


class Bags(nn.Module):
    """Bags in one mode, next to a frozen and a shared table."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(ROWS[0], 8, mode=mode, padding_idx=3, sparse=mode == "sum")
        self.frozen = nn.Embedding(ROWS[0], 8).requires_grad_(False)
        self.one = nn.Embedding(ROWS[0], 8, padding_idx=2)
        self.other = self.one
        self.head = nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, 3)."""
        rows = self.one(ids[:, 0]) + self.other(ids[:, 1])
        return self.head(torch.cat([self.bag(ids), self.frozen(ids[:, 0]), rows], 1))[:, 0]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_frozen_shared_and_padding_rows(mode):
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(600, 3, generator=generator).square() * ROWS[0]).long()
    labels = torch.randint(2, (600,), generator=generator).float()
    batches = list(zip(ids.split(100), labels.split(100), strict=True))
    model = Bags(mode).train()
    before = copy.deepcopy(model)
    _run(model, batches, FrequencyStats.from_batches(model, batches), epochs=1)
    assert torch.equal(model.frozen.weight, before.frozen.weight)
    for name, padding in (("bag", 3), ("one", 2)):
        table, old = getattr(model, name), getattr(before, name)
        assert not torch.equal(table.weight, old.weight)
        assert torch.equal(table.weight[padding], old.weight[padding])
        assert table.sparse == old.sparse
    assert model.one is model.other and model.training and model.bag.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_state_by_score_is_kept():
    model, states = _model(), []

    def score(one: nn.Module) -> float:
        states.append(copy.deepcopy(one.state_dict()))
        return [0.0, 2.0, 1.0, 1.5][len(states) - 1]

    _run(model, epochs=3, score=score)
    assert len(states) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(states[1]["embeddings.f0.weight"], states[3]["embeddings.f0.weight"])


def test_no_epochs_change_nothing_and_seeds_repeat():
    model = _model()
    before = copy.deepcopy(model.state_dict())
    assert _run(model, epochs=0) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first, second = _model(), _model()
    with torch.inference_mode():
        history = _run(second, seed=3)
    assert _run(first, seed=3) == history
    assert torch.equal(first.embeddings["f0"].weight, second.embeddings["f0"].weight)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": None}, TypeError, "labels must be a function.* and no teacher either"),
        ({"teacher": []}, ValueError, "empty list"),
        ({"teacher": [lambda batch: batch]}, TypeError, "a teacher must be a model"),
        ({"labels": 3}, TypeError, "labels must be a function"),
        ({"labels": lambda batch: batch[1][:5]}, ValueError, r"labels returned \(5,\)"),
        ({"labels": lambda batch: batch[1] + 1}, ValueError, "expected 0 to 1"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": 3}, TypeError, "batches must be"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, got -1"),
        ({"rare": -1}, ValueError, "rare must be 0 or more, got -1"),
        ({"lr": 0.0}, ValueError, "lr must be above 0"),
        ({"l2": -1.0}, ValueError, "l2 must be 0 or more"),
        ({"l2": float("nan")}, ValueError, "l2 must be 0 or more"),
        ({"label_weight": 2.0}, ValueError, "label_weight must be 0 to 1"),
        ({"stats": {"embeddings.f0": torch.ones(600)}}, ValueError, "no counts of embeddings.f1"),
        ({"stats": {"embeddings.f0": torch.ones(5)}}, ValueError, "5 for 600 rows"),
        ({"score": lambda one: float("nan")}, ValueError, "score returned NaN"),
    ],
)
def test_bad_input_is_refused_before_anything_moves(options, error, words):
    model = _model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        _run(model, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.embeddings["f0"].sparse


def test_teachers_take_the_place_of_labels():
    model, second = _model(), _model(seed=1)
    ids, _ = _batches(1)[0]
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(ids)
        target = (logits + copy.deepcopy(second).eval()(ids)).div(2).sigmoid()
        first = F.binary_cross_entropy_with_logits(logits, target)
    before = copy.deepcopy(second.state_dict())
    rare = model.embeddings["f0"].weight[_counts(0) < RARE].clone()
    history = _run(model, [(ids, None)], labels=None, teacher=[model, second], epochs=40, lr=1e-2)
    assert history[0] == pytest.approx(float(first), rel=1e-5) and history[-1] < history[0] - 0.01
    assert second.training and model.training
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())
    # Without labels no row can learn one by heart.
    assert not torch.equal(model.embeddings["f0"].weight[_counts(0) < RARE], rare)


def test_a_teacher_goes_with_labels():
    model, second = _model(), _model(seed=1)
    ids, labels = _batches(1)[0]
    with torch.no_grad():
        target = copy.deepcopy(second).eval()(ids).sigmoid().lerp(labels, 0.25)
        first = F.binary_cross_entropy_with_logits(copy.deepcopy(model).eval()(ids), target)
    options = {"teacher": second, "label_weight": 0.25, "rare": 0, "epochs": 1}
    assert _run(model, [(ids, labels)], **options) == [pytest.approx(float(first), rel=1e-5)]


def test_teachers_that_would_be_trained_are_refused():
    model, second = _model(), _model(seed=1)
    second.embeddings["f0"].weight = model.embeddings["f0"].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="parameters that are trained, 'embeddings.f0.weight'"):
        _run(model, teacher=second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and second.training


def test_models_without_dense_tables_are_refused():
    model = _model()
    stats = FrequencyStats.from_batches(model, _batches())
    compress(model, stats, CompressionConfig(num_subvectors=2, codebook_size=8), progress=False)
    with pytest.raises(ValueError, match="compressed already; call self_distill"):
        _run(model, stats=stats)
    with pytest.raises(ValueError, match="no table to compress"):
        _run(nn.Linear(2, 1), stats={})


def test_an_over_fitted_model_becomes_better_on_new_examples():
    data = generate(examples=40_000, fields=6, max_rows=5_000, seed=0)
    torch.manual_seed(0)
    model = DeepFM(list(data.fields), data.rows, dim=8, hidden=(16,))
    train(model, data, lr=5e-3, epochs=2, batch_size=512, l2=0.0, progress=False)
    before = evaluate(model, data, "valid")
    found = counts(data)
    stats = {
        f"{part}.{field}": found[field]
        for part in ("embeddings", "first_order")
        for field in getattr(model, part)
    }
    batches = list(iterate_batches(data, "train", 512, True, 0))
    self_distill(model, stats, batches, labels=lambda batch: batch[1], progress=False)
    after = evaluate(model, data, "valid")
    assert after.auc > before.auc + 0.001 and after.logloss < before.logloss - 0.001


def test_tables_that_compress_leaves_alone_stay():
    class Table(nn.Embedding):
        """Of the user's own."""

    model = _model()
    model.embeddings["f0"] = own = Table(ROWS[0], 8)
    before = copy.deepcopy(model)
    _run(model, l2=0.1)
    assert torch.equal(own.weight, before.embeddings["f0"].weight)
    assert not torch.equal(model.embeddings["f1"].weight, before.embeddings["f1"].weight)
    assert not torch.equal(model.mlp[0].weight, before.mlp[0].weight)


def sharded_on_ranks() -> str:
    model, stats = _model(), FrequencyStats.from_batches(_model(), _batches())
    table = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    mesh = init_device_mesh("cpu", (2,))
    table.weight = nn.Parameter(distribute_tensor(table.weight.detach(), mesh, [Shard(0)]))
    try:
        _run(model, stats=stats)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.slow
def test_sharded_tables_are_refused_without_asking_for_a_group(tmp_path):
    for message in processes.run(sharded_on_ranks, 2, tmp_path):
        assert "is sharded between ranks; self_distill() trains" in message
