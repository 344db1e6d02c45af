"""Tables after compression: new rows, changed rows, and whether the codebooks still fit.

The codebooks stay as they are; only codes are chosen, by plain squared error. Tables that share
their codes (a field's vectors and its first-order weights) are changed together: a code stands for
both.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .forward import full_precision
from .layout import dtype_name
from .learning.fit import FINAL_BEAM, chunk_rows, kept_codes
from .learning.quantizers import quantizer_for
from .modules import CodebookSet, Compressed, DecodedTable, check_gathered, quantize_codebooks
from .optimization import check_optimizer, trained_by
from .packing import empty_packed, pack, pack_into, unpack
from .swap import Optimizers, listed, replace_parameters
from .tiers import TieredTable, TierMap

Tables = DecodedTable | Sequence[DecodedTable]
Rows = Tensor | Sequence[Tensor]


@torch.inference_mode(False)
@torch.no_grad()
def extend(
    tables: Tables, rows: Rows, *, popular: bool = False, optimizer: Optimizers = None
) -> range:
    """Append rows to a compressed table, in place, with the codebooks that it has.

    Args:
        tables: a compressed table, or all tables that share its codes.
        rows: new rows (n, embedding_dim), floating, for each of the tables.
        popular: put them into the tier of more bits, of tables in tiers.
        optimizer: or several, that train the tables. A table kept as rows is one parameter; a
            longer one takes its place in its group, and its state begins anew.

    Returns:
        The ids of the new rows.

    Raises:
        ValueError: rows that do not fit or are not finite; a table that shares its codes with one
            that is not given; rows that would be stored as one; an optimizer that does not hold
            the table. Nothing has changed then.
        TypeError: a module that is no compressed table, an optimizer that is none.

    Example:
        >>> ids = extend(model.item, vectors_of_new_items)  # doctest: +SKIP
        >>> model.item(torch.tensor([ids[0]]))  # doctest: +SKIP
    """
    held, given = _matched(tables, rows)
    first, count = held[0].num_embeddings, len(given[0])
    parts = _tier_of(held, popular)
    _check_holders(parts)
    if parts[0].layout.kind == "shared":
        raise ValueError(
            f"table {held[0].name!r}: rows of this tier are stored as one; use popular=True, or "
            "compress a retrained model"
        )
    _check_fits(parts, given)
    _check_optimizers(parts, optimizer)
    codes = _encode(parts, given)
    if codes is None:
        before = [part.codebooks for part in parts]
        for part, new in zip(parts, given, strict=True):
            _append_codewords(part.codebook_set, new)
        replace_parameters(
            optimizer, dict(zip(before, (part.codebooks for part in parts), strict=True))
        )
    else:
        _append_codes(parts[0], codes)
    for part in parts:
        part.layout = replace(
            part.layout,
            num_embeddings=part.num_embeddings + count,
            codebook_size=part.layout.codebook_size + (count if codes is None else 0),
        )
        part.num_embeddings += count
    # After the codes, which it leads to.
    for tier_map in {table.tier_map for table in held if isinstance(table, TieredTable)}:
        _extend_map(tier_map, count, popular)
    for table in held:
        if isinstance(table, TieredTable):
            table.num_embeddings += count
        table._fast.forget()
    return range(first, first + count)


@torch.inference_mode(False)
@torch.no_grad()
def update(tables: Tables, ids: Tensor, rows: Rows) -> int:
    """Encode some rows of a compressed table anew, in place, with the codebooks that it has.

    Args:
        tables: a compressed table, or all tables that share its codes.
        ids: of the rows (n,), int32 or int64; each once.
        rows: what they are to be (n, embedding_dim), for each of the tables.

    Returns:
        How many of them got other codes; a row keeps those it has where none better are found.

    Raises:
        ValueError, TypeError: as :func:`extend`; ids that are no rows, or twice the same.

    Example:
        >>> changed = update(model.item, ids, retrained[ids])  # doctest: +SKIP
    """
    held, given = _matched(tables, rows)
    ids = _checked_ids(held[0], ids, given[0])
    _check_unique(held[0], ids)
    todo: list[tuple[list[Compressed], Tensor, list[Tensor]]] = []
    for parts, inside, places in _by_tier(held, ids):
        new = [one[inside] for one in given]
        _check_holders(parts)
        if len(places) and parts[0].layout.kind == "shared":
            raise ValueError(
                f"table {held[0].name!r}: row {int(ids[inside][0])} is one of those that are "
                "stored as one row; leave such rows out, or compress a retrained model"
            )
        _check_fits(parts, new)
        todo.append((parts, places, new))
    encoded = [_encode(parts, new, places) for parts, places, new in todo]
    changed = 0
    for (parts, places, new), codes in zip(todo, encoded, strict=True):
        if codes is not None:
            changed += _write_codes(parts[0], places, codes)
            continue
        changed += len(places)
        for part, one in zip(parts, new, strict=True):
            _write_codewords(part.codebook_set, places, one)
    return changed


@dataclass(frozen=True)
class Drift:
    """How well codebooks fit rows.

    Attributes:
        error: weighted squared error of the rows, encoded as well as the codebooks allow, relative
            to their weighted variance.
        expected: the same when the table was compressed.
        drifted: whether the error is above ``tolerance`` times what was expected.
    """

    error: float
    expected: float
    drifted: bool


def drift(
    table: DecodedTable,
    rows: Tensor,
    expected: float,
    weights: Tensor | None = None,
    tolerance: float = 1.5,
    *,
    ids: Tensor | None = None,
) -> Drift:
    """Say whether the codebooks still fit the rows of a retrained table, or need to be refitted.

    Args:
        table: a compressed table.
        rows: a sample of rows (n, embedding_dim), such as those that changed.
        expected: ``weighted_error`` of the table in its :class:`mec_embed.TableReport`.
        weights: popularity weight (n,) of each, as in the expected error; None weighs all alike,
            and of rows that are mostly rare finds more than that.
        tolerance: how many times the expected error is still no drift.
        ids: which rows of the table they are (n,), int32 or int64, so that of a table in tiers each
            is measured in its own, as in the expected error. None measures all in the popular
            tier, where errors are less.

    Raises:
        ValueError, TypeError: as :func:`extend` and :func:`update`; rows that are all equal, an
            expected error that is no number.

    Example:
        >>> drift(model.item, sample, report.tables[0].weighted_error).drifted  # doctest: +SKIP
    """
    held, given = _matched(table, rows)
    _check_expected(held[0], expected)
    decoded, x = _decoded_anew(held, given, ids).double(), given[0].double()
    share = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    table._check_tensor("weights", share)
    positive = bool((share >= 0).all()) and 0 < float(share.sum()) < math.inf
    if share.shape != (len(x),) or not positive:
        raise ValueError(
            f"table {table.name!r}: weights must be {len(x)} finite numbers of at least 0, and not "
            f"all 0, got the shape {tuple(share.shape)} and the sum {float(share.sum()):g}"
        )
    share = (share / share.sum()).double().to(x.device)
    error = float(share @ (x - decoded).square().sum(1))
    variance = float(share @ (x - share @ x).square().sum(1))
    some = x[share > 0]
    if error and bool((some == some[0]).all()):
        raise ValueError(
            f"table {table.name!r}: the rows are all equal, so that they have no variance to "
            "compare the error with; give a sample of different rows"
        )
    relative = error / max(variance, 1e-300)
    return Drift(relative, expected, relative > tolerance * expected)


def _decoded_anew(held: Sequence[DecodedTable], given: list[Tensor], ids: Tensor | None) -> Tensor:
    """What rows of one table become when they are encoded, each in its tier."""
    if ids is None:
        found = [(_tier_of(held, True), torch.ones(len(given[0]), dtype=torch.bool))]
    else:
        ids = _checked_ids(held[0], ids, given[0])
        found = [(parts, inside) for parts, inside, _ in _by_tier(held, ids)]
    decoded = given[0].clone()
    for parts, inside in found:
        codes = _encode(parts, [one[inside] for one in given])
        if codes is not None:
            decoded[inside] = _decode(parts, codes)
        elif parts[0].layout.kind == "shared":
            decoded[inside] = parts[0].codebook_set.values()[0]
    return decoded


def _check_expected(table: DecodedTable, expected: object) -> None:
    """ValueError unless it is the error of a report; those of tables left as they are have none."""
    if not isinstance(expected, (int, float)) or not 0 <= expected < math.inf:
        raise ValueError(
            f"table {table.name!r}: the expected error is {expected}, expected a finite number of "
            "at least 0; take weighted_error from the report of its compression"
        )


def _matched(tables: Tables, rows: Rows) -> tuple[list[DecodedTable], list[Tensor]]:
    """Tables and their rows as lists, checked."""
    held = [tables] if isinstance(tables, torch.nn.Module) else list(tables)
    given = list(rows) if isinstance(rows, Sequence) else [rows]
    for table in held:
        if not isinstance(table, DecodedTable):
            raise TypeError(
                f"expected a compressed table, got {type(table).__name__}; dense tables have a "
                "weight to change"
            )
        check_gathered(table)
    if not held or len(held) != len(given):
        raise ValueError(f"{len(held)} tables need as many arrays of rows, got {len(given)}")
    for table, one in zip(held, given, strict=True):
        table._check_tensor("rows", one)
        if one.dim() != 2 or one.shape[1] != table.embedding_dim or len(one) != len(given[0]):
            raise ValueError(
                f"table {table.name!r}: rows have the shape {tuple(one.shape)}, expected "
                f"({len(given[0])}, {table.embedding_dim})"
            )
        _check_numbers(table, one)
    if len({id(code) for table in held for code in _code_tables(table)}) > len(
        _code_tables(held[0])
    ):
        raise ValueError(
            f"tables {[table.name for table in held]} do not share their codes; change them one "
            "after the other"
        )
    device = held[0]._like().device
    return held, [one.detach().to(device, torch.float32) for one in given]


def _check_numbers(table: DecodedTable, rows: Tensor) -> None:
    """ValueError unless all are floating and finite."""
    if not rows.is_floating_point():
        raise ValueError(f"table {table.name!r}: rows are {rows.dtype}, expected floating numbers")
    wrong = ~rows.isfinite().all(1)
    if bool(wrong.any()):
        raise ValueError(
            f"table {table.name!r}: row {int(wrong.nonzero()[0])} of those given holds NaN or "
            "infinity, expected finite values; leave it out or repair it"
        )


def _code_tables(table: DecodedTable) -> list[torch.nn.Module]:
    return [part.code_table for part in table._tables()]


def _tier_of(held: Sequence[DecodedTable], popular: bool) -> list[Compressed]:
    """The coded part of each table: the table itself, or one tier."""
    return [table._tables()[0 if popular or len(table._tables()) == 1 else 1] for table in held]


def _check_holders(parts: Sequence[Compressed]) -> None:
    """ValueError where a table that shares the codes is left out."""
    code_table, given = parts[0].code_table, {id(part) for part in parts}
    if any(id(one) not in given for one in code_table.holders):
        gc.collect()  # modules that were replaced may still be waiting for it
    others = [one.name for one in code_table.holders if id(one) not in given]
    if others and parts[0].layout.bits:
        raise ValueError(
            f"table {parts[0].name!r} shares its codes with {sorted(others)}; give all of them and "
            "the rows of each, such as [vectors, weights], [rows, rows]"
        )


def _codebooks(parts: Sequence[Compressed]) -> Tensor:
    """Codebooks (M, K, columns of all parts) float32."""
    return torch.cat([part.codebook_set.values() for part in parts], dim=2)


@full_precision()
def _encode(
    parts: Sequence[Compressed], rows: Sequence[Tensor], places: Tensor | None = None
) -> Tensor | None:
    """Codes (n, M) of the rows of all parts; None where rows are stored as they are.

    Of rows that are in some ``places`` (n,) already, the codes there where those found are no
    better: the search does not find the best ones always.
    """
    layout = parts[0].layout
    if not layout.bits:
        return None
    quantizer, (books, offset) = quantizer_for(layout.kind), _centred(parts)
    codes = torch.empty(len(rows[0]), len(books), dtype=torch.int64, device=books.device)
    step = chunk_rows(sum(one.shape[1] for one in rows), books.device)
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        x = torch.cat([one[part] for one in rows], dim=1) - offset
        found = quantizer.encode(x, books, FINAL_BEAM)
        if places is not None:
            held = unpack(parts[0].codes, layout.num_subvectors, layout.bits, places[part])
            found = kept_codes(x, held, found, books, quantizer, 0.0)
        codes[part] = found
    return codes


def _centred(parts: Sequence[Compressed]) -> tuple[Tensor, Tensor]:
    """Codebooks of mean zero to search in, and what to take off rows.

    Squares of a large common mean would leave nothing of the differences in float32.
    """
    books = _codebooks(parts)
    means = books.mean(1, keepdim=True)
    offset = means.flatten() if parts[0].layout.kind == "product" else means.sum((0, 1))
    return books - means, offset


def _decode(parts: Sequence[Compressed], codes: Tensor) -> Tensor:
    return quantizer_for(parts[0].layout.kind).decode(codes, _codebooks(parts[:1]))


def _append_codes(part: Compressed, codes: Tensor) -> None:
    """Codes of one or more rows after the last."""
    layout, old = part.layout, part.codes
    rows, whole = layout.num_embeddings, layout.num_embeddings // 8 * 8
    packed = empty_packed(rows + len(codes), layout.num_subvectors, layout.bits).to(old.device)
    kept = whole * layout.row_bits // 8
    packed[:kept] = old[:kept]
    # Rows that share a byte with those before are packed with them.
    rest = torch.arange(whole, rows, device=old.device)
    last = unpack(old, layout.num_subvectors, layout.bits, rest)
    pack_into(packed, whole, torch.cat([last, codes.to(last.device)]), layout.bits)
    part.code_table.codes = packed


def _write_codes(part: Compressed, places: Tensor, codes: Tensor) -> int:
    """Other codes for some rows; how many differ from those before."""
    if not len(places):
        return 0
    layout, packed = part.layout, part.codes
    shape = (layout.num_subvectors, layout.bits)
    differ = (unpack(packed, *shape, places) != codes).any(1)
    # Eight rows fill whole bytes.
    groups, group_of = torch.div(places, 8, rounding_mode="floor").unique(return_inverse=True)
    rows = groups[:, None] * 8 + torch.arange(8, device=places.device)
    exists = rows < layout.num_embeddings
    held = unpack(packed, *shape, rows.clamp(max=layout.num_embeddings - 1).flatten())
    held[~exists.flatten()] = 0
    held[group_of * 8 + places % 8] = codes.to(held.device)
    size = layout.row_bits
    data = pack(held, layout.bits)[: len(groups) * size].view(len(groups), size)
    at = groups[:, None] * size + torch.arange(size, device=places.device)
    inside = at < len(packed)
    packed[at[inside]] = data[inside]
    return int(differ.sum())


def _codewords(books: CodebookSet, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows as codewords (1, n, D) in the dtype of the set, and their scales."""
    if books.scales is None:
        return rows[None].to(books.codebooks.dtype), None
    return quantize_codebooks(rows[None])


