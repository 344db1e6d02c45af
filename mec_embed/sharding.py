"""Codes stay on the ranks: each holds those of some rows, and asks the others for the rest.

A rank holds a contiguous part of the rows of each table, or of each tier: as many as every other
rank, a multiple of 8, so that parts are whole bytes of the packed codes. In a lookup, ids go to the
ranks that hold their rows, are decoded there by the table that holds the part, and come back as
rows. Codebooks, and what is stored without codes, are on every rank, and so are maps of tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .modules import (
    CodePart,
    CodeTable,
    Compressed,
    DecodedBags,
    DecodedRows,
    DecodedTable,
)
from .ranks import Ranks
from .regularization import count_rows
from .shards import check_sums
from .swap import replace_modules
from .tables import Alias, check_model, find_modules, find_replacements
from .tiers import TieredTable, TierMap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The codes of so many rows are whole bytes.
_BYTE_ROWS = 8


def shard_codes(model: nn.Module, process_group: ProcessGroup) -> int:
    """Keep, on each rank, the codes of a part of the rows only, in place.

    The model is compressed, and the same on every rank; all ranks call. Its lookups then are
    exchanges: all ranks run the model at the same time, each with its own ids, as many as it has.
    Rows, and gradients under ``DistributedDataParallel``, are those of the model before. See
    docs/distributed.md for when that pays, and what it costs.

    Codebooks stay the parameters that they are, and their optimizers go on. Tables stored without
    codes stay as they are. Modules taken out of the model before must not be used meanwhile.

    Args:
        model: with compressed tables; not inside ``DistributedDataParallel``, which may be wrapped
            around it after.
        process_group: of ``torch.distributed``; its backend must reach the device of the tables.

    Returns:
        Number of tables whose codes are in parts now.

    Raises:
        ValueError: no such group, no compressed table with codes, codes in parts already, or codes
            or codebooks that differ between ranks. Nothing has changed then, on any rank.
        TypeError: no module.

    Example:
        >>> compress(model, stats, process_group=group)  # doctest: +SKIP
        >>> shard_codes(model, group)  # doctest: +SKIP
    """
    with Ranks(process_group).guard() as ranks:
        if process_group is None:
            raise ValueError("process_group must be a group of torch.distributed, got None")
        check_model(model)
        found = [
            (table, aliases)
            for table, aliases in find_replacements(model)
            if any(coded.layout.bits for coded in table._tables())
        ]
        if not found:
            raise ValueError(
                "the model holds no compressed table with codes; call compress() first, on all "
                "ranks"
            )
        ranks.agree(_facts(found), "comparing codes")
        exchange = Exchange(process_group)
        new = [_sharded(table, exchange) for table, _ in found]
        parts = _code_parts(new, ranks)

        def finish() -> None:
            ranks.settle("replacing tables")
            for sharded in new:
                sharded.narrow(parts)

        pairs = zip(found, new, strict=True)
        replace_modules(model, [(a, table, one) for (table, a), one in pairs], then=finish)
    return len(new)


def gather_codes(model: nn.Module) -> int:
    """Undo :func:`shard_codes`, in place: every rank holds all codes again. All ranks call.

    Args:
        model: whose codes are in parts.

    Returns:
        Number of tables that are whole again.

    Raises:
        ValueError: no codes are in parts.

    Example:
        >>> gather_codes(model)  # doctest: +SKIP
        >>> save(model, "model.safetensors")  # doctest: +SKIP
    """
    found: list[tuple[_Sharded, tuple[Alias, ...]]] = list(find_modules(model, (_Sharded,)))
    if not found:
        raise ValueError("the model holds no codes in parts; nothing to gather")
    with Ranks(found[0][0].exchange.group).guard() as ranks:
        whole = _whole_codes([sharded for sharded, _ in found], ranks)

        def finish() -> None:
            ranks.settle("replacing tables")
            for sharded, _ in found:
                sharded.widen(whole)

        replace_modules(model, [(a, one, one.local) for one, a in found], then=finish)
    return len(found)


@dataclass(frozen=True)
class Spread:
    """How the rows of a table, or of a tier, are spread over the ranks.

    Attributes:
        rows: of all ranks.
        size: rows on each rank; the last ones own fewer of them.
        coded: whether there are codes; without, every rank holds all rows.
    """

    rows: int
    size: int
    coded: bool

    @classmethod
    def of(cls, table: Compressed, ranks: int) -> Spread:
        """How a table, whole still, is to be spread."""
        rows = table.num_embeddings
        if not table.layout.bits:
            return cls(rows, rows, False)
        return cls(rows, -(-rows // (_BYTE_ROWS * ranks)) * _BYTE_ROWS, True)

    def owned(self, rank: int) -> tuple[int, int]:
        """First row and end of what a rank holds."""
        return min(rank * self.size, self.rows), min((rank + 1) * self.size, self.rows)

    def packed(self, rank: int, row_bits: int) -> slice:
        """Where the codes of a rank are among those of all."""
        first, end = self.owned(rank)
        return slice(first * row_bits // 8, -(-end * row_bits // 8))


class Exchange:
    """What the ranks of a group send each other in lookups. Copies of a model share it."""

    def __init__(self, group: ProcessGroup) -> None:
        """For the ranks of ``group``."""
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: Any) -> Exchange:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model whose codes are in parts cannot be pickled; call gather_codes(model) first, "
            "on all ranks, or keep the state_dict of each rank"
        )

    def counts(self, owners: Tensor | None, like: Tensor, name: str) -> tuple[list[int], list[int]]:
        """How many rows this rank asks each rank for, and each asks this one for.

        Args:
            owners: the rank (n,) that holds each of the rows; None where this rank has failed.
            like: on the device of the group.
            name: of the table, for errors.

        Raises:
            RuntimeError: another rank has failed.
        """
        told = torch.zeros(self.ranks, 2, dtype=torch.int64, device=like.device)
        if owners is None:
            told[:, 1] = 1
        else:
            told[:, 0] = owners.bincount(minlength=self.ranks)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=self.group)
        sent, received, failed = torch.stack([told[:, 0], *heard.unbind(1)]).tolist()
        if owners is not None and any(failed):
            raise RuntimeError(
                f"table {name!r}: rank {failed.index(1)} has raised an error for the ids that it "
                "was given; see what it reports"
            )
        return sent, received

    def send(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """What all ranks send this one (sum of ``received``, ...), by rank; differentiable."""
        return _Send.apply(values, sent, received, self.group)  # type: ignore[no-any-return]


class _Send(torch.autograd.Function):
    """Rows go to other ranks, and their gradients come back the same way."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sent: list[int], received: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.way_back = received, sent, group
        heard = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(heard, values.contiguous(), received, sent, group=group)
        return heard

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Send.apply(grad, *ctx.way_back), None, None, None


