"""Time ``compress()`` of one table against faiss's product quantizer at as many bits a row.

``python -m benchmarks.speed.fit`` makes a table of low rank with noise and Zipf popularity. Each
run has a process of its own and the same threads; in every repetition the methods run one after
the other, so that what else the machine does meets all of them. Seconds are those of training and
encoding, without imports; memory is what the process takes at most above what it held before.

With ``--device cuda`` the table is on the GPU, where ours learns too, and memory is that of the
GPU; ``--profile`` tells where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import logging
import multiprocessing
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from mec_embed import CompressionConfig
from mec_embed.learning.kmeans import require_faiss

METHODS = ("mec_embed", "faiss PQ", "faiss PQ, all rows")
COLUMNS = (
    "rows", "dim", "ratio", "method", "layout", "bits", "seconds", "least_seconds", "speed",
    "weighted_error", "memory_mb", "repetitions",
    "mec_embed", "torch", "faiss", "processor", "threads",
)  # fmt: skip
CHUNK_ROWS = 1 << 16
#: The same on a GPU.
DEVICE_CHUNK_ROWS = 1 << 19

#: Rows (n,) int64 -> decoded rows (n, dim).
Decode = Callable[[Tensor], Tensor]


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    grid = list(itertools.product(options.rows, options.dims, options.ratios))
    runs = len(grid) * options.repetitions * len(options.methods)
    with tqdm(total=runs, unit="run") as bar:
        for rows, dim, ratio in grid:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
            for _ in range(options.repetitions):
                for name in options.methods:
                    run = name, rows, dim, ratio, options.threads, options.most_bits
                    found[name].append(_alone(*run, options.device, options.profile))
                    bar.update()
            label = {"rows": rows, "dim": dim, "ratio": ratio, "threads": options.threads}
            label |= {"processor": found[options.methods[0]][0]["processor"]}
            _append(options.out, label, found)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000_000])
    parser.add_argument("--dims", nargs="+", type=int, default=[40])
    parser.add_argument("--ratios", nargs="+", type=float, default=[50.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    help = "of a code of faiss, at most: time and memory of its training double with each"
    parser.add_argument("--most-bits", type=int, default=8, help=help)
    help = "that the table is on; faiss takes it from there to the CPU"
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=help)
    help = "log the stages and list the functions that took longest"
    parser.add_argument("--profile", action="store_true", help=help)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_fit.csv"))
    return parser.parse_args()


def _alone(*run: Any) -> dict[str, Any]:
    """:func:`_run` in a fresh process: what others have imported and freed does not count."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, *run).result()


def _run(
    method: str,
    rows: int,
    dim: int,
    ratio: float,
    threads: int,
    most_bits: int,
    device: str,
    profile: bool,
) -> dict[str, Any]:
    """Seconds, memory, layout, bits, error and processor of one run."""
    torch.set_num_threads(threads)
    require_faiss().omp_set_num_threads(threads)
    table, counts = _table(rows, dim, device)
    model = nn.ModuleDict({"table": nn.Embedding(rows, dim, _weight=table)})
    config = CompressionConfig(ratio=ratio, codebook_dtype="int8")
    if method != "mec_embed" or device == "cpu":
        bits = mec_embed.plan(model, {"table": counts}, config).tables[0].row_bits
    with _profiled(profile):
        if method == "mec_embed":
            result, decode = _measure(lambda: _ours(model, counts, config), device)
            bits = result.pop("row_bits")
        else:
            shape = _shape(dim, bits, most_bits)
            given = table.cpu()
            result, decode = _measure(lambda: _faiss(given, *shape, method.endswith("all rows")))
            bits = shape[0] * shape[1]
    result |= {"bits": bits, "processor": processor(device)}
    return result | {"weighted_error": _error(decode, table, counts.sqrt())}