def _check_fits(parts: Sequence[Compressed], rows: Sequence[Tensor]) -> None:
    """ValueError for rows that would become infinite in the dtype that they are stored in."""
    if parts[0].layout.bits:
        return
    for part, one in zip(parts, rows, strict=True):
        wrong = ~_codewords(part.codebook_set, one)[0][0].isfinite().all(1)
        if bool(wrong.any()):
            row, dtype = int(wrong.nonzero()[0]), part.codebooks.dtype
            found, most = float(one[row].abs().max()), torch.finfo(dtype).max
            raise ValueError(
                f"table {part.name!r}: row {row} of those given holds {found:g}, expected at most "
                f"{most:g}, as its rows are kept as {dtype_name(dtype)}; leave it out, or compress "
                "a retrained model with codebook_dtype='float32' or 'int8'"
            )


def _check_optimizers(parts: Sequence[Compressed], optimizer: Optimizers) -> None:
    """ValueError for optimizers that wrap others, or of which none trains rows kept as rows."""
    found = listed(optimizer)
    for one in found:
        check_optimizer(one)
    params = {key for one in found for key in trained_by(one)}
    wanted = [part for part in parts if not part.layout.bits and part.codebooks.requires_grad]
    missing = [part.name for part in wanted if id(part.codebooks) not in params]
    if found and missing:
        raise ValueError(
            f"no optimizer that was given holds the rows of table {missing[0]!r}, expected one "
            "that trains them; give that, or leave optimizer out"
        )


