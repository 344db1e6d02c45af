"""Time lookups of rows and of bags on a GPU; medians and ratios, appended to a CSV file.

``python -m benchmarks.speed.gpu`` compares ``nn.Embedding`` (``nn.EmbeddingBag`` for bags of 20),
compressed tables of about 50x, the same by plain torch, and a fill of the output: the floor. Each
measurement is of ``CALLS`` lookups of fresh ids, the same for all methods, one method after the
other. They are timed twice: as a CUDA graph, which is what the GPU takes, and one by one from
Python, which for small batches is what the processor takes to launch them. ``gradient`` is a lookup
and the gradient of the table, dense, or of the codebooks; ``tables`` are lookups in ``TABLES``
tables, one after the other, ``tables gradient`` these and all gradients; ``tiers`` are rows of a
table whose popular fifth has other codes than the rest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from benchmarks.speed.lookup import BAG, id_batches, plain_torch
from mec_embed import CodeLayout, CompressedEmbedding, CompressedEmbeddingBag
from mec_embed.tiers import TieredEmbedding, TierMap

COLUMNS = (
    "what", "rows", "dim", "batch", "ids", "timing", "method", "microseconds", "speed", "gb_s",
    "repetitions", "mec_embed", "torch", "triton", "device",
)  # fmt: skip
#: Codebooks and codewords of about 50x, by dimension.
SHAPES = {10: (2, 8), 16: (2, 32), 40: (5, 32), 64: (8, 32), 128: (16, 32)}
#: Lookups of one measurement, and measurements.
CALLS, REPETITIONS = 5, 11
#: Lookups of a call, at most: more bags are left out.
MOST_LOOKUPS = 1 << 23
TABLES = 26
#: Entries of each of them, at most.
MOST_ENTRIES = 1 << 24
DEVICE = "cuda"

Lookup = Callable[[Tensor], object]


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    tables = list(itertools.product(options.rows, options.dims))
    with tqdm(tables, unit="table") as bar:
        for rows, dim in bar:
            if rows * dim * 4 > options.most_gb * 1e9:
                continue
            methods = _methods(rows, dim)
            for what, kind, batch in itertools.product(options.what, options.ids, options.batches):
                lookups = batch * MANY.get(what, 1)
                if lookups > MOST_LOOKUPS or what not in methods:
                    continue
                bar.set_postfix_str(f"{rows:,} x {dim}: {what}, {kind}, batch {batch}")
                label = {"what": what, "rows": rows, "dim": dim, "batch": batch, "ids": kind}
                shape = (batch, BAG) if what == "bags" else (batch,)
                _compare(options.out, label, methods[what], rows, shape)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", default=list(WHATS), choices=WHATS)
    parser.add_argument("--rows", nargs="+", type=int, default=[10**5, 10**6, 10**7])
    parser.add_argument("--dims", nargs="+", type=int, default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1024, 8192, 65536, 1 << 20])
    parser.add_argument("--ids", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--most-gb", type=float, default=30.0, help="of a dense table, at most")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_gpu.csv"))
    return parser.parse_args()


WHATS = ("rows", "tiers", "bags", "gradient", "tables", "tables gradient")
#: Lookups for each of a batch, where there are several.
MANY = {"bags": BAG, "tables": TABLES, "tables gradient": TABLES}


def _methods(rows: int, dim: int) -> dict[str, dict[str, Lookup]]:
    """What -> name -> lookup; the first of each is what the others are compared with."""
    weight = torch.full((rows, dim), 0.5, device=DEVICE)
    dense = nn.Embedding(rows, dim, _weight=weight)
    methods: dict[str, dict[str, Lookup]] = {
        "rows": {"dense": dense},
        "bags": {"dense": nn.EmbeddingBag(rows, dim, _weight=weight, mode="sum")},
        "gradient": {"dense": _gradient(dense, dense.weight)},
    }
    for dtype in (torch.int8, torch.float32):
        name = f"mec_embed {mec_embed.layout.dtype_name(dtype)}"
        table, bag = _compressed(rows, dim, dtype)
        methods["rows"][name], methods["bags"][name] = table, bag
    methods["rows"]["plain torch"] = plain_torch(table)
    methods["gradient"][name] = _gradient(table, table.codebooks)
    methods["tiers"] = {"dense": dense, name: _tiered(rows, dim)}
    methods["rows"]["fill"] = methods["bags"]["fill"] = _fill(dim)
    if rows * dim <= MOST_ENTRIES:
        many = {"dense": [nn.Embedding(rows, dim, _weight=weight.clone()) for _ in range(TABLES)]}
        many[name] = [_compressed(rows, dim, dtype)[0] for _ in range(TABLES)]
        methods["tables"] = {key: _in_turn(tables) for key, tables in many.items()}
        methods["tables gradient"] = {key: _gradients(tables) for key, tables in many.items()}
    return methods


def _in_turn(tables: Sequence[nn.Module]) -> Lookup:
    return lambda ids: [table(ids) for table in tables]


def _compressed(
    rows: int, dim: int, dtype: torch.dtype, less: int = 1
) -> tuple[CompressedEmbedding, CompressedEmbeddingBag]:
    """A table with random codes, so many times ``less``, for rows and for bags."""
    count, size = SHAPES[dim][0] // less, SHAPES[dim][1]
    layout = CodeLayout("additive", rows, dim, count, size, dtype)
    with torch.device(DEVICE):
        table = CompressedEmbedding(layout)
        # All sizes are powers of two, so that any bits are codes.
        table.code_table.codes.random_(0, 256)
        table.codebook_set.store(torch.randn(count, size, dim))
        shared = {"code_table": table.code_table, "codebook_set": table.codebook_set}
        return table, CompressedEmbeddingBag(layout, mode="sum", **shared)


def _gradient(table: nn.Module, weight: Tensor) -> Lookup:
    def differentiate(ids: Tensor) -> None:
        with torch.enable_grad():
            rows = table(ids)
            torch.autograd.grad(rows, weight, rows.detach())

    return differentiate


def _gradients(tables: Sequence[nn.Module]) -> Lookup:
    parameters = [parameter for table in tables for parameter in table.parameters()]

    def differentiate(ids: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.grad(torch.cat([table(ids) for table in tables], 1).sum(), parameters)

    return differentiate


def _tiered(rows: int, dim: int) -> TieredEmbedding:
    """A table of which a fifth, here and there, has twice as many codes as the others."""
    popular = torch.rand(rows) < 0.2
    head, _ = _compressed(int(popular.sum()), dim, torch.float32)
    tail, _ = _compressed(int((~popular).sum()), dim, torch.float32, less=2)
    return TieredEmbedding(TierMap.of(popular), head, tail).to(DEVICE)


def _fill(dim: int) -> Lookup:
    return lambda ids: torch.full((len(ids), dim), 1.0, device=DEVICE)


def _compare(
    file: Path, label: dict[str, object], methods: dict[str, Lookup], rows: int, shape: tuple
) -> None:
    batches = id_batches(rows, shape, str(label["ids"]), DEVICE)
    inputs = [next(batches) for _ in range(CALLS)]
    with torch.no_grad():
        timings = {"eager": {name: _eager(one, inputs) for name, one in methods.items()}}
        if "gradient" not in str(label["what"]):
            timings["graph"] = {name: _graph(one, inputs) for name, one in methods.items()}
        for timing, measures in timings.items():
            seconds: dict[str, list[float]] = {name: [] for name in methods}
            for _ in range(REPETITIONS):
                for fresh, ids in zip(inputs, batches, strict=False):
                    fresh.copy_(ids)
                for name, measure in measures.items():
                    seconds[name].append(measure() / CALLS)
            _append(file, {**label, "timing": timing}, seconds)


def _eager(method: Lookup, inputs: list[Tensor]) -> Callable[[], float]:
    def measure() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for ids in inputs:
            method(ids)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    measure()  # compiles
    return measure


def _graph(method: Lookup, inputs: list[Tensor]) -> Callable[[], float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for ids in inputs:
            method(ids)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure() -> float:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    measure()
    return measure


def _append(file: Path, label: dict[str, object], seconds: dict[str, list[float]]) -> None:
    import triton

    base, written = median(seconds["dense"]), int(label["batch"]) * int(label["dim"]) * 4
    for name, values in seconds.items():
        middle = median(values)
        line = {"method": name, "microseconds": f"{1e6 * middle:.2f}"}
        line |= {"speed": f"{base / middle:.2f}", "gb_s": f"{written / middle / 1e9:.0f}"}
        line |= {"repetitions": len(values), "mec_embed": mec_embed.__version__}
        line |= {"torch": torch.__version__, "triton": triton.__version__}
        append(file, label | line | {"device": processor(DEVICE)}, COLUMNS)


if __name__ == "__main__":
    main()
