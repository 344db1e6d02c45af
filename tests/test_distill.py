"""Distillation: what moves, what must not, and the batches it takes."""

from __future__ import annotations

import copy
import math
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click_model import ClickModel
from tier_model import shop
from torch import Tensor, nn

from mec_embed import (
    CompressedEmbedding,
    CompressionConfig,
    TieredEmbedding,
    compress,
    distill,
)
from mec_embed.distill import count_ids, mixed, without_rare

DTYPES = [None, "float16", "bfloat16", "int8"]


class Clicks(ClickModel):
    """A click model with batch norm and dropout, that gives logits or probabilities."""

    def __init__(self, probabilities: bool = False, **options: Any) -> None:
        super().__init__(rows=(600, 300), dim=8, **options)
        self.mlp = nn.Sequential(
            nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.probabilities = probabilities

    def forward(self, ids: Any) -> Any:
        """Of ids (batch, 2) or a mapping of columns."""
        if isinstance(ids, dict):
            ids = torch.stack([ids["f0"], ids["f1"]], 1)
        logits = super().forward(ids)
        return logits.sigmoid()[:, None] if self.probabilities else logits


def _pair(dtype: str | None = None, **options: Any) -> tuple[Clicks, Clicks]:
    """Student and teacher."""
    torch.manual_seed(0)
    teacher = Clicks(**options)
    teacher.mlp[1].running_mean.normal_()
    teacher.eval()
    model = copy.deepcopy(teacher)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codebook_dtype=dtype, epochs=0)
    compress(model, None, config, progress=False)
    _shrink(model)
    return model, teacher


def _shrink(model: nn.Module) -> None:
    """Worse codebooks than the learned ones, so that there is something to mend."""
    for store in {table.codebook_set for table in _tables(model)}:
        values = store.codebooks.detach().float()
        if store.scales is not None:
            values = values * store.scales.float()[:, :, None]
        store.store(values * 0.2)


def _batches(count: int = 12, rows: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(n, (count * rows,), generator=generator) for n in (600, 300)]
    return list(torch.stack(columns, 1).split(rows))


def _distill(model: nn.Module, teacher: nn.Module, batches: Any = None, **options: Any) -> Any:
    batches = _batches() if batches is None else batches
    return distill(model, teacher, batches, **{"lr": 1e-2, "progress": False, **options})


def _divergence(model: nn.Module, teacher: nn.Module) -> float:
    """Mean KL of the predictions on ids that were not trained on."""
    ids = torch.stack([torch.arange(600), torch.arange(600) * 7 % 300], 1)
    with torch.no_grad():
        target, logits = teacher(ids), model(ids)
        return float(
            F.binary_cross_entropy_with_logits(logits, target.sigmoid())
            - F.binary_cross_entropy_with_logits(target, target.sigmoid())
        )


