"""The operators by the C kernel, for tensors on the CPU; the rest goes to the reference.

The kernel (``_native.c``) is built at install where there is a compiler, and left out otherwise.
It works on float32 and int8 codebooks and sums in float32; other float codebooks are widened first.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from ..layout import SCALE_DTYPE, packed_bytes
from . import reference
from .schema import LIBRARY

#: Codebooks that the kernel takes.
_MOST_CODEBOOKS = 256
#: Entries of the output below which a second thread costs more than it brings.
_THREAD_ENTRIES = 1 << 16


def _import_kernel() -> ModuleType | None:
    try:
        return importlib.import_module("mec_embed.ops._native")
    except ImportError:
        return None


_kernel = _import_kernel()


def available() -> bool:
    """Whether the kernel was built."""
    return _kernel is not None


def _threads(entries: int) -> int:
    return torch.get_num_threads() if entries >= _THREAD_ENTRIES else 1


def _takes(
    ids: Tensor, codes: Tensor, dtype: torch.dtype, num_embeddings: int, bits: int, books: int
) -> bool:
    """Whether the kernel computes this as exactly as the reference."""
    return (
        dtype is not torch.float64
        and ids.dtype in (torch.int32, torch.int64)
        and books <= _MOST_CODEBOOKS
        and codes.is_contiguous()
        and (not bits or codes.numel() >= packed_bytes(num_embeddings, bits * books))
    )


def _table(
    ids: Tensor,
    num_embeddings: int,
    codes: Tensor,
    bits: int,
    codebooks: tuple[int, int, int],
    embedding_dim: int,
) -> tuple[int, ...]:
    """What the kernel is told first, of contiguous ids and codebooks of shape (M, K, width)."""
    return (
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        num_embeddings,
        codes.data_ptr(),
        bits,
        *codebooks,
        int(codebooks[2] != embedding_dim),
    )


def _refuse(ids: Tensor, num_embeddings: int, name: str) -> NoReturn:
    """The error for what the kernel would not read."""
    reference.check_ids(ids, num_embeddings, name)
    raise IndexError(
        f"table {name!r}: its codes name codewords that its codebooks do not have; they are "
        "damaged: load the model again"
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
    num_subvectors = len(codebooks)
    other = codebooks.dtype is torch.float64 or (scales is not None and scales.dtype != SCALE_DTYPE)
    if (
        _kernel is None
        or other
        or not _takes(input, codes, dtype, num_embeddings, bits, num_subvectors)
    ):
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
    ids = input.contiguous()
    narrow = codebooks.dtype is torch.int8
    words = codebooks.contiguous() if narrow else codebooks.float().contiguous()
    scales = scales.contiguous() if scales is not None else None
    out = torch.empty((*input.shape, embedding_dim), dtype=torch.float32)
    failed = _kernel.lookup(
        *_table(ids, num_embeddings, codes, bits, (*codebooks.shape,), embedding_dim),
        words.data_ptr(),
        int(narrow),
        0 if scales is None else scales.data_ptr(),
        padding_idx if zero_padding else -1,
        out.data_ptr(),
        _threads(out.numel()),
    )
    if failed is not None:
        _refuse(input, num_embeddings, name)
    return out if dtype is torch.float32 else out.to(dtype)


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
    """Gradient (M, K, subvector_dim) of the codebooks from ``grad`` (*input.shape, dim)."""
    wide = torch.float64 in (dtype, grad.dtype)
    if (
        _kernel is None
        or wide
        or not _takes(input, codes, dtype, num_embeddings, bits, num_subvectors)
    ):
        return reference.lookup_backward(
            grad,
            input,
            codes,
            num_embeddings,
            embedding_dim,
            bits,
            padding_idx,
            num_subvectors,
            codebook_size,
            subvector_dim,
            dtype,
        )
    ids, rows = input.contiguous(), grad.float().contiguous()
    total = torch.zeros(num_subvectors, codebook_size, subvector_dim)
    shape = num_subvectors, codebook_size, subvector_dim
    failed = _kernel.lookup_backward(
        *_table(ids, num_embeddings, codes, bits, shape, embedding_dim),
        rows.data_ptr(),
        padding_idx,
        total.data_ptr(),
        _threads(rows.numel()),
    )
    if failed is not None:
        _refuse(input, num_embeddings, "")
    return total.to(dtype)


def tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    blocks = -(-num_embeddings // reference.BLOCK_ROWS)
    whole = len(before) == (len(starts) or blocks) and (
        len(starts) or bitmap.numel() == blocks * reference.BLOCK_ROWS // 8
    )
    kinds = starts.dtype, before.dtype, bitmap.dtype
    expected = torch.int64, torch.int64 if len(starts) else torch.int32, torch.uint8
    if (
        _kernel is None
        or not whole
        or kinds != expected
        or not (starts.is_contiguous() and before.is_contiguous() and bitmap.is_contiguous())
        or input.dtype not in (torch.int32, torch.int64)
    ):
        return reference.tiers(input, starts, before, bitmap, num_embeddings, name)
    ids = input.contiguous()
    popular = torch.empty(input.shape, dtype=torch.bool)
    place = torch.empty(input.shape, dtype=torch.int64)
    failed = _kernel.tiers(
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        num_embeddings,
        bitmap.data_ptr(),
        len(starts),
        starts.data_ptr(),
        before.data_ptr(),
        popular.data_ptr(),
        place.data_ptr(),
        _threads(ids.numel()),
    )
    if failed is not None:
        reference.check_ids(input, num_embeddings, name)
    return popular, place


if available():
    LIBRARY.impl("tiers", tiers, "CPU")
    LIBRARY.impl("lookup", lookup, "CPU")
    LIBRARY.impl("lookup_backward", lookup_backward, "CPU")
