"""Lookups of whole modules, where nothing watches.

The dispatcher and autograd cost more than a lookup of a few rows, and a model makes dozens of
them. So where plain tensors meet no compiler, tracer or mode, a module goes straight to the C
kernel, if no gradient is to flow, which reads a plan that was packed for its tensors, or to what
launches the kernel for them on a GPU. Anything else, and every call that is to raise an error,
takes the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .schema import (
    GUARDS,
    PLAIN,
    grad_codebooks,
    grads_tiered,
    is_virtual,
    keep_lookup,
    keep_tiered,
)

_compiling = torch.compiler.is_compiling
#: The kernels for tables on a GPU, :mod:`mec_embed.ops.gpu`; None without.
on_gpu: Any = None

if cpu.available():
    cpu.kernel.set_up(
        Tensor,
        torch.int32,
        torch.int64,
        GUARDS,
        torch.is_grad_enabled,
        torch.get_num_threads,
        torch.empty(0, dtype=torch.float32, device="cpu").new_empty,
    )


def fields_of(table: Any) -> tuple[int, ...] | None:
    """A :class:`mec_embed.CompressedEmbedding` as the kernel takes it, or None."""
    values = _values_of(table)
    return None if values is None else cpu.table_fields(*values, table.layout.kind == "shared")


def decoded_on_gpu(table: Any) -> Any:
    """A :class:`mec_embed.CompressedEmbedding` as :class:`mec_embed.ops.gpu.Decoded`, or None."""
    values = _values_of(table)
    return None if values is None else on_gpu.Decoded.of(*values, table.output_dtype.dtype)


def _values_of(table: Any) -> tuple[Tensor, Tensor, Tensor | None, int, int, int] | None:
    """Codes, codebooks, scales, rows, dim and bits of a table; None where tensors are not plain.

    Or codebooks neither parameter nor buffer: parametrized ones, say, are made anew at each access.
    Or those that were computed, as a plan would keep the graph of it.
    """
    layout, books = table.layout, table.codebook_set
    tensors = table.codes, books.codebooks, books.scales
    if not all(type(one) in PLAIN for one in tensors if one is not None):
        return None
    if not ("codebooks" in books._parameters or "codebooks" in books._buffers):
        return None
    if not books.codebooks.is_leaf or is_virtual(books.codebooks):
        return None
    return (*tensors, layout.num_embeddings, layout.embedding_dim, layout.bits)


def _serves_on_gpu(grad: Tensor) -> bool:
    """Whether kernels may sum a gradient, of which none is to be made in turn."""
    if torch.is_grad_enabled() or _compiling() or type(grad) is not Tensor or is_virtual(grad):
        return False
    return not any(guard() for guard in GUARDS)


#: Where tensors are that a plan was packed for: (dict, key, value, its ``data_ptr`` or None, its
#: address) again and again. The dicts are those of modules: ``nn.Module.__getattr__`` takes longer
#: than a lookup; bound methods need not be found by their names.
Places = tuple[Any, ...]


def places_of(table: Any) -> Places:
    """The places of all that a plan for a :class:`mec_embed.CompressedEmbedding` reads."""
    modules, code_table, books = table._modules, table.code_table, table.codebook_set
    holder = books._parameters if "codebooks" in books._parameters else books._buffers
    # Of codes in parts, a plain attribute holds the tensor.
    codes = code_table._buffers if "codes" in code_table._buffers else vars(code_table)
    return (
        *(modules, "code_table", code_table, None, 0),
        *(modules, "codebook_set", books, None, 0),
        *places_in(codes, "codes"),
        *places_in(holder, "codebooks"),
        *places_in(books._buffers, "scales"),
    )


def places_in(tensors: dict[str, Any], *names: str) -> Places:
    """The places of tensors (or None) in a dict of a module."""
    places: list[Any] = []
    for name in names:
        tensor = tensors.get(name)  # codebooks that are computed have no place, nor a plan
        where = None if tensor is None else tensor.data_ptr
        places += [tensors, name, tensor, where, where() if where else 0]
    return tuple(places)


class _TrainedRows(torch.autograd.Function):
    """Rows of a table on a GPU; gradients are those of the operators."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, rows: Any, options: tuple[Any, ...], *codebooks: Tensor
    ) -> Tensor:
        """Decode, and keep what the gradient needs."""
        zero_id, padding_idx, sparse, name = options
        codes, layouts = rows.codes, rows.layouts
        if rows.places is None:
            keep_lookup(ctx, ids, codes[0], codebooks[0], (*layouts[0], padding_idx), sparse)
        else:
            *tier_map, all_rows = rows.places
            head, tail = (
                (*layout, -1, *one.shape, one.dtype)
                for layout, one in zip(layouts, codebooks, strict=True)
            )
            tensors = ids, *tier_map, *codes
            keep_tiered(ctx, tensors, (head, tail), all_rows, padding_idx, sparse, name)
        ctx.table, ctx.padding_idx = rows, padding_idx
        # Whether they serve was asked before.
        out = cpu.kernel.rows_on_gpu((), (), rows.ready, ids, zero_id)
        return out if isinstance(out, Tensor) else rows.prepare(ids, zero_id)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of the codebooks."""
        table, found = ctx.table, None
        # The kernel has no way to leave out a tier that is not trained, and its sums may be large.
        if all(ctx.needs_input_grad[3:]) and _serves_on_gpu(grad):
            found = table.gradients(grad, ctx.saved_tensors[0], ctx.padding_idx)
            if found is not None and ctx.sparse:
                found = [one.to_sparse(2) for one in found]
        if found is None and table.places is None:
            found = [grad_codebooks(ctx, grad)]
        elif found is None:
            found = grads_tiered(ctx, grad, ctx.needs_input_grad[3:])
        return (None, None, None, *found)


#: ``_TrainedRows.apply``, where no transform of ``torch.func`` is at work, which was asked before.
_train: Any = super(torch.autograd.Function, _TrainedRows).apply


#: A plan, the places of what it reads, the codebooks, and the dtype of rows that are not float32.
_Packed = tuple[bytes | None, Places, tuple[Tensor, ...], torch.dtype | None]
_NOTHING_PACKED: _Packed = None, (), (), None


def _are_plain(offsets: Tensor | None, weights: Tensor | None) -> bool:
    """Whether the kernel may read what bags are given beside ids, and no gradient is to flow."""
    others = [tensor for tensor in (offsets, weights) if tensor is not None]
    if not all(type(one) in PLAIN and one.is_cpu for one in others):
        return False
    if weights is None:
        return True
    return not (is_virtual(weights) or (weights.requires_grad and torch.is_grad_enabled()))


class FastPath:
    """The plan of one module, packed anew where its tensors are others than before.

    A copy, or what was unpickled, starts without one.
    """

    __slots__ = ("_packed", "_rows")

    def __init__(self) -> None:
        """Without a plan."""
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return FastPath, ()

    def forget(self) -> None:
        """Drop the plan, as dtypes may have changed."""
        # Each is set, and read, at once: another thread may do so meanwhile, and what belongs to
        # the places holds the tensors that a kernel reads.
        self._packed: _Packed = _NOTHING_PACKED
        self._rows: Any = None

    def rows(self, module: Any, ids: Tensor) -> Tensor | None:
        """Rows (*ids.shape, dim), or None where the operators must serve."""
        if _compiling() or cpu.kernel is None:
            return None
        padding_idx = module.padding_idx
        zero_id = -1 if padding_idx is None or not module.zero_padding else padding_idx
        # Tensors on the CPU may have taken the places of those on a GPU.
        if self._rows is None or getattr(ids, "is_cpu", False):
            plan, places, codebooks, dtype = self._packed
            out = cpu.kernel.fast_rows(plan, places, codebooks, ids, zero_id)
            if out is False:
                return self.rows(module, ids) if self._renew(module) else None
            if out is not None:
                return out if dtype is None else out.to(dtype)
        return self._rows_on_gpu(module, ids, zero_id)

    def _rows_on_gpu(self, module: Any, ids: Tensor, zero_id: int) -> Tensor | None:
        """Rows of a table on a GPU, where ids are not checked; or None."""
        if on_gpu is None or module._oov_row is not None:
            return None
        rows, places, codebooks = self._rows or (None, (), ())
        ready = None if rows is None else rows.ready
        state = cpu.kernel.rows_on_gpu(places, codebooks, ready, ids, zero_id)
        if type(state) is not int:
            return state  # the rows, or None
        if rows is not None and state:
            if not rows.takes(ids):
                return None
            if state == 1:
                return rows.prepare(ids, zero_id)
            padding_idx = -1 if module.padding_idx is None else module.padding_idx
            options = zero_id, padding_idx, module.sparse, module.name
            return _train(ids, rows, options, *codebooks)
        self.forget()
        places = module._places()  # first, as in _renew
        rows = module._rows_on_gpu()
        if rows is None:
            return None
        self._rows = rows, places, tuple(table.codebooks for table in module._tables())
        return self._rows_on_gpu(module, ids, zero_id)

    def bags(
        self, module: Any, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor | None:
        """Bags (bags, dim), or None where the operators must serve."""
        if _compiling() or cpu.kernel is None:
            return None
        plan, places, codebooks, dtype = self._packed
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        last_is_end = module.include_last_offset
        options = padding_idx, cpu.MODES[module.mode], last_is_end
        out = cpu.kernel.fast_bags(plan, places, codebooks, input, offsets, weights, *options)
        if out is False:
            return self.bags(module, input, offsets, weights) if self._renew(module) else None
        if out is True:  # then there is a plan
            if plan is None or not _are_plain(offsets, weights):
                return None
            tensors = input, offsets, weights, module.embedding_dim
            out = cpu.reduce_bags(plan, *tensors, padding_idx, module.mode, last_is_end)
        return out if out is None or dtype is None else out.to(dtype)

    def _renew(self, module: Any) -> bool:
        """Pack the plan; False where the kernel cannot read the tables."""
        self.forget()
        dtype = module._like().dtype
        if dtype is torch.float64:
            return False
        # First: tensors that are replaced meanwhile are not in these places, whatever is packed.
        places = module._places()
        plan = module._pack_plan()
        if plan is None:
            return False
        codebooks = tuple(table.codebooks for table in module._tables())
        self._packed = plan, places, codebooks, None if dtype is torch.float32 else dtype
        return True


class _NoFastPath(FastPath):
    """Of a replica of a module, whose tensors are not in the places of a module's."""

    __slots__ = ()

    def rows(self, module: Any, ids: Tensor) -> None:
        """None: the operators must serve."""

    def bags(
        self, module: Any, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> None:
        """None: the operators must serve."""


NO_FAST_PATH = _NoFastPath()
