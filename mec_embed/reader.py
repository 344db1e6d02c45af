"""Rows of compressed tables, read without PyTorch from a file that ``mec_embed.save`` wrote.

Needs numpy only, and nothing else of this package: copy this file to where rows are served. The
file is mapped, not read, so opening one takes no memory and processes share its pages. The format
is specified in ``docs/format.md``.

    >>> reader = Reader("model.safetensors")  # doctest: +SKIP
    >>> reader.rows("item", [3, 17]).shape  # doctest: +SKIP
    (2, 16)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

#: Newest format version that is understood.
VERSION = 2
#: Rows, and columns, that no table exceeds; so that no product below needs more than 64 bits.
MOST_ROWS = 1 << 48
#: Most dimensions of a tensor, as in numpy.
MOST_DIMENSIONS = 64
#: Longest JSON header that safetensors files may have.
MOST_HEADER_BYTES = 100_000_000
#: Zero bytes after the last code.
PACKED_PADDING = 8
#: Rows that share one count in a bitmap of popular rows.
BLOCK_ROWS = 128
#: Most runs of popular and unpopular rows.
MOST_RUNS = 16
#: Blocks of a bitmap that are checked at once.
_CHECKED_BLOCKS = 1 << 14

#: dtypes of safetensors as numpy reads them; bfloat16 by its bits. Others are not looked into.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
}
_CODEBOOKS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "I8",
}
_MODULES = (
    "CompressedEmbedding",
    "CompressedEmbeddingBag",
    "TieredEmbedding",
    "TieredEmbeddingBag",
)
_ONES = np.array([bin(byte).count("1") for byte in range(256)])


class Reader:
    """Decodes rows of the compressed tables of one file.

    All but the codes is checked when the file is opened; codes are checked as they are read. The
    file must not be written to while it is mapped; to replace it, as ``save`` does, is fine.

    Args:
        path: of the file.

    Raises:
        ValueError: not such a file, damaged, or of a newer format version; the text says which.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Map the file and check it."""
        self.path = path
        self._tables: dict[str, _Table] = {}
        try:
            file = _File(path)
            for table in file.tables():
                for name in table.names:
                    _check(name not in self._tables, f"the table {name!r} is there twice")
                    self._tables[name] = table
        except _Malformed as error:
            raise ValueError(f"{path}: {error}") from error.__cause__

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each compressed table, by its names in the model."""
        return {name: (table.rows, table.dim) for name, table in self._tables.items()}

    def rows(self, name: str, ids: ArrayLike) -> NDArray[np.float32]:
        """Decoded rows (n, dim), float32.

        Args:
            name: of a table, see :attr:`tables`.
            ids: integers (n,).

        Raises:
            KeyError: no such table in the file (tables that were not compressed are not).
            TypeError: ids that are not integers.
            IndexError: an id outside a table that names no row (``oov_row``) for such ids.
            ValueError: ids that are not (n,), or codes that are damaged.
        """
        if name not in self._tables:
            raise KeyError(f"{self.path} holds no compressed table {name!r}")
        table = self._tables[name]
        array = np.asarray(ids)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"table {name!r}: ids must be integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"table {name!r}: ids must be (n,), got {array.shape}")
        unknown = (array < 0) | (array >= table.rows)
        if table.oov_row is None and unknown.any():
            raise IndexError(
                f"table {name!r}: id {array[unknown][0]} is out of range, expected "
                f"0..{table.rows - 1}"
            )
        known = array.astype(np.int64)
        known[unknown] = table.oov_row or 0
        try:
            return table.decode(known)
        except _Malformed as error:
            raise ValueError(f"{self.path}: table {name!r}: {error}") from None


class _Malformed(Exception):
    """What is wrong with the file."""


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Malformed(otherwise)


def _field(entry: Any, key: str, *kinds: type) -> Any:
    """``entry[key]``, of one of the kinds exactly (bool is no int)."""
    _check(type(entry) is dict, f"where {key!r} should be there is no JSON object")
    _check(key in entry, f"the manifest has no {key!r}")
    value = entry[key]
    names = " or ".join(kind.__name__ for kind in kinds)
    _check(type(value) in kinds, f"{key!r} must be {names}, got {type(value).__name__}")
    return value


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"{what} is no JSON") from error
    _check(type(value) is dict, f"{what} is no JSON object")
    return value


