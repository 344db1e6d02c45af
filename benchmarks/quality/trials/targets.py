"""Trial: what is distilled from: labels, rare ids, mixed columns, a fresh network.

``python -m benchmarks.quality.trials.targets --data ml1m_ge4 --network fresh --mix 0.5 1`` prints,
for each combination of the options, every epoch and at last the best one: its validation AUC, and
the change of test AUC and log loss.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from benchmarks.quality.common import Base
from benchmarks.quality.trials import common
from examples.ctr.training import evaluate
from mec_embed import distill


def main() -> None:
    """Parse the command line and print one line an epoch."""
    parser = common.parser(__doc__, data="criteo_dac80k", model="DeepFM", ratio=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--label-weight", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--rare", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--mix", type=float, nargs="+", default=[0.5])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--network", nargs="+", default=["trained"])
    options = parser.parse_args()
    base = common.base_of(options, options.seed)
    model = common.compressed(base, options.ratio)
    for weight, rare, mix, network in itertools.product(
        options.label_weight, options.rare, options.mix, options.network
    ):
        print(f"label weight {weight}, rare {rare}, mix {mix}, network {network}", flush=True)
        labels = (lambda batch: batch[1]) if weight else None
        choice = {"mix": mix, "network": network, "labels": labels, "label_weight": weight}
        choice |= {"rare": rare, "lr": options.lr}
        _distill(copy.deepcopy(model), base, options.epochs, choice)


def _distill(model: torch.nn.Module, base: Base, epochs: int, choice: dict[str, Any]) -> None:
    uncompressed = evaluate(base.model, base.data, "test")

    def score(one: torch.nn.Module) -> float:
        valid, test = evaluate(one, base.data, "valid"), evaluate(one, base.data, "test")
        change = test.auc - uncompressed.auc, test.logloss - uncompressed.logloss
        print("  valid {:.5f}, test {:+.5f} / {:+.5f}".format(valid.auc, *change), flush=True)
        return valid.auc

    batches = list(base.batches(base.seed + 1))
    distill(
        model,
        base.model,
        batches,
        epochs=epochs,
        score=score,
        seed=base.seed,
        progress=False,
        **choice,
    )
    print("  the best epoch:")
    score(model)


if __name__ == "__main__":
    main()
