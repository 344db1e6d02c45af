"""Post-hoc baselines: they compress the tables of a trained model and see no labels.

What they store are fp16 parameters, which gradients reach, and uint8 codes, which stay. Adam cannot
work in fp16 (its epsilon is 0 there), so train between `thaw` and `freeze`. Codes with codebooks
are mec_embed's modules, which `mec_embed.distill` trains too; a model holds either these or others.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.common import PARTS, Base, Method, embedding_bytes, tables
from mec_embed import CompressionConfig, compress
from mec_embed.config import POPULARITY
from mec_embed.layout import CodeLayout, packed_bytes
from mec_embed.learning.quantizers import quantizer_for
from mec_embed.modules import CompressedEmbedding
from mec_embed.packing import pack, unpack

#: Rows worked on at once.
CHUNK = 1 << 13
#: The largest codes that are tried, in bits: faiss's usual ones, and K = 2048 as in the MEC paper.
#: k-means takes minutes beyond.
PQ_BITS, MEC_BITS = 8, 11
#: Shapes with fewer bits a row than this part of the most that fit are not worth training.
WORTHWHILE = 0.75
#: Codebooks of MEC (Wang et al., arXiv 2502.15355).
MEC_SUBVECTORS = 4
#: Rows and iterations that a rotation is learned with; faiss's 65,536 and 50 take minutes.
OPQ_ROWS, OPQ_ITERATIONS = 1 << 14, 20
#: Clipping is searched in steps of 1 / bins of the range, until half of it is left.
CLIP_BINS, CLIP_STEPS = 100, 50
#: Occurrences that a row without any counts as.
UNSEEN = 0.1
#: Bits of an entry in methods that take what these bits take, whatever the ratio asked.
ROW_BITS = {"fp16": 16, "int8": 8, "int4": 4, "int2": 2}


def thaw(model: nn.Module) -> bool:
    """Turn the fp16 parameters of the tables into fp32 ones to train; build optimizers after.

    Returns:
        Whether there were any.
    """
    return _cast(model, torch.float16, torch.float32)


def freeze(model: nn.Module) -> None:
    """Round what `thaw` made fp32 to fp16 again; the model then takes its budget again."""
    _cast(model, torch.float32, torch.float16)


def _cast(model: nn.Module, old: torch.dtype, new: torch.dtype) -> bool:
    found = False
    parts = [getattr(model, part) for part in PARTS if getattr(model, part, None)]
    for owner in [module for part in parts for module in part.modules()]:
        for name, value in list(owner.named_parameters(recurse=False)):
            if value.dtype is old:
                setattr(owner, name, nn.Parameter(value.detach().to(new), value.requires_grad))
                found = True
    return found


def _dense(base: Base) -> Iterator[Tensor]:
    """The trained tables (rows, dim) on the CPU, in the order of `tables`."""
    for _, _, table in tables(base.model):
        yield table.weight.detach().cpu().float()


def _popularity(base: Base, kind: str) -> Iterator[Tensor]:
    """Weights (rows,) of each table's rows, summing to 1: all fields are looked up as often."""
    counts = {name.replace(".", "_"): values for name, values in base.counts.items()}
    for _, field, _ in tables(base.model):
        weights = POPULARITY[kind](torch.as_tensor(counts[field]).float().clamp(min=UNSEEN))
        yield weights / weights.sum()


def _with(base: Base, modules: Sequence[nn.Module]) -> nn.Module:
    """A copy of the base model with these modules in place of its tables."""
    model = base.copy()
    for (held, field, table), module in zip(list(tables(model)), modules, strict=True):
        held[field] = module.to(table.weight.device)
    return model


class HalfRows(nn.Module):
    """A table (rows, dim) of fp16 entries."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (*ids.shape, dim) float32."""
        return F.embedding(ids, self.weight).float()


class RowQuantized(nn.Module):
    """Rows of small integers, with scale and bias of each row (fp16), as FBGEMM stores them.

    Args:
        codes: (rows, dim) integers below ``2**bits``.
        affine: (rows, 2) scales and biases.
        bits: of an entry.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, affine: Tensor, bits: int) -> None:
        super().__init__()
        self.dim, self.bits = codes.shape[1], bits
        self.register_buffer("codes", pack(codes, bits))
        self.affine = nn.Parameter(affine.to(torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (*ids.shape, dim) float32."""
        codes = unpack(self.codes, self.dim, self.bits, ids.reshape(-1).long())
        scale, bias = F.embedding(ids, self.affine).float().split(1, dim=-1)
        return codes.view(*ids.shape, self.dim) * scale + bias