def _append_codewords(books: CodebookSet, rows: Tensor) -> None:
    words, scales = _codewords(books, rows)
    longer = torch.cat([books.codebooks.detach(), words], dim=1)
    if isinstance(books.codebooks, torch.nn.Parameter):
        books.codebooks = torch.nn.Parameter(longer, books.codebooks.requires_grad)
    else:
        books.codebooks = longer
    if scales is not None and books.scales is not None:
        books.scales = torch.cat([books.scales, scales], dim=1)


def _write_codewords(books: CodebookSet, places: Tensor, rows: Tensor) -> None:
    words, scales = _codewords(books, rows)
    with torch.no_grad():
        books.codebooks[0, places] = words[0]
        if scales is not None and books.scales is not None:
            books.scales[0, places] = scales[0]


def _checked_ids(table: DecodedTable, ids: Tensor, rows: Tensor) -> Tensor:
    table._check_tensor("ids", ids)
    if ids.dim() != 1 or len(ids) != len(rows) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"table {table.name!r}: ids must be int32 or int64 of the shape ({len(rows)},), got "
            f"{ids.dtype} {tuple(ids.shape)}"
        )
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < table.num_embeddings):
        raise ValueError(
            f"table {table.name!r}: ids must be in 0..{table.num_embeddings - 1}, got "
            f"{int(ids.min())}..{int(ids.max())}; append rows with extend()"
        )
    return ids.long().to(rows.device)


