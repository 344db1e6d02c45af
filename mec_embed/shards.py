"""Tables whose rows are on different ranks: what each rank holds of them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

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
    """The rows of a table that this rank works on, where each rank works on others.

    Attributes:
        rows: (n, dim), on the computing device.
        bounds: first row and end of what each rank works on.
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
            way than by rows; or this process is not in its mesh.
    """
    first, rows = _first_row(name, weight), weight.to_local().detach()
    if ranks.size == 1 and len(rows) < weight.shape[0]:
        raise ValueError(
            f"table {name!r} is sharded over {weight.device_mesh.size()} processes; call on all of "
            "them, with process_group= the group of its device_mesh"
        )
    return Part(rows, first, weight.shape[0])


def _first_row(name: str, weight: Any) -> int:
    """Number of the first row of a DTensor that this rank holds."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ByDimension

    mesh, placements = weight.device_mesh, tuple(weight.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"table {name!r} is a DTensor on {mesh}, which this process is not in; call on the "
            "processes of its mesh only, with a process_group of theirs"
        )
    first, rows = 0, weight.shape[0]
    for placement, size, place in zip(placements, mesh.shape, coordinate, strict=True):
        if placement == Replicate():
            continue
        # Of its own type: subclasses put the parts in another order.
        if type(placement) is not ByDimension or placement.dim != 0:
            raise ValueError(
                f"table {name!r} is a DTensor placed as {placements}, expected Shard(dim=0) or "
                "Replicate() on each dimension of its mesh; redistribute it before compressing"
            )
        # As torch.chunk does it: all parts but the last ones are equal.
        most = -(-rows // size)
        start = min(place * most, rows)
        first, rows = first + start, min(most, rows - start)
    return first


def shards(parts: Mapping[str, Part], ranks: Ranks) -> dict[str, Shard]:
    """The shards of tables, by name; all ranks call, each with its parts of the same tables.

    Where several ranks hold the same rows, each takes a share of them, so that every row is on one.

    Raises:
        ValueError: a row of a table is on no rank, or ranks hold overlapping rows that are not the
            same, or of other values.
    """
    if not parts:
        return {}
    own = {name: (part.first, part.first + len(part.rows)) for name, part in parts.items()}
    of_all = ranks.tell(own, "comparing shards")
    held = {name: [(first, end) for first, end in map(itemgetter(name), of_all)] for name in parts}
    _check_copies(parts, held, ranks)
    found = {}
    for name, part in parts.items():
        _check_cover(name, part.of, held[name])
        bounds = _shared_out(held[name])
        first, end = bounds[ranks.rank]
        found[name] = Shard(part.rows[first - part.first : end - part.first], bounds)
    return found


def _shared_out(held: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """What each rank works on of the rows (first, end) that it holds, as others may too."""
    holders = Counter(held)
    seen: Counter[tuple[int, int]] = Counter()
    bounds = []
    for first, end in held:
        place, of, rows = seen[first, end], holders[first, end], end - first
        bounds.append((first + rows * place // of, first + rows * (place + 1) // of))
        seen[first, end] += 1
    return tuple(bounds)


def _check_copies(
    parts: Mapping[str, Part], held: Mapping[str, Sequence[tuple[int, int]]], ranks: Ranks
) -> None:
    """ValueError where ranks that hold the same rows hold other values in them."""
    ranges = {name: [(a, b) for a, b in of_ranks if b > a] for name, of_ranks in held.items()}
    copied = [name for name, each in ranges.items() if len(set(each)) < len(each)]
    if not copied:
        return
    sums = ranks.tell({name: check_sum(parts[name].rows) for name in copied}, "comparing copies")
    for name in copied:
        first_with: dict[tuple[int, int], int] = {}
        for rank, bounds in enumerate(held[name]):
            other = first_with.setdefault(bounds, rank)
            if sums[rank][name] != sums[other][name]:
                raise ValueError(
                    f"ranks differ in the rows {bounds[0]} to {bounds[1]} of table {name!r}: rank "
                    f"{other} has values with check sum {sums[other][name]:x}, rank {rank} with "
                    f"{sums[rank][name]:x}; give every rank the same model"
                )


def check_sum(weight: Tensor) -> int:
    """A number that is equal for equal bits, and different for most others."""
    bits = weight.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])
    # Columns apart, so that rows that were moved around within themselves are noticed.
    return zlib.crc32(bits.sum(0, dtype=torch.int64).cpu().numpy().tobytes())


def check_sums(module: nn.Module) -> str:
    """Check sums of all tensors of a module's state."""
    return " ".join(
        f"{zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy().data):x}"
        for tensor in module.state_dict().values()
    )


def _check_cover(name: str, rows: int, held: Sequence[tuple[int, int]]) -> None:
    """ValueError where the different ranges of rows that ranks hold are not each row once."""
    ranges = sorted({(first, stop) for first, stop in held if stop > first})
    end = 0
    for first, stop in ranges:
        if first != end:
            break
        end = stop
    if end != rows or sum(stop - first for first, stop in ranges) != rows:
        raise ValueError(
            f"table {name!r}: the ranks hold the rows {ranges}, expected each of {rows} rows on "
            "one rank, or the same ones on several; pass the process_group over which it is sharded"
        )
