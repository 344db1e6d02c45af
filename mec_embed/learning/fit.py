"""Learn the codes of one array of rows: k-means start, refinement, MEC objective, assignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import CompressionConfig
from ..layout import CodeKind, bits_for
from ..modules import quantize_codebooks
from ..packing import CHUNK_ROWS, DEVICE_CHUNK_ROWS, empty_packed, pack_into
from ..ranks import ALONE, Ranks
from .objective import Progress, Weights, train_codebooks
from .quantizers import Quantizer, flat_codes, quantizer_for, weighted_error
from .sampling import weighted_sample

#: Rows that codebooks are learned from; of larger arrays, a sample by weight.
SAMPLE_ROWS = 1 << 17
#: Bytes of these rows, at most: several arrays of that size live at once.
SAMPLE_BYTES = 8 << 20
#: Rows that k-means sees, at most; of many codewords, so many for each of them.
START_ROWS, START_ROWS_EACH = 1 << 13, 64
#: Rows that the MEC objective sees, at most: its gradients need fewer than least squares do, and
#: take longer (docs/experiments.md).
MEC_ROWS = 1 << 13
#: Rows that codebooks are fitted to in the end, about at most.
REFIT_ROWS = 1 << 22
#: Bytes of float32 rows that are encoded at once, at most.
CHUNK_BYTES = 8 << 20
#: The same on other devices than the CPU, where many rows keep all of it busy.
DEVICE_CHUNK_BYTES = 128 << 20
#: Alternations of encoding and least squares: at least and at most, and as many as take no more
#: multiplications than ROUNDS_WORK, of which a step of the search for a row is about STEP_WORK.
ROUNDS, MOST_ROUNDS = 8, 40
ROUNDS_WORK, STEP_WORK = 1 << 35, 1 << 13
#: How much farther than from one least-squares solution to the next codebooks go, in the first
#: round and in the last (docs/experiments.md).
RELAXATION = 1.2, 0.3
#: Alternating stops when the error falls by less than this part of the variance of the rows, or by
#: less than this part of it, a round, over PATIENCE rounds; from an earlier version, over one.
LEAST_FALL, LEAST_PART, PATIENCE = 1e-5, 1e-3, 4
#: Partial sums kept by the beam search for the final codes, while learning from as many rows or
#: fewer, and from more.
FINAL_BEAM, FEW_ROWS, LEARNING_BEAM = 16, 1 << 14, 8
#: Rows keep the codes of an earlier version unless others lower their squared error by more than
#: this part of the mean error: that raises the weighted error by no more than this part
#: (docs/experiments.md).
KEEP_MARGIN = 0.2


@dataclass(frozen=True)
class CodeShape:
    """What is to be learned.

    Attributes:
        kind: ``"additive"`` or ``"product"``.
        num_subvectors, codebook_size: M and K.
        dtype: that codebooks are stored in.
        widths: columns that are stored together; a scale of int8 codebooks covers one of them.
        metric: matrix (D, D) float32, or None; the error of a row is the squared length of its
            product with it. Product codes take none.
        start: codebooks (M, K, S) float32 of an earlier version, in which all rows have codes.
    """

    kind: CodeKind
    num_subvectors: int
    codebook_size: int
    dtype: torch.dtype
    widths: tuple[int, ...]
    metric: Tensor | None = None
    start: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return bits_for(self.codebook_size)

    def round(self, codebooks: Tensor) -> Tensor:
        """Float32 codebooks (M, K, S) as they will read after storing."""
        if self.dtype is not torch.int8:
            return codebooks.to(self.dtype).float()
        widths = self.widths if len(self.widths) > 1 else codebooks.shape[2]
        parts = []
        for part in codebooks.split(widths, dim=2):
            values, scales = quantize_codebooks(part)
            parts.append(values.float() * scales.float()[:, :, None])
        return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class Rows:
    """An array of rows that is read in pieces.

    Attributes:
        read: row numbers (n,) int64 -> rows (n, D) float32 on the computing device.
        weights: popularity weight (rows,) float32, positive, of each row.
        ranks: the processes that share the work, and may each hold other rows.
        bounds: first row and end of what this rank does; None: all.
        read_own: as ``read``, of rows within ``bounds``; ``read`` is called on all ranks alike.
        codes: row numbers (n,) int64 -> codes (n, M) int64 in an earlier version, if there is one.
        device: the computing device.
    """

    read: Callable[[Tensor], Tensor]
    weights: Tensor
    ranks: Ranks = ALONE
    bounds: tuple[int, int] | None = None
    read_own: Callable[[Tensor], Tensor] | None = None
    codes: Callable[[Tensor], Tensor] | None = None
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.weights)


@dataclass(frozen=True)
class EncodedRows:
    """The codes of one array of rows.

    Attributes:
        packed: packed codes (bytes,) uint8.
        perplexity: for each codebook, exp of the entropy of how often its codewords are used.
        dead_codes: codewords that no row uses.
        changed_rows: rows with other codes than in an earlier version; None without one.
    """

    packed: Tensor
    perplexity: tuple[float, ...]
    dead_codes: int
    changed_rows: int | None = None


@dataclass(frozen=True)
class FittedCodes:
    """What :func:`fit_codes` found.

    Attributes:
        codebooks: (M, K, S) float32, rounded to what the codebook dtype can hold.
        encoded: the codes of each array of rows.
        start_error: relative weighted error right after the k-means start, on the rows learned
            from, with codes of the beam for learning.
        error: the same of what was learned from them; never larger. Codebooks are then fitted to
            the final codes of all rows.
        history: for each epoch of the MEC objective, the mean of each term.
    """

    codebooks: Tensor
    encoded: tuple[EncodedRows, ...]
    start_error: float
    error: float
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Learned:
    """Codebooks without the codes of all rows; attributes as of :class:`FittedCodes`.

    Attributes:
        units: that rows are encoded in.
    """

    codebooks: Tensor
    units: Units
    start_error: float
    error: float
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Sample:
    """Rows to learn from.

    Attributes:
        x: (n, D) float32, in learning units.
        weights: (n,) of mean 1.
        units: of the rows.
        codes: (n, M) int64 that the rows had in an earlier version, if there is one.
    """

    x: Tensor
    weights: Tensor
    units: Units
    codes: Tensor | None = None


def fit_codes(
    arrays: Sequence[Rows],
    shape: CodeShape,
    config: CompressionConfig,
    progress: Progress = lambda stage, error: None,
    learned: Learned | None = None,
) -> FittedCodes:
    """Learn one set of codebooks for several arrays of rows, and the codes of each.

    With ``start``, codebooks follow the rows from there, and rows keep the codes that they have
    where these are good enough, see ``KEEP_MARGIN``; without k-means or the MEC objective, which
    would choose other codes.

    Args:
        arrays: the rows, all of ``sum(shape.widths)`` columns.
        shape: of the codebooks to learn.
        config: loss weights, epochs and seed.
        progress: told (stage, relative weighted error) after every stage.
        learned: the codebooks, where they were learned before (see :func:`learn_side_by_side`).
    """
    if learned is None:
        learned = learn_codebooks(read_sample(arrays, shape, config), config, progress)
    # What follows an earlier version stays as it was learned, lest a table that did not change gets
    # other codebooks.
    refit = _Refit(learned) if shape.start is None else None
    encoded = tuple(_encode_all(rows, learned, refit) for rows in arrays)
    return FittedCodes(
        codebooks=refit.solve(arrays[0].ranks) if refit else learned.codebooks,
        encoded=encoded,
        start_error=learned.start_error,
        error=learned.error,
        history=learned.history,
    )


def learn_side_by_side(
    tasks: Sequence[tuple[Sequence[Rows], CodeShape]],
    config: CompressionConfig,
    progress: Progress,
    ranks: Ranks,
) -> list[Learned]:
    """Codebooks for several sets of arrays, each learned by one rank and told to the others.

    A sample is at most 8 MiB; the normal equations of one round of least squares may be 32 MiB, so
    that it costs less to send the sample to one rank than to work on it together in all rounds.

    Args:
        tasks: arguments of :func:`fit_codes`, no more than there are ranks.
        config: loss weights, epochs and seed.
        progress: told of what this rank learns.
        ranks: the processes.
    """
    units, own = [], None
    for rank, (arrays, shape) in enumerate(tasks):
        sample = read_sample(arrays, shape, config)
        units.append(sample.units)
        if rank == ranks.rank:
            own = sample
    learned = None if own is None else learn_codebooks(own, config, progress)
    return [
        _from_rank(learned if rank == ranks.rank else None, rank, units[rank], ranks)
        for rank in range(len(tasks))
    ]


def _from_rank(learned: Learned | None, source: int, units: Units, ranks: Ranks) -> Learned:
    """What the rank ``source`` has learned; None on all others."""
    shape, columns = units.shape, len(units.mean)
    width = columns // shape.num_subvectors if shape.kind == "product" else columns
    codebooks = units.mean.new_zeros(shape.num_subvectors, shape.codebook_size, width)
    if learned is not None:
        codebooks = learned.codebooks
    codebooks = ranks.merge(codebooks, "learning codebooks")
    about = learned and [learned.start_error, learned.error, learned.history]
    return Learned(codebooks, units, *ranks.tell(about, "learning codebooks")[source])


def learn_codebooks(
    sample: Sample,
    config: CompressionConfig,
    progress: Progress = lambda stage, error: None,
) -> Learned:
    """Codebooks for a sample; see :func:`fit_codes`."""
    units, start = sample.units, sample.units.shape.start
    learner = _Learner(sample.x, sample.weights, units, config, progress)
    if start is None or sample.codes is None:
        found = learner.learn()
    else:
        found = learner.follow(units.learned(start), sample.codes)
    codebooks = units.stored(found)
    return Learned(codebooks, units, learner.start_error, learner.error, learner.history)


def read_sample(arrays: Sequence[Rows], shape: CodeShape, config: CompressionConfig) -> Sample:
    """The rows that codebooks are learned from; on several ranks, alike on all."""
    generator = torch.Generator().manual_seed(config.seed)
    size = min(SAMPLE_ROWS, SAMPLE_BYTES // (4 * sum(shape.widths)))
    weights = arrays[0].weights
    if len(arrays) > 1:  # a copy of a large table's is not needed
        weights = torch.cat([rows.weights for rows in arrays])
    if arrays[0].ranks.size == 1:  # sums of other devices may round in another way
        weights = weights.to(arrays[0].device)
    chosen, mass = weighted_sample(weights, size, generator)
    parts, codes, first = [], [], 0
    for rows in arrays:
        inside = chosen[(chosen >= first) & (chosen < first + len(rows))] - first
        parts.append(rows.read(inside))
        if rows.codes is not None:
            codes.append(rows.codes(inside))
        first += len(rows)
    x = torch.cat(parts)
    mass = (mass / mass.mean()).to(x.device)
    known = torch.cat(codes).to(x.device) if codes else None
    units = Units.of(x, mass, shape)
    return Sample(units.normalise(x), mass, units, known)


@dataclass(frozen=True)
class Units:
    """Learning works on rows of weighted mean 0 and variance 1; codebooks are stored in real units.

    The mean is part of the first additive codebook, or of every product codebook. With a metric,
    rows are multiplied by it, so that plain distances are those that count.
    """

    shape: CodeShape
    mean: Tensor
    scale: Tensor
    metric: Tensor | None
    inverse: Tensor | None

    @classmethod
    def of(cls, x: Tensor, weights: Tensor, shape: CodeShape) -> Units:
        """Units in which rows (n, D) have mean 0 and a variance, summed over columns, of 1."""
        metric = None if shape.metric is None else shape.metric.to(x.device)
        inverse = None if metric is None else torch.linalg.inv(metric.double()).float()
        share = (weights / weights.sum())[:, None]
        mean = (share * x).sum(0)
        centred = _times(x - mean, metric)
        variance = (share * centred.square()).sum()
        # What is left of equal rows is rounding, not variance.
        flat = variance <= 1e-12 * (share * _times(x, metric).square()).sum()
        scale = torch.ones_like(variance) if flat else variance.sqrt()
        return cls(shape, mean, scale, metric, inverse)

    def normalise(self, x: Tensor) -> Tensor:
        """Rows (n, D) in learning units."""
        return _times(x - self.mean, self.metric) / self.scale

    def stored(self, codebooks: Tensor) -> Tensor:
        """Codebooks in real units, from learning units, rounded as they will be stored."""
        real = _times(codebooks * self.scale, self.inverse)
        return self.shape.round(real + self._offset(codebooks))

    def learned(self, stored: Tensor) -> Tensor:
        """Codebooks in learning units, from real ones."""
        return _times(stored - self._offset(stored), self.metric) / self.scale

    def _offset(self, codebooks: Tensor) -> Tensor:
        count, _, width = codebooks.shape
        if self.shape.kind == "product":
            return self.mean.view(count, 1, width)
        offset = codebooks.new_zeros(count, 1, width)
        offset[0, 0] = self.mean
        return offset


def _times(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """Rows (..., D) times a matrix (D, D), where there is one."""
    return rows if matrix is None else rows @ matrix


class _Learner:
    """The stages on the sample, and the best codebooks so far."""

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        units: Units,
        config: CompressionConfig,
        progress: Progress,
    ) -> None:
        self.x, self.weights, self.units, self.config = x, weights, units, config
        self.progress = progress
        self.quantizer: Quantizer = quantizer_for(units.shape.kind)
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        self.history: list[dict[str, float]] = []
        self.start_error = self.error = 0.0
        self.earlier: Tensor | None = None
        self.beam = FINAL_BEAM if len(x) <= FEW_ROWS else LEARNING_BEAM
        self.rounds = max(ROUNDS, min(MOST_ROUNDS, ROUNDS_WORK // self._round_work()))

    def _round_work(self) -> int:
        """Multiplications of a round: products, search, and the normal equations."""
        count, size = self.units.shape.num_subvectors, self.units.shape.codebook_size
        rows, columns = self.x.shape
        return rows * count * (columns * size + STEP_WORK) + (count * size) ** 3 // 3

    def learn(self) -> Tensor:
        """Codebooks (M, K, S) whose error is no larger than that of the k-means start."""
        shape = self.units.shape
        wanted = max(START_ROWS, START_ROWS_EACH * shape.codebook_size)
        ids, weights = weighted_sample(self.weights, wanted, self.generator)
        x = self.x if len(ids) == len(self.x) else self.x[ids.to(self.x.device)]
        codebooks = self.quantizer.start(
            x, weights, shape.num_subvectors, shape.codebook_size, self.config.seed
        )
        codes, self.start_error = self._encode(codebooks)
        self.error = self.start_error
        self.progress("k-means", self.error)
        codebooks, codes = self._refine(codebooks, codes, RELAXATION, PATIENCE)
        if self.config.epochs and self.error > 0:
            codebooks = self._train(codebooks, codes)
        return codebooks

    def follow(self, codebooks: Tensor, codes: Tensor) -> Tensor:
        """Codebooks (M, K, S) that fit better than those of an earlier version with its codes."""
        self.earlier = codes
        error = weighted_error(self.x, self.weights, codes, codebooks, self.quantizer)
        self.start_error = self.error = float(error)
        self.progress("earlier version", self.error)
        # Codebooks first: codes that fit again then need not change.
        return self._refine(codebooks, codes, (0.0, 0.0), 1)[0]

    def _encode(self, codebooks: Tensor) -> tuple[Tensor, float]:
        """Codes for the codebooks as they will be stored, and the weighted error."""
        stored = self.units.learned(self.units.stored(codebooks))
        codes = self.quantizer.encode(self.x, stored, self.beam)
        error = float(weighted_error(self.x, self.weights, codes, stored, self.quantizer))
        if self.earlier is None:
            return codes, error
        margin = KEEP_MARGIN * error
        codes = kept_codes(self.x, self.earlier, codes, stored, self.quantizer, margin)
        return codes, float(weighted_error(self.x, self.weights, codes, stored, self.quantizer))

    def _refine(
        self, codebooks: Tensor, codes: Tensor, relaxation: tuple[float, float], patience: int
    ) -> tuple[Tensor, Tensor]:
        """Alternate least squares and encoding; the best codebooks, and their codes.

        Solutions move the same way for many rounds. So codebooks go on in the direction from the
        solution before to this one: less far from round to round, and half as far from when the
        error rises, as it may with many codebooks.
        """
        best, last, errors, trust = (codebooks, codes), codebooks, [self.error], 1.0
        solution: Tensor | None = None
        first, final = relaxation
        for step in range(self.rounds):
            before = solution
            solution = self.quantizer.refit(self.x, self.weights, codes, last)
            solution = last = self._revive(solution, codes)
            if before is not None:
                farther = trust * (first + (final - first) * step / (self.rounds - 1))
                last = torch.lerp(before, solution, 1 + farther)
            codes, error = self._encode(last)
            trust = trust if error <= errors[-1] else trust / 2
            errors.append(error)
            if error < self.error or not math.isfinite(self.error):
                best, self.error = (last, codes), error
            self.progress("refine", self.error)
            earlier = errors[:-patience]
            least = patience * min(LEAST_FALL, LEAST_PART * self.error)
            if earlier and min(earlier) - self.error < least:
                break
        return best

    def _revive(self, codebooks: Tensor, codes: Tensor) -> Tensor:
        """Give codewords that no row uses to rows drawn by their weighted error."""
        count, size, width = codebooks.shape
        used = torch.bincount(flat_codes(codes, size).flatten(), minlength=count * size)
        dead = (used == 0).nonzero()[:, 0]
        if not len(dead):
            return codebooks
        errors = self.x - self.quantizer.decode(codes, codebooks)
        chance = (self.weights * errors.square().sum(1)).cpu().double() + 1e-30
        drawn = torch.multinomial(chance, len(dead), replacement=True, generator=self.generator)
        drawn = drawn.to(self.x.device)
        targets = self.quantizer.targets(self.x[drawn], codes[drawn], codebooks)
        revived = codebooks.flatten(0, 1).clone()
        revived[dead] = targets[torch.arange(len(dead), device=dead.device), dead // size]
        return revived.view_as(codebooks)

    def _train(self, refined: Tensor, codes: Tensor) -> Tensor:
        """The MEC objective; taken back towards ``refined`` as far as the start's error asks."""
        config = self.config
        # Rows were drawn in order of their numbers, and any part of them is a sample as well.
        seen = torch.randperm(len(self.x), generator=self.generator)[:MEC_ROWS].to(self.x.device)
        trained, self.history = train_codebooks(
            self.x[seen],
            self.weights[seen],
            codes[seen],
            refined,
            self.quantizer,
            Weights(config.usage_weight, config.contrastive_weight),
            config.epochs,
            config.seed,
            self.progress,
        )
        share = 1.0
        while share > 1e-3:
            codebooks = torch.lerp(refined, trained, share)
            _, error = self._encode(codebooks)
            if error <= self.start_error:
                self.error = error
                self.progress("MEC", error)
                return codebooks
            share /= 2
        return refined


