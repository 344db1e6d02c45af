"""Time lookups of rows and of bags; medians and ratios, appended to a CSV file.

``python -m benchmarks.speed.lookup`` sweeps rows, dimensions, batch sizes and popularity. Compared
are ``nn.Embedding`` (``nn.EmbeddingBag`` for bags of 20), tables with the layout that ``plan``
gives them at 50x, the same by plain torch, torch's int8 table, FBGEMM's int8, int4 and int2 tables,
and a plain copy of an output that is ready in memory: the floor. In every repetition each method
gets the same fresh ids, one method after the other, so that what else the machine does meets all of
them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressionConfig,
    ops,
    plan,
)
from mec_embed.packing import PACK_ROWS, empty_packed, pack_into

DIMS = (10, 16, 40, 64, 128)
RATIO = 50.0
BAG = 20
COLUMNS = (
    "what", "rows", "dim", "batch", "ids", "method", "layout", "microseconds", "speed",
    "repetitions", "mec_embed", "torch", "processor", "threads",
)  # fmt: skip
LEAST_SECONDS, MOST_REPETITIONS = 0.1, 300
#: Lookups of a call, at most: more bags are left out.
MOST_LOOKUPS = 2_000_000

#: Looks up ids (batch,) or bags (batch, BAG).
Lookup = Callable[[Tensor], Any]


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    torch.set_num_threads(options.threads)
    tables = list(itertools.product(options.rows, options.dims))
    with torch.no_grad(), tqdm(tables, unit="table") as bar:
        for rows, dim in bar:
            if rows * dim * 4 > options.most_gb * 1e9:
                continue
            methods = _methods(rows, dim)
            for what, kind, batch in itertools.product(WHATS, options.ids, options.batches):
                if batch * (BAG if what == "bags" else 1) > MOST_LOOKUPS:
                    continue
                bar.set_postfix_str(f"{rows:,} x {dim}: {what}, {kind}, batch {batch}")
                label = {"what": what, "rows": rows, "dim": dim, "batch": batch, "ids": kind}
                shape = (batch, BAG) if what == "bags" else (batch,)
                _append(
                    options.out, label, methods[what], _measure(methods[what], rows, shape, kind)
                )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows, batches = [10**4, 10**5, 10**6, 10**7], [1, 64, 1024, 8192, 65536, 10**6]
    parser.add_argument("--rows", nargs="+", type=int, default=rows)
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), choices=DIMS)
    parser.add_argument("--batches", nargs="+", type=int, default=batches)
    parser.add_argument("--ids", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--most-gb", type=float, default=4.0, help="of a dense table, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_lookup.csv"))
    return parser.parse_args()


WHATS = ("rows", "bags")


def _methods(rows: int, dim: int) -> dict[str, dict[str, Lookup]]:
    """What -> name -> lookup; the first of each is what the others are compared with."""
    dense = nn.Embedding(rows, dim)
    weight = dense.weight.detach()
    dense_bag = nn.EmbeddingBag(rows, dim, _weight=weight, mode="sum")
    methods: dict[str, dict[str, Lookup]] = {
        "rows": {"dense": dense},
        "bags": {"dense": dense_bag},
    }
    for dtype in (torch.int8, torch.float32):
        name = f"mec_embed {mec_embed.layout.dtype_name(dtype)}"
        table, bag = compressed(planned_layout(dense, dtype))
        methods["rows"][name], methods["bags"][name] = table, bag
        if dtype is torch.int8:
            methods["rows"]["plain torch"] = plain_torch(table)
    methods["rows"]["copy"] = _copy(dim)
    for name, quantized in (("torch int8", _torch_int8), *_FBGEMM.items()):
        pair = quantized(weight)
        if pair is not None:
            methods["rows"][name], methods["bags"][name] = pair
    return methods


def planned_layout(dense: nn.Embedding, dtype: torch.dtype) -> CodeLayout:
    """What ``compress`` would make of a table whose rows all occur as often."""
    rows, dim = dense.weight.shape
    counts = {"table": torch.ones(rows, dtype=torch.int64)}
    config = CompressionConfig(ratio=RATIO, codebook_dtype=mec_embed.layout.dtype_name(dtype))
    found = plan(nn.ModuleDict({"table": dense}), counts, config).tables[0].layout
    kind, _, shape = found.partition(" ")
    count, size = map(int, shape.split("x"))
    return CodeLayout(kind, rows, dim, count, size, dtype)  # type: ignore[arg-type]


def compressed(layout: CodeLayout) -> tuple[CompressedEmbedding, CompressedEmbeddingBag]:
    """A table with random codes, for rows and for bags."""
    rows, count, size = layout.num_embeddings, layout.num_subvectors, layout.codebook_size
    table = CompressedEmbedding(layout)
    table.code_table.codes = _random_codes(rows, count, size, layout.bits)
    table.codebook_set.store(torch.randn(count, size, layout.embedding_dim))
    shared = {"code_table": table.code_table, "codebook_set": table.codebook_set}
    return table, CompressedEmbeddingBag(layout, mode="sum", **shared)


def _random_codes(rows: int, count: int, size: int, bits: int) -> Tensor:
    packed, step = empty_packed(rows, count, bits), 64 * PACK_ROWS
    for start in range(0, rows, step):
        codes = torch.randint(size, (min(step, rows - start), count))
        pack_into(packed, start, codes, bits)
    return packed


def plain_torch(table: CompressedEmbedding) -> Lookup:
    """The reference's lookup of rows."""
    layout, books = table.layout, table.codebook_set

    def look_up(ids: Tensor) -> Tensor:
        return ops.reference.lookup(
            ids,
            table.codes,
            table.codebooks,
            books.scales,
            layout.num_embeddings,
            layout.embedding_dim,
            layout.bits,
            -1,
            False,
            False,
            torch.float32,
            "",
        )

    return look_up


