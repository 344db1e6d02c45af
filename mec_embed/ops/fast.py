"""Lookups of whole modules by the C kernel, where nothing watches.

The dispatcher and autograd cost more than a lookup of a few rows, and a model makes dozens of
them. So where plain CPU tensors meet no gradient, compiler, tracer or mode, a module goes straight
to the kernel, which reads a plan that was packed for its tensors. Anything else, and every call
that is to raise an error, takes the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import cpu

_compiling = torch.compiler.is_compiling
#: Return 0, False or None where no mode, tracer or transform watches.
_GUARDS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
    torch._C._functorch.peek_interpreter_stack,
)
_PLAIN = (Tensor, nn.Parameter)

if cpu.available():
    cpu.kernel.set_up(
        Tensor,
        torch.int32,
        torch.int64,
        _GUARDS,
        torch.is_grad_enabled,
        torch.get_num_threads,
        torch.empty(0, dtype=torch.float32, device="cpu").new_empty,
    )


def fields_of(table: Any) -> tuple[int, ...] | None:
    """A :class:`mec_embed.CompressedEmbedding` as the kernel takes it, or None."""
    layout, books = table.layout, table.codebook_set
    codes, words, scales = table.codes, books.codebooks, books.scales
    if not all(type(one) in _PLAIN for one in (codes, words, scales) if one is not None):
        return None
    return cpu.table_fields(
        codes,
        words,
        scales,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        layout.kind == "shared",
    )


class FastPath:
    """The plan of one module, packed anew where its tensors are others than before.

    A copy, or what was unpickled, starts without one.
    """

    __slots__ = ("_dtype", "_plan")

    def __init__(self) -> None:
        """Without a plan."""
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return FastPath, ()

    def forget(self) -> None:
        """Drop the plan, as dtypes may have changed."""
        self._plan: bytes | None = None
        self._dtype: torch.dtype | None = None

    def rows(self, module: Any, ids: Tensor) -> Tensor | None:
        """Rows (*ids.shape, dim), or None where the operators must serve."""
        if _compiling() or not cpu.available():
            return None
        padding_idx = module.padding_idx
        zero_id = -1 if padding_idx is None or not module.zero_padding else padding_idx
        out = cpu.kernel.fast_rows(self._plan, module, ids, zero_id)
        if out is False:
            if not self._renew(module):
                return None
            out = cpu.kernel.fast_rows(self._plan, module, ids, zero_id)
        return out if out is None or self._dtype is None else out.to(self._dtype)

    def bags(
        self, module: Any, input: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> Tensor | None:
        """Bags (bags, dim), or None where the operators must serve."""
        if _compiling() or not cpu.available():
            return None
        others = [tensor for tensor in (offsets, weights) if tensor is not None]
        if not all(type(one) in _PLAIN and one.is_cpu for one in others):
            return None
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            return None
        ready = cpu.kernel.check(self._plan, module, input)
        if ready is False and self._renew(module):
            ready = cpu.kernel.check(self._plan, module, input)
        if ready is not True or self._plan is None:
            return None
        out = cpu.reduce_bags(
            self._plan,
            input,
            offsets,
            weights,
            module.embedding_dim,
            -1 if module.padding_idx is None else module.padding_idx,
            module.mode,
            module.include_last_offset,
        )
        return out if out is None or self._dtype is None else out.to(self._dtype)

    def _renew(self, module: Any) -> bool:
        """Pack the plan; False where the kernel cannot read the tables."""
        self.forget()
        dtype = module._like().dtype
        if dtype is torch.float64:
            return False
        self._plan = module._pack_plan()
        self._dtype = None if dtype is torch.float32 else dtype
        return self._plan is not None
