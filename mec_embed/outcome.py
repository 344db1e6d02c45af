"""What learning makes of a draft: the replacements, and what the report says of each table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .budget import Group, Shape, popular_rows
from .layout import CodeLayout, dtype_name
from .learning.fit import FittedCodes, Learned, fit_codes, learn_side_by_side
from .learning.objective import Progress
from .modules import (
    DECODE_ROWS,
    CodebookSet,
    CodeTable,
    Compressed,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    DecodedTable,
)
from .report import CompressionReport, TableReport
from .tables import SkippedTable, Table, untouched
from .tiers import TieredEmbedding, TieredEmbeddingBag, TierMap

if TYPE_CHECKING:
    from .compress import Draft

T = TypeVar("T")

#: Finds the codes of a group of this shape by calling what it is given, or knows them already.
Fit = Callable[[Group, Shape, Callable[[], FittedCodes]], FittedCodes]

#: Kinds of layouts without codes to learn.
_WITHOUT_CODES = ("rows", "shared")


def always_fit(group: Group, shape: Shape, fit: Callable[[], FittedCodes]) -> FittedCodes:
    """Calls what finds the codes."""
    return fit()


@dataclass(frozen=True)
class _Piece:
    """How a table, or one tier of it, is stored.

    ``codes_of`` and ``codebooks_of`` name the table whose tensors it uses, if it is not the owner.
    """

    layout: CodeLayout
    codes_of: str | None
    codebooks_of: str | None
    mass: float


class Outcome:
    """The replacements and what the report says of each table, filled group by group."""

    def __init__(self, draft: Draft, fit: Fit = always_fit) -> None:
        self.draft = draft
        self.fit = fit
        self.modules: dict[Table, DecodedTable] = {}
        #: Table -> tier (None for a whole table) -> what is planned, learned and told of it.
        self.pieces: dict[Table, dict[str | None, _Piece]] = {}
        self.learned: dict[Table, dict[str | None, Compressed]] = {}
        self.told: dict[Table, dict[str | None, dict[str, Any]]] = {}
        #: Codebooks of the groups that ranks have learned at the same time.
        self.side_by_side: dict[Group, Learned] = {}
        #: Map of the tiers of a table, and the table that it was made for.
        self.maps: dict[Table, tuple[TierMap, Table]] = {}
        self.rows: dict[str, TableReport] = {}
        self._lookups = dict(zip(draft.tables, draft.lookups, strict=True))
        for skipped in draft.skipped:
            self.rows[skipped.name] = _untouched(skipped)
        pairs = zip(draft.assignment.groups, draft.assignment.chosen, strict=True)
        for group, choice in pairs:
            self._plan_group(group, choice.shape)
        for table in self.pieces:
            self.rows[table.name] = self._planned(table)

    def _plan_group(self, group: Group, shape: Shape | None) -> None:
        if shape is None:
            for field in group.fields:
                for table in field.tables:
                    reason = "fits the budget as it is, or codes would take more"
                    self.rows[table.name] = _untouched(
                        untouched(table.module, table.aliases, reason)
                    )
            return
        layouts = group.layouts(shape, self.draft.config)
        for field, field_layouts in zip(group.fields, layouts, strict=True):
            if field.tier == "head":
                tier_map = TierMap.of(popular_rows(field))
                self.maps |= {table: (tier_map, field.table) for table in field.tables}
            for place, (table, layout) in enumerate(zip(field.tables, field_layouts, strict=True)):
                owner = group.first.tables[place]
                self.pieces.setdefault(table, {})[field.tier] = _Piece(
                    layout,
                    field.table.name if place else None,
                    owner.name if owner is not table else None,
                    field.mass,
                )

    def _planned(self, table: Table) -> TableReport:
        lookups = self._lookups[table]
        pieces = self._by_tier(self.pieces[table])
        layouts = [piece.layout for piece in pieces]
        codes = sum(piece.layout.code_bytes for piece in pieces if not piece.codes_of)
        books = sum(piece.layout.codebook_bytes for piece in pieces if not piece.codebooks_of)
        words = sum(layout.num_subvectors * layout.codebook_size for layout in layouts)
        tier_map, owner = self.maps.get(table, (None, table))
        return TableReport(
            name=table.name,
            aliases=table.names[1:],
            rows=table.rows,
            dim=table.dim,
            dtype=dtype_name(table.weight.dtype),
            layout=" | ".join(layout.describe() for layout in layouts),
            row_bits=round(sum(one.row_bits * one.num_embeddings for one in layouts) / table.rows),
            bytes_before=table.nbytes,
            code_bytes=codes,
            codebook_bytes=books,
            other_bytes=tier_map.nbytes if tier_map is not None and owner is table else 0,
            shares_codes_with=next((p.codes_of for p in pieces if p.codes_of), None),
            shares_codebooks_with=next((p.codebooks_of for p in pieces if p.codebooks_of), None),
            popularity="uniform" if lookups is None else self.draft.popularity,
            lookups=lookups,
            codewords=words if any(layout.bits for layout in layouts) else None,
        )

    def _by_tier(self, values: Mapping[str | None, T]) -> list[T]:
        """The value of the whole table, or those of head and tail."""
        return [values[tier] for tier in (None, "head", "tail") if tier in values]

    def learn(
        self, group: Group, shape: Shape, device: torch.device | str | None, tell: Progress
    ) -> None:
        """Learn one group: its parts of modules, and what the report says of them."""
        started = time.perf_counter()
        layouts = group.layouts(shape, self.draft.config)
        if shape[0] in _WITHOUT_CODES:
            self._keep_rows(group, layouts)
        else:
            self._learn_codes(group, shape, layouts, device, tell)
        told = self.told.setdefault(group.first.table, {}).setdefault(group.first.tier, {})
        told["seconds"] = time.perf_counter() - started

    def _keep_rows(self, group: Group, layouts: list[list[CodeLayout]]) -> None:
        """Rows as they are in the codebooks' dtype, or their mean for all of them."""
        means = [[field.mass / group.mass * part for part in field.mean] for field in group.fields]
        books = []
        for place, (table, layout) in enumerate(zip(group.first.tables, layouts[0], strict=True)):
            if layout.kind == "shared":
                mean = torch.stack([mean[place] for mean in means]).sum(0)
                rows = mean.to(table.weight.dtype)[None]
            else:
                rows = table.whole()
            books.append(CodebookSet(layout, table.weight.requires_grad))
            books[-1].store(rows[None].cpu())
            _check_fits(table, books[-1].codebooks, layout.codebook_dtype)
        for field, field_layouts in zip(group.fields, layouts, strict=True):
            codes = CodeTable(field_layouts[0])
            for table, layout, book in zip(field.tables, field_layouts, books, strict=True):
                self._keep(table, field.tier, layout, codes, book)

    def _keep(
        self,
        table: Table,
        tier: str | None,
        layout: CodeLayout,
        codes: CodeTable,
        book: CodebookSet,
    ) -> None:
        module = _module(table, tier, layout, codes, book)
        self.learned.setdefault(table, {})[tier] = module

    def _learn_codes(
        self,
        group: Group,
        shape: Shape,
        layouts: list[list[CodeLayout]],
        device: torch.device | str | None,
        tell: Progress,
    ) -> None:
        place = torch.device(device) if device is not None else group.first.table.device

        def fit() -> FittedCodes:
            rows, code_shape = self.draft.task(group, shape, place)
            known = self._learned_side_by_side(group, place, tell)
            return fit_codes(rows, code_shape, self.draft.config, tell, known)

        fitted = self.fit(group, shape, fit)
        _check_fits(group.first.table, fitted.codebooks, layouts[0][0].codebook_dtype)
        widths = list(group.first.widths) if group.first.partner else fitted.codebooks.shape[2]
        books = []
        for table, layout, values in zip(
            group.first.tables, layouts[0], fitted.codebooks.split(widths, dim=2), strict=True
        ):
            books.append(CodebookSet(layout, table.weight.requires_grad))
            books[-1].store(values.cpu())
        for number, field in enumerate(group.fields):
            codes = _holding(layouts[number][0], fitted.encoded[number].packed)
            for table, layout, book in zip(field.tables, layouts[number], books, strict=True):
                self._keep(table, field.tier, layout, codes, book)
                self.told.setdefault(table, {})[field.tier] = _told(fitted, number)

    def _learned_side_by_side(
        self, group: Group, device: torch.device, tell: Progress
    ) -> Learned | None:
        """Codebooks of a group, learned with those of the next while there are ranks; else None."""
        draft = self.draft
        if draft.ranks.size == 1:
            return None
        if group not in self.side_by_side:
            waiting = [
                (g, s) for g, s in draft.groups_to_learn() if s[0] in ("additive", "product")
            ]
            first = next(number for number, (one, _) in enumerate(waiting) if one is group)
            wave = waiting[first : first + draft.ranks.size]
            tasks = [draft.task(one, shape, device) for one, shape in wave]
            found = learn_side_by_side(tasks, draft.config, tell, draft.ranks)
            self.side_by_side = {one: each for (one, _), each in zip(wave, found, strict=True)}
        return self.side_by_side[group]

    def assemble(self) -> None:
        """Put tiers together; measure and describe every table."""
        weights = dict(zip(self.draft.tables, self.draft.weights, strict=True))
        for table, tiers in self.learned.items():
            parts: list[Any] = self._by_tier(tiers)
            whole = parts[0] if len(parts) == 1 else _tiered(table, self.maps[table][0], *parts)
            if self.draft.earlier is not None:
                whole.oov_row = self.draft.earlier.oov_row(table)
            self.modules[table] = whole
            told = self._summary(table)
            error = table_error(whole, table, weights[table])
            row = self.rows[table.name]
            self.rows[table.name] = replace(row, weighted_error=error, **told)

    def _summary(self, table: Table) -> dict[str, Any]:
        """What is told of the tiers of a table: totals, and means weighted by lookups."""
        told = self.told.get(table, {})
        if len(told) < 2:
            return next(iter(told.values()), {})
        mass = {tier: self.pieces[table][tier].mass for tier in told}
        summary: dict[str, Any] = {}
        totals = ("seconds", "dead_codes", "changed_rows")
        for name in (*totals, "start_error", "learned_error", "perplexity"):
            known = {t: values[name] for t, values in told.items() if values.get(name) is not None}
            total = name in totals
            if known:
                share = sum(mass[tier] for tier in known)
                weighted = sum(known[tier] * (1 if total else mass[tier] / share) for tier in known)
                summary[name] = weighted
        return summary | {"objective": told.get("head", {}).get("objective", {})}

    def report(self, seconds: float | None) -> CompressionReport:
        """All tables in the order of the model."""
        draft, plan = self.draft, self.draft.assignment
        rows = tuple(self.rows[name] for name in draft.order)
        # Maps of tiers, and tables left alone, take the same whatever the codes do.
        rest = sum(row.bytes_after for row in rows) - sum(choice.nbytes for choice in plan.chosen)
        return CompressionReport(
            rows,
            draft.config,
            (*draft.notes, *_changes(rows)),
            seconds,
            plan.error if plan.others else None,
            tuple((nbytes + rest, error) for nbytes, error in plan.others),
        )


