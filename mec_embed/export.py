"""Exported models without this package's operators: for ONNX, AOTInductor and other compilers.

An exported program calls ``torch.ops.mec_embed.*``. Whatever runs it without Python knows nothing
of them, so :func:`decompose` replaces them by gathers, shifts, masks and sums of plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

from .ops.reference import BLOCK_ROWS, count_ones, tiered

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2  # as torch.embedding_bag counts its modes


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program in plain PyTorch operators.

    Bags, those of ``nn.EmbeddingBag`` too, become differences of running sums (an infinite number
    in a row spoils the bags after it): their ONNX form would otherwise be a loop over the bags, as
    it still is for maxima.

    Nothing checks the ids: out of range, they give the numbers of any row, or an error where
    something outside a tensor would be read (onnxruntime and AOTInductor look). Check them before,
    or name a row for them: :attr:`mec_embed.modules.DecodedTable.oov_row`.

    The program is for inference: export it under ``torch.no_grad()``.

    Args:
        program: of a model with compressed tables, by ``torch.export.export``, with any dynamic
            shapes.

    Returns:
        A new program; ``program`` stays as it is.

    Raises:
        TypeError: no exported program.

    Example:
        >>> with torch.no_grad():  # doctest: +SKIP
        ...     program = torch.export.export(model.eval(), (ids,))
        >>> torch.onnx.export(decompose(program)).save("model.onnx")  # doctest: +SKIP
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program must be an ExportedProgram, got {type(program).__name__}; export the model "
            "with torch.export.export() first"
        )
    own = torch.ops.mec_embed
    return program.run_decompositions(
        {
            own.lookup.default: _lookup,
            own.bag.default: _bag,
            own.tiers.default: _tiers,
            own.tiered.default: tiered,  # calls the operators above, which are replaced in turn
            aten.embedding_bag.padding_idx: _embedding_bag,
        }
    )


def _lookup(
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
    ids = input.long()
    compute = torch.promote_types(dtype, torch.float32)
    subvectors, size, width = codebooks.shape
    place = ids[..., None]
    if bits:
        first = torch.arange(subvectors, device=ids.device) * size
        place = _unpack(codes, subvectors, bits, ids) + first
    # Gathered before they become floats: the constants of the program stay as small as the table.
    words = torch.embedding(codebooks.view(-1, width), place).to(compute)
    if scales is not None:
        words = words * _take(scales, place).to(compute)
    rows = words.sum(-2) if width == embedding_dim else words.flatten(-2)
    if padding_idx >= 0 and zero_padding:
        rows = rows.masked_fill((ids == padding_idx)[..., None], 0)
    return rows.to(dtype)


def _unpack(packed: Tensor, subvectors: int, bits: int, ids: Tensor) -> Tensor:
    """Codes (*ids.shape, subvectors) int64, as :func:`mec_embed.packing.unpack`."""
    place = ids[..., None] * subvectors + torch.arange(subvectors, device=ids.device)
    if bits == 8:
        return _take(packed, place).squeeze(-1).long()
    position = place * bits
    byte = _shifted(position, 3)
    if 8 % bits == 0:  # no code crosses into the next byte
        word = _take(packed, byte).float()
    else:
        steps = torch.arange(2 if bits <= 9 else 3, device=ids.device)
        word = _take(packed, byte[..., None] + steps).float() * 256.0 ** steps[:, None]
        word = word.sum(-2)
    power = 0.5 ** torch.arange(8, device=ids.device)
    codes = (word * _take(power, position & 7)).long() & ((1 << bits) - 1)
    return codes.squeeze(-1)


# The export to ONNX makes one step of each of these, of ``values[place]`` and ``>>`` some ten.


def _take(values: Tensor, place: Tensor) -> Tensor:
    """Entries (*place.shape, 1) at places in the flat form of ``values``."""
    return torch.embedding(values.view(-1, 1), place)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2**53, shifted right; a product with a power of two does not round."""
    return (values.double() * 0.5**bits).long()


