"""Lookups of tables of which each rank holds a part, while gradients are measured.

Such a table cannot look plain ids up: its weight is a DTensor, or without values. For the time of
the measurement it asks the other ranks for the rows of its ids, which all ranks do at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.schema import owners
from .ranks import Ranks
from .replicas import any_dtensor, on_replicas
from .shards import is_dtensor
from .tables import Table


def exchanges(model: nn.Module, tables: Sequence[Table]) -> bool:
    """Whether ranks exchange rows of tables or parts of DTensors when ``model`` runs."""
    if tables[0].ranks.size == 1:
        return False
    sharded = any(table.shard is not None for table in tables)
    return sharded or any(is_dtensor(parameter) for parameter in model.parameters())


def in_step(batches: Iterable[Any], ranks: Ranks) -> Iterator[Any]:
    """Batches of this rank, as long as every rank has one; ValueError where one has none at all."""
    iterator = iter(batches)
    for number in count():
        batch = next(iterator, iterator)  # the iterator itself is no batch
        have = ranks.tell(batch is not iterator, "going to the next batch")
        if not all(have):
            if not number:
                raise ValueError(
                    f"batches is empty on rank {have.index(False)}; give every rank some, all of "
                    "them run the model at once"
                )
            return
        yield batch


class Lookups(NamedTuple):
    """What the rows (n, dim) of an output are made of.

    Attributes:
        squares: (n,) float64; for each, the sum over its ids of the square of their share in it.
        number: of all ids. Padding is none: it looks nothing up.
    """

    squares: Tensor
    number: int


@torch.no_grad()
def lookups_of(
    module: nn.Module,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Lookups:
    """What ``nn.Embedding`` or ``nn.EmbeddingBag`` looks up for these arguments."""
    flat = input.reshape(-1)
    real = torch.ones_like(flat, dtype=torch.float64)
    if module.padding_idx is not None:
        real[flat == module.padding_idx] = 0
    if not isinstance(module, nn.EmbeddingBag):
        return Lookups(real, int(real.sum()))
    of = owners(input, offsets, module.include_last_offset)
    bags = input.shape[0] if offsets is None else len(offsets) - module.include_last_offset
    numbers = real.new_zeros(bags).index_add_(0, of, real)
    if per_sample_weights is not None:
        squared = per_sample_weights.detach().reshape(-1).double().square()
        return Lookups(torch.zeros_like(numbers).index_add_(0, of, real * squared), int(real.sum()))
    # Of a sum each id moves the whole, of a mean its share; each column of a maximum is of one id.
    squares = {"sum": numbers, "mean": 1 / numbers, "max": torch.ones_like(numbers)}[module.mode]
    return Lookups(squares.where(numbers > 0, 0.0), int(real.sum()))


def asking_forward(table: Table, watch: Callable[[Tensor, Lookups], Tensor]) -> Callable[..., Any]:
    """What ``table.module.forward`` is to be: rows come from the ranks that hold them.

    Args:
        table: a sharded one.
        watch: is given the output (..., dim), without gradient, and what it is made of, and gives
            the output that the model goes on with.
    """
    module = table.module
    name = table.name
    norm = {"max_norm": module.max_norm, "norm_type": module.norm_type}

    def rows_forward(input: Tensor) -> Tensor:
        if any_dtensor(input):
            return on_replicas(rows_forward, name, input)
        rows, places = _rows(table, input)
        # The rows are a copy, whose length max_norm may change.
        found = F.embedding(places, rows, **norm)  # type: ignore[arg-type]
        return watch(found, lookups_of(module, input))

    def bags_forward(
        input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if any_dtensor(input, offsets, per_sample_weights):
            return on_replicas(bags_forward, name, input, offsets, per_sample_weights)
        rows, places = _rows(table, input)
        padding = None
        if module.padding_idx is not None:
            # A row of its own, so that it is left out of the bags.
            padding = len(rows)
            places = places.masked_fill(input == module.padding_idx, padding)
            rows = torch.cat([rows, rows.new_zeros(1, table.dim)])
        bags = F.embedding_bag(
            places,
            rows,
            offsets,
            mode=module.mode,  # type: ignore[union-attr,arg-type]
            per_sample_weights=None if per_sample_weights is None else per_sample_weights.detach(),
            include_last_offset=module.include_last_offset,  # type: ignore[union-attr,arg-type]
            padding_idx=padding,
            **norm,  # type: ignore[arg-type]
        )
        return watch(bags, lookups_of(module, input, offsets, per_sample_weights))

    return bags_forward if isinstance(module, nn.EmbeddingBag) else rows_forward


def _rows(table: Table, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, dim) that ids of any shape name, and the place (as ids) of each among them."""
    wanted, places = ids.detach().unique(return_inverse=True)
    if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < table.rows:
        raise IndexError(
            f"table {table.name!r}: ids lie between {int(wanted[0])} and {int(wanted[-1])}, "
            f"expected 0 to {table.rows - 1}"
        )
    ranks, what = table.ranks, f"asking for rows of table {table.name!r}"
    numbers = ranks.tell(len(wanted), what)
    first = sum(numbers[: ranks.rank])
    of_all = torch.zeros(sum(numbers), dtype=torch.int64)
    of_all[first : first + len(wanted)] = wanted.cpu()
    rows = table.read_any(ranks.merge(of_all, what))[first : first + len(wanted)]
    return rows.to(ids.device), places
