"""Time DeepFM before and after compression: forward at serving batches, and training steps.

``python -m benchmarks.speed.model`` builds DeepFM with 26 fields, swaps its tables for codes of
about 50x, whole and in tiers, and runs all models in turn on the same fresh ids. Codes are random:
what they say does not change what a lookup takes. "ready" is the same network on vectors that are
there already: the floor. Medians and ratios go into a CSV file. A training step is one of Adam on a
batch of 1,024; its memory is counted in tensors: parameters, gradients and the state of the
optimizer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from examples.ctr.models import DeepFM
from mec_embed import CodeLayout, CompressedEmbedding
from mec_embed.modules import CodebookSet, CodeTable
from mec_embed.packing import pack
from mec_embed.tiers import TieredEmbedding, TierMap

FIELDS = 26
#: Codebooks and codewords, by dimension; of tiers, of the popular fifth and of the others.
WHOLE = {16: (1, 1024), 40: (3, 256)}
TIERS = {16: ((3, 256), (1, 256)), 40: ((4, 256), (2, 1024))}
TRAIN_BATCH = 1024
COLUMNS = (
    "fields", "rows", "dim", "batch", "what", "method", "milliseconds", "ratio", "megabytes",
    "repetitions", "mec_embed", "torch", "processor", "threads",
)  # fmt: skip


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    torch.set_num_threads(options.threads)
    models = _models(options)
    with tqdm(options.batches, unit="batch") as bar:
        for batch in bar:
            runs = {name: _forward(model) for name, model in models.items()}
            seconds = _measure(runs, options.rows, batch, options.repetitions)
            _append(options, batch, "forward", seconds, {})
    if options.train:
        trained = [name for name in models if name != "ready" and "int8" not in name]
        steps = {name: _Training(models[name]) for name in trained}
        seconds = _measure(dict(steps), options.rows, TRAIN_BATCH, min(20, options.repetitions))
        _append(options, TRAIN_BATCH, "step", seconds, {n: s.nbytes for n, s in steps.items()})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each of the 26 tables")
    parser.add_argument("--dim", type=int, default=16, choices=WHOLE)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 1024, 8192])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--train", action="store_true", help="time training steps too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_model.csv"))
    return parser.parse_args()


def _models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense model, and the same network on compressed tables and on ready vectors."""
    fields = [f"field{number}" for number in range(FIELDS)]
    dense = DeepFM(fields, [options.rows] * FIELDS, options.dim).eval()
    models: dict[str, nn.Module] = {"dense": dense, "ready": _on_ready(dense, options.dim)}
    for dtype in (torch.int8, torch.float32):
        name = mec_embed.layout.dtype_name(dtype)
        models[f"mec_embed {name}"] = _swapped(dense, options, dtype, tiers=False)
        models[f"mec_embed {name}, tiers"] = _swapped(dense, options, dtype, tiers=True)
    return models


def _swapped(
    dense: DeepFM, options: argparse.Namespace, dtype: torch.dtype, tiers: bool
) -> nn.Module:
    """A model with the dense one's network; first-order tables share the codes of the vectors."""
    model = DeepFM(list(dense.embeddings), [1] * FIELDS, options.dim)
    model.mlp = dense.mlp
    for field in dense.embeddings:
        if tiers:
            popular = torch.rand(options.rows) < 0.2
            counts = int(popular.sum()), int((~popular).sum())
            both = zip(counts, TIERS[options.dim], strict=True)
            pairs = [_pair(rows, options.dim, *shape, dtype) for rows, shape in both]
            tier_map = TierMap.of(popular)
            pair = [TieredEmbedding(tier_map, *parts) for parts in zip(*pairs, strict=True)]
        else:
            pair = _pair(options.rows, options.dim, *WHOLE[options.dim], dtype)
        model.embeddings[field], model.first_order[field] = pair
    return model.eval()


class _Ready(nn.Module):
    """Vectors (N, dim) of ids (N,) that were made at the first call for so many."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._dim = dim
        self._made: dict[int, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        """The same vectors, whatever the ids."""
        if len(ids) not in self._made:
            self._made[len(ids)] = 0.01 * torch.randn(len(ids), self._dim)
        return self._made[len(ids)]


def _on_ready(dense: DeepFM, dim: int) -> nn.Module:
    """A model with the dense one's network, whose lookups take nothing but a call."""
    model = DeepFM(list(dense.embeddings), [1] * FIELDS, dim)
    model.mlp = dense.mlp
    for field in dense.embeddings:
        model.embeddings[field], model.first_order[field] = _Ready(dim), _Ready(1)
    return model.eval()


def _pair(
    rows: int, dim: int, count: int, size: int, dtype: torch.dtype
) -> list[CompressedEmbedding]:
    """Tables of ``dim`` columns and of one, with the same random codes."""
    layouts = [CodeLayout("additive", rows, width, count, size, dtype) for width in (dim, 1)]
    codes = CodeTable(layouts[0])
    codes.codes.copy_(pack(torch.randint(size, (rows, count)), layouts[0].bits))
    tables = []
    for layout in layouts:
        books = CodebookSet(layout)
        books.store(torch.randn(count, size, layout.embedding_dim) * 0.01)
        tables.append(CompressedEmbedding(layout, code_table=codes, codebook_set=books))
    return tables


def _forward(model: nn.Module) -> Callable[[Tensor], object]:
    def run(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(ids)

    return run


class _Training:
    """Steps of Adam; holds what training holds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def __call__(self, ids: Tensor) -> None:
        """One step on made-up labels."""
        labels = (ids[:, 0] % 2).float()
        self.optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(self.model(ids), labels).backward()
        self.optimizer.step()

    @property
    def nbytes(self) -> int:
        """Bytes of parameters, buffers, gradients and the state of the optimizer."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _measure(
    runs: dict[str, Callable[[Tensor], object]], rows: int, batch: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of every repetition of each model, on the same fresh ids.

    In random order: what a model leaves in the allocator is not always the same one's.
    """
    generator, shuffle = torch.Generator().manual_seed(0), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(3, min(repetitions, repetitions * 1024 // batch)) + 1):
        ids = torch.randint(rows, (batch, FIELDS), generator=generator)
        for name, run in shuffle.sample(list(runs.items()), len(runs)):
            started = time.perf_counter()
            run(ids)
            seconds[name].append(time.perf_counter() - started)
    # The first run of each warms up.
    return {name: values[1:] for name, values in seconds.items()}


def _append(
    options: argparse.Namespace,
    batch: int,
    what: str,
    seconds: dict[str, list[float]],
    nbytes: dict[str, int],
) -> None:
    base = median(seconds["dense"])
    for name, values in seconds.items():
        line: dict[str, object] = {"fields": FIELDS, "rows": options.rows, "dim": options.dim}
        line |= {"batch": batch, "what": what, "method": name, "repetitions": len(values)}
        line |= {"milliseconds": f"{1e3 * median(values):.4f}"}
        line |= {"ratio": f"{median(values) / base:.3f}"}
        if name in nbytes:
            line |= {"megabytes": f"{nbytes[name] / 2**20:.1f}"}
        line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
        line |= {"processor": processor(), "threads": torch.get_num_threads()}
        append(options.out, line, COLUMNS)


if __name__ == "__main__":
    main()