def _told(fitted: FittedCodes, number: int) -> dict[str, Any]:
    """What the report says of one array of rows."""
    encoded = fitted.encoded[number]
    return {
        "start_error": fitted.start_error,
        "learned_error": fitted.error,
        "perplexity": sum(encoded.perplexity) / len(encoded.perplexity),
        "dead_codes": encoded.dead_codes,
        "changed_rows": encoded.changed_rows,
        "objective": fitted.history[-1] if fitted.history else {},
    }


def _changes(rows: Sequence[TableReport]) -> Iterator[str]:
    """How many rows have other codes than in an earlier version."""
    coded = [row for row in rows if row.changed_rows is not None and not row.shares_codes_with]
    if coded:
        changed = sum(row.changed_rows or 0 for row in coded)
        share = changed / sum(row.rows for row in coded)
        yield f"layouts are those of start_from; {changed:,} rows ({share:.1%}) got other codes"


def _untouched(table: SkippedTable) -> TableReport:
    return TableReport(
        name=table.name,
        aliases=table.aliases,
        rows=table.rows,
        dim=table.dim,
        dtype=table.dtype,
        layout="as it was",
        row_bits=0,
        bytes_before=table.nbytes,
        code_bytes=0,
        codebook_bytes=0,
        other_bytes=table.nbytes,
        reason=table.reason,
    )


