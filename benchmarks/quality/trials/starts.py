"""Trial: points that k-means starts from, and what is lost right after ``compress()``.

``python -m benchmarks.quality.trials.starts --data criteo_dac80k --ratio 100 --seeds 3`` prints the
change of test AUC for each start: points drawn alike, as faiss does, and greedy k-means++, as the
library does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.trials import common
from examples.ctr.training import evaluate
from mec_embed.learning import kmeans

Start = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


def alike(points: Tensor, weights: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Different points, whatever they weigh."""
    return points[torch.randperm(len(points), generator=generator)[:clusters]]


STARTS: dict[str, Start] = {
    "drawn alike": alike,
    "greedy k-means++": kmeans.start_centroids,
}


def main() -> None:
    """Parse the command line and print one line for each start."""
    parser = common.parser(__doc__, data="criteo_dac80k", model="DeepFM", ratio=100)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    changes: dict[str, list[float]] = {name: [] for name in STARTS}
    for seed in range(options.seeds):
        base = common.base_of(options, seed)
        uncompressed = evaluate(base.model, base.data, "test").auc
        for name, start in STARTS.items():
            with mock.patch.object(kmeans, "start_centroids", start):
                model = common.compressed(base, options.ratio)
            changes[name].append(evaluate(model, base.data, "test").auc - uncompressed)
    for name, values in changes.items():
        each = " ".join(f"{value:+.5f}" for value in values)
        print(f"{name}: {math.fsum(values) / len(values):+.5f} ({each})")


if __name__ == "__main__":
    main()