class _Sharded(DecodedTable):
    """What both modules share: a table of this rank's rows, and the way to those of the others.

    A row has a number: those of a rank follow those of the rank before it, in the order of the
    rank's table, with its tiers one after the other.
    """

    def __init__(self, table: DecodedTable, exchange: Exchange) -> None:
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.padding_idx = table.padding_idx
        self.zero_padding = table.zero_padding  # type: ignore[attr-defined]
        self.name = table.name
        self.oov_row = table.oov_row
        self.exchange = exchange
        self.parts = tuple(Spread.of(coded, exchange.ranks) for coded in table._tables())
        #: Whole, in tables with tiers.
        self.tier_map = table.tier_map if isinstance(table, TieredTable) else None
        self.local = table

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Whether the codebooks get sparse gradients."""
        return self.local.sparse

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        """Whether the table was trainable."""
        return self.local.trainable

    @property
    def rows_of_rank(self) -> int:
        """Rows of the table of each rank."""
        return sum(part.size for part in self.parts)

    def narrow(self, parts: Mapping[nn.Module, CodePart]) -> None:
        """Let the local table hold this rank's rows; code tables -> their parts. Cannot fail."""
        self._hold([part.size for part in self.parts], parts)
        if isinstance(self.local, TieredTable):
            # A run of popular rows, then one of the others.
            tier_map = TierMap(self.rows_of_rank, runs=2)
            tier_map.starts[1] = tier_map.before[1] = self.parts[0].size
            self.local.tier_map = tier_map.to(self._like().device)
            self.local.num_embeddings = self.rows_of_rank
        if self.padding_idx is not None:
            padding = torch.tensor([self.padding_idx], device=self._like().device)
            owner, place = divmod(int(self._numbers(padding)), self.rows_of_rank)
            self.local.padding_idx = place if owner == self.exchange.rank else None
        self.local.oov_row = None

    def widen(self, whole: Mapping[nn.Module, CodeTable]) -> None:
        """Let the local table be what it was; parts of codes -> code tables. Cannot fail."""
        self._hold([part.rows for part in self.parts], whole)
        if isinstance(self.local, TieredTable) and self.tier_map is not None:
            self.local.tier_map = self.tier_map
            self.local.num_embeddings = self.num_embeddings
        self.local.padding_idx = self.padding_idx
        self.local.oov_row = self.oov_row

    def _hold(self, sizes: Sequence[int], codes: Mapping[nn.Module, CodeTable]) -> None:
        for coded, part, size in zip(self.local._tables(), self.parts, sizes, strict=True):
            if part.coded:
                coded.code_table = codes[coded.code_table]
                coded.code_table.holders.add(coded)
                coded.layout = replace(coded.layout, num_embeddings=size)
                coded.num_embeddings = size

    def _on_dtensors(self, look_up: Callable[..., Tensor], *values: Any) -> NoReturn:
        # Every rank would add the gradient of the same ids to the owner's.
        raise ValueError(
            f"table {self.name!r}: ids are a DTensor, expected the rank's own ids, as its codes "
            "are in parts; call gather_codes(model) first, on all ranks, to look up ids that every "
            "rank holds"
        )

    def decode(self, ids: Tensor) -> Tensor:
        """See :class:`DecodedTable`."""
        with self._telling():
            self._check_tensor("ids", ids)
        return super().decode(ids)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Around checks before ids are exchanged: an error is told to the others, which wait."""
        try:
            yield
        except Exception:
            self.exchange.counts(None, self._like(), self.name)
            raise

    @torch.compiler.disable
    def _decode(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"table {self.name!r} asks other ranks for rows, which cannot be exported; call "
                "gather_codes(model) first, on all ranks"
            )
        exchange, like = self.exchange, self._like()
        with self._telling():
            numbers, place = self._checked_numbers(ids).unique(return_inverse=True)
            owners = numbers // self.rows_of_rank
        sent, received = exchange.counts(owners, like, self.name)
        asked = exchange.send(numbers, sent, received)
        rows = self.local.decode(asked % self.rows_of_rank)
        rows = exchange.send(rows, received, sent)
        # Gradients of a row that is asked for many times are added up in at least float32.
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return exact.index_select(0, place).to(rows.dtype).view(*ids.shape, self.embedding_dim)

    def _checked_numbers(self, ids: Tensor) -> Tensor:
        """The numbers (n,) int64 of the rows ``ids``, which are checked on every device."""
        device = self._like().device
        if ids.device != device:
            raise ValueError(
                f"table {self.name!r}: ids are on {ids.device}, expected {device}, where the codes "
                "are; move them there"
            )
        ids = ids.reshape(-1)
        ends = torch.stack(ids.aminmax()).cpu() if ids.numel() else ids
        ops.reference.check_ids(ends, self.num_embeddings, self.name)
        return self._numbers(ids)

    def _numbers(self, ids: Tensor) -> Tensor:
        if self.tier_map is None:
            return self._tier_numbers(ids.long(), 0)
        popular, place = self.tier_map(ids, self.name)
        return torch.where(popular, self._tier_numbers(place, 0), self._tier_numbers(place, 1))

    def _tier_numbers(self, place: Tensor, tier: int) -> Tensor:
        part = self.parts[tier]
        owner = place // part.size if part.coded else self.exchange.rank
        first = sum(before.size for before in self.parts[:tier])
        return owner * self.rows_of_rank + first + place % part.size

    def _like(self) -> Tensor:
        return self.local._like()

    def _tables(self) -> tuple[Compressed, ...]:
        return self.local._tables()

    def _places(self) -> ops.fast.Places:
        return ()

    def _pack_plan(self) -> None:
        return None

    def extra_repr(self) -> str:
        """Shape and ranks, as ``repr`` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, ranks={self.exchange.ranks}"


