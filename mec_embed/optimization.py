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

import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Undo
from .modules import CompressedEmbedding, CompressedEmbeddingBag
from .regularization import rows_per_codeword

Compressed = CompressedEmbedding | CompressedEmbeddingBag

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


def keep_row_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> Undo:
    """Let an optimizer move the rows of the model's compressed tables as it would dense ones.

    By hooks around ``step()``: groups, and schedulers that know them, stay as they are. Hooks that
    an earlier call has set are replaced.
    """
    hooks: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    before = [dict(held) for held in hooks]
    for held in hooks:
        for key, hook in list(held.items()):
            if isinstance(getattr(hook, "__self__", None), _RowSteps):
                del held[key]
    tables = [m for m in model.modules() if isinstance(m, Compressed)]
    if tables:
        steps = _RowSteps(tables)
        optimizer.register_step_pre_hook(steps.before)
        optimizer.register_step_post_hook(steps.after)

    def undo() -> None:
        for held, old in zip(hooks, before, strict=True):
            held.clear()
            held.update(old)

    return undo


class _RowSteps:
    """The hooks around the steps of one optimizer."""

    def __init__(self, tables: list[Compressed]) -> None:
        self.tables = [weakref.ref(table) for table in tables]
        #: (codebooks, where the step starts from, part of the step that is taken)
        self.begun: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Add weight decay for all rows; remember where each codebook starts from."""
        self.begun = []
        for books, rows, summands, group in self._held(optimizer):
            decay = group.get("weight_decay") or 0.0
            start = books.clone()
            if _decoupled(optimizer, group):
                start *= 1 - group["lr"] * decay
            elif decay and isinstance(optimizer, _PENALISING):
                _add_penalty(optimizer, group, books, (rows - 1) * books * decay)
            sums = isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD))
            part = (1 / rows if sums else rows.rsqrt()) / summands
            self.begun.append((books, start, part))

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take each codeword back to its part of the step."""
        for books, start, part in self.begun:
            books.copy_(start + part * (books - start))
        self.begun = []

    def _held(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Tensor, int, dict[str, Any]]]:
        """(codebooks, rows (M, K, 1) that use each codeword, codewords summed, group)."""
        users: dict[int, list[Compressed]] = defaultdict(list)
        for table in [ref() for ref in self.tables]:
            if table is not None and table.layout.bits:
                users[id(table.codebooks)].append(table)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) in users:
                    tables = users[id(param)]
                    rows = torch.stack([rows_per_codeword(table) for table in tables]).sum(0)
                    summands = len(param) if tables[0].layout.kind == "additive" else 1
                    yield param, rows.clamp(min=1)[:, :, None], summands, group


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks parameters beside the step."""
    return bool(group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW))


def _add_penalty(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], books: Tensor, more: Tensor
) -> None:
    """Add to the gradient what the optimizer's own weight decay leaves out."""
    if books.grad is None or books.grad.is_sparse:
        return
    # Fused optimizers under a GradScaler see gradients that are still scaled.
    scale = getattr(optimizer, "grad_scale", None)
    more = more if scale is None else more * scale
    books.grad.add_(more, alpha=-1 if group.get("maximize") else 1)