def _check_fits(table: Table, codebooks: Tensor, dtype: torch.dtype) -> None:
    """ValueError for codebooks that have become infinite in the dtype that they are stored in."""
    if not bool(codebooks.isfinite().all()):
        raise ValueError(
            f"table {table.name!r}: its codebooks do not fit into {dtype_name(dtype)}, whose "
            f"largest value is {torch.finfo(dtype).max:g}; use codebook_dtype='float32' or 'int8'"
        )


def _holding(layout: CodeLayout, packed: Tensor) -> CodeTable:
    """The codes ``packed`` as they are: a copy of a large table's would be as large."""
    with torch.device("meta"):
        codes = CodeTable(layout)
    codes.register_buffer("codes", packed)
    return codes


def _module(
    table: Table, tier: str | None, layout: CodeLayout, codes: CodeTable, books: CodebookSet
) -> Compressed:
    """The replacement of a table, or of a tier, on its device, around its codes and codebooks."""
    old = table.module
    options: dict[str, Any] = {
        "sparse": old.sparse,
        "dtype": table.weight.dtype,
        "requires_grad": table.weight.requires_grad,
        "name": table.name,
        "code_table": codes,
        "codebook_set": books,
    }
    device = table.device
    if tier is not None:
        return CompressedEmbedding(layout, **options).to(device)
    options |= _padding(table)
    if isinstance(old, nn.EmbeddingBag):
        return CompressedEmbeddingBag(layout, **options, **_bags(old)).to(device)
    return CompressedEmbedding(layout, **options).to(device)


