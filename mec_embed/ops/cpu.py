"""The operators by the C kernel, for tensors on the CPU; the rest goes to the reference.

The kernel (``mec_embed/native``) is built at install where there is a compiler, and left out
otherwise. It reads float32, float16, bfloat16 and int8 codebooks and sums in float32.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..layout import SCALE_DTYPE, packed_bytes
from . import reference
from .schema import serve

#: Codebooks that the kernel takes.
MOST_CODEBOOKS = 256
#: What :func:`threads_for` counts, below which a second thread costs more than it brings
#: (docs/experiments.md).
THREAD_WORK = 1 << 15
#: Numbers of the kernel for the dtypes of codebooks.
_KINDS = {torch.float32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
#: Dtypes of ids.
ID_DTYPES = (torch.int32, torch.int64)
MODES = {"sum": 0, "mean": 1, "max": 2}
#: ``Table`` and ``Plan`` of the kernel: all fields are int64.
_TABLE_FIELDS = 11
_NO_TABLE = (0,) * _TABLE_FIELDS
_NO_MAP = (0,) * 4


def _import_kernel() -> ModuleType | None:
    try:
        kernel = importlib.import_module("mec_embed._native")
    except ImportError:
        return None
    kernel.share_threads(_open_mp())
    return kernel


def _open_mp() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch runs on, or 0."""
    try:
        # torch's, and not one that another library has brought along.
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


#: The extension module, or None where it was not built.
kernel: Any = _import_kernel()


def available() -> bool:
    """Whether the kernel was built."""
    return kernel is not None


def threads_for(count: int, columns: int) -> int:
    """Threads for so many ids, each of which makes so many entries."""
    return torch.get_num_threads() if count * (columns + 16) >= THREAD_WORK else 1


def table_fields(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    bits: int,
    one_row: bool = False,
) -> tuple[int, ...] | None:
    """``Table`` of the kernel for these tensors; None where the reference must serve."""
    tensors = [codes, codebooks] if scales is None else [codes, codebooks, scales]
    subvectors, size, width = codebooks.shape
    takes = (
        codes.dtype is torch.uint8
        and codebooks.dtype in _KINDS
        and (codebooks.dtype is torch.int8) == (scales is not None)
        and (scales is None or scales.dtype is SCALE_DTYPE)
        and subvectors <= MOST_CODEBOOKS
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
        and (not bits or codes.numel() >= packed_bytes(num_embeddings, bits * subvectors))
        and width * (1 if width == embedding_dim else subvectors) == embedding_dim
    )
    if not takes:
        return None
    return (
        codes.data_ptr(),
        codebooks.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        1 if one_row else num_embeddings,
        bits,
        subvectors,
        size,
        width,
        int(width != embedding_dim),
        _KINDS[codebooks.dtype],
        int(one_row),
    )


