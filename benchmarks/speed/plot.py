"""Draw the speed of lookups relative to dense tables, from the CSV file of a speed benchmark.

``python -m benchmarks.speed.plot benchmarks/results/speed_lookup.csv --what rows --plot
docs/speed_rows.svg`` draws one panel for each number of rows and dimension (needs matplotlib), and
prints a Markdown table of the least and the median speed by batch size. Of the file of
``speed.gpu``, ``--timing`` says whether lookups were launched by a CUDA graph or one by one.
``--dims`` prints what larger tables and batches reach by dimension, on each processor, instead.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks import lines

#: (rows, dim) -> method -> batch -> speed, relative to the dense table
Panels = dict[tuple[int, int], dict[str, dict[int, float]]]
#: Of the table by dimension: rows and ids from which on, dimensions together, and what to reach.
LEAST_ROWS, LEAST_BATCH = 100_000, 1024
DIMS = {"10 to 40": (10, 16, 40), "64": (64,), "128": (128,)}
TARGETS = {"rows": 1.5, "bags": 5.0}
COLOURS = {"mec_embed int8": "#c22", "mec_embed float32": "#e90", "copy": "#999", "dense": "#000"}


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--what", default="rows", choices=("rows", "bags"))
    parser.add_argument("--ids", default="uniform")
    parser.add_argument("--timing", default="graph", choices=("graph", "eager"))
    parser.add_argument("--processor", default="", help="part of its name, where there are several")
    parser.add_argument("--threads", default="1", help="of the processor")
    parser.add_argument("--plot", type=Path, help="write the plot there (.svg, .png)")
    parser.add_argument("--dims", action="store_true", help="by dimension, on each processor")
    options = parser.parse_args()
    if options.dims:
        sys.stdout.write(by_dimension(lines.read(options.file), options.what, options.ids) + "\n")
        return
    where = sorted({_machine(row) for row in lines.read(options.file)})
    where = [name for name in where if options.processor in name]
    if len(where) > 1:
        parser.error(f"{options.file} has lines of {', '.join(where)}; choose with --processor")
    wanted = {name: getattr(options, name) for name in ("what", "ids", "timing", "threads")}
    panels = read(options.file, wanted, options.processor)
    sys.stdout.write(table(panels) + "\n")
    if options.plot:
        draw(panels, options.plot)


def read(file: Path, wanted: dict[str, str], processor: str = "") -> Panels:
    """The speeds of the file that were measured so; on a CPU there is one timing only."""
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    for row in lines.read(file):
        if processor in _machine(row) and wanted.items() <= (wanted | row).items():
            place = int(row["rows"]), int(row["dim"])
            panels[place][row["method"]][int(row["batch"])] = float(row["speed"])
    return panels


def _machine(row: dict[str, str]) -> str:
    """The processor or the GPU of a line."""
    return row.get("processor", row.get("device", ""))


def table(panels: Panels) -> str:
    """Least and median over all tables, a line a method and a column a batch size."""
    speeds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for methods in panels.values():
        for method, batches in methods.items():
            for batch, speed in batches.items():
                speeds[method][batch].append(speed)
    batches = sorted({batch for found in speeds.values() for batch in found})
    text = ["| method | " + " | ".join(f"{batch:,}" for batch in batches) + " |"]
    text.append("| --- |" + " --- |" * len(batches))
    for method, found in speeds.items():
        cells = [
            f"{min(found[b]):.2f} / {median(found[b]):.2f}" if b in found else "" for b in batches
        ]
        text.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def by_dimension(rows: list[dict[str, str]], what: str, ids: str) -> str:
    """Least / median / greatest of larger tables and batches; how many reach the target.

    Args:
        rows: of the CSV file.
        what: "rows" or "bags".
        ids: how they were drawn.
    """
    speeds: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        large = int(row["rows"]) >= LEAST_ROWS and int(row["batch"]) >= LEAST_BATCH
        ours = row["method"].startswith("mec_embed")
        if ours and large and (row["what"], row["ids"]) == (what, ids):
            key = row["processor"], row["threads"], row["method"]
            for name in (name for name, dims in DIMS.items() if int(row["dim"]) in dims):
                speeds[key][name].append(float(row["speed"]))
    text = ["| processor | threads | method | " + " | ".join(f"d = {name}" for name in DIMS) + " |"]
    text.append("|" + " --- |" * (3 + len(DIMS)))
    for key, found in sorted(speeds.items()):
        cells = [_reached(found[name], TARGETS[what]) if found.get(name) else "" for name in DIMS]
        text.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(text)


def _reached(speeds: list[float], target: float) -> str:
    """Least / median / greatest, and how many reach the target."""
    enough = sum(speed >= target for speed in speeds)
    low, middle, high = min(speeds), median(speeds), max(speeds)
    return f"{low:.2f} / {middle:.2f} / {high:.2f}, {enough} of {len(speeds)}"


def draw(panels: Panels, file: Path) -> None:
    """One panel for each table: speed against batch size."""
    from matplotlib import pyplot

    rows, dims = (sorted({place[axis] for place in panels}) for axis in (0, 1))
    size = (2.6 * len(rows) + 1.6, 2.1 * len(dims) + 0.6)
    figure, axes = pyplot.subplots(
        len(dims), len(rows), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for (count, dim), methods in panels.items():
        axis = axes[dims.index(dim)][rows.index(count)]
        axis.set_title(f"{count:,} x {dim}", fontsize=8)
        axis.axhline(1, color="#000", linewidth=0.5)
        for method, speeds in methods.items():
            colour = COLOURS.get(method)
            axis.plot(sorted(speeds), [speeds[b] for b in sorted(speeds)], label=method, c=colour)
        axis.set_xscale("log")
        axis.set_yscale("log")
    figure.supxlabel("batch")
    figure.supylabel("speed, dense = 1")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=7)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / size[0], 1))
    figure.savefig(file)


if __name__ == "__main__":
    main()
