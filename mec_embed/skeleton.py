"""The tables of a checkpoint, without its model, as :mod:`mec_embed.compress` works on them.

A skeleton of modules without values stands for the model. Its tables read their rows from the file,
so that what is in memory does not grow with the rows' width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, StoredTensor
from .config import CompressionConfig, matches
from .storage import KEY
from .tables import Alias, Table

#: Fewest rows of a table that is found by its shape, and of one that is named.
ROWS_BY_SHAPE, ROWS_BY_NAME = 1000, 8
#: Rows a column, at least, of a table that is found by its shape.
ROWS_PER_COLUMN = 8
#: Of what tables can be.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Rows that are closer than these bytes are read in one go.
_GAP_BYTES = 4096


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether a file was made by mec_embed."""
    return KEY in checkpoint.metadata


class Progress:
    """What is told of the progress; this one is silent."""

    @contextmanager
    def stage(self, what: str, total: int) -> Iterator[None]:
        """A stage in which about ``total`` bytes are read or written."""
        yield

    def advance(self, nbytes: int) -> None:
        """Bytes that were read or written."""

    def say(self, text: str) -> None:
        """What goes on within the stage."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Roles:
    """What a checkpoint does not say of its tables: (pattern of names, value) each.

    Attributes:
        bags: tables of an ``nn.EmbeddingBag``: its mode and ``include_last_offset``.
        paddings: tables with a padding row, and its number.
    """

    bags: tuple[tuple[str, tuple[str, bool]], ...] = ()
    paddings: tuple[tuple[str, int], ...] = ()

    def then(self, others: Roles) -> Roles:
        """With others that win over these."""
        return Roles((*self.bags, *others.bags), (*self.paddings, *others.paddings))

    def check(self, names: Sequence[str]) -> None:
        """ValueError for a pattern that fits no table."""
        for option, pairs in (("--bag", self.bags), ("--padding-idx", self.paddings)):
            for pattern, _ in pairs:
                if not _fits(names, pattern):
                    raise ValueError(
                        f"{option} names {pattern!r}, which fits none of the {len(names)} tables "
                        f"to compress{alike(pattern, names)}"
                    )

    def module(self, names: Sequence[str], stored: StoredTensor) -> nn.Embedding | nn.EmbeddingBag:
        """The dense module of a table with these names, without values."""
        rows, dim = stored.shape
        # A weight that is given is not filled at random, for which torch would import its compiler.
        weight = torch.empty(rows, dim, device="meta", dtype=stored.dtype)
        options: dict[str, Any] = {"padding_idx": self._padding(names, rows), "_weight": weight}
        found = [bag for pattern, bag in self.bags if _fits(names, pattern)]
        if not found:
            return nn.Embedding(rows, dim, **options)
        mode, last = found[-1]
        return nn.EmbeddingBag(rows, dim, mode=mode, include_last_offset=last, **options)

    def _padding(self, names: Sequence[str], rows: int) -> int | None:
        found = [row for pattern, row in self.paddings if _fits(names, pattern)]
        if not found:
            return None
        if not -rows <= found[-1] < rows:
            raise ValueError(
                f"table {names[0]!r}: the padding row {found[-1]} is none of its {rows} rows"
            )
        return found[-1] % rows


def _fits(names: Sequence[str], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


@dataclass(frozen=True, eq=False)
class StreamedTable(Table):
    """A table whose rows are read from a file when they are asked for.

    Attributes:
        stored: the rows.
        told: told of bytes as they are read.
    """

    stored: StoredTensor
    told: Callable[[int], None]

    @property
    def device(self) -> torch.device:
        """See :class:`Table`."""
        return torch.device("cpu")

    def stored_piece(self, start: int, stop: int) -> Tensor:
        """See :class:`Table`."""
        rows = self.stored.rows(start, stop)
        self.told(rows.nbytes)
        return rows

    def stored_read(self, ids: Tensor) -> Tensor:
        """See :class:`Table`."""
        if not len(ids):
            return torch.empty(0, self.dim, dtype=self.weight.dtype)
        wanted, back = ids.cpu().unique(return_inverse=True)
        near = max(1, _GAP_BYTES * self.rows // self.nbytes)
        breaks = ((wanted[1:] - wanted[:-1]) > near).nonzero()[:, 0] + 1
        bounds = [0, *breaks.tolist(), len(wanted)]
        rows = torch.empty(len(wanted), self.dim, dtype=self.weight.dtype)
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            inside = wanted[first:end]
            block = self.stored.rows(int(inside[0]), int(inside[-1]) + 1)
            rows[first:end] = block[inside - inside[0]]
        self.told(rows.nbytes)
        return rows[back]


def choose_tables(
    checkpoint: Checkpoint, config: CompressionConfig
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tables to compress by name, and why other matrices are none.

    By ``config.include``; where that includes all, a table is what has ``ROWS_PER_COLUMN`` times as
    many rows as columns.
    """
    by_shape = config.include == ("*",)
    parents = _parents(checkpoint)
    chosen: dict[str, StoredTensor] = {}
    reasons: dict[str, str] = {}
    for key, stored in checkpoint.tensors.items():
        if len(stored.shape) != 2 or stored.dtype not in FLOATS or not stored.nbytes:
            continue
        name = key.removesuffix(".weight")
        reason = _reason(key, name, stored, config, parents, checkpoint.shared, by_shape)
        if reason:
            reasons[key] = reason
        else:
            chosen[name] = stored
    return chosen, reasons


