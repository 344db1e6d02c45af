"""The operators by Triton kernels, for tensors on a GPU; the rest goes to the reference.

Importing this module needs ``triton`` 3.2. The kernels take float32, float16, bfloat16 and int8
codebooks and sum in float32. They never make the host wait, and so can be captured in a CUDA graph,
after one call that compiles them. Ids are not checked for their range, as the reference does not
off the CPU: one out of range decodes as the nearest row of the table, and a damaged code as the
last codeword, so that no memory outside the table is read.

A line is what is contiguous in the output: a row of additive codes, or one codeword of a row of
product codes (``PARTS`` of them in a row). Each thread decodes chunks of a line.
Offsets are int64 throughout: a table may have more than 2**31 bits, bytes or entries.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import SCALE_DTYPE, packed_bytes
from . import cpu, driver, fast, reference
from .schema import count_bags, owners, serve

#: Entries of rows that one program decodes, and its warps: a chunk of four entries of a line for
#: each thread, or two chunks of two.
ROW_ENTRIES, ROW_WARPS = 512, 4
#: Chunks of a line of which one program adds up gradients, and its warps.
CHUNKS, CHUNK_WARPS = 256, 4
#: The same for bags: all bags of a program take as long as the longest, so it is one warp's.
BAG_CHUNKS, BAG_CHUNK_WARPS = 32, 1
#: Bags of a program that counts codewords, by how many there are at least: the more, the less each
#: pays for reading the codebooks, and the fewer programs there are to run side by side.
COUNTED_BAGS = ((1 << 15, 128), (1 << 14, 64), (1 << 12, 32), (0, 16))
#: Its warps, and the ids of a bag that it reads in one turn of its loop.
COUNTED_WARPS, COUNTED_UNROLL = 4, 4
#: Codebooks (as a power of two) times words of counts that such a program has room for.
MOST_COUNTED = 128
#: Entries of a tile of lines and columns, and its warps.
TILE, TILE_WARPS = 1024, 4
#: Adding to one address happens one by one, so the gradient of a codeword has one copy for so many
#: lookups of it.
COPY_LOOKUPS = 1024
MOST_COPIES = 16
#: Bits of a row that are read at once: from any bit of a byte, they lie in 8 bytes.
_MOST_BITS = 57
#: Entries of codewords that are read from which on int8 codebooks are made float32 first.
UNPACK_ENTRIES = 1 << 25
#: More lookups than a call can have.
_ANY_LOOKUPS = 1 << 40
_ID_DTYPES = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Numbers of bfloat16 (8 bits of mantissa) that add up to any of a dtype; with a scale in bfloat16,
#: an int8 has 15 bits.
_TERMS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1, torch.int8: 2}
#: Annotations of whole numbers.
_NUMBERS = ("tl.int32", "tl.int64")
#: Tensors of kernels that may start at any address.
_ANYWHERE = ["ids"]
#: What the kernels compile for, and by.
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 2)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _LEAST_TRITON:
    raise ImportError(f"Triton {triton.__version__} cannot compile the kernels; 3.2 is the least")


def kernel(function: Any) -> Any:
    """What Triton compiles; once for all values of the numbers that it takes.

    Triton would compile anew for a number that is 1 or a multiple of 16, such as of a last batch,
    and for ids that start elsewhere, such as one column of a batch.
    """
    numbers = [name for name, kind in function.__annotations__.items() if kind in _NUMBERS]
    return triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=_ANYWHERE)


@triton.jit
def _read_ids(ids: tl.tensor, place: tl.tensor, inside: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Ids, int64, as rows that the table has; row 0 where there is none to read."""
    found = tl.load(ids + place, mask=inside, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(found, 0), rows - 1)


