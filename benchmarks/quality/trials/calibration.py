"""Trial: how much of a log loss is calibration, which no method of compression has to do with.

``python -m benchmarks.quality.trials.calibration --data frappe_x1 --dim 10 --ratio 8`` prints, for
the uncompressed model and for each method after the usual tuning, the test AUC, the test log loss,
and that after Platt scaling: a slope and an offset of the logits, fitted on the validation split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.common import Base
from benchmarks.quality.study import METHODS
from benchmarks.quality.trials import common
from benchmarks.quality.tuning import logits_of, tune
from examples.ctr.training import evaluate


def main() -> None:
    """Parse the command line and print one line a method."""
    parser = common.parser(__doc__, data="frappe_x1", model="DeepFM", ratio=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["mec_embed", "dpq", "mgqe"])
    parser.add_argument("--labels", action="store_true", help="tuning with labels")
    options = parser.parse_args()
    for seed in range(options.seeds):
        base = common.base_of(options, seed)
        _print(seed, "uncompressed", base.model, base)
        for method in options.methods:
            torch.manual_seed(seed)
            model = METHODS[method](base, options.ratio)
            if model is not None:
                _print(seed, method, tune(model, base, labels=options.labels), base)


def _print(seed: int, name: str, model: nn.Module, base: Base) -> None:
    metrics = evaluate(model, base.data, "test")
    logits, labels = logits_of(model, base, "test")
    slope, offset = _platt(*logits_of(model, base, "valid"))
    scaled = F.binary_cross_entropy_with_logits(slope * logits + offset, labels)
    print(
        f"seed {seed}, {name}: AUC {metrics.auc:.5f}, log loss {metrics.logloss:.5f}, scaled "
        f"{float(scaled):.5f} (slope {slope:.3f}, offset {offset:+.3f})",
        flush=True,
    )


def _platt(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Slope and offset of the least log loss (Platt, 1999), by Newton's method."""
    design = torch.stack([logits, torch.ones_like(logits)], dim=1)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(20):
        chance = (design @ weights).sigmoid()
        curvature = design.T @ (design * (chance * (1 - chance))[:, None])
        weights -= torch.linalg.solve(curvature, design.T @ (chance - labels))
    return float(weights[0]), float(weights[1])


if __name__ == "__main__":
    main()
