"""Training with early stopping, and evaluation by AUC and log loss."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.ctr.data import ClickData
from examples.ctr.settings import Settings

EVALUATION_BATCH = 16384


@dataclass(frozen=True)
class Metrics:
    """Area under the ROC curve and mean log loss (natural logarithm)."""

    auc: float
    logloss: float


def train(
    model: nn.Module,
    data: ClickData,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 8192,
    l2: float = 1e-3,
    patience: int = 2,
    lr_decay: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> list[Metrics]:
    """Train with Adam until the validation AUC has not risen for ``patience`` epochs.

    After each such epoch the learning rate is multiplied by ``lr_decay``.

    The loss is the mean log loss of the batch plus ``l2 / 2`` times the squared norm of every
    ``nn.Embedding`` table, as in FuxiCTR; other modules, such as compressed tables, carry no
    penalty. The model ends in the state of its best epoch and in evaluation mode.

    Returns:
        Validation metrics after each epoch.
    """
    torch.manual_seed(seed)  # dropout draws from the global generator
    optimizer = _optimizer(model, lr, l2)
    history: list[Metrics] = []
    best_auc, best_state, stale = -1.0, {}, 0
    for epoch in range(epochs):
        batches = iterate_batches(data, "train", batch_size, shuffle=True, seed=1000 * seed + epoch)
        steps = -(-len(data.labels["train"]) // batch_size)
        bar = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=not progress)
        _train_epoch(model, optimizer, bar)
        history.append(evaluate(model, data, "valid"))
        if history[-1].auc > best_auc:
            best_auc, best_state, stale = history[-1].auc, copy.deepcopy(model.state_dict()), 0
        else:
            stale += 1
            for group in optimizer.param_groups:
                group["lr"] *= lr_decay
        if stale >= patience:
            break
    model.load_state_dict(best_state)
    model.eval()
    return history


def train_with(
    settings: Settings, model: nn.Module, data: ClickData, seed: int = 0
) -> list[Metrics]:
    """`train` with the values of a data set's settings."""
    return train(
        model,
        data,
        epochs=settings.epochs,
        lr=settings.lr,
        batch_size=settings.batch_size,
        l2=settings.l2,
        patience=settings.patience,
        lr_decay=settings.lr_decay,
        seed=seed,
    )


def evaluate(model: nn.Module, data: ClickData, split: str) -> Metrics:
    """Metrics of the model on one split; leaves the model in evaluation mode."""
    model.eval()
    batches = iterate_batches(data, split, EVALUATION_BATCH, shuffle=False)
    with torch.no_grad():
        logits = torch.cat([model(ids) for ids, _ in batches]).double()
    labels = data.labels[split]
    logloss = nn.functional.binary_cross_entropy_with_logits(logits, labels.double()).item()
    return Metrics(auc(labels.numpy(), logits.numpy()), logloss)


def iterate_batches(
    data: ClickData, split: str, batch_size: int, shuffle: bool, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield int64 ids (B, F) and float32 labels (B,); the last batch may be smaller."""
    ids, labels = data.ids[split], data.labels[split]
    if not shuffle:
        yield from zip(ids.split(batch_size), labels.split(batch_size), strict=True)
        return
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(batch_size):
        yield ids[chosen], labels[chosen]


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Exact area under the ROC curve of scores (n,) for 0/1 labels (n,); ties count one half."""
    _, inverse, repeats = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(repeats) - (repeats - 1) / 2)[inverse]
    positive = labels > 0.5
    n_positive = int(positive.sum())
    n_negative = len(labels) - n_positive
    pairs_won = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(pairs_won / (n_positive * n_negative))


def _optimizer(model: nn.Module, lr: float, l2: float) -> torch.optim.Optimizer:
    """Adam with L2 on the embedding tables only."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    is_table = {id(weight) for weight in tables}
    rest = [weight for weight in model.parameters() if id(weight) not in is_table]
    # Adam's weight_decay adds l2 * weight to the gradient, which is the gradient of the penalty.
    groups = [{"params": tables, "weight_decay": l2}, {"params": rest}]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=lr, fused=True)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> None:
    """One optimiser step a batch."""
    model.train()
    for ids, labels in batches:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(ids), labels).backward()
        optimizer.step()
