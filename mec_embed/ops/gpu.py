"""The operators by Triton kernels, for tensors on a GPU; the rest goes to the reference.

Importing this module needs ``triton``. The kernels take float32, float16, bfloat16 and int8
codebooks and sum in float32. They never make the host wait, and so can be captured in a CUDA graph,
after one call that compiles them. Ids are not checked for their range, as the reference does not
off the CPU: one out of range decodes as the nearest row of the table, and a damaged code as the
last codeword, so that no memory outside the table is read.

A kernel works on tiles of lines and columns. A line is what is contiguous in the output: a row of
additive codes, one codeword of a row of product codes (there are ``PARTS`` of them in a row).
Offsets are int64 throughout: a table may have more than 2**31 bits, bytes or entries.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import SCALE_DTYPE, packed_bytes
from . import reference
from .schema import LIBRARY

# These numbers follow from how GPUs work, not from measurements: there was none to measure on.
#: Entries of a tile; each of its threads has 8, which hides some of the wait for memory.
TILE, TILE_WARPS = 1024, 4
#: The same for bags: all bags of a tile take as long as the longest, so a tile is one warp's.
BAG_TILE, BAG_WARPS = 128, 1
#: Adding to one address happens one by one, so the gradient of a codeword has one copy for so many
#: lookups of it.
COPY_LOOKUPS = 1024
MOST_COPIES = 16
_ID_DTYPES = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: What Triton compiles for.
_LEAST_CAPABILITY = (7, 0)


@triton.jit
def _read_ids(ids: tl.tensor, place: tl.tensor, inside: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Ids, int64, as rows that the table has; row 0 where there is none to read."""
    found = tl.load(ids + place, mask=inside, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(found, 0), rows - 1)


@triton.jit
def _read_codes(
    codes: tl.tensor,
    ids: tl.tensor,
    book: tl.tensor,
    size: tl.tensor,
    BOOKS: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
) -> tl.tensor:
    """Codes, int64, of the rows ``ids`` in codebook ``book``; below ``size`` even if damaged."""
    if BITS == 0:
        code = ids
    else:
        position = (ids * BOOKS + book) * BITS
        start = codes + (position >> 3)
        # Byte by byte: a wider load would have to be aligned. The padding of the stream makes
        # the bytes after the last code readable.
        word = tl.load(start).to(tl.int32)
        if BYTES > 1:
            word |= tl.load(start + 1).to(tl.int32) << 8
        if BYTES > 2:
            word |= tl.load(start + 2).to(tl.int32) << 16
        code = ((word >> (position & 7).to(tl.int32)) & ((1 << BITS) - 1)).to(tl.int64)
    return tl.minimum(code, size - 1)


