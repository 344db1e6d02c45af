"""compress(start_from=): plans and most codes of an earlier version are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tier_model import Shop, counts, shop
from torch import Tensor, nn

from mec_embed import CompressionConfig, compress, extend, load, plan, save
from mec_embed.learning import fit
from mec_embed.packing import unpack
from mec_embed.tables import find_replacements


def _drifted(dense: nn.Module, amount: float, frequency: dict[str, np.ndarray]) -> Any:
    """The dense model a night later: popular rows have moved, others have not."""
    torch.manual_seed(1)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, values in frequency.items():
            weight = model.get_submodule(name).weight
            moved = torch.from_numpy(values > np.median(values))[:, None]
            weight += amount * moved * weight.std() * torch.randn(weight.shape)
    return model


def _coded(model: nn.Module) -> dict[str, Any]:
    """Tables, or tiers of them, that have codes."""
    return {
        f"{aliases[0].name} {number}": part
        for module, aliases in find_replacements(model)
        for number, part in enumerate(module._tables())
        if part.layout.bits
    }


def _codes(part: Any) -> Tensor:
    layout = part.layout
    return unpack(
        part.codes, layout.num_subvectors, layout.bits, torch.arange(layout.num_embeddings)
    )


def _changed(old: nn.Module, new: nn.Module, name: str) -> int:
    """Rows of a table with other codes."""
    pairs = [(a, _coded(new)[key]) for key, a in _coded(old).items() if key.split()[0] == name]
    return sum(int((_codes(a) != _codes(b)).any(1).sum()) for a, b in pairs)


def _warm(model: nn.Module, frequency: Any, old: nn.Module, **options: Any) -> Any:
    return compress(model, frequency, progress=False, start_from=old, **options)


@pytest.mark.parametrize(("dtype", "ratio"), [(None, 40), (None, 20), ("int8", 30)])
def test_the_plan_is_that_of_the_earlier_version(dtype: str | None, ratio: float) -> None:
    dense, old, before = shop(dtype, ratio)
    [*find_replacements(old)][0][0].oov_row = 7
    model, kept = _drifted(dense, 0.1, counts()), copy.deepcopy(old)
    planned = plan(model, counts(), start_from=old)
    assert planned.bytes_after == before.bytes_after and planned.seconds is None
    report = _warm(model, counts(), old)
    for one, other in zip(report.tables, before.tables, strict=True):
        assert (one.name, one.layout, one.bytes_after) == (
            other.name,
            other.layout,
            other.bytes_after,
        )
        assert one.shares_codes_with == other.shares_codes_with
        assert one.shares_codebooks_with == other.shares_codebooks_with
    assert repr(model) == repr(old)
    # What is served for unknown ids does not change overnight.
    assert [m.oov_row for m, _ in find_replacements(model)] == [
        m.oov_row for m, _ in find_replacements(old)
    ]
    maps = [m.state_dict() for m, _ in find_replacements(old)], find_replacements(model)
    for state, (module, _) in zip(*maps, strict=True):
        for key, value in module.state_dict().items():
            assert "tier_map" not in key or torch.equal(value, state[key])
    torch.testing.assert_close(old.state_dict(), kept.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [40, 20])
def test_the_report_counts_the_rows_that_changed(ratio: float) -> None:
    dense, old, _ = shop(None, ratio)
    model = _drifted(dense, 0.3, counts())
    report = _warm(model, counts(), old)
    told = {table.name: table.changed_rows for table in report.tables if table.changed_rows}
    assert told == {name: _changed(old, model, name) for name in told}
    assert {"shuffled", "first", "sorted", "tags"} <= told.keys()
    shared = [table.name for table in report.tables if table.shares_codes_with]
    total = sum(told[name] for name in told.keys() - {*shared})
    assert f"{total:,} rows" in str(report)


def _few_change(name: str) -> tuple[nn.Module, nn.Module, nn.Module, dict[str, np.ndarray]]:
    """A dense model, compressed with ``name`` codes, and after a night."""
    torch.manual_seed(0)
    mixing = torch.randn(16, 16) / torch.arange(1, 17)[:, None]
    rows = {str(number): torch.randn(4000, 16) @ mixing for number in range(2)}
    dense = nn.ModuleDict(
        {key: nn.Embedding(4000, 16, _weight=value) for key, value in rows.items()}
    )
    frequency = {key: 10_000 // np.arange(1, 4001) for key in rows}
    old = copy.deepcopy(dense)
    config = CompressionConfig(ratio=20, codes=name, tiers=False, epochs=1)
    compress(old, frequency, config, progress=False)
    return dense, old, _drifted(dense, 0.1, frequency), frequency


@pytest.mark.parametrize("kind", ["additive", "product"])
def test_few_rows_change_and_the_error_is_as_low(kind: str, monkeypatch: Any) -> None:
    dense, old, later, frequency = _few_change(kind)
    cold, warm, fresh = copy.deepcopy(later), copy.deepcopy(later), copy.deepcopy(later)
    config = CompressionConfig(ratio=20, codes=kind, tiers=False, epochs=1)
    errors = {"cold": compress(cold, frequency, config, progress=False)}
    errors["warm"] = _warm(warm, frequency, old)
    monkeypatch.setattr(fit, "KEEP_MARGIN", 0.0)
    errors["fresh"] = _warm(fresh, frequency, old)
    for number, name in enumerate(frequency):
        error = {how: report.tables[number].weighted_error for how, report in errors.items()}
        assert error["warm"] < 1.05 * error["cold"]
        assert error["warm"] < 1.05 * error["fresh"]
        changed = {how: _changed(old, m, name) for how, m in (("cold", cold), ("warm", warm))}
        assert changed["warm"] < 0.25 * changed["cold"]
        assert changed["warm"] < 0.5 * _changed(old, fresh, name)


def test_rows_that_stay_keep_their_codes() -> None:
    dense, old, _, frequency = _few_change("additive")
    model = copy.deepcopy(dense)
    report = _warm(model, frequency, old)
    assert sum(table.changed_rows for table in report.tables) < 0.01 * 8000


def test_rows_that_moved_far_get_other_codes() -> None:
    """Of rows whose codes do not fit any more, none keeps them."""
    dense, old, _, frequency = _few_change("additive")
    model = copy.deepcopy(dense)
    far = torch.arange(0, 4000, 100)
    with torch.no_grad():
        model["0"].weight[far] = -2 * model["0"].weight[far]
    _warm(model, frequency, old)
    assert (_codes(old["0"])[far] != _codes(model["0"])[far]).any(1).all()


def test_a_file_of_yesterday_is_enough(tmp_path: Path) -> None:
    dense, old, _ = shop(None, 20)
    save(old, tmp_path / "yesterday.safetensors")
    later = _drifted(dense, 0.2, counts())
    models = []
    for start in (old, load(Shop(), tmp_path / "yesterday.safetensors")):
        models.append(copy.deepcopy(later))
        _warm(models[-1], counts(), start)
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=0, atol=0)


def test_rows_that_came_since_are_appended_first() -> None:
    torch.manual_seed(0)
    dense = nn.ModuleDict({"item": nn.Embedding(1000, 8)})
    old = copy.deepcopy(dense)
    compress(old, None, CompressionConfig(ratio=8, epochs=0), progress=False)
    longer = nn.ModuleDict({"item": nn.Embedding(1010, 8)})
    with torch.no_grad():
        longer["item"].weight[:1000] = dense["item"].weight
    with pytest.raises(ValueError, match=r"'item' has the shape \(1010, 8\).*extend"):
        _warm(longer, None, old)
    extend(old["item"], longer["item"].weight[1000:])
    report = _warm(longer, None, old)
    assert longer["item"].num_embeddings == 1010 and report.tables[0].changed_rows < 20


def test_tiers_that_have_grown_and_were_cast() -> None:
    dense, old, _ = shop(None, 20)
    new = torch.randn(40, 16)
    extend(old.sorted, new[:20], popular=True)
    extend(old.sorted, new[20:])
    model = copy.deepcopy(dense)
    rows = torch.cat([dense.sorted.weight.detach(), new])
    model.sorted = nn.Embedding(1540, 16, _weight=rows)
    later = counts() | {"sorted": np.append(counts()["sorted"], np.ones(40, np.int64))}
    _warm(model, later, old.half())
    assert [part.num_embeddings for part in model.sorted.tiers] == [
        part.num_embeddings for part in old.sorted.tiers
    ]
    assert model.sorted.head.codebooks.dtype is torch.float16
    assert model.sorted(torch.tensor([1539])).dtype is torch.float32


@pytest.mark.parametrize(("dtype", "ratio"), [("int8", 3), ("float16", 1.9)])
def test_rows_kept_as_they_are_are_those_of_today(dtype: str, ratio: float) -> None:
    torch.manual_seed(0)
    dense = nn.ModuleDict({"a": nn.Embedding(500, 8), "b": nn.Embedding(300, 8)})
    old, model, cold = (copy.deepcopy(dense) for _ in range(3))
    config = CompressionConfig(ratio=ratio, codebook_dtype=dtype, epochs=0)
    assert compress(old, None, config, progress=False).tables[0].layout == f"rows {dtype}"
    for one in (model, cold):
        one["a"].weight.data[7] += 1
    report = _warm(model, None, old)
    assert report.tables[0].changed_rows is None
    compress(cold, None, config, progress=False)
    torch.testing.assert_close(model.state_dict(), cold.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("first", ["int8", None])
def test_codebooks_are_learned_in_the_dtype_that_stores_them(first: str | None) -> None:
    torch.manual_seed(0)
    dense = nn.ModuleDict({"a": nn.Embedding(2000, 16)})
    old, *models = (copy.deepcopy(dense) for _ in range(3))
    shape = {"num_subvectors": 4, "codebook_size": 64, "epochs": 0}
    compress(old, None, CompressionConfig(codebook_dtype=first, **shape), progress=False)
    for model, second in zip(models, ("int8", None), strict=True):
        _warm(model, None, old, config=CompressionConfig(codebook_dtype=second, epochs=0))
    states = [model.state_dict() for model in models]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_tables_left_alone_stay_so_and_targets_have_no_use() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(500, 8), "b": nn.Embedding(500, 8)})
    first = copy.deepcopy(model)
    config = CompressionConfig(max_bytes=20_000, exclude=["b"], epochs=0)
    compress(first, None, config, progress=False)
    report = _warm(model, None, first, config=CompressionConfig(ratio=1000, include=["b"]))
    assert [t.reason for t in report.tables] == [None, "is not compressed in start_from"]
    assert isinstance(model["b"], nn.Embedding)


def test_batches_and_optimizers_work_as_without() -> None:
    dense, old, _ = shop(None, 20)
    model = _drifted(dense, 0.1, counts())
    optimizer = torch.optim.Adam(model.parameters())
    batches = [torch.randint(1000, (64, 3)) for _ in range(4)]
    _warm(model, counts(), old, optimizer=optimizer, batches=batches)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def _without(name: str) -> Callable[[Any], None]:
    return lambda model: delattr(model, name)


def _of_other_shape(model: Any) -> None:
    model.sorted = nn.Embedding(1500, 8)


def _tied(model: Any) -> None:
    model.first.max_norm = 1.0


def _frozen(model: Any) -> None:
    model.tags.weight.requires_grad_(False)


def _not_finite(model: Any) -> None:
    model.tags.weight.data[7, 0] = torch.nan


BAD: dict[str, tuple[Callable[[Any], None], str]] = {
    "missing": (_without("sorted"), "table 'sorted' is compressed in start_from.*no such table"),
    "dim": (_of_other_shape, r"table 'sorted' has the shape \(1500, 8\), expected \(1500, 16\)"),
    "skipped": (_tied, "table 'first' is compressed in start_from.*max_norm"),
    "sharing": (_frozen, r"'sorted', 'tags'\] share their codebooks.*requires_grad"),
    "NaN": (_not_finite, "table 'tags': row 7 holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_nothing_changes(case: str) -> None:
    change, message = BAD[case]
    model, old, _ = shop(None, 20)
    change(model)
    modules, state = [*model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        _warm(model, None, old)
    assert modules == [*model.modules()]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)


def _two(shared: bool) -> nn.ModuleDict:
    first = nn.Embedding(500, 8)
    return nn.ModuleDict({"a": first, "b": first if shared else nn.Embedding(500, 8)})


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (True, "tables 'a' and 'b' are one table in start_from, but two here"),
        (False, "table 'b' is compressed in start_from, but cannot be here: it is one with 'a'"),
    ],
)
def test_tables_that_were_one_or_are_one_now(then: bool, message: str) -> None:
    old = _two(then)
    compress(old, None, CompressionConfig(num_subvectors=2, codebook_size=8), progress=False)
    with pytest.raises(ValueError, match=message):
        _warm(_two(not then), None, old)


@pytest.mark.parametrize(
    ("old", "error", "message"),
    [
        ("yesterday.safetensors", TypeError, "start_from must be a compressed model, got str"),
        (nn.ModuleDict({"a": nn.Embedding(9, 4)}), ValueError, "no compressed table"),
    ],
)
def test_what_is_no_compressed_model(old: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _warm(nn.ModuleDict({"a": nn.Embedding(9, 4)}), None, old)
