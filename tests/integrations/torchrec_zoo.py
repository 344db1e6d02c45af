"""Small TorchRec models on planted data, for the tests of the integration; needs torchrec."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

WEIGHTED = "EmbeddingBagCollection weighted"
SHARED = "EmbeddingBagCollection shared"
MODELS = ("EmbeddingBagCollection", WEIGHTED, SHARED, "EmbeddingCollection", "DLRM")

#: Feature -> rows of its table.
ROWS = {"device": 50, "city": 200, "brand": 2000, "item": 3000}
DIM = 16
DENSE = 4
MAX_IDS = 5
EXAMPLES = 3000
BATCH = 100


class PooledModel(nn.Module):
    """A perceptron on the pooled features of an EmbeddingBagCollection and the dense ones."""

    def __init__(self, collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.collection = collection
        self.network = _network(len(ROWS) * DIM + DENSE)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (batch,)."""
        pooled = self.collection(batch.sparse_features).values()
        return self.network(torch.cat([pooled, batch.dense_features], 1)).squeeze(1)


class SequenceModel(nn.Module):
    """A GRU over the padded sequences of an EmbeddingCollection."""

    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__()
        self.collection = collection
        self.gru = nn.GRU(len(ROWS) * DIM, DIM, batch_first=True)
        self.network = _network(DIM + DENSE)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (batch,)."""
        jagged = self.collection(batch.sparse_features)
        steps = [jagged[feature].to_padded_dense(MAX_IDS) for feature in ROWS]
        _, last = self.gru(torch.cat(steps, 2))
        return self.network(torch.cat([last[0], batch.dense_features], 1)).squeeze(1)


class DlrmModel(nn.Module):
    """TorchRec's DLRM, called with a batch."""

    def __init__(self, collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.dlrm = DLRM(collection, DENSE, [32, DIM], [32, 1])

    def forward(self, batch: Batch) -> Tensor:
        """Logits (batch,)."""
        return self.dlrm(batch.dense_features, batch.sparse_features).squeeze(1)


def build(name: str, folder: Path) -> nn.Module:
    """A fresh model; equal at every call."""
    torch.manual_seed(0)
    if name == "EmbeddingCollection":
        tables = [EmbeddingConfig(ROWS[f], DIM, f"t_{f}", feature_names=[f]) for f in ROWS]
        return SequenceModel(EmbeddingCollection(tables))
    if name == SHARED:
        shared = EmbeddingBagConfig(
            ROWS["item"],
            DIM,
            "t_shared",
            feature_names=["brand", "item"],
            pooling=PoolingType.MEAN,
        )
        return PooledModel(EmbeddingBagCollection([*_bags("device", "city"), shared]))
    collection = EmbeddingBagCollection(_bags(*ROWS), is_weighted=name == WEIGHTED)
    return DlrmModel(collection) if name == "DLRM" else PooledModel(collection)


def batches(name: str) -> list[Batch]:
    """The data as TorchRec's batches; ids carry weights where the model is weighted."""
    data = _data()
    return [_batch(data, slice(i, i + BATCH), name == WEIGHTED) for i in range(0, EXAMPLES, BATCH)]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that every model trains with."""
    return _adam(model)


def train(
    model: nn.Module,
    name: str,
    folder: Path,
    epochs: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Some epochs of plain PyTorch training."""
    optimizer = _adam(model) if optimizer is None else optimizer
    model.train()
    for _ in range(epochs):
        for batch in batches(name):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
            optimizer.step()


def predict(model: nn.Module, name: str, folder: Path) -> np.ndarray:
    """Click probabilities of all examples, float64."""
    return torch.sigmoid(_logits(model, name)).numpy()


def loss(model: nn.Module, name: str, folder: Path) -> float:
    """Mean log loss over all examples."""
    labels = torch.cat([batch.labels for batch in batches(name)])
    return binary_cross_entropy_with_logits(_logits(model, name), labels.double()).item()


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-6)


def _logits(model: nn.Module, name: str) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches(name)]).double()


def _network(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 1))


def _bags(*features: str) -> list[EmbeddingBagConfig]:
    """Tables with sum pooling, the one mode of nn.EmbeddingBag that takes weights."""
    return [EmbeddingBagConfig(ROWS[f], DIM, f"t_{f}", feature_names=[f]) for f in features]


@cache
def _data() -> dict[str, np.ndarray]:
    """Dense features (n, DENSE), labels (n,), and ids, weights and lengths of every bag."""
    rng = np.random.default_rng(0)
    data = {"dense": rng.standard_normal((EXAMPLES, DENSE)).astype(np.float32)}
    logit = data["dense"] @ rng.normal(0, 0.3, DENSE)
    effects = rng.standard_normal(max(ROWS.values()))
    for feature, rows in ROWS.items():
        lengths = rng.integers(0, MAX_IDS + 1, EXAMPLES)
        ids = rng.zipf(1.5, int(lengths.sum())) % rows
        weights = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)
        logit += np.bincount(np.arange(EXAMPLES).repeat(lengths), effects[ids], EXAMPLES) / 2
        data |= {f"{feature} ids": ids, f"{feature} weights": weights}
        data[f"{feature} lengths"] = lengths
    logit -= logit.mean()
    data["labels"] = (rng.random(EXAMPLES) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return data


def _batch(data: dict[str, np.ndarray], chosen: slice, weighted: bool) -> Batch:
    parts: dict[str, list[np.ndarray]] = {"ids": [], "weights": [], "lengths": []}
    for feature in ROWS:
        lengths = data[f"{feature} lengths"]
        first = int(lengths[: chosen.start].sum())
        values = slice(first, first + int(lengths[chosen].sum()))
        parts["ids"].append(data[f"{feature} ids"][values])
        parts["weights"].append(data[f"{feature} weights"][values])
        parts["lengths"].append(lengths[chosen])
    ids, weights, lengths = (torch.from_numpy(np.concatenate(part)) for part in parts.values())
    sparse = KeyedJaggedTensor(list(ROWS), ids, weights if weighted else None, lengths)
    dense, labels = (torch.from_numpy(data[key][chosen]) for key in ("dense", "labels"))
    return Batch(dense, sparse, labels)
