"""How many bits each table gets under a byte budget, by predicted weighted distortion.

Nothing is learned here. The distortion of a code of R bits is predicted by reverse water-filling
(Cover and Thomas, Elements of Information Theory, 10.3.3) over the spectrum of the weighted
covariance of the rows, measured on a sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import CompressionConfig
from .layout import CodeKind, CodeLayout, packed_bytes
from .modules import Compressed
from .packing import unpack
from .tables import LARGEST, Table, check_finite
from .tiers import TierMap

#: Rows sampled (by weight) for the covariance of a table.
_SAMPLE = 4096
#: Rows read at once for their mean.
_MEAN_ROWS = 1 << 13
#: Rows whose weights or counts are worked on at once: temporary arrays of all rows of a large
#: table would take more memory than its codes.
_PART_ROWS = 1 << 20
#: Largest number of codewords in all additive codebooks: the least-squares problem has this side.
_MOST_WORDS = 2048
_MOST_CODEBOOKS = 32
#: Part of the error that one codebook less is worth, as rows are sums of that many codewords: a
#: lookup takes some percent less (docs/experiments.md).
_LOOKUP_PART = 0.004
#: Part of the error that codewords can take away by being fitted to few rows.
_MOST_FITTED = 0.9
#: Bits that a code of b bits is worth of an ideal code's: fitted to the errors of additive codes
#: learned from real tables (docs/experiments.md): .725 b at 1 bit, .97 b at 8.
_WORTH, _WORTH_PER_BIT, _WORTH_MOST = 0.69, 0.035, 0.98
#: Cuts between tiers that are tried first, in occurrences; then half and twice the best.
_CUTS = (1, 4, 16, 64, 256)
#: Prices of a byte at which a plan says what it would lose.
_PRICES = 61
#: Rows that a tier must have to be worth codebooks of its own.
_LEAST_TIER_ROWS = 64
#: Rounding error of a row in each storage dtype, relative to its square.
_ROUNDING = {
    torch.int8: 2e-5,
    torch.bfloat16: 1e-6,
    torch.float16: 2e-8,
    torch.float32: 1e-15,
}


#: Kind, num_subvectors and codebook_size of the codes of a group.
Shape = tuple[CodeKind, int, int]


@dataclass(frozen=True, eq=False)
class Field:
    """A table, perhaps with the first-order (dim 1) table of the same ids, which can use its codes.

    Attributes:
        table: the vector table, or any table on its own.
        partner: the first-order table, or None.
        table_weights: popularity weights (rows of the table,) float32; their sum is the number of
            lookups.
        fisher: Fisher matrix (dim, dim) of a lookup, see :mod:`mec_embed.sensitivity`; None
            weighs all directions alike.
        counts: occurrences (rows of the table,) of each row, or None.
        tier: ``"head"`` or ``"tail"`` where this is a tier of the tables, else None.
        cut: occurrences from which on a row is in the head.
        earlier: what holds codes and codebooks of an earlier version of each table, or nothing.
    """

    table: Table
    partner: Table | None
    table_weights: Tensor
    fisher: np.ndarray | None = None
    counts: np.ndarray | None = None
    tier: str | None = None
    cut: int = 0
    earlier: tuple[Compressed, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each of its tables."""
        return tuple(table.dim for table in self.tables)

    @cached_property
    def rows(self) -> int:
        """Rows of the table, or of its tier."""
        if self.tier is None:
            return self.table.rows
        return sum(int(np.count_nonzero(part)) for part in self._inside())

    @property
    def ids(self) -> Tensor:
        """Rows of the tables (rows,) that are in the field, ascending; made anew at every call."""
        kind = torch.int32 if self.table.rows <= torch.iinfo(torch.int32).max else torch.int64
        ids, first, done = torch.empty(self.rows, dtype=kind), 0, 0
        for part in self._inside():
            found = np.flatnonzero(part)
            ids[done : done + len(found)] = torch.from_numpy(found + first)
            first, done = first + len(part), done + len(found)
        return ids

    @property
    def weights(self) -> Tensor:
        """Popularity weights (rows,) float32; those of a tier are made anew at every call."""
        if self.tier is None:
            return self.table_weights
        return self.table_weights.index_select(0, self.ids)

    def _inside(self) -> Iterator[np.ndarray]:
        """Whether each row of the tables is in the field: bool arrays, in order."""
        for start in range(0, self.table.rows, _PART_ROWS):
            if self.tier is None or self.counts is None:
                yield np.ones(min(_PART_ROWS, self.table.rows - start), dtype=bool)
            else:
                popular = self.counts[start : start + _PART_ROWS] >= self.cut
                yield popular if self.tier == "head" else ~popular

    @property
    def mass(self) -> float:
        """Number of lookups."""
        return self._sampled[0]

    @property
    def tables(self) -> tuple[Table, ...]:
        """The table and its partner."""
        return (self.table,) if self.partner is None else (self.table, self.partner)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense rows."""
        return sum(self.rows * table.dim * table.weight.element_size() for table in self.tables)

    @property
    def dim(self) -> int:
        """Columns of both."""
        return sum(table.dim for table in self.tables)

    def reader(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Reads rows (n, dim) float32 by their numbers (n,) in the field, the partner's last.

        Of those within ``bounds``; :meth:`read` reads any.
        """
        own = None if self.tier is None else self.ids

        def read(ids: Tensor) -> Tensor:
            rows = ids if own is None else own[ids].long()
            return torch.cat([t.read(rows).to(device, torch.float32) for t in self.tables], dim=1)

        return read

    def read(self, ids: Tensor, device: torch.device) -> Tensor:
        """Rows (n, dim) float32 of any ``ids``, the partner's column last, alike on all ranks."""
        return self._read_any(ids if self.tier is None else self.ids[ids].long(), device)

    def _read_any(self, rows: Tensor, device: torch.device) -> Tensor:
        """What :meth:`read` returns, by their numbers in the tables."""
        return torch.cat([t.read_any(rows).to(device, torch.float32) for t in self.tables], dim=1)

    @property
    def bounds(self) -> tuple[int, int]:
        """First row of the field and end of what this rank works on."""
        if self.tier is None:
            return self.table.bounds
        ids = self.ids
        bounds = torch.tensor(self.table.bounds, dtype=ids.dtype)
        first, end = torch.searchsorted(ids, bounds).tolist()
        return first, end

    def earlier_codes(self, ids: Tensor) -> Tensor:
        """Codes (n, M) int64 that rows had in the earlier version, by their numbers (n,)."""
        part = self.earlier[0]
        layout, codes = part.layout, part.codes
        return unpack(codes, layout.num_subvectors, layout.bits, ids.to(codes.device))

    @property
    def mean(self) -> tuple[Tensor, ...]:
        """Weighted mean row (dim,) of the table, and of its partner."""
        device, (first, end) = self.table.device, self.bounds
        read = self.reader(device)
        total = torch.zeros(self.dim, dtype=torch.float64, device=device)
        for part in self.weights[first:end].split(self.table.at_once(_MEAN_ROWS)):
            ids = torch.arange(first, first + len(part))
            total += part.to(device).double() @ read(ids).double()
            first += len(part)
        total = self.table.ranks.add(total, f"the mean row of table {self.table.name!r}")
        return (total / self.mass).split([table.dim for table in self.tables])

    @property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Weighted mean (dim,) and covariance (dim, dim) of the rows, from a sample by weight."""
        return self._sampled[1:]

    @cached_property
    def _sampled(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Mass and moments at once: for a tier of a large table, its ids take longest."""
        own, weights = None, self.table_weights
        if self.tier is not None:
            own = self.ids
            weights = weights.index_select(0, own)
        total = total_weight(weights)
        if len(weights) <= _SAMPLE:
            ids, mass = torch.arange(len(weights)), weights.double()
        else:
            ids = _drawn(weights, _SAMPLE, total)
            mass = torch.ones(_SAMPLE, dtype=torch.float64)
        rows = ids if own is None else own[ids].long()
        x = self._read_any(rows, torch.device("cpu")).double()
        if not bool((x.abs() <= LARGEST).all()):
            check_finite(self.tables)
        share = (mass / mass.sum())[:, None]
        mean = (share * x).sum(0)
        centred = x - mean
        return total, mean.numpy(), (centred.T @ (share * centred)).numpy()


