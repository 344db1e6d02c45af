"""The same fine-tuning for every method: distillation from the base model, best by validation."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality.common import Base
from benchmarks.quality.posthoc import freeze, thaw
from examples.ctr.training import evaluate
from mec_embed import CompressedEmbedding, distill
from mec_embed.distill import mixed

#: Learning rates that a baseline may choose from, by validation; ours has one.
RATES = (3e-4, 2e-3)


def tune(model: nn.Module, base: Base) -> nn.Module:
    """The best, by validation AUC, of the model as it is and the tuned one."""
    batches = list(base.batches(base.seed + 1))
    if any(isinstance(module, CompressedEmbedding) for module in model.modules()):
        tuned = copy.deepcopy(model)
        distill(
            tuned,
            base.model,
            batches,
            epochs=base.settings.distill_epochs,
            score=lambda one: evaluate(one, base.data, "valid").auc,
            seed=base.seed,
            progress=False,
        )
        return tuned
    candidates = [model]
    candidates += [_distilled(copy.deepcopy(model), base, batches, rate) for rate in RATES]
    return max(candidates, key=lambda one: evaluate(one, base.data, "valid").auc)


def _distilled(model: nn.Module, base: Base, batches: list, rate: float) -> nn.Module:
    """Plain distillation: the loss, batches and schedule of :func:`mec_embed.distill`."""
    thaw(model)
    model.eval()
    teacher = base.model.eval()
    generator = torch.Generator().manual_seed(base.seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    steps = base.settings.distill_epochs * len(batches)
    for step in range(steps):
        ids, _ = mixed(batches[step % len(batches)], 0.5, generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            target = teacher(ids).sigmoid()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids), target).backward()
        optimizer.step()
    freeze(model)
    return model