def map_fields(
    starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int
) -> tuple[int, ...] | None:
    """The map of the tiers, as the kernel takes it; None where the reference must serve."""
    blocks = -(-num_embeddings // reference.BLOCK_ROWS)
    whole = len(before) == (len(starts) or blocks) and (
        len(starts) or bitmap.numel() == blocks * reference.BLOCK_ROWS // 8
    )
    kinds = starts.dtype, before.dtype, bitmap.dtype
    expected = torch.int64, torch.int64 if len(starts) else torch.int32, torch.uint8
    tensors = starts, before, bitmap
    if not whole or kinds != expected or not all(t.is_cpu and t.is_contiguous() for t in tensors):
        return None
    return bitmap.data_ptr(), len(starts), starts.data_ptr(), before.data_ptr()


def pack_plan(
    num_embeddings: int,
    embedding_dim: int,
    tables: tuple[tuple[int, ...], ...],
    tier_map: tuple[int, ...] = _NO_MAP,
) -> bytes:
    """``Plan`` of the kernel for one table, or for two tiers and their map."""
    both = (*tables, _NO_TABLE, _NO_TABLE)[:2]
    values = (num_embeddings, embedding_dim, len(tables), *both[0], *both[1], *tier_map)
    return struct.pack(f"={len(values)}q", *values)


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
    fields = None
    if kernel is not None and dtype is not torch.float64 and input.dtype in ID_DTYPES:
        fields = table_fields(codes, codebooks, scales, num_embeddings, embedding_dim, bits)
    if fields is None:
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
    plan = pack_plan(num_embeddings, embedding_dim, (fields,))
    zero_id = padding_idx if zero_padding else -1
    out = _rows(plan, input, embedding_dim, zero_id)
    if out is None:
        _refuse(input, num_embeddings, name)
    return out.to(dtype)


def _rows(plan: bytes, input: Tensor, embedding_dim: int, zero_id: int) -> Tensor | None:
    """Rows (*input.shape, embedding_dim) float32 of a plan; None where ids or codes are bad."""
    ids = input.contiguous()
    out = torch.empty((*input.shape, embedding_dim), dtype=torch.float32)
    failed = kernel.rows(
        plan,
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        zero_id,
        out.data_ptr(),
        threads_for(ids.numel(), embedding_dim),
    )
    return None if failed else out


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
    head = tail = tier_map = None
    if kernel is not None and dtype is not torch.float64 and input.dtype in ID_DTYPES:
        # All rows of a tier may be one.
        shape = head_rows, embedding_dim, head_bits, not head_bits and head_codebooks.shape[1] == 1
        head = table_fields(head_codes, head_codebooks, head_scales, *shape)
        shape = tail_rows, embedding_dim, tail_bits, not tail_bits and tail_codebooks.shape[1] == 1
        tail = table_fields(tail_codes, tail_codebooks, tail_scales, *shape)
        tier_map = map_fields(starts, before, bitmap, num_embeddings)
    out = None
    if head is not None and tail is not None and tier_map is not None:
        plan = pack_plan(num_embeddings, embedding_dim, (head, tail), tier_map)
        out = _rows(plan, input, embedding_dim, padding_idx if zero_padding else -1)
    if out is None:
        # It also says what is wrong with ids, codes or the map.
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
    return out.to(dtype)


def _zero_gradient(*shape: int) -> Tensor:
    """Zeros to add to, of what the kernel writes, whatever torch's defaults are."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


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
    fields = None
    total = _zero_gradient(num_subvectors, codebook_size, subvector_dim)
    if kernel is not None and torch.float64 not in (dtype, grad.dtype):
        fields = table_fields(codes, total, None, num_embeddings, embedding_dim, bits)
    if fields is None or input.dtype not in ID_DTYPES:
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
    failed = kernel.gradient(
        pack_plan(num_embeddings, embedding_dim, (fields,)),
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        padding_idx,
        rows.data_ptr(),
        total.data_ptr(),
        threads_for(ids.numel(), embedding_dim),
    )
    if failed:
        _refuse(input, num_embeddings, "")
    return total.to(dtype)


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
    out = None
    if kernel is not None and dtype is not torch.float64 and input.dtype in ID_DTYPES:
        fields = table_fields(codes, codebooks, scales, num_embeddings, embedding_dim, bits)
        if fields is not None:
            plan = pack_plan(num_embeddings, embedding_dim, (fields,))
            out = reduce_bags(
                plan,
                input,
                offsets,
                per_sample_weights,
                embedding_dim,
                padding_idx,
                mode,
                include_last_offset,
            )
    if out is not None:
        return out.to(dtype)
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


class _Bags(NamedTuple):
    """Bags as the kernel takes them; the tensors are contiguous."""

    ids: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    mode: str
    bags: int
    length: int

    def arguments(self, padding_idx: int) -> tuple[int, ...]:
        """What ``read_bags`` of the kernel reads."""
        ids, offsets, weights = self.ids, self.offsets, self.weights
        return (
            ids.data_ptr(),
            ids.element_size(),
            ids.numel(),
            padding_idx,
            0 if offsets is None else offsets.data_ptr(),
            0 if offsets is None else offsets.element_size(),
            self.bags,
            self.length,
            0 if weights is None else weights.data_ptr(),
            MODES[self.mode],
        )


def _bags_of(
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    include_last_offset: bool,
) -> _Bags | None:
    """The bags of a call; None for those that the kernel does not take."""
    if input.dtype not in ID_DTYPES:
        return None
    if per_sample_weights is not None and (
        mode != "sum"
        or per_sample_weights.dtype is not torch.float32
        or per_sample_weights.shape != input.shape
    ):
        return None
    if offsets is None:
        if input.dim() != 2:
            return None
        bags, length = input.shape
    else:
        if input.dim() != 1 or offsets.dim() != 1 or offsets.dtype not in ID_DTYPES:
            return None
        bags, length = len(offsets) - include_last_offset, 0
        # torch refuses these, or reads them as no other call.
        if bags < 1 or (include_last_offset and int(offsets[-1]) != input.numel()):
            return None
        offsets = offsets.contiguous()
    weights = None if per_sample_weights is None else per_sample_weights.detach().contiguous()
    return _Bags(input.contiguous(), offsets, weights, mode, bags, length)


def reduce_bags(
    plan: bytes,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    embedding_dim: int,
    padding_idx: int,
    mode: str,
    include_last_offset: bool,
) -> Tensor | None:
    """Bags (bags, embedding_dim) float32 by the kernel; None for calls that it does not take."""
    bags = _bags_of(input, offsets, per_sample_weights, mode, include_last_offset)
    if bags is None:
        return None
    out = bags.ids.new_empty((bags.bags, embedding_dim), dtype=torch.float32)
    failed = kernel.bags(
        plan,
        *bags.arguments(padding_idx),
        out.data_ptr(),
        threads_for(bags.ids.numel(), embedding_dim),
    )
    return None if failed else out


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
    """Gradient (M, K, subvector_dim) of the codebooks from ``grad`` (bags, embedding_dim)."""
    fields = bags = None
    total = _zero_gradient(num_subvectors, codebook_size, subvector_dim)
    if kernel is not None and torch.float64 not in (dtype, grad.dtype):
        fields = table_fields(codes, total, None, num_embeddings, embedding_dim, bits)
        bags = _bags_of(input, offsets, per_sample_weights, mode, include_last_offset)
    if fields is None or bags is None or grad.shape != (bags.bags, embedding_dim):
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
    lines = grad.float().contiguous()
    failed = kernel.bags_gradient(
        pack_plan(num_embeddings, embedding_dim, (fields,)),
        *bags.arguments(padding_idx),
        lines.data_ptr(),
        total.data_ptr(),
        threads_for(input.numel(), embedding_dim),
    )
    if failed:
        # As the forward pass has refused all of this, there is no name to tell.
        reference.check_offsets(offsets, "")
        reference.check_ids(input, num_embeddings, "")
        raise IndexError(f"offsets do not fit {input.numel()} ids, or codes are damaged")
    return total.to(dtype)


def tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    fields = None
    if kernel is not None and input.dtype in ID_DTYPES:
        fields = map_fields(starts, before, bitmap, num_embeddings)
    if fields is None:
        return reference.tiers(input, starts, before, bitmap, num_embeddings, name)
    ids = input.contiguous()
    popular = torch.empty(input.shape, dtype=torch.bool)
    place = torch.empty(input.shape, dtype=torch.int64)
    failed = kernel.tiers(
        pack_plan(num_embeddings, 0, (), fields),
        ids.data_ptr(),
        ids.element_size(),
        ids.numel(),
        popular.data_ptr(),
        place.data_ptr(),
        threads_for(ids.numel(), 0),
    )
    if failed:
        reference.check_ids(input, num_embeddings, name)
    return popular, place


if available():
    serve("cpu", tiers, tiered, lookup, lookup_backward, bag, bag_backward)