@triton.jit
def _decode(
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    ids: tl.tensor,
    part: tl.tensor,
    wanted: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """A tile in float32: part ``part`` of the rows ``ids``, zero where not ``wanted``."""
    mask = wanted[:, None] & (columns < WIDTH)[None, :]
    total = tl.full([LINES, COLUMNS], 0, tl.float32)
    for number in range(SUMMED):
        book = part + number
        word = book * size + _read_codes(codes, ids, book, size, PARTS * SUMMED, BITS, BYTES)
        entries = books + (word * WIDTH)[:, None] + columns[None, :]
        value = tl.load(entries, mask=mask, other=0).to(tl.float32)
        if scales is not None:
            value *= tl.load(scales + word, mask=wanted, other=0).to(tl.float32)[:, None]
        total += value
    return total


@triton.jit
def _rows_kernel(
    ids: tl.tensor,
    codes: tl.tensor,
    books: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    lines: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    zero_id: tl.int64,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = line < lines
    row = _read_ids(ids, line // PARTS, inside, rows)
    tile = _decode(
        codes,
        books,
        scales,
        row,
        line % PARTS,
        inside & (row != zero_id),
        columns,
        size,
        PARTS,
        SUMMED,
        BITS,
        BYTES,
        WIDTH,
        LINES,
        COLUMNS,
    )
    place = out + (line * WIDTH)[:, None] + columns[None, :]
    tl.store(place, tile, mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _larger(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return tl.maximum(one, other)


@triton.jit
def _plus(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    return one + other


@triton.jit
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
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bag, part = line // PARTS, line % PARTS
    inside = bag < bags
    if offsets is None:
        start = bag * length
        end = start + length
    else:
        # The last bag takes all that is left, also where an offset after it says otherwise.
        start = tl.load(offsets + bag, mask=inside, other=0).to(tl.int64)
        end = tl.load(offsets + bag + 1, mask=bag + 1 < bags, other=0).to(tl.int64)
        end = tl.where(bag + 1 < bags, end, count)
    start = tl.maximum(start, 0)
    end = tl.where(inside, tl.minimum(end, count), 0)
    total = tl.full([LINES, COLUMNS], 0, tl.float32)
    members = tl.full([LINES], 0, tl.float32)
    for step in range(tl.reduce(end - start, 0, _larger)):
        place = start + step
        row = _read_ids(ids, place, place < end, rows)
        wanted = (place < end) & (row != padding)
        tile = _decode(
            codes,
            books,
            scales,
            row,
            part,
            wanted,
            columns,
            size,
            PARTS,
            SUMMED,
            BITS,
            BYTES,
            WIDTH,
            LINES,
            COLUMNS,
        )
        if weights is not None:
            tile *= tl.load(weights + place, mask=wanted, other=0).to(tl.float32)[:, None]
        total += tile
        members += wanted.to(tl.float32)
    if MEAN:
        total /= tl.maximum(members, 1.0)[:, None]
    place = out + (line * WIDTH)[:, None] + columns[None, :]
    tl.store(place, total, mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _add_kernel(
    grad: tl.tensor,
    ids: tl.tensor,
    codes: tl.tensor,
    total: tl.tensor,
    lines: tl.int64,
    rows: tl.int64,
    size: tl.int64,
    padding: tl.int64,
    copies: tl.int64,
    PARTS: tl.constexpr,
    SUMMED: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    line = program * LINES + tl.arange(0, LINES)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = line < lines
    row = _read_ids(ids, line // PARTS, inside, rows)
    mask = (inside & (row != padding))[:, None] & (columns < WIDTH)[None, :]
    entries = grad + (line * WIDTH)[:, None] + columns[None, :]
    tile = tl.load(entries, mask=mask, other=0).to(tl.float32)
    first = program % copies * (PARTS * SUMMED) * size
    for number in range(SUMMED):
        book = line % PARTS + number
        code = _read_codes(codes, row, book, size, PARTS * SUMMED, BITS, BYTES)
        word = first + book * size + code
        # Relaxed: nobody reads the sums before the kernel ends.
        tl.atomic_add(
            total + (word * WIDTH)[:, None] + columns[None, :], tile, mask=mask, sem="relaxed"
        )


@triton.jit
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
    BYTES: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    book = tl.program_id(1).to(tl.int64)
    inside = place < count
    row = _read_ids(ids, place, inside, rows)
    code = _read_codes(codes, row, book, size, BOOKS, BITS, BYTES)
    # Padding passes no gradient: it sorts behind all codewords.
    code = tl.where(row == padding, size, code)
    tl.store(keys + book * count + place, code, mask=inside)


@triton.jit
def _segments_kernel(
    grad: tl.tensor,
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
        line = tl.load(order + book * count + place, mask=inside, other=0) * PARTS + book % PARTS
        entries = grad + (line * WIDTH)[:, None] + columns[None, :]
        mask = inside[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(entries, mask=mask, other=0).to(tl.float32)
    tl.store(out + word * WIDTH + columns, tl.reduce(total, 0, _plus), mask=columns < WIDTH)


@triton.jit
def _runs_kernel(
    ids: tl.tensor,
    starts: tl.tensor,
    before: tl.tensor,
    popular: tl.tensor,
    place: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    runs: tl.int64,
    LINES: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = line < count
    row = _read_ids(ids, line, inside, rows)
    run = tl.full([LINES], -1, tl.int64)
    for number in range(runs):
        run += (row >= tl.load(starts + number)).to(tl.int64)
    run = tl.maximum(run, 0)
    known = run % 2 == 0
    earlier = tl.load(before + run)
    ahead = tl.where(known, tl.load(starts + run) - earlier, earlier)
    tl.store(popular + line, known, mask=inside)
    tl.store(place + line, row - ahead, mask=inside)


@triton.jit
def _bitmap_kernel(
    ids: tl.tensor,
    before: tl.tensor,
    bitmap: tl.tensor,
    popular: tl.tensor,
    place: tl.tensor,
    count: tl.int64,
    rows: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = line < count
    row = _read_ids(ids, line, inside, rows)
    block = row // BLOCK_ROWS
    within = (row % BLOCK_ROWS).to(tl.int32)
    own = bitmap + block * (BLOCK_ROWS // 8)
    one = tl.full([LINES], 1, tl.int32)
    rank = tl.load(before + block).to(tl.int64)
    for number in range(BLOCK_ROWS // 8):
        kept = tl.minimum(tl.maximum(within - number * 8, 0), 8)
        byte = tl.load(own + number).to(tl.int32) & ((one << kept) - 1)
        # The number of ones: in pairs of bits, then in fours, then in the byte.
        byte -= (byte >> 1) & 0x55
        byte = (byte & 0x33) + ((byte >> 2) & 0x33)
        rank += (byte + (byte >> 4)) & 0x0F
    known = ((tl.load(own + within // 8).to(tl.int32) >> (within % 8)) & 1) != 0
    tl.store(popular + line, known, mask=inside)
    tl.store(place + line, tl.where(known, rank, row - rank), mask=inside)


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


def _launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constants: int) -> None:
    """Run ``kernel`` on the device of its tensors, which need not be the current one."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


def _tile(width: int, entries: int, warps: int) -> dict[str, int]:
    """Lines and columns of a tile: whole codewords if they are no longer than it."""
    columns = min(1 << (width - 1).bit_length(), entries)
    return {"LINES": entries // columns, "COLUMNS": columns, "num_warps": warps}


def _blocks(total: int, block: int) -> int:
    return -(-total // block)


class _Table(NamedTuple):
    """The codes of a table, and how they are read."""

    codes: Tensor
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

    def readable(self) -> bool:
        """Whether no row or codeword is outside of its tensor."""
        row_bits = self.bits * self.books
        if not self.bits:
            whole = self.books == 1
        else:
            whole = self.codes.numel() >= packed_bytes(self.num_embeddings, row_bits)
        return whole and self.rows > 0 and self.width * self.parts == self.embedding_dim

    def code_constants(self) -> dict[str, int]:
        """What kernels are compiled for, to read a code."""
        # A code starts at a multiple of the greatest power of two in ``bits``, and so at most
        # this many bits into a byte.
        last_start = 8 - math.gcd(8, self.bits)
        return {"BITS": self.bits, "BYTES": _blocks(last_start + self.bits, 8)}

    def constants(self) -> dict[str, int]:
        """What kernels are compiled for, to read a row."""
        summed = self.books // self.parts
        shape = {"PARTS": self.parts, "SUMMED": summed, "WIDTH": self.width}
        return {**shape, **self.code_constants()}


def _takes(table: _Table, *tensors: Tensor | None) -> bool:
    """Whether the kernels can read ``table`` and ``tensors``, of which the first are ids."""
    present = [table.codes, *(tensor for tensor in tensors if tensor is not None)]
    ids = tensors[0]
    return (
        ids is not None
        and ids.dtype in _ID_DTYPES
        and all(tensor.device == ids.device for tensor in present)
        and table.codes.dtype is torch.uint8
        and table.codes.is_contiguous()
        and table.readable()
        and _serves(ids.device)
    )


def _takes_books(codebooks: Tensor, scales: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels can read these codebooks and give ``dtype``."""
    if scales is None:
        known = codebooks.dtype in _FLOATS
    else:
        known = codebooks.dtype is torch.int8 and scales.dtype is SCALE_DTYPE
        known = known and scales.is_contiguous() and scales.shape == codebooks.shape[:2]
    return known and codebooks.is_contiguous() and dtype in _FLOATS


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
    table = _Table(codes, num_embeddings, embedding_dim, bits, *codebooks.shape)
    if not _takes(table, input, codebooks, scales) or not _takes_books(codebooks, scales, dtype):
        return reference.lookup(
            input,
            codes,
            codebooks,
            scales,
            num_embeddings,
            embedding_dim,
            bits,
            padding_idx,
            zero_padding,
            sparse,
            dtype,
            name,
        )
    out = codebooks.new_empty((*input.shape, embedding_dim), dtype=dtype)
    if not out.numel():
        return out
    tile = _tile(table.width, TILE, TILE_WARPS)
    lines = input.numel() * table.parts
    _launch(
        _rows_kernel,
        (_blocks(lines, tile["LINES"]), _blocks(table.width, tile["COLUMNS"])),
        input.contiguous(),
        codes,
        codebooks,
        scales,
        out,
        lines,
        table.rows,
        table.size,
        padding_idx if zero_padding else -1,
        **table.constants(),
        **tile,
    )
    return out


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
    table = _Table(codes, num_embeddings, embedding_dim, bits, *codebooks.shape)
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
    bags = len(input) if offsets is None else len(offsets) - include_last_offset
    out = codebooks.new_empty((bags, embedding_dim), dtype=dtype)
    if not out.numel():
        return out
    tile = _tile(table.width, BAG_TILE, BAG_WARPS)
    _launch(
        _bags_kernel,
        (_blocks(bags * table.parts, tile["LINES"]), _blocks(table.width, tile["COLUMNS"])),
        input.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if per_sample_weights is None else per_sample_weights.contiguous(),
        codes,
        codebooks,
        scales,
        out,
        bags,
        input.shape[-1],
        input.numel(),
        table.rows,
        table.size,
        padding_idx,
        MEAN=int(mode == "mean"),
        **table.constants(),
        **tile,
    )
    return out


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
    table = _Table(codes, num_embeddings, embedding_dim, bits, *shape)
    repeatable = torch.are_deterministic_algorithms_enabled()
    # Of a table kept as rows, most get no gradient: torch's own way has no work for these.
    if (
        not _takes(table, input, grad)
        or dtype not in _FLOATS
        or grad.dtype not in _FLOATS
        or grad.numel() != input.numel() * embedding_dim
        or (repeatable and not bits)
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
    if not input.numel():
        return grad.new_zeros(shape, dtype=dtype)
    add = _sum_sorted if repeatable else _sum_atomically
    return add(table, grad.contiguous(), input.contiguous(), padding_idx, dtype)


def _sum_atomically(
    table: _Table, grad: Tensor, ids: Tensor, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the codebooks; lines that share a codeword add to it as they come."""
    # Few codewords and many lines: programs take turns at several copies.
    copies = min(MOST_COPIES, max(1, ids.numel() // (COPY_LOOKUPS * table.size)))
    shape = (copies, table.books, table.size, table.width)
    total = grad.new_zeros(shape, dtype=torch.float32)
    tile = _tile(table.width, TILE, TILE_WARPS)
    lines = ids.numel() * table.parts
    _launch(
        _add_kernel,
        (_blocks(lines, tile["LINES"]), _blocks(table.width, tile["COLUMNS"])),
        grad,
        ids,
        table.codes,
        total,
        lines,
        table.rows,
        table.size,
        padding_idx,
        copies,
        **table.constants(),
        **tile,
    )
    return (total[0] if copies == 1 else total.sum(0)).to(dtype)


def _sum_sorted(
    table: _Table, grad: Tensor, ids: Tensor, padding_idx: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the codebooks; one program sums each codeword, always in the same order."""
    count = ids.numel()
    keys = ids.new_empty((table.books, count), dtype=torch.int32)
    _launch(
        _keys_kernel,
        (_blocks(count, TILE), table.books),
        ids,
        table.codes,
        keys,
        count,
        table.rows,
        table.size,
        padding_idx,
        BOOKS=table.books,
        LINES=TILE,
        **table.code_constants(),
    )
    keys, order = keys.sort(dim=1, stable=True)
    edges = torch.arange(table.size + 1, dtype=torch.int32, device=ids.device)
    bounds = torch.searchsorted(keys, edges.repeat(table.books, 1))
    out = grad.new_empty((table.books, table.size, table.width), dtype=dtype)
    tile = _tile(table.width, TILE, TILE_WARPS)
    _launch(
        _segments_kernel,
        (table.books * table.size, _blocks(table.width, tile["COLUMNS"])),
        grad,
        order,
        bounds,
        out,
        count,
        table.size,
        PARTS=table.parts,
        WIDTH=table.width,
        **tile,
    )
    return out


def tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    if not _takes_map(input, starts, before, bitmap, num_embeddings):
        return reference.tiers(input, starts, before, bitmap, num_embeddings, name)
    popular = torch.empty(input.shape, dtype=torch.bool, device=input.device)
    place = torch.empty(input.shape, dtype=torch.int64, device=input.device)
    count = input.numel()
    if not count:
        return popular, place
    ids, grid = input.contiguous(), (_blocks(count, TILE), 1)
    if len(bitmap):
        _launch(
            _bitmap_kernel,
            grid,
            ids,
            before,
            bitmap,
            popular,
            place,
            count,
            num_embeddings,
            BLOCK_ROWS=reference.BLOCK_ROWS,
            LINES=TILE,
        )
    else:
        _launch(
            _runs_kernel,
            grid,
            ids,
            starts,
            before,
            popular,
            place,
            count,
            num_embeddings,
            len(starts),
            LINES=TILE,
        )
    return popular, place


def _takes_map(
    ids: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int
) -> bool:
    """Whether the kernels can read this map without leaving its tensors."""
    blocks = _blocks(num_embeddings, reference.BLOCK_ROWS)
    if len(bitmap):
        whole = len(before) == blocks and len(bitmap) == blocks * reference.BLOCK_ROWS // 8
    else:
        whole = len(before) == len(starts) > 0
    kinds = starts.dtype, before.dtype, bitmap.dtype
    expected = torch.int64, torch.int32 if len(bitmap) else torch.int64, torch.uint8
    return (
        whole
        and kinds == expected
        and num_embeddings > 0
        and ids.dtype in _ID_DTYPES
        and all(one.device == ids.device for one in (starts, before, bitmap))
        and all(one.is_contiguous() for one in (starts, before, bitmap))
        and _serves(ids.device)
    )


def register() -> None:
    """Let these functions serve the operators for tensors on a GPU."""
    LIBRARY.impl("lookup", lookup, "CUDA")
    LIBRARY.impl("lookup_backward", lookup_backward, "CUDA")
    LIBRARY.impl("bag", bag, "CUDA")
    LIBRARY.impl("tiers", tiers, "CUDA")