@triton.jit
def _read_trained(
    ids: tl.tensor, place: tl.tensor, inside: tl.tensor, rows: tl.tensor, padding: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Ids as :func:`_read_ids` has them, and whether each passes a gradient."""
    row = _read_ids(ids, place, inside, rows)
    given = tl.load(ids + place, mask=inside, other=0).to(tl.int64) != padding
    return row, inside & given & (row != padding)


@triton.jit
def _stream(
    codes: tl.tensor,
    start: tl.tensor,
    used: tl.tensor,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """``BITS`` bits, 57 at most, of the codes from bit ``start`` on, lowest first; more may follow.

    From there on ``used`` bits are the row's: whole words that hold one of them may be loaded, as
    the padding of the stream is as long.
    """
    if not ALIGNED:
        place = codes + (start >> 3)
        found = tl.load(place).to(tl.uint64)
        for number in tl.static_range(1, (BITS + 14) // 8):
            found |= tl.load(place + number).to(tl.uint64) << (8 * number)
        found = found >> (start & 7).to(tl.uint64)
    elif BITS <= 32:
        words = codes.to(tl.pointer_type(tl.uint32)) + (start >> 5)
        first = (start & 31).to(tl.int32)
        high = tl.load(words + 1).to(tl.uint64)
        both = (high << 32) | tl.load(words).to(tl.uint64)
        found = (both >> first.to(tl.uint64)).to(tl.uint32)
    else:
        words = codes.to(tl.pointer_type(tl.uint64)) + (start >> 6)
        first = (start & 63).to(tl.int32)
        high = tl.load(words + 1, mask=first + used > 64, other=0)
        # In two steps, as a shift by all 64 bits is not defined.
        high = (high << 1) << (63 - first).to(tl.uint64)
        found = (tl.load(words) >> first.to(tl.uint64)) | high
    return found


@triton.jit
def _code(
    codes: tl.tensor,
    ids: tl.tensor,
    book: tl.tensor,
    size: tl.tensor,
    BOOKS: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """Codes of the rows ``ids`` in codebook ``book``, int32; below ``size`` even if damaged."""
    start = (ids * BOOKS + book) * BITS
    found = _stream(codes, start, BITS, BITS, ALIGNED)
    code = (found & ((1 << BITS) - 1)).to(tl.int32)
    return code if EXACT else tl.minimum(code, size - 1).to(tl.int32)


@kernel
def _floats_kernel(
    books: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    count: tl.int64,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < count
    value = tl.load(books + entry, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + entry // WIDTH, mask=inside, other=0).to(tl.float32)
    tl.store(out + entry, value * scale, mask=inside)


@triton.jit
def _decode(
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    ids: tl.tensor,
    part: tl.tensor,
    column: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Chunks (CHUNKS, VECTOR) of the rows ``ids``, float32; ``GROUP`` codes are read at once."""
    total = tl.full([CHUNKS, VECTOR], 0, tl.float32)
    if EXACT:
        # Known to the compiler, and still int64: codebooks may have more than 2**31 entries in all.
        size = size * 0 + (1 << BITS)
    for first in range(0, SUMMED, GROUP):
        if PARTS == 1 and BITS > 0:
            start = (ids * SUMMED + first) * BITS
            found = _stream(codes, start, (SUMMED - first) * BITS, GROUP * BITS, ALIGNED)
        for number in tl.static_range(GROUP):
            book = 0
            if BITS == 0:
                word = ids
            elif PARTS > 1:
                code = _code(codes, ids, part, size, PARTS, BITS, ALIGNED, EXACT)
                word = part * size + code
            else:
                word = ((found >> (number * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
                if not EXACT:
                    word = tl.minimum(word, size - 1).to(tl.int32)
                book = first + number
                if SUMMED % GROUP:
                    # Beyond the last codebook is the zero that is added below.
                    book = tl.minimum(book, SUMMED - 1)
            # Offsets within one codebook are below 2**31, see _takes_books().
            entries = (books + book * size * WIDTH) + (word * WIDTH + column)[:, None]
            entries += tl.arange(0, VECTOR)[None, :]
            share = 1.0
            if scales is not None:
                share = tl.load(scales + book * size + word).to(tl.float32)[:, None]
            if SUMMED % GROUP:
                share = tl.where(first + number < SUMMED, share, 0.0)
            total += tl.load(entries).to(tl.float32) * share
    return total


@kernel
def _rows_kernel(
    ids: tl.tensor,
    out: tl.tensor,
    stride: tl.int64,
    count: tl.int64,
    zero_id: tl.int64,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    rows: tl.int64,
    size: tl.int64,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Decode ``count`` ids, ``stride`` apart; what :class:`Lookups` gives comes first."""
    line, column = _chunks(WIDTH, CHUNKS, VECTOR)
    inside = line < count * PARTS
    row = _read_ids(ids, line // PARTS * stride, inside, rows)
    tile = _decode(
        codes,
        books,
        scales,
        row,
        line % PARTS,
        column,
        size,
        PARTS,
        SUMMED,
        BITS,
        GROUP,
        ALIGNED,
        EXACT,
        WIDTH,
        CHUNKS,
        VECTOR,
    )
    wanted = (row != zero_id)[:, None]
    place = out + (line * WIDTH + column)[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(place, tl.where(wanted, tile, 0), mask=inside[:, None])


@triton.jit
def _in_runs(
    row: tl.tensor, starts: tl.tensor, before: tl.tensor, runs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """As :func:`_place`, of a map by runs."""
    run = row * 0 - 1
    for number in range(runs):
        run += (row >= tl.load(starts + number)).to(tl.int64)
    run = tl.maximum(run, 0)
    known = run % 2 == 0
    earlier = tl.load(before + run)
    return known, row - tl.where(known, tl.load(starts + run) - earlier, earlier)


@triton.jit
def _in_bitmap(
    row: tl.tensor, before: tl.tensor, bitmap: tl.tensor, BLOCK_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """As :func:`_place`, of a map by bitmap."""
    block = row // BLOCK_ROWS
    within = (row % BLOCK_ROWS).to(tl.int32)
    own = bitmap + block * (BLOCK_ROWS // 8)
    words = own.to(tl.pointer_type(tl.uint64))
    one = (within * 0 + 1).to(tl.uint64)
    rank = tl.load(before + block).to(tl.int64)
    for number in tl.static_range(BLOCK_ROWS // 64):
        kept = tl.minimum(tl.maximum(within - number * 64, 0), 64)
        half = kept // 2
        # In two steps, as a shift by all 64 bits is not defined.
        below = ((one << half.to(tl.uint64)) << (kept - half).to(tl.uint64)) - 1
        word = tl.load(words + number) & below
        # The number of ones: in pairs of bits, then in fours, in bytes, and in the word.
        word -= (word >> 1) & 0x5555555555555555
        word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
        rank += ((word * 0x0101010101010101) >> 56).to(tl.int64)
    known = ((tl.load(own + within // 8).to(tl.int32) >> (within % 8)) & 1) != 0
    return known, tl.where(known, rank, row - rank)


@triton.jit
def _place(
    row: tl.tensor,
    starts: tl.tensor,
    before: tl.tensor,
    bitmap: tl.tensor,
    runs: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Whether rows are popular, and their places in their tiers; by the map that there is."""
    if bitmap is None:
        known, own = _in_runs(row, starts, before, runs)
    else:
        known, own = _in_bitmap(row, before, bitmap, BLOCK_ROWS)
    return known, tl.maximum(own, 0)


@kernel
def _tiered_kernel(
    ids: tl.tensor,
    out: tl.tensor,
    stride: tl.int64,
    count: tl.int64,
    zero_id: tl.int64,
    starts: tl.tensor,
    before: tl.tensor,
    bitmap: tl.tensor,
    head_codes: tl.tensor,
    head_books: tl.tensor,
    head_scales: tl.tensor,
    tail_codes: tl.tensor,
    tail_books: tl.tensor,
    tail_scales: tl.tensor,
    rows: tl.int64,
    runs: tl.int64,
    head_rows: tl.int64,
    head_size: tl.int64,
    tail_rows: tl.int64,
    tail_size: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    HEAD_PARTS: tl.constexpr,
    HEAD_SUMMED: tl.constexpr,
    HEAD_BITS: tl.constexpr,
    HEAD_GROUP: tl.constexpr,
    HEAD_ALIGNED: tl.constexpr,
    HEAD_EXACT: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TAIL_PARTS: tl.constexpr,
    TAIL_SUMMED: tl.constexpr,
    TAIL_BITS: tl.constexpr,
    TAIL_GROUP: tl.constexpr,
    TAIL_ALIGNED: tl.constexpr,
    TAIL_EXACT: tl.constexpr,
    TAIL_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """As :func:`_rows_kernel`."""
    line, column = _chunks(DIM, CHUNKS, VECTOR)
    inside = line < count
    row = _read_ids(ids, line * stride, inside, rows)
    known, own = _place(row, starts, before, bitmap, runs, BLOCK_ROWS)
    # Both tiers are decoded, the one that an id is not of at its first row, which is cached.
    one = _decode(
        head_codes,
        head_books,
        head_scales,
        tl.where(known, tl.minimum(own, head_rows - 1), 0),
        column // HEAD_WIDTH,
        column % HEAD_WIDTH,
        head_size,
        HEAD_PARTS,
        HEAD_SUMMED,
        HEAD_BITS,
        HEAD_GROUP,
        HEAD_ALIGNED,
        HEAD_EXACT,
        HEAD_WIDTH,
        CHUNKS,
        VECTOR,
    )
    other = _decode(
        tail_codes,
        tail_books,
        tail_scales,
        tl.where(known, 0, tl.minimum(own, tail_rows - 1)),
        column // TAIL_WIDTH,
        column % TAIL_WIDTH,
        tail_size,
        TAIL_PARTS,
        TAIL_SUMMED,
        TAIL_BITS,
        TAIL_GROUP,
        TAIL_ALIGNED,
        TAIL_EXACT,
        TAIL_WIDTH,
        CHUNKS,
        VECTOR,
    )
    wanted = (row != zero_id)[:, None]
    tile = tl.where(known[:, None], one, other)
    entries = out + (line * DIM + column)[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(entries, tl.where(wanted, tile, 0), mask=inside[:, None])


@triton.jit
def _chunks(
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """This program's chunks: the line of each, int64, and its first column there, int32."""
    IN_LINE: tl.constexpr = WIDTH // VECTOR
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    line = first // IN_LINE
    number = (first - line * IN_LINE).to(tl.int32) + tl.arange(0, CHUNKS)
    return line + number // IN_LINE, number % IN_LINE * VECTOR


@triton.jit
def _larger(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return tl.maximum(one, other)


@triton.jit
def _plus(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return one + other


@triton.jit
def _bounds(
    bag: tl.tensor,
    offsets: tl.tensor,
    bags: tl.tensor,
    length: tl.tensor,
    count: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the ids of bags start and end, int64; both within the ids, also for wrong offsets."""
    inside = bag < bags
    if offsets is None:
        start = bag * length
        end = start + length
    else:
        # The last bag takes all that is left, also where an offset after it says otherwise.
        start = tl.load(offsets + bag, mask=inside, other=0).to(tl.int64)
        end = tl.load(offsets + bag + 1, mask=bag + 1 < bags, other=0).to(tl.int64)
        end = tl.where(bag + 1 < bags, end, count)
    return tl.maximum(start, 0), tl.where(inside, tl.minimum(end, count), 0)


@kernel
def _bags_kernel(
    ids: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    bags: tl.int64,
    length: tl.int64,
    count: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    padding: tl.int64,
    MEAN: tl.constexpr,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    line, column = _chunks(WIDTH, CHUNKS, VECTOR)
    bag, part = line // PARTS, line % PARTS
    start, end = _bounds(bag, offsets, bags, length, count)
    total = tl.full([CHUNKS, VECTOR], 0, tl.float32)
    members = tl.full([CHUNKS], 0, tl.float32)
    for step in range(tl.reduce(end - start, 0, _larger)):
        member = start + step
        row = _read_ids(ids, member, member < end, rows)
        wanted = (member < end) & (row != padding)
        tile = _decode(
            codes,
            books,
            scales,
            row,
            part,
            column,
            size,
            PARTS,
            SUMMED,
            BITS,
            GROUP,
            ALIGNED,
            EXACT,
            WIDTH,
            CHUNKS,
            VECTOR,
        )
        if weights is not None:
            tile *= tl.load(weights + member, mask=wanted, other=0).to(tl.float32)[:, None]
        total += tl.where(wanted[:, None], tile, 0)
        members += wanted.to(tl.float32)
    if MEAN:
        total /= tl.maximum(members, 1.0)[:, None]
    place = out + (line * WIDTH + column)[:, None] + tl.arange(0, VECTOR)[None, :]
    tl.store(place, total, mask=(bag < bags)[:, None])


@triton.jit
def _add_product(total: tl.tensor, one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return tl.dot(one, other, total)


@triton.jit
def _joined(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    """Two (n, m) as (n, 2 m), by turns."""
    return tl.reshape(tl.join(one, other), [one.shape[0], 2 * one.shape[1]])


@kernel
def _counted_bags_kernel(
    ids: tl.tensor,
    offsets: tl.tensor,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    bags: tl.int64,
    length: tl.int64,
    count: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    padding: tl.int64,
    MEAN: tl.constexpr,
    BOOKS: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Bags by counting how often each codeword occurs in a bag: counts times codebooks.

    A bag reads its codes only; codewords are read once for all bags of a program. Counts are bytes,
    four of them in each of the ``WORDS`` words of a codebook, so they are used up every 255 ids.
    They are exact in bfloat16, and codewords are cut into ``TERMS`` numbers that are.
    """
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = _bounds(bag, offsets, bags, length, count)
    longest = tl.reduce(end - start, 0, _larger)
    slot = tl.arange(0, SLOTS)[None, :]
    used = slot < BOOKS
    flat = tl.arange(0, SLOTS * WORDS)
    total = tl.full([BAGS, COLUMNS], 0, tl.float32)
    members = tl.full([BAGS], 0, tl.float32)
    for first in range(0, longest, 255):
        none = tl.full([BAGS, SLOTS], 0, tl.uint32)
        c0, c1, c2, c3, c4, c5, c6, c7 = none, none, none, none, none, none, none, none
        # Unrolled, so that several ids' codes are on their way at once.
        for step in tl.range(first, tl.minimum(first + 255, longest), loop_unroll_factor=UNROLL):
            member = start + step
            row = _read_ids(ids, member, member < end, rows)
            wanted = (member < end) & (row != padding)
            members += wanted.to(tl.float32)
            book = tl.where(used, slot, 0).to(tl.int64)
            code = _code(codes, row[:, None], book, size, BOOKS, BITS, ALIGNED, EXACT)
            one = tl.where(wanted[:, None] & used, 1, 0).to(tl.uint32)
            one = one << ((code & 3) * 8).to(tl.uint32)
            word = code >> 2
            c0 += tl.where(word == 0, one, 0)
            if WORDS > 1:
                c1 += tl.where(word == 1, one, 0)
            if WORDS > 2:
                c2 += tl.where(word == 2, one, 0)
                c3 += tl.where(word == 3, one, 0)
            if WORDS > 4:
                c4 += tl.where(word == 4, one, 0)
                c5 += tl.where(word == 5, one, 0)
                c6 += tl.where(word == 6, one, 0)
                c7 += tl.where(word == 7, one, 0)
        # In the order of the words: the outermost join is of their lowest bit.
        if WORDS == 1:
            counts = c0
        elif WORDS == 2:
            counts = _joined(c0, c1)
        elif WORDS == 4:
            counts = _joined(_joined(c0, c2), _joined(c1, c3))
        else:
            even = _joined(_joined(c0, c4), _joined(c2, c6))
            counts = _joined(even, _joined(_joined(c1, c5), _joined(c3, c7)))
        # No static_range: the compiler would load all codewords first, and run out of registers.
        for byte in range(4):
            key = flat % WORDS * 4 + byte
            known = (flat // WORDS < BOOKS) & (key < size)
            word = (flat // WORDS).to(tl.int64) * size + key
            entries = books + (word * WIDTH)[:, None] + columns[None, :]
            mask = known[:, None] & (columns < WIDTH)[None, :]
            value = tl.load(entries, mask=mask, other=0).to(tl.float32)
            if scales is not None:
                value *= tl.load(scales + word, mask=known, other=0).to(tl.float32)[:, None]
            times = ((counts >> byte * 8) & 255).to(tl.float32).to(tl.bfloat16)
            for _ in tl.static_range(TERMS):
                term = value.to(tl.bfloat16)
                total = _add_product(total, times, term)
                value -= term.to(tl.float32)
    if MEAN:
        total /= tl.maximum(members, 1.0)[:, None]
    place = out + (bag * WIDTH)[:, None] + columns[None, :]
    tl.store(place, total, mask=(bag < bags)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _add(
    tile: tl.tensor,
    codes: tl.tensor,
    total: tl.tensor,
    row: tl.tensor,
    part: tl.tensor,
    place: tl.tensor,
    wanted: tl.tensor,
    size: tl.tensor,
    copies: tl.tensor,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Add gradients (CHUNKS, VECTOR) of rows to those of their codewords, at ``place`` there."""
    first = tl.program_id(0) % copies * (PARTS * SUMMED) * size
    for number in range(SUMMED):
        word = first + row
        if BITS > 0:
            book = part + number
            code = _code(codes, row, book, size, PARTS * SUMMED, BITS, ALIGNED, EXACT)
            word = first + book * size + code
        # Relaxed: nobody reads the sums before the kernel ends.
        tl.atomic_add(total + (word * WIDTH)[:, None] + place, tile, mask=wanted, sem="relaxed")


@kernel
def _add_kernel(
    grad: tl.tensor,
    owner: tl.tensor,
    share: tl.tensor,
    ids: tl.tensor,
    codes: tl.tensor,
    total: tl.tensor,
    stride: tl.int64,
    count: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    padding: tl.int64,
    copies: tl.int64,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    line, column = _chunks(WIDTH, CHUNKS, VECTOR)
    number, part = line // PARTS, line % PARTS
    inside = number < count
    row, wanted = _read_trained(ids, number * stride, inside, rows, padding)
    wanted = wanted[:, None]
    place = column[:, None] + tl.arange(0, VECTOR)[None, :]
    source = line
    if owner is not None:
        source = tl.load(owner + number, mask=inside, other=0) * PARTS + part
    entries = grad + (source * WIDTH)[:, None] + place
    tile = tl.load(entries, mask=wanted, other=0).to(tl.float32)
    if share is not None:
        tile *= tl.load(share + number, mask=inside, other=0).to(tl.float32)[:, None]
    _add(
        tile,
        codes,
        total,
        row,
        part,
        place,
        wanted,
        size,
        copies,
        PARTS,
        SUMMED,
        BITS,
        ALIGNED,
        EXACT,
        WIDTH,
    )


@kernel
def _add_tiered_kernel(
    grad: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    before: tl.tensor,
    bitmap: tl.tensor,
    head_codes: tl.tensor,
    tail_codes: tl.tensor,
    head_total: tl.tensor,
    tail_total: tl.tensor,
    stride: tl.int64,
    count: tl.int64,
    padding: tl.int64,
    head_copies: tl.int64,
    tail_copies: tl.int64,
    rows: tl.int64,
    runs: tl.int64,
    head_rows: tl.int64,
    head_size: tl.int64,
    tail_rows: tl.int64,
    tail_size: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    HEAD_PARTS: tl.constexpr,
    HEAD_SUMMED: tl.constexpr,
    HEAD_BITS: tl.constexpr,
    HEAD_ALIGNED: tl.constexpr,
    HEAD_EXACT: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TAIL_PARTS: tl.constexpr,
    TAIL_SUMMED: tl.constexpr,
    TAIL_BITS: tl.constexpr,
    TAIL_ALIGNED: tl.constexpr,
    TAIL_EXACT: tl.constexpr,
    TAIL_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    line, column = _chunks(DIM, CHUNKS, VECTOR)
    inside = line < count
    row, wanted = _read_trained(ids, line * stride, inside, rows, padding)
    known, own = _place(row, starts, before, bitmap, runs, BLOCK_ROWS)
    vector = tl.arange(0, VECTOR)[None, :]
    entries = grad + (line * DIM + column)[:, None] + vector
    tile = tl.load(entries, mask=wanted[:, None], other=0).to(tl.float32)
    _add(
        tile,
        head_codes,
        head_total,
        tl.where(known, tl.minimum(own, head_rows - 1), 0),
        column // HEAD_WIDTH,
        (column % HEAD_WIDTH)[:, None] + vector,
        (wanted & known)[:, None],
        head_size,
        head_copies,
        HEAD_PARTS,
        HEAD_SUMMED,
        HEAD_BITS,
        HEAD_ALIGNED,
        HEAD_EXACT,
        HEAD_WIDTH,
    )
    _add(
        tile,
        tail_codes,
        tail_total,
        tl.where(known, 0, tl.minimum(own, tail_rows - 1)),
        column // TAIL_WIDTH,
        (column % TAIL_WIDTH)[:, None] + vector,
        (wanted & ~known)[:, None],
        tail_size,
        tail_copies,
        TAIL_PARTS,
        TAIL_SUMMED,
        TAIL_BITS,
        TAIL_ALIGNED,
        TAIL_EXACT,
        TAIL_WIDTH,
    )


@kernel
def _keys_kernel(
    ids: tl.tensor,
    codes: tl.tensor,
    keys: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    padding: tl.int64,
    BOOKS: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    book = tl.program_id(1).to(tl.int64)
    inside = place < count
    row, wanted = _read_trained(ids, place, inside, rows, padding)
    code = _code(codes, row, book, size, BOOKS, BITS, ALIGNED, EXACT).to(tl.int64)
    # What passes no gradient sorts behind all codewords.
    code = tl.where(wanted, code, size)
    tl.store(keys + book * count + place, code, mask=inside)


@kernel
def _segments_kernel(
    grad: tl.tensor,
    owner: tl.tensor,
    share: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    out: tl.tensor,
    count: tl.int64,
    size: tl.int64,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    word = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    book = word // size
    # Each codebook has one bound more than codewords.
    start = tl.load(bounds + word + book)
    end = tl.load(bounds + word + book + 1)
    total = tl.full([LINES, COLUMNS], 0, tl.float32)
    for first in range(start, end, LINES):
        place = first + tl.arange(0, LINES)
        inside = place < end
        number = tl.load(order + book * count + place, mask=inside, other=0)
        source = number
        if owner is not None:
            source = tl.load(owner + number, mask=inside, other=0)
        entries = grad + ((source * PARTS + book % PARTS) * WIDTH)[:, None] + columns[None, :]
        mask = inside[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(entries, mask=mask, other=0).to(tl.float32)
        if share is not None:
            tile *= tl.load(share + number, mask=inside, other=0).to(tl.float32)[:, None]
        total += tile
    tl.store(out + word * WIDTH + columns, tl.reduce(total, 0, _plus), mask=columns < WIDTH)


@kernel
def _places_kernel(
    ids: tl.tensor,
    starts: tl.tensor,
    before: tl.tensor,
    bitmap: tl.tensor,
    popular: tl.tensor,
    place: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    runs: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = line < count
    row = _read_ids(ids, line, inside, rows)
    known, own = _place(row, starts, before, bitmap, runs, BLOCK_ROWS)
    tl.store(popular + line, known, mask=inside)
    tl.store(place + line, own, mask=inside)


#: Whether Triton was imported with ``TRITON_INTERPRET=1``: the kernels then run on the CPU, slowly.
INTERPRETED = not isinstance(_rows_kernel, triton.JITFunction)


@functools.cache
def _serves(device: torch.device) -> bool:
    """Whether Triton can compile for ``device``; it needs a C compiler for the code around."""
    if INTERPRETED:
        return True
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))


def available() -> bool:
    """Whether there is a GPU that these kernels can serve."""
    return torch.cuda.is_available() and _serves(torch.device("cuda", torch.cuda.current_device()))


class _Launcher:
    """A kernel, for constants and a device, and what was compiled of it.

    Triton takes longer to find out what it has compiled than a small kernel takes to run.
    """

    def __init__(self, function: Any, device: torch.device, constants: tuple[tuple[str, int], ...]):
        self.function, self.constants = function, dict(constants)
        self.index = device.index if device.type == "cuda" else None
        #: As :mod:`mec_embed.ops.driver` gives them.
        self.compiled: list[driver.Compiled] = []

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> driver.Compiled | None:
        """Run the kernel on its device, which need not be the current one.

        Returns:
            What ran; None if Triton alone can run it.
        """
        x, y = (*grid, 1)[:2]
        for known in self.compiled:
            if cpu.kernel.launch(*known, x, y, *arguments):
                return known
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self(grid, *arguments)
        found = self.function[grid](*arguments, **self.constants)
        # The interpreter gives nothing.
        names = self.function.arg_names
        compiled = found and driver.compiled(found, self.index, arguments, names, _ANYWHERE)
        if compiled is not None and compiled not in self.compiled:
            self.compiled.append(compiled)
        return compiled


@functools.cache
def _launcher(
    function: Any, device: torch.device, constants: tuple[tuple[str, int], ...]
) -> _Launcher:
    return _Launcher(function, device, constants)


def _launch(function: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> None:
    """Run a kernel on the device of its tensors."""
    _launcher(function, arguments[0].device, tuple(constants.items()))(grid, *arguments)


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def _tile(width: int) -> dict[str, int]:
    """Lines and columns of a tile: whole codewords if they are no longer than it."""
    columns = min(_power(width), TILE)
    return {"LINES": TILE // columns, "COLUMNS": columns, "num_warps": TILE_WARPS}


def _blocks(total: int, block: int) -> int:
    return -(-total // block)


def _vector(*widths: int) -> int:
    """Entries of a chunk of lines of these widths."""
    return math.gcd(*widths, 4)


def _spaced(ids: Tensor) -> tuple[Tensor, int]:
    """Ids that are evenly spaced, and how many items apart."""
    if ids.dim() == 1 and ids.stride(0) > 0:
        return ids, ids.stride(0)
    return ids.contiguous(), 1


class _Shape(NamedTuple):
    """How the codes of a table are read."""

    num_embeddings: int
    embedding_dim: int
    bits: int
    books: int
    size: int
    width: int

    @property
    def rows(self) -> int:
        return self.num_embeddings if self.bits else self.size

    @property
    def parts(self) -> int:
        """Codewords in a row, one after the other."""
        return 1 if self.width == self.embedding_dim else self.books

    def code_constants(self, aligned: int) -> dict[str, int]:
        """What kernels are compiled for, to read a code."""
        return {"BITS": self.bits, "ALIGNED": aligned, "EXACT": int(self.size == 1 << self.bits)}

    def row_constants(self, aligned: int) -> dict[str, int]:
        """What kernels are compiled for, to decode a row."""
        summed = self.books // self.parts
        # Codes of a row that are read at once: as few times as possible, and alike.
        most = max(1, _MOST_BITS // max(1, self.bits))
        return {
            "PARTS": self.parts,
            "SUMMED": summed,
            "WIDTH": self.width,
            **self.code_constants(aligned),
            "GROUP": _blocks(summed, _blocks(summed, most)),
        }


@functools.cache
def _least_bytes(shape: _Shape) -> int | None:
    """Bytes that the codes of a table of this shape have at least; None if there is none."""
    whole = shape.width * shape.parts == shape.embedding_dim
    if shape.rows <= 0 or not whole or not (shape.bits or shape.books == 1):
        return None
    return packed_bytes(shape.num_embeddings, shape.bits * shape.books) if shape.bits else 0


class _Table(NamedTuple):
    """The codes of a table, and how they are read."""

    codes: Tensor
    shape: _Shape

    @staticmethod
    def of(codes: Tensor, *numbers: int) -> _Table:
        """Of codes and what a :class:`_Shape` holds."""
        return _Table(codes, _Shape(*numbers))

    @property
    def aligned(self) -> int:
        """1 where the codes may be read as words of 8 bytes."""
        return int(self.codes.data_ptr() % 8 == 0)

    def readable(self) -> bool:
        """Whether no row or codeword is outside of its tensor."""
        least = _least_bytes(self.shape)
        return least is not None and self.codes.numel() >= least

    def code_constants(self) -> dict[str, int]:
        """What kernels are compiled for, to read a code."""
        return self.shape.code_constants(self.aligned)

    def chunked(self, function: Any, chunks: int, warps: int, **others: int) -> _Chunked:
        """A kernel that works on ``chunks`` chunks of this table's rows in a program."""
        where = self.codes.device, self.shape, self.aligned
        return _chunked(function, *where, chunks, warps, *others.items())


class _Chunked(NamedTuple):
    """A kernel that works on chunks of rows."""

    launch: _Launcher
    in_word: int
    chunks: int

    def __call__(self, words: int, *arguments: Any) -> driver.Compiled | None:
        """Run it for all chunks of ``words`` codewords, or of rows of additive codes."""
        return self.launch((_blocks(words * self.in_word, self.chunks),), *arguments)


@functools.cache
def _chunked(
    function: Any,
    device: torch.device,
    shape: _Shape,
    aligned: int,
    chunks: int,
    warps: int,
    *others: tuple[str, int],
) -> _Chunked:
    vector = _vector(shape.width)
    constants = {
        **shape.row_constants(aligned),
        **dict(others),
        "CHUNKS": chunks,
        "VECTOR": vector,
    }
    launch = _launcher_of(function, device, constants, warps)
    return _Chunked(launch, shape.width // vector, chunks)


def _launcher_of(
    function: Any, device: torch.device, constants: dict[str, int], warps: int
) -> _Launcher:
    """Of a kernel that takes some of these constants."""
    taken = {name: value for name, value in constants.items() if name in function.arg_names}
    return _launcher(function, device, (*taken.items(), ("num_warps", warps)))


def _takes_ids(ids: Tensor, device: torch.device) -> bool:
    """Whether the kernels can read ``ids``, of a table on ``device``."""
    return ids.dtype in _ID_DTYPES and ids.device == device


def _takes(table: _Table, ids: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels can read ``ids``, ``table`` and ``tensors``."""
    return ids.dtype in _ID_DTYPES and _reads(table, ids, *tensors)


def _reads(table: _Table, *tensors: Tensor | None) -> bool:
    """Whether the kernels can read ``table``, and ``tensors`` are where it is."""
    codes = table.codes
    device = codes.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return False
    return (
        codes.dtype is torch.uint8
        and codes.is_contiguous()
        and table.readable()
        and _serves(device)
    )


def _takes_books(codebooks: Tensor, scales: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels can read these codebooks and give ``dtype``."""
    if scales is None:
        known = codebooks.dtype in _FLOATS
    else:
        known = codebooks.dtype is torch.int8 and scales.dtype is SCALE_DTYPE
        known = known and scales.is_contiguous() and scales.shape == codebooks.shape[:2]
    # Rows have no codes: their offsets are int64, as ids are.
    _, size, width = codebooks.shape
    narrow = size > 1 << 16 or size * width < 1 << 31
    return known and narrow and codebooks.is_contiguous() and dtype in _FLOATS


class Decoded(NamedTuple):
    """A table, or a tier of one, whose rows the kernels can decode as ``dtype``."""

    table: _Table
    codebooks: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor | None,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        dtype: torch.dtype,
    ) -> Decoded | None:
        """Of a table as :data:`mec_embed.ops.schema.lookup` takes it; None if kernels cannot."""
        table = _Table.of(codes, num_embeddings, embedding_dim, bits, *codebooks.shape)
        if not _reads(table, codebooks, scales) or not _takes_books(codebooks, scales, dtype):
            return None
        return Decoded(table, codebooks, scales, dtype)

    def same_tensors(self) -> int:
        """Lookups up to which :meth:`tensors` are the same."""
        return _ANY_LOOKUPS if self.scales is None else _unpacked_from(self.codebooks) - 1

    def tensors(self, lookups: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, codebooks and scales, for so many lookups."""
        return (self.table.codes, *_unpacked(self.codebooks, self.scales, lookups))


class Lookups:
    """Lookups in a table: all but the ids.

    The kernel takes ids, output, stride, count and ``zero_id``, then what stays as it is.
    """

    def __init__(
        self,
        launch: _Chunked,
        add: _Chunked,
        words: int,
        tables: Sequence[Decoded],
        places: Map | None,
        numbers: tuple[int, ...],
    ) -> None:
        """Of one table or two tiers.

        Args:
            launch: the kernel.
            add: the one of the gradient.
            words: lines of a row, as both count them: its codewords, where these lie one after the
                other, or 1.
            tables: codes and codebooks.
            places: the map of the tiers; kernels take its tensors before those of the tables.
            numbers: what kernels take after them.
        """
        self.launch, self.add, self.words, self.numbers = launch, add, words, numbers
        self.places, self.tier_map = places, () if places is None else places.tensors
        self.tables = tables
        self.codes = tuple(table.table.codes for table in tables)
        #: Rows, dim and bits of each.
        self.layouts = [table.table.shape[:3] for table in tables]
        self.dtypes = [table.codebooks.dtype for table in tables]
        self.trainable = all(dtype in _FLOATS for dtype in self.dtypes)
        self.dim = tables[0].table.shape.embedding_dim
        self.new_empty = tables[0].codebooks.new_empty(0, dtype=tables[0].dtype).new_empty
        self.device = tables[0].codebooks.device
        #: What C takes: a function that makes the output, a plan for int32 ids and one for int64.
        self.ready: tuple[Any, ...] = (self.new_empty, None, None)

    def takes(self, ids: Tensor) -> bool:
        """Whether the kernels can read these ids."""
        return _takes_ids(ids, self.device)

    def __call__(self, ids: Tensor, zero_id: int) -> Tensor:
        """Rows (*ids.shape, embedding_dim); that of ``zero_id`` is zero."""
        return self._run(ids, zero_id)[0]

    def prepare(self, ids: Tensor, zero_id: int) -> Tensor:
        """The same, and :attr:`ready` for more such ids, if C can serve them."""
        out, compiled, given = self._run(ids, zero_id)
        most = min(table.same_tensors() for table in self.tables)
        place = 1 + _ID_DTYPES.index(ids.dtype)
        if compiled is not None and ids.numel() <= most and self.ready[place] is None:
            plan = driver.plan(
                compiled,
                (self.dim, self.launch.in_word * self.words, self.launch.chunks, most),
                (*(one.data_ptr() for one in given if one is not None), *self.numbers),
            )
            self.ready = (*self.ready[:place], plan, *self.ready[place + 1 :])
        return out

    def _run(
        self, ids: Tensor, zero_id: int
    ) -> tuple[Tensor, driver.Compiled | None, tuple[Tensor | None, ...]]:
        """Rows, what made them if C can launch it, and the tensors that it was given."""
        out, count = self.new_empty((*ids.shape, self.dim)), ids.numel()
        if not count:
            return out, None, ()
        tensors = [tensor for table in self.tables for tensor in table.tensors(count)]
        given = (*self.tier_map, *tensors)
        spaced, stride = _spaced(ids)
        own = spaced, out, stride, count, zero_id
        return out, self.launch(count * self.words, *own, *given, *self.numbers), given

    def gradients(self, grad: Tensor, ids: Tensor, padding_idx: int) -> list[Tensor] | None:
        """Those of the codebooks, by ``grad`` (*ids.shape, embedding_dim); None if it cannot."""
        count = ids.numel()
        if (
            not count
            or not self.trainable
            or grad.dtype not in _FLOATS
            or grad.device != self.device
            or grad.numel() != count * self.dim
            or torch.are_deterministic_algorithms_enabled()
        ):
            return None
        sums = [_Sums.of(table.table, grad, count) for table in self.tables]
        given = *self.tier_map, *self.codes, *(one.values for one in sums)
        spaced, stride = _spaced(ids)
        copies = [one.copies for one in sums]
        if self.places is None:
            own: tuple[Tensor | None, ...] = grad.contiguous(), None, None, spaced
            ends = (*self.numbers, padding_idx, *copies)
        else:
            own = grad.contiguous(), spaced
            ends = (padding_idx, *copies, *self.numbers)
        self.add(count * self.words, *own, *given, stride, count, *ends)
        return [one.total(dtype) for one, dtype in zip(sums, self.dtypes, strict=True)]


def lookups_in(decoded: Decoded | None) -> Lookups | None:
    """Lookups in a table; None if kernels cannot."""
    if decoded is None:
        return None
    table = decoded.table
    launch = table.chunked(_rows_kernel, ROW_ENTRIES // _vector(table.shape.width), ROW_WARPS)
    add = table.chunked(_add_kernel, CHUNKS, CHUNK_WARPS)
    return Lookups(
        launch, add, table.shape.parts, [decoded], None, (table.shape.rows, table.shape.size)
    )


def lookup(
    input: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    padding_idx: int,
    zero_padding: bool,
    sparse: bool,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """See :data:`mec_embed.ops.schema.lookup`."""
    tables = codes, codebooks, scales, num_embeddings, embedding_dim, bits
    rows = lookups_in(Decoded.of(*tables, dtype))
    if rows is None or not rows.takes(input):
        return reference.lookup(input, *tables, padding_idx, zero_padding, sparse, dtype, name)
    return rows(input, padding_idx if zero_padding else -1)


def bag(
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    padding_idx: int,
    mode: str,
    include_last_offset: bool,
    sparse: bool,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """See :data:`mec_embed.ops.schema.bag`."""
    table = _Table.of(codes, num_embeddings, embedding_dim, bits, *codebooks.shape)
    if (
        not _takes(table, input, codebooks, scales, offsets, per_sample_weights)
        or not _takes_books(codebooks, scales, dtype)
        or not _takes_bags(input, offsets, per_sample_weights, mode, include_last_offset)
    ):
        return reference.bag(
            input,
            offsets,
            per_sample_weights,
            codes,
            codebooks,
            scales,
            num_embeddings,
            embedding_dim,
            bits,
            padding_idx,
            mode,
            include_last_offset,
            sparse,
            dtype,
            name,
        )
    bags = count_bags(input, offsets, include_last_offset)
    out = codebooks.new_empty((bags, embedding_dim), dtype=dtype)
    if not out.numel():
        return out
    counted = per_sample_weights is None and _counts(table)
    if not counted:
        codebooks, scales = _unpacked(codebooks, scales, input.numel())
    ends = bags, input.shape[-1], input.numel(), table.shape.rows, table.shape.size, padding_idx
    ids = input.contiguous()
    starts = None if offsets is None else offsets.contiguous()
    tables = codes, codebooks, scales, out
    mean = int(mode == "mean")
    if counted:
        grid, launch = _counted(table, bags, codebooks.dtype, mean)
        launch(grid, ids, starts, *tables, *ends)
        return out
    weights = None if per_sample_weights is None else per_sample_weights.contiguous()
    chunked = table.chunked(_bags_kernel, BAG_CHUNKS, BAG_CHUNK_WARPS, MEAN=mean)
    chunked(bags * table.shape.parts, ids, starts, weights, *tables, *ends)
    return out


def _unpacked_from(codebooks: Tensor) -> int:
    """Lookups from which on int8 codebooks are unpacked: at least as many as it has codewords.

    A table kept as rows may have far more of them than are looked up.
    """
    books, size, width = codebooks.shape
    return max(_blocks(UNPACK_ENTRIES, books * width), size)


def _unpacked(
    codebooks: Tensor, scales: Tensor | None, lookups: int
) -> tuple[Tensor, Tensor | None]:
    """int8 codebooks as float32, where so many lookups take longer than that does.

    A processor converts a quarter as many bytes to floats as it adds floats.
    """
    if scales is None or lookups < _unpacked_from(codebooks):
        return codebooks, scales
    floats = torch.empty_like(codebooks, dtype=torch.float32)
    _launch(
        _floats_kernel,
        (_blocks(codebooks.numel(), TILE),),
        codebooks,
        scales,
        floats,
        codebooks.numel(),
        WIDTH=codebooks.shape[2],
        ENTRIES=TILE,
    )
    return floats, None


def _counts(table: _Table) -> bool:
    """Whether bags of ``table`` are made by counting codewords."""
    if (
        not table.shape.bits
        or table.shape.books == 1
        or table.shape.parts > 1
        or table.shape.size > 32
    ):
        return False
    return _power(table.shape.books) * _blocks(table.shape.size, 4) <= MOST_COUNTED


def _counted(
    table: _Table, bags: int, dtype: torch.dtype, mean: int
) -> tuple[tuple[int, int], _Launcher]:
    """Grid and kernel that counts codewords."""
    together = next(each for least, each in COUNTED_BAGS if bags >= least)
    launch = _counting(table.codes.device, table.shape, table.aligned, dtype, together, mean)
    tile = launch.constants
    return (_blocks(bags, tile["BAGS"]), _blocks(table.shape.width, tile["COLUMNS"])), launch


@functools.cache
def _counting(
    device: torch.device,
    shape: _Shape,
    aligned: int,
    dtype: torch.dtype,
    together: int,
    mean: int,
) -> _Launcher:
    """The kernel that counts codewords of ``together`` bags in a program, or of fewer."""
    words = _power(_blocks(shape.size, 4))
    terms, unroll = _TERMS[dtype], COUNTED_UNROLL
    # A thread has 255 registers, and sums, counts and codewords take most of them.
    if together > 64 and shape.width > 64:
        together = 64
    elif together > 64 and terms > 2:
        unroll = 1
    columns = min(max(16, _power(shape.width)), 64)
    constants = {
        "MEAN": mean,
        "BOOKS": shape.books,
        "WIDTH": shape.width,
        "TERMS": terms,
        "BAGS": together,
        # A product of matrices needs 16 columns on its left, at least.
        "SLOTS": max(_power(shape.books), 16 // words),
        "WORDS": words,
        "COLUMNS": columns,
        "UNROLL": unroll,
        "num_warps": COUNTED_WARPS,
        **shape.code_constants(aligned),
    }
    return _launcher(_counted_bags_kernel, device, tuple(constants.items()))


def _takes_bags(
    input: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> bool:
    """Whether the kernel can reduce such bags; torch refuses most of the others."""
    if mode not in ("sum", "mean"):
        return False
    if weights is not None and (
        mode != "sum" or weights.dtype not in _FLOATS or weights.shape != input.shape
    ):
        return False
    if offsets is None:
        return input.dim() == 2
    shaped = input.dim() == offsets.dim() == 1 and len(offsets) > include_last_offset
    return shaped and offsets.dtype in _ID_DTYPES


def lookup_backward(
    grad: Tensor,
    input: Tensor,
    codes: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    padding_idx: int,
    num_subvectors: int,
    codebook_size: int,
    subvector_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient (M, K, subvector_dim) of the codebooks from ``grad`` (*input.shape, dim).

    Sums are made in no certain order, unless torch is told to use deterministic algorithms.
    """
    shape = (num_subvectors, codebook_size, subvector_dim)
    table = _Table.of(codes, num_embeddings, embedding_dim, bits, *shape)
    if (
        not _takes(table, input, grad)
        or not _takes_grad(table, grad, dtype)
        or grad.numel() != input.numel() * embedding_dim
    ):
        return reference.lookup_backward(
            grad,
            input,
            codes,
            num_embeddings,
            embedding_dim,
            bits,
            padding_idx,
            *shape,
            dtype,
        )
    return _sum(table, _Gradient(grad.contiguous()), input, padding_idx, dtype)


def bag_backward(
    grad: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    codes: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    padding_idx: int,
    mode: str,
    include_last_offset: bool,
    num_subvectors: int,
    codebook_size: int,
    subvector_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient (M, K, subvector_dim) of the codebooks from ``grad`` (bags, embedding_dim).

    As :func:`lookup_backward`; gradients of rows, which may be many more, are made nowhere.
    """
    shape = (num_subvectors, codebook_size, subvector_dim)
    table = _Table.of(codes, num_embeddings, embedding_dim, bits, *shape)
    if (
        not _takes(table, input, grad, offsets, per_sample_weights)
        or not _takes_grad(table, grad, dtype)
        or not _takes_bags(input, offsets, per_sample_weights, mode, include_last_offset)
        or grad.shape != (count_bags(input, offsets, include_last_offset), embedding_dim)
    ):
        return reference.bag_backward(
            grad,
            input,
            offsets,
            per_sample_weights,
            codes,
            num_embeddings,
            embedding_dim,
            bits,
            padding_idx,
            mode,
            include_last_offset,
            num_subvectors,
            codebook_size,
            subvector_dim,
            dtype,
        )
    ids = input.reshape(-1)
    owner = owners(input, offsets, include_last_offset)
    share = reference.shares(grad, ids, owner, per_sample_weights, padding_idx, mode)
    given = _Gradient(grad.contiguous(), owner, None if share is None else share.contiguous())
    return _sum(table, given, ids, padding_idx, dtype)


class _Gradient(NamedTuple):
    """Gradients of rows, or of bags: the bag of each id, and what part of its gradient it gets."""

    lines: Tensor
    owner: Tensor | None = None
    share: Tensor | None = None


def _takes_grad(table: _Table, grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can sum ``grad`` into codebooks of ``dtype``."""
    # Of a table kept as rows, most get no gradient: torch's own way has no work for these.
    repeatable = torch.are_deterministic_algorithms_enabled()
    return dtype in _FLOATS and grad.dtype in _FLOATS and bool(table.shape.bits or not repeatable)


def _sum(
    table: _Table, grad: _Gradient, ids: Tensor, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    if not ids.numel():
        return grad.lines.new_zeros(
            (table.shape.books, table.shape.size, table.shape.width), dtype=dtype
        )
    add = _sum_sorted if torch.are_deterministic_algorithms_enabled() else _sum_atomically
    return add(table, grad, ids.contiguous(), padding_idx, dtype)


def _sum_atomically(
    table: _Table, grad: _Gradient, ids: Tensor, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the codebooks; lines that share a codeword add to it as they come."""
    count = ids.numel()
    sums = _Sums.of(table, grad.lines, count)
    add = table.chunked(_add_kernel, CHUNKS, CHUNK_WARPS)
    ends = 1, count, table.shape.rows, table.shape.size, padding_idx, sums.copies
    add(count * table.shape.parts, *grad, ids, table.codes, sums.values, *ends)
    return sums.total(dtype)


class _Sums(NamedTuple):
    """What gradients of codewords are added to: of few, by many lookups, copies that take turns."""

    copies: int
    values: Tensor

    @staticmethod
    def of(table: _Table, like: Tensor, lookups: int) -> _Sums:
        """Zeros (copies * M, K, subvector_dim) float32."""
        copies = min(MOST_COPIES, max(1, lookups // (COPY_LOOKUPS * table.shape.size)))
        shape = copies * table.shape.books, table.shape.size, table.shape.width
        return _Sums(copies, like.new_zeros(shape, dtype=torch.float32))

    def total(self, dtype: torch.dtype) -> Tensor:
        """The gradient (M, K, subvector_dim)."""
        found = self.values
        if self.copies > 1:
            found = found.view(self.copies, -1, *found.shape[1:]).sum(0)
        return found if dtype is torch.float32 else found.to(dtype)


def _sum_sorted(
    table: _Table, grad: _Gradient, ids: Tensor, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the codebooks; one program sums each codeword, always in the same order."""
    count = ids.numel()
    keys = ids.new_empty((table.shape.books, count), dtype=torch.int32)
    _launch(
        _keys_kernel,
        (_blocks(count, TILE), table.shape.books),
        ids,
        table.codes,
        keys,
        count,
        table.shape.rows,
        table.shape.size,
        padding_idx,
        BOOKS=table.shape.books,
        LINES=TILE,
        **table.code_constants(),
    )
    keys, order = keys.sort(dim=1, stable=True)
    edges = torch.arange(table.shape.size + 1, dtype=torch.int32, device=ids.device)
    bounds = torch.searchsorted(keys, edges.repeat(table.shape.books, 1))
    out = grad.lines.new_empty(
        (table.shape.books, table.shape.size, table.shape.width), dtype=dtype
    )
    tile = _tile(table.shape.width)
    _launch(
        _segments_kernel,
        (table.shape.books * table.shape.size, _blocks(table.shape.width, tile["COLUMNS"])),
        *grad,
        order,
        bounds,
        out,
        count,
        table.shape.size,
        PARTS=table.shape.parts,
        WIDTH=table.shape.width,
        **tile,
    )
    return out


class Map(NamedTuple):
    """Which tier each row of a table is in, see :class:`mec_embed.tiers.TierMap`."""

    starts: Tensor
    before: Tensor
    bitmap: Tensor
    rows: int

    def readable(self) -> bool:
        """Whether the kernels can read it without leaving its tensors."""
        starts, before, bitmap = self.starts, self.before, self.bitmap
        ranks, size = before.shape[0], bitmap.shape[0]
        if size:
            blocks = _blocks(self.rows, reference.BLOCK_ROWS)
            whole = ranks == blocks and size == blocks * reference.BLOCK_ROWS // 8
            whole = whole and bitmap.data_ptr() % 8 == 0
        else:
            whole = ranks == starts.shape[0] > 0
        for tensor in (starts, before, bitmap):
            whole = whole and tensor.is_contiguous() and tensor.device == before.device
        kinds = starts.dtype, before.dtype, bitmap.dtype
        expected = torch.int64, torch.int32 if size else torch.int64, torch.uint8
        return whole and kinds == expected and self.rows > 0 and _serves(before.device)

    def takes(self, ids: Tensor) -> bool:
        """Whether the kernels can read these ids."""
        return _takes_ids(ids, self.before.device)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of which kernels read some: ``starts``, ``before``, ``bitmap``."""
        runs = self.starts if not self.bitmap.shape[0] else None
        return runs, self.before, self.bitmap if runs is None else None

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id is popular, and its place in its tier."""
        popular = torch.empty(ids.shape, dtype=torch.bool, device=ids.device)
        place = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
        count = ids.numel()
        if count:
            _launch(
                _places_kernel,
                (_blocks(count, TILE),),
                ids.contiguous(),
                *self.tensors,
                popular,
                place,
                count,
                self.rows,
                self.starts.shape[0],
                BLOCK_ROWS=reference.BLOCK_ROWS,
                LINES=TILE,
            )
        return popular, place


def lookups_in_tiers(places: Map, head: Decoded | None, tail: Decoded | None) -> Lookups | None:
    """Lookups in a table of two tiers; None if kernels cannot."""
    if head is None or tail is None or not places.readable():
        return None
    device = places.before.device
    if not head.codebooks.device == tail.codebooks.device == device:
        return None
    one, other = head.table.shape, tail.table.shape
    shapes, aligned = (one, other), (head.table.aligned, tail.table.aligned)
    chunks = ROW_ENTRIES // _vector(one.width, other.width)
    launch = _tiered(_tiered_kernel, device, *shapes, *aligned, chunks, ROW_WARPS)
    add = _tiered(_add_tiered_kernel, device, *shapes, *aligned, CHUNKS, CHUNK_WARPS)
    ends = places.rows, places.starts.shape[0], one.rows, one.size, other.rows, other.size
    return Lookups(launch, add, 1, [head, tail], places, ends)


def tiered(
    input: Tensor,
    starts: Tensor,
    before: Tensor,
    bitmap: Tensor,
    head_codes: Tensor,
    head_codebooks: Tensor,
    head_scales: Tensor | None,
    tail_codes: Tensor,
    tail_codebooks: Tensor,
    tail_scales: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    head_rows: int,
    head_bits: int,
    tail_rows: int,
    tail_bits: int,
    padding_idx: int,
    zero_padding: bool,
    sparse: bool,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """See :data:`mec_embed.ops.schema.tiered`."""
    tiers = (
        (head_codes, head_codebooks, head_scales, head_rows, embedding_dim, head_bits),
        (tail_codes, tail_codebooks, tail_scales, tail_rows, embedding_dim, tail_bits),
    )
    places = Map(starts, before, bitmap, num_embeddings)
    rows = lookups_in_tiers(places, *(Decoded.of(*tier, dtype) for tier in tiers))
    if rows is None or not rows.takes(input):
        return reference.tiered(
            input,
            starts,
            before,
            bitmap,
            head_codes,
            head_codebooks,
            head_scales,
            tail_codes,
            tail_codebooks,
            tail_scales,
            num_embeddings,
            embedding_dim,
            head_rows,
            head_bits,
            tail_rows,
            tail_bits,
            padding_idx,
            zero_padding,
            sparse,
            dtype,
            name,
        )
    return rows(input, padding_idx if zero_padding else -1)


@functools.cache
def _tiered(
    function: Any,
    device: torch.device,
    head: _Shape,
    tail: _Shape,
    head_aligned: int,
    tail_aligned: int,
    chunks: int,
    warps: int,
) -> _Chunked:
    """A kernel that works on rows of two tiers of these shapes."""
    dim, vector = head.embedding_dim, _vector(head.width, tail.width)
    constants = {
        **{f"HEAD_{key}": value for key, value in head.row_constants(head_aligned).items()},
        **{f"TAIL_{key}": value for key, value in tail.row_constants(tail_aligned).items()},
        "BLOCK_ROWS": reference.BLOCK_ROWS,
        "DIM": dim,
        "CHUNKS": chunks,
        "VECTOR": vector,
    }
    launch = _launcher_of(function, device, constants, warps)
    return _Chunked(launch, dim // vector, chunks)


def tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    places = Map(starts, before, bitmap, num_embeddings)
    if not places.readable() or not places.takes(input):
        return reference.tiers(input, starts, before, bitmap, num_embeddings, name)
    return places(input)


def register() -> None:
    """Let these functions serve the operators, and modules, for tensors on a GPU."""
    fast.on_gpu = sys.modules[__name__]
    serve("cuda", tiers, tiered, lookup, lookup_backward, bag, bag_backward)
