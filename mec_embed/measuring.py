"""Lookups of tables of which each rank holds a part, while gradients are measured.

Such a table cannot look plain ids up: its weight is a DTensor, or without values. For the time of
the measurement it asks the other ranks for the rows of its ids, which all ranks do at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def asking_forward(table: Table, watch: Callable[[Tensor, float], Tensor]) -> Callable[..., Any]:
    """What ``table.module.forward`` is to be: rows come from the ranks that hold them.

    Args:
        table: a sharded one.
        watch: is given the output (..., dim), without gradient, and the scale of its gradients, and
            gives the output that the model goes on with.
    """
    module = table.module
    name = table.name
    norm = {"max_norm": module.max_norm, "norm_type": module.norm_type}

    def rows_forward(input: Tensor) -> Tensor:
        if any_dtensor(input):
            return on_replicas(rows_forward, name, input)
        rows, places = _rows(table, input)
        # The rows are a copy, whose length max_norm may change.
        return watch(F.embedding(places, rows, **norm), 1.0)  # type: ignore[arg-type]

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
        return watch(bags, scale_of_bags(module, bags, input))

    return bags_forward if isinstance(module, nn.EmbeddingBag) else rows_forward


def scale_of_bags(module: Any, bags: Tensor, ids: Tensor) -> float:
    """Of gradients of ``bags`` (n, dim) as one id sees them: it moves a mean by its share."""
    return len(bags) / max(1, ids.numel()) if module.mode == "mean" else 1.0


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