def _tiered(
    table: Table, tier_map: TierMap, head: CompressedEmbedding, tail: CompressedEmbedding
) -> DecodedTable:
    """The replacement of a table in tiers, on its device."""
    old, options = table.module, {"name": table.name, **_padding(table)}
    if isinstance(old, nn.EmbeddingBag):
        bags = TieredEmbeddingBag(tier_map, head, tail, **options, **_bags(old))
        return bags.to(table.device)
    return TieredEmbedding(tier_map, head, tail, **options).to(table.device)


def _padding(table: Table) -> dict[str, Any]:
    return {"padding_idx": table.module.padding_idx, "zero_padding": table.zero_padding}


def _bags(old: nn.EmbeddingBag) -> dict[str, Any]:
    return {"mode": old.mode, "include_last_offset": old.include_last_offset}


def table_error(module: DecodedTable, table: Table, weights: Tensor) -> float:
    """Weighted squared error of what ``module`` decodes / weighted variance of the dense rows.

    Args:
        module: the replacement.
        table: the dense table.
        weights: (rows,) popularity weights.
    """
    # Of error, square and mass, and of each column.
    sums = torch.zeros(3 + table.dim, dtype=torch.float64, device=table.device)
    with torch.no_grad():
        for start, stop in table.parts(DECODE_ROWS):
            x = table.piece(start, stop).double()
            share = weights[start:stop].to(x.device).double()
            ids = torch.arange(start, stop, device=x.device)
            sums[0] += share @ (x - module.decode(ids).double()).square().sum(1)
            sums[1] += share @ x.square().sum(1)
            sums[2] += share.sum()
            sums[3:] += share @ x
    sums = table.ranks.add(sums, f"measuring the error of table {table.name!r}")
    error, square, mass = sums[:3].tolist()
    variance = square - float(sums[3:].square().sum()) / mass
    # Of a table whose rows are all equal, the error relative to the rows themselves.
    return error / variance if variance > 1e-12 * square else error / max(square, 1e-300)