class _File:
    """The container: tensors by key, and the manifest."""

    def __init__(self, path: str | PathLike[str]) -> None:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            _check(size >= 8, "too short for a safetensors file")
            self.bytes: Array = np.asarray(np.memmap(file, np.uint8, "r"))
        length = int.from_bytes(self.bytes[:8].tobytes(), "little")
        _check(length <= min(MOST_HEADER_BYTES, size - 8), "the header is longer than the file")
        try:
            text = self.bytes[8 : 8 + length].tobytes().decode()
        except UnicodeDecodeError as error:
            raise _Malformed("the header is no UTF-8") from error
        self.header = _parse(text, "the header")
        self.start = 8 + length
        metadata = self.header.pop("__metadata__", {})
        self._check_tensors()
        _check(type(metadata) is dict and "mec_embed" in metadata, "no manifest of mec_embed")
        self.manifest = _parse(_field(metadata, "mec_embed", str), "the manifest")
        self.shared = _field(self.manifest, "shared", dict)

    def _check_tensors(self) -> None:
        """Tensors must follow each other and fill the file, as safetensors asks."""
        spans = []
        for key, entry in self.header.items():
            shape = _field(entry, "shape", list)
            span = _field(entry, "data_offsets", list)
            numbers = [*shape, *span]
            valid = len(span) == 2 and len(shape) <= MOST_DIMENSIONS
            valid = valid and all(type(one) is int and one >= 0 for one in numbers)
            _check(valid, f"the tensor {key!r} has no valid shape or offsets")
            dtype = _field(entry, "dtype", str)
            if dtype in _DTYPES:
                size = prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
                _check(span[1] - span[0] == size, f"the tensor {key!r} has another size")
            spans.append((*span, key))
        end = 0
        for first, last, key in sorted(spans):
            _check(first == end and last >= first, f"the tensor {key!r} is not at its place")
            end = last
        _check(self.start + end == len(self.bytes), "the file is truncated, or goes on")

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """A tensor, mapped; it must be of this dtype and shape."""
        stored = self.shared.get(key, key)
        _check(
            type(stored) is str and stored in self.header, f"the tensor {key!r} is not in the file"
        )
        entry = self.header[stored]
        _check(
            (entry["dtype"], tuple(entry["shape"])) == (dtype, shape),
            f"the tensor {key!r} is {entry['dtype']} {entry['shape']}, expected {dtype} {shape}",
        )
        first, last = entry["data_offsets"]
        data = self.bytes[self.start + first : self.start + last]
        return data.view(_DTYPES[dtype]).reshape(shape)

    def tables(self) -> Iterator[_Table]:
        """The compressed tables."""
        version = _field(self.manifest, "version", int)
        _check(version >= 1, f"the format version must be positive, got {version}")
        _check(
            version <= VERSION, f"format version {version}; this reader knows versions to {VERSION}"
        )
        for entry in _field(self.manifest, "tables", list):
            names = _field(entry, "names", list)
            _check(bool(names) and all(type(name) is str for name in names), "'names' are no names")
            try:
                yield _table(self, entry, names)
            except _Malformed as error:
                raise _Malformed(f"table {names[0]!r}: {error}") from error.__cause__


@dataclass(frozen=True)
class _Table:
    """A table with its padding."""

    names: list[str]
    rows: int
    dim: int
    zero_id: int | None
    oov_row: int | None
    parts: _Codes | _Tiers

    def decode(self, ids: Array) -> NDArray[np.float32]:
        """Rows (n, dim) of ids (n,) within the table."""
        rows = self.parts.decode(ids)
        if self.zero_id is not None:
            rows[ids == self.zero_id] = 0
        return rows


def _table(file: _File, entry: dict[str, Any], names: list[str]) -> _Table:
    module = _field(entry, "module", str)
    _check(module in _MODULES, f"{module!r} is no module that is known")
    tiered = module.startswith("Tiered")
    parts = _tiers(file, entry, names[0]) if tiered else _codes(file, entry, names[0])
    padding_idx = _row(entry, "padding_idx", parts.rows)
    zero_id = padding_idx if _field(entry, "zero_padding", bool) else None
    oov_row = _row(entry, "oov_row", parts.rows) if "oov_row" in entry else None
    return _Table(names, parts.rows, parts.dim, zero_id, oov_row, parts)


