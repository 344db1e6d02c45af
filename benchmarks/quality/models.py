"""The models of the suite by name, and the settings of data sets beside those of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.quality.big_generator import GENERATOR_SETTINGS
from benchmarks.quality.configs import FUXICTR_SETTINGS
from examples.ctr.data import ClickData
from examples.ctr.models import DNN, DeepFM
from examples.ctr.settings import SETTINGS, Settings

#: Ends the name of a data set in which ids seen once have rows of their own.
ALL_IDS = "_all_ids"
STUDY_SETTINGS = {
    **SETTINGS,
    **FUXICTR_SETTINGS,
    **GENERATOR_SETTINGS,
    "frappe_x1": FUXICTR_SETTINGS["Frappe_x1"],
    f"criteo_dac80k{ALL_IDS}": replace(SETTINGS["criteo_dac80k"], min_count=1),
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
        start = _vectors(self, ids).flatten(1)
        crossed = start
        for layer in self.cross:
            crossed = start * layer(crossed) + crossed
        return (self.head(crossed) + self.mlp(start)).squeeze(1)


class GDCN(DCNv2):
    """GDCN-P (Wang et al., 2023): DCN V2 whose cross layers are gated, entry by entry."""

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
        super().__init__(fields, rows, dim, hidden, dropout, batch_norm, layers)
        width = len(fields) * dim
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids (B, F) to float logits (B,)."""
        start = _vectors(self, ids).flatten(1)
        crossed = start
        for layer, gate in zip(self.cross, self.gates, strict=True):
            crossed = start * layer(crossed) * gate(crossed).sigmoid() + crossed
        return (self.head(crossed) + self.mlp(start)).squeeze(1)


class PNN(DNN):
    """IPNN (Qu et al., 2016): an MLP on the embeddings and the inner products of all field pairs.

    Its arguments are those of `DNN`.
    """

    def __init__(
        self,
        fields: Sequence[str],
        rows: Sequence[int],
        dim: int = 40,
        hidden: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(fields, rows, dim, hidden, dropout, batch_norm)
        pairs = len(fields) * (len(fields) - 1) // 2
        first = self.mlp[0]
        self.mlp[0] = nn.Linear(first.in_features + pairs, first.out_features)

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids (B, F) to float logits (B,)."""
        vectors = _vectors(self, ids)
        fields = vectors.shape[1]
        first, second = torch.triu_indices(fields, fields, offset=1, device=ids.device)
        products = (vectors @ vectors.mT)[:, first, second]
        return self.mlp(torch.cat([vectors.flatten(1), products], dim=1)).squeeze(1)


MODELS: dict[str, type[DNN]] = {
    "DNN": DNN,
    "DeepFM": DeepFM,
    "DCNv2": DCNv2,
    "GDCN": GDCN,
    "PNN": PNN,
}


def settings_for(data: str, dim: int | None) -> Settings:
    """Settings of a data set, with another embedding dimension where one is given."""
    settings = STUDY_SETTINGS[data]
    return settings if dim is None else replace(settings, dim=dim)


def build(name: str, data: ClickData, settings: Settings, seed: int) -> nn.Module:
    """An untrained model; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    model = MODELS[name](
        data.fields,
        data.rows,
        settings.dim,
        settings.hidden,
        settings.dropout,
        settings.batch_norm,
    )
    if settings.fuxictr_init:
        model.apply(_draw_as_fuxictr)
    return model


def _draw_as_fuxictr(module: nn.Module) -> None:
    """Initial values that BARS's figures were trained from."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1e-4)
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _vectors(model: DNN, ids: Tensor) -> Tensor:
    """Field vectors (B, F, dim) of int64 ids (B, F)."""
    columns = zip(model.embeddings.values(), ids.unbind(dim=1), strict=True)
    return torch.stack([table(column) for table, column in columns], dim=1)
