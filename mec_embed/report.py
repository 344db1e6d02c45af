"""Every byte, every error: text, dict, JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CompressionConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TableReport:
    """One embedding table before and after.

    Attributes:
        name: qualified name.
        aliases: other names of the same table.
        rows: of the dense table.
        dim: columns of the dense table.
        dtype: of the dense table.
        layout: such as ``"additive 5x32"``; ``"as it was"`` where nothing changes.
        row_bits: bits of codes a row.
        bytes_before: of all its tensors.
        code_bytes: of its codes. Tensors shared by several tables are counted with the first.
        codebook_bytes: of its codebooks.
        other_bytes: of all else: maps of tiers, and tables that stay as they were.
        shares_codes_with: the table that holds its codes, or None.
        shares_codebooks_with: the table that holds its codebooks, or None.
        reason: why the table stays as it was, or None.
        popularity: weighting of the rows; ``"uniform"`` without counts.
        lookups: total of the counts, None without counts.
        weighted_error: weighted squared error / weighted variance of the rows.
        start_error: the same for the rows that the codebooks were learned from, after the k-means
            start, or with ``start_from`` in its codebooks (for all tables that share them).
        learned_error: the same at the end.
        perplexity: mean over codebooks of exp(entropy of the use of codewords).
        dead_codes: codewords that no row uses.
        codewords: all of them.
        changed_rows: rows with other codes than in ``start_from``; None without it.
        objective: mean of each term of the MEC objective in its last epoch.
        seconds: spent learning (for all tables that share the codebooks, with the first).
    """

    name: str
    aliases: tuple[str, ...]
    rows: int
    dim: int
    dtype: str
    layout: str
    row_bits: int
    bytes_before: int
    code_bytes: int
    codebook_bytes: int
    other_bytes: int
    shares_codes_with: str | None = None
    shares_codebooks_with: str | None = None
    reason: str | None = None
    popularity: str | None = None
    lookups: float | None = None
    weighted_error: float | None = None
    start_error: float | None = None
    learned_error: float | None = None
    perplexity: float | None = None
    dead_codes: int | None = None
    codewords: int | None = None
    changed_rows: int | None = None
    objective: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the table, those it shares with an earlier one left out."""
        return self.code_bytes + self.codebook_bytes + self.other_bytes

    @property
    def compressed(self) -> bool:
        """Whether the table changes."""
        return self.reason is None


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`mec_embed.compress` did, or what :func:`mec_embed.plan` would do.

    ``str()`` is an aligned table.

    Attributes:
        tables: every embedding table of the model, those left alone too, in the order of the model.
        config: what was asked for.
        notes: what to know about the result.
        seconds: that ``compress`` took; None for a plan.
        predicted_error: what the planner expects: weighted squared error / weighted variance of
            the rows of all tables that it may change. With ``batches=`` both are measured by what
            the predictions depend on.
        predicted: the same at other sizes, ascending: (bytes of all tables after, error), all
            grouped and cut as in this plan. A plan for another ratio may find better groups.
    """

    tables: tuple[TableReport, ...]
    config: CompressionConfig
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    predicted_error: float | None = None
    predicted: tuple[tuple[int, float], ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all embedding tables before."""
        return sum(table.bytes_before for table in self.tables)

    @property
    def bytes_after(self) -> int:
        """Bytes of all embedding tables after, those left alone included."""
        return sum(table.bytes_after for table in self.tables)

    @property
    def ratio(self) -> float:
        """``bytes_before / bytes_after``."""
        return self.bytes_before / self.bytes_after

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        tables = [{**asdict(table), "bytes_after": table.bytes_after} for table in self.tables]
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "seconds": self.seconds,
            "predicted_error": self.predicted_error,
            "predicted": [list(point) for point in self.predicted],
            "notes": list(self.notes),
            "config": self.config.to_dict(),
            "tables": tables,
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw what other ratios would cost, and the bytes of each table (needs matplotlib).

        Left: the predicted error of all tables against the ratio, as in ``predicted``, and this
        report as a dot. Right: bytes of the 15 largest tables before and after, on a logarithmic
        scale, with their ratios and, once compressed, weighted errors.

        Args:
            path: where to write the figure too; the ending (.svg, .png, .pdf) says how.

        Returns:
            A ``matplotlib.figure.Figure``, which notebooks show.

        Raises:
            RuntimeError: matplotlib is not installed.
            OSError: the file cannot be written.
            ValueError: an ending that matplotlib does not know.

        Example:
            >>> plan(model, stats).plot("ratio.svg")  # doctest: +SKIP
        """
        from .plotting import plot

        return plot(self, path)

    def __str__(self) -> str:
        """An aligned table of at most 120 columns."""
        header = ["table", "rows", "dim", "layout", "bits", "before", "codes", "books", "other"]
        header += ["ratio", "error", "used", "dead"]
        body = [_cells(table) for table in self.tables if table.compressed]
        total = ["total", str(sum(t.rows for t in self.tables)), "", "", ""]
        total += [str(self.bytes_before)]
        total += [str(sum(getattr(t, f"{part}_bytes") for t in self.tables)) for part in _PARTS]
        total += [f"{self.ratio:.1f}", "", "", ""]
        lines = _aligned([header, *body, total])
        lines.append(
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, ratio {self.ratio:.2f}"
            + (f", {self.seconds:.1f} s" if self.seconds is not None else " (planned)")
        )
        lines += [line for table in self.tables if not table.compressed for line in _skipped(table)]
        lines += [part for note in self.notes for part in _wrapped(f"note: {note}")]
        return "\n".join(lines)


_PARTS = ("code", "codebook", "other")
_WIDTH = 120


def _cells(table: TableReport) -> list[str]:
    ratio = f"{table.bytes_before / table.bytes_after:.1f}" if table.bytes_after else "shared"
    used = "-"
    if table.perplexity is not None and table.codewords:
        used = f"{table.perplexity:.0f}"
    return [
        _shortened(table.name, 34),
        str(table.rows),
        str(table.dim),
        table.layout,
        str(table.row_bits),
        str(table.bytes_before),
        str(table.code_bytes),
        str(table.codebook_bytes),
        str(table.other_bytes),
        ratio,
        "-" if table.weighted_error is None else f"{table.weighted_error:.3f}",
        used,
        "-" if table.dead_codes is None else str(table.dead_codes),
    ]


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Names give way first where the numbers are wide.
    widths[0] = min(widths[0], max(8, _WIDTH - sum(widths[1:]) - len(widths) + 1))
    # Then layouts, of which the last part tells most.
    widths[3] = min(widths[3], max(8, widths[3] + _WIDTH - sum(widths) - len(widths) + 1))
    return [
        " ".join(
            _shortened(cell, width).ljust(width) if i in (0, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _skipped(table: TableReport) -> list[str]:
    name = _shortened(table.name, 60)
    return _wrapped(
        f"as it was: {name} ({table.rows} x {table.dim}, {table.bytes_after} bytes): {table.reason}"
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ")
