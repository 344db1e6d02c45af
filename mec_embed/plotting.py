"""The picture of a report: what other ratios would cost, and where the bytes are.

Needs matplotlib, which nothing else in the package does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import CompressionReport, TableReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Tables that get a bar of their own, those of most bytes.
_BARS = 15
#: Errors below this are drawn as if they were none: nothing can be seen of them in a prediction.
_LEAST_ERROR = 1e-6
_BEFORE, _AFTER, _CURVE = "#b9c4d0", "#2f5d8a", "#c0392b"


def plot(report: CompressionReport, path: str | Path | None = None) -> Figure:
    """Draw a report, see :meth:`mec_embed.CompressionReport.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plot() needs matplotlib: pip install 'mec-embed[plot]'") from error
    # Not by pyplot, which would keep the figure, and choose a window system.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_errors(left, report)
    _draw_bytes(right, report.tables)
    if path is not None:
        figure.savefig(path)
    return figure


def _draw_errors(axis: Any, report: CompressionReport) -> None:
    """Predicted error against the ratio, and where this report is."""
    points = [
        (report.bytes_before / nbytes, error)
        for nbytes, error in report.predicted
        if error > _LEAST_ERROR
    ]
    axis.set(title="all tables", xlabel="ratio (bytes before / bytes after)")
    axis.set_ylabel("predicted error / variance of the rows")
    if points:
        axis.plot(*zip(*points, strict=True), color=_CURVE, marker=".")
        axis.set(xscale="log", yscale="log")
    if report.predicted_error is not None:
        label = f"{report.ratio:.3g}x: {report.bytes_after:,} bytes"
        label += f", error {report.predicted_error:.2g}"
        here = max(report.predicted_error, _LEAST_ERROR)
        axis.plot([report.ratio], [here], color=_AFTER, marker="o", markersize=8, label=label)
        axis.legend(loc="upper left")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.grid(alpha=0.3)


def _draw_bytes(axis: Any, tables: Sequence[TableReport]) -> None:
    """Bytes of each table before and after, the largest above, with its ratio and error."""
    bars = _bars(tables)
    names, before, after, notes = zip(*bars, strict=True)
    places = range(len(bars))
    axis.barh(places, before, color=_BEFORE, label="before")
    axis.barh(places, after, height=0.5, color=_AFTER, label="after")
    for place, most, note in zip(places, before, notes, strict=True):
        axis.annotate(note, (most, place), (3, 0), textcoords="offset points", va="center", size=7)
    axis.set(title="bytes of each table", xscale="log", xlabel="bytes")
    axis.set_yticks(places, names, size=8)
    axis.invert_yaxis()
    # Room for the notes, to the right of the longest bar.
    least = min((size for size in (*before, *after) if size), default=1)
    axis.set_xlim(least / 2, 20 * max(1, *before))
    axis.legend(loc="lower right")


def _bars(tables: Sequence[TableReport]) -> list[tuple[str, int, int, str]]:
    """Name, bytes before and after, and a note; small tables are added up in the last."""
    ordered = sorted(tables, key=lambda table: -table.bytes_before)
    bars = [
        (_end_of(table.name), table.bytes_before, table.bytes_after, _note(table))
        for table in ordered[:_BARS]
    ]
    rest = ordered[_BARS:]
    if rest:
        sizes = [sum(getattr(t, f"bytes_{when}") for t in rest) for when in ("before", "after")]
        bars.append((f"{len(rest)} smaller tables", *sizes, ""))
    return bars


def _note(table: TableReport) -> str:
    if not table.compressed:
        return "as it was"
    ratio = f"{table.bytes_before / table.bytes_after:.3g}x" if table.bytes_after else "shared"
    return ratio if table.weighted_error is None else f"{ratio}, error {table.weighted_error:.2g}"


def _end_of(name: str) -> str:
    return name if len(name) <= 24 else "..." + name[-21:]
