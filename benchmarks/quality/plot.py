"""The Pareto plot and the tables of a study.

``python -m benchmarks.quality.plot benchmarks/results/quality.csv --plot docs/quality.svg`` prints
Markdown tables (change of test AUC against the uncompressed model, mean over seeds), one a data set
and model, and draws AUC against bytes (needs matplotlib). ``--summary``, ``--labels`` and
``--short`` print other tables instead.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import lines
from benchmarks.lines import signed

#: (data, model, dim)
Panel = tuple[str, str, str]
#: Colours are for methods of interest; the others share grey.
COLOURS = {"mec_embed": "#c22", "mec_embed without batches": "#e90", "mec_described": "#37b"}
#: Stages: what a method gives, and that distilled alike for all methods.
RIGHT_AFTER, TUNED = "right after", "tuned"
#: Stages that see labels once more: distilled with them, from a base that was self-distilled with
#: them before, both, and from a base taught by itself and a second model that was trained alike.
LABELS, ALONE, SELF_DISTILLED = "labels", "self-distilled alone", "self-distilled"
TWO_TEACHERS = "two teachers"
WITH_LABELS = {
    LABELS: "distilled with labels",
    ALONE: "self-distilled before",
    SELF_DISTILLED: "both",
    TWO_TEACHERS: "two teachers",
}
OURS = "mec_embed"
#: Columns and lines of the short table.
SHORT: tuple[tuple[Panel, float], ...] = (
    (("criteo_dac80k", "DeepFM", "40"), 25.0),
    (("criteo_dac80k", "DeepFM", "40"), 100.0),
    (("ml1m_ge4", "DeepFM", "40"), 25.0),
    (("amazonbook_kgat", "DNN", "40"), 50.0),
)
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
    tables.add_argument("--short", action="store_true", help="some methods, some ratios")
    tables.add_argument("--summary", action="store_true", help="ours and the best of the others")
    tables.add_argument("--labels", action="store_true", help="stages that see labels once more")
    options = parser.parse_args()
    results = read(options.files, options.metric)
    if options.short:
        print(short_table(results))
    elif options.summary:
        print(summary(results, lower="logloss" in options.metric))
    elif options.labels:
        print(labels_table(results))
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
    # A seed that was run on two processors counts once, with the mean of both.
    changes: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["method"] == "uncompressed" or row["stage"] == "impossible":
            continue
        panel = _panel(row)
        # What a trained method has right after is the trained model.
        stage = RIGHT_AFTER if row["stage"] in ("compressed", "trained") else row["stage"]
        method, ratio = row["method"], float(row["ratio"])
        cell = found[panel][method].setdefault(ratio, defaultdict(list))
        cell["bytes"].append(int(row["bytes"]))
        cell["ratio"].append(int(row["bytes_before"]) / int(row["bytes"]))
        change = float(row[metric]) - base[panel, row["seed"], row["processor"]]
        changes[panel, method, ratio, stage, row["seed"]].append(change)
    for (panel, method, ratio, stage, _), of_seed in changes.items():
        found[panel][method][ratio][stage].append(mean(of_seed))
    order = list(dict.fromkeys(data for data, _, _ in found))
    return dict(sorted(found.items(), key=lambda one: order.index(one[0][0])))


def _panel(row: dict[str, str]) -> Panel:
    return row["data"], row["model"], row["dim"]


def table(panel: Panel, methods: dict[str, dict[float, Any]]) -> str:
    """Markdown: one line a method, one column a ratio; right after / tuned in a cell."""
    methods = {name: cells for name, cells in methods.items() if any(map(_cell, cells.values()))}
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
            found = [_cell(cells.get(ratio, {})) or "-" for ratio in ratios]
        text.append(_line([method, *found]))
    return "\n".join(text)


def short_table(results: dict[Panel, dict[str, dict[float, Any]]]) -> str:
    """Markdown: one line a method of interest, one column a data set and ratio."""
    text = [_line(["method", *(f"{panel[0]} {ratio:g}x" for panel, ratio in SHORT)])]
    text += [_line(["---"] * (1 + len(SHORT)))]
    for method in SHORT_METHODS:
        cells = [results.get(panel, {}).get(method, {}).get(ratio, {}) for panel, ratio in SHORT]
        text.append(_line([method, *(_cell(cell) or "-" for cell in cells)]))
    return "\n".join(text)


def labels_table(results: dict[Panel, dict[str, dict[float, Any]]]) -> str:
    """Markdown: one line a data set, ratio and method that was trained on with labels."""
    text = [_line(["data", "ratio", "method", *WITH_LABELS.values()])]
    text += [_line(["---"] * (3 + len(WITH_LABELS)))]
    for panel, methods in results.items():
        cells = [(ratio, name, methods[name][ratio]) for name in methods for ratio in methods[name]]
        for ratio, name, cell in sorted(cells, key=lambda one: (one[0], _place(one[1]), one[1])):
            found = [_mean(cell[stage]) if cell.get(stage) else "-" for stage in WITH_LABELS]
            if set(found) != {"-"}:
                size = ratio or round(mean(cell["ratio"]), 1)  # of one size
                text.append(_line([", ".join(panel), f"{size:g}x", name, *found]))
    return "\n".join(text)


def summary(results: dict[Panel, dict[str, dict[float, Any]]], lower: bool) -> str:
    """Markdown: one line a data set and ratio; ours, and the best of the others that were run.

    Args:
        results: from :func:`read`.
        lower: whether lower values of the metric are better.
    """
    stages = {"right after": [RIGHT_AFTER], "distilled": [TUNED], "with labels": [*WITH_LABELS]}
    headings = [name for stage in stages for name in (stage, "best of others")]
    text = [_line(["data", "ratio", *headings]), _line(["---"] * (2 + len(headings)))]
    for panel, methods in results.items():
        for ratio in sorted(filter(None, methods.get(OURS, {}))):
            at = {method: cells[ratio] for method, cells in methods.items() if ratio in cells}
            pairs = [_compared(at, names, lower) for names in stages.values()]
            found = [one for pair in pairs for one in pair]
            text.append(_line([", ".join(panel), f"{ratio:g}x", *found]))
    return "\n".join(text)


def _compared(
    at: dict[str, dict[str, list[float]]], stages: list[str], lower: bool
) -> tuple[str, str]:
    """Ours, and the best of the others with its name; each at the best of its stages."""
    best = min if lower else max
    means = {
        method: best(mean(cell[stage]) for stage in stages if cell.get(stage))
        for method, cell in at.items()
        if any(cell.get(stage) for stage in stages)
    }
    others = {name: value for name, value in means.items() if not name.startswith(OURS)}
    first = best(others, key=others.__getitem__, default=None)
    return (
        signed(means[OURS]) if OURS in means else "-",
        f"{signed(others[first])} {first}" if first else "-",
    )


def _place(method: str) -> tuple[bool, bool]:
    """Ours first."""
    return not method.startswith(OURS), method != OURS


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _cell(cell: dict[str, list[float]]) -> str:
    """Right after / tuned, as far as they were run."""
    return " / ".join(_mean(cell[stage]) for stage in (RIGHT_AFTER, TUNED) if cell.get(stage))


def _mean(changes: list[float]) -> str:
    """With the number of seeds, where these are several."""
    return signed(mean(changes)) + (f" ({len(changes)})" if len(changes) > 1 else "")


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
        values = cell[TUNED] or cell[RIGHT_AFTER] or cell[LABELS]
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
