"""Blocks of a table on several ranks become rows; blocks that do not fit are an error."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.distributed as dist

from mec_embed import shards
from mec_embed.ranks import ALONE, Ranks
from mec_embed.shards import Block, Part

ROWS, DIM = 1003, 6
#: For each rank of four, (first row, end, first column, end) of its blocks.
HELD = {
    "columns": [[(0, ROWS, 0, 2)], [(0, ROWS, 2, 5)], [], [(0, ROWS, 5, DIM)]],
    "grid": [
        [(0, 500, 0, 3)],
        [(500, ROWS, 0, 3)],
        [(0, 700, 3, DIM)],
        [(700, ROWS, 3, DIM)],
    ],
    "several of one rank": [[(700, ROWS, 0, DIM), (0, 100, 0, DIM)], [(100, 700, 0, DIM)], [], []],
    "copies of columns": [[(0, ROWS, 0, 3)], [(0, ROWS, 3, DIM)]] * 2,
}


def whole(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A table with values that no sum would keep."""
    table = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    table[3, 1], table[500, 5] = -0.0, float("nan")
    return table


def part_of(table: torch.Tensor, held: list[tuple[int, int, int, int]]) -> Part:
    blocks = [Block(table[a:b, c:d].clone(), a, c) for a, b, c, d in held]
    return Part(tuple(blocks), len(table), table[:0])


def put_together_on_ranks():
    """Bounds and rows of this rank, and the most rows that were exchanged at once."""
    shards._PIECE_BYTES = 4 << 10
    most, merge = [0], Ranks.merge

    def watched(ranks, values, what):
        most[0] = max(most[0], values.nbytes)
        return merge(ranks, values, what)

    Ranks.merge = watched
    ranks, found = Ranks(dist.group.WORLD), {}
    for dtype in (torch.float32, torch.float16):
        parts = {name: part_of(whole(dtype), held[ranks.rank]) for name, held in HELD.items()}
        for name, shard in shards.shards_of(parts, ranks).items():
            found[name, dtype] = shard.bounds, shard.rows
    return found, most[0]


@pytest.mark.slow
def test_blocks_become_rows_in_small_pieces(tmp_path):
    for rank, (found, most) in enumerate(processes.run(put_together_on_ranks, 4, tmp_path)):
        assert 0 < most <= 4 << 10
        for (_, dtype), (bounds, rows) in found.items():
            assert bounds == ((0, 250), (250, 501), (501, 752), (752, ROWS))
            first, end = bounds[rank]
            expected = whole(dtype)[first:end]
            assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        ([(0, ROWS, 0, 3)], r"blocks \(first row, end, first column, end\) \[\(0, 1003, 0, 3\)\]"),
        ([(0, ROWS, 0, 4), (0, 501, 3, DIM)], "blocks"),  # as many entries as the table
        ([(0, 500, 0, DIM), (499, ROWS - 1, 0, DIM)], r"rows \[\(0, 500\), \(499, 1002\)\]"),
        ([], r"rows \[\]"),
    ],
)
def test_blocks_that_do_not_cover_the_table(held, shown):
    table = torch.zeros(ROWS + 9, DIM)
    part = Part(part_of(table, held).blocks, ROWS, table[:0])
    with pytest.raises(ValueError, match=f"table 't': the ranks hold the {shown}.*each of 1003"):
        shards.shards_of({"t": part}, ALONE)


def test_rows_beyond_the_table():
    table = torch.zeros(ROWS + 9, DIM)
    part = Part(part_of(table, [(9, ROWS + 9, 0, DIM)]).blocks, ROWS, table[:0])
    with pytest.raises(ValueError, match=r"rows \[\(9, 1012\)\]"):
        shards.shards_of({"t": part}, ALONE)


def test_one_process_takes_all():
    table = whole()
    held = [(0, ROWS, 3, DIM), (0, ROWS, 0, 3)]
    shard = shards.shards_of({"t": part_of(table, held)}, ALONE)["t"]
    assert shard.bounds == ((0, ROWS),)
    assert torch.equal(shard.rows.view(torch.uint8), table.view(torch.uint8))
