"""Retrain night after night: compress anew, or from the version of the night before.

``python -m benchmarks.quality.nights --data criteo_dac80k.parquet`` trains on the first part of the
examples, and every night on one more of the parts that are left (one epoch, all other values as for
the base model). The model of each night is compressed in both ways; lines are appended to a CSV
file: errors, test AUC, and how many rows have other codes than the night before. ``moved`` is how
far rows went since then: squared, relative to their variance, weighted as the errors are.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from examples.ctr.base import build_model
from examples.ctr.data import ClickData, load_parquet
from examples.ctr.settings import SETTINGS, Settings
from examples.ctr.training import evaluate, iterate_batches, train_with
from mec_embed import CompressionConfig, CompressionReport, FrequencyStats, compress
from mec_embed.packing import unpack
from mec_embed.tables import find_replacements

COLUMNS = (
    "data", "ratio", "seed", "night", "how", "moved", "weighted_error", "auc", "dense_auc",
    "changed_rows", "rows", "share", "seconds", "mec_embed", "torch", "python", "processor",
    "threads",
)  # fmt: skip
#: Part of the training split that the base model sees.
BASE = 0.7


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    settings = SETTINGS[options.data.stem]
    data = load_parquet(options.data, settings.min_count)
    for seed in range(options.seeds):
        for line in run(data, settings, options.ratio, options.nights, seed):
            line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
            line |= {"python": platform.python_version(), "processor": processor()}
            line |= {"threads": torch.get_num_threads()}
            append(options.out, line, COLUMNS)


def run(
    data: ClickData, settings: Settings, ratio: float, nights: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One line for each night and way."""
    config = CompressionConfig(ratio=ratio, codebook_dtype="int8", seed=seed)
    first, *later = _split(data, nights)
    model = build_model(data.fields, data.rows, settings, seed)
    train_with(settings, model, first, seed)
    before: dict[str, Any] = {"cold": None, "warm": None}
    for night, part in enumerate([first, *later]):
        earlier = copy.deepcopy(model)
        if night:
            train_with(replace(settings, epochs=1), model, part, seed + night)
        stats = FrequencyStats.from_batches(
            model, iterate_batches(part, "train", settings.batch_size, shuffle=False)
        )
        dense_auc = evaluate(model, data, "test").auc
        for how, old in before.items():
            small = copy.deepcopy(model)
            start = old if how == "warm" else None
            started = time.perf_counter()
            report = compress(small, stats, config, progress=False, start_from=start)
            line = {"data": data.name, "ratio": ratio, "seed": seed, "night": night, "how": how}
            line |= {"seconds": round(time.perf_counter() - started, 2)}
            line |= {"weighted_error": round(_error(report), 5)}
            line |= {"moved": round(_moved(earlier, model, report, stats), 5)}
            line |= {"auc": round(evaluate(small, data, "test").auc, 5)}
            line |= {"dense_auc": round(dense_auc, 5)}
            before[how] = small
            if old is not None:
                yield line | changes(old, small)


def _split(data: ClickData, nights: int) -> list[ClickData]:
    """The data up to the base model, then up to each night but for what was seen before."""
    ids, labels = data.ids["train"], data.labels["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    base = int(BASE * len(labels))
    chosen = [order[:base], *order[base:].tensor_split(nights)]
    return [
        replace(
            data,
            ids={**data.ids, "train": ids[part]},
            labels={**data.labels, "train": labels[part]},
        )
        for part in chosen
    ]


def _error(report: CompressionReport) -> float:
    """Mean of the weighted errors of vector tables that have one."""
    errors = [t.weighted_error for t in report.tables if t.weighted_error is not None and t.dim > 1]
    return sum(errors) / len(errors)


def _moved(
    old: nn.Module, new: nn.Module, report: CompressionReport, stats: FrequencyStats
) -> float:
    """How far rows of the compressed vector tables went."""
    errors = []
    for table in report.tables:
        if table.weighted_error is not None and table.dim > 1:
            before, after = (m.get_submodule(table.name).weight.detach() for m in (old, new))
            weights = torch.from_numpy(stats[table.name]).float().clamp(min=0.1).sqrt()
            share = (weights / weights.sum())[:, None]
            variance = (share * (after - (share * after).sum(0)).square()).sum()
            errors.append(float((share * (after - before).square()).sum() / variance))
    return sum(errors) / len(errors)


def changes(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """Rows whose codes are others; all of them where a table is stored in another way."""
    changed = rows = 0
    seen: set[int] = set()
    before, after = _parts(old), _parts(new)
    for key, part in after.items():
        if part.layout.bits and id(part.code_table) not in seen:
            seen.add(id(part.code_table))
            rows += part.num_embeddings
            changed += _other_rows(before.get(key), part)
    return {"changed_rows": changed, "rows": rows, "share": round(changed / rows, 4)}


def _parts(model: nn.Module) -> dict[tuple[str, int], Any]:
    """Compressed tables, or tiers of them."""
    return {
        (aliases[0].name, number): part
        for module, aliases in find_replacements(model)
        for number, part in enumerate(module._tables())
    }


def _other_rows(before: Any, after: Any) -> int:
    if before is None or before.layout != after.layout:
        return after.num_embeddings
    shape = (after.layout.num_subvectors, after.layout.bits, torch.arange(after.num_embeddings))
    return int((unpack(before.codes, *shape) != unpack(after.codes, *shape)).any(1).sum())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a Parquet click log")
    parser.add_argument("--ratio", type=float, default=50.0)
    parser.add_argument("--nights", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nights.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