def _tiers(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`."""
    ids = input.long()
    if bitmap.shape[0]:
        return _tiers_by_bitmap(ids, before, bitmap)
    run = (ids[..., None] >= starts).sum(-1) - 1
    even = torch.arange(starts.shape[0], device=ids.device) % 2 == 0
    # Rows of the other tier before a run, which is popular where its number is even.
    others = torch.where(even, starts - before, before)
    return (run & 1) == 0, ids - _take(others, run).squeeze(-1)


def _tiers_by_bitmap(ids: Tensor, before: Tensor, bitmap: Tensor) -> tuple[Tensor, Tensor]:
    """Popular rows before an id: those before its block, and the bits before its own there."""
    device = ids.device
    block, place = _shifted(ids, BLOCK_ROWS.bit_length() - 1), ids & (BLOCK_ROWS - 1)
    bytes_ = torch.embedding(bitmap.view(-1, BLOCK_ROWS // 8), block).long()
    # Of a byte that starts at bit s, the lowest ``place - s`` bits are before the place.
    kept = (place[..., None] - torch.arange(0, BLOCK_ROWS, 8, device=device)).clamp(0, 8)
    earlier = bytes_ & _take((1 << torch.arange(9, device=device)) - 1, kept).squeeze(-1)
    ones = count_ones(torch.arange(256, device=device))
    rank = _take(before, block).squeeze(-1) + _take(ones, earlier).sum((-2, -1))
    own = _take(bitmap, _shifted(ids, 3)).long()
    popular = (own & _take(1 << torch.arange(8, device=device), ids & 7)).squeeze(-1) > 0
    return popular, torch.where(popular, rank, ids - rank)


def _bag(
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
    options = (codes, codebooks, scales, num_embeddings, embedding_dim, bits, -1, False)
    rows = _lookup(input, *options, sparse, dtype, name)
    if offsets is not None:
        number = _SUM if mode == "sum" else _MEAN
        bags = (offsets, include_last_offset, number, per_sample_weights, padding_idx)
        return _reduce(rows, input, *bags)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    kept = (input != padding_idx)[..., None]
    total = rows.masked_fill(~kept, 0).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.embedding_bag``; of its four results only the first is used by any module."""
    skipped = -1 if padding_idx is None else padding_idx
    if mode == _MAX:
        # No gathers find a maximum. The export to ONNX takes -1 for the last row: so add one.
        options = (scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        padded = functional.pad(weight, (0, 0, 0, 1))
        return aten._embedding_bag(padded, indices, offsets, *options, skipped)
    rows = torch.embedding(weight, indices)
    bags = (offsets, include_last_offset, mode, per_sample_weights, skipped)
    unused = offsets.new_empty(0)
    return _reduce(rows, indices, *bags), unused, unused, unused


def _reduce(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    include_last_offset: bool,
    mode: int,
    weights: Tensor | None,
    padding_idx: int,
) -> Tensor:
    """Bags (bags, dim) of rows (ids, dim) as differences of running sums.

    Not by ``index_add``: the inductor of torch 2.13 may read its result before the rows are added
    (as in pytorch#198270).
    """
    if weights is not None:
        rows = rows * weights[:, None]
    kept = (ids != padding_idx)[:, None]
    total = _sum_bags(rows.masked_fill(~kept, 0), offsets, include_last_offset)
    if mode == _MEAN:
        total = total / _sum_bags(kept, offsets, include_last_offset).clamp(min=1)
    return total.to(rows.dtype)


def _sum_bags(rows: Tensor, offsets: Tensor, include_last_offset: bool) -> Tensor:
    """Sums (bags, dim) float64: in float32, differences of running sums would lose digits."""
    before = functional.pad(rows.double().cumsum(0), (0, 0, 1, 0))
    bounds = torch.embedding(before, offsets)
    if not include_last_offset:
        bounds = torch.cat([bounds, before[-1:]])
    return bounds[1:] - bounds[:-1]
