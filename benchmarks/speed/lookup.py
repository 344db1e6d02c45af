"""Time lookups against ``nn.Embedding``: paired runs, medians, ratios, appended to a CSV file.

``python -m benchmarks.speed.lookup`` sweeps rows, batch sizes, dimensions and popularity. In every
repetition each method looks up the same fresh ids, one method after the other, so that what else
the machine does meets all of them. ``copy`` writes an output that is ready in memory: the floor.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from mec_embed import CodeLayout, CompressedEmbedding, ops
from mec_embed.packing import pack

#: Codebooks and codewords of about 50x, by dimension.
SHAPES = {10: (2, 8), 16: (2, 32), 40: (5, 32), 64: (8, 32), 128: (16, 32)}
COLUMNS = (
    "rows", "dim", "batch", "ids", "codebooks", "method", "microseconds", "speed", "repetitions",
    "mec_embed", "torch", "processor", "threads",
)  # fmt: skip
LEAST_SECONDS, MOST_REPETITIONS = 0.2, 300


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    torch.set_num_threads(options.threads)
    axes = options.rows, options.dims, options.codebooks, options.ids, options.batches
    grid = list(itertools.product(*axes))
    with torch.no_grad(), tqdm(grid, unit="setting") as bar:
        for key, group in itertools.groupby(bar, key=lambda setting: setting[:3]):
            methods = _methods(*key)
            for rows, dim, books, kind, batch in group:
                label = {"rows": rows, "dim": dim, "batch": batch, "ids": kind, "codebooks": books}
                _append(options.out, label, _measure(methods, rows, batch, kind))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dims", nargs="+", type=int, default=[10, 40, 64], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 1024, 8192, 65536])
    parser.add_argument("--ids", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--codebooks", nargs="+", default=["int8", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_lookup.csv"))
    return parser.parse_args()


def _methods(rows: int, dim: int, codebooks: str) -> dict[str, Callable[[Tensor], object]]:
    """Name -> lookup of ids (batch,); the first is what the others are compared with."""
    dense = nn.Embedding(rows, dim)
    count, size = SHAPES[dim]
    table = CompressedEmbedding(CodeLayout("additive", rows, dim, count, size, _DTYPES[codebooks]))
    table.codes.copy_(pack(torch.randint(size, (rows, count)), (size - 1).bit_length()))
    table.codebook_set.store(torch.randn(count, size, dim))
    ready: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(ids: Tensor) -> None:
        if len(ids) not in ready:
            ready[len(ids)] = torch.zeros(len(ids), dim), torch.zeros(len(ids), dim)
        ready[len(ids)][0].copy_(ready[len(ids)][1])

    return {
        "nn.Embedding": dense,
        "mec_embed": table,
        "plain torch": lambda ids: ops.reference.lookup(
            ids,
            table.codes,
            table.codebooks,
            table.codebook_set.scales,
            rows,
            dim,
            table.layout.bits,
            -1,
            False,
            False,
            torch.float32,
            "",
        ),
        "copy": copy,
    }


_DTYPES = {"int8": torch.int8, "float32": torch.float32}


def _measure(
    methods: dict[str, Callable[[Tensor], object]], rows: int, batch: int, kind: str
) -> dict[str, list[float]]:
    """Seconds of every repetition of each method."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    stop = time.perf_counter() + LEAST_SECONDS * len(methods)
    for number, ids in enumerate(_ids(rows, batch, kind)):
        for name, method in methods.items():
            started = time.perf_counter()
            method(ids)
            seconds[name].append(time.perf_counter() - started)
        if number >= MOST_REPETITIONS or (number > 10 and time.perf_counter() > stop):
            break
    # The first run of each warms up.
    return {name: values[1:] for name, values in seconds.items()}


def _ids(rows: int, batch: int, kind: str) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        if kind == "uniform":
            yield torch.randint(rows, (batch,), generator=generator)
        else:
            # Zipf with exponent 1: the logarithm of the rank is uniform.
            ranks = (rows + 1.0) ** torch.rand(batch, generator=generator, dtype=torch.float64)
            yield (ranks.long() - 1).clamp(0, rows - 1)


def _append(file: Path, label: dict[str, object], seconds: dict[str, list[float]]) -> None:
    fresh = not file.exists()
    base = median(next(iter(seconds.values())))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS)
        if fresh:
            writer.writeheader()
        for name, values in seconds.items():
            line = {"method": name, "microseconds": f"{1e6 * median(values):.1f}"}
            line |= {"speed": f"{base / median(values):.2f}", "repetitions": len(values)}
            line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
            line |= {"processor": processor(), "threads": torch.get_num_threads()}
            writer.writerow(label | line)


if __name__ == "__main__":
    main()