def _check_unique(table: DecodedTable, ids: Tensor) -> None:
    different, times = ids.unique(return_counts=True)
    if len(different) < len(ids):
        raise ValueError(
            f"table {table.name!r}: id {int(different[times > 1][0])} is given "
            f"{int(times.max())} times, expected each once only; keep one row of each"
        )


def _by_tier(
    held: Sequence[DecodedTable], ids: Tensor
) -> Iterator[tuple[list[Compressed], Tensor, Tensor]]:
    """Of each tier its parts, which ids are in it (bool), and which of its rows these are."""
    if not isinstance(held[0], TieredTable):
        yield _tier_of(held, False), torch.ones(len(ids), dtype=torch.bool, device=ids.device), ids
        return
    is_popular, place = held[0].tier_map(ids, held[0].name)
    for popular, inside in ((True, is_popular), (False, ~is_popular)):
        yield _tier_of(held, popular), inside, place[inside]


def _extend_map(tier_map: TierMap, count: int, popular: bool) -> None:
    before, _ = tier_map(torch.arange(tier_map.rows, device=tier_map.before.device), "")
    longer = torch.cat([before.cpu(), torch.full((count,), popular)])
    new = TierMap.of(longer).to(tier_map.before.device)
    tier_map.rows, tier_map.runs = new.rows, new.runs
    for name in ("starts", "before", "bitmap"):
        setattr(tier_map, name, getattr(new, name))
