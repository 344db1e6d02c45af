"""Tables in two tiers: popular rows get more bits than the others.

A :class:`TierMap` says which rows are popular. Each tier is a compressed table of its own, so that
all that holds for codes, codebooks and their training holds for tiers.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import ops
from .modules import (
    CompressedEmbedding,
    DecodedBags,
    DecodedRows,
    DecodedTable,
    SharedModule,
    known_mode,
    padding_row,
)
from .ops.reference import BLOCK_ROWS, count_ones

#: Runs of popular and unpopular rows in turn, up to which these are listed one by one.
MOST_RUNS = 16
#: Most rows that the counts of a bitmap can hold.
_MOST_POPULAR = 2**31 - 1


class TierMap(SharedModule):
    """Which rows of a table are popular, and the place of each row within its tier.

    Rows that are sorted by popularity but for a few exceptions, as tokenizers number them, are
    listed as runs: some bytes for the whole table. Others get a bitmap with one count for each
    128 rows: 1.25 bits a row.

    Args:
        rows: of the table.
        runs: number of runs, or None for a bitmap.
    """

    starts: Tensor
    before: Tensor
    bitmap: Tensor

    def __init__(self, rows: int, runs: int | None) -> None:
        """A map without values."""
        super().__init__()
        self.rows = rows
        self.runs = runs
        blocks = 0 if runs is not None else -(-rows // BLOCK_ROWS)
        kind = torch.int64 if runs is not None else torch.int32
        self.register_buffer("starts", torch.zeros(runs or 0, dtype=torch.int64))
        self.register_buffer("before", torch.zeros(runs or blocks, dtype=kind))
        self.register_buffer("bitmap", torch.zeros(blocks * BLOCK_ROWS // 8, dtype=torch.uint8))

    @classmethod
    def of(cls, popular: Tensor) -> TierMap:
        """The smaller map of ``popular``, bool (rows,)."""
        runs = _runs(popular)
        tier_map = cls(len(popular), runs)
        if runs is not None:
            tier_map._list_runs(popular)
        else:
            tier_map._set_bits(popular)
        return tier_map

    @staticmethod
    def nbytes_of(popular: Tensor) -> int:
        """Bytes that the map of ``popular``, bool (rows,), takes."""
        runs = _runs(popular)
        if runs is not None:
            return 16 * runs
        return -(-len(popular) // BLOCK_ROWS) * (BLOCK_ROWS // 8 + 4)

    def _list_runs(self, popular: Tensor) -> None:
        starts = (popular[1:] != popular[:-1]).nonzero()[:, 0] + 1
        first = [0] if bool(popular[0]) else [0, 0]
        self.starts.copy_(torch.cat([torch.tensor(first), starts]))
        lengths = self.starts[1:] - self.starts[:-1]
        lengths[1::2] = 0  # every second run is not popular
        self.before[1:] = lengths.cumsum(0)

    def _set_bits(self, popular: Tensor) -> None:
        padded = torch.zeros(len(self.before) * BLOCK_ROWS, dtype=torch.bool)
        padded[: len(popular)] = popular
        ahead = padded.view(-1, BLOCK_ROWS).sum(1).cumsum(0)
        if int(ahead[-1]) > _MOST_POPULAR:
            raise ValueError(f"a tier of {int(ahead[-1]):,} rows is more than {_MOST_POPULAR:,}")
        self.before[1:] = ahead[:-1].int()
        # A byte a row: larger integers would take more memory than the codes.
        powers = (1 << torch.arange(8)).to(torch.uint8)
        self.bitmap.copy_((padded.view(-1, 8) * powers).sum(1, dtype=torch.uint8))

    def popular_rows(self) -> int | None:
        """Number of popular rows, or None for a map that contradicts itself, as in a bad file."""
        if self.runs is not None:
            return self._popular_in_runs()
        ones = count_ones(self.bitmap.int()).view(-1, BLOCK_ROWS // 8).sum(1).cumsum(0)
        agrees = bool((self.before[1:] == ones[:-1]).all()) and not int(self.before[0])
        last = [int(byte) for byte in self.bitmap[self.rows // 8 :]]
        beyond = sum(byte << (8 * number) for number, byte in enumerate(last)) >> self.rows % 8
        return int(ones[-1]) if agrees and not beyond else None

    def _popular_in_runs(self) -> int | None:
        starts, total = self.starts.tolist(), 0
        if starts[0] or sorted(starts) != starts or starts[-1] >= self.rows:
            return None
        for number, (start, end) in enumerate(itertools.pairwise([*starts, self.rows])):
            if int(self.before[number]) != total:
                return None
            total += 0 if number % 2 else end - start
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of the map."""
        return self.starts.nbytes + self.before.nbytes + self.bitmap.nbytes

    def forward(self, ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Whether ``ids`` are popular (bool), and their places in their tiers (int64)."""
        return ops.tiers(ids, self.starts, self.before, self.bitmap, self.rows, name)

    def extra_repr(self) -> str:
        """Rows and kind, as ``repr`` shows them."""
        return f"{self.rows}, " + ("bitmap" if self.runs is None else f"runs={self.runs}")


def _runs(popular: Tensor) -> int | None:
    """Runs to list, starting with a popular one (perhaps empty); None where a bitmap is better."""
    runs = 1 + int((popular[1:] != popular[:-1]).sum()) + int(not popular[0])
    return runs if runs <= MOST_RUNS else None


class TieredTable(DecodedTable):
    """What both modules share: the map, the tiers and the lookup."""

    def __init__(
        self,
        tier_map: TierMap,
        head: CompressedEmbedding,
        tail: CompressedEmbedding,
        *,
        padding_idx: int | None = None,
        zero_padding: bool = True,
        name: str = "embedding",
    ) -> None:
        super().__init__()
        if head.embedding_dim != tail.embedding_dim:
            raise ValueError(
                f"table {name!r}: rows of the tiers have {head.embedding_dim} and "
                f"{tail.embedding_dim} entries, expected as many in both"
            )
        self.num_embeddings = tier_map.rows
        self.embedding_dim = head.embedding_dim
        self.padding_idx = padding_row(padding_idx, tier_map.rows, name)
        self.zero_padding = zero_padding
        self.name = name
        self.tier_map = tier_map
        self.head = head
        self.tail = tail

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Whether the codebooks get sparse gradients."""
        return self.head.sparse

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        """Whether the table was trainable."""
        return self.head.trainable

    @property
    def tiers(self) -> tuple[CompressedEmbedding, CompressedEmbedding]:
        """Popular rows, and the others."""
        return self.head, self.tail

    def _like(self) -> Tensor:
        return self.head._like()

    def _tables(self) -> tuple[CompressedEmbedding, ...]:
        return self.tiers

    def _places(self) -> ops.fast.Places:
        modules = self._modules
        return (
            *(modules, "tier_map", self.tier_map, None, 0),
            *(modules, "head", self.head, None, 0),
            *(modules, "tail", self.tail, None, 0),
            *ops.fast.places_in(self.tier_map._buffers, "starts", "before", "bitmap"),
            *ops.fast.places_of(self.head),
            *ops.fast.places_of(self.tail),
        )

    def _pack_plan(self) -> bytes | None:
        head, tail = ops.fast.fields_of(self.head), ops.fast.fields_of(self.tail)
        places = self.tier_map
        tier_map = ops.cpu.map_fields(
            places.starts, places.before, places.bitmap, self.num_embeddings
        )
        if head is None or tail is None or tier_map is None:
            return None
        tiers = head, tail
        return ops.cpu.pack_plan(self.num_embeddings, self.embedding_dim, tiers, tier_map)

    def _rows_on_gpu(self) -> Any:
        fast, tier_map = ops.fast, self.tier_map
        tiers = [fast.decoded_on_gpu(tier) for tier in self.tiers]
        tensors = tier_map.starts, tier_map.before, tier_map.bitmap
        if not all(type(tensor) is Tensor for tensor in tensors):
            return None
        places = fast.on_gpu.Map(*tensors, self.num_embeddings)
        return fast.on_gpu.lookups_in_tiers(places, *tiers)

    def _decode(self, ids: Tensor) -> Tensor:
        places, head, tail = self.tier_map, self.head, self.tail
        return ops.tiered(
            ids,
            places.starts,
            places.before,
            places.bitmap,
            head.codes,
            head.codebooks,
            head.codebook_set.scales,
            tail.codes,
            tail.codebooks,
            tail.codebook_set.scales,
            self.num_embeddings,
            self.embedding_dim,
            head.num_embeddings,
            head.layout.bits,
            tail.num_embeddings,
            tail.layout.bits,
            -1 if self.padding_idx is None else self.padding_idx,
            self.zero_padding,
            self.sparse,
            head.output_dtype.dtype,
            self.name,
        )


class TieredEmbedding(DecodedRows, TieredTable):
    """A drop-in for ``nn.Embedding`` with more bits for popular rows.

    :func:`mec_embed.compress` makes these where the planner sees a gain.

    Args:
        tier_map: which rows are popular.
        head: popular rows, in order.
        tail: the other rows, in order.
        padding_idx: row that passes no gradient.
        zero_padding: whether that row decodes to exact zeros.
        name: the table's name, for errors.

    Shape:
        - input: int32 or int64, any shape.
        - output: ``(*input.shape, embedding_dim)`` of the tiers' dtype.

    Raises:
        IndexError: an id outside ``0..num_embeddings - 1`` (checked on the CPU).
        TypeError: ids of another dtype.
        ValueError: tiers whose rows differ in length.

    Example:
        >>> from mec_embed import CodeLayout
        >>> from mec_embed.tiers import TierMap
        >>> head = CompressedEmbedding(CodeLayout("additive", 10, 8, 4, 16))
        >>> tail = CompressedEmbedding(CodeLayout("additive", 90, 8, 1, 16))
        >>> tier_map = TierMap.of(torch.arange(100) < 10)
        >>> TieredEmbedding(tier_map, head, tail)(torch.tensor([[1, 2, 99]])).shape
        torch.Size([1, 3, 8])
    """


class TieredEmbeddingBag(DecodedBags, TieredTable):
    """A drop-in for ``nn.EmbeddingBag``, with more bits for popular rows.

    Other arguments as :class:`TieredEmbedding`.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether ``offsets`` ends with the number of ids.

    Shape:
        As :class:`~mec_embed.CompressedEmbeddingBag`.

    Raises:
        IndexError, TypeError: as :class:`TieredEmbedding`.
        ValueError: tiers whose rows differ in length; offsets that do not fit.

    Example:
        >>> from mec_embed import CodeLayout
        >>> from mec_embed.tiers import TierMap
        >>> head = CompressedEmbedding(CodeLayout("additive", 10, 8, 4, 16))
        >>> tail = CompressedEmbedding(CodeLayout("additive", 90, 8, 1, 16))
        >>> tier_map = TierMap.of(torch.arange(100) < 10)
        >>> TieredEmbeddingBag(tier_map, head, tail, mode="sum")(torch.tensor([[1, 99]])).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        tier_map: TierMap,
        head: CompressedEmbedding,
        tail: CompressedEmbedding,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(tier_map, head, tail, **options)
        self.mode = known_mode(mode, self.name)
        self.include_last_offset = include_last_offset
