"""Compare builds of the C kernel; medians and ratios, appended to a CSV file.

``python -m benchmarks.speed.kernels OLD.so NEW.so`` calls the kernel itself, without Python's part
of a lookup and into an output that is ready, for tables with the layout that ``plan`` gives them at
50x, or with ``--layout 5x128``. Each build gets the same fresh ids, in random order, and has to
give the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.hardware import processor
from benchmarks.lines import append
from benchmarks.speed.lookup import BAG, DIMS, compressed, id_batches, planned_layout
from mec_embed import CodeLayout, CompressedEmbedding

COLUMNS = (
    "what", "rows", "dim", "layout", "dtype", "batch", "vectors", "build", "nanoseconds", "speed",
    "repetitions", "processor",
)  # fmt: skip
LEAST_SECONDS = 1.0


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    builds = {path.stem: _load(path) for path in options.builds}
    dtypes = [getattr(torch, name) for name in options.dtypes]
    tables = list(itertools.product(options.dims, dtypes))
    for dim, dtype in tqdm(tables, unit="table"):
        table = _table(options.rows, dim, dtype, options.layout)
        label = {"rows": options.rows, "dim": dim, "layout": table.layout.describe()}
        label |= {"dtype": str(dtype).removeprefix("torch."), "processor": processor()}
        for what, batch in itertools.product(("rows", "bags"), options.batches):
            count = batch * (BAG if what == "bags" else 1)
            calls = {name: _call(build, table, what, batch) for name, build in builds.items()}
            for vectors in options.vectors:
                for build in builds.values():
                    build.limit_vectors(vectors)
                found = label | {"what": what, "batch": batch, "vectors": vectors}
                _append(options.out, found, _measure(calls, options.rows, count), count)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+", type=Path, help="compared with the first")
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS))
    parser.add_argument("--dtypes", nargs="+", default=["int8", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 1024, 8192])
    parser.add_argument("--layout", help="codebooks x codewords, such as 5x128; else planned")
    vectors = "bytes of the longest vectors that are used: 64, 32, 16"
    parser.add_argument("--vectors", nargs="+", type=int, default=[64], help=vectors)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_kernels.csv"))
    return parser.parse_args()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mec_embed._native", path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a build of the kernel; name a file such as _native.abi3.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table(rows: int, dim: int, dtype: torch.dtype, shape: str | None) -> CompressedEmbedding:
    if shape is None:
        return compressed(planned_layout(nn.Embedding(rows, dim), dtype))[0]
    count, size = map(int, shape.split("x"))
    return compressed(CodeLayout("additive", rows, dim, count, size, dtype))[0]


def _call(
    build: ModuleType, table: CompressedEmbedding, what: str, batch: int
) -> Callable[[Tensor], Tensor]:
    """Looks up ids by a build, into an output of its own."""
    plan, out = table._pack_plan(), torch.empty(batch, table.embedding_dim)

    def rows(ids: Tensor) -> Tensor:
        arguments = ids.data_ptr(), 8, len(ids), -1, out.data_ptr(), 1
        return _fine(build.rows(plan, *arguments), out)

    def bags(ids: Tensor) -> Tensor:
        arguments = ids.data_ptr(), 8, len(ids), -1, 0, 8, batch, BAG, 0, 0, out.data_ptr(), 1
        return _fine(build.bags(plan, *arguments), out)

    return bags if what == "bags" else rows


def _fine(failed: int, out: Tensor) -> Tensor:
    if failed:
        raise RuntimeError("a build refused ids of the table")
    return out


def _measure(
    calls: dict[str, Callable[[Tensor], Tensor]], rows: int, count: int
) -> dict[str, list[float]]:
    """Seconds of every repetition of each build; an error where one gives something else.

    Not that of ``lookup``, which lets go of each output before the next method runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    stop = time.perf_counter() + LEAST_SECONDS
    for number, ids in enumerate(id_batches(rows, (count,), "uniform")):
        outputs = []
        for name, call in shuffle.sample(list(calls.items()), len(calls)):
            started = time.perf_counter()
            outputs.append(call(ids))
            seconds[name].append(time.perf_counter() - started)
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])
        if number > 10 and time.perf_counter() > stop:
            break
    # The first run of each warms up.
    return {name: values[1:] for name, values in seconds.items()}


def _append(
    file: Path, label: dict[str, object], seconds: dict[str, list[float]], count: int
) -> None:
    base = median(next(iter(seconds.values())))
    for name, values in seconds.items():
        line = {"build": name, "nanoseconds": f"{1e9 * median(values) / count:.1f}"}
        line |= {"speed": f"{base / median(values):.2f}", "repetitions": str(len(values))}
        append(file, label | line, COLUMNS)


if __name__ == "__main__":
    main()