class ShardedEmbedding(DecodedRows, _Sharded):
    """Rows of a table whose codes are on several ranks; :func:`shard_codes` makes these.

    All ranks call at the same time, each with its own ids.

    Args:
        table: compressed, the same on every rank.
        exchange: with the other ranks.

    Shape:
        As :class:`~mec_embed.CompressedEmbedding`; ids may be none.

    Raises:
        IndexError, TypeError: as there, but on every device.
        RuntimeError: another rank has raised one of these.
    """


class ShardedEmbeddingBag(DecodedBags, _Sharded):
    """Bags of rows of a table whose codes are on several ranks; see :class:`ShardedEmbedding`.

    Shape:
        As :class:`~mec_embed.CompressedEmbeddingBag`.
    """

    def __init__(self, table: Any, exchange: Exchange) -> None:
        """See the class."""
        super().__init__(table, exchange)
        self.mode = table.mode
        self.include_last_offset = table.include_last_offset

    def _check_bags(self, input: Any, offsets: Any, per_sample_weights: Any) -> None:
        with self._telling():
            self._check_tensor("ids", input)
            super()._check_bags(input, offsets, per_sample_weights)
            ops.reference.check_offsets(offsets, self.name)
            # What torch alone refuses, it would refuse after rows were exchanged.
            column = self._like().new_zeros(input.numel(), 1)
            with torch.no_grad():
                self._reduce_rows(column, input, offsets, per_sample_weights)


