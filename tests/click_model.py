"""A small click model that several tests share."""

from __future__ import annotations

import torch
from torch import nn


class ClickModel(nn.Module):
    """Two fields with vector and first-order tables, and a small network."""

    def __init__(self, rows: tuple[int, ...] = (3000, 800), dim: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({f"f{i}": nn.Embedding(n, dim) for i, n in enumerate(rows)})
        self.first_order = nn.ModuleDict({f"f{i}": nn.Embedding(n, 1) for i, n in enumerate(rows)})
        self.mlp = nn.Sequential(nn.Linear(len(rows) * dim, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch,) of ids (batch, fields)."""
        columns = ids.unbind(1)
        vectors = [t(c) for t, c in zip(self.embeddings.values(), columns, strict=True)]
        first = [t(c) for t, c in zip(self.first_order.values(), columns, strict=True)]
        return (self.mlp(torch.cat(vectors, 1)) + sum(first))[:, 0]
