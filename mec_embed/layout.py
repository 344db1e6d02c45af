"""How one table is stored, and how many bytes that takes: the one place that counts them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

CodeKind = Literal["additive", "product", "rows", "shared"]

#: Bytes after the last code, so that a kernel may load 64 bits from where any row starts.
PACKED_PADDING = 8

#: int8 codebooks store a scale beside each codeword; bfloat16 has the range of float32.
SCALE_DTYPE = torch.bfloat16

#: Largest number in a layout; addresses and counts of entries stay 64-bit integers.
_MOST = 1 << 48


def bits_for(codebook_size: int) -> int:
    """Bits of a code that names one of ``codebook_size`` codewords."""
    return max(1, (codebook_size - 1).bit_length())


def packed_bytes(rows: int, row_bits: int) -> int:
    """Bytes of ``rows`` rows of ``row_bits`` bits, packed without gaps, padding included."""
    return (rows * row_bits + 7) // 8 + PACKED_PADDING


@dataclass(frozen=True)
class CodeLayout:
    """The shape of a compressed table.

    ``kind`` is ``"additive"`` (a row is the sum of one codeword from each of ``num_subvectors``
    codebooks), ``"product"`` (the concatenation: each codebook covers
    ``embedding_dim / num_subvectors`` columns), ``"rows"`` (no codes: row ``i`` is codeword ``i``
    of the only codebook, stored in ``codebook_dtype``) or ``"shared"`` (no codes: one codeword is
    every row).

    Args:
        kind: see above.
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        num_subvectors: number of codebooks, M.
        codebook_size: codewords in each codebook, K; at most 65,536 except for ``"rows"``.
        codebook_dtype: a floating dtype (trainable) or ``torch.int8`` (frozen, a bfloat16 scale a
            codeword).

    Attributes:
        bits: of one code; 0 where there are none.

    Raises:
        ValueError: numbers that are out of range or do not go together.
        TypeError: numbers that are no integers.

    Example:
        >>> CodeLayout("additive", 100_000, 40, 5, 32, torch.float32).row_bits
        25
    """

    kind: CodeKind
    num_embeddings: int
    embedding_dim: int
    num_subvectors: int
    codebook_size: int
    codebook_dtype: torch.dtype = torch.float32
    # Not a property: torch 2.4 cannot compile what computes it.
    bits: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(CodeKind):
            raise ValueError(f"kind must be one of {get_args(CodeKind)}, got {self.kind!r}")
        for name in ("num_embeddings", "embedding_dim", "num_subvectors", "codebook_size"):
            # numpy's integers would not go into the JSON of a file.
            value = _integer(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST:,}, got {value}")
        if self.kind == "product" and self.embedding_dim % self.num_subvectors:
            raise ValueError(
                f"product codes need num_subvectors to divide embedding_dim, got "
                f"{self.num_subvectors} and {self.embedding_dim}; use a divisor or additive codes"
            )
        if self.kind == "rows" and (self.num_subvectors, self.codebook_size) != (
            1,
            self.num_embeddings,
        ):
            raise ValueError("a table kept as rows has one codebook of num_embeddings codewords")
        if self.kind == "shared" and (self.num_subvectors, self.codebook_size) != (1, 1):
            raise ValueError("a table of one shared row has one codebook of one codeword")
        if self.kind != "rows" and self.codebook_size > 1 << 16:
            raise ValueError(f"codebook_size must be at most 65536, got {self.codebook_size}")
        if self.codebook_dtype is not torch.int8 and not self.codebook_dtype.is_floating_point:
            raise ValueError(f"codebook_dtype must be floating or int8, got {self.codebook_dtype}")
        coded = self.kind not in ("rows", "shared")
        object.__setattr__(self, "bits", bits_for(self.codebook_size) if coded else 0)

    @property
    def row_bits(self) -> int:
        """Bits of all codes of one row."""
        return self.bits * self.num_subvectors

    @property
    def subvector_dim(self) -> int:
        """Columns of one codeword."""
        if self.kind == "product":
            return self.embedding_dim // self.num_subvectors
        return self.embedding_dim

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes, trailing padding included."""
        return packed_bytes(self.num_embeddings, self.row_bits) if self.bits else 0

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the codebooks, scales included."""
        codewords = self.num_subvectors * self.codebook_size
        scales = codewords * SCALE_DTYPE.itemsize if self.codebook_dtype is torch.int8 else 0
        return codewords * self.subvector_dim * self.codebook_dtype.itemsize + scales

    def describe(self) -> str:
        """Short text such as ``additive 5x32``."""
        if self.kind == "rows":
            return f"rows {dtype_name(self.codebook_dtype)}"
        if self.kind == "shared":
            return "one row"
        return f"{self.kind} {self.num_subvectors}x{self.codebook_size}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` reverses it."""
        return {
            "kind": self.kind,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "num_subvectors": self.num_subvectors,
            "codebook_size": self.codebook_size,
            "codebook_dtype": dtype_name(self.codebook_dtype),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodeLayout:
        """The layout that :meth:`to_dict` wrote; fields of later versions are left out."""
        own = {one.name: values[one.name] for one in fields(cls) if one.init}
        return cls(**own | {"codebook_dtype": dtype_from_name(own["codebook_dtype"])})


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8)
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """``"float32"`` -> ``torch.float32``; ValueError for a dtype no table can have."""
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
