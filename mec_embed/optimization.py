"""Optimizer steps that move rows as before when a table becomes codebooks.

A codeword stands for all rows that use it, ``n`` of them. Its gradient is the sum of theirs, and a
step that follows it moves all of them at once. So that learning rate and weight decay keep their
meaning for rows:

- *Steps.* A codeword moves by the mean of the moves that its rows would make alone: under SGD,
  whose moves add up, the step divided by ``n``; under Adam and its kin, whose moves are about the
  learning rate each in directions of their own, divided by ``sqrt(n)``. The M codewords that
  make up a row of additive codes share its move, so each makes ``1 / M`` of it.
- *Weight decay.* Where it is a penalty (added to the gradient), a codeword is penalised once for
  each of its rows, see :mod:`mec_embed.regularization`. Decoupled decay (AdamW) shrinks rows and
  codewords alike and stays whole.

``docs/experiments.md`` has what happens without: training on by Adam at the same learning rate
loses what compressing had kept.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Undo
from .modules import Compressed
from .regularization import rows_per_codeword
from .shards import like_sharded

logger = logging.getLogger("mec_embed")

#: Optimizers whose weight decay is a penalty, unlike AdamW's.
_PENALISING = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
)

#: Optimizers whose weight decay shrinks parameters beside the step, whatever their groups say.
_DECOUPLED = tuple(
    getattr(torch.optim, name) for name in ("AdamW", "Adafactor") if hasattr(torch.optim, name)
)
#: Optimizers that keep more of their parameters than a step, or want matrices.
_REFUSED = ("LBFGS", "Muon", "RowWiseAdagrad")


def keep_row_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> Undo:
    """Let an optimizer move the rows of the model's compressed tables as it would dense ones.

    :func:`mec_embed.compress`, ``decompress`` and ``load`` do this for the optimizers they are
    given and those that a framework's model holds. Call it for an optimizer that is made later, or
    copied or unpickled (torch drops hooks then).

    By hooks around ``step()``: groups, and schedulers that know them, stay as they are.

    Args:
        optimizer: over parameters of the model; calling again changes nothing.
        model: with compressed tables.

    Returns:
        A function that takes the hooks away again.

    Raises:
        ValueError: an optimizer whose steps cannot be divided among rows (LBFGS, Muon,
            TorchRec's RowWiseAdagrad), or that wraps another.

    Example:
        >>> optimizer = torch.optim.Adam(model.parameters())  # doctest: +SKIP
        >>> keep_row_steps(optimizer, model)  # doctest: +SKIP
    """
    check_optimizer(optimizer)
    hooks: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    before = [dict(held) for held in hooks]

    def undo() -> None:
        for held, old in zip(hooks, before, strict=True):
            held.clear()
            held.update(old)

    try:
        tables = [m for m in model.modules() if isinstance(m, Compressed)]
        tables += _taken_away(optimizer, hooks)
        if tables:
            _warn_of_decay(optimizer, tables)
            _warn_of_eps(optimizer, tables)
            steps = _RowSteps(list(dict.fromkeys(tables)))
            optimizer.register_step_pre_hook(steps.before)
            last = optimizer.register_step_post_hook(steps.after)
            # Before hooks of a user, which are to see (as averages do) or change where rows end.
            optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)  # type: ignore[attr-defined]
    except BaseException:
        undo()
        raise
    return undo


def _taken_away(optimizer: torch.optim.Optimizer, hooks: list[Any]) -> list[Compressed]:
    """Removes earlier hooks; their tables, of whichever model, that the optimizer still trains."""
    found: list[Compressed] = []
    for held in hooks:
        for key, hook in list(held.items()):
            steps = getattr(hook, "__self__", None)
            if isinstance(steps, _RowSteps):
                del held[key]
                found += steps.tables()
    trained = trained_by(optimizer)
    return [table for table in found if id(table.codebooks) in trained]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ValueError for optimizers whose steps cannot be kept."""
    kind = type(optimizer).__name__
    if _holds_optimizers(optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"optimizer is a {kind}, which keeps parameters of the optimizers inside it; pass "
            "those, and wrap them anew afterwards"
        )
    if kind in _REFUSED:
        raise ValueError(
            f"optimizer is a {kind}, whose steps cannot be divided among rows; leave it out, and "
            "train the codebooks of the compressed model by another one"
        )


def _holds_optimizers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it wraps others, that train its parameters in steps that go past its hooks."""
    for name in ("_optimizer", "_optims", "optimizer"):
        if not isinstance(getattr(optimizer, name, None), (str, NoneType)):
            return True
    own = trained_by(optimizer)
    for value in vars(optimizer).values():
        items = [*value.values()] if isinstance(value, dict) else value
        for one in items if isinstance(items, (list, tuple)) else (items,):
            inside = isinstance(one, torch.optim.Optimizer) and one is not optimizer
            if inside and not own.isdisjoint(trained_by(one)):
                return True
    return False


def trained_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """``id`` of the parameters in its groups."""
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _warn_of_decay(optimizer: torch.optim.Optimizer, tables: list[Compressed]) -> None:
    """Say that weight decay of tables is not kept where it is not known what it does."""
    if isinstance(optimizer, (*_PENALISING, *_DECOUPLED)):
        return
    held = {id(table.codebooks) for table in tables if table.layout.kind != "rows"}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(param) in held for param in group["params"]):
            logger.warning(
                "optimizer %s is none of torch's: its weight_decay=%g hardly reaches the rows of "
                "compressed tables; put these into a group without, and add "
                "mec_embed.regularization.embedding_penalty(model) to the loss",
                type(optimizer).__name__,
                group["weight_decay"],
            )
            return


def _warn_of_eps(optimizer: torch.optim.Optimizer, tables: list[Compressed]) -> None:
    """Say that steps of float16 codebooks divide by zero, where they do."""
    half = {
        id(table.codebooks): table for table in tables if table.codebooks.dtype == torch.float16
    }
    for group in optimizer.param_groups:
        eps = group.get("eps")
        found = next((half[id(param)] for param in group["params"] if id(param) in half), None)
        # Fused kernels calculate in float32.
        if (
            found
            and not group.get("fused")
            and isinstance(eps, float)
            and eps
            and not torch.tensor(eps).half()
        ):
            logger.warning(
                "table %r: its codebooks are float16, in which eps=%g of %s is 0, so that the "
                "next steps will give NaN; pass codebook_dtype='float32' to train on, or make it "
                "1e-4",
                found.name,
                eps,
                type(optimizer).__name__,
            )
            return


@dataclass
class _Begun:
    """One codebook set during a step."""

    books: Tensor
    rows: Tensor
    summands: int
    group: dict[str, Any]
    start: Tensor
    grad: Tensor | None = None


class _RowSteps:
    """The hooks around the steps of one optimizer."""

    def __init__(self, tables: list[Compressed]) -> None:
        self._tables = [weakref.ref(table) for table in tables]
        self.begun: list[_Begun] = []

    def tables(self) -> list[Compressed]:
        """Those that are still there."""
        return [table for table in (ref() for ref in self._tables) if table is not None]

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Remember where each codebook starts from; add weight decay for all rows."""
        self.begun = [
            _Begun(books, rows, summands, group, books.clone())
            for books, rows, summands, group in self._held(optimizer)
        ]
        named = "closure" in kwargs
        closure = kwargs["closure"] if named else next(iter(args[1:]), None)
        if not callable(closure):  # None, or an argument of an optimizer from elsewhere
            self._add_penalties(optimizer)
            return None

        def with_penalties() -> Any:
            loss = closure()
            self._add_penalties(optimizer)
            return loss

        if named:
            return args, {**kwargs, "closure": with_penalties}
        return (args[0], with_penalties, *args[2:]), kwargs

    @torch.no_grad()
    def _add_penalties(self, optimizer: torch.optim.Optimizer) -> None:
        """Add to gradients what the optimizer's own weight decay leaves out."""
        for one in self.begun:
            decay, grad = one.group.get("weight_decay"), one.books.grad
            penalises = isinstance(optimizer, _PENALISING) and not _decoupled(optimizer, one.group)
            if not decay or not penalises or grad is None or grad.is_sparse:
                continue
            one.grad = grad.clone()
            more = (one.rows - 1) * one.books * (-decay if one.group.get("maximize") else decay)
            # Fused optimizers under a GradScaler see gradients that are still scaled.
            scale = getattr(optimizer, "grad_scale", None)
            grad.add_(more if scale is None else more * scale)

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take each codeword back to its part of the step, and gradients to what they were."""
        sums = isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))
        overflow = getattr(optimizer, "found_inf", None)
        for one in self.begun:
            books = one.books
            if books.grad is None:
                continue  # the optimizer has passed it over
            start = one.start
            if _decoupled(optimizer, one.group):
                start = start * (1 - one.group["lr"] * (one.group.get("weight_decay") or 0.0))
            part = (1 / one.rows if sums else one.rows.rsqrt()) / one.summands
            moved = start + part * (books - start)
            # After an overflow, a fused optimizer under a GradScaler has not moved anything.
            books.copy_(moved if overflow is None else torch.where(overflow > 0, one.start, moved))
            if one.grad is not None:
                books.grad.copy_(one.grad)
        self.begun = []

    def _held(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Tensor, int, dict[str, Any]]]:
        """(codebooks, rows (M, K, 1) that use each codeword, codewords summed, group)."""
        users: dict[int, list[Compressed]] = defaultdict(list)
        for table in self.tables():
            if table.layout.kind != "rows":
                users[id(table.codebooks)].append(table)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) in users:
                    tables = users[id(param)]
                    rows = torch.stack([rows_per_codeword(table) for table in tables]).sum(0)
                    summands = len(param) if tables[0].layout.kind == "additive" else 1
                    yield param, like_sharded(rows.clamp(min=1)[:, :, None], param), summands, group


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks parameters beside the step."""
    return bool(group.get("decoupled_weight_decay")) or isinstance(optimizer, _DECOUPLED)
