"""The models of the suite by name, and the settings of data sets beside those of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from examples.ctr.data import ClickData
from examples.ctr.models import DNN, DeepFM
from examples.ctr.settings import SETTINGS, Settings

#: Frappe's as published for DeepFM by BARS (openbenchmark.github.io), but for the patience.
STUDY_SETTINGS = SETTINGS | {
    "frappe_x1": Settings(
        hidden=(400, 400, 400),
        l2=0.05,
        dim=10,
        dropout=0.2,
        batch_norm=True,
        batch_size=4096,
        epochs=40,
        min_count=1,
    ),
    "movielenslatest_x1_test": Settings(hidden=(200, 100), l2=1e-3, dim=10, batch_size=2048),
}


class DCNv2(DNN):
    """DCN V2 (Wang et al., 2021): a parallel cross network and MLP on the same embeddings."""

    def __init__(
        self,
        fields: Sequence[str],
        rows: Sequence[int],
        dim: int = 40,
        hidden: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
        layers: int = 3,
    ) -> None:
        super().__init__(fields, rows, dim, hidden, dropout, batch_norm)
        width = len(fields) * dim
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids (B, F) to float logits (B,)."""
        columns = zip(self.embeddings.values(), ids.unbind(dim=1), strict=True)
        start = torch.cat([table(column) for table, column in columns], dim=1)
        crossed = start
        for layer in self.cross:
            crossed = start * layer(crossed) + crossed
        return (self.head(crossed) + self.mlp(start)).squeeze(1)


MODELS: dict[str, type[DNN]] = {"DNN": DNN, "DeepFM": DeepFM, "DCNv2": DCNv2}


def settings_for(data: str, dim: int | None) -> Settings:
    """Settings of a data set, with another embedding dimension where one is given."""
    settings = STUDY_SETTINGS[data]
    return settings if dim is None else replace(settings, dim=dim)


def build(name: str, data: ClickData, settings: Settings, seed: int) -> nn.Module:
    """An untrained model; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return MODELS[name](
        data.fields,
        data.rows,
        settings.dim,
        settings.hidden,
        settings.dropout,
        settings.batch_norm,
    )
