"""Compressed tables trained with the task: smaller, shared, quantized or clustered rows.

Every method keeps the base's network, training settings and L2 penalty, and rounds its tables to
float16 once trained. A table that the method would not make smaller stays dense. One plan holds
for all tables of a model: the largest that fits the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.common import PARTS, Base, Method, tables
from examples.ctr.models import INIT_STD
from examples.ctr.training import train
from mec_embed.layout import bits_for, packed_bytes
from mec_embed.learning.kmeans import weighted_kmeans
from mec_embed.packing import pack, unpack

#: DPQ and MGQE choose from at most this many codewords, as in MGQE's paper.
MOST_CODEWORDS = 256

#: CCE clusters after each of the first epochs, this many times at most.
CLUSTERINGS = 3

#: CCE splits the columns into fewer chunks where fewer clusters would fit.
FEW_CLUSTERS = 16

#: Rows that k-means sees at most.
MOST_POINTS = 1 << 16

#: Scores of codewords held at once, to bound memory.
MOST_SCORES = 1 << 24

#: Prime above every row number, for universal hashing.
PRIME = (1 << 31) - 1


class Plan(Protocol):
    """How a method stores tables, and what that takes."""

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""


SomePlan = TypeVar("SomePlan", bound=Plan)


def retrained(base: Base, ratio: float) -> nn.Module:
    """The model trained anew from another start, whole: what a second training alone brings."""
    other = replace(base, seed=base.seed + 100)
    return _stored(_train(other, _build(other, Narrow(base.settings.dim))))


def smaller_dim(base: Base, ratio: float) -> nn.Module | None:
    """Dense tables of the largest smaller dimension that fits, and a network of that input."""
    plan = _largest(base, ratio, Narrow, 1, base.settings.dim - 1)
    return plan and _stored(_train(base, _build(base, plan, plan.dim)))


def hashing(base: Base, ratio: float) -> nn.Module | None:
    """The hashing trick (Weinberger et al., 2009) by id modulo rows."""
    plan = _largest(base, ratio, Modulo, 1, max(base.data.rows))
    return plan and _stored(_train(base, _build(base, plan)))


def quotient_remainder(base: Base, ratio: float) -> nn.Module | None:
    """Compositional embeddings (Shi et al., 2020): a quotient's vector times a remainder's."""
    plan = _largest(base, ratio, Partition, 1, max(base.data.rows))
    return plan and _stored(_train(base, _build(base, plan)))


def dpq(base: Base, ratio: float) -> nn.Module | None:
    """Differentiable product quantization, variant DPQ-VQ (Chen et al., 2020)."""
    return _train_quantized(base, ratio, head=1.0, shrink=1)


def mgqe(base: Base, ratio: float) -> nn.Module | None:
    """Multi-granular quantized embeddings (Kang et al., 2020): DPQ with shorter codes in the tail.

    As in the paper a tenth of the rows uses whole codebooks, the others the first quarter of them.
    """
    return _train_quantized(base, ratio, head=0.1, shrink=4)


def cce(base: Base, ratio: float) -> nn.Module | None:
    """Clustered compositional embeddings (Tsang and Ahle, 2023), in four chunks as in the paper."""
    most = min(max(base.data.rows), 1 << 16)
    for chunks, fewest in ((4, FEW_CLUSTERS), (2, FEW_CLUSTERS), (1, 2)):
        plan = _largest(base, ratio, lambda clusters, c=chunks: Clusters(clusters, c), fewest, most)
        if plan:
            return _stored(_train_clustered(base, _build(base, plan)))
    return None


TRAINED: dict[str, Method] = {
    "retrained": retrained,
    "smaller_dim": smaller_dim,
    "hashing": hashing,
    "qr": quotient_remainder,
    "dpq": dpq,
    "mgqe": mgqe,
    "cce": cce,
}


@dataclass(frozen=True)
class Narrow:
    """Dense tables of no more than ``dim`` columns."""

    dim: int

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""
        return _dense_bytes(rows, min(dim, self.dim))

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""
        return Dense(rows, min(dim, self.dim))


@dataclass(frozen=True)
class Modulo:
    """Tables of no more than ``most`` rows."""

    most: int

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""
        return _dense_bytes(min(rows, self.most), dim)

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""
        return Hashed(self.most, dim)


@dataclass(frozen=True)
class Partition:
    """Two tables a field, of no more than ``most`` rows together or the fewest possible."""

    most: int

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""
        return _dense_bytes(sum(self.split(rows)), dim)

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""
        return QuotientRemainder(*self.split(rows), dim)

    def split(self, rows: int) -> tuple[int, int]:
        """Quotients and remainders: the most remainders that leave room for their quotients."""
        most = max(self.most, math.isqrt(4 * rows - 1) + 1)
        # The larger m that solves m + rows / m = most.
        remainders = min(rows, (most + math.isqrt(most * most - 4 * rows)) // 2)
        return -(-rows // remainders), remainders


@dataclass(frozen=True)
class CodeShape:
    """Product codes: ``parts`` codebooks of ``size`` codewords.

    The first ``head`` of the rows chooses from all codewords, the others from a ``shrink``-th.
    """

    parts: int
    size: int
    head: float
    shrink: int

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""
        parts = math.gcd(self.parts, dim)
        codes = [packed_bytes(count, parts * bits_for(size)) for count, size in self.tiers(rows)]
        return sum(codes) + _dense_bytes(self.size, dim)

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""
        return Quantized(self.tiers(rows), dim, math.gcd(self.parts, dim))

    def tiers(self, rows: int) -> list[tuple[int, int]]:
        """(rows, codewords) of head and tail."""
        head = math.ceil(self.head * rows)
        tiers = [(head, self.size), (rows - head, self.size // self.shrink)]
        return [(count, size) for count, size in tiers if count]

    @property
    def information(self) -> float:
        """Bits that the codes of a row carry, on the mean of a large table."""
        head, tail = math.log2(self.size), math.log2(self.size // self.shrink)
        return self.parts * (self.head * head + (1 - self.head) * tail)


@dataclass(frozen=True)
class Clusters:
    """``clusters`` clusters and as many helper rows in each chunk of the columns."""

    clusters: int
    chunks: int

    def cost(self, rows: int, dim: int) -> int:
        """Bytes of a table (rows, dim)."""
        chunks = math.gcd(self.chunks, dim)
        multipliers = 2 * chunks * torch.int64.itemsize
        codes = packed_bytes(rows, chunks * bits_for(self.clusters))
        return codes + multipliers + _dense_bytes(2 * self.clusters, dim)

    def make(self, rows: int, dim: int) -> nn.Module:
        """A trainable table (rows, dim)."""
        return Clustered(rows, dim, self.clusters, math.gcd(self.chunks, dim))


class Table(nn.Module):
    """A trainable table: ids of any shape to float32 (..., dim)."""

    def stored(self) -> nn.Module:
        """What is kept of it after training; its floats are float16."""
        return self.half()


class Dense(Table):
    """A row an id."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.table = _embedding(rows, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        return self.table(ids).float()


