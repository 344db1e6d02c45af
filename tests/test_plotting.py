"""The picture of a report."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mec_embed import CompressionConfig, CompressionReport, TableReport, compress, plan
from mec_embed.report import CompressionReport as Report

pytest.importorskip("matplotlib")


def _model(tables: int = 2) -> nn.Module:
    torch.manual_seed(0)
    rows = [2000, 900, *range(100, 100 + tables)][:tables]
    return nn.ModuleDict({f"field_{i}": nn.Embedding(n, 8) for i, n in enumerate(rows)})


def _texts(axis: object) -> list[str]:
    return [text.get_text() for text in axis.texts]  # type: ignore[attr-defined]


@pytest.fixture
def planned() -> Report:
    return plan(_model(), None, CompressionConfig(ratio=10))


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_plan_is_drawn_and_written(planned: Report, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"ratio.{ending}"
    errors, sizes = planned.plot(file).axes
    assert file.stat().st_size > 10_000
    curve, here = errors.lines
    ratio, error = here.get_xydata()[0]
    assert (ratio, error) == (planned.ratio, planned.predicted_error)
    # The report lies on its own curve.
    x, y = np.log(curve.get_xydata()).T
    assert np.interp(np.log(ratio), x[::-1], y[::-1]) == pytest.approx(np.log(error), abs=0.2)
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["field_0", "field_1"]
    widths = [bar.get_width() for bar in sizes.patches]
    assert widths == [t.bytes_before for t in planned.tables] + [
        t.bytes_after for t in planned.tables
    ]
    assert "error" not in " ".join(_texts(sizes))


def test_without_a_path_nothing_is_written(
    planned: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(planned.plot().axes) == 2
    assert not list(tmp_path.iterdir())


def test_measured_errors_are_noted() -> None:
    report = compress(_model(), None, CompressionConfig(ratio=10, epochs=0), progress=False)
    notes = _texts(report.plot().axes[1])
    for table, note in zip(report.tables, notes, strict=True):
        assert note.endswith(f"x, error {table.weighted_error:.2g}")


def test_small_tables_are_added_up() -> None:
    report = plan(_model(40), None, CompressionConfig(ratio=4, exclude=("field_1",)))
    sizes = report.plot().axes[1]
    labels = [label.get_text() for label in sizes.get_yticklabels()]
    assert len(labels) == 16 and labels[-1] == "25 smaller tables"
    total = sum(bar.get_width() for bar in sizes.patches)
    assert total == report.bytes_before + report.bytes_after
    assert _texts(sizes)[1] == "as it was"


def test_reports_of_every_kind_are_drawn() -> None:
    """Shared codes, long names, explicit shapes, and what was made by hand."""
    model = nn.ModuleDict({"x" * 60: nn.Embedding(2000, 8), "first": nn.Embedding(2000, 1)})
    for config in (
        CompressionConfig(ratio=10),
        CompressionConfig(num_subvectors=2, codebook_size=8),
    ):
        report = plan(model, None, config)
        assert report.predicted_error > 0
        assert report.plot().axes[1].get_yticklabels()[0].get_text() == "..." + "x" * 21
    table = TableReport("a", (), 10, 2, "float32", "as it was", 0, 80, 0, 0, 80, reason="small")
    CompressionReport((table,), CompressionConfig()).plot()


def test_without_matplotlib_the_error_says_what_to_install(
    planned: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mec-embed\[plot\]'"):
        planned.plot()


def test_an_unknown_ending_is_an_error(planned: Report, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="svg"):
        planned.plot(tmp_path / "ratio.abc")
