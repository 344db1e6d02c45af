"""Small FuxiCTR models on a small click log, for the tests.

FuxiCTR's wheel has the layers, base classes and data loaders, but not its model zoo; the models
here are put together from those as the zoo does.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import (
    CompressedInteractionNet,
    CrossNetV2,
    DIN_Attention,
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    InnerProductInteraction,
    LogisticRegression,
    MLP_Block,
    ScaledDotProductAttention,
)
from fuxictr.pytorch.models import BaseModel, MultiTaskModel
from torch import Tensor, nn

SEED = 7
DATASET = "clicks"
EXAMPLES = {"train": 3000, "valid": 600}
BATCH = 128
DIM, HIDDEN = 16, [32, 16]
#: Row 0 of every table is padding, the last one out-of-vocabulary, as FuxiCTR's tokenizer has it.
VOCAB = {"user": 2000, "item": 3000, "category": 200, "brand": 50, "weekday": 9}
HISTORY_LENGTH = 5
LATENT_DIM, PRETRAIN_DIM = 4, 24
#: Of the pretrained feature; rows after it are words that only the pretrained file has.
PRETRAIN_OOV = 2900
LABELS = ["click", "buy"]

Arrays = dict[str, np.ndarray]


class Ranker(BaseModel):
    """What the models with one label share: embeddings, and a logit that becomes ``y_pred``."""

    def __init__(self, feature_map: FeatureMap, **params: Any) -> None:
        super().__init__(feature_map, **params)
        self.embedding_layer = self.make_embedding()
        self.add_layers()
        self.compile(params["optimizer"], params["loss"], params["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def make_embedding(self) -> nn.Module:
        return FeatureEmbedding(self.feature_map, DIM)

    def mlp(self, inputs: int | None = None, **options: Any) -> MLP_Block:
        """Hidden layers to one logit, by default on the concatenated embeddings."""
        inputs = inputs or self.feature_map.sum_emb_out_dim()
        return MLP_Block(inputs, hidden_units=list(HIDDEN), output_dim=1, **options)

    def add_layers(self) -> None:
        raise NotImplementedError

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        """Logits (B, 1) of a batch of features."""
        raise NotImplementedError

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y_pred": self.output_activation(self.logit(self.get_inputs(inputs)))}


class FM(Ranker):
    """Factorization machine; its first-order weights are tables of dimension 1."""

    def add_layers(self) -> None:
        self.fm = FactorizationMachine(self.feature_map)

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        return self.fm(x, self.embedding_layer(x))


class DeepFM(Ranker):
    """FM plus a network on the same embeddings."""

    def add_layers(self) -> None:
        self.fm = FactorizationMachine(self.feature_map)
        self.network = self.mlp()

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        vectors = self.embedding_layer(x)
        return self.fm(x, vectors) + self.network(vectors.flatten(start_dim=1))


class DCNv2(Ranker):
    """Cross layers beside a network with batch norm."""

    def add_layers(self) -> None:
        inputs = self.feature_map.sum_emb_out_dim()
        self.cross = CrossNetV2(inputs, num_layers=2)
        self.network = MLP_Block(inputs, hidden_units=list(HIDDEN), batch_norm=True)
        self.fc = nn.Linear(inputs + HIDDEN[-1], 1)

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        flat = self.embedding_layer(x, flatten_emb=True)
        return self.fc(torch.cat([self.cross(flat), self.network(flat)], dim=-1))


class XDeepFM(Ranker):
    """Compressed interaction network, linear part and a network with dropout."""

    def add_layers(self) -> None:
        self.linear = LogisticRegression(self.feature_map, use_bias=False)
        self.cin = CompressedInteractionNet(self.feature_map.num_fields, [8, 8])
        self.network = self.mlp(dropout_rates=0.1)

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        vectors = self.embedding_layer(x)
        return self.linear(x) + self.cin(vectors) + self.network(vectors.flatten(start_dim=1))


class SelfAttention(nn.Module):
    """One layer of AutoInt: attention between the fields, with a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.attention = ScaledDotProductAttention()

    def forward(self, vectors: Tensor) -> Tensor:
        """Map field vectors (B, F, dim) to (B, F, dim)."""
        query, key, value = self.project(vectors).chunk(3, dim=-1)
        mixed, _ = self.attention(query, key, value, scale=query.shape[-1] ** 0.5)
        return torch.relu(mixed + vectors)


