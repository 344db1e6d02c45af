"""Tables of which each rank holds a part: which, and the rows that it works on."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import Ranks

#: Bytes of rows that are put together at once from columns on several ranks.
_PIECE_BYTES = 16 << 20
#: First row and end, first column and end.
Bounds = tuple[int, int, int, int]


@dataclass(frozen=True)
class Block:
    """Some columns of some rows of a table.

    Attributes:
        values: (n, columns), on the computing device.
        row: number of the first row.
        column: number of the first column.
    """

    values: Tensor
    row: int = 0
    column: int = 0

    @property
    def bounds(self) -> Bounds:
        """Where it is in the table."""
        rows, columns = self.values.shape
        return self.row, self.row + rows, self.column, self.column + columns


@dataclass(frozen=True)
class Part:
    """What this rank holds of a table.

    Attributes:
        blocks: of the table, none of them empty; may be none.
        rows: of the whole table.
        like: (0, dim), of the dtype and on the device of the blocks.
    """

    blocks: tuple[Block, ...]
    rows: int
    like: Tensor

    def piece(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` on the CPU, zeros where this rank holds nothing."""
        piece = torch.zeros(stop - start, self.like.shape[1], dtype=self.like.dtype)
        for block in self.blocks:
            row, end, column, last = block.bounds
            first, end = max(row, start), min(end, stop)
            if first < end:
                held = block.values[first - row : end - row]
                piece[first - start : end - start, column:last] = held.to(piece.device)
        return piece


@dataclass(frozen=True)
class Shard:
    """The rows of a table that this rank works on, where each rank works on others.

    Attributes:
        rows: (n, dim), on the computing device.
        bounds: first row and end of what each rank works on.
    """

    rows: Tensor
    bounds: tuple[tuple[int, int], ...]


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    return type(value).__name__ == "DTensor"