def row_quantized(base: Base, ratio: float, bits: int) -> nn.Module | None:
    """Row-wise affine quantization (FBGEMM), below 8 bits with the greedy clipping of Guan et al.

    (arXiv 1911.02079). Tables that fp16 rows store in no more bytes are kept so, such as
    first-order ones, and all of them at 16 bits.
    """
    if _quantized_bytes(base, bits) > base.budget(ratio):
        return None
    return _with(base, [_quantized_rows(weight, bits) for weight in _dense(base)])


def natural_ratio(name: str, base: Base) -> float:
    """The largest ratio that ``"fp16"``, ``"int8"``, ``"int4"`` or ``"int2"`` meets."""
    needed = _quantized_bytes(base, ROW_BITS[name])
    ratio = base.nbytes / needed
    while base.budget(ratio) < needed:  # by rounding
        ratio = math.nextafter(ratio, 0.0)
    return ratio


def _quantized_bytes(base: Base, bits: int) -> int:
    shapes = [weight.shape for weight in _dense(base)]
    return sum(min(2 * rows * dim, _row_bytes(rows, dim, bits)) for rows, dim in shapes)


def _row_bytes(rows: int, dim: int, bits: int) -> int:
    return packed_bytes(rows, dim * bits) + 4 * rows


def _quantized_rows(weight: Tensor, bits: int) -> nn.Module:
    rows, dim = weight.shape
    if 2 * rows * dim <= _row_bytes(rows, dim, bits):
        return HalfRows(weight)
    codes, affine = [], []
    for start in range(0, rows, CHUNK):
        x = weight[start : start + CHUNK].numpy()
        some_codes, some_affine = _affine(x, *_range(x, bits), bits)
        codes.append(torch.from_numpy(some_codes.astype(np.uint8)))
        affine.append(torch.from_numpy(some_affine))
    return RowQuantized(torch.cat(codes), torch.cat(affine), bits)