def _tables(model: nn.Module) -> list[CompressedEmbedding]:
    return [m for m in model.modules() if isinstance(m, CompressedEmbedding)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# --- what it does -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_falls_and_predictions_come_closer(dtype: str | None) -> None:
    model, teacher = _pair(dtype)
    before = _divergence(model, teacher)
    history = _distill(model, teacher, epochs=4)
    assert len(history) == 4 and history[-1] < history[0]
    assert _divergence(model, teacher) < 0.8 * before


def test_probabilities_are_recognised(caplog: pytest.LogCaptureFixture) -> None:
    model, teacher = _pair(probabilities=True)
    ids = _batches(1)[0]
    with torch.no_grad():
        first = float(F.binary_cross_entropy(model(ids), teacher(ids)))
    with caplog.at_level("INFO", "mec_embed"):
        history = _distill(model, teacher, [ids], epochs=30, mix=0)
    assert "outputs are probabilities" in caplog.text
    assert history[0] == pytest.approx(first, rel=1e-4) and history[-1] < first


def test_logits_are_recognised(caplog: pytest.LogCaptureFixture) -> None:
    model, teacher = _pair()
    ids = _batches(1)[0]
    with torch.no_grad():
        first = float(F.binary_cross_entropy_with_logits(model(ids), teacher(ids).sigmoid()))
    with caplog.at_level("INFO", "mec_embed"):
        history = _distill(model, teacher, [ids], epochs=1, mix=0)
    assert "outputs are logits" in caplog.text
    assert history == [pytest.approx(first, rel=1e-4)]


class _Mean(nn.Module):
    """The mean of what models return."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([model(ids) for model in self.models]).mean(0)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("of", [list, tuple, nn.ModuleList])
def test_the_mean_of_several_teachers_is_the_target(of: Any, probabilities: bool) -> None:
    model, teacher = _pair(probabilities=probabilities)
    other = Clicks(probabilities=probabilities)
    student, alone = copy.deepcopy(model), copy.deepcopy(model)
    options = {"labels": lambda ids: (ids[:, 0] % 2).float(), "temperature": 1.5, "epochs": 2}
    found = _distill(model, of([teacher, other]), **options)
    assert found == pytest.approx(_distill(student, _Mean(teacher, other), **options), rel=1e-6)
    for key, value in student.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key
    assert _distill(alone, of([teacher]), **options) != pytest.approx(found)
    assert not teacher.training and other.training
    assert all(p.grad is None for p in (*teacher.parameters(), *other.parameters()))


def test_a_list_of_modules_with_a_forward_is_one_teacher() -> None:
    class Own(nn.ModuleList):
        """Overrides eval(), which must be heard of."""

        heard = False

        def eval(self) -> Any:
            self.heard = True
            return super().eval()

        def forward(self, ids: Tensor) -> Tensor:
            return self[1](ids)

    model, teacher = _pair()
    student, own = copy.deepcopy(model), Own([Clicks(), teacher])
    assert _distill(model, own, epochs=1) == _distill(student, teacher, epochs=1)
    assert own.heard


def test_teachers_that_return_logits_and_probabilities_are_refused() -> None:
    model, teacher = _pair()
    before = _state(model)
    with pytest.raises(ValueError, match="teacher 1 returns probabilities and teacher 0 logits"):
        _distill(model, [teacher, Clicks(probabilities=True)], _batches(20), epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_probabilities_may_overshoot() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3000, 8)
            self.out = nn.Linear(8, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return 0.15 + 0.1 * self.out(self.table(ids)).tanh()[:, 0]

    torch.manual_seed(0)
    model = Linear()
    teacher = copy.deepcopy(model)
    compress(model, None, CompressionConfig(ratio=6, epochs=0), progress=False)
    model.out.bias.data += 1
    model.forward = lambda ids: Linear.forward(model, ids) - 0.2
    batches = [torch.randint(3000, (512,)) for _ in range(8)]
    assert (model(batches[0]) < 0).any()
    assert len(distill(model, teacher, batches, epochs=2, progress=False)) == 2


def test_a_model_that_returns_logits_beside_probabilities_is_refused() -> None:
    model, _ = _pair()
    with torch.no_grad():
        model.mlp[-1].bias.sub_(1)  # as of clicks, which are rare
    before = _state(model)
    with pytest.raises(ValueError, match="teacher returns probabilities and the model logits"):
        _distill(model, Clicks(probabilities=True), _batches(20), epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_teacher_of_another_number_of_predictions_is_refused() -> None:
    class One(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.zeros(1)

    model, teacher = _pair()
    with pytest.raises(RuntimeError, match="equal size"):
        _distill(model, [teacher, One()])


@pytest.mark.parametrize(
    ("of", "error", "message"),
    [
        (lambda model, teacher: [], ValueError, "empty list, expected at least one"),
        (lambda model, teacher: [teacher, teacher.forward], TypeError, "got method; pass the copy"),
        (lambda model, teacher: teacher.forward, TypeError, "nn.Module.*got method"),
        (lambda model, teacher: [teacher, model], ValueError, "parameters that are trained"),
    ],
)
def test_teachers_are_checked(of: Any, error: type[Exception], message: str) -> None:
    model, teacher = _pair()
    before = _state(model)
    with pytest.raises(error, match=message):
        _distill(model, of(model, teacher))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", ["trained", "fresh", "fixed"])
def test_only_codebooks_and_network_move(dtype: str | None, network: str) -> None:
    model, teacher = _pair(dtype)
    before, of_teacher = _state(model), _state(teacher)
    _distill(model, teacher, epochs=2, network=network)
    assert all(torch.equal(value, of_teacher[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert after[key].dtype is value.dtype, key
        if key.endswith("codebooks") and dtype == "int8":
            # Of a single column, only the scale can move.
            scales = key.replace("codebooks", "scales")
            assert moved or not torch.equal(before[scales], after[scales]), key
        elif key.endswith("codebooks"):
            assert moved, key
        elif key.endswith(("codes", "running_mean", "running_var", "num_batches_tracked")):
            assert not moved, key
        elif key.startswith("mlp") and key != "mlp.0.bias":
            assert moved is (network != "fixed"), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks_keep_dtype_kind_and_identity(dtype: str | None) -> None:
    model, teacher = _pair(dtype)
    before = [(t.codebook_set, t.codebooks, t.codebook_set.scales) for t in _tables(model)]
    parameters = [name for name, _ in model.named_parameters()]
    _distill(model, teacher, epochs=1)
    for store, codebooks, scales in before:
        assert store.codebooks is codebooks and store.scales is scales
        assert isinstance(codebooks, nn.Parameter) is (dtype != "int8")
        if dtype == "int8":
            assert codebooks.dtype is torch.int8 and not codebooks.requires_grad
            assert 64 <= int(codebooks.abs().max()) <= 127
        else:
            assert codebooks.requires_grad
    assert [name for name, _ in model.named_parameters()] == parameters


def test_frozen_tables_stay_as_they_are() -> None:
    torch.manual_seed(0)
    teacher = Clicks().eval()
    teacher.embeddings["f0"].requires_grad_(False)
    for dtype in (None, "int8"):
        model = copy.deepcopy(teacher)
        config = CompressionConfig(
            num_subvectors=2, codebook_size=8, codebook_dtype=dtype, epochs=0, exclude=("first*",)
        )
        compress(model, None, config, progress=False)
        before = _state(model)
        _distill(model, teacher, epochs=1)
        moved = {key for key, value in model.state_dict().items() if (value != before[key]).any()}
        assert "embeddings.f0.codebook_set.codebooks" not in moved
        assert "embeddings.f1.codebook_set.codebooks" in moved


def test_frozen_parts_of_the_network_stay() -> None:
    model, teacher = _pair()
    model.mlp[0].requires_grad_(False)
    before = model.mlp[0].weight.clone()
    _distill(model, teacher, epochs=1)
    assert torch.equal(before, model.mlp[0].weight)


def test_shared_codebooks_are_trained_once() -> None:
    torch.manual_seed(0)
    teacher = Clicks().eval()
    model = copy.deepcopy(teacher)
    compress(model, None, CompressionConfig(ratio=5, epochs=0), progress=False)
    sets = {id(table.codebook_set) for table in _tables(model)}
    assert len(sets) < len(_tables(model)), "nothing is shared in this plan"
    _shrink(model)
    before = _divergence(model, teacher)
    _distill(model, teacher, epochs=3)
    assert _divergence(model, teacher) < before
    assert {id(table.codebook_set) for table in _tables(model)} == sets


def test_tables_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    teacher = Clicks().eval()
    for table in teacher.embeddings.values():
        table.sparse = True
    model = copy.deepcopy(teacher)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    compress(model, None, config, progress=False)
    _shrink(model)
    before = _divergence(model, teacher)
    _distill(model, teacher, epochs=3)
    assert _divergence(model, teacher) < before


def test_sparse_tables_in_tiers_get_their_setting_back() -> None:
    teacher, model, _ = shop(ratio=20)
    sparse = [module for module in model.modules() if isinstance(module, TieredEmbedding)]
    sparse += [model.small]
    for table in (part for one in sparse for part in getattr(one, "tiers", [one])):
        table.sparse = True
    distill(model, teacher, [torch.randint(4000, (64, 3))] * 2, epochs=1, progress=False)
    assert sparse[:-1] and all(table.sparse for table in sparse)


def test_a_table_that_was_thawed_since_is_trained_as_a_table() -> None:
    model, teacher = _pair()
    frozen = copy.deepcopy(teacher)
    frozen.embeddings.requires_grad_(False)
    config = CompressionConfig(
        num_subvectors=2, codebook_size=8, codebook_dtype="float16", epochs=0
    )
    compress(frozen, None, config, progress=False)
    frozen.embeddings.requires_grad_(True)
    before = _tables(frozen)[0].codebooks.clone()
    _distill(frozen, teacher, epochs=1)
    after = _tables(frozen)[0].codebooks
    assert after.dtype is torch.float16 and after.isfinite().all() and not after.equal(before)


def test_what_gives_sparse_gradients_by_its_class_gives_dense_ones_for_a_while() -> None:
    class Sparse(nn.Module):
        sparse = True

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3000, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.rows, sparse=self.sparse)

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(3000, 8), "b": Sparse()})
    teacher = copy.deepcopy(model)
    compress(model, None, CompressionConfig(ratio=6, epochs=0), progress=False)

    def forward(one: Any, ids: Tensor) -> Tensor:
        return (one["a"](ids) * one["b"](ids)).sum(-1)

    batches = [torch.randint(3000, (64,))] * 2
    distill(model, teacher, batches, epochs=1, forward=forward, progress=False)
    assert model["b"].sparse


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_state_stays(dtype: str | None) -> None:
    """What pairs buffers by their order, as an average of models does, goes on."""
    model, teacher = _pair(dtype)
    before = list(model.state_dict())
    _distill(model, teacher, epochs=1)
    assert list(model.state_dict()) == before


# --- modes and errors ---------------------------------------------------------------------------


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_both_models_run_in_eval_mode_and_get_their_modes_back() -> None:
    model, teacher = _pair()
    model.train()
    model.mlp[3].eval()
    teacher.mlp.train()
    before, seen = (_modes(model), _modes(teacher)), []

    def forward(some: nn.Module, batch: Tensor) -> Tensor:
        seen.append(any(_modes(some)))
        return some(batch)

    _distill(model, teacher, epochs=1, forward=forward)
    assert seen == [False] * 24
    assert (_modes(model), _modes(teacher)) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_restores_modes_and_codebooks(
    dtype: str | None, error: type[BaseException]
) -> None:
    model, teacher = _pair(dtype)
    model.train()
    teacher.train()
    before = [(t.codebook_set, t.codebooks, t.codebook_set.scales) for t in _tables(model)]
    codes = [t.codes.clone() for t in _tables(model)]
    state = _state(model)

    def batches() -> Iterator[Tensor]:
        yield from _batches(3)
        raise error

    with pytest.raises(error):
        _distill(model, teacher, batches(), epochs=1)
    assert all(_modes(model)) and all(_modes(teacher))
    for store, codebooks, scales in before:
        assert store.codebooks is codebooks and store.scales is scales
    assert all(torch.equal(a, t.codes) for a, t in zip(codes, _tables(model), strict=True))
    assert bool(model.eval()(_batches(1)[0]).isfinite().all())
    for name, value in model.state_dict().items():
        # Rounding of what was not trained changes nothing, or the last bit of a scale.
        assert torch.allclose(value.float(), state[name].float(), rtol=1e-2, atol=1e-6), name


def test_a_model_without_compressed_tables() -> None:
    teacher = Clicks()
    with pytest.raises(ValueError, match=r"no compressed table; call compress\(\)"):
        _distill(copy.deepcopy(teacher), teacher)


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batches(batches: Any) -> None:
    model, teacher = _pair("int8")
    before = _state(model)
    with pytest.raises(ValueError, match="batches is empty"):
        _distill(model, teacher, batches, epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_iterator_that_is_used_up_after_one_epoch() -> None:
    model, teacher = _pair()
    assert len(_distill(model, teacher, iter(_batches(2)), epochs=1)) == 1
    before = _state(model)
    with pytest.raises(ValueError, match="can be gone through once, expected 2 times"):
        _distill(model, teacher, iter(_batches(2)), epochs=2)
    with pytest.raises(ValueError, match="expected 2 times"):
        _distill(
            model, teacher, iter(_batches(2)), epochs=1, labels=lambda ids: torch.zeros(len(ids))
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_batches_that_are_empty_in_the_second_epoch() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = iter(_batches(2))

        def __iter__(self) -> Iterator[Tensor]:
            return self.batches

    model, teacher = _pair()
    before = _state(model)
    with pytest.raises(ValueError, match="empty in this epoch"):
        _distill(model, teacher, Once(), epochs=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("output", [None, 3.0, {"other": torch.zeros(3)}, (torch.zeros(3),)])
def test_an_output_that_is_no_tensor(output: Any) -> None:
    model, teacher = _pair("float16")
    model.train()
    with pytest.raises(TypeError, match=f"{type(output).__name__}.*forward="):
        _distill(model, teacher, forward=lambda some, batch: output)
    assert model.training and _tables(model)[0].codebooks.dtype is torch.float16


def test_no_epochs_leave_everything_as_it_was() -> None:
    model, teacher = _pair("int8")
    before = _state(model)
    assert _distill(model, teacher, epochs=0, network="fresh") == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- batches ------------------------------------------------------------------------------------


def _as_mapping(ids: Tensor) -> dict[str, Tensor]:
    return {"f0": ids[:, 0], "f1": ids[:, 1]}


Labelled = namedtuple("Labelled", ["ids", "labels"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ids: ids,
        lambda ids: (ids, torch.zeros(len(ids))),
        lambda ids: [ids, torch.zeros(len(ids))],
        lambda ids: (ids,),
        lambda ids: Labelled(ids, torch.zeros(len(ids))),
        _as_mapping,
        lambda ids: (_as_mapping(ids), torch.zeros(len(ids))),
        lambda ids: {**_as_mapping(ids), "session": "abc"},
        lambda ids: {**_as_mapping(ids), "temperature": torch.tensor(1.0)},
    ],
    ids=[
        "tensor",
        "tuple",
        "list",
        "one",
        "named tuple",
        "mapping",
        "tuple of mapping",
        "with a string",
        "with a scalar",
    ],
)
def test_kinds_of_batches(wrap: Any) -> None:
    model, teacher = _pair()
    before = _divergence(model, teacher)
    _distill(model, teacher, [wrap(ids) for ids in _batches()], epochs=2)
    assert _divergence(model, teacher) < before


def test_batches_are_not_changed() -> None:
    model, teacher = _pair()
    ids = _batches()
    mappings = [_as_mapping(i.clone()) for i in ids]
    before = [i.clone() for i in ids]
    _distill(model, teacher, ids, epochs=1, mix=1.0)
    _distill(model, teacher, mappings, epochs=1, mix=1.0)
    assert all(torch.equal(a, b) for a, b in zip(ids, before, strict=True))
    assert all(torch.equal(a[:, 1], b["f1"]) for a, b in zip(before, mappings, strict=True))


def test_forward_reads_batches_of_any_kind_and_a_data_loader() -> None:
    model, teacher = _pair()
    before = _divergence(model, teacher)
    data = [{"row": {"ids": row}} for row in torch.cat(_batches())]
    loader = torch.utils.data.DataLoader(data, batch_size=100)
    _distill(
        model, teacher, loader, epochs=2, forward=lambda some, batch: some(batch["row"]["ids"])
    )
    assert _divergence(model, teacher) < before


def test_a_mapping_with_y_pred_is_read() -> None:
    model, teacher = _pair()
    history = _distill(model, teacher, epochs=1, mix=0)
    again, _ = _pair()
    found = _distill(
        again, teacher, epochs=1, mix=0, forward=lambda some, ids: {"y_pred": some(ids)[:, None]}
    )
    assert found == history


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_one_seed_one_result(mix: float) -> None:
    results = []
    for seed in (1, 1, 2):
        model, teacher = _pair()
        state = torch.get_rng_state()
        results.append((_distill(model, teacher, epochs=2, mix=mix, seed=seed), _state(model)))
        assert torch.equal(state, torch.get_rng_state())
    first, again, other = results
    assert first[0] == again[0]
    assert all(torch.equal(value, again[1][key]) for key, value in first[1].items())
    assert (first[0] == other[0]) is (mix == 0)


def test_the_rate_falls_to_zero() -> None:
    model, teacher = _pair()
    last = []

    def forward(some: nn.Module, batch: Tensor) -> Tensor:
        if some is model:
            last.append(model.mlp[0].weight.detach().clone())
        return some(batch)

    _distill(model, teacher, _batches(40), epochs=1, forward=forward, mix=0)
    steps = [float((a - b).abs().mean()) for a, b in zip(last[1:], last[:-1], strict=True)]
    assert sum(steps[-5:]) < 0.1 * sum(steps[:5])


# --- mixing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [2, 9, 30])
@pytest.mark.parametrize("part", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_mixing_permutes_within_columns(columns: int, part: float, kind: str) -> None:
    ids = torch.arange(200 * columns).view(200, columns)
    batch: Any = ids if kind == "tensor" else {f"c{i}": ids[:, i] for i in range(columns)}
    found = mixed(batch, part, torch.Generator().manual_seed(0))
    if kind == "mapping":
        assert list(found) == list(batch)
        found = torch.stack(list(found.values()), 1)
    assert torch.equal(found.sort(0).values, ids)
    touched = (found != ids).any(0)
    assert int(touched.sum()) == max(1, columns // 10)
    rows = int(200 * part)
    assert torch.equal(found[rows:], ids[rows:])
    assert float((found[:rows] != ids[:rows])[:, touched].float().mean()) > 0.9


def test_mixing_reaches_every_column() -> None:
    ids, generator = torch.arange(600).view(100, 6), torch.Generator().manual_seed(0)
    touched = sum((mixed(ids, 0.5, generator) != ids).any(0).int() for _ in range(60))
    assert int(touched.min()) > 0 and int(touched.sum()) == 60


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        (torch.arange(20).view(10, 2), 0.0),
        (torch.arange(10)[:, None], 1.0),
        (torch.arange(10), 1.0),
        (torch.rand(10, 3), 1.0),
        ({"a": torch.arange(10)}, 1.0),
        ({"a": "x"}, 1.0),
        ("text", 1.0),
        (torch.zeros(0, 4, dtype=torch.int64), 1.0),
    ],
)
def test_batches_without_two_columns_stay_as_they_are(batch: Any, part: float) -> None:
    found = mixed(batch, part, torch.Generator().manual_seed(0))
    assert type(found) is type(batch)
    if isinstance(batch, Tensor):
        assert torch.equal(found, batch)
    else:
        assert found == batch


def test_mixing_of_sequences_keeps_each_sequence_whole() -> None:
    batch = {"user": torch.arange(50), "history": torch.arange(150).view(50, 3)}
    for seed in range(6):
        found = mixed(batch, 1.0, torch.Generator().manual_seed(seed))["history"]
        assert torch.equal(found[:, 0].sort().values, batch["history"][:, 0])
        assert torch.equal(found[:, 2] - found[:, 0], torch.full((50,), 2))


def test_mixing_touches_only_the_inputs_of_a_tuple() -> None:
    ids, labels = torch.arange(200).view(100, 2), torch.arange(100)
    found = mixed((ids, labels), 1.0, torch.Generator().manual_seed(0))
    assert type(found) is tuple and found[1] is labels
    assert not torch.equal(found[0], ids) and torch.equal(found[0].sort(0).values, ids)


# --- the best state -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("best", [0, 2, 3])
def test_the_state_of_the_best_score_is_kept(dtype: str | None, best: int) -> None:
    model, teacher = _pair(dtype)
    before = _state(model)
    seen: list[dict[str, Tensor]] = []

    def score(one: nn.Module) -> float:
        assert one is model and not one.training and not torch.is_grad_enabled()
        seen.append(_state(one))
        one.train()  # the modes of the training are not for a score to change
        return 1.0 if len(seen) == best + 1 else 0.0 - len(seen)

    _distill(model, teacher, epochs=3, score=score)
    assert len(seen) == 4
    network = [key for key in before if key.startswith("mlp")]
    assert all(torch.equal(model.state_dict()[key], seen[best][key]) for key in network)
    if best == 0:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    else:
        assert not torch.equal(model.state_dict()["mlp.0.weight"], before["mlp.0.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_is_of_what_is_kept(dtype: str | None) -> None:
    model, teacher = _pair(dtype)
    model.eval()
    ids, scores, steps = _batches(1)[0], [], []

    def score(one: nn.Module) -> float:
        scores.append(float(one(ids).sum()))
        return float(len(scores))

    def labels(batch: Tensor) -> Tensor:
        steps.append(model.state_dict()["embeddings.f0.codebook_set.codebooks"].clone())
        return torch.zeros(len(batch))

    _distill(model, teacher, epochs=2, score=score, labels=labels)
    with torch.no_grad():
        assert float(model(ids).sum()) == pytest.approx(scores[-1], rel=1e-6)
    # The training goes on with what was not rounded.
    assert dtype is None or not torch.equal(steps[12], steps[12].bfloat16().float())


def test_a_score_of_nan_is_refused_and_nothing_changes() -> None:
    model, teacher = _pair()
    before = _state(model)
    with pytest.raises(ValueError, match="score returned NaN"):
        _distill(model, teacher, score=lambda one: float("nan"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("found", [None, "high", torch.zeros(2)])
def test_a_score_that_is_no_number_is_refused(found: Any) -> None:
    with pytest.raises(TypeError, match="score returned .*, expected a number that is larger"):
        _distill(*_pair(), score=lambda one: found)


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_target_is_the_teacher_and_a_part_of_the_labels(
    probabilities: bool, weight: float
) -> None:
    model, teacher = _pair(probabilities=probabilities)
    ids, labels = _batches(1)[0], torch.rand(128, 1)
    with torch.no_grad():
        target, output = teacher(ids).reshape(-1), model(ids).reshape(-1)
    if not probabilities:
        target, output = target.sigmoid(), output.sigmoid()
    target = (1 - weight) * target + weight * labels[:, 0]
    options = {"labels": lambda batch: batch[1], "label_weight": weight, "epochs": 1, "mix": 0}
    options["rare"] = 0
    [loss] = _distill(model, teacher, [(ids, labels)], **options)
    assert loss == pytest.approx(float(F.binary_cross_entropy(output, target)), rel=1e-4)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_temperature_divides_the_logits_of_the_teacher(probabilities: bool, weight: float) -> None:
    model, teacher = _pair(probabilities=probabilities)
    ids, labels = _batches(1)[0], torch.rand(128, 1)
    with torch.no_grad():
        target, output = teacher(ids).reshape(-1), model(ids).reshape(-1)
    logits = target.logit() if probabilities else target
    output = output if probabilities else output.sigmoid()
    target = (1 - weight) * (logits / 2.5).sigmoid() + weight * labels[:, 0]
    options = {"labels": lambda batch: batch[1], "label_weight": weight, "epochs": 1, "mix": 0}
    options["rare"] = 0
    [loss] = _distill(model, teacher, [(ids, labels)], temperature=2.5, **options)
    assert loss == pytest.approx(float(F.binary_cross_entropy(output, target)), rel=1e-4)


def test_a_student_of_a_softened_teacher_is_less_sure() -> None:
    batches, spread = _batches(20), []
    for temperature in (1.0, 3.0):
        model, teacher = _pair()
        _distill(model, teacher, batches, temperature=temperature, epochs=4)
        with torch.no_grad():
            spread.append(float(model(batches[0]).std()))
    assert 0.2 * spread[0] < spread[1] < 0.6 * spread[0]


def test_rows_that_were_mixed_keep_the_teacher_alone() -> None:
    model, teacher = _pair()
    ids = _batches(1)[0]
    options = {"label_weight": 1.0, "epochs": 1, "mix": 0.5, "rare": 0}
    losses = []
    for changed in (slice(0, 64), slice(64, 128)):
        labels = torch.zeros(128)
        labels[changed] = 1.0
        student = copy.deepcopy(model)
        losses += _distill(student, teacher, [ids], labels=lambda batch, y=labels: y, **options)
    zeros = _distill(
        copy.deepcopy(model), teacher, [ids], labels=lambda batch: torch.zeros(128), **options
    )
    assert losses[0] == zeros[0] and losses[1] != zeros[0]


@pytest.mark.parametrize(
    "wrap",
    [lambda ids: {"row": {"ids": ids}}, lambda ids: ids.float(), lambda ids: {"ids": ids.float()}],
    ids=["nested", "floats", "one entry"],
)
def test_batches_that_are_not_mixed_have_labels_for_all_rows(wrap: Any) -> None:
    def read(some: nn.Module, batch: Any) -> Tensor:
        while isinstance(batch, dict):
            [batch] = batch.values()
        return some(batch.long())

    model, teacher = _pair()
    ids, labels = _batches(1)[0], torch.rand(128)
    options = {"forward": read, "labels": lambda batch: labels, "label_weight": 1.0, "epochs": 1}
    with torch.no_grad():
        expected = float(F.binary_cross_entropy_with_logits(model(ids), labels))
    assert _distill(model, teacher, [wrap(ids)], **options) == [pytest.approx(expected, rel=1e-4)]


def test_a_matrix_of_ids_in_a_mapping_is_shuffled_by_its_columns() -> None:
    ids = torch.stack([torch.arange(8), torch.arange(100, 108), torch.arange(200, 208)], 1)
    batch = {"sparse": ids, "dense": torch.arange(8.0), "label": torch.zeros(8)}
    counts = count_ids([batch, batch])
    assert sorted(map(len, counts.values())) == [8, 128, 256]
    for changed in (
        without_rare(batch, counts, 5, 0.0, torch.Generator().manual_seed(0)),
        mixed(batch, 1.0, torch.Generator().manual_seed(3)),
    ):
        assert changed.keys() == batch.keys()
        assert changed["sparse"].shape == ids.shape and torch.equal(batch["sparse"], ids)
        assert torch.equal(changed["sparse"].sort(dim=0).values, ids)
    assert not torch.equal(
        without_rare(batch, counts, 5, 0.0, torch.Generator().manual_seed(0))["sparse"], ids
    )
    # Beside others with ids it is a sequence, of one kind.
    history = {"history": ids, "item": torch.arange(8)}
    assert sorted(map(len, count_ids([history]).values())) == [8, 256]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_ids_of_a_matrix_stay_in_their_field_beside_labels(dtype: torch.dtype) -> None:
    model, teacher = _pair()
    ids = _batches(1)[0]
    batch = {"ids": ids, "clicked": (ids[:, 0] % 2).to(dtype)}
    seen: list[Tensor] = []
    teacher.embeddings["f1"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def labels(one: Any) -> Tensor:
        return one["clicked"]

    _distill(
        model, teacher, [batch], forward=lambda some, one: some(one["ids"]), labels=labels, epochs=1
    )
    [found] = seen
    assert torch.equal(found.sort().values, ids[:, 1].sort().values)  # of field 1, as it was
    assert not torch.equal(found, ids[:, 1])
    # Labels that are whole numbers are no ids, so that the matrix has one column a field.
    assert len(count_ids([batch], labels)) == 2


@pytest.mark.parametrize("beside", ["mask", "length"])
def test_ids_stay_in_their_column_whatever_is_beside(beside: str) -> None:
    ids = torch.stack([torch.arange(8), torch.arange(100, 108)], 1)
    others = {"mask": torch.ones_like(ids), "length": torch.arange(8)}
    batch = {"ids": ids, beside: others[beside]}
    found = without_rare(batch, count_ids([batch]), 5, 0.0, torch.Generator().manual_seed(0))["ids"]
    assert torch.equal(found.sort(0).values, ids) and not torch.equal(found, ids)


class _Batch(dict):
    """Entries as attributes."""

    __getattr__ = dict.__getitem__


def test_mappings_keep_their_class() -> None:
    batch = _Batch(a=torch.arange(8), b=torch.arange(8))
    for changed in (
        mixed(batch, 1.0, torch.Generator().manual_seed(0)),
        without_rare(batch, count_ids([batch]), 5, 0.0, torch.Generator().manual_seed(0)),
    ):
        assert isinstance(changed, _Batch) and changed.keys() == batch.keys()
    keyed: Any = defaultdict(list, batch)
    assert mixed(keyed, 1.0, torch.Generator().manual_seed(0)).keys() == batch.keys()
    # Those that are made from something else become plain mappings.
    by_hand = _ByHand(torch.arange(8), torch.arange(8))
    assert type(mixed(by_hand, 1.0, torch.Generator().manual_seed(0))) is dict


class _ByHand(dict):
    """Is made from columns."""

    def __init__(self, a: Any, b: Any = None) -> None:
        super().__init__(a=a, b=b)


def test_labels_are_told_by_a_batch_in_which_they_differ() -> None:
    ids = torch.stack([torch.arange(8), torch.arange(8)], 1)
    none = {"ids": ids, "new": torch.zeros(8).long(), "clicked": torch.zeros(8).long()}
    some = none | {"clicked": torch.tensor([0, 1] * 4)}
    found = count_ids([none, some], lambda batch: batch["clicked"])
    # The first batch has all entries, as none is known to be the labels; then these are left out.
    assert {"ids", "new", "clicked"} <= found.keys() and found["clicked"].sum() == 8
    assert found["new"].sum() == 16


def test_a_loader_without_a_length() -> None:
    class Log(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.cat(_batches(2)))

    model, teacher = _pair()
    again = copy.deepcopy(model)
    losses = _distill(model, teacher, torch.utils.data.DataLoader(Log(), batch_size=128), epochs=2)
    assert losses[1] < losses[0]
    assert len(_distill(again, teacher, _batches(2), epochs=2)) == 2


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_tables_that_were_frozen_since_stay(dtype: str | None) -> None:
    model, teacher = _pair(dtype)
    model.embeddings.requires_grad_(False)
    frozen = [table.codebooks.clone() for table in model.embeddings.values()]
    trained = [table.codebooks.clone() for table in model.first_order.values()]
    _distill(model, teacher, epochs=1)
    for table, before in zip(model.embeddings.values(), frozen, strict=True):
        assert torch.equal(table.codebooks, before) and not table.codebooks.requires_grad
    for table, before in zip(model.first_order.values(), trained, strict=True):
        assert not torch.equal(table.codebooks, before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        _distill(model, teacher)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_teacher_that_would_be_trained_is_refused(dtype: str | None) -> None:
    model, teacher = _pair(dtype)
    before = _state(model)
    for wrong in (model, nn.Sequential(model.mlp)):
        with pytest.raises(ValueError, match="the teacher holds .* parameters that are trained"):
            _distill(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    teacher.mlp = model.mlp
    _distill(model, teacher, network="fixed", epochs=1)


@pytest.mark.parametrize("score", [None, lambda one: 0.0])
def test_a_loss_that_is_not_finite_puts_the_model_back(score: Any) -> None:
    model, teacher = _pair()
    before = _state(model)
    batches = _batches(3)
    bad = batches[2]

    def read(some: nn.Module, ids: Tensor) -> Tensor:
        return some(ids) * (math.nan if ids is bad and some is teacher else 1.0)

    with pytest.raises(ValueError, match="the loss of batch 2 of epoch 1 is nan"):
        _distill(model, teacher, batches, forward=read, mix=0.0, score=score)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_logits_that_look_like_probabilities_at_first() -> None:
    model, teacher = _pair()
    batches = _batches(4)
    first = batches[0]

    def read(some: nn.Module, ids: Tensor) -> Tensor:
        return some(ids).abs().clamp(max=1.0) if ids is first else some(ids) * 5

    assert len(_distill(model, teacher, batches, forward=read, mix=0.0, epochs=1)) == 1


def test_no_gradients_are_left_and_none_are_needed() -> None:
    model, teacher = _pair()
    with torch.no_grad():
        _distill(model, teacher, epochs=1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_of_rows_that_are_not_those_of_the_columns() -> None:
    model, teacher = _pair()
    before = _state(model)
    values = torch.randint(300, (256,))
    batch = {"values": values, "weights": torch.rand(256), "offsets": torch.arange(0, 256, 2)}
    options = {
        "forward": lambda some, batch: some(batch["values"].view(128, 2)),
        "labels": lambda batch: torch.zeros(128),
        "epochs": 1,
    }
    with pytest.raises(ValueError, match=r"mix shuffles have 256 rows for 128 .* pass mix=0"):
        _distill(model, teacher, [batch], **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(_distill(model, teacher, [batch], mix=0, **options)) == 1


Named = namedtuple("Named", "ids labels")
WRAPS: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda ids: ids, lambda batch: batch),
    "tuple": (lambda ids: (ids, ids[:, 0]), lambda batch: batch[0]),
    "named": (lambda ids: Named([ids], 1), lambda batch: batch.ids[0]),
    "mapping": (
        lambda ids: {**dict(enumerate(ids.unbind(1))), "price": ids[:, 0].float()},
        lambda batch: torch.stack([batch[column] for column in range(3)], 1),
    ),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_rare_ids_are_shuffled_where_labels_count(kind: str) -> None:
    wrap, ids_of = WRAPS[kind]
    ids = torch.stack([torch.arange(400) % 20, torch.arange(400), torch.arange(400) % 400 // 2], 1)
    ids[::2, 2] = 500
    batches = [wrap(part) for part in ids.split(100)]
    counts = count_ids(batches)
    for column in range(3):
        expected = torch.bincount(ids[:, column])
        assert torch.equal(counts[column][: len(expected)].long(), expected)
    assert set(counts) == {0, 1, 2}
    found = without_rare(batches[1], counts, 3, 0.3, torch.Generator().manual_seed(0))
    assert type(found) is type(batches[1])
    before, after = ids[100:200], ids_of(found)
    # All of the first column are popular, none of the second, half of the third.
    assert torch.equal(before[:30], after[:30]) and torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[::2, 2], after[::2, 2])
    for column in (1, 2):
        assert not torch.equal(before[:, column], after[:, column])
        assert torch.equal(before[:, column].sort().values, after[:, column].sort().values)
    again = without_rare(batches[1], counts, 3, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(ids_of(again), after)
    kept = without_rare(batches[1], counts, 1, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(ids_of(kept), before)


def test_ids_of_histories_are_counted_and_shuffled_one_by_one() -> None:
    histories = torch.tensor([[1, 0, 0], [2, 3, 0], [1, 4, 0], [1, 5, 6]])
    batch = {"history": histories, "user": torch.tensor([1, 1, 2, 1])}
    counts = count_ids([batch])
    assert counts["history"].tolist() == [4, 3, 1, 1, 1, 1, 1, 0]
    found = without_rare(batch, counts, 2, 0.0, torch.Generator().manual_seed(1))
    popular = histories < 2
    assert torch.equal(found["history"][popular], histories[popular])
    assert sorted(found["history"][~popular].tolist()) == [2, 3, 4, 5, 6]
    assert found["history"].tolist() != histories.tolist()
    assert torch.equal(found["user"], batch["user"])


def test_of_many_ids_some_are_counted_together() -> None:
    batch = torch.tensor([[1, 2], [1 + (1 << 22), 2], [1 << 40, -3]])
    counts = count_ids([batch])
    assert counts[0][:2].tolist() == [1, 2] and counts[1][2] == 2
    found = without_rare(batch, counts, 2, 0.0, torch.Generator())
    assert torch.equal(found, batch)


def test_labels_of_several_tasks() -> None:
    model, teacher = _pair()
    ids = _batches(1, 5)[0]
    options = {
        "forward": lambda some, ids: some(ids)[:, None].expand(-1, 2),
        "label_weight": 1.0,
        "epochs": 1,
        "rare": 0,
    }
    losses = []
    for changed in (slice(0, 0), slice(0, 4), slice(4, 5), slice(6, 10)):
        labels = torch.zeros(5, 2)
        labels.view(-1)[changed] = 1.0
        student = copy.deepcopy(model)
        losses += _distill(student, teacher, [ids], labels=lambda batch, y=labels: y, **options)
    assert losses[1] == losses[0] and losses[0] not in losses[2:]


def test_labels_teach_what_the_teacher_does_not_know() -> None:
    model, teacher = _pair()
    batches = [(ids, (ids[:, 0] % 2).long()) for ids in _batches()]
    held = batches[-1]

    def loss_of(one: nn.Module) -> float:
        with torch.no_grad():
            return float(F.binary_cross_entropy_with_logits(one(held[0]), held[1].float()))

    other = copy.deepcopy(model)
    _distill(model, teacher, batches, epochs=8)
    options = {"labels": lambda batch: batch[1], "label_weight": 0.8, "rare": 0}
    _distill(other, teacher, batches, epochs=8, **options)
    assert loss_of(other) < loss_of(model) - 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": lambda batch: batch[:, 0], "rare": -1}, ValueError, "rare must be 0 or more"),
        (
            {"labels": lambda batch: None},
            TypeError,
            "labels returned a NoneType, expected a tensor",
        ),
        (
            {"labels": lambda batch: torch.zeros(3)},
            ValueError,
            r"\(3,\), expected one for each of 128",
        ),
        (
            {"labels": lambda batch: torch.full((128,), 5)},
            ValueError,
            "between 5 and 5, expected 0",
        ),
        ({"labels": lambda batch: torch.full((128,), math.nan)}, ValueError, "expected 0 to 1"),
        ({"labels": torch.zeros(128)}, TypeError, "labels must be a function .* got Tensor"),
        ({"labels": len, "mix": 1}, ValueError, "mix=1 leaves no row"),
        ({"label_weight": 1.5}, ValueError, "label_weight must be 0 to 1, got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0 and finite, got nan"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, got -1"),
        ({"mix": -1}, ValueError, "mix must be 0 to 1, got -1"),
        ({"network": "new"}, ValueError, "network must be one of trained, fresh, fixed, got 'new'"),
    ],
)
@pytest.mark.parametrize("network", ["trained", "fresh"])
def test_bad_options_and_labels_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str, network: str
) -> None:
    model, teacher = _pair("int8")
    before = _state(model)
    with pytest.raises(error, match=message):
        _distill(model, teacher, **{"network": network, **options})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- a fresh network ----------------------------------------------------------------------------


def test_a_fresh_network_forgets_what_it_was() -> None:
    model, teacher = _pair()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.mlp.parameters():
            param.add_(7)
    state = torch.get_rng_state()
    for one in (model, other):
        _distill(one, teacher, network="fresh", epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    third = copy.deepcopy(other)
    _distill(third, teacher, network="fresh", epochs=1, seed=1)
    assert not torch.equal(third.mlp[0].weight, other.mlp[0].weight)


def test_a_fresh_network_learns_the_teacher() -> None:
    model, teacher = _pair()
    with torch.no_grad():
        for param in model.mlp.parameters():
            param.add_(1)
    _distill(model, teacher, network="fresh", epochs=1)
    first = _divergence(model, teacher)
    _distill(model, teacher, network="fresh", epochs=12)
    assert _divergence(model, teacher) < 0.85 * first


def test_what_is_drawn_anew_and_what_is_not() -> None:
    model, teacher = _pair()
    model.dense = nn.Embedding(5, 4)  # a table that was left as it is
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    before = _state(model)
    _distill(model, teacher, network="fresh", epochs=1, lr=0.0)
    after = model.state_dict()
    drawn = {key for key, value in before.items() if not torch.equal(value, after[key])}
    # The weight and bias of the batch norm are at their initial values already.
    assert drawn == {"mlp.0.weight", "mlp.0.bias", "mlp.4.weight", "mlp.4.bias"}


@pytest.mark.parametrize("score", [None, lambda one: 1.0])
def test_an_error_brings_the_network_back(score: Any) -> None:
    model, teacher = _pair("int8")
    before, calls = _state(model), iter(range(100))

    def labels(batch: Tensor) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return torch.zeros(len(batch))

    with pytest.raises(KeyboardInterrupt):
        _distill(model, teacher, network="fresh", labels=labels, score=score)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fresh_network_that_is_no_better_is_not_kept() -> None:
    model, teacher = _pair("int8")
    before, scores = _state(model), iter([1.0, 0.0, 0.5])
    _distill(model, teacher, network="fresh", epochs=2, score=lambda one: next(scores))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Reaching(Clicks):
    """Its ``reset_parameters()`` reaches into submodules and makes new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Embedding(5, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.bias = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.ones(3))
        self.raises: BaseException | None = None

    def forward(self, ids: Any) -> Any:
        """With a bias."""
        return super().forward(ids) + self.bias

    def reset_parameters(self) -> None:
        """All of them."""
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.frozen.weight)
        self.mlp[1].reset_parameters()
        self.bias, self.seen = nn.Parameter(torch.zeros(1)), torch.zeros(3)
        if self.raises is not None:
            raise self.raises


