"""Models, counts and data that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

DATA_VARIABLE = "MEC_EMBED_DATA"


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


@pytest.fixture
def click_model() -> ClickModel:
    """A seeded click model."""
    torch.manual_seed(0)
    return ClickModel()


@pytest.fixture
def click_counts(click_model: ClickModel) -> dict[str, np.ndarray]:
    """Zipf counts for every table of ``click_model``."""
    counts = {}
    for name, module in click_model.named_modules():
        if isinstance(module, nn.Embedding):
            counts[name] = 1 + 10_000 // (1 + np.arange(module.num_embeddings))
    return counts


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set: no real data here")
    return Path(folder)
