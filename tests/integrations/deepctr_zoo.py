"""Models of DeepCTR-Torch on a small planted click log, used as their documentation does."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from deepctr_torch import models
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat, get_feature_names
from torch import nn

MODELS = (
    "DeepFM",
    "xDeepFM",
    "DCN",
    "DCNMix",
    "AutoInt",
    "DIN",
    "DIEN",
    "MMOE",
    "WDL",
    "ONN",
)
EXAMPLES, DIM, BATCH = 3000, 16, 32
ROWS = {"city": 50, "category": 200, "user": 2000, "item": 3000}
TAG_ROWS, TAGS, HISTORY = 100, 4, 8
TASKS = ("click", "buy")

#: Positional arguments are the columns, once for each part of the network.
_TWO_PARTS = {"DeepFM", "xDeepFM", "DCN", "DCNMix", "AutoInt", "WDL", "ONN"}
_SEQUENCES = {"DIN": ("hist_item",), "DIEN": ("hist_item", "neg_hist_item")}
_OPTIONS = {
    "xDeepFM": {"cin_layer_size": (16, 16)},
    "DCNMix": {"low_rank": 8, "num_experts": 2},
    "AutoInt": {"att_layer_num": 2},
    "DIN": {"history_feature_list": ["item"], "att_hidden_size": (16, 8)},
    "DIEN": {
        "history_feature_list": ["item"],
        "att_hidden_units": (16, 8),
        "use_negsampling": True,
        "gru_type": "AUGRU",
    },
    "MMOE": {"expert_dnn_hidden_units": (64, 32), "task_names": TASKS},
}


def build(name: str, folder: Path) -> nn.Module:
    """A fresh, compiled model; the same weights each time. Leaves nothing in ``folder``."""
    columns = _columns(name)
    options = {"l2_reg_embedding": 1e-5, **_OPTIONS.get(name, {})}
    if name not in ("AutoInt", "DIN", "DIEN"):  # these have no such option
        options["l2_reg_linear"] = 1e-5
    if name != "MMOE":
        options["dnn_hidden_units"] = (64, 32)
    parts = [columns, columns] if name in _TWO_PARTS else [columns]
    model = getattr(models, name)(*parts, **options)
    loss = "binary_crossentropy"
    model.compile("adam", [loss] * len(TASKS) if name == "MMOE" else loss)
    return model


def inputs(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What ``fit`` takes: an array for each feature, and labels (n,), or (n, tasks) for MMOE."""
    log, labels = _log()
    x = {feature: log[feature].copy() for feature in get_feature_names(_columns(name))}
    return x, (labels if name == "MMOE" else labels[:, 0]).copy()


def train(model: nn.Module, name: str, folder: Path, epochs: int = 1) -> None:
    """Train with the package's ``fit``; the order of the examples is the same at each call."""
    x, y = inputs(name)
    torch.manual_seed(0)  # fit shuffles by the global generator
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)


def predict(model: nn.Module, name: str, folder: Path) -> np.ndarray:
    """Probabilities (n, tasks), float64, by the package's ``predict``."""
    found = model.predict(inputs(name)[0], batch_size=1024)
    return found.reshape(len(found), -1).astype(np.float64)


def loss(model: nn.Module, name: str, folder: Path) -> float:
    """Mean log loss on the training data, in evaluation mode, without regularization."""
    _, y = inputs(name)
    p = np.clip(predict(model, name, folder), 1e-7, 1 - 1e-7)
    y = y.reshape(p.shape)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


def _columns(name: str) -> list[SparseFeat | VarLenSparseFeat | DenseFeat]:
    columns = [SparseFeat(feature, rows, DIM) for feature, rows in ROWS.items()]
    for feature in _SEQUENCES.get(name, ()):
        shared = SparseFeat(feature, ROWS["item"], DIM, embedding_name="item")
        columns.append(VarLenSparseFeat(shared, HISTORY, length_name="hist_length"))
    if name == "DeepFM":  # no length: 0 is padding
        columns.append(VarLenSparseFeat(SparseFeat("tags", TAG_ROWS, DIM), TAGS, "mean"))
    return [*columns, DenseFeat("price", 1)]


@cache
def _log() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All features and the labels (n, 2) of a planted model."""
    rng = np.random.default_rng(0)
    log = {name: _zipf(rng, rows, (EXAMPLES,)) for name, rows in ROWS.items()}
    log["price"] = rng.normal(size=EXAMPLES).astype(np.float32)
    tags = _zipf(rng, TAG_ROWS, (EXAMPLES, TAGS))
    log["tags"] = _padded(tags, rng.integers(TAGS + 1, size=EXAMPLES))
    log["hist_length"] = rng.integers(HISTORY + 1, size=EXAMPLES)
    for name in ("hist_item", "neg_hist_item"):
        log[name] = _padded(_zipf(rng, ROWS["item"], (EXAMPLES, HISTORY)), log["hist_length"])
    return log, _labels(rng, log)


def _zipf(rng: np.random.Generator, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Zipf ids in [1, rows)."""
    chances = 1 / np.arange(1, rows)
    return 1 + rng.choice(rows - 1, size=shape, p=chances / chances.sum())


def _padded(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 0)


def _labels(rng: np.random.Generator, log: dict[str, np.ndarray]) -> np.ndarray:
    """Each id has a weight; users and items, and items and histories, interact too."""
    logit = 0.5 * log["price"] + sum(rng.normal(size=rows)[log[n]] for n, rows in ROWS.items())
    users, items = rng.normal(size=(ROWS["user"], 2)), rng.normal(size=(ROWS["item"], 2))
    items[0] = 0
    history = items[log["hist_item"]].mean(1)
    logit += ((users[log["user"]] + history) * items[log["item"]]).sum(1)
    logits = np.stack([logit, logit + rng.normal(size=ROWS["category"])[log["category"]] - 1], 1)
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