def _range(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends (n, 1) of the range of each row: greedily the end that costs less moves inwards."""
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    if bits == 8:
        return low, high
    step = (high - low) / CLIP_BINS
    best, best_error = (low, high), _affine_error(x, low, high, bits)
    for _ in range(CLIP_STEPS):
        raised = _affine_error(x, low + step, high, bits)
        lowered = _affine_error(x, low, high - step, bits)
        low = np.where(raised < lowered, low + step, low)
        high = np.where(raised < lowered, high, high - step)
        error = np.minimum(raised, lowered)
        better = error < best_error
        best = np.where(better, low, best[0]), np.where(better, high, best[1])
        best_error = np.minimum(error, best_error)
    return best


def _affine(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, dim), as floats, and fp16 scale and bias (n, 2) that span the range."""
    levels = (1 << bits) - 1
    # Rounded outwards, so that no entry inside the range is off by more than half a step.
    bias = _round_half(low, -np.inf)
    scale = _round_half((high - bias.astype(np.float32)) / levels, np.inf)
    scale = np.maximum(scale, np.finfo(np.float16).smallest_subnormal)
    codes = np.rint((x - bias.astype(np.float32)) / scale.astype(np.float32))
    return codes.clip(0, levels), np.concatenate([scale, bias], axis=1)


def _round_half(x: np.ndarray, towards: float) -> np.ndarray:
    half = x.astype(np.float16)
    wrong = half < x if towards > 0 else half > x
    return np.where(wrong, np.nextafter(half, np.float16(towards)), half)


def _affine_error(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    codes, affine = _affine(x, low, high, bits)
    affine = affine.astype(np.float32)
    return np.square(codes * affine[:, :1] + affine[:, 1:] - x).sum(1, keepdims=True)


class LowRank(nn.Module):
    """A table as the product of two fp16 factors: ``left`` (rows, rank), ``right`` (rank, dim)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left.to(torch.float16).contiguous())
        self.right = nn.Parameter(right.to(torch.float16).contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (*ids.shape, dim) float32."""
        return F.embedding(ids, self.left).float() @ self.right.float()


def svd(base: Base, ratio: float) -> nn.Module | None:
    """Truncated SVD of each table, rows weighted by the square root of their counts.

    The ranks follow greedily from the weighted energy that a rank adds for its bytes, over all
    tables. A table that its factors would make larger than its fp16 rows is kept as these.
    """
    pairs = list(zip(_dense(base), _popularity(base, "sqrt"), strict=True))
    bases = [_principal(weight, weights) for weight, weights in pairs]
    steps = [
        _rank_steps(*weight.shape, energy)
        for (weight, _), (_, energy) in zip(pairs, bases, strict=True)
    ]
    levels = _spend(steps, base.budget(ratio))
    if levels is None:
        return None
    return _with(
        base,
        [
            HalfRows(weight) if level == len(step) else low_rank(weight, directions, level)
            for (weight, _), (directions, _), step, level in zip(
                pairs, bases, steps, levels, strict=True
            )
        ],
    )


def low_rank(weight: Tensor, directions: Tensor, rank: int) -> LowRank:
    """The rows projected on the first ``rank`` columns of ``directions`` (dim, dim)."""
    right = directions[:, :rank]
    return LowRank(weight @ right, right.T)


def _principal(weight: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (dim, dim) of the weighted rows, and their energies (dim,)."""
    rows = weight.double() * weights.double().sqrt()[:, None]
    energy, directions = torch.linalg.eigh(rows.T @ rows)
    return directions.flip(1).float(), energy.flip(0).clamp(min=0)


def _rank_steps(rows: int, dim: int, energy: Tensor) -> list[tuple[int, float]]:
    """Bytes and energy of each further rank; the last step is from factors to fp16 rows."""
    each, whole = 2 * (rows + dim), 2 * rows * dim
    ranks = (whole - 1) // each
    steps = [(each, float(value)) for value in energy[:ranks]]
    return [*steps, (whole - ranks * each, float(energy[ranks:].sum()))]


def _spend(steps: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Steps taken in each list, at least one, the most energy for its bytes first."""
    left = budget - sum(taken[0][0] for taken in steps)
    levels = [1] * len(steps)
    while left >= 0:
        density = {
            i: steps[i][level][1] / steps[i][level][0]
            for i, level in enumerate(levels)
            if level < len(steps[i]) and steps[i][level][0] <= left
        }
        if not density:
            return levels
        best = max(density, key=density.__getitem__)
        left -= steps[best][levels[best]][0]
        levels[best] += 1
    return None


class Rotated(nn.Module):
    """Codes of rotated rows, with the fp16 rotation (dim, dim) that led to them, which stays."""

    rotation: Tensor

    def __init__(self, codes: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.codes = codes
        self.register_buffer("rotation", rotation.to(torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (*ids.shape, dim) float32."""
        return self.codes(ids) @ self.rotation.float()


def _half_layout(rows: int, dim: int) -> CodeLayout:
    return CodeLayout("rows", rows, dim, 1, rows, torch.float16)


def _half(weight: Tensor) -> CompressedEmbedding:
    """Fp16 rows, as codebooks of one codeword a row."""
    module = CompressedEmbedding(_half_layout(*weight.shape))
    module.codebook_set.store(weight[None])
    return module


def _code_layout(rows: int, dim: int, subvectors: int, bits: int, extra: int = 0) -> CodeLayout:
    """Product codes (one code of a scalar), or fp16 rows where these take no more bytes.

    ``extra`` is what codes of vectors need beside codebooks.
    """
    half = _half_layout(rows, dim)
    count = subvectors if dim > 1 else 1
    coded = CodeLayout("product", rows, dim, count, 1 << bits, torch.float16)
    more = extra if dim > 1 else 0
    return coded if _nbytes(coded) + more < _nbytes(half) else half


def _nbytes(layout: CodeLayout) -> int:
    return layout.code_bytes + layout.codebook_bytes


def _layouts(base: Base, subvectors: int, bits: int, extra: int = 0) -> list[CodeLayout]:
    return [_code_layout(*weight.shape, subvectors, bits, extra) for weight in _dense(base)]


def _most_bits(base: Base, ratio: float, subvectors: int, limit: int, extra: int = 0) -> int:
    """Bits, up to ``limit``, of the largest of this many codes that fit the budget, or 0."""
    for bits in range(limit, 0, -1):
        layouts = _layouts(base, subvectors, bits, extra)
        extras = sum(extra for layout in layouts if layout.bits and layout.embedding_dim > 1)
        if sum(map(_nbytes, layouts)) + extras <= base.budget(ratio):
            return bits
    return 0


def _divisors(base: Base) -> list[int]:
    """Numbers of subvectors that the embedding dimension allows."""
    dim = max(weight.shape[1] for weight in _dense(base))
    return [count for count in range(1, dim + 1) if dim % count == 0]


def _coded(layout: CodeLayout, codes: Tensor, codebooks: Tensor) -> CompressedEmbedding:
    """The module that decodes these codes (rows, M) with these codebooks (M, K, S)."""
    module = CompressedEmbedding(layout)
    module.code_table.codes.copy_(pack(codes, layout.bits))
    module.codebook_set.store(codebooks)
    return module


def product_quantizer(
    x: np.ndarray, subvectors: int, bits: int, seed: int
) -> faiss.ProductQuantizer:
    """A trained faiss product quantizer of the rows ``x`` (n, dim) float32."""
    quantizer = _untrained(x.shape[1], subvectors, bits, seed)
    quantizer.train(x)
    return quantizer


def _untrained(dim: int, subvectors: int, bits: int, seed: int) -> faiss.ProductQuantizer:
    faiss.omp_set_num_threads(1)  # or its threads and torch's wait for each other by spinning
    quantizer = faiss.ProductQuantizer(dim, subvectors, bits)
    quantizer.cp.seed = seed + 1
    quantizer.cp.min_points_per_centroid = 1  # or faiss warns
    return quantizer


def faiss_table(weight: Tensor, layout: CodeLayout, seed: int) -> nn.Module:
    """The table quantized by faiss, unweighted; a table of scalars by scalar k-means."""
    if not layout.bits:
        return _half(weight)
    x = np.ascontiguousarray(weight.numpy())
    count, bits = layout.num_subvectors, layout.bits
    quantizer = product_quantizer(x, count, bits, seed)
    codes = faiss.unpack_bitstrings(quantizer.compute_codes(x), count, bits)
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(count, 1 << bits, -1)
    return _coded(layout, torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(centroids))


def opq_table(weight: Tensor, layout: CodeLayout, seed: int) -> nn.Module:
    """As `faiss_table`, on rows that faiss has learned to rotate."""
    if not layout.bits or layout.embedding_dim == 1:
        return faiss_table(weight, layout, seed)
    rotation = _rotation(weight, layout, seed).to(torch.float16)
    return Rotated(faiss_table(weight @ rotation.float().T, layout, seed), rotation)


def _rotation(weight: Tensor, layout: CodeLayout, seed: int) -> Tensor:
    dim, count = layout.embedding_dim, layout.num_subvectors
    rows = np.random.default_rng(seed).permutation(len(weight))
    quantizer = _untrained(dim, count, layout.bits, seed)
    matrix = faiss.OPQMatrix(dim, count)
    matrix.pq = quantizer  # with codes of the size that will be used, not of 8 bits
    matrix.niter = OPQ_ITERATIONS
    matrix.train(weight.numpy()[rows[:OPQ_ROWS]])
    return torch.from_numpy(faiss.vector_to_array(matrix.A).reshape(dim, dim).copy())


def product_codes(base: Base, ratio: float, rotated: bool) -> nn.Module | None:
    """Product quantization (Jegou et al., 2011) or OPQ (Ge et al., 2013), trained by faiss.

    All tables have the same number of subvectors and bits, those of least error without rotation.
    """
    extra = 2 * max(_divisors(base)) ** 2 if rotated else 0
    shapes = [(count, _most_bits(base, ratio, count, PQ_BITS, extra)) for count in _divisors(base)]
    most = max(count * bits for count, bits in shapes)
    if not most:
        return None
    tried = []
    for count, bits in shapes:
        if count * bits >= WORTHWHILE * most:
            layouts = _layouts(base, count, bits, extra)
            modules = _each(faiss_table, base, layouts)
            tried.append((_error(base, modules), modules, layouts))
    _, modules, layouts = min(tried, key=lambda found: found[0])
    return _with(base, _each(opq_table, base, layouts) if rotated else modules)


def _each(
    learn: Callable[[Tensor, CodeLayout, int], nn.Module], base: Base, layouts: list[CodeLayout]
) -> list[nn.Module]:
    return [
        learn(weight, layout, base.seed)
        for weight, layout in zip(_dense(base), layouts, strict=True)
    ]


@torch.no_grad()
def _error(base: Base, modules: Sequence[nn.Module]) -> float:
    """Squared error of all rows of all tables, unweighted."""
    return sum(
        float((module(ids) - weight[ids]).double().square().sum())
        for weight, module in zip(_dense(base), modules, strict=True)
        for ids in torch.arange(len(weight)).split(CHUNK)
    )


def _mec_shape(base: Base, ratio: float) -> tuple[int, int]:
    """Four subvectors, or the nearest divisor, and the most bits that fit (0 if none do)."""
    count = min(_divisors(base), key=lambda count: abs(count - MEC_SUBVECTORS))
    return count, _most_bits(base, ratio, count, MEC_BITS)


def mec_released(base: Base, ratio: float) -> nn.Module | None:
    """MEC (Wang et al., arXiv 2502.15355) as its authors' program computes it.

    No gradient reaches its encoder, so that its codes stay those of a random projection. Here the
    codebooks are the best ones for these codes, a row n times in training weighing floor(log2 n).
    Kinder than the original: codes are bit-packed, and first-order tables, which it does not have,
    get scalar k-means.
    """
    count, bits = _mec_shape(base, ratio)
    if not bits:
        return None
    layouts = _layouts(base, count, bits)
    triples = zip(_dense(base), _popularity(base, "log"), layouts, strict=True)
    return _with(base, [_projected(*triple, base.seed) for triple in triples])


def _projected(weight: Tensor, weights: Tensor, layout: CodeLayout, seed: int) -> nn.Module:
    if not layout.bits or layout.embedding_dim == 1:
        return faiss_table(weight, layout, seed)
    count, size, width = layout.num_subvectors, layout.codebook_size, layout.subvector_dim
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(layout.embedding_dim, count * size, generator=generator)
    codes = torch.cat(
        [(x @ projection).view(-1, count, size).argmax(2) for x in weight.split(CHUNK // 8)]
    )
    unused = weight.new_zeros(count, size, width)
    codebooks = quantizer_for("product").refit(weight, weights, codes, unused)
    return _coded(layout, codes, codebooks)


def mec_described(base: Base, ratio: float) -> nn.Module | None:
    """MEC (Wang et al., arXiv 2502.15355) as the paper describes it, learned by mec_embed.

    Product codes of floor(log2 n)-weighted k-means, then reconstruction + 1e-4 usage + 2e-3
    contrast. Tables that fp16 rows store in no more bytes are kept so.
    """
    count, bits = _mec_shape(base, ratio)
    if not bits:
        return None
    model = base.copy()
    names = [f"{part}.{field}" for part in PARTS for field in getattr(model, part, None) or {}]
    layouts = dict(zip(names, _layouts(base, count, bits), strict=True))
    config = CompressionConfig(
        codes="product",
        num_subvectors=count,
        codebook_size=1 << bits,
        codebook_dtype="float16",
        min_rows=1,
        exclude=tuple(glob.escape(name) for name, layout in layouts.items() if not layout.bits),
        popularity="log",
        usage_weight=1e-4,
        contrastive_weight=2e-3,
        seed=base.seed,
    )
    if any(layout.bits for layout in layouts.values()):
        fields = {field.replace(".", "_"): counts for field, counts in base.counts.items()}
        counts = {name: fields[name.partition(".")[2]] for name in names}
        compress(model, counts, config, progress=False)
    for held, field, table in list(tables(model)):
        held[field] = _half(table.weight.detach()).to(table.weight.device)
    return model


def _checked(method: Method) -> Method:
    """The method, refusing what is over the budget after all."""

    def checked(base: Base, ratio: float) -> nn.Module | None:
        model = method(base, ratio)
        if model is not None and embedding_bytes(model) > base.budget(ratio):
            raise RuntimeError(
                f"{embedding_bytes(model):,} bytes exceed the budget of {base.budget(ratio):,}"
            )
        return model

    return checked


POSTHOC: dict[str, Method] = {
    name: _checked(method)
    for name, method in {
        **{name: partial(row_quantized, bits=bits) for name, bits in ROW_BITS.items()},
        "svd": svd,
        "pq": partial(product_codes, rotated=False),
        "opq": partial(product_codes, rotated=True),
        "mec_released": mec_released,
        "mec_described": mec_described,
    }.items()
}