class Hashed(Dense):
    """The ids with the same remainder share a row."""

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        return super().forward(ids % self.table.num_embeddings)


class QuotientRemainder(Table):
    """The element-wise product of the quotient's and the remainder's vectors."""

    def __init__(self, quotients: int, remainders: int, dim: int) -> None:
        super().__init__()
        # The product's standard deviation is INIT_STD, as that of any other table.
        self.quotients = _embedding(quotients, dim, math.sqrt(INIT_STD))
        self.remainders = _embedding(remainders, dim, math.sqrt(INIT_STD))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        count = self.remainders.num_embeddings
        return self.quotients(ids // count).float() * self.remainders(ids % count).float()


class Quantized(Table):
    """Dense queries, each replaced by the nearest codeword in every part.

    Gradients pass straight through to the queries. The codewords follow the queries that they
    stand for, by the gradient of their squared distance, and carry no penalty of their own.
    """

    def __init__(self, tiers: list[tuple[int, int]], dim: int, parts: int) -> None:
        super().__init__()
        self.tiers = tiers
        size = max(size for _, size in tiers)
        self.queries = _embedding(sum(count for count, _ in tiers), dim)
        self.codebooks = nn.Parameter(torch.randn(parts, size, dim // parts) * INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Quantized rows of ``ids``."""
        unique, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        parts, size, _ = self.codebooks.shape
        codes = self.encode(unique) + size * torch.arange(parts, device=ids.device)
        rows = F.embedding(codes, self.codebooks.flatten(0, 1))
        if self.training:
            queries = self.queries(unique).view_as(rows)
            # In the place of the task's gradient, that of their mean squared distance.
            pull = (rows - queries).detach() * (counts / ids.numel())[:, None, None]
            rows.register_hook(lambda _: pull)
            rows = rows + (queries - queries.detach())
        return rows.flatten(1)[inverse]

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """Codes (n, parts) of the rows ``ids`` (n,)."""
        queries = self.queries(ids).view(len(ids), len(self.codebooks), -1)
        return _nearest(queries, self.codebooks, _sizes(ids, self.tiers))

    def stored(self) -> nn.Module:
        """Packed codes and float16 codebooks."""
        ids = torch.arange(self.queries.num_embeddings, device=self.codebooks.device)
        return Coded(self.encode(ids), self.codebooks, self.tiers)


class Coded(nn.Module):
    """Packed codes (rows, parts) into codebooks (parts, size, columns)."""

    def __init__(self, codes: Tensor, codebooks: Tensor, tiers: list[tuple[int, int]]) -> None:
        super().__init__()
        self.tiers = tiers
        self.register_buffer("codebooks", codebooks.detach().half())
        ordered = codes.roll(1, 0)
        for tier, rows in enumerate(ordered.split([count for count, _ in tiers])):
            self.register_buffer(f"codes_{tier}", pack(rows, bits_for(tiers[tier][1])))

    def forward(self, ids: Tensor) -> Tensor:
        """Decoded rows of ``ids``."""
        parts, size, _ = self.codebooks.shape
        codes = self.codes(ids.reshape(-1)) + size * torch.arange(parts, device=ids.device)
        rows = F.embedding(codes, self.codebooks.flatten(0, 1)).float()
        return rows.view(*ids.shape, -1)

    def codes(self, ids: Tensor) -> Tensor:
        """Codes (n, parts) of the rows ``ids`` (n,)."""
        positions = _positions(ids, self.tiers)
        codes = torch.empty(len(ids), len(self.codebooks), dtype=torch.int64, device=ids.device)
        start = 0
        for tier, (count, size) in enumerate(self.tiers):
            chosen = (positions >= start) & (positions < start + count)
            packed = getattr(self, f"codes_{tier}")
            rows = positions[chosen] - start
            codes[chosen] = unpack(packed, codes.shape[1], bits_for(size), rows)
            start += count
        return codes


class Clustered(Table):
    """The sum of a cluster's vector and a hashed helper's in every chunk of the columns.

    Clusters are drawn at random until `cluster` finds them.
    """

    def __init__(self, rows: int, dim: int, clusters: int, chunks: int) -> None:
        super().__init__()
        self.centroids = _embedding(chunks * clusters, dim // chunks)
        self.helper = Helper(clusters, dim, chunks)
        self.register_buffer("codes", torch.randint(clusters, (rows, chunks)))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        chunks = self.codes.shape[1]
        size = self.centroids.num_embeddings // chunks
        rows = self.centroids(self.codes[ids] + size * torch.arange(chunks, device=ids.device))
        return rows.flatten(-2) + self.helper(ids)

    @torch.no_grad()
    def cluster(self, seed: int) -> None:
        """Cluster the rows by k-means; new helpers take the mean of what is left."""
        ids = torch.arange(len(self.codes), device=self.codes.device)
        chunks = self.codes.shape[1]
        rows = self(ids).view(len(ids), chunks, -1)
        size = self.centroids.num_embeddings // chunks
        found = torch.stack([_kmeans(rows[:, chunk], size, seed) for chunk in range(chunks)])
        self.codes.copy_(_nearest(rows, found))
        self.centroids.weight.copy_(found.flatten(0, 1))
        rest = rows - found[torch.arange(chunks, device=ids.device), self.codes]
        self.helper.restart(ids, rest)

    def stored(self) -> nn.Module:
        """Packed clusters beside float16 centroids and helpers."""
        chunks = self.codes.shape[1]
        centroids = self.centroids.weight.view(chunks, -1, self.centroids.embedding_dim)
        coded = Coded(self.codes, centroids, [(len(self.codes), centroids.shape[1])])
        return Sum(coded, self.helper.half())


class Helper(nn.Module):
    """One vector a chunk, chosen by universal hashing (Carter and Wegman, 1979)."""

    def __init__(self, size: int, dim: int, chunks: int) -> None:
        super().__init__()
        self.size = size
        self.table = _embedding(chunks * size, dim // chunks)
        self.register_buffer("multipliers", torch.randint(1, PRIME, (2, chunks)))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        return self.table(self.hashes(ids)).flatten(-2).float()

    def hashes(self, ids: Tensor) -> Tensor:
        """Rows of the table for ``ids``: one a chunk (..., chunks)."""
        slope, offset = self.multipliers
        hashed = (ids[..., None] * slope + offset) % PRIME % self.size
        return hashed + self.size * torch.arange(len(slope), device=ids.device)

    def restart(self, ids: Tensor, targets: Tensor) -> None:
        """Hash anew and start from the mean of the targets (n, chunks, columns) that meet."""
        self.multipliers.random_(1, PRIME)
        hashes = self.hashes(ids).flatten()
        counts = hashes.bincount(minlength=self.table.num_embeddings).clamp(min=1)
        sums = torch.zeros_like(self.table.weight).index_add_(0, hashes, targets.flatten(0, 1))
        self.table.weight.copy_(sums / counts[:, None])


class Sum(nn.Module):
    """The sum of two tables."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ``ids``."""
        return self.first(ids) + self.second(ids)


def _dense_bytes(rows: int, dim: int) -> int:
    """Bytes of a float16 table."""
    return rows * dim * torch.float16.itemsize


def _fits(base: Base, ratio: float, plan: Plan) -> bool:
    """Whether all tables together fit the budget."""
    total = 0
    for _, _, table in tables(base.model):
        shape = table.num_embeddings, table.embedding_dim
        total += min(plan.cost(*shape), _dense_bytes(*shape))
    return total <= base.budget(ratio)


def _largest(
    base: Base, ratio: float, make: Callable[[int], SomePlan], low: int, high: int
) -> SomePlan | None:
    """The plan of the largest number in low..high that fits, if any does."""
    numbers = range(low, high + 1)
    count = bisect_left(numbers, True, key=lambda number: not _fits(base, ratio, make(number)))
    return make(numbers[count - 1]) if count else None


def _code_shapes(base: Base, head: float, shrink: int) -> list[CodeShape]:
    """All shapes: those that tell most first, and of the same those of the larger codebooks."""
    dim = base.settings.dim
    sizes = range(2 * shrink, MOST_CODEWORDS + 1, shrink)
    parts = [count for count in range(1, dim + 1) if dim % count == 0]
    shapes = [CodeShape(count, size, head, shrink) for count in parts for size in sizes]
    return sorted(shapes, key=lambda shape: (shape.information, shape.size), reverse=True)


def _build(base: Base, plan: Plan, dim: int | None = None) -> nn.Module:
    """An untrained model like the base's, with the plan's tables where they are smaller."""
    settings = base.settings
    torch.manual_seed(base.seed)
    model = type(base.model)(
        base.data.fields,
        base.data.rows,
        dim or settings.dim,
        settings.hidden,
        settings.dropout,
        settings.batch_norm,
    )
    for held, field, table in tables(model):
        shape = table.num_embeddings, table.embedding_dim
        smaller = plan.cost(*shape) < _dense_bytes(*shape)
        held[field] = plan.make(*shape) if smaller else Dense(*shape)
    return model


def _train(
    base: Base, model: nn.Module, epochs: int | None = None, seed: int | None = None
) -> nn.Module:
    """Train as the base was trained."""
    settings = base.settings
    train(
        model,
        base.data,
        epochs=settings.epochs if epochs is None else epochs,
        lr=settings.lr,
        batch_size=settings.batch_size,
        l2=settings.l2,
        patience=settings.patience,
        seed=base.seed if seed is None else seed,
        progress=False,
    )
    return model


def _train_quantized(base: Base, ratio: float, head: float, shrink: int) -> nn.Module | None:
    """Train with the codes that tell most of those that fit."""
    shapes = _code_shapes(base, head, shrink)
    plan = next((shape for shape in shapes if _fits(base, ratio, shape)), None)
    return plan and _stored(_train(base, _build(base, plan)))


def _train_clustered(base: Base, model: nn.Module) -> nn.Module:
    """Train, clustering after each of the first epochs: once at least, never after the last."""
    rounds = max(1, min(CLUSTERINGS, base.settings.epochs - 1))
    for number in range(rounds):
        # A seed of its own, as training shuffles the first epoch of a seed always alike.
        _train(base, model, epochs=1, seed=base.seed + (number + 1) * 1_000_003)
        for module in model.modules():
            if isinstance(module, Clustered):
                module.cluster(base.seed + number)
    return _train(base, model, epochs=max(1, base.settings.epochs - rounds))


def _stored(model: nn.Module) -> nn.Module:
    """Keep of each table what is stored."""
    for part in PARTS:
        held = getattr(model, part, None) or {}
        for field, table in list(held.items()):
            held[field] = table.stored()
    return model.eval()


def _embedding(rows: int, dim: int, std: float = INIT_STD) -> nn.Embedding:
    """A table drawn as the base's are; being an ``nn.Embedding`` it carries the L2 penalty."""
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=std)
    return table


def _kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids (clusters, columns) of points (n, columns)."""
    if len(points) > MOST_POINTS:
        generator = torch.Generator().manual_seed(seed)
        points = points[torch.randperm(len(points), generator=generator)[:MOST_POINTS]]
    return weighted_kmeans(points.contiguous(), torch.ones(len(points)), clusters, seed)


def _nearest(points: Tensor, codebooks: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Codes (n, parts) of points (n, parts, columns) in codebooks (parts, size, columns).

    Point ``i`` may take the first ``sizes[i]`` codewords only.
    """
    parts, size, _ = codebooks.shape
    block = max(1, MOST_SCORES // (parts * size))
    offsets = codebooks.square().sum(2) / 2
    found = []
    for start in range(0, len(points), block):
        chosen = slice(start, start + block)
        scores = torch.einsum("npc,pkc->npk", points[chosen], codebooks) - offsets
        if sizes is not None:
            beyond = torch.arange(size, device=points.device) >= sizes[chosen, None]
            scores.masked_fill_(beyond[:, None], -math.inf)
        found.append(scores.argmax(2))
    return torch.cat(found)


def _positions(ids: Tensor, tiers: list[tuple[int, int]]) -> Tensor:
    """Place of the ids in the tiers: the last row first, for it may hold all that are unknown."""
    return (ids + 1) % sum(count for count, _ in tiers)


def _sizes(ids: Tensor, tiers: list[tuple[int, int]]) -> Tensor:
    """Codewords (n,) that the ids may take."""
    sizes = torch.tensor([size for _, size in tiers], device=ids.device)
    counts = torch.tensor([count for count, _ in tiers], device=ids.device)
    return sizes.repeat_interleave(counts)[_positions(ids, tiers)]