def kept_codes(
    x: Tensor,
    earlier: Tensor,
    fresh: Tensor,
    codebooks: Tensor,
    quantizer: Quantizer,
    margin: float,
) -> Tensor:
    """Codes (n, M): ``earlier``, or ``fresh`` where these lower the error by over ``margin``."""
    before, after = (
        (x - quantizer.decode(codes, codebooks)).square().sum(1) for codes in (earlier, fresh)
    )
    return torch.where((before - after > margin)[:, None], fresh, earlier)


class _Refit:
    """Codebooks of least error for the final codes of all rows; learned ones fit a sample.

    Of more rows than REFIT_ROWS, a larger sample.
    """

    def __init__(self, learned: Learned) -> None:
        self.units = learned.units
        self.quantizer = quantizer_for(learned.units.shape.kind)
        self.codebooks = learned.units.learned(learned.codebooks)
        none = self.codebooks.new_zeros(0)
        x, codes = none.view(0, len(self.units.mean)), none.long().view(0, len(self.codebooks))
        self.sums = self.quantizer.sums(x, none, codes, self.codebooks)

    def add(self, x: Tensor, weights: Tensor, codes: Tensor) -> None:
        """Take rows (n, D) in learning units, of weights (n,) and codes (n, M)."""
        sums = self.quantizer.sums(x, weights.to(x.device), codes, self.codebooks)
        for total, part in zip(self.sums, sums, strict=True):
            total += part

    def solve(self, ranks: Ranks) -> Tensor:
        """Codebooks (M, K, S) in real units, as they will be stored, for the rows of all ranks."""
        mass, total = (ranks.add(part, "fitting codebooks") for part in self.sums)
        return self.units.stored(self.quantizer.solve((mass, total), self.codebooks))


