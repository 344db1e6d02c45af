"""Trial: two models that were trained alike teach one, before it is compressed or only after.

``python -m benchmarks.quality.trials.two_teachers --data amazonbook_kgat --model DNN --ratio 10``
"""

from __future__ import annotations

import torch

from benchmarks.quality.ours import taught
from benchmarks.quality.study import SECOND_SEED
from benchmarks.quality.trials import common
from mec_embed import distill


class Mean(torch.nn.Module):
    """The mean of the logits of several models."""

    def __init__(self, *models: torch.nn.Module) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 ids (B, F) to logits (B,)."""
        return torch.stack([model(ids) for model in self.models]).mean(0)


def main() -> None:
    """Parse the command line and print the changes after every step."""
    parser = common.parser(__doc__, data="amazonbook_kgat", model="DNN", ratio=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = common.base_of(options, options.seed)
    second = common.base_of(options, options.seed + SECOND_SEED)
    tell = common.teller(base)

    tell("second model", second.model)
    tell("mean of both", Mean(base.model, second.model))
    better = taught(base, second)
    tell("taught before", better.model)
    tell("compressed", common.compressed(better, options.ratio))
    model = common.compressed(base, options.ratio)
    batches = list(base.batches(base.seed + 1))
    distill(model, [base.model, second.model], batches, seed=base.seed, progress=False)
    tell("compressed, taught after", model)


if __name__ == "__main__":
    main()