def _table(rows: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows (rows, dim) of ten directions, each weaker than the one before, and noise; counts."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    scales = 0.7 ** torch.arange(10, device=device)[:, None]
    directions = torch.randn(10, dim, **options) * scales
    table = torch.empty(rows, dim, device=device)
    for part in table.split(_chunk_rows(device)):
        part.normal_(0, 0.1, generator=generator)
        part += torch.randn(len(part), 10, **options) @ directions
    ranks = torch.randperm(rows, **options)
    return table, (1 + 10 * rows // (1 + ranks)).cpu()


def _chunk_rows(device: str) -> int:
    return CHUNK_ROWS if device == "cpu" else DEVICE_CHUNK_ROWS


@contextmanager
def _profiled(wanted: bool) -> Iterator[None]:
    """While open, if wanted, stages are logged; then the functions that took longest are listed."""
    if not wanted:
        yield
        return
    logging.basicConfig(format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mec_embed").setLevel("DEBUG")
    profile = cProfile.Profile()
    with profile:
        yield
    statistics = pstats.Stats(profile, stream=sys.stderr)
    statistics.sort_stats("cumulative").print_stats(40)
    statistics.sort_stats("tottime").print_stats(25)


def _ours(
    model: nn.ModuleDict, counts: Tensor, config: CompressionConfig
) -> tuple[dict[str, Any], Decode]:
    report = mec_embed.compress(model, {"table": counts}, config, progress=False)
    told = report.tables[0]
    return {"layout": told.layout, "row_bits": told.row_bits}, model["table"]


def _faiss(table: Tensor, count: int, bits: int, all_rows: bool) -> tuple[dict[str, Any], Decode]:
    x = table.numpy()
    quantizer = require_faiss().ProductQuantizer(x.shape[1], count, bits)
    if all_rows:
        quantizer.cp.max_points_per_centroid = len(x)
    quantizer.train(x)
    codes = quantizer.compute_codes(x)
    layout = f"PQ {count}x{1 << bits}"
    return {"layout": layout}, lambda ids: torch.from_numpy(
        quantizer.decode(codes[ids.cpu().numpy()])
    ).to(ids.device)


def _shape(dim: int, bits: int, most_bits: int) -> tuple[int, int]:
    """Number of codes and bits of each, nearest to ``bits`` a row; of several, the fewest codes."""
    shapes = [
        (count, each)
        for count in range(1, dim + 1)
        for each in range(1, most_bits + 1)
        if dim % count == 0
    ]
    return min(shapes, key=lambda shape: (abs(shape[0] * shape[1] - bits), shape[0]))


def _measure(
    method: Callable[[], tuple[dict[str, Any], Decode]], device: str = "cpu"
) -> tuple[dict[str, Any], Decode]:
    """What a method tells and took, and how its rows are decoded."""
    if device != "cpu":
        return _measure_on_gpu(method)
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")  # the most memory so far is forgotten
    before, started = _megabytes("VmRSS"), time.perf_counter()
    told, decode = method()
    seconds = time.perf_counter() - started
    memory = _megabytes("VmHWM") - before
    return told | {"seconds": seconds, "memory_mb": memory}, decode


def _measure_on_gpu(
    method: Callable[[], tuple[dict[str, Any], Decode]],
) -> tuple[dict[str, Any], Decode]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    told, decode = method()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return told | {"seconds": seconds, "memory_mb": memory}, decode


def _megabytes(field: str) -> float:
    """Memory of this process, where the system tells."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith(f"{field}:")), 0.0)


def _error(decode: Decode, table: Tensor, weights: Tensor) -> float:
    """Squared error by popularity, relative to the variance by popularity."""
    share = (weights / weights.sum()).double()
    mean, error, square = table.new_zeros(table.shape[1], dtype=torch.float64), 0.0, 0.0
    with torch.no_grad():
        step = _chunk_rows(table.device.type)
        for first in range(0, len(table), step):
            x = table[first : first + step].double()
            ids = torch.arange(first, first + len(x), device=x.device)
            part = share[first : first + step].to(x.device)
            mean += part @ x
            square += float(part @ x.square().sum(1))
            error += float(part @ (x - decode(ids)).square().sum(1))
    return error / (square - float(mean.square().sum()))


def _append(file: Path, label: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    base = median(next(iter(seconds.values())))
    for name, runs in found.items():
        line = {"method": name, "layout": runs[0]["layout"], "bits": runs[0]["bits"]}
        line |= {"seconds": f"{median(seconds[name]):.2f}"}
        line |= {"least_seconds": f"{min(seconds[name]):.2f}"}
        line |= {"speed": f"{base / median(seconds[name]):.2f}", "repetitions": len(runs)}
        line |= {"weighted_error": f"{runs[0]['weighted_error']:.5f}"}
        line |= {"memory_mb": f"{median(run['memory_mb'] for run in runs):.0f}"}
        line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
        line |= {"faiss": require_faiss().__version__}
        append(file, label | line, COLUMNS)


if __name__ == "__main__":
    main()
