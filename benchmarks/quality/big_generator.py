"""The built-in generator with as many ids as Criteo has, and a training that can afford them.

Dense Adam reads and writes every row, and two moments of it, at every step. Here only the rows of
a batch move, as in practice; rows that no training example uses keep their initial values.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.common import tables
from examples.ctr.data import ClickData
from examples.ctr.generator import generate
from examples.ctr.settings import Settings
from examples.ctr.training import Metrics, evaluate, iterate_batches

FIELDS, MIN_ROWS = 26, 4
#: Examples an id, and at most: more do not fit beside the studies.
EXAMPLES_PER_ID, MOST_EXAMPLES = 2, 3_000_000

#: Ids of all fields together.
TOTAL_IDS = {"generator_1m": 1_000_000, "generator_10m": 10_000_000}
#: Chosen by the validation AUC of generator_1m. One epoch is best; the second is there to see it.
CHOSEN = Settings(hidden=(64,), l2=5e-5, batch_size=1024, epochs=2, patience=1, distill_epochs=1)
GENERATOR_SETTINGS: dict[str, Settings] = {name: CHOSEN for name in TOTAL_IDS}


def generate_ids(total_ids: int, examples: int | None = None, seed: int = 0) -> ClickData:
    """The built-in generator with about ``total_ids`` rows in its 26 fields together.

    Args:
        total_ids: rows of all fields; what comes differs by rounding.
        examples: examples in all; default: two an id, 3 million at most.
        seed: seed of everything drawn.
    """
    if total_ids < FIELDS * MIN_ROWS:
        raise ValueError(f"{FIELDS} fields have {FIELDS * MIN_ROWS} ids at least, not {total_ids}")
    return generate(
        examples=examples or min(EXAMPLES_PER_ID * total_ids, MOST_EXAMPLES),
        fields=FIELDS,
        max_rows=_max_rows(total_ids),
        min_rows=MIN_ROWS,
        seed=seed,
    )


def generate_named(name: str) -> ClickData:
    """The data set ``name`` of `TOTAL_IDS`."""
    return dataclasses.replace(generate_ids(TOTAL_IDS[name]), name=name)


def _max_rows(total_ids: int) -> int:
    """Rows of the largest field; the fields' rows are log-spaced from ``MIN_ROWS`` up to it."""

    def total(most: int) -> int:
        return int(np.geomspace(MIN_ROWS, most, FIELDS).round().sum())

    candidates = range(MIN_ROWS, total_ids)
    return candidates[bisect.bisect_left(candidates, total_ids, key=total)]


def train_sparse(
    model: nn.Module, data: ClickData, settings: Settings, seed: int = 0
) -> list[Metrics]:
    """Like `examples.ctr.training.train_with`, but only the rows of each batch move.

    Tables are trained by SparseAdam, the network by Adam. Each distinct row of a batch takes the
    penalty ``settings.l2 / 2`` times its squared norm; the other rows take none. The model ends in
    the state of its best epoch by validation AUC, in evaluation mode, with ``sparse=False`` tables.

    Returns:
        Validation metrics after each epoch.
    """
    torch.manual_seed(seed)  # dropout draws from the global generator
    heads = _heads(model, data)
    optimizers = _optimizers(model, list(heads.values()), settings.lr)
    live = _live(model, heads)
    history: list[Metrics] = []
    best, best_auc, stale = [], -1.0, 0
    for epoch in range(settings.epochs):
        with _sparse_gradients(model):
            _train_epoch(model, data, settings, heads, optimizers, 1000 * seed + epoch)
        history.append(evaluate(model, data, "valid"))
        if history[-1].auc > best_auc:
            best_auc, stale = history[-1].auc, 0
            # After the last epoch the model itself is the best state; a copy would be for nothing.
            best = [tensor.clone() for tensor in live] if epoch + 1 < settings.epochs else []
            continue
        stale += 1
        if stale >= settings.patience:
            break
        _slow_down(optimizers, settings.lr_decay)
    if stale:
        for tensor, kept in zip(live, best, strict=True):
            tensor.copy_(kept)
    model.zero_grad()  # sparse gradients would meet dense ones in whatever comes next
    return history


def _heads(model: nn.Module, data: ClickData) -> dict[nn.Embedding, nn.Parameter]:
    """For each table the rows up to the last one that is trained, in the table's own memory.

    Optimizers allocate state for whole parameters. Ids are numbered by falling frequency, so the
    rows that training uses come first, and their moments are a small part of the table's.
    """
    last = data.ids["train"].amax(dim=0).tolist()
    seen = {field.replace(".", "_"): row + 1 for field, row in zip(data.fields, last, strict=True)}
    return {
        table: nn.Parameter(table.weight.detach()[: seen[field]])
        for _, field, table in tables(model)
    }


def _optimizers(
    model: nn.Module, heads: list[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """SparseAdam of the tables, Adam of the network."""
    held = {id(table.weight) for _, _, table in tables(model)}
    network = [weight for weight in model.parameters() if id(weight) not in held]
    return [torch.optim.SparseAdam(heads, lr=lr), torch.optim.Adam(network, lr=lr, fused=True)]


def _live(model: nn.Module, heads: dict[nn.Embedding, nn.Parameter]) -> list[Tensor]:
    """All that training may change: the heads, and the network's parameters and buffers."""
    held = {table.weight.data_ptr() for table in heads}
    state = [tensor for tensor in model.state_dict().values() if tensor.data_ptr() not in held]
    return [*(head.detach() for head in heads.values()), *state]


@contextmanager
def _sparse_gradients(model: nn.Module) -> Iterator[None]:
    """Tables give sparse gradients inside; outside they are like those of any other model."""
    held = [table for _, _, table in tables(model)]
    for table in held:
        table.sparse = True
    try:
        yield
    finally:
        for table in held:
            table.sparse = False


def _train_epoch(
    model: nn.Module,
    data: ClickData,
    settings: Settings,
    heads: dict[nn.Embedding, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    seed: int,
) -> None:
    """One step of both optimizers a batch."""
    model.train()
    for ids, labels in iterate_batches(data, "train", settings.batch_size, True, seed):
        model.zero_grad()
        F.binary_cross_entropy_with_logits(model(ids), labels).backward()
        for table, head in heads.items():
            head.grad = _penalised(table.weight, settings.l2, len(head))
        for optimizer in optimizers:
            optimizer.step()


def _penalised(weight: nn.Parameter, l2: float, rows: int) -> Tensor:
    """A table's sparse gradient plus that of its penalty, for a head of ``rows`` rows."""
    grad = weight.grad.coalesce()
    found = grad.indices()
    values = grad.values().add(weight.detach()[found[0]], alpha=l2)
    shape = (rows, weight.shape[1])
    # Coalesced indices are in order and in range; the check would read them all again.
    return torch.sparse_coo_tensor(found, values, shape, check_invariants=False, is_coalesced=True)


def _slow_down(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Multiply the learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