def _reaching() -> tuple[Reaching, Reaching]:
    torch.manual_seed(0)
    teacher = Reaching().eval()
    teacher.mlp[1].running_mean.normal_()
    model = copy.deepcopy(teacher)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    compress(model, None, config, progress=False)
    return model, teacher


def test_a_module_that_draws_its_submodules_too() -> None:
    model, teacher = _reaching()
    before, bias = _state(model), model.bias
    _distill(model, teacher, network="fresh", epochs=1, lr=0.0)
    after = model.state_dict()
    drawn = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert drawn == {"bias", "mlp.0.weight", "mlp.0.bias", "mlp.4.weight", "mlp.4.bias"}
    assert model.bias is bias and float(bias.detach()) == 0
    _distill(model, teacher, network="fresh", epochs=1)
    assert float(bias.detach()) != 0, "it is not trained"


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyboardInterrupt()])
def test_a_module_that_cannot_be_drawn(error: BaseException) -> None:
    model, teacher = _reaching()
    model.raises = error
    before = _state(model)
    expected = ValueError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as found:
        _distill(model, teacher, network="fresh")
    if expected is ValueError:
        assert "module '' (Reaching) anew: its reset_parameters() raises Zero" in str(found.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_fresh_network_seeds_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = _pair()
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    _distill(model, teacher, network="fresh", epochs=1)
    assert not seeds


@pytest.mark.parametrize("network", ["trained", "fixed"])
def test_nothing_to_train(network: str) -> None:
    model, teacher = _pair()
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    compress(frozen, None, CompressionConfig(ratio=5, epochs=0), progress=False)
    with pytest.raises(ValueError, match=f"nothing to train: .* network='{network}'"):
        _distill(frozen, teacher, network=network)
