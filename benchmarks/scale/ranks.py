"""Compress one table on several ranks; append what it took to a CSV file.

``python -m benchmarks.scale.ranks --rows 1000000 --ranks 1 2 4`` starts processes of one thread
each, connected by gloo. Each makes its part of the rows, as a DTensor; the values do not depend on
the number of ranks. Seconds are those of the slowest rank. Where there are fewer processors than
ranks, or others use them, the processor's seconds say what a rank with one of its own would take.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from mec_embed.learning import fit
from mec_embed.learning.kmeans import require_faiss
from mec_embed.ranks import Ranks

COLUMNS = (
    "rows", "dim", "ranks", "seconds", "cpu_seconds", "plan_cpu_seconds", "learn_cpu_seconds",
    "encode_cpu_seconds", "exchanged_mb", "above_mb", "shard_mb", "bytes_after", "ratio", "error",
    "layout", "load", "mec_embed", "torch", "python", "processor", "processors",
)  # fmt: skip
#: Rows made at once, from a seed of their own.
PIECE = 1 << 16


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    for rows in options.rows:
        for ranks in options.ranks:
            line = measure(rows, options.dim, ranks, options.ratio)
            append(options.out, line, COLUMNS)
            print({name: line[name] for name in COLUMNS[:14]}, flush=True)


def measure(rows: int, dim: int, ranks: int, ratio: float) -> dict[str, Any]:
    """What compressing a table on so many ranks takes: one line of the file."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.spawn(_run, (ranks, folder, rows, dim, ratio), nprocs=ranks)
        told = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    line = told[0] | {
        field: max(each[field] for each in told)
        for field in told[0]
        if field.endswith(("seconds", "_mb"))
    }
    return line | {
        "rows": rows,
        "dim": dim,
        "ranks": ranks,
        "load": round(load, 1),
        "mec_embed": mec_embed.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "processors": os.cpu_count(),
    }


def _run(rank: int, ranks: int, folder: Path, rows: int, dim: int, ratio: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", None, ranks, rank)
    torch.save(_measure_rank(rows, dim, ratio), folder / f"{rank}.pt")
    dist.barrier()
    # The interpreter's clean-up can meet threads of torch that still run.
    os._exit(0)


def _measure_rank(rows: int, dim: int, ratio: float) -> dict[str, Any]:
    """Seconds, memory and result of this rank."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    rank, ranks = dist.get_rank(), dist.get_world_size()
    each = -(-rows // ranks)
    own = make_rows(min(rank * each, rows), min((rank + 1) * each, rows), dim)
    mesh = init_device_mesh("cpu", (ranks,))
    weight = DTensor.from_local(own, mesh, [Shard(0)], shape=(rows, dim), stride=(dim, 1))
    model = nn.ModuleDict(
        {"table": nn.Embedding(rows, dim, _weight=torch.empty(rows, dim, device="meta"))}
    )
    model["table"].weight = nn.Parameter(weight)
    del weight
    stats = mec_embed.FrequencyStats.from_counts({"table": make_counts(rows)})
    config = mec_embed.CompressionConfig(ratio=ratio)
    world = dist.group.WORLD
    learn, encode, exchange = (_Timer() for _ in range(3))
    fit.learn_codebooks = learn.around(fit.learn_codebooks)
    fit._encode_all = encode.around(fit._encode_all)
    Ranks._all_reduce = exchange.counting(Ranks._all_reduce)
    require_faiss()
    held, before = _memory_mb("VmRSS"), time.process_time()
    mec_embed.plan(model, stats, config, process_group=world)
    planned = time.process_time()
    dist.barrier()
    exchange.nbytes, started = 0, time.perf_counter()
    report = mec_embed.compress(model, stats, config, process_group=world, progress=False)
    seconds, cpu = time.perf_counter() - started, time.process_time() - planned
    (table,) = report.tables
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "plan_cpu_seconds": round(planned - before, 2),
        "learn_cpu_seconds": round(learn.seconds, 2),
        "encode_cpu_seconds": round(encode.seconds, 2),
        "exchanged_mb": round(exchange.nbytes / 1e6, 1),
        "above_mb": round(_memory_mb("VmHWM") - held),
        "shard_mb": round(own.nbytes / 1e6),
        "bytes_after": report.bytes_after,
        "ratio": round(report.ratio, 2),
        "error": round(table.weighted_error, 5),
        "layout": table.layout,
    }


class _Timer:
    """Adds up the processor's seconds within a function, or the bytes that it was given."""

    def __init__(self) -> None:
        self.seconds, self.nbytes = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.process_time()
            result = function(*args)
            self.seconds += time.process_time() - started
            return result

        return timed

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(ranks: Ranks, tensor: Tensor, what: str) -> Any:
            self.nbytes += tensor.nbytes
            return function(ranks, tensor, what)

        return counted


def make_rows(first: int, end: int, dim: int) -> Tensor:
    """Rows ``first`` to ``end`` (n, dim) float32 of a table of a falling spectrum."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    mixing /= torch.arange(1, dim + 1)[:, None]
    rows = torch.empty(end - first, dim)
    for number in range(first // PIECE, -(-end // PIECE)):
        piece = torch.randn(PIECE, dim, generator=torch.Generator().manual_seed(number + 1))
        start = number * PIECE
        low, high = max(first, start), min(end, start + PIECE)
        rows[low - first : high - first] = (piece @ mixing)[low - start : high - start]
    return rows


def make_counts(rows: int) -> np.ndarray:
    """Zipf counts (rows,) float32, spread over all rows."""
    # Odd and no multiple of small primes: a permutation for most numbers of rows.
    counts = np.empty(rows, np.float32)
    for start in range(0, rows, 1 << 20):
        ids = np.arange(start, min(start + (1 << 20), rows), dtype=np.int64)
        counts[start : start + (1 << 20)] = rows // (1 + ids * 2_654_435_761 % rows)
    return counts


def _memory_mb(field: str) -> float:
    """Memory of this process now (VmRSS) or at most (VmHWM), where the system tells; else 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(one.split()[1]) / 1000 for one in lines if one.startswith(field)), 0.0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ratio", type=float, default=50.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale_ranks.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
