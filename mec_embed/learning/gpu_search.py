"""Beam search for additive codes by a Triton kernel, for rows on a GPU.

Importing this module needs ``triton``. It finds what ``native/encode.c`` finds: the inputs are the
same, what each codeword adds alone and what each pair of them adds, and so are the candidates and
their order. A program takes one row; its sums and all candidates of a step stay in registers, so
that memory sees no more than the inputs. A few numbers that belong to a row are not worth the
barriers of a larger group: programs of few codewords are one warp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import bits_for
from ..ops import gpu

#: Bytes of what the codewords add to the rows of a launch, in float64 and in float32.
WORK_BYTES = 256 << 20
#: Candidates of a step, at most, that the registers of a program hold.
MOST_CANDIDATES = 1 << 14
#: The same for each warp, at best, and warps of a program, at most.
WARP_CANDIDATES, MOST_WARPS = 512, 32
#: 64-bit words that hold the codes of a sum, at most.
MOST_STRINGS = 8
_NEVER = tl.constexpr((1 << 63) - 1)


@triton.jit
def _least(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return tl.minimum(one, other)


@triton.jit
def _sum(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return one + other


@triton.jit
def _keys(totals: tl.tensor, candidates: tl.tensor) -> tl.tensor:
    """Integers in the order of the totals, equal ones by the number of the candidate."""
    bits = totals.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | candidates


@triton.jit
def _totals(keys: tl.tensor) -> tl.tensor:
    """The totals that keys were made of."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _code(
    strings: tl.tensor, book: tl.tensor, BITS: tl.constexpr, STRINGS: tl.constexpr
) -> tl.tensor:
    """The codes (BEAM,) of the sums in codebook ``book``."""
    each = 64 // BITS
    own = tl.arange(0, STRINGS)[None, :] == book // each
    string = tl.reduce(tl.where(own, strings, 0), 1, _sum)
    return (string >> ((book % each) * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _search_kernel(
    alone: tl.tensor,
    gram: tl.tensor,
    codes: tl.tensor,
    books: tl.int32,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BEAM: tl.constexpr,
    BITS: tl.constexpr,
    STRINGS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    beam, word, string = tl.arange(0, BEAM), tl.arange(0, WIDTH), tl.arange(0, STRINGS)
    inside = word < SIZE
    candidates = (beam[:, None] * WIDTH + word[None, :]).to(tl.int64)
    words = books * SIZE
    each = 64 // BITS
    # Of no codewords there is one sum; the others are worse than any until they are filled.
    errors = tl.where(beam == 0, 0.0, float("inf"))
    strings = tl.full([BEAM, STRINGS], 0, tl.int64)
    for m in range(books):
        own = m * SIZE + word
        totals = errors[:, None] + tl.load(alone + row * words + own, mask=inside)[None, :]
        for d in range(m):
            before = d * SIZE + _code(strings, d, BITS, STRINGS)
            terms = gram + (before * words)[:, None] + own[None, :]
            totals += tl.load(terms, mask=inside[None, :])
        keys = tl.where(inside[None, :], _keys(totals, candidates), _NEVER)
        best = tl.full([BEAM], 0, tl.int64)
        wanted = tl.where(m == books - 1, 1, BEAM)
        for place in range(wanted):
            least = tl.reduce(keys, None, _least)
            best = tl.where(beam == place, least, best)
            keys = tl.where(keys == least, _NEVER, keys)
        errors = _totals(best)
        chosen = best & 0xFFFFFFFF
        parent = chosen // WIDTH
        taken = (parent[:, None] == beam[None, :])[:, :, None]
        strings = tl.reduce(tl.where(taken, strings[None, :, :], 0), 1, _sum)
        code = (chosen % WIDTH) << ((m % each) * BITS)
        strings |= tl.where(string[None, :] == m // each, code[:, None], 0)
    for m in range(books):
        code = _code(strings, m, BITS, STRINGS)
        tl.store(codes + row * books + m + beam * 0, code, mask=beam == 0)


def takes(x: Tensor, codebooks: Tensor, beam: int) -> bool:
    """Whether the kernel can search for the codes of rows like these."""
    count, size, _ = codebooks.shape
    return (
        x.dtype is torch.float32
        and codebooks.dtype is torch.float32
        and beam & (beam - 1) == 0
        and beam * _width(size) <= MOST_CANDIDATES
        and _strings(count, size) <= MOST_STRINGS
        and (x.is_cuda or gpu.INTERPRETED)
        and gpu._serves(x.device)
    )


def search(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes (n, M) of ``x`` (n, D), which :func:`takes`; see ``native/encode.c``."""
    count, size, _ = codebooks.shape
    # In float64, as a program may have allowed TF32 for products of float32.
    x, words = x.detach(), codebooks.detach().flatten(0, 1).double()
    norms, gram = words.square().sum(1), (words @ (2 * words).T).float()
    codes = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    chunk = max(1, WORK_BYTES // (12 * len(words)))
    for part, found in zip(x.split(chunk), codes.split(chunk), strict=True):
        alone = torch.addmm(norms, part.double(), words.T, alpha=-2).float()
        launch(alone, gram, found, size, beam)
    return codes


def launch(alone: Tensor, gram: Tensor, codes: Tensor, size: int, beam: int) -> None:
    """Fill ``codes`` (n, M) int64.

    Args:
        alone: (n, M * size) what each codeword adds to the error of a row.
        gram: (M * size, M * size) what each pair of codewords adds to that of any.
        codes: to be filled.
        size: codewords of a codebook.
        beam: sums that are kept, a power of two.
    """
    rows, count = codes.shape
    if not rows:
        return
    width = _width(size)
    gpu._launch(
        _search_kernel,
        (rows, 1),
        alone,
        gram,
        codes,
        count,
        SIZE=size,
        WIDTH=width,
        BEAM=beam,
        BITS=bits_for(size),
        STRINGS=_strings(count, size),
        num_warps=max(1, min(MOST_WARPS, beam * width // WARP_CANDIDATES)),
    )


def _width(size: int) -> int:
    """The power of two that holds ``size`` codewords."""
    return 1 << bits_for(size)


def _strings(count: int, size: int) -> int:
    """64-bit words for ``count`` codes, none of which is in two of them; a power of two."""
    needed = -(-count // (64 // bits_for(size)))
    return 1 << (needed - 1).bit_length()
