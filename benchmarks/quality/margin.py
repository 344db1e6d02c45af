"""How much better codes must be before a row gives up those of an earlier version.

``python -m benchmarks.quality.margin`` compresses a generated table, adds noise to its popular
rows, and compresses it anew ("cold") and from the version before, with several margins. Lines are
appended to a CSV file.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from benchmarks.quality.nights import changes
from mec_embed import CompressionConfig, compress
from mec_embed.learning import fit

COLUMNS = (
    "rows", "dim", "ratio", "noise", "margin", "weighted_error", "share", "seconds",
    "mec_embed", "torch", "processor", "threads",
)  # fmt: skip
NOISES = (0.0, 0.02, 0.1, 0.3)
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.5)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/margin.csv"))
    options = parser.parse_args()
    for line in run(options.rows, options.dim, options.ratio):
        line |= {"mec_embed": mec_embed.__version__, "torch": torch.__version__}
        line |= {"processor": processor(), "threads": torch.get_num_threads()}
        append(options.out, line, COLUMNS)


def run(rows: int, dim: int, ratio: float) -> Iterator[dict[str, Any]]:
    """One line for each noise and margin."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator) / torch.arange(1, dim + 1)[:, None]
    table = torch.randn(rows, dim, generator=generator) @ mixing
    counts = rows // np.arange(1, rows + 1)
    config = CompressionConfig(ratio=ratio)
    old = _model(table)
    compress(old, {"0": counts}, config, progress=False)
    # A row that occurs ten times moves .7 times as far as one that occurs often.
    popular = torch.from_numpy(counts / (counts + 10.0)).float().sqrt()[:, None]
    for noise in NOISES:
        steps = torch.randn(rows, dim, generator=generator)
        moved = _model(table + noise * popular * table.std() * steps)
        for margin in ("cold", *MARGINS):
            model, start = copy.deepcopy(moved), None if margin == "cold" else old
            fit.KEEP_MARGIN = 0.0 if margin == "cold" else margin
            started = time.perf_counter()
            report = compress(model, {"0": counts}, config, progress=False, start_from=start)
            seconds = time.perf_counter() - started
            yield {
                **{"rows": rows, "dim": dim, "ratio": ratio, "noise": noise, "margin": margin},
                "weighted_error": round(report.tables[0].weighted_error, 5),
                "share": changes(old, model)["share"],
                "seconds": round(seconds, 2),
            }


def _model(table: torch.Tensor) -> nn.Module:
    return nn.Sequential(nn.Embedding(*table.shape, _weight=table.clone()))


if __name__ == "__main__":
    main()
