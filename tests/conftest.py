"""Models, counts and data that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click_model import ClickModel
from torch import nn

DATA_VARIABLE = "MEC_EMBED_DATA"


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