def _row(entry: dict[str, Any], key: str, rows: int) -> int | None:
    """A field that names a row, or none."""
    row: int | None = _field(entry, key, int, type(None))
    _check(row is None or 0 <= row < rows, f"{key!r} is no row of the table")
    return row


@dataclass(frozen=True)
class _Codes:
    """Codes and codebooks of a table, or of a tier of one."""

    kind: str
    rows: int
    dim: int
    bits: int
    codes: Array
    books: Array
    scales: Array | None

    def decode(self, ids: Array) -> NDArray[np.float32]:
        """Rows (n, dim) of ids (n,)."""
        if self.kind == "rows":
            return self._words(0, ids)
        if self.kind == "shared":
            return self._words(0, np.zeros_like(ids))
        parts = (self._words(m, code) for m, code in enumerate(self._unpack(ids)))
        if self.kind == "product":
            return np.concatenate(list(parts), axis=1)
        rows = next(parts)
        for part in parts:
            rows += part
        return rows

    def _unpack(self, ids: Array) -> Iterator[Array]:
        """The codes (n,) of ids (n,), codebook by codebook."""
        subvectors, size, _ = self.books.shape
        for m in range(subvectors):
            position = (ids * subvectors + m) * self.bits
            byte, shift = position >> 3, position & 7
            # A code of up to 16 bits ends in the third byte at the latest.
            word = self.codes[byte].astype(np.int64)
            word |= self.codes[byte + 1].astype(np.int64) << 8
            word |= self.codes[byte + 2].astype(np.int64) << 16
            code = (word >> shift) & ((1 << self.bits) - 1)
            _check(not code.size or int(code.max()) < size, "a code is no codeword: it is damaged")
            yield code

    def _words(self, m: int, code: Array) -> NDArray[np.float32]:
        """Codewords (n, width) of codebook ``m``, always a copy."""
        words = _floats(self.books[m][code])
        return words if self.scales is None else words * _floats(self.scales[m][code])[:, None]


def _floats(values: Array) -> NDArray[np.float32]:
    """float32 of any codebook; bfloat16, which numpy lacks, has the upper halves of float32."""
    if values.dtype.kind == "u":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # of float64, which may become infinite as in torch
        return values.astype(np.float32)


def _codes(file: _File, entry: dict[str, Any], name: str) -> _Codes:
    layout = _field(entry, "layout", dict)
    kind, dtype = _field(layout, "kind", str), _field(entry, "codebook_dtype", str)
    names = ("num_embeddings", "embedding_dim", "num_subvectors", "codebook_size")
    rows, dim, subvectors, size = (_field(layout, key, int) for key in names)
    _check(dtype in _CODEBOOKS, f"codebooks of {dtype!r} are not known")
    numbers = rows, dim, subvectors, size
    _check(1 <= min(numbers) <= max(numbers) <= MOST_ROWS, "the layout has impossible numbers")
    width, bits = dim, max(1, (size - 1).bit_length())
    if kind in ("rows", "shared"):
        bits, expected = 0, rows if kind == "rows" else 1
        _check((subvectors, size) == (1, expected), f"{kind!r} has other codebooks")
    else:
        _check(kind in ("additive", "product"), f"codes of the kind {kind!r} are not known")
        _check(size <= 1 << 16, f"codebooks have at most 65536 codewords, got {size}")
    if kind == "product":
        _check(dim % subvectors == 0, "'num_subvectors' does not divide 'embedding_dim'")
        width = dim // subvectors
    code_bytes = (rows * subvectors * bits + 7) // 8 + PACKED_PADDING if bits else 0
    shape, books = (subvectors, size, width), f"{name}.codebook_set"
    return _Codes(
        kind,
        rows,
        dim,
        bits,
        file.tensor(f"{name}.code_table.codes", "U8", (code_bytes,)),
        file.tensor(f"{books}.codebooks", _CODEBOOKS[dtype], shape),
        file.tensor(f"{books}.scales", "BF16", shape[:2]) if dtype == "int8" else None,
    )