def _copy(dim: int) -> Lookup:
    ready: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(ids: Tensor) -> None:
        if len(ids) not in ready:
            ready[len(ids)] = torch.zeros(len(ids), dim), torch.zeros(len(ids), dim)
        ready[len(ids)][0].copy_(ready[len(ids)][1])

    return copy


def _torch_int8(weight: Tensor) -> tuple[Lookup, Lookup]:
    """torch's rows of bytes with a scale and an offset each."""
    packed = torch.ops.quantized.embedding_bag_byte_prepack(weight)
    offsets = _Offsets(torch.int64)

    def look_up(ids: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            packed, ids.reshape(-1), offsets(ids), False, 0, False, None, None, False
        )

    return look_up, look_up


def _fbgemm(weight: Tensor, kind: str) -> tuple[Lookup, Lookup] | None:
    """FBGEMM's inference tables, where fbgemm-gpu(-cpu) is installed."""
    try:
        common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
        inference = importlib.import_module(
            "fbgemm_gpu.split_table_batched_embeddings_ops_inference"
        )
    except ImportError:
        return None
    rows, dim = weight.shape
    if dim * _BITS[kind] % 8:
        return None  # FBGEMM packs whole bytes
    spec = ("t", rows, dim, configs.SparseType[kind], common.EmbeddingLocation.HOST)
    lookups = []
    for pooling in (common.PoolingMode.NONE, common.PoolingMode.SUM):
        table = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
            [spec], pooling_mode=pooling, device="cpu", output_dtype=configs.SparseType.FP32
        )
        table.fill_random_weights()
        lookups.append(_Fbgemm(table))
    return lookups[0], lookups[1]


class _Fbgemm:
    """Calls a table with ids in the dtype that it takes."""

    def __init__(self, table: nn.Module) -> None:
        self.table, self.offsets = table, _Offsets(torch.int32)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table(ids.reshape(-1).int(), self.offsets(ids))


class _Offsets:
    """Offsets of bags, made once for each shape of ids; torch's end before the last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.ready = dtype, {}

    def __call__(self, ids: Tensor) -> Tensor:
        if ids.shape not in self.ready:
            step = ids.shape[1] if ids.dim() > 1 else 1
            end = ids.numel() + (1 if self.dtype is torch.int32 else 0)
            self.ready[ids.shape] = torch.arange(0, end, step, dtype=self.dtype)
        return self.ready[ids.shape]


_BITS = {"INT8": 8, "INT4": 4, "INT2": 2}
_FBGEMM = {
    f"fbgemm {kind.lower()}": (lambda weight, kind=kind: _fbgemm(weight, kind)) for kind in _BITS
}


def _measure(
    methods: dict[str, Lookup], rows: int, shape: tuple[int, ...], kind: str
) -> dict[str, list[float]]:
    """Seconds of every repetition of each method.

    In random order: what a method leaves in the allocator is not always the same one's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    shuffle = random.Random(0)
    stop = time.perf_counter() + LEAST_SECONDS * len(methods)
    for number, ids in enumerate(id_batches(rows, shape, kind)):
        for name, method in shuffle.sample(list(methods.items()), len(methods)):
            started = time.perf_counter()
            method(ids)
            seconds[name].append(time.perf_counter() - started)
        if number >= MOST_REPETITIONS or (number > 10 and time.perf_counter() > stop):
            break
    # The first run of each warms up.
    return {name: values[1:] for name, values in seconds.items()}


def id_batches(
    rows: int, shape: tuple[int, ...], kind: str, device: str = "cpu"
) -> Iterator[Tensor]:
    """Ids (*shape) of a table of ``rows`` rows, again and again others."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    while True:
        if kind == "uniform":
            yield torch.randint(rows, shape, **options)
        else:
            # Zipf with exponent 1: the logarithm of the rank is uniform. Popular ids are spread
            # over the table, as hashes would spread them.
            ranks = (rows + 1.0) ** torch.rand(shape, dtype=torch.float64, **options)
            yield (ranks.long() - 1) * 7919 % rows


def _append(
    file: Path,
    label: dict[str, object],
    methods: dict[str, Lookup],
    seconds: dict[str, list[float]],
) -> None:
    base = median(seconds["dense"])
    for name, values in seconds.items():
        layout = getattr(methods[name], "layout", None)
        line = {"method": name, "layout": layout.describe() if layout else ""}
        line |= {"microseconds": f"{1e6 * median(values):.1f}"}
        line |= {"speed": f"{base / median(values):.2f}", "repetitions": len(values)}
        line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
        line |= {"processor": processor(), "threads": torch.get_num_threads()}
        append(file, label | line, COLUMNS)


if __name__ == "__main__":
    main()
