"""The Pareto plot and the table of a study.

``python -m benchmarks.quality.plot benchmarks/results/quality.csv --plot docs/quality.svg`` prints
a Markdown table (change of test AUC against the uncompressed model, mean over seeds) and draws AUC
against bytes, one panel a data set and model (needs matplotlib). ``--summary`` prints ours beside
the best of the others instead, at each ratio.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import lines

#: (data, model, dim)
Panel = tuple[str, str, str]
#: Colours are for methods of interest; the others share grey.
COLOURS = {"mec_embed": "#c22", "mec_embed without batches": "#e90", "mec_described": "#37b"}
STAGES = ("right after", "tuned", "labels", "self-distilled")
#: In brackets.
ALONE = "self-distilled alone"
#: Columns and lines of the short table.
SHORT: tuple[tuple[Panel, float], ...] = (
    (("criteo_dac80k", "DeepFM", "40"), 25.0),
    (("criteo_dac80k", "DeepFM", "40"), 100.0),
    (("ml1m_ge4", "DeepFM", "40"), 25.0),
    (("amazonbook_kgat", "DNN", "40"), 50.0),
)
#: What the summary compares, and how it calls that.
COMPARED = {STAGES[0]: "right after", STAGES[1]: "distilled", STAGES[2]: "with labels"}
OURS = "mec_embed"
SHORT_METHODS = (
    "mec_embed", "pq", "opq", "mec_described", "mec_released", "dpq", "mgqe", "cce", "hashing",
    "svd",
)  # fmt: skip


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, help="write the plot there (.svg, .png)")
    parser.add_argument("--metric", default="test_auc", help="a column of the results")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--short", action="store_true", help="the table of the README")
    tables.add_argument("--summary", action="store_true", help="ours and the best of the others")
    options = parser.parse_args()
    results = read(options.files, options.metric)
    if options.short:
        print(short_table(results))
    elif options.summary:
        print(summary(results, lower="logloss" in options.metric))
    else:
        print("\n\n".join(table(panel, methods) for panel, methods in results.items()))
    if options.plot:
        draw(results, options.plot, options.metric)


def read(files: Iterable[Path], metric: str) -> dict[Panel, dict[str, dict[float, Any]]]:
    """Panel -> method -> ratio asked -> {"bytes": mean, stage: changes of the metric by seed}."""
    rows = [row for file in files for row in lines.read(file)]
    # Bases that were trained on different processors differ a little.
    base = {
        (_panel(row), row["seed"], row["processor"]): float(row[metric])
        for row in rows
        if row["method"] == "uncompressed"
    }
    found: dict[Panel, dict[str, dict[float, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["method"] == "uncompressed" or row["stage"] == "impossible":
            continue
        panel = _panel(row)
        # What a trained method has right after is the trained model.
        stage = STAGES[0] if row["stage"] in ("compressed", "trained") else row["stage"]
        cell = found[panel][row["method"]].setdefault(float(row["ratio"]), defaultdict(list))
        cell["bytes"].append(int(row["bytes"]))
        cell["ratio"].append(int(row["bytes_before"]) / int(row["bytes"]))
        cell[stage].append(float(row[metric]) - base[panel, row["seed"], row["processor"]])
    return found


def _panel(row: dict[str, str]) -> Panel:
    return row["data"], row["model"], row["dim"]


def table(panel: Panel, methods: dict[str, dict[float, Any]]) -> str:
    """Markdown: one line a method, one column a ratio, the stages that were run in a cell."""
    ratios = sorted({ratio for cells in methods.values() for ratio in cells if ratio})
    text = [f"**{panel[0]}, {panel[1]}, d = {panel[2]}**", ""]
    text += [_line(["method", *(f"{ratio:g}x" for ratio in ratios)])]
    text += [_line(["---"] * (1 + len(ratios)))]
    for method in sorted(methods, key=_place):
        cells = methods[method]
        if set(cells) == {0.0}:
            # Of one size: it stands in the first column of results, with the ratio it has.
            cell = cells[0.0]
            found = [f"{_cell(cell)} at {mean(cell['ratio']):.1f}x", *[""] * (len(ratios) - 1)]
        else:
            found = [_cell(cells.get(ratio)) for ratio in ratios]
        text.append(_line([method, *found]))
    return "\n".join(text)


def short_table(results: dict[Panel, dict[str, dict[float, Any]]]) -> str:
    """Markdown: one line a method of interest, one column a data set and ratio."""
    text = [_line(["method", *(f"{panel[0]} {ratio:g}x" for panel, ratio in SHORT)])]
    text += [_line(["---"] * (1 + len(SHORT)))]
    for method in SHORT_METHODS:
        cells = [results.get(panel, {}).get(method, {}).get(ratio) for panel, ratio in SHORT]
        text.append(_line([method, *map(_cell, cells)]))
    return "\n".join(text)


def summary(results: dict[Panel, dict[str, dict[float, Any]]], lower: bool) -> str:
    """Markdown: one line a data set and ratio; ours, and the best of the others that were run.

    Args:
        results: from :func:`read`.
        lower: whether lower values of the metric are better.
    """
    headings = [name for stage in COMPARED.values() for name in (stage, "best of others")]
    text = [_line(["data", "ratio", *headings]), _line(["---"] * (2 + len(headings)))]
    for panel, methods in results.items():
        for ratio in sorted(filter(None, methods.get(OURS, {}))):
            at = {method: cells[ratio] for method, cells in methods.items() if ratio in cells}
            pairs = [_compared(at, stage, lower) for stage in COMPARED]
            found = [text for pair in pairs for text in pair]
            text.append(_line([f"{panel[0]}, {panel[1]}, {panel[2]}", f"{ratio:g}x", *found]))
    return "\n".join(text)


def _compared(at: dict[str, dict[str, list[float]]], stage: str, lower: bool) -> tuple[str, str]:
    """Ours, and the best of the others with its name, of one stage."""
    means = {method: mean(cell[stage]) for method, cell in at.items() if cell.get(stage)}
    others = {name: value for name, value in means.items() if not name.startswith(OURS)}
    ours = f"{means[OURS]:+.4f}" if OURS in means else "-"
    if not others:
        return ours, "-"
    best = (min if lower else max)(others, key=others.__getitem__)
    return ours, f"{others[best]:+.4f} {best}"


def _place(method: str) -> tuple[bool, bool]:
    """Ours first."""
    return not method.startswith("mec_embed"), method != "mec_embed"


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _cell(cell: dict[str, list[float]] | None) -> str:
    if cell is None:
        return "-"
    seeds = len(cell[STAGES[0]])
    stages = [cell[stage] for stage in STAGES if cell.get(stage)]
    values = " / ".join(_mean(stage, seeds) for stage in stages)
    if cell.get(ALONE):
        values += f" [{_mean(cell[ALONE], seeds)}]"
    return values + (f" ({seeds} seeds)" if seeds > 1 else "")


def _mean(changes: list[float], seeds: int) -> str:
    """A stage of other seeds than the first says so."""
    return f"{mean(changes):+.4f}" + (f" ({len(changes)})" if len(changes) != seeds else "")


def draw(results: dict[Panel, dict[str, dict[float, Any]]], file: Path, metric: str) -> None:
    """One panel a data set and model; points are means, bars standard deviations over seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(6 * len(results), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (panel, methods) in zip(axes[0], results.items(), strict=True):
        for number, (method, cells) in enumerate(methods.items()):
            _draw_method(axis, method, cells, number)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="bytes of all tables", title=", ".join(panel))
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[0][0].set_ylabel(f"change of {metric}, tuned")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


def _draw_method(axis: Any, method: str, cells: dict[float, Any], number: int) -> None:
    points = []
    for cell in cells.values():
        # Tuning alike for all methods, which that with labels is not yet.
        values = cell[STAGES[1]] or cell[STAGES[0]] or cell[STAGES[2]]
        if not values:  # only of bases that were trained on
            continue
        spread = stdev(values) if len(values) > 1 else 0.0
        points.append((mean(cell["bytes"]), mean(values), spread))
    if not points:
        return
    sizes, means, spreads = zip(*sorted(points), strict=True)
    style = {"color": COLOURS.get(method, str(0.35 + 0.05 * (number % 8)))}
    style |= {"linewidth": 2.2 if method in COLOURS else 1, "marker": "osv^Dpxh*<>P"[number % 12]}
    axis.errorbar(sizes, means, yerr=spreads, label=method, markersize=4, **style)


if __name__ == "__main__":
    main()