def _sharded(table: DecodedTable, exchange: Exchange) -> _Sharded:
    kind = ShardedEmbeddingBag if isinstance(table, DecodedBags) else ShardedEmbedding
    return kind(table, exchange)


def _facts(found: Sequence[tuple[DecodedTable, tuple[Alias, ...]]]) -> dict[str, str]:
    """What all ranks must agree on."""
    facts = {}
    for table, aliases in found:
        layouts = [str(coded.layout.to_dict()) for coded in table._tables()]
        facts[f"the layout of table {aliases[0].name!r}"] = " | ".join(layouts)
        facts[f"the codes and codebooks of table {aliases[0].name!r}"] = check_sums(table)
    return facts


def _coded(tables: Sequence[_Sharded]) -> dict[nn.Module, tuple[Compressed, Spread]]:
    """Code table -> one of the tables, or tiers, that it belongs to."""
    return {
        coded.code_table: (coded, part)
        for sharded in tables
        for coded, part in zip(sharded.local._tables(), sharded.parts, strict=True)
        if part.coded
    }


def _code_parts(tables: Sequence[_Sharded], ranks: Ranks) -> dict[nn.Module, CodePart]:
    """Code table -> this rank's part of it."""
    parts: dict[nn.Module, CodePart] = {}
    for code_table, (coded, part) in _coded(tables).items():
        layout = replace(coded.layout, num_embeddings=part.size)
        own = coded.codes[part.packed(ranks.rank, layout.row_bits)]
        codes = F.pad(own, (0, layout.code_bytes - len(own)))
        used = count_rows(coded, *part.owned(ranks.rank)).long()
        used = ranks.add(used, f"counting codewords of table {coded.name!r}")
        parts[code_table] = CodePart(layout, codes, used)
    return parts


def _whole_codes(tables: Sequence[_Sharded], ranks: Ranks) -> dict[nn.Module, CodeTable]:
    """Part of codes -> the code table that it was cut from."""
    whole: dict[nn.Module, CodeTable] = {}
    for code_part, (coded, part) in _coded(tables).items():
        layout = replace(coded.layout, num_embeddings=part.rows)
        code_table = CodeTable(layout)
        own = code_table.codes[part.packed(ranks.rank, layout.row_bits)]
        own.copy_(coded.codes[: len(own)])
        what = f"gathering the codes of table {coded.name!r}"
        codes = ranks.merge(code_table.codes, what)
        code_table.codes = codes.to(coded.codes.device)
        whole[code_part] = code_table
    return whole