def _place(table: Table) -> Hashable:
    """Equal for tables of as many rows that can be read together, on the rank that has them."""
    return table.rows, table.device, table.shard and table.shard.bounds


def total_count(counts: np.ndarray) -> float:
    """The number of lookups; counts (rows,) in half precision would add up to infinity."""
    return float(counts.sum(dtype=np.float64))


def total_weight(weights: Tensor) -> float:
    """The sum of weights (n,), in float64."""
    return sum(float(part.double().sum()) for part in weights.split(_PART_ROWS))


def _drawn(weights: Tensor, size: int, total: float) -> Tensor:
    """Row numbers (size,) at even steps along ``total``, the sum of ``weights`` (rows,)."""
    steps = torch.arange(size, dtype=torch.float64) + 0.5
    places = steps / size * total
    drawn, below = [], 0.0
    for number, part in enumerate(weights.split(_PART_ROWS)):
        bounds = part.double().cumsum(0) + below
        inside = places[(places >= below) & (places < bounds[-1])]
        drawn.append(torch.searchsorted(bounds, inside) + number * _PART_ROWS)
        below = float(bounds[-1])
    return torch.cat(drawn)


@dataclass(frozen=True, eq=False)
class Group:
    """Fields that share one set of codebooks (most hold one field)."""

    fields: tuple[Field, ...]

    @property
    def first(self) -> Field:
        """The field that stands for the layout of all."""
        return self.fields[0]

    @cached_property
    def mass(self) -> float:
        """Number of lookups that reach the group."""
        return sum(field.mass for field in self.fields)

    @cached_property
    def rows(self) -> int:
        """Rows of all fields."""
        return sum(field.rows for field in self.fields)

    @cached_property
    def spectrum(self) -> np.ndarray:
        """Eigenvalues of the pooled covariance, descending, and the pooled mean square."""
        shares = [field.mass / self.mass for field in self.fields]
        moments = [field.moments for field in self.fields]
        mean = sum(share * m for share, (m, _) in zip(shares, moments, strict=True))
        pooled = sum(
            share * (cov + np.outer(m - mean, m - mean))
            for share, (m, cov) in zip(shares, moments, strict=True)
        )
        if self.metric is not None:
            pooled = self.metric.T @ pooled @ self.metric
        return np.clip(np.linalg.eigvalsh(pooled)[::-1], 0, None)

    @cached_property
    def metric(self) -> np.ndarray | None:
        """Matrix (dim, dim) whose product with an error has a squared length that counts it.

        The square root of the mean Fisher matrix of the fields.
        """
        matrices = [field.fisher for field in self.fields if field.fisher is not None]
        if len(matrices) < len(self.fields):
            return None
        masses = [field.mass / self.mass for field in self.fields]
        mean = np.average(matrices, axis=0, weights=masses)
        values, vectors = np.linalg.eigh(mean)
        root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
        return root

    def layouts(self, shape: Shape, config: CompressionConfig) -> list[list[CodeLayout]]:
        """For each field, the layout of its table and of its partner."""
        if self.first.earlier:
            return [[_stored_layout(part) for part in field.earlier] for field in self.fields]
        kind, subvectors, size = shape
        return [
            [
                CodeLayout(
                    "additive" if kind == "product" and table is field.partner else kind,
                    field.rows,
                    table.dim,
                    subvectors,
                    size,
                    config.codebook_dtype_for(table.weight.dtype),
                )
                for table in field.tables
            ]
            for field in self.fields
        ]

    def earlier_codebooks(self) -> Tensor | None:
        """Codebooks (M, K, columns of the fields) float32 of the earlier version, if any."""
        if not self.first.earlier:
            return None
        return torch.cat([part.codebook_set.values() for part in self.first.earlier], dim=2)

    def layout_bytes(self, shape: Shape, config: CompressionConfig) -> int:
        """Bytes of all codes and of the one set of codebooks in this shape."""
        layouts = self.layouts(shape, config)
        codes = sum(field[0].code_bytes for field in layouts)
        return codes + sum(layout.codebook_bytes for layout in layouts[0])


