"""Declarations of the operators: schema, shape function and derivative, for any backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    "bag(Tensor input, Tensor? offsets, Tensor? per_sample_weights, Tensor codes, "
    "Tensor codebooks, Tensor? scales, int num_embeddings, int embedding_dim, int bits, "
    "int padding_idx, str mode, bool include_last_offset, bool sparse, ScalarType dtype, str name) "
    "-> Tensor"
)
LIBRARY.define(
    "bag_backward(Tensor grad, Tensor input, Tensor? offsets, Tensor? per_sample_weights, "
    "Tensor codes, int num_embeddings, int embedding_dim, int bits, int padding_idx, str mode, "
    "bool include_last_offset, int num_subvectors, int codebook_size, int subvector_dim, "
    "ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "tiers(Tensor input, Tensor starts, Tensor before, Tensor bitmap, int num_embeddings, "
    "str name) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "tiered(Tensor input, Tensor starts, Tensor before, Tensor bitmap, Tensor head_codes, "
    "Tensor head_codebooks, Tensor? head_scales, Tensor tail_codes, Tensor tail_codebooks, "
    "Tensor? tail_scales, int num_embeddings, int embedding_dim, int head_rows, int head_bits, "
    "int tail_rows, int tail_bits, int padding_idx, bool zero_padding, bool sparse, "
    "ScalarType dtype, str name) -> Tensor"
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
lookup: Callable[..., Tensor]
#: Decode rows and reduce each bag of them, as ``nn.EmbeddingBag`` does.
#:
#: Args:
#:     input: ids, int32 or int64; (bags, ids), or (ids,) with ``offsets``.
#:     offsets: (bags,) int32 or int64, where each bag starts; one more, the number of ids, with
#:         ``include_last_offset``.
#:     per_sample_weights: as ``input``, of mode ``"sum"``; or None.
#:     padding_idx: id that is left out of its bag; -1 for none.
#:     mode: ``"sum"`` or ``"mean"``.
#:     codes, codebooks, scales, num_embeddings, embedding_dim, bits, sparse, dtype, name: see
#:         :data:`lookup`.
#:
#: Returns:
#:     (bags, embedding_dim) of ``dtype``.
bag: Callable[..., Tensor]
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
tiers: Callable[..., tuple[Tensor, Tensor]]
#: Decode rows of a table in two tiers.
#:
#: Args:
#:     starts, before, bitmap: the map of the tiers, see :data:`tiers`.
#:     head_codes, head_codebooks, head_scales, head_bits: of the popular rows, of which there are
#:         ``head_rows``; of the others with ``tail`` instead. See :data:`lookup`; one codeword and
#:         no codes: all rows of the tier are that one.
#:     input, num_embeddings, embedding_dim, padding_idx, zero_padding, sparse, dtype, name: see
#:         :data:`lookup`.
#:
#: Returns:
#:     (*input.shape, embedding_dim) of ``dtype``.
tiered: Callable[..., Tensor]
#: Gradient of the codebooks, from that of rows (*input.shape, embedding_dim); ids that are
#: ``padding_idx``, be it -1, pass none.
_lookup_backward: Callable[..., Tensor]
_bag_backward: Callable[..., Tensor]


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


@torch.library.register_fake("mec_embed::bag", lib=LIBRARY)
def _(
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
    bags = count_bags(input, offsets, include_last_offset)
    return codebooks.new_empty((bags, embedding_dim), dtype=dtype)


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


@torch.library.register_fake("mec_embed::bag_backward", lib=LIBRARY)
def _(
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
    return grad.new_empty((num_subvectors, codebook_size, subvector_dim), dtype=dtype)


@torch.library.register_fake("mec_embed::tiered", lib=LIBRARY)
def _(
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
    return head_codebooks.new_empty((*input.shape, embedding_dim), dtype=dtype)


#: Keep in a context what the derivative needs of inputs and output; gradients of the inputs.
_Save = Callable[[Any, Sequence[Any], Tensor], None]
_Differentiate = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def _save_lookup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ids, codes, codebooks, _, rows, dim, bits, padding_idx, _, sparse, _, _ = inputs
    keep_lookup(ctx, ids, codes, codebooks, (rows, dim, bits, padding_idx), sparse)


def keep_lookup(
    ctx: Any,
    ids: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    layout: tuple[int, int, int, int],
    sparse: bool,
) -> None:
    """Keep what :func:`grad_codebooks` needs; ``layout``: rows, dim, bits and ``padding_idx``."""
    ctx.save_for_backward(ids, codes)
    ctx.layout = (*layout, *codebooks.shape, codebooks.dtype)
    ctx.sparse = sparse


def grad_codebooks(ctx: Any, grad: Tensor) -> Tensor:
    """Gradient of the codebooks from that of rows, of what :func:`keep_lookup` kept."""
    found = _lookup_backward(grad, *ctx.saved_tensors, *ctx.layout)
    return found.to_sparse(2) if ctx.sparse else found


def _differentiate_lookup(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = grad_codebooks(ctx, grad) if ctx.needs_input_grad[2] else None
    return (None, None, found, *[None] * 9)


def _save_bag(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ids, offsets, weights, codes, codebooks, scales, *options = inputs
    rows, dim, bits, padding_idx, mode, include_last_offset, sparse, _, name = options
    ctx.save_for_backward(ids, offsets, weights, codes, codebooks, scales)
    ctx.layout = (rows, dim, bits, padding_idx)
    ctx.bags = (mode, include_last_offset)
    ctx.sparse, ctx.name = sparse, name


def _differentiate_bag(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, offsets, weights, codes, codebooks, scales = ctx.saved_tensors
    bags = ids, offsets, weights
    grad_codebooks = grad_weights = None
    if ctx.needs_input_grad[4]:
        shape = (*codebooks.shape, codebooks.dtype)
        grad_codebooks = _bag_backward(grad, *bags, codes, *ctx.layout, *ctx.bags, *shape)
        if ctx.sparse:
            grad_codebooks = grad_codebooks.to_sparse(2)
    if ctx.needs_input_grad[2]:
        table = codes, codebooks, scales, ctx.layout, ctx.name
        grad_weights = _grad_weights(grad, *bags, ctx.bags[1], *table)
    return (None, None, grad_weights, None, grad_codebooks, *[None] * 10)


def _grad_weights(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor,
    include_last_offset: bool,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor | None,
    layout: tuple[int, int, int, int],
    name: str,
) -> Tensor:
    """Gradient of the weights of ids: what each row adds to its bag, times that bag's gradient."""
    flat = ids.reshape(-1)
    rows = lookup(flat, codes, codebooks, scales, *layout, True, False, grad.dtype, name)
    found = (rows * grad[owners(ids, offsets, include_last_offset)]).sum(1)
    return (found * flat.ne(layout[-1])).view(weights.shape).to(weights.dtype)


