"""Models of Torch-RecHub on a small planted click log, trained by the package's trainers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.models.ranking import DCN, DIN, DeepFM, WideDeep
from torch_rechub.trainers import CTRTrainer, MTLTrainer
from torch_rechub.utils.data import DataGenerator, PredictDataset

MODELS = ("WideDeep", "DeepFM", "DCN", "DIN", "MMOE")
EXAMPLES, DIM, BATCH = 3000, 16, 64
ROWS = {"city": 50, "category": 200, "user": 2000, "item": 3000}
HISTORY = 8
TASKS = ["classification", "classification"]

Feature = SparseFeature | SequenceFeature | DenseFeature


def build(name: str, folder: Path) -> nn.Module:
    """A fresh model; the same weights each time. Leaves nothing in ``folder``."""
    torch.manual_seed(0)
    # The package keeps a table on the feature object, so two models must not share the features.
    user, item, history, price = _features()
    mlp = {"dims": [64, 32]}
    if name == "WideDeep":
        return WideDeep([*user, price], [*user, item], mlp)
    if name == "DeepFM":
        return DeepFM([*user, item, price], [*user, item], mlp)
    if name == "DCN":
        return DCN([*user, item, price], n_cross_layers=2, mlp_params=mlp)
    if name == "DIN":
        return DIN(user, [history], [item], mlp, attention_mlp_params={"dims": [16]})
    return MMOE([*user, item, price], TASKS, 2, mlp, [{"dims": [16]} for _ in TASKS])


def inputs(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """An array for each feature, and labels (n,), or (n, tasks) for MMOE."""
    log, labels = _log()
    names = [*ROWS, "hist_item"] if name == "DIN" else [*ROWS, "price"]
    x = {feature: log[feature].copy() for feature in names}
    return x, (labels if name == "MMOE" else labels[:, 0]).copy()


def loader(name: str, shuffle: bool = False) -> DataLoader[Any]:
    """The package's loader of (features by name, labels)."""
    x, y = inputs(name)
    generator = DataGenerator(x, y)
    shuffled, ordered, _ = generator.generate_dataloader(
        x_val=x, y_val=y, x_test=x, y_test=y, batch_size=BATCH
    )
    return shuffled if shuffle else ordered


def trainer(model: nn.Module, name: str, folder: Path) -> CTRTrainer | MTLTrainer:
    """A trainer with its optimizer; it writes the model's state to ``folder``."""
    options = {"regularization_params": {"embedding_l2": 1e-5}, "model_path": str(folder)}
    if name == "MMOE":
        return MTLTrainer(model, TASKS, **options)
    return CTRTrainer(model, **options)


def train(
    model: nn.Module,
    name: str,
    folder: Path,
    epochs: int = 1,
    trainer: CTRTrainer | MTLTrainer | None = None,
) -> None:
    """Train with ``trainer.fit``, or a new trainer's; the same order of examples at each call."""
    trainer = trainer or _trainer(model, name, folder)
    trainer.n_epoch = epochs
    torch.manual_seed(0)  # the loader shuffles by the global generator
    if name == "MMOE":  # validation is not optional here
        trainer.fit(loader(name, shuffle=True), loader(name))
    else:
        trainer.fit(loader(name, shuffle=True))


def predict(model: nn.Module, name: str, folder: Path) -> np.ndarray:
    """Probabilities (n, tasks), float64, by the trainer's ``predict``."""
    data: DataLoader[Any] = loader(name)
    if name == "MMOE":  # this trainer wants batches without labels
        data = DataLoader(PredictDataset(inputs(name)[0]), batch_size=BATCH)
    found = np.array(_trainer(model, name, folder).predict(model, data), np.float64)
    return found.reshape(len(found), -1)


def loss(model: nn.Module, name: str, folder: Path) -> float:
    """Mean log loss on the training data, in evaluation mode, without regularization."""
    _, y = inputs(name)
    p = np.clip(predict(model, name, folder), 1e-7, 1 - 1e-7)
    y = y.reshape(p.shape)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


_trainer = trainer  # ``train`` has an argument of this name


def _features() -> tuple[list[SparseFeature], SparseFeature, SequenceFeature, DenseFeature]:
    """Fields of the user, the item, the history of items, and the price."""
    user = [SparseFeature(name, ROWS[name], DIM) for name in ROWS if name != "item"]
    # DIN's attention has no mask: it counts on a zero row for the padding.
    item = SparseFeature("item", ROWS["item"], DIM, padding_idx=0)
    history = SequenceFeature(
        "hist_item", ROWS["item"], DIM, pooling="concat", shared_with="item", padding_idx=0
    )
    return user, item, history, DenseFeature("price")


@cache
def _log() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All features and the labels (n, 2) of a planted model."""
    rng = np.random.default_rng(0)
    log = {name: _zipf(rng, rows, (EXAMPLES,)) for name, rows in ROWS.items()}
    log["price"] = rng.normal(size=EXAMPLES).astype(np.float32)
    lengths = rng.integers(HISTORY + 1, size=(EXAMPLES, 1))
    history = _zipf(rng, ROWS["item"], (EXAMPLES, HISTORY))
    log["hist_item"] = np.where(np.arange(HISTORY) < lengths, history, 0)
    return log, _labels(rng, log)


def _zipf(rng: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Zipf ids in [1, rows)."""
    chances = 1 / np.arange(1, rows)
    return 1 + rng.choice(rows - 1, size=shape, p=chances / chances.sum())


def _labels(rng: np.random.Generator, log: dict[str, np.ndarray]) -> np.ndarray:
    """Each id has a weight; users and items, and items and histories, interact too."""
    logit = 0.5 * log["price"] + sum(rng.normal(size=rows)[log[n]] for n, rows in ROWS.items())
    users, items = rng.normal(size=(ROWS["user"], 2)), rng.normal(size=(ROWS["item"], 2))
    items[0] = 0
    history = items[log["hist_item"]].mean(1)
    logit += ((users[log["user"]] + history) * items[log["item"]]).sum(1)
    logits = np.stack([logit, logit + rng.normal(size=ROWS["category"])[log["category"]] - 1], 1)
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