@dataclass(frozen=True)
class _Tiers:
    """Two tables, and which rows are in which."""

    rows: int
    dim: int
    tier_map: _Runs | _Bitmap
    head: _Codes
    tail: _Codes

    def decode(self, ids: Array) -> NDArray[np.float32]:
        """Rows (n, dim) of ids (n,)."""
        popular, before = self.tier_map.find(ids)
        rows = np.empty((len(ids), self.dim), np.float32)
        rows[popular] = self.head.decode(before[popular])
        rows[~popular] = self.tail.decode((ids - before)[~popular])
        return rows


def _tiers(file: _File, entry: dict[str, Any], name: str) -> _Tiers:
    rows, runs = _field(entry, "rows", int), _field(entry, "runs", int, type(None))
    tiers = _field(entry, "tiers", list)
    _check(len(tiers) == 2, f"there must be two tiers, got {len(tiers)}")
    head, tail = (
        _codes(file, tier, f"{name}.{place}")
        for tier, place in zip(tiers, ("head", "tail"), strict=True)
    )
    _check(head.rows + tail.rows == rows, "the tiers do not make up the table")
    _check(head.dim == tail.dim, "the tiers differ in 'embedding_dim'")
    _check(runs is None or 2 <= runs <= MOST_RUNS, f"a map of {runs} runs is not possible")
    blocks, key = -(-rows // BLOCK_ROWS), f"{name}.tier_map"
    starts = file.tensor(f"{key}.starts", "I64", (runs or 0,))
    before = file.tensor(f"{key}.before", "I64" if runs else "I32", (runs or blocks,))
    bits = file.tensor(f"{key}.bitmap", "U8", (0 if runs else blocks * BLOCK_ROWS // 8,))
    tier_map = _Runs(starts, before) if runs else _Bitmap(before, bits)
    _check(tier_map.popular(rows) == head.rows, "the map of the tiers is damaged")
    return _Tiers(rows, head.dim, tier_map, head, tail)


@dataclass(frozen=True)
class _Runs:
    """Popular and other rows in turn."""

    starts: Array
    before: Array

    def popular(self, rows: int) -> int | None:
        """Number of popular rows; None for a map that contradicts itself."""
        starts, total = self.starts.tolist(), 0
        if starts[0] or sorted(starts) != starts or starts[-1] >= rows:
            return None
        for number, (start, end) in enumerate(pairwise([*starts, rows])):
            if int(self.before[number]) != total:
                return None
            total += 0 if number % 2 else end - start
        return total

    def find(self, ids: Array) -> tuple[Array, Array]:
        """Whether ids (n,) are popular, and how many popular rows are before each."""
        run = np.searchsorted(self.starts, ids, side="right") - 1
        popular = run % 2 == 0
        return popular, self.before[run] + np.where(popular, ids - self.starts[run], 0)


@dataclass(frozen=True)
class _Bitmap:
    """One bit a row, and a count for each block of rows."""

    before: Array
    bits: Array

    def popular(self, rows: int) -> int | None:
        """Number of popular rows; None for a map that contradicts itself."""
        total = 0
        for start in range(0, len(self.before), _CHECKED_BLOCKS):
            before = self.before[start : start + _CHECKED_BLOCKS]
            ones = self._ones(np.arange(start, start + len(before))).sum(1)
            if not np.array_equal(before, total + ones.cumsum() - ones):
                return None
            total += int(ones.sum())
        beyond = int.from_bytes(self.bits[rows // 8 :].tobytes(), "little") >> rows % 8
        return None if beyond else total

    def find(self, ids: Array) -> tuple[Array, Array]:
        """Whether ids (n,) are popular, and how many popular rows are before each."""
        block, own, bit = ids // BLOCK_ROWS, ids // 8, ids % 8
        byte = self.bits[own].astype(np.int64)
        whole = np.arange(BLOCK_ROWS // 8) < (own % (BLOCK_ROWS // 8))[:, None]
        before = self.before[block] + (self._ones(block) * whole).sum(1)
        return byte >> bit & 1 == 1, before + _ONES[byte & (1 << bit) - 1]

    def _ones(self, block: Array) -> Array:
        """Popular rows in each byte of blocks (n,): (n, 16)."""
        return _ONES[self.bits.reshape(-1, BLOCK_ROWS // 8)[block]]