def _stored_layout(part: Compressed) -> CodeLayout:
    # Its codebooks may have been cast since.
    return replace(part.layout, codebook_dtype=part.codebooks.dtype)


class Choice(NamedTuple):
    """One way to store a group.

    Attributes:
        shape: of the codes; None keeps the tables as they are.
        nbytes: of all its tensors.
        distortion: predicted weighted squared error, summed over lookups.
    """

    shape: Shape | None
    nbytes: int
    distortion: float


def make_fields(
    tables: Sequence[Table],
    weights: Sequence[Tensor],
    counts: Sequence[np.ndarray | None],
    fishers: Sequence[np.ndarray | None],
    pair: bool,
) -> list[Field]:
    """Tables as fields; with ``pair``, first-order tables join the vector table of their ids.

    A first-order table joins if exactly one vector table has as many rows and the same popularity
    and, of several, the same last part of the name.

    Args:
        tables: to compress.
        weights: popularity weights (rows,) of each.
        counts: occurrences (rows,) of each row; None where they are not known.
        fishers: Fisher matrix of each, or None.
        pair: whether to pair at all.
    """
    partners = _partners(tables, counts) if pair else {}
    taken = set(partners.values())
    return [
        Field(
            table,
            tables[partners[i]] if i in partners else None,
            weights[i],
            joint_fisher(fishers[i], fishers[partners[i]]) if i in partners else fishers[i],
            counts[i],
        )
        for i, table in enumerate(tables)
        if i not in taken
    ]