def _drawn(rows: Rows, start: int, stop: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows that codebooks are fitted to, of those from ``start`` to ``stop``, and their weights.

    Drawn from the whole chunk of ``step`` rows, alike however ranks share it.

    Returns:
        Numbers (n,) int64, from 0 for ``start``, and weights (n,).
    """
    first = start - start % step
    weights = rows.weights[first : first + step]
    size = -(-len(weights) * REFIT_ROWS // len(rows))
    ids, weights = weighted_sample(weights, size, torch.Generator().manual_seed(first))
    inside = (ids >= start - first) & (ids < stop - first)
    return ids[inside] - (start - first), weights[inside.to(weights.device)]


def _encode_all(rows: Rows, learned: Learned, refit: _Refit | None) -> EncodedRows:
    """The codes of all rows, read in chunks, which ``refit`` hears of if there is one.

    Each rank finds those of its rows, and gets the others'.
    """
    units = learned.units
    shape, codebooks = units.shape, units.learned(learned.codebooks)
    quantizer = quantizer_for(shape.kind)
    count, size, _ = codebooks.shape
    packed = empty_packed(len(rows), count, shape.bits)
    used = torch.zeros(count * size, dtype=torch.int64, device=codebooks.device)
    read = rows.read_own or rows.read
    changed, margin = torch.zeros_like(used[:1]), KEEP_MARGIN * learned.error
    start, end = rows.bounds or (0, len(rows))
    step = chunk_rows(len(units.mean), units.mean.device)
    while start < end:
        # Chunks end where those of one process do, on whole bytes.
        stop = min(start - start % step + step, end)
        ids = torch.arange(start, stop)
        x = units.normalise(read(ids))
        codes = quantizer.encode(x, codebooks, FINAL_BEAM)
        if rows.codes is not None:
            earlier = rows.codes(ids).to(codes.device)
            codes = kept_codes(x, earlier, codes, codebooks, quantizer, margin)
            changed += (codes != earlier).any(1).sum()
        if refit is not None:
            drawn, weights = _drawn(rows, start, stop, step)
            drawn = drawn.to(x.device)
            every = len(drawn) == len(x)
            refit.add(x if every else x[drawn], weights, codes if every else codes[drawn])
        used += torch.bincount(flat_codes(codes, size).flatten(), minlength=count * size)
        # The first row may start within a byte, whose other bits are the rank's before.
        before = start % 8
        codes = torch.nn.functional.pad(codes, (0, 0, before, 0)) if before else codes
        pack_into(packed, start - before, codes, shape.bits)
        start = stop
    packed = rows.ranks.merge(packed, "gathering codes")
    used = rows.ranks.add(used, "counting codes").view(count, size)
    dead = int((used == 0).sum())
    if rows.codes is None:
        return EncodedRows(packed, _perplexity(used), dead)
    changed = rows.ranks.add(changed, "counting changed rows")
    return EncodedRows(packed, _perplexity(used), dead, int(changed))


def chunk_rows(columns: int, device: torch.device) -> int:
    """Rows that are encoded at once on a device: several arrays of them live together."""
    if device.type != "cpu":
        return max(8, min(DEVICE_CHUNK_ROWS, DEVICE_CHUNK_BYTES // (4 * columns) // 8 * 8))
    most = CHUNK_BYTES // (4 * columns) // 8 * 8
    return max(8, min(CHUNK_ROWS, most))


def _perplexity(used: Tensor) -> tuple[float, ...]:
    share = used / used.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
    return tuple(entropy.exp().tolist())
