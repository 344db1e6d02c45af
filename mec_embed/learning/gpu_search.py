"""Beam search for additive codes by a Triton kernel, for rows on a GPU.

Importing this module needs ``triton``. It finds what the search in plain torch finds: the inputs
are the same, what each codeword adds alone and what each pair of them adds, and so are the
candidates and their order. A program is one warp, which needs no barriers, and takes one row; its
sums and candidates stay in registers, so that memory sees no more than the inputs. Of large
codebooks, a step finds the least total of each group of codewords first, and looks into the best
groups only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import bits_for
from ..ops import gpu

#: Bytes of what the codewords add to the rows of a launch, in float64 and in float32.
WORK_BYTES = 512 << 20
#: Codewords whose totals are looked at together.
GROUP = 32
#: Groups of all sums of a row, at most, whose least totals the registers of a program hold.
MOST_GROUPS = 1 << 10
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
def _extended(
    alone: tl.tensor,
    gram: tl.tensor,
    strings: tl.tensor,
    errors: tl.tensor,
    book: tl.tensor,
    own: tl.tensor,
    words: tl.tensor,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    STRINGS: tl.constexpr,
) -> tl.tensor:
    """Totals (BEAM, n) of sums with the codewords ``own`` of ``book``; infinite beyond it."""
    there, place = own < SIZE, book * SIZE + own
    totals = errors[:, None] + tl.load(alone + place, mask=there, other=float("inf"))
    for d in range(book):
        before = d * SIZE + _code(strings, d, BITS, STRINGS)
        totals += tl.load(gram + (before * words)[:, None] + place, mask=there, other=0)
    return totals


@triton.jit
def _best(keys: tl.tensor, wanted: tl.tensor, BEAM: tl.constexpr) -> tl.tensor:
    """The least ``wanted`` keys, ascending, and zeros up to (BEAM,)."""
    beam = tl.arange(0, BEAM)
    best = tl.full([BEAM], 0, tl.int64)
    for place in range(wanted):
        least = tl.reduce(keys, None, _least)
        best = tl.where(beam == place, least, best)
        keys = tl.where(keys == least, _NEVER, keys)
    return best


@triton.jit
def _strings_of(strings: tl.tensor, parent: tl.tensor, BEAM: tl.constexpr) -> tl.tensor:
    """The codes of the sums ``parent`` (BEAM,)."""
    taken = (parent[:, None] == tl.arange(0, BEAM)[None, :])[:, :, None]
    return tl.reduce(tl.where(taken, strings[None, :, :], 0), 1, _sum)


@triton.jit
def _errors_of(errors: tl.tensor, parent: tl.tensor, BEAM: tl.constexpr) -> tl.tensor:
    """The errors of the sums ``parent`` (BEAM,)."""
    taken = parent[:, None] == tl.arange(0, BEAM)[None, :]
    return tl.reduce(tl.where(taken, errors[None, :], 0.0), 1, _sum)


@gpu.kernel
def _search_kernel(
    alone: tl.tensor,
    gram: tl.tensor,
    codes: tl.tensor,
    books: tl.int32,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BEAM: tl.constexpr,
    BITS: tl.constexpr,
    STRINGS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    beam, string = tl.arange(0, BEAM), tl.arange(0, STRINGS)
    word, group = tl.arange(0, GROUP)[None, :], tl.arange(0, GROUPS)[None, :]
    words = books * SIZE
    width = GROUPS * GROUP
    each = 64 // BITS
    alone += row * words
    # Of no codewords there is one sum; the others are worse than any until they are filled.
    errors = tl.where(beam == 0, 0.0, float("inf"))
    strings = tl.full([BEAM, STRINGS], 0, tl.int64)
    for m in range(books):
        wanted = tl.where(m == books - 1, 1, BEAM)
        if GROUPS == 1:
            own = word + beam[:, None] * 0
            before = beam[:, None]
            there = own < SIZE
            totals = _extended(alone, gram, strings, errors, m, own, words, SIZE, BITS, STRINGS)
        else:
            # The best are in the groups whose least total is among the best: only these are
            # looked at one by one.
            lows = tl.full([BEAM, GROUPS], float("inf"), tl.float32)
            for number in range(GROUPS):
                own = number * GROUP + word
                totals = _extended(alone, gram, strings, errors, m, own, words, SIZE, BITS, STRINGS)
                low = tl.reduce(totals, 1, _least)
                lows = tl.where(group == number, low[:, None], lows)
            numbers = (beam[:, None] * GROUPS + group).to(tl.int64)
            chosen = (_best(_keys(lows, numbers), wanted, BEAM) & 0xFFFFFFFF).to(tl.int32)
            parent = chosen // GROUPS
            own = (chosen % GROUPS)[:, None] * GROUP + word
            before = parent[:, None]
            # Where one is wanted, the others are groups that nobody asked for.
            there = (own < SIZE) & (beam < wanted)[:, None]
            totals = _extended(
                alone,
                gram,
                _strings_of(strings, parent, BEAM),
                _errors_of(errors, parent, BEAM),
                m,
                own,
                words,
                SIZE,
                BITS,
                STRINGS,
            )
        keys = _keys(totals, (before * width + own).to(tl.int64))
        best = _best(tl.where(there, keys, _NEVER), wanted, BEAM)
        errors = _totals(best)
        chosen = (best & 0xFFFFFFFF).to(tl.int32)
        strings = _strings_of(strings, chosen // width, BEAM)
        code = (chosen % width).to(tl.int64) << ((m % each) * BITS)
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
        and beam * _groups(size) <= MOST_GROUPS
        and _strings(count, size) <= MOST_STRINGS
        and (x.is_cuda or gpu.INTERPRETED)
        and gpu._serves(x.device)
    )


def search(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes (n, M) of ``x`` (n, D), which :func:`takes`; see ``native/search.h``."""
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
    gpu._launch(
        _search_kernel,
        (rows, 1),
        alone,
        gram,
        codes,
        count,
        SIZE=size,
        GROUPS=_groups(size),
        GROUP=min(GROUP, 1 << bits_for(size)),
        BEAM=beam,
        BITS=bits_for(size),
        STRINGS=_strings(count, size),
        num_warps=1,
    )


def _groups(size: int) -> int:
    """Groups of a codebook, a power of two."""
    return max(1, (1 << bits_for(size)) // GROUP)


def _strings(count: int, size: int) -> int:
    """64-bit words for ``count`` codes, none of which is in two of them; a power of two."""
    return gpu._power(gpu._blocks(count, 64 // bits_for(size)))
