"""Trial: how much of a log loss is calibration, which no method of compression has to do with.

``python -m benchmarks.quality.trials.calibration --data frappe_x1 --dim 10 --ratio 8`` prints, for
the uncompressed model and for each method after the usual tuning, the test AUC, the test log loss,
and that after Platt scaling (1999): slope and offset of the logits, fitted on the validation split.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality.common import Base
from benchmarks.quality.study import METHODS
from benchmarks.quality.trials import common
from benchmarks.quality.tuning import logistic_weights, logits_of, tune
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
    seen, answers = logits_of(model, base, "valid")
    scaling = logistic_weights(torch.stack([seen, torch.ones_like(seen)], dim=1), answers)
    slope, offset = scaling.tolist()
    scaled = F.binary_cross_entropy_with_logits(slope * logits + offset, labels)
    print(
        f"seed {seed}, {name}: AUC {metrics.auc:.5f}, log loss {metrics.logloss:.5f}, scaled "
        f"{float(scaled):.5f} (slope {slope:.3f}, offset {offset:+.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
