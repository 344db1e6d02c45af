"""Product and additive codes: start, encode, decode and refit, on plain arrays.

Both work on rows ``x`` (n, D) float32, ``codes`` (n, M) int64 and ``codebooks`` (M, K, S) float32,
where S = D / M for product codes and S = D for additive ones.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import cpu
from .kmeans import weighted_kmeans

#: Bytes of the largest temporary array while encoding; on other devices than the CPU, which have
#: more to do at once and start slowly, of all that are made of some rows.
_WORK_BYTES, _DEVICE_WORK_BYTES = 2 << 20, 128 << 20
#: Rows of a large array that are worked on at once.
_PART_ROWS = 1 << 14
#: Candidates that the C kernel looks at together.
_LANES = 16
#: The search by a Triton kernel, where the lookups have theirs.
_gpu_search: Any = importlib.import_module(".gpu_search", __package__) if ops._gpu else None


class Quantizer(Protocol):
    """What learning needs to know of a kind of codes."""

    def start(self, x: Tensor, weights: Tensor, count: int, size: int, seed: int) -> Tensor:
        """Codebooks (count, size, S) from weighted k-means."""

    def encode(self, x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
        """Codes (n, M) int64 of ``x`` (n, D)."""

    def decode(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """Rows (n, D) of ``codes`` (n, M); differentiable in the codebooks."""

    def targets(self, x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        """What each codeword stands for, (n, M, S): the row less all its other codewords."""

    def sums(
        self, x: Tensor, weights: Tensor, codes: Tensor, codebooks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`solve` needs of rows with given codes, float64; of more rows, added up."""

    def solve(self, sums: tuple[Tensor, Tensor], codebooks: Tensor) -> Tensor:
        """Codebooks of least weighted squared error, near ``codebooks``; sums are changed."""

    def refit(self, x: Tensor, weights: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        """Codebooks of least weighted squared error for given codes."""
        return self.solve(self.sums(x, weights, codes, codebooks), codebooks)


def flat_codes(codes: Tensor, size: int) -> Tensor:
    """Codes (n, M) as positions among the M * size codewords of all codebooks."""
    return codes + torch.arange(codes.shape[1], device=codes.device) * size


def weighted_error(
    x: Tensor, weights: Tensor, codes: Tensor, codebooks: Tensor, quantizer: Quantizer
) -> Tensor:
    """Mean squared error of the rows ``x`` (n, D) by ``weights`` (n,): a scalar."""
    total = x.new_zeros(())
    for start in range(0, len(x), _PART_ROWS):
        part = slice(start, start + _PART_ROWS)
        difference = x[part] - quantizer.decode(codes[part], codebooks)
        total += weights[part] @ difference.square().sum(1)
    return total / weights.sum()


class ProductQuantizer(Quantizer):
    """A row is the concatenation of M codewords (Jegou et al., 2011)."""

    def start(self, x: Tensor, weights: Tensor, count: int, size: int, seed: int) -> Tensor:
        """See :class:`Quantizer`."""
        parts = x.view(len(x), count, -1)
        return torch.stack(
            [weighted_kmeans(parts[:, m], weights, size, seed + m) for m in range(count)]
        )

    def encode(self, x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
        """Nearest codeword of each part; ``beam`` has no use here."""
        parts = x.view(len(x), len(codebooks), -1)
        if _native(x):
            found = [_native_search(parts[:, m], book[None], 1) for m, book in enumerate(codebooks)]
            return torch.cat(found, dim=1)
        chunk = max(1, _work_bytes(x) // (codebooks.shape[1] * 4))
        codes = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
        for m, book in enumerate(codebooks):
            norms = book.square().sum(1)
            for i in range(0, len(x), chunk):
                part = parts[i : i + chunk, m]
                codes[i : i + chunk, m] = torch.addmm(norms, part, book.T, alpha=-2).argmin(1)
        return codes

    def decode(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """See :class:`Quantizer`."""
        return F.embedding(flat_codes(codes, codebooks.shape[1]), codebooks.flatten(0, 1)).flatten(
            1
        )

    def targets(self, x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        """See :class:`Quantizer`."""
        return x.view(len(x), len(codebooks), -1)

    def sums(
        self, x: Tensor, weights: Tensor, codes: Tensor, codebooks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mass (M * K,) and weighted sum (M * K, S) of each codeword."""
        count, size, width = codebooks.shape
        mass = torch.zeros(count * size, dtype=torch.float64, device=x.device)
        total = torch.zeros(count * size, width, dtype=torch.float64, device=x.device)
        for start in range(0, len(x), _PART_ROWS):
            part = slice(start, start + _PART_ROWS)
            flat, weight = flat_codes(codes[part], size), weights[part].double()
            rows = (x[part].double() * weight[:, None]).view(-1, count, width)
            for m in range(count):
                mass.index_add_(0, flat[:, m], weight)
                total.index_add_(0, flat[:, m], rows[:, m])
        return mass, total

    def solve(self, sums: tuple[Tensor, Tensor], codebooks: Tensor) -> Tensor:
        """Weighted means; an unused codeword stays."""
        mass, total = sums
        means = total / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
        used = (mass > 0)[:, None]
        return torch.where(used, means.float(), codebooks.flatten(0, 1)).view_as(codebooks)


class AdditiveQuantizer(Quantizer):
    """A row is the sum of M codewords (Babenko and Lempitsky, 2014).

    Codes are found by beam search, codebooks by weighted least squares over all of them at once
    (Martinez et al., LSQ++, 2018).
    """

    #: Pull of the least-squares solution to the codebooks before, relative to the mean mass of a
    #: codeword: settles what the data leave open (unused codewords, constants between codebooks).
    ridge = 1e-3

    def start(self, x: Tensor, weights: Tensor, count: int, size: int, seed: int) -> Tensor:
        """Greedy residual k-means: each codebook quantizes what the ones before left."""
        # In place and in pieces: arrays as large as ``x``, made and dropped again for each
        # codebook, leave holes in the heap that the next one does not fit into.
        residual, codebooks = x.clone(), []
        for m in range(count):
            book = weighted_kmeans(residual, weights, size, seed + m)
            codebooks.append(book)
            for part in residual.split(_PART_ROWS):
                part -= book[ProductQuantizer().encode(part, book[None], 1)[:, 0]]
        return torch.stack(codebooks)

    def encode(self, x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
        """Beam search over the codebooks in order, ``beam`` partial sums kept for each row.

        The C kernel keeps 32 at most, and of candidates that share a lane the two best.
        """
        if _native(x):
            return _native_search(x, codebooks, beam)
        if x.is_cuda and len(codebooks) == 1:
            return ProductQuantizer().encode(x, codebooks, beam)
        if _gpu_search is not None and x.is_cuda and _gpu_search.takes(x, codebooks, beam):
            return _gpu_search.search(x, codebooks, beam)
        size = codebooks.shape[1]
        gram = codebooks.flatten(0, 1) @ codebooks.flatten(0, 1).T
        # Largest are the distances of a row to all codewords, and those of its partial sums.
        chunk = max(1, _work_bytes(x) // (max(beam, len(codebooks)) * size * 4))
        codes = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
        for i in range(0, len(x), chunk):
            codes[i : i + chunk] = _beam_search(x[i : i + chunk], codebooks, gram, beam)
        return codes

    def decode(self, codes: Tensor, codebooks: Tensor) -> Tensor:
        """See :class:`Quantizer`."""
        flat = flat_codes(codes, codebooks.shape[1])
        return F.embedding_bag(flat, codebooks.flatten(0, 1), mode="sum")

    def targets(self, x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
        """See :class:`Quantizer`."""
        words = F.embedding(flat_codes(codes, codebooks.shape[1]), codebooks.flatten(0, 1))
        return (x - words.sum(1))[:, None] + words

    def sums(
        self, x: Tensor, weights: Tensor, codes: Tensor, codebooks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both sides of the normal equations, see :func:`_normal_equations`."""
        return _normal_equations(x, weights, codes, codebooks.shape[1])

    def solve(self, sums: tuple[Tensor, Tensor], codebooks: Tensor) -> Tensor:
        """Weighted least squares for all codebooks."""
        lower, right = sums
        # Only blocks on and below the diagonal are filled, which is all that cholesky reads.
        pull = self.ridge * lower.diagonal().mean()
        lower.diagonal().add_(pull)
        right += pull * codebooks.flatten(0, 1).double()
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(lower))
        return solution.float().view_as(codebooks)


def _normal_equations(
    x: Tensor, weights: Tensor, codes: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Lower triangle (M * size, M * size) and right side (M * size, D), in float64."""
    rows, count = codes.shape
    words = count * size
    normal = torch.zeros(words, words, dtype=torch.float64, device=x.device)
    right = torch.zeros(words, x.shape[1], dtype=torch.float64, device=x.device)
    if _native(x):
        given = codes.contiguous(), x.contiguous(), weights.float().contiguous()
        failed = cpu.kernel.normal(
            *(tensor.data_ptr() for tensor in given),
            rows,
            count,
            size,
            x.shape[1],
            normal.data_ptr(),
            right.data_ptr(),
            cpu.threads_for(rows, count * x.shape[1]),
        )
        if failed:
            raise IndexError(f"codes must be in [0, {size})")
        return normal, right
    flat = flat_codes(codes, size)
    for start in range(0, rows, _PART_ROWS):
        part = slice(start, start + _PART_ROWS)
        mass = weights[part].double()
        scaled = x[part].double() * mass[:, None]
        for m in range(count):
            right.index_add_(0, flat[part, m], scaled)
            for other in range(m + 1):
                place = flat[part, m] * words + flat[part, other]
                normal.view(-1).index_add_(0, place, mass)
    return normal, right


def _work_bytes(x: Tensor) -> int:
    return _WORK_BYTES if x.is_cpu else _DEVICE_WORK_BYTES


def _native(x: Tensor) -> bool:
    """Whether the C kernel takes rows like these."""
    return cpu.available() and x.is_cpu and x.dtype is torch.float32


def _native_search(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes (n, M) of ``x`` (n, D) by the C kernel: a beam search, see ``native/search.h``."""
    count, size, _ = codebooks.shape
    x, codebooks = x.detach(), codebooks.detach()
    words = codebooks.flatten(0, 1)
    # ||x - sum c||^2 is, but for ||x||^2, what words add alone, ||c||^2 - 2 x.c, and 2 c.c' for
    # each pair. A column of ones brings ||c||^2 into the product.
    scales = torch.cat([-2 * words, words.square().sum(1, keepdim=True)], dim=1).T
    cross = [words[: m * size] @ (2 * book).T for m, book in enumerate(codebooks)]
    gram = torch.cat([F.pad(part, (0, -size % _LANES)).flatten() for part in cross])
    codes = torch.empty(len(x), count, dtype=torch.int64)
    chunk = max(1, min(len(x), _WORK_BYTES // (count * size * 4)))
    room = x.new_empty(chunk, count * size)
    for i in range(0, len(x), chunk):
        part = x[i : i + chunk]
        extended = F.pad(part, (0, 1), value=1.0)
        alone = torch.mm(extended, scales, out=room[: len(part)])
        lengths = part.square().sum(1)
        failed = cpu.kernel.encode(
            alone.data_ptr(),
            lengths.data_ptr(),
            gram.data_ptr(),
            len(part),
            count,
            size,
            beam,
            codes[i:].data_ptr(),
            cpu.threads_for(len(part), count * size),
        )
        if failed:
            raise MemoryError("no memory to search for codes")
    return codes


def _beam_search(x: Tensor, codebooks: Tensor, gram: Tensor, beam: int) -> Tensor:
    """Codes (n, M) of ``x`` (n, D): the best of ``beam`` partial sums kept after each codebook."""
    count, size, _ = codebooks.shape
    rows = len(x)
    # ||x - sum c||^2 grows, when codeword k joins, by ||c_k||^2 - 2 x.c_k + 2 sum_j c_j.c_k.
    alone = gram.diagonal() - 2 * (x @ codebooks.flatten(0, 1).T)
    error, codes = alone[:, :size].topk(min(beam, size), dim=1, largest=False)
    codes = codes[:, :, None]
    for m in range(1, count):
        own = slice(m * size, (m + 1) * size)
        flat = flat_codes(codes.flatten(0, 1), size)
        cross = F.embedding_bag(flat, gram[: m * size, own].contiguous(), mode="sum")
        total = cross.view(rows, -1, size).mul_(2)
        total += error[:, :, None]
        total += alone[:, None, own]
        kept = 1 if m == count - 1 else min(beam, total.shape[1] * size)
        error, best = total.flatten(1).topk(kept, dim=1, largest=False)
        parent = (best // size)[:, :, None].expand(-1, -1, m)
        codes = torch.cat([codes.gather(1, parent), (best % size)[:, :, None]], dim=2)
    return codes[:, 0]


def quantizer_for(kind: str) -> Quantizer:
    """The quantizer of a code layout's kind."""
    return ProductQuantizer() if kind == "product" else AdditiveQuantizer()