def _reason(
    key: str,
    name: str,
    stored: StoredTensor,
    config: CompressionConfig,
    parents: Mapping[str, int],
    shared: Mapping[str, str],
    by_shape: bool,
) -> str | None:
    """Why a matrix is not a table to compress, or None."""
    rows, columns = stored.shape
    if name == key:
        return "its name does not end in .weight, as that of an embedding does"
    if not all(name.split(".")):
        return "its name has an empty part, as that of no module does"
    if parents[name] > 1:
        return "its module holds more than a weight"
    keys = _keys_of(key, shared)
    for other in keys[1:]:
        if not other.endswith(".weight") or parents[other.removesuffix(".weight")] > 1:
            return f"it is one tensor with {other!r}, which is no table"
    if not config.selects([*keys, *(one.removesuffix(".weight") for one in keys)]):
        return "its name is not selected by --include and --exclude"
    if rows < config.min_rows:
        return f"has fewer than --min-rows {config.min_rows} rows"
    if by_shape and rows < ROWS_PER_COLUMN * columns:
        return f"has fewer than {ROWS_PER_COLUMN} rows a column; --include it if it is a table"
    return None


def _parents(checkpoint: Checkpoint) -> dict[str, int]:
    """Entries at or below each module."""
    numbers: dict[str, int] = {}
    for key in (*checkpoint.tensors, *checkpoint.shared, *checkpoint.extra):
        parent = key.rpartition(".")[0]
        while parent:
            numbers[parent] = numbers.get(parent, 0) + 1
            parent = parent.rpartition(".")[0]
    return numbers


class Skeleton:
    """Modules that hold the chosen tables of a checkpoint, and nothing else.

    Args:
        checkpoint: that the tables are read from.
        chosen: the tables by name.
        roles: what the checkpoint does not say of them.
        told: told of bytes as they are read.
        zero_nonfinite: see :class:`~mec_embed.tables.Table`.

    Attributes:
        model: the root of the modules.
        tables: the tables, in the order of ``chosen``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chosen: Mapping[str, StoredTensor],
        roles: Roles,
        told: Callable[[int], None],
        zero_nonfinite: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = nn.Module()
        self.tables: list[StreamedTable] = []
        for name, stored in chosen.items():
            names = names_of(checkpoint, name)
            module = roles.module(names, stored)
            aliases = tuple(_put(self.model, one, module) for one in names)
            table = StreamedTable(module, aliases, stored, told, zero_nonfinite=zero_nonfinite)
            self.tables.append(table)

    @property
    def names(self) -> list[str]:
        """Names of the tables."""
        return [table.name for table in self.tables]

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(table.nbytes for table in self.tables)


def names_of(checkpoint: Checkpoint, name: str) -> list[str]:
    """All names of the module of a table: other keys of the same tensor are other names."""
    keys = _keys_of(f"{name}.weight", checkpoint.shared)
    return [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]


def _keys_of(key: str, shared: Mapping[str, str]) -> list[str]:
    """All keys of the tensor that is stored under one."""
    return [key, *(other for other, first in shared.items() if first == key)]


def _put(model: nn.Module, name: str, module: nn.Module) -> Alias:
    """Put a module under a qualified name."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        # Not add_module(): it refuses names such as "type", which tables may have.
        parent = parent._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    parent._modules[last] = module
    return Alias(parent, last, name)


def nothing_chosen(path: str | Path, reasons: Mapping[str, str]) -> str:
    """The message where no table is chosen."""
    if not reasons:
        return f"{path} holds no table: no floating tensor of two dimensions"
    listed = "; ".join(f"{key}: {reason}" for key, reason in [*reasons.items()][:20])
    more = f"; and {len(reasons) - 20} more" if len(reasons) > 20 else ""
    return f"{path}: no table to compress; seen: {listed}{more}"


def alike(name: str, names: Sequence[str]) -> str:
    """The end of a message: names that are like ``name``, or some names."""
    found = difflib.get_close_matches(name, names, 5, 0.4) or [*names][:5]
    return f"; there are {', '.join(found)}" + (" and others" if len(names) > len(found) else "")