def like_sharded(values: Tensor, param: Tensor) -> Tensor:
    """Values (m, n, 1), which every rank has, placed as ``param`` (m, n, dim) is as a DTensor."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if any(getattr(placement, "dim", 0) > 1 for placement in placements):
        raise ValueError(
            f"codebooks are a DTensor placed as {placements}, expected Shard(0) or Shard(1); let "
            "fully_shard choose, or return one of these from shard_placement_fn"
        )
    (row, column), held = _start("codebooks", param), param.to_local()  # type: ignore[attr-defined]
    part = values[row : row + held.shape[0], column : column + held.shape[1]]
    size, stride = values.shape, values.contiguous().stride()
    found: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=size, stride=stride
    )
    return found


def part_of_dtensor(name: str, weight: Any, ranks: Ranks) -> Part:
    """What this rank holds of the table ``name``, a DTensor (rows, dim).

    Raises:
        ValueError: it is sharded over more than one process and this one is alone, or it is placed
            in a way of which the parts are not known; or this process is not in its mesh.
    """
    start, held = _start(name, weight), weight.to_local().detach()
    if ranks.size == 1 and held.shape != weight.shape:
        raise ValueError(
            f"table {name!r} is sharded over {weight.device_mesh.size()} processes; call on all of "
            "them, with process_group= the group of its device_mesh"
        )
    blocks = (Block(held, *start),) if held.numel() else ()
    rows, dim = weight.shape
    return Part(blocks, rows, held.new_empty(0, dim))


def _start(name: str, weight: Any) -> list[int]:
    """The first row and column of a DTensor that this rank holds."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ByDimension

    mesh, placements = weight.device_mesh, tuple(weight.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"table {name!r} is a DTensor on {mesh}, which this process is not in; call on the "
            "processes of its mesh only, with a process_group of theirs"
        )
    start, shape = [0, 0], list(weight.shape)
    for placement, size, place in zip(placements, mesh.shape, coordinate, strict=True):
        if placement == Replicate():
            continue
        # Of its own type: subclasses put the parts in another order.
        if type(placement) is not ByDimension:
            raise ValueError(
                f"table {name!r} is a DTensor placed as {placements}, expected Shard() or "
                "Replicate() on each dimension of its mesh; redistribute it before compressing"
            )
        # As torch.chunk does it: all parts but the last ones are equal.
        dim, most = placement.dim, -(-shape[placement.dim] // size)
        first = min(place * most, shape[dim])
        start[dim], shape[dim] = start[dim] + first, min(most, shape[dim] - first)
    return start


def shards_of(parts: Mapping[str, Part], ranks: Ranks) -> dict[str, Shard]:
    """The shards of tables, by name; all ranks call, each with its parts of the same tables.

    Where several ranks hold the same rows, each takes a share of them, so that every row is on one.
    Tables in columns, or of which a rank holds several blocks, are put into shards by rows.

    Raises:
        ValueError: an entry of a table is on no rank, or in blocks that overlap and are not the
            same, or of other values.
    """
    if not parts:
        return {}
    own = {name: [block.bounds for block in part.blocks] for name, part in parts.items()}
    of_all = ranks.tell(own, "comparing shards")
    held = {name: [[(*one,) for one in of_rank[name]] for of_rank in of_all] for name in parts}
    for name, part in parts.items():
        _check_cover(name, part, held[name])
    _check_copies(parts, held, ranks)
    return {name: _shard(name, part, held[name], ranks) for name, part in parts.items()}


def _shard(name: str, part: Part, held: Sequence[Sequence[Bounds]], ranks: Ranks) -> Shard:
    """The rows that this rank is to work on.

    Args:
        name: of the table.
        part: what this rank holds of it.
        held: where the blocks of each rank are.
        ranks: all of them call.
    """
    dim = part.like.shape[1]
    whole_rows = all(one[2:] == (0, dim) for of_rank in held for one in of_rank)
    if not whole_rows or any(len(of_rank) > 1 for of_rank in held):
        return _put_together(name, part, held, ranks)
    bounds = _shared_out([of_rank[0][:2] if of_rank else (0, 0) for of_rank in held])
    if not part.blocks:
        return Shard(part.like, bounds)
    first, end = bounds[ranks.rank]
    block = part.blocks[0]
    return Shard(block.values[first - block.row : end - block.row], bounds)


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


def _put_together(name: str, part: Part, held: Sequence[Sequence[Bounds]], ranks: Ranks) -> Shard:
    """An equal number of rows for each rank, of blocks that are spread over all of them."""
    rows, dim = part.rows, part.like.shape[1]
    bounds = _shared_out([(0, rows)] * ranks.size)
    first, end = bounds[ranks.rank]
    own = part.like.new_empty(end - first, dim)
    # What a rank before this one holds as well comes from there.
    told = {one for of_rank in held[: ranks.rank] for one in of_rank}
    given = replace(part, blocks=tuple(b for b in part.blocks if b.bounds not in told))
    step = max(1, _PIECE_BYTES // (dim * own.itemsize))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = ranks.merge(given.piece(start, stop), f"putting rows of table {name!r} together")
        low, high = max(first, start), min(end, stop)
        if low < high:
            own[low - first : high - first] = piece[low - start : high - start]
    return Shard(own, bounds)


def _check_copies(
    parts: Mapping[str, Part], held: Mapping[str, Sequence[Sequence[Bounds]]], ranks: Ranks
) -> None:
    """ValueError where ranks that hold the same block hold other values in it."""
    copied = [
        name for name, of_ranks in held.items() if len(_all(of_ranks)) > len({*_all(of_ranks)})
    ]
    if not copied:
        return
    own = {name: [check_sum(block.values) for block in parts[name].blocks] for name in copied}
    sums = ranks.tell(own, "comparing copies")
    for name in copied:
        known: dict[Bounds, tuple[int, int]] = {}
        for rank, blocks in enumerate(held[name]):
            for one, found in zip(blocks, sums[rank][name], strict=True):
                other, expected = known.setdefault(one, (rank, found))
                if found != expected:
                    raise ValueError(
                        f"ranks differ in the rows {one[0]} to {one[1]} of table {name!r}: rank "
                        f"{other} has values with check sum {expected:x}, rank {rank} with "
                        f"{found:x}; give every rank the same model"
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


def _all(held: Sequence[Sequence[Bounds]]) -> list[Bounds]:
    return [one for of_rank in held for one in of_rank]


def _check_cover(name: str, part: Part, held: Sequence[Sequence[Bounds]]) -> None:
    """ValueError where the different blocks that ranks hold are not each entry once."""
    blocks, dim = sorted({*_all(held)}), part.like.shape[1]
    entries = sum((end - row) * (last - column) for row, end, column, last in blocks)
    inside = all(end <= part.rows and last <= dim for _, end, _, last in blocks)
    if entries == part.rows * dim and inside and not _overlap(blocks):
        return
    shown = f"rows {[one[:2] for one in blocks]}"
    if any(one[2:] != (0, dim) for one in blocks):
        shown = f"blocks (first row, end, first column, end) {blocks}"
    raise ValueError(
        f"table {name!r}: the ranks hold the {shown}, expected each of {part.rows} rows on "
        "one rank, or the same ones on several; pass the process_group over which it is sharded"
    )


def _overlap(blocks: Sequence[Bounds]) -> bool:
    """Whether two of the blocks, in order of their first rows, share an entry."""
    reached: list[Bounds] = []
    for block in blocks:
        row, _, column, last = block
        reached = [other for other in reached if other[1] > row]
        if any(column < other[3] and other[2] < last for other in reached):
            return True
        reached.append(block)
    return False
