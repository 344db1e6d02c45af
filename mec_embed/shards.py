"""Tables whose rows are on different ranks: what each rank holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .ranks import Ranks


@dataclass(frozen=True)
class Part:
    """What this rank holds of a table.

    Attributes:
        rows: (n, dim), on the computing device; may be none.
        first: number of the first of them.
        of: rows of the whole table.
    """

    rows: Tensor
    first: int
    of: int


@dataclass(frozen=True)
class Shard:
    """The rows of a table that this rank holds, where each rank holds others.

    Attributes:
        rows: (n, dim), on the computing device.
        bounds: first row and end of what each rank holds.
    """

    rows: Tensor
    bounds: tuple[tuple[int, int], ...]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    return type(tensor).__name__ == "DTensor"


def part_of_dtensor(name: str, weight: Any, ranks: Ranks) -> Part:
    """What this rank holds of the table ``name``, a DTensor (rows, dim).

    Raises:
        ValueError: it is sharded over more than one process and this one is alone, or in another
            way than by rows over a mesh of one dimension.
    """
    from torch.distributed.tensor import Shard as ByDimension

    mesh, rows = weight.device_mesh, weight.shape[0]
    if ranks.size == 1 and mesh.size() > 1:
        raise ValueError(
            f"table {name!r} is sharded over {mesh.size()} processes; call on all of them, with "
            "process_group= (its device_mesh.get_group())"
        )
    if tuple(weight.placements) != (ByDimension(0),):
        raise ValueError(
            f"table {name!r} is a DTensor placed as {tuple(weight.placements)}, expected "
            "(Shard(dim=0),) on a mesh of one dimension; redistribute it before compressing"
        )
    # As torch.chunk does it: all parts but the last ones are equal.
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return Part(weight.to_local().detach(), first, rows)


def shards(parts: Mapping[str, Part], ranks: Ranks) -> dict[str, Shard]:
    """The shards of tables, by name; all ranks call, each with its parts of the same tables.

    Raises:
        ValueError: a row of a table is on no rank, or on several.
    """
    if not parts:
        return {}
    own = {name: (part.first, part.first + len(part.rows)) for name, part in parts.items()}
    of_all = ranks.tell(own, "comparing shards")
    found = {}
    for name, part in parts.items():
        bounds = tuple((first, end) for first, end in (of_rank[name] for of_rank in of_all))
        _check_cover(name, part.of, [(first, end) for first, end in bounds if end > first])
        found[name] = Shard(part.rows, bounds)
    return found


def _check_cover(name: str, rows: int, held: list[tuple[int, int]]) -> None:
    end = 0
    for first, stop in sorted(held):
        if first != end:
            break
        end = stop
    if end != rows or sum(stop - first for first, stop in held) != rows:
        raise ValueError(
            f"table {name!r}: the ranks hold the rows {sorted(held)}, expected each of {rows} rows "
            "on one rank; pass the process_group over which it is sharded"
        )