class AutoInt(Ranker):
    """Self-attention between the fields."""

    def add_layers(self) -> None:
        self.attention = nn.Sequential(SelfAttention(DIM), SelfAttention(DIM))
        self.fc = nn.Linear(self.feature_map.num_fields * DIM, 1)

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        return self.fc(self.attention(self.embedding_layer(x)).flatten(start_dim=1))


class PNN(Ranker):
    """Inner products of all pairs of fields beside the embeddings (it holds a bool parameter)."""

    def add_layers(self) -> None:
        fields = self.feature_map.num_fields
        self.products = InnerProductInteraction(fields, output="inner_product")
        self.network = self.mlp(fields * DIM + fields * (fields - 1) // 2)

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        vectors = self.embedding_layer(x)
        flat = torch.cat([vectors.flatten(start_dim=1), self.products(vectors)], dim=1)
        return self.network(flat)


class DIN(Ranker):
    """The target item attends to the history, whose ids share its table."""

    def make_embedding(self) -> nn.Module:
        return FeatureEmbeddingDict(self.feature_map, DIM)

    def add_layers(self) -> None:
        self.attention = DIN_Attention(DIM, attention_units=[16], hidden_activations="Dice")
        self.network = self.mlp()

    def logit(self, x: dict[str, Tensor]) -> Tensor:
        vectors = self.embedding_layer(x)
        mask = x["history"].long() != 0
        vectors["history"] = self.attention(vectors["item"], vectors["history"], mask)
        return self.network(self.embedding_layer.dict2tensor(vectors, flatten_emb=True))


class MMoE(MultiTaskModel):
    """Mixture of experts with one gate and one tower a label."""

    def __init__(self, feature_map: FeatureMap, experts: int = 3, **params: Any) -> None:
        tasks = len(feature_map.labels)
        task = ["binary_classification"] * tasks
        super().__init__(feature_map, task=task, num_tasks=tasks, **params)
        inputs = feature_map.sum_emb_out_dim()
        self.embedding_layer = FeatureEmbedding(feature_map, DIM)
        self.experts = nn.ModuleList(
            MLP_Block(inputs, hidden_units=list(HIDDEN)) for _ in range(experts)
        )
        self.gates = nn.ModuleList(
            MLP_Block(inputs, output_dim=experts, output_activation="softmax") for _ in range(tasks)
        )
        self.towers = nn.ModuleList(
            MLP_Block(HIDDEN[-1], hidden_units=[8], output_dim=1) for _ in range(tasks)
        )
        self.compile(params["optimizer"], params["loss"], params["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        expert = torch.stack([expert(flat) for expert in self.experts], dim=1)
        parts = zip(self.gates, self.towers, self.output_activation, strict=True)
        outputs = [
            activation(tower((gate(flat).unsqueeze(-1) * expert).sum(dim=1)))
            for gate, tower, activation in parts
        ]
        return {f"{name}_pred": y for name, y in zip(self.feature_map.labels, outputs, strict=True)}


_FLAT = (*VOCAB, "price")
#: Model -> class, features, labels, and what differs from the usual parameters.
_ZOO: dict[str, tuple[type[BaseModel], tuple[str, ...], list[str], dict[str, Any]]] = {
    "FM": (FM, _FLAT, LABELS[:1], {}),
    "DeepFM": (DeepFM, _FLAT, LABELS[:1], {}),
    "DCNv2": (DCNv2, _FLAT, LABELS[:1], {"net_regularizer": 1e-5}),
    "xDeepFM": (XDeepFM, _FLAT, LABELS[:1], {}),
    "AutoInt": (AutoInt, _FLAT, LABELS[:1], {}),
    "PNN": (PNN, _FLAT, LABELS[:1], {}),
    "DIN": (DIN, (*_FLAT, "history"), LABELS[:1], {}),
    "PooledDeepFM": (DeepFM, (*_FLAT, "history"), LABELS[:1], {}),
    "MMoE": (MMoE, _FLAT, LABELS, {}),
    "PretrainedDeepFM": (DeepFM, _FLAT, LABELS[:1], {}),
}
MODELS: tuple[str, ...] = tuple(_ZOO)


def build(name: str, folder: Path) -> nn.Module:
    """A fresh, compiled model; the same name gives the same weights."""
    kind, _, _, special = _ZOO[name]
    _write_files(folder)
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # PretrainedEmbedding draws from it
    params = {
        "model_id": name,
        "model_root": str(folder),
        "optimizer": "adam",
        "loss": "binary_crossentropy",
        "learning_rate": 5e-3,
        "embedding_regularizer": 1e-4,
        "metrics": ["AUC", "logloss"],
        "verbose": 0,
    }
    return kind(feature_map(name, folder), **(params | special))


def feature_map(name: str, folder: Path) -> FeatureMap:
    """The features of a model, as FuxiCTR's ``FeatureProcessor`` describes them."""
    _, features, labels, _ = _ZOO[name]
    found = FeatureMap(DATASET, str(folder / DATASET))
    found.features = OrderedDict((feature, _spec(name, feature)) for feature in features)
    found.labels = labels
    found.default_emb_dim = DIM
    found.num_fields = found.get_num_fields()
    found.total_features = sum(
        spec.get("vocab_size", 1)
        for spec in found.features.values()
        if "share_embedding" not in spec
    )
    found.set_column_index()
    return found


def loader(name: str, folder: Path) -> Any:
    """FuxiCTR's loader of the training data, shuffled."""
    return _loaders(name, folder)[0]


def train(model: Any, name: str, folder: Path, epochs: int = 1) -> None:
    """Train by FuxiCTR's own ``fit``, which ends with the weights of the best epoch."""
    torch.manual_seed(SEED)  # of the shuffling and of dropout
    train_gen, valid_gen = _loaders(name, folder)
    model.fit(train_gen, validation_data=valid_gen, epochs=epochs)


def predict(model: Any, name: str, folder: Path) -> np.ndarray:
    """Probabilities (n,) of the training examples in order; (labels, n) of a multi-task model."""
    _write_files(folder)
    test_gen = RankDataLoader(
        feature_map(name, folder),
        stage="test",
        test_data=str(_file(folder, "train")),
        batch_size=BATCH,
        num_workers=0,
    )
    found = model.predict(test_gen)
    if isinstance(found, dict):
        found = np.stack([found[label] for label in _ZOO[name][2]])
    return np.asarray(found, dtype=np.float64)


def loss(model: Any, name: str, folder: Path) -> float:
    """Mean log loss on the training examples, without regularization."""
    probability = predict(model, name, folder).reshape(len(_ZOO[name][2]), -1)
    truth = np.stack([_examples("train")[label] for label in _ZOO[name][2]]) > 0.5
    likelihood = np.where(truth, probability, 1 - probability)
    return float(-np.log(likelihood.clip(min=1e-7)).mean())


def _loaders(name: str, folder: Path) -> tuple[Any, Any]:
    _write_files(folder)
    return RankDataLoader(
        feature_map(name, folder),
        stage="train",
        train_data=str(_file(folder, "train")),
        valid_data=str(_file(folder, "valid")),
        batch_size=BATCH,
        data_format="npz",
        num_workers=0,
    )


def _spec(name: str, feature: str) -> dict[str, Any]:
    if feature == "price":
        return {"source": "", "type": "numeric"}
    if feature == "history":
        return _history_spec(pooled=name != "DIN")
    spec = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": VOCAB[feature]}
    if name == "PretrainedDeepFM" and feature == "item":
        spec |= {
            "oov_idx": PRETRAIN_OOV,
            "pretrain_dim": PRETRAIN_DIM,
            "pretrained_emb": "pretrained_item.npz",
            "freeze_emb": True,
            "pretrain_usage": "sum",
        }
    return spec


def _history_spec(pooled: bool) -> dict[str, Any]:
    encoder = {"feature_encoder": "layers.MaskedAveragePooling()"} if pooled else {}
    return {
        "source": "",
        "type": "sequence",
        **encoder,
        "share_embedding": "item",
        "padding_idx": 0,
        "max_len": HISTORY_LENGTH,
        "vocab_size": VOCAB["item"],
    }


def _file(folder: Path, split: str) -> Path:
    return folder / DATASET / f"{split}.npz"


def _write_files(folder: Path) -> None:
    """The encoded data, the vocabulary and the pretrained vectors, where they are not there yet."""
    place = folder / DATASET
    if _file(folder, "valid").exists():
        return
    place.mkdir(parents=True, exist_ok=True)  # fit() writes its checkpoints there too
    vocab = {name: _words(name, rows) for name, rows in VOCAB.items()}
    (place / "feature_vocab.json").write_text(json.dumps(vocab))
    keys = [word for word in vocab["item"] if word.startswith("item")]
    values = _pretrained()[[vocab["item"][word] for word in keys]]
    np.savez(place / "pretrained_item.npz", key=np.array(keys), value=values)
    for split in EXAMPLES:
        np.savez(_file(folder, split), **_examples(split))


def _words(name: str, rows: int) -> dict[str, int]:
    """Word -> row, with FuxiCTR's two special words."""
    oov = PRETRAIN_OOV if name == "item" else rows - 1
    words = {f"{name}_{row}": row for row in range(1, rows) if row != oov}
    return words | {"__PAD__": 0, "__OOV__": oov}


@cache
def _item_vectors() -> np.ndarray:
    """What the planted model knows of every item: (rows, LATENT_DIM)."""
    return np.random.default_rng(SEED + 1).standard_normal((VOCAB["item"], LATENT_DIM))


def _pretrained() -> np.ndarray:
    """Pretrained item vectors (rows, PRETRAIN_DIM) that know the planted ones up to some noise."""
    rng = np.random.default_rng(SEED + 2)
    known = _item_vectors() @ rng.standard_normal((LATENT_DIM, PRETRAIN_DIM))
    return 0.1 * (known + 0.3 * rng.standard_normal(known.shape))


def _examples(split: str) -> Arrays:
    start = 0 if split == "train" else EXAMPLES["train"]
    chosen = slice(start, start + EXAMPLES[split])
    return {name: values[chosen] for name, values in _all_examples().items()}


@cache
def _all_examples() -> Arrays:
    """Features and labels of every example, encoded as FuxiCTR encodes them."""
    rng = np.random.default_rng(SEED)
    count = sum(EXAMPLES.values())
    columns = {name: _zipf(rng, rows, count) for name, rows in VOCAB.items()}
    columns["price"] = rng.standard_normal(count)
    history = _zipf(rng, VOCAB["item"], (count, HISTORY_LENGTH))
    lengths = rng.integers(0, HISTORY_LENGTH + 1, (count, 1))
    columns["history"] = np.where(np.arange(HISTORY_LENGTH) < lengths, history, 0)
    for label in LABELS:
        probability = 1 / (1 + np.exp(-_planted_logit(rng, columns)))
        columns[label] = (rng.random(count) < probability).astype(np.float64)
    return columns


def _zipf(rng: np.random.Generator, rows: int, shape: int | tuple[int, ...]) -> np.ndarray:
    """Ids in [1, rows) whose frequency falls with the id."""
    cumulative = np.cumsum(1 / np.arange(1, rows))
    return 1 + np.searchsorted(cumulative, rng.random(shape) * cumulative[-1], side="right")


def _planted_logit(rng: np.random.Generator, columns: Arrays) -> np.ndarray:
    """First-order weights, the price, user times item, and history times item: (n,)."""
    vectors = _item_vectors()
    first = sum(rng.standard_normal(rows)[columns[name]] for name, rows in VOCAB.items())
    user = rng.standard_normal((VOCAB["user"], LATENT_DIM))[columns["user"]]
    seen = (vectors[columns["history"]] * (columns["history"] != 0)[..., None]).mean(axis=1)
    pairs = ((user + 2 * seen) * vectors[columns["item"]]).sum(axis=1)
    return 0.7 * (first + columns["price"]) + 0.3 * pairs - 0.5
