"""Declarations of the operators: schema, shape function and derivative, for any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Owns the namespace; backends register their implementations on it.
LIBRARY = torch.library.Library("mec_embed", "DEF")

LIBRARY.define(
    "lookup(Tensor input, Tensor codes, Tensor codebooks, Tensor? scales, int num_embeddings, "
    "int embedding_dim, int bits, int padding_idx, bool zero_padding, bool sparse, "
    "ScalarType dtype, str name) -> Tensor"
)
LIBRARY.define(
    "lookup_backward(Tensor grad, Tensor input, Tensor codes, int num_embeddings, "
    "int embedding_dim, int bits, int padding_idx, int num_subvectors, int codebook_size, "
    "int subvector_dim, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "tiers(Tensor input, Tensor starts, Tensor before, Tensor bitmap, int num_embeddings, "
    "str name) -> (Tensor, Tensor)"
)

#: Decode rows of a compressed table.
#:
#: Args:
#:     input: ids, int32 or int64, any shape.
#:     codes: packed codes, uint8 (bytes,); empty where ``bits`` is 0 (row i is codeword i).
#:     codebooks: (num_subvectors, codebook_size, subvector_dim), floating or int8.
#:     scales: (num_subvectors, codebook_size) with int8 codebooks, else None.
#:     num_embeddings, embedding_dim, bits: see :class:`mec_embed.layout.CodeLayout`.
#:     padding_idx: id whose gradient is dropped, and whose row is zero if ``zero_padding``;
#:         -1 for none.
#:     sparse: give the codebooks a sparse gradient, as ``nn.Embedding(sparse=True)`` does.
#:     dtype: of the output.
#:     name: the table's name, for errors.
#:
#: Returns:
#:     (*input.shape, embedding_dim) of ``dtype``.
lookup = torch.ops.mec_embed.lookup
#: Which tier each row of a table is in, and its place there; see :class:`mec_embed.tiers.TierMap`.
#:
#: Args:
#:     input: ids, int32 or int64, any shape.
#:     starts, before, bitmap: the map.
#:     num_embeddings: rows of the table.
#:     name: the table's name, for errors.
#:
#: Returns:
#:     Whether each id is popular, bool, and its row within its tier, int64; both as ``input``.
tiers = torch.ops.mec_embed.tiers
_lookup_backward = torch.ops.mec_embed.lookup_backward


@torch.library.register_fake("mec_embed::lookup", lib=LIBRARY)
def _(
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
    return codebooks.new_empty((*input.shape, embedding_dim), dtype=dtype)


@torch.library.register_fake("mec_embed::tiers", lib=LIBRARY)
def _(
    input: Tensor, starts: Tensor, before: Tensor, bitmap: Tensor, num_embeddings: int, name: str
) -> tuple[Tensor, Tensor]:
    popular = input.new_empty(input.shape, dtype=torch.bool)
    return popular, input.new_empty(input.shape, dtype=torch.int64)


@torch.library.register_fake("mec_embed::lookup_backward", lib=LIBRARY)
def _(
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
    return grad.new_empty((num_subvectors, codebook_size, subvector_dim), dtype=dtype)


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, codebooks, _, rows, dim, bits, padding_idx, _, sparse, _, _ = inputs
    ctx.save_for_backward(ids, codes)
    ctx.layout = (rows, dim, bits, padding_idx, *codebooks.shape, codebooks.dtype)
    ctx.sparse = sparse


def _differentiate_lookup(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_codebooks = None
    if ctx.needs_input_grad[2]:
        grad_codebooks = _lookup_backward(grad, *ctx.saved_tensors, *ctx.layout)
        if ctx.sparse:
            grad_codebooks = grad_codebooks.to_sparse(2)
    return (None, None, grad_codebooks, *[None] * 9)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, ids, codes, rows, dim, bits, padding_idx, *_ = inputs
    ctx.save_for_backward(ids, codes)
    ctx.layout = (rows, dim, bits, padding_idx)
    ctx.dtype = grad.dtype


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of the codebooks is linear in the gradient of the rows; its transpose is the
    # lookup itself, with the padding row (which passes no gradient) as zero.
    ids, codes = ctx.saved_tensors
    rows = lookup(ids, codes, grad, None, *ctx.layout, True, False, ctx.dtype, "")
    return (rows, *[None] * 10)


torch.library.register_autograd(
    "mec_embed::lookup", _differentiate_lookup, setup_context=_save_lookup, lib=LIBRARY
)
torch.library.register_autograd(
    "mec_embed::lookup_backward",
    _differentiate_backward,
    setup_context=_save_backward,
    lib=LIBRARY,
)