def _partners(tables: Sequence[Table], counts: Sequence[np.ndarray | None]) -> dict[int, int]:
    """The first-order table (its place in ``tables``) of each vector table that has one."""
    popularity = [None if c is None else (total_count(c), c[:1000].tobytes()) for c in counts]
    vectors: dict[Hashable, list[int]] = defaultdict(list)
    for i, table in enumerate(tables):
        if table.dim > 1:
            vectors[_place(table)].append(i)
    partners: dict[int, int] = {}
    for i, table in enumerate(tables):
        if table.dim > 1:
            continue
        same = [
            j
            for j in vectors[_place(table)]
            if j not in partners and popularity[i] in (None, popularity[j])
        ]
        if len(same) > 1:
            last = table.name.rpartition(".")[2]
            same = [j for j in same if tables[j].name.rpartition(".")[2] == last]
        if len(same) == 1:
            partners[same[0]] = i
    return partners


def joint_fisher(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Fisher matrix of a table and its partner, taken to be independent."""
    if first is None or second is None:
        return None
    joint = np.zeros((len(first) + len(second),) * 2)
    joint[: len(first), : len(first)] = first
    joint[len(first) :, len(first) :] = second
    return joint


def predicted_error(spectrum: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Least squared error of codes of ``bits`` bits a row for a Gaussian source.

    Args:
        spectrum: (dim,) eigenvalues of its covariance, descending.
        bits: (n,) rates.

    Returns:
        (n,) squared errors, summed over columns.
    """
    positive = spectrum[spectrum > 1e-12 * spectrum[0]]
    if not len(positive):
        return np.zeros(len(bits))
    logs = np.log2(positive)
    counts = np.arange(1, len(positive) + 1)
    # With the k largest eigenvalues above the water, log2(level) = (sum of their logs - 2R) / k;
    # k is the largest for which the smallest of them still is above it.
    levels = (np.cumsum(logs) - 2 * np.asarray(bits, float)[:, None]) / counts
    active = len(positive) - 1 - np.argmax((levels < logs)[:, ::-1], axis=1)
    below = np.append(np.cumsum(positive[::-1])[::-1], 0.0)[active + 1]
    return (active + 1) * 2 ** levels[np.arange(len(levels)), active] + below


def code_shapes(group: Group, config: CompressionConfig) -> list[Shape]:
    """Every shape of codes that a group may take."""
    kind: CodeKind = config.codes  # type: ignore[assignment]
    if group.first.dim == 1:
        return [("additive", 1, 1 << bits) for bits in range(1, 9) if 1 << bits < group.rows]
    return [
        (kind, subvectors, 1 << bits)
        for bits in range(1, 12)
        if 1 << bits < group.rows
        for subvectors in range(1, _most_subvectors(kind, bits) + 1)
        if kind == "additive" or group.first.table.dim % subvectors == 0
    ]


def _most_subvectors(kind: CodeKind, bits: int) -> int:
    """Additive codebooks are solved for together, product codebooks one by one."""
    if kind == "product":
        return _MOST_CODEBOOKS
    return min(_MOST_CODEBOOKS, _MOST_WORDS >> bits)


def choices(group: Group, config: CompressionConfig) -> list[Choice]:
    """The ways to store a group that are best at their bytes, by rising bytes.

    Of shapes that are about as good, that of fewer codebooks is best: its lookups are faster.
    """
    before = sum(field.nbytes for field in group.fields)
    # A tier cannot stay as it is, as the other one does not.
    found = [] if group.first.tier else [Choice(None, before, 0.0)]
    shapes = code_shapes(group, config)
    if shapes:
        sizes, errors = _sizes(group, shapes, config), _distortions(group, shapes)
        # Thousands of shapes in plans of many tables: the best of them are found as arrays.
        costs = _costs(shapes, errors)
        order = np.lexsort((costs, sizes))
        least = np.minimum.accumulate(np.append(np.inf, costs[order]))
        best = order[(costs[order] < least[:-1]) & (sizes[order] < before)]
        found += [Choice(shapes[i], int(sizes[i]), float(errors[i])) for i in best]
    found += _row_choices(group, config)
    if group.first.tier == "tail":
        shared: Shape = ("shared", 1, 1)
        variance = float(group.spectrum.sum())
        found.append(Choice(shared, group.layout_bytes(shared, config), variance * group.mass))
    found.sort(key=lambda choice: (choice.nbytes, choice.distortion))
    front: list[Choice] = []
    for choice in found:
        if not front or choice.distortion < front[-1].distortion:
            front.append(choice)
    return front


def _costs(shapes: Sequence[Shape], errors: np.ndarray) -> np.ndarray:
    """Errors (shapes,), larger where a row is the sum of many codewords."""
    added = [subvectors if kind == "additive" else 1 for kind, subvectors, _ in shapes]
    return errors * (1 + _LOOKUP_PART) ** np.array(added)


def _sizes(group: Group, shapes: Sequence[Shape], config: CompressionConfig) -> np.ndarray:
    """Bytes (shapes,), as :meth:`Group.layout_bytes` counts them, for many shapes at once."""
    subvectors, sizes = np.array([shape[1:] for shape in shapes]).T
    row_bits = subvectors * np.ceil(np.log2(sizes)).astype(np.int64)
    codes = sum(packed_bytes(field.rows, row_bits) for field in group.fields)
    unit = CodeLayout("additive", 1, group.first.table.dim, 1, 1, _dtype(group, config))
    books = subvectors * sizes * unit.codebook_bytes
    if shapes[0][0] == "product":
        books = sizes * unit.codebook_bytes + (subvectors - 1) * sizes * _scale_bytes(unit)
    if group.first.partner is not None:
        dtype = config.codebook_dtype_for(group.first.partner.weight.dtype)
        scalar = CodeLayout("additive", 1, 1, 1, 1, dtype)
        books = books + subvectors * sizes * scalar.codebook_bytes
    return codes + books


def _dtype(group: Group, config: CompressionConfig) -> torch.dtype:
    return config.codebook_dtype_for(group.first.table.weight.dtype)


def _scale_bytes(codeword: CodeLayout) -> int:
    return codeword.codebook_bytes - codeword.embedding_dim * codeword.codebook_dtype.itemsize


def _row_choices(group: Group, config: CompressionConfig) -> list[Choice]:
    """Rows in a narrower dtype, where the configuration allows one."""
    field, dtype = group.first, _dtype(group, config)
    alone = len(group.fields) == 1 and field.partner is None
    if not alone or field.tier or dtype.itemsize >= field.table.weight.element_size():
        return []
    shape: Shape = ("rows", 1, field.rows)
    error = _ROUNDING[dtype] * float(group.spectrum.sum())
    return [Choice(shape, group.layout_bytes(shape, config), error * group.mass)]


def _distortions(group: Group, shapes: Sequence[Shape]) -> np.ndarray:
    """Predicted weighted squared error (shapes,), summed over lookups."""
    subvectors, sizes = np.array([shape[1:] for shape in shapes]).T
    bits_of_code = np.log2(sizes)
    worth = np.minimum(_WORTH + _WORTH_PER_BIT * bits_of_code, _WORTH_MOST)
    errors = predicted_error(group.spectrum, subvectors * bits_of_code * worth)
    # Codewords are fitted to the rows: the more of them for each row, the less is lost.
    words = sizes if shapes[0][0] == "product" else subvectors * sizes
    free = np.minimum(_MOST_FITTED, words / group.rows)
    return errors * (1 - free) * group.mass


def explicit_choice(group: Group, config: CompressionConfig) -> Choice:
    """The shape that the configuration names, or the table as it is where that takes less."""
    shape: Shape = (config.codes, config.num_subvectors, config.codebook_size)  # type: ignore[assignment]
    if group.first.dim == 1:
        shape = ("additive", 1, shape[2])
    elif shape[0] == "product" and group.first.table.dim % shape[1]:
        raise ValueError(
            f"table {group.first.table.name!r}: num_subvectors={shape[1]} must divide "
            f"embedding_dim={group.first.table.dim} for product codes; use a divisor or "
            "codes='additive'"
        )
    before = sum(field.nbytes for field in group.fields)
    after = group.layout_bytes(shape, config)
    if after >= before:
        return Choice(None, before, 0.0)
    return Choice(shape, after, float(_distortions(group, [shape])[0]))


def allocate(options: Sequence[Sequence[Choice]], budget: int) -> list[Choice] | None:
    """One choice for each group, of least total distortion within ``budget`` bytes.

    Lagrangian relaxation by bisection on the price of a byte, then the budget that is left goes,
    step by step, where it lowers the distortion most. None if even the smallest choices are too
    large.
    """
    sizes, errors = _as_lines(options)
    if sizes[:, 0].sum() > budget:
        return None
    picked = _at_best_price(sizes, errors, budget)
    _spend(sizes, errors, picked, budget)
    return [front[i] for front, i in zip(options, picked, strict=True)]


def _as_lines(options: Sequence[Sequence[Choice]]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and distortions (groups, choices) of the choices of each group."""
    # The lines of groups with fewer choices end in infinitely bad ones.
    sizes = np.full((len(options), max(map(len, options))), 1e30)
    errors = np.full_like(sizes, np.inf)
    for line, front in enumerate(options):
        sizes[line, : len(front)] = [choice.nbytes for choice in front]
        errors[line, : len(front)] = [choice.distortion for choice in front]
    return sizes, errors


def _at_best_price(sizes: np.ndarray, errors: np.ndarray, budget: int) -> np.ndarray:
    """The choice (groups,) of each group at the lowest price of a byte that keeps the budget."""
    lines = np.arange(len(sizes))
    picked = errors.argmin(1)
    if sizes[lines, picked].sum() <= budget:
        return picked
    picked = np.zeros(len(sizes), dtype=np.int64)
    # Bisection in the logarithm, from a price at which errors do not matter at all.
    high = float(errors[:, 0].max())
    low = high * 1e-20
    for _ in range(60):
        price = np.sqrt(low * high)
        tried = (errors + price * sizes).argmin(1)
        if sizes[lines, tried].sum() > budget:
            low = price
        else:
            picked, high = tried, price
    return picked


def _spend(sizes: np.ndarray, errors: np.ndarray, picked: np.ndarray, budget: int) -> None:
    """Take the best upgrades that still fit, one at a time; changes ``picked``."""
    lines = np.arange(len(sizes))
    while True:
        now, worst = sizes[lines, picked], errors[lines, picked]
        extra = sizes - now[:, None]
        fits = (extra > 0) & (extra <= budget - now.sum())
        gains = np.where(fits, (worst[:, None] - errors) / np.where(fits, extra, 1), 0.0)
        group, chosen = np.unravel_index(gains.argmax(), gains.shape)
        if gains[group, chosen] <= 0:
            return
        picked[group] = chosen


def cut_counts(fields: Sequence[Field]) -> list[int]:
    """Occurrences at which tables may be split into tiers: those that split some table."""
    most = max((int(field.counts.max()) for field in fields if field.counts is not None), default=0)
    return [cut for cut in _CUTS if cut <= most]


def split_fields(fields: Sequence[Field], cut: int) -> list[Field]:
    """Fields in tiers: rows that occur at least ``cut`` times, and the others.

    Fields without counts, or with few rows on either side, stay whole.
    """
    tiers: list[Field] = []
    for field in fields:
        both = [replace(field, tier=tier, cut=cut) for tier in ("head", "tail")]
        enough = field.counts is not None and min(t.rows for t in both) >= _LEAST_TIER_ROWS
        tiers += both if enough else [field]
    return tiers


def popular_rows(head: Field) -> Tensor:
    """Bool (rows,) of the table whose popular rows are the field ``head``."""
    return torch.from_numpy(np.concatenate(list(head._inside())))


#: The choices of groups that were met already.
Fronts = dict[tuple[Field, ...], list["Choice"]]
#: Fields share codebooks if their rows are more than the first and at most the second; None: none.
Sharing = tuple[int, int] | None


def sharings(fields: Sequence[Field]) -> list[Sharing]:
    """The ways to share codebooks that are tried."""
    sizes = sorted({field.rows for field in fields})
    lows = sorted({0, *(size for size in (256, 1024, 4096) if size < sizes[-1])})
    highs = [*(size for size in (10_000, 40_000, 160_000, 640_000) if size < sizes[-1]), sizes[-1]]
    return [None, *((low, high) for low in lows for high in highs)]


def grouped(
    fields: Sequence[Field], keys: Sequence[Hashable], sharing: Sharing
) -> list[Group] | None:
    """Fields of equal key (dim, dtype, device ...) and in the range of sizes share codebooks.

    None where that gives each field its own.
    """
    if sharing is None:
        return [Group((field,)) for field in fields]
    by_key: dict[Hashable, list[Field]] = defaultdict(list)
    for field, key in zip(fields, keys, strict=True):
        by_key[key].append(field)
    groups = []
    for members in by_key.values():
        shared = tuple(f for f in members if sharing[0] < f.rows <= sharing[1])
        groups += [Group((f,)) for f in members if not sharing[0] < f.rows <= sharing[1]]
        groups += [Group(shared)] if shared else []
    return groups if len(groups) < len(fields) else None


@dataclass(frozen=True)
class Assignment:
    """The groups of a plan and what each becomes.

    Attributes:
        groups: of all tables, or tiers of them.
        chosen: how each is stored.
        variance: weighted variance of the rows of all tables, summed over lookups.
        others: see :func:`_other_sizes`.
    """

    groups: list[Group]
    chosen: list[Choice]
    variance: float = 0.0
    others: Sequence[tuple[int, float]] = ()

    @property
    def distortion(self) -> float:
        """Predicted weighted squared error of all tables."""
        return sum(choice.distortion for choice in self.chosen)

    @property
    def error(self) -> float:
        """The distortion relative to the variance; 0 where all rows of every table are equal."""
        return self.distortion / self.variance if self.variance else 0.0


def assign(
    tables: Sequence[Table],
    weights: Sequence[Tensor],
    counts: Sequence[np.ndarray | None],
    fishers: Sequence[np.ndarray | None],
    keys: Mapping[Table, Hashable],
    config: CompressionConfig,
    budget: int | None,
) -> Assignment:
    """Group the tables, or tiers of them, and choose the layout of each group.

    Args:
        tables: to compress.
        weights: popularity weights (rows,) of each; sums are numbers of lookups.
        counts: see :func:`make_fields`.
        fishers: see :func:`make_fields`.
        keys: only tables of equal key share codebooks.
        config: kinds of codes, dtype, explicit shape.
        budget: bytes that ``tables`` may take; None uses the explicit shape.

    Raises:
        ValueError: the budget cannot be met; the least possible is named.
    """
    may_pair = config.codes == "additive"
    if budget is None:
        fields = make_fields(tables, weights, counts, fishers, may_pair)
        groups = [Group((field,)) for field in fields]
        chosen = [explicit_choice(group, config) for group in groups]
        return _with_outlook(Assignment(groups, chosen), fields, config)
    search = _Search(keys, config, budget)
    for pair in (True, False) if may_pair else (False,):
        fields = make_fields(tables, weights, counts, fishers, pair)
        search.try_all(fields)
    if search.best is None:
        raise ValueError(
            f"the tables to compress cannot fit in {budget:,} bytes; the least possible is "
            f"{search.least:,} bytes: lower ratio (or raise max_bytes), use "
            "codebook_dtype='int8', or compress more tables (min_rows, include, exclude)"
        )
    if config.tiers:
        search.try_tiers()
    return _with_outlook(search.best, fields, config)


def _with_outlook(
    plan: Assignment, fields: Sequence[Field], config: CompressionConfig
) -> Assignment:
    """The plan, with the variance of whole tables and what it would lose at other sizes."""
    variance = sum(float(Group((field,)).spectrum.sum()) * field.mass for field in fields)
    return replace(plan, variance=variance, others=_other_sizes(plan.groups, variance, config))


def _other_sizes(
    groups: Sequence[Group], variance: float, config: CompressionConfig
) -> list[tuple[int, float]]:
    """Bytes of all groups, ascending, and the error relative to ``variance``, at other budgets.

    The same groups at other prices of a byte; under another budget the planner may find better
    ones.
    """
    sizes, errors = _as_lines([choices(group, config) for group in groups])
    lines = np.arange(len(sizes))
    points: dict[int, float] = {}
    for price in float(errors[:, 0].max()) * np.geomspace(1, 1e-20, _PRICES):
        picked = (errors + price * sizes).argmin(1)
        points[int(sizes[lines, picked].sum())] = float(errors[lines, picked].sum())
    return [(nbytes, points[nbytes] / (variance or 1.0)) for nbytes in sorted(points)]


class _Search:
    """Tries groupings and keeps the best."""

    def __init__(
        self, keys: Mapping[Table, Hashable], config: CompressionConfig, budget: int
    ) -> None:
        self.keys, self.config, self.budget = keys, config, budget
        self.best: Assignment | None = None
        self.least: int | None = None
        self.fields: Sequence[Field] = ()

    def try_all(self, fields: Sequence[Field], taken: int = 0) -> None:
        """Try every sharing of codebooks; ``taken`` bytes of the budget are spent already."""
        fronts: Fronts = {}
        for sharing in sharings(fields) if self.config.share_codebooks else [None]:
            self._try(fields, sharing, taken, fronts)

    def try_tiers(self) -> None:
        """From the best whole tables on: the best cut without sharing, then sharing at that cut.

        Tiers are made anew for each step: those of large tables take too much memory to be kept.
        """
        whole = self.fields
        cuts = cut_counts(whole)
        best_cut = self._best_cut(whole, cuts)
        if best_cut is not None:
            cuts = [self._best_cut(whole, [best_cut // 2, best_cut * 2]) or best_cut]
        for cut in cuts:
            fields = split_fields(whole, cut)
            if len(fields) > len(whole):
                self.try_all(fields, _map_bytes(fields))

    def _best_cut(self, whole: Sequence[Field], cuts: Sequence[int]) -> int | None:
        """The last cut that is a gain, no tier sharing codebooks."""
        best = None
        for cut in cuts:
            fields = split_fields(whole, cut)
            split = len(fields) > len(whole)
            if split and self._try(fields, None, _map_bytes(fields), {}):
                best = cut
        return best

    def _try(self, fields: Sequence[Field], sharing: Sharing, taken: int, fronts: Fronts) -> bool:
        """Try one grouping; True for a gain."""
        keys = [(f.tier, *(self.keys[table] for table in f.tables)) for f in fields]
        groups = grouped(fields, keys, sharing)
        if groups is None:
            return False
        for group in groups:
            if group.fields not in fronts:
                fronts[group.fields] = choices(group, self.config)
        options = [fronts[group.fields] for group in groups]
        smallest = sum(front[0].nbytes for front in options)
        self.least = smallest if self.least is None else min(self.least, smallest)
        chosen = allocate(options, self.budget - taken)
        if chosen is None:
            return False
        found = Assignment(groups, chosen)
        if self.best is not None and found.distortion >= self.best.distortion:
            return False
        self.best, self.fields = found, fields
        return True


def _map_bytes(fields: Sequence[Field]) -> int:
    """Bytes of the maps of all tables in tiers."""
    heads = [field for field in fields if field.tier == "head"]
    return sum(TierMap.nbytes_of(popular_rows(head)) for head in heads)
