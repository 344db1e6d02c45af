"""Trial: train the base on with labels before compressing, then compress and distill it.

``python -m benchmarks.quality.trials.self_distilled --data criteo_dac80k --ratio 10 --l2 1e-3``
"""

from __future__ import annotations

from benchmarks.quality.ours import self_distilled
from benchmarks.quality.trials import common
from examples.ctr.training import evaluate
from mec_embed import distill


def main() -> None:
    """Parse the command line and print the changes after every step."""
    parser = common.parser(__doc__, data="criteo_dac80k", model="DeepFM", ratio=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rare", type=int, default=50)
    parser.add_argument("--l2", type=float, default=5e-4)
    options = parser.parse_args()
    base = common.base_of(options, options.seed)
    tell = common.teller(base)

    names = ("epochs", "lr", "rare", "l2")
    better = self_distilled(base, calls=1, **{name: getattr(options, name) for name in names})
    tell("self-distilled", better.model)
    model = common.compressed(better, options.ratio)
    tell("compressed", model)
    distill(
        model,
        better.model,
        list(base.batches(base.seed + 1)),
        labels=lambda batch: batch[1],
        rare=50,
        mix=0.0,
        score=lambda one: evaluate(one, base.data, "valid").auc,
        seed=base.seed,
        progress=False,
    )
    tell("distilled with labels", model)


if __name__ == "__main__":
    main()
