"""A sample of rows by their weights."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows whose weights are worked on at once: arrays of all rows of a large table would take more
#: memory than its codes.
_WEIGHT_ROWS = 1 << 20


def weighted_sample(
    weights: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """About ``size`` rows, and the weights that keep every weighted sum unbiased.

    Poisson sampling with inclusion proportional to weight: heavy rows are always in, with their
    own weight; light ones share one weight.

    Args:
        weights: (n,) positive.
        size: rows wanted; all where there are no more.
        generator: of the draw.

    Returns:
        Row numbers (m,) int64, ascending, on the CPU, and weights (m,).
    """
    rows = len(weights)
    if rows <= size:
        return torch.arange(rows), weights.clone()
    parts = weights.split(_WEIGHT_ROWS)
    level, before = sum(float(part.double().sum()) for part in parts) / size, None
    for _ in range(20):
        if level == before:
            break
        # Rows at or above the level are certain; the others share what is left of the size.
        total, certain = 0.0, rows
        for part in parts:
            light = part[part < level]
            total, certain = total + float(light.double().sum()), certain - len(light)
        level, before = total / max(1, size - certain), level
    chosen, first = [], 0
    for part in parts:
        chance = torch.rand(len(part), generator=generator, dtype=torch.float32).to(part.device)
        chosen.append((chance < (part / level).clamp(max=1)).nonzero()[:, 0] + first)
        first += len(part)
    ids = torch.cat(chosen)
    return ids.cpu(), weights[ids].clamp(min=level)