def count_bags(ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> int:
    """The bags of a call."""
    return ids.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)


def owners(ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """The bag (ids,) of each id."""
    place = torch.arange(ids.numel(), device=ids.device)
    if offsets is None:
        return place // max(1, ids.shape[1])
    starts = offsets[:-1] if include_last_offset else offsets
    return torch.searchsorted(starts.long().contiguous(), place, right=True) - 1


def _save_bag_backward(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.layout, ctx.bags = inputs[5:9], inputs[9:11]


def _differentiate_bag_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Linear in the gradient of the bags, as lookup_backward is in that of rows, and in weights.
    given, ids, offsets, weights, codes = ctx.saved_tensors
    bags, table = (ids, offsets, weights), (codes, grad, None)
    grad_given = grad_weights = None
    if ctx.needs_input_grad[0]:
        options = (*ctx.layout, *ctx.bags, False, given.dtype, "")
        grad_given = bag(*bags, *table, *options)
    if ctx.needs_input_grad[3]:
        grad_weights = _grad_weights(given, *bags, ctx.bags[1], *table, ctx.layout, "")
    return (grad_given, None, None, grad_weights, *[None] * 11)


def _save_tiered(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ids, *places, head_codes, head, _, tail_codes, tail, _ = inputs[:10]
    rows, dim, head_rows, head_bits, tail_rows, tail_bits, *options = inputs[10:]
    padding_idx, _, sparse, _, name = options
    layouts = (
        (head_rows, dim, head_bits, -1, *head.shape, head.dtype),
        (tail_rows, dim, tail_bits, -1, *tail.shape, tail.dtype),
    )
    tensors = ids, *places, head_codes, tail_codes
    keep_tiered(ctx, tensors, layouts, rows, padding_idx, sparse, name)


def keep_tiered(
    ctx: Any,
    tensors: Sequence[Tensor],
    layouts: tuple[tuple[Any, ...], tuple[Any, ...]],
    rows: int,
    padding_idx: int,
    sparse: bool,
    name: str,
) -> None:
    """Keep what :func:`grads_tiered` needs.

    Args:
        ctx: of an autograd function.
        tensors: ids, the map of the tiers, codes of the head and of the tail.
        layouts: of both: rows, dim, bits, -1, and shape and dtype of the codebooks.
        rows: of the table.
        padding_idx: of the table.
        sparse: whether gradients are sparse.
        name: the table's name, for errors.
    """
    ctx.save_for_backward(*tensors)
    ctx.layouts, ctx.rows, ctx.padding_idx = layouts, rows, padding_idx
    ctx.sparse, ctx.name = sparse, name


def place_in_tier(place: Tensor, bits: int, size: int) -> Tensor:
    """Rows of a tier as its codes or codewords have them: all are one where it has one codeword."""
    return place.clamp(max=0) if not bits and size == 1 else place


def _differentiate_tiered(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    head, tail = grads_tiered(ctx, grad, (ctx.needs_input_grad[5], ctx.needs_input_grad[8]))
    return (*[None] * 5, head, None, None, tail, *[None] * 12)


def grads_tiered(ctx: Any, grad: Tensor, needed: tuple[bool, bool]) -> list[Tensor | None]:
    """Gradients of head and tail, of what :func:`keep_tiered` kept; None where not needed."""
    ids, starts, before, bitmap, *codes = ctx.saved_tensors
    popular, place = tiers(ids, starts, before, bitmap, ctx.rows, ctx.name)
    none = place.new_full((), -1)
    skipped = ids == ctx.padding_idx if ctx.padding_idx >= 0 or not ids.is_cpu else None
    if not ids.is_cpu:
        # Ids out of range are the nearest row, as for lookup_backward.
        skipped = skipped | (ids.clamp(0, ctx.rows - 1) == ctx.padding_idx)
    grads: list[Tensor | None] = [None, None]
    for tier in range(2):
        if not needed[tier]:
            continue
        _, _, bits, _, _, size, *_ = ctx.layouts[tier]
        own = place_in_tier(place, bits, size)
        own = torch.where(popular, own, none) if tier == 0 else torch.where(popular, none, own)
        if skipped is not None:
            own = own.masked_fill(skipped, -1)
        found = _lookup_backward(grad, own, codes[tier], *ctx.layouts[tier])
        grads[tier] = found.to_sparse(2) if ctx.sparse else found
    return grads


def _save_backward(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    grad, ids, codes, rows, dim, bits, padding_idx, *_ = inputs
    ctx.save_for_backward(ids, codes)
    ctx.layout = (rows, dim, bits, padding_idx)
    ctx.dtype = grad.dtype


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of the codebooks is linear in the gradient of the rows; its transpose is the
    # lookup itself, with the padding row (which passes no gradient) as zero.
    ids, codes = ctx.saved_tensors
    *layout, padding_idx = ctx.layout
    skipped = ids == padding_idx
    table = (codes, grad, None, *layout, -1, False)
    rows = lookup(ids.masked_fill(skipped, 0), *table, False, ctx.dtype, "")
    return (rows.masked_fill(skipped[..., None], 0), *[None] * 10)


def has_tangents() -> bool:
    """Whether derivatives are being computed in forward mode, as ``torch.func.jvp`` does."""
    return forward_ad._current_level >= 0


def _in_functional_grad() -> bool:
    """Whether ``torch.func.grad`` is at work, which takes no autograd function."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Grad


#: Return 0, False or None where no mode, tracer or transform watches.
GUARDS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
    torch._C._functorch.peek_interpreter_stack,
    has_tangents,
)
PLAIN = (Tensor, torch.nn.Parameter)
#: (operator, whether for tensors on a GPU) -> what serves it there.
_SERVING: dict[tuple[str, bool], Callable[..., Any]] = {}
#: Operator -> its plain-torch reference.
_REFERENCES: dict[str, Callable[..., Any]] = {}


def serve_all(*implementations: Callable[..., Any]) -> None:
    """Let functions in plain torch serve the operators of their names where nothing else does."""
    for implementation in implementations:
        LIBRARY.impl(implementation.__name__, implementation, "CompositeExplicitAutograd")
        _REFERENCES[implementation.__name__] = implementation


def serve(device: str, *implementations: Callable[..., Any]) -> None:
    """Let functions serve the operators of their names on a device, ``cpu`` or ``cuda``."""
    for implementation in implementations:
        name = implementation.__name__
        LIBRARY.impl(name, implementation, device.upper())
        _SERVING[name, device == "cuda"] = implementation


def is_virtual(tensor: Tensor) -> bool:
    """Whether the memory of a plain tensor does not hold its values; the dispatcher makes them.

    Those of many gradients at once (``is_grads_batched``), of a part of complex numbers, or zeros.
    """
    return (
        tensor.is_neg()
        or tensor._is_zerotensor()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def _serving(
    name: str, tensors: Sequence[Tensor | None], computed: tuple[int, ...] = ()
) -> Callable[..., Any] | None:
    """What the dispatcher would come to, where there is nothing else it would call on its way.

    The tensors of the numbers ``computed`` may come from anywhere, as gradients do.
    """
    if torch.compiler.is_compiling():
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if type(tensor) not in PLAIN:
            return None
    for number in computed:
        one = tensors[number]
        if one is not None and is_virtual(one):
            return None
    on_gpu = given[0].is_cuda
    for tensor in given:
        if not (tensor.is_cuda if on_gpu else tensor.is_cpu):
            return None
    for guard in GUARDS:
        if guard():
            return None
    return _SERVING.get((name, on_gpu))


def _operator(name: str, tensors: int) -> Callable[..., Any]:
    """An operator without derivative, the first ``tensors`` inputs of which are tensors or None."""
    op = getattr(torch.ops.mec_embed, name)

    def call(*inputs: Any) -> Any:
        return (_serving(name, inputs[:tensors]) or op)(*inputs)

    return call


def _differentiable(
    name: str,
    tensors: int,
    differentiable: tuple[int, ...],
    save: _Save,
    differentiate: _Differentiate,
) -> Callable[..., Tensor]:
    """An operator with a derivative by the inputs of these numbers.

    The dispatcher and autograd take longer than a lookup of a few rows, and a model makes dozens of
    them. So the operator gets an autograd kernel of its own, which takes a third of the time of
    ``torch.library.register_autograd`` (that walks through all arguments, and the schema, in every
    call), and plain tensors that nothing watches go past the dispatcher.
    """
    op = getattr(torch.ops.mec_embed, name)

    def below(keyset: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output: Tensor = op.default.redispatch(
                keyset & torch._C._after_autograd_keyset, *inputs
            )
        return output

    def forward(ctx: Any, *inputs_and_implementation: Any) -> Tensor:
        *inputs, implementation = inputs_and_implementation
        output: Tensor = implementation(*inputs)
        save(ctx, inputs, output)
        return output

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*differentiate(ctx, grad), None)

    # Torch names nodes of the graph, in profiles and errors, by what the class is called at first.
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"mec_embed_{name}", (torch.autograd.Function,), parts)

    def differs(inputs: Sequence[Any]) -> bool:
        if torch.is_grad_enabled():
            for number in differentiable:
                if inputs[number] is not None and inputs[number].requires_grad:
                    return True
        return False

    def kernel(keyset: Any, *inputs: Any) -> Tensor:
        output: Tensor
        if has_tangents() or _in_functional_grad():  # which torch's own operators know
            output = _REFERENCES[name](*inputs)
        elif differs(inputs):
            output = function.apply(*inputs, functools.partial(below, keyset))
        else:
            output = below(keyset, *inputs)
        return output

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)

    def call(*inputs: Any) -> Tensor:
        implementation = _serving(name, inputs[:tensors], differentiable)
        output: Tensor
        if implementation is None:
            output = op(*inputs)
        elif differs(inputs):
            output = function.apply(*inputs, implementation)
        else:
            output = implementation(*inputs)
        return output

    return call


tiers = _operator("tiers", 4)
lookup = _differentiable("lookup", 4, (2,), _save_lookup, _differentiate_lookup)
bag = _differentiable("bag", 6, (2, 4), _save_bag, _differentiate_bag)
tiered = _differentiable("tiered", 10, (5, 8), _save_tiered, _differentiate_tiered)
_lookup_backward = _differentiable(
    "lookup_backward", 3, (0,), _save_backward, _differentiate_backward
)
_bag_backward = _differentiable(
    "bag_backward", 5, (0, 3), _save_bag_backward, _differentiate_bag_backward
)
