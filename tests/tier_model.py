"""A model whose tables go into tiers, and the counts that make them do so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mec_embed import CompressionConfig, CompressionReport, compress, ops

ROWS, FEW = 4000, 1500
#: Tables that go into tiers, each once.
TIERED = ("shuffled", "first", "sorted", "tags")


class Shop(nn.Module):
    """Shared, paired, padded and bagged tables of shuffled and of sorted rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffled = nn.Embedding(ROWS, 16, padding_idx=0)
        self.again = self.shuffled
        self.first = nn.Embedding(ROWS, 1)
        self.sorted = nn.Embedding(FEW, 16)
        self.tags = nn.EmbeddingBag(FEW, 16, mode="sum", padding_idx=3)
        self.small = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, 3)."""
        a, b, c = ids.unbind(1)
        x = self.shuffled(a) + self.again(b) + self.sorted(b % FEW) + self.tags(ids % FEW)
        return (self.out(x + self.small(c % 50)) + self.first(c))[:, 0]


def counts() -> dict[str, np.ndarray]:
    """Zipf counts; rows of ``shuffled`` and ``first`` are in no order of popularity."""
    zipf = (1e6 / np.arange(1, ROWS + 1) ** 1.6).astype(np.int64)
    mixed = np.random.default_rng(0).permutation(zipf)
    return {"shuffled": mixed, "first": mixed, "sorted": zipf[:FEW], "tags": zipf[:FEW]}


def config(dtype: str | None = None, ratio: float | None = 40, **options: Any) -> CompressionConfig:
    """At ratio 40, rows that are not popular become one; at 20 they get codes."""
    return CompressionConfig(**{"ratio": ratio, "codebook_dtype": dtype, "epochs": 0, **options})


def shop(
    dtype: str | None = None, ratio: float | None = 40, optimizer: Any = None
) -> tuple[Shop, Shop, CompressionReport]:
    """The model before and after, and the report."""
    torch.manual_seed(0)
    dense, model = Shop(), Shop()
    model.load_state_dict(dense.state_dict())
    made = optimizer(model.parameters()) if optimizer else None
    report = compress(model, counts(), config(dtype, ratio), optimizer=made, progress=False)
    return dense, model, report


def ids(batch: int = 200, seed: int = 0) -> Tensor:
    """Ids (batch, 3), some of them padding."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(ROWS, (batch, 3), generator=generator)
    return drawn.masked_fill(torch.rand(batch, 3, generator=generator) < 0.05, 0)


def arguments_of(module: Any, ids: Tensor, *books: Tensor) -> tuple[Any, ...]:
    """Those of the operator, for a lookup by a module in tiers; ``books`` are other codebooks."""
    found: list[tuple[Any, ...]] = []

    def take(*arguments: Any) -> Tensor:
        found.append(arguments)
        return torch.empty(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "tiered", take)
        module._decode(ids)
    (arguments,) = found
    if books:
        arguments = (*arguments[:5], books[0], *arguments[6:8], books[1], *arguments[9:])
    return arguments
