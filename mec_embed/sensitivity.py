"""How much the predictions of a model change when a row of a table does.

For a small change ``d`` of the row that a lookup returns, the expected rise of the log loss, over
labels that the model itself predicts, is ``d^T G d / 2`` with the Fisher matrix
``G = E[p (1 - p) J^T J]``, where ``J`` is the gradient of the logit and ``p`` the probability of a
click. Errors measured by ``G`` can be compared between tables, and columns that the model does not
look at cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .forward import Forward, check_batches, eager, eval_mode, grad_mode, prediction
from .measuring import Lookups, asking_forward, exchanges, in_step, lookups_of
from .tables import Table

#: Batches read, at most: the mean over these is precise enough.
MOST_BATCHES = 64
#: Added to the diagonal, relative to its mean: keeps directions that these batches did not reach.
_LEAST = 0.05


def fisher_matrices(
    model: nn.Module,
    tables: Sequence[Table],
    batches: Iterable[Any],
    forward: Forward,
    others: Sequence[Table] = (),
) -> list[np.ndarray | None]:
    """The Fisher matrix (dim, dim) float64 of one lookup of each table; None where none was seen.

    Of padding there are no lookups, as none are counted (:class:`mec_embed.FrequencyStats`).

    Args:
        model: returns logits or probabilities (batch,) or (batch, tasks); it runs in eval mode,
            its weights, gradients, modes and attributes are left as they were.
        tables: of the model.
        batches: what ``forward`` takes; the first 64 are read. Each rank reads its own, and where
            anything of the model is sharded, as many as every rank has.
        forward: how to call the model on a batch.
        others: sharded tables to look up in as well, without a matrix.

    Raises:
        ValueError: batches is empty, predictions have no gradient, or one is NaN or infinite.
        TypeError: batches cannot be gone through.
    """
    check_batches(batches)
    totals, lookups = _nothing([*tables, *others])
    seen: list[tuple[Table, Tensor, Lookups]] = []
    read, probabilities = 0, True
    generator = torch.Generator().manual_seed(0)
    if exchanges(model, [*totals]):
        batches = in_step(batches, tables[0].ranks)
    with eager(), eval_mode(model), _attributes_kept(model), grad_mode(), _watched([*totals], seen):
        for batch in batches:
            seen.clear()
            output = prediction(forward(model, batch))
            if probabilities and not _within(output):
                # Those before were logits, too, which by chance lay between 0 and 1: start anew.
                probabilities = False
                totals, lookups = _nothing(totals)
            logits = _fisher_logits(output, probabilities, generator)
            leaves = [leaf for _, leaf, _ in seen]
            if leaves and not logits.requires_grad:
                raise ValueError(
                    f"predictions have no gradient by the rows of table {seen[0][0].name!r}, "
                    "expected one; let the model, or forward=, run without torch.no_grad() and "
                    "detach(), or compress without batches="
                )
            looked_up = [*seen]  # what checkpoints compute again looks up again
            grads = torch.autograd.grad(logits.sum(), leaves, allow_unused=True) if leaves else ()
            for (table, _, made_of), grad in zip(looked_up, grads, strict=True):
                lookups[table] += made_of.number
                if grad is not None:
                    flat = grad.reshape(-1, table.dim).double()
                    scaled = flat * made_of.squares[:, None]
                    totals[table] += (flat.T @ scaled).cpu().numpy()
            read += 1
            if read == MOST_BATCHES:
                break
    if not read:
        raise ValueError("batches is empty; pass a list or a DataLoader of training batches")
    told = tables[0].ranks.tell(probabilities, "telling logits from probabilities")
    if probabilities and not all(told):  # by chance here, on all batches
        totals, lookups = _nothing(totals)
    found = []
    for table in tables:
        what = f"adding up the gradients of table {table.name!r}"
        total = table.ranks.add(torch.from_numpy(totals[table]), what)
        (number,) = table.ranks.add(torch.tensor([lookups[table]]), what).tolist()
        found.append(_mean(table, total.numpy(), number))
    return found


def _nothing(tables: Iterable[Table]) -> tuple[dict[Table, np.ndarray], dict[Table, int]]:
    """Sums of matrices, and numbers of lookups, before any."""
    totals = {table: np.zeros((table.dim, table.dim)) for table in tables}
    return totals, dict.fromkeys(totals, 0)


def comparable(
    tables: Sequence[Table], matrices: Sequence[np.ndarray | None]
) -> list[np.ndarray | None]:
    """Matrices for all tables or for none: those not seen get the mean over the others."""
    known = [m.trace() / len(m) for m in matrices if m is not None]
    if not known:
        return [None] * len(tables)
    usual = float(np.mean(known))
    return [
        usual * np.eye(table.dim) if matrix is None else matrix
        for table, matrix in zip(tables, matrices, strict=True)
    ]


def _mean(table: Table, total: np.ndarray, lookups: int) -> np.ndarray | None:
    if not np.isfinite(total).all():
        raise ValueError(
            f"table {table.name!r}: the model's gradients are NaN or infinite for these batches; "
            "check the model and the batches, or compress without batches="
        )
    if not lookups or not total.any():
        return None
    mean: np.ndarray = total / lookups
    mean[np.diag_indices_from(mean)] += _LEAST * mean.trace() / len(mean)
    return mean


def _within(output: Tensor) -> bool:
    """Whether all may be probabilities."""
    return bool(((output >= 0) & (output <= 1)).all())


def _fisher_logits(output: Tensor, probabilities: bool, generator: torch.Generator) -> Tensor:
    """Scalars whose sum has a gradient g with E[g g^T] equal to the Fisher matrix.

    Random signs let the products between different outputs cancel out on average: of several
    tasks, and of examples that a layer mixes.
    """
    values = output.detach()
    if probabilities:
        scale = (values * (1 - values)).clamp(min=1e-8).rsqrt()
    else:
        chance = values.sigmoid()
        scale = (chance * (1 - chance)).sqrt()
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values.device) * 2 - 1
    return output * scale * signs


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What forward sets on modules, such as losses beside the output, would hold its graph."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _watched(tables: Sequence[Table], seen: list[tuple[Table, Tensor, Lookups]]) -> Iterator[None]:
    """While open, every lookup adds (table, its output as a leaf, what that is made of)."""
    handles = []
    for table in tables:
        if table.shard is None:
            hook = _watcher(table, seen)
            handles.append(table.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        else:
            forward = asking_forward(table, partial(_leaf, table, seen))
            table.module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for table in tables:
            if table.shard is not None:
                vars(table.module).pop("forward", None)


def _leaf(
    table: Table, seen: list[tuple[Table, Tensor, Lookups]], output: Tensor, made_of: Lookups
) -> Tensor:
    """``output`` for the model to go on with; its gradient is noted."""
    leaf = table.repaired(output.detach().float()).requires_grad_()
    seen.append((table, leaf, made_of))
    # A copy: what comes next may work in place, which a leaf refuses.
    return leaf.to(output.dtype, copy=True)


def _watcher(table: Table, seen: list[tuple[Table, Tensor, Lookups]]) -> Any:
    def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return _leaf(table, seen, output, lookups_of(module, *args, **kwargs))

    return watch
