"""The operators in plain torch: any device, any dtype; what faster backends are tested against."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import unpack
from .schema import has_tangents, owners, place_in_tier, serve_all


def check_ids(ids: Tensor, num_embeddings: int, name: str) -> None:
    """Raise for ids that are no row of the table.

    Off the CPU the range is not checked: that would make the host wait for the device. Nor is it
    where ``torch.vmap`` runs: torch's own operators refuse those.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"table {name!r}: ids must be int32 or int64, got {ids.dtype}")
    if ids.device.type != "cpu" or not ids.numel() or _is_batched(ids):
        return
    low, high = ids.aminmax()
    if low < 0 or high >= num_embeddings:
        found = int(low) if low < 0 else int(high)
        raise IndexError(
            f"table {name!r}: id {found} is out of range, expected 0..{num_embeddings - 1}; "
            "map unknown ids to a row of the table before the lookup"
        )


def _is_batched(ids: Tensor) -> bool:
    """Whether these are ids of one of many calls that ``torch.vmap`` makes at once."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(ids):
        ids = functorch.get_unwrapped(ids)
    return functorch.is_batchedtensor(ids)


def check_offsets(offsets: Tensor | None, name: str) -> None:
    """Raise for a bag that ends before it begins: torch would read outside of its ids.

    Torch itself refuses offsets of another shape, that do not begin with 0, or that end after the
    ids. Off the CPU, and in what is compiled, nothing is checked.
    """
    if offsets is None or offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets.dim() != 1:
        return
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        bag = int(falls.nonzero()[0])
        before, after = offsets[bag : bag + 2].tolist()
        raise ValueError(
            f"table {name!r}: offsets go from {before} to {after} at bag {bag}, expected that they "
            "never fall; give the number of ids before each bag"
        )


def _flat_codes(ids: Tensor, codes: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Positions (n, M) of each id's codewords among the M * K codewords of all codebooks."""
    if bits == 0:
        return ids[:, None]
    num_subvectors, codebook_size, _ = shape
    first = torch.arange(num_subvectors, device=ids.device) * codebook_size
    return unpack(codes, num_subvectors, bits, ids) + first


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are made in at least float32."""
    return torch.promote_types(dtype, torch.float32)


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
    check_ids(input, num_embeddings, name)
    ids = input.reshape(-1).long()
    flat = _flat_codes(ids, codes, bits, codebooks.shape)
    compute = _compute_dtype(dtype)
    if bits == 0:
        # A table kept as rows may be large: decode only what is asked for.
        rows = codebooks[0][ids].to(compute)
        if scales is not None:
            rows = rows * scales[0][ids].to(compute)[:, None]
    else:
        words = codebooks.flatten(0, 1).to(compute)
        if scales is not None:
            words = words * scales.flatten().to(compute)[:, None]
        if words.shape[1] == embedding_dim:
            rows = _sum_words(flat, words)
        else:
            rows = F.embedding(flat, words).flatten(1)
    rows = _without_padding(rows, ids, padding_idx, zero_padding)
    return rows.to(dtype).view(*input.shape, embedding_dim)


def _without_padding(rows: Tensor, ids: Tensor, padding_idx: int, zero_padding: bool) -> Tensor:
    """Rows (..., dim) of ids (...): that of ``padding_idx`` without derivative, or zeros."""
    if padding_idx < 0:
        return rows
    padding = (ids == padding_idx)[..., None]
    if zero_padding:
        return rows.masked_fill(padding, 0)
    if rows.requires_grad or has_tangents():  # else the operator's derivative sees to it
        return torch.where(padding, rows.detach(), rows)
    return rows


def _sum_words(flat: Tensor, words: Tensor) -> Tensor:
    """Sums (n, dim) of codewords (words, dim) by their places ``flat`` (n, M)."""
    if has_tangents():  # embedding_bag knows no forward mode
        first, *others = F.embedding(flat, words).unbind(1)
        return functools.reduce(torch.add, others, first)
    return F.embedding_bag(flat, words, mode="sum")


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
    ids = input.reshape(-1).long()
    shape = torch.Size((num_subvectors, codebook_size, subvector_dim))
    skipped = ids == padding_idx
    flat = _flat_codes(ids.masked_fill(skipped, 0), codes, bits, shape)
    rows = grad.reshape(-1, embedding_dim).to(_compute_dtype(dtype))
    rows = rows.masked_fill(skipped[:, None], 0)
    total = rows.new_zeros(num_subvectors * codebook_size, subvector_dim)
    parts = rows.view(len(ids), embedding_dim // subvector_dim, subvector_dim)
    for m in range(num_subvectors):
        total.index_add_(0, flat[:, m], parts[:, m if parts.shape[1] > 1 else 0])
    return total.view(shape).to(dtype)


def shares(
    grad: Tensor,
    ids: Tensor,
    owner: Tensor,
    per_sample_weights: Tensor | None,
    padding_idx: int,
    mode: str,
) -> Tensor | None:
    """What part (ids,) of the gradient of its bag each id gets, in any dtype; None: all of it."""
    if per_sample_weights is not None:
        return per_sample_weights.reshape(-1)
    if mode != "mean":
        return None
    # Half precision does not count that far.
    wide = torch.promote_types(grad.dtype, torch.float32)
    kept = ids.ne(padding_idx).to(wide)
    members = grad.new_zeros(len(grad), dtype=wide).index_add(0, owner, kept)
    return members.clamp(min=1).reciprocal()[owner]


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
    ids = input.reshape(-1)
    owner = owners(input, offsets, include_last_offset)
    share = shares(grad, ids, owner, per_sample_weights, padding_idx, mode)
    rows = grad[owner]
    if share is not None:
        rows = rows * share[:, None].to(rows.dtype)
    layout = (num_embeddings, embedding_dim, bits, padding_idx)
    shape = (num_subvectors, codebook_size, subvector_dim)
    # The operator: rows may have a faster way than bags.
    found: Tensor = torch.ops.mec_embed.lookup_backward(rows, ids, codes, *layout, *shape, dtype)
    return found


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
    check_offsets(offsets, name)
    rows = lookup(
        input.reshape(-1),
        codes,
        codebooks,
        scales,
        num_embeddings,
        embedding_dim,
        bits,
        padding_idx,
        False,
        sparse,
        dtype,
        name,
    )
    return reduce_rows(
        rows, input, offsets, per_sample_weights, padding_idx, mode, include_last_offset
    )


def reduce_rows(
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    padding_idx: int,
    mode: str,
    include_last_offset: bool,
) -> Tensor:
    """Reduce the rows (ids, dim) of ``input``, bag by bag; the rest as :func:`bag`."""
    place = torch.arange(input.numel(), dtype=input.dtype, device=input.device).view(input.shape)

    def reduced(values: Tensor, mode: str, weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            place,
            values,
            offsets,
            mode=mode,
            per_sample_weights=weights,
            include_last_offset=include_last_offset,
        )

    if not input.numel():  # embedding_bag refuses a table without rows
        rows = F.pad(rows, (0, 0, 0, 1))
    if padding_idx < 0 or not input.numel():
        return reduced(rows, mode, per_sample_weights)
    # embedding_bag's padding_idx would make the number of ids a constant of compiled graphs.
    skipped = input.reshape(-1, 1) == padding_idx
    if mode == "sum":
        return reduced(rows.masked_fill(skipped, 0), mode, per_sample_weights)
    members = reduced((~skipped).to(rows.dtype), "sum")
    if mode == "max":
        largest = reduced(rows.masked_fill(skipped, float("-inf")), mode)
        return largest.masked_fill(members == 0, 0)
    return reduced(rows.masked_fill(skipped, 0), "sum") / members.clamp(min=1)


#: Rows that share one count of the popular rows before them, in maps by bitmap.
BLOCK_ROWS = 128


def tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    check_ids(input, num_embeddings, name)
    ids = input.reshape(-1).long()
    if len(bitmap):
        popular, place = _tiers_by_bitmap(ids, before, bitmap)
    else:
        popular, place = _tiers_by_runs(ids, starts, before)
    return popular.view(input.shape), place.view(input.shape)


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
    popular, place = torch.ops.mec_embed.tiers(input, starts, before, bitmap, num_embeddings, name)
    options = (-1, False, sparse, dtype, name)
    found = []
    for others, codes, books, scales, rows, bits in (
        (~popular, head_codes, head_codebooks, head_scales, head_rows, head_bits),
        (popular, tail_codes, tail_codebooks, tail_scales, tail_rows, tail_bits),
    ):
        own = place_in_tier(place, bits, books.shape[1]).masked_fill(others, 0)
        # The operator: it may have a faster way.
        table = (codes, books, scales, rows, embedding_dim, bits)
        found.append(torch.ops.mec_embed.lookup(own, *table, *options))
    out = torch.where(popular[..., None], found[0], found[1])
    return _without_padding(out, input, padding_idx, zero_padding)


def _tiers_by_runs(ids: Tensor, starts: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of rows are popular and unpopular in turn, the first is popular (and may be empty)."""
    run = (ids[..., None] >= starts).sum(-1) - 1
    popular = run % 2 == 0
    # Of the rows before the run, those not popular are the others.
    ahead = torch.where(popular, starts[run] - before[run], before[run])
    return popular, ids - ahead


def _tiers_by_bitmap(ids: Tensor, before: Tensor, bitmap: Tensor) -> tuple[Tensor, Tensor]:
    """One bit a row, and for each block of rows the number of popular rows before it."""
    block, place = ids // BLOCK_ROWS, ids % BLOCK_ROWS
    own = bitmap.view(-1, BLOCK_ROWS // 8)[block].int()
    byte, bit = (place // 8)[..., None], (place % 8)[..., None]
    number = torch.arange(BLOCK_ROWS // 8, device=ids.device)
    partial = (1 << bit) - 1
    earlier = torch.where(number < byte, 255, torch.where(number == byte, partial, 0))
    rank = before[block] + count_ones(own & earlier.int()).sum(-1)
    popular = ((own.gather(-1, byte)[..., 0] >> bit[..., 0]) & 1).bool()
    return popular, torch.where(popular, rank, ids - rank)


def count_ones(byte: Tensor) -> Tensor:
    """Number of bits that are set in integers below 256."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


serve_all(lookup, bag, tiers, lookup_backward, bag_backward, tiered)
