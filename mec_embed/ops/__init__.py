"""``torch.ops.mec_embed.*``: the lookup as operators on tensors.

``schema`` declares each operator once (schema, fake, autograd); ``reference`` is the plain-torch
implementation that serves every device and that every faster backend is compared with; ``cpu`` is
the C kernel.
"""

from typing import Any

import torch
from torch import Tensor

from . import cpu, reference, schema

__all__ = ["backends", "cpu", "lookup", "reference", "schema", "tiers"]


def lookup(input: Tensor, codes: Tensor, codebooks: Tensor, *options: Any) -> Tensor:
    """See :data:`mec_embed.ops.schema.lookup`; takes a short cut where nothing watches.

    The dispatcher and autograd cost more than a lookup of a few rows.
    """
    if cpu.available() and _unwatched(input, codes, codebooks):
        return cpu.lookup(input, codes, codebooks, *options)
    return schema.lookup(input, codes, codebooks, *options)


def tiers(input: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """See :data:`mec_embed.ops.schema.tiers`; takes the same short cut as :func:`lookup`."""
    if cpu.available() and _unwatched(input):
        return cpu.tiers(input, *options)
    return schema.tiers(input, *options)


def _unwatched(*tensors: Tensor) -> bool:
    """Whether plain CPU tensors meet no gradient, compiler, tracer or dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack():
        return False
    gradients = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not (gradients and tensor.requires_grad)
        for tensor in tensors
    )


def backends() -> dict[str, str]:
    """Which implementation serves each kind of device.

    Example:
        >>> backends()["cuda"]
        'torch'
    """
    return {"cpu": "native" if cpu.available() else "torch", "cuda": "torch"}
