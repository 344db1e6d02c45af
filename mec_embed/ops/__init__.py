"""``torch.ops.mec_embed.*``: the lookup as operators on tensors.

``schema`` declares each operator once (schema, fake, autograd); ``reference`` is the plain-torch
implementation that serves every device and that every faster backend is compared with; ``cpu`` is
the C kernel, and ``fast`` the way of whole modules to it; ``gpu`` has the Triton kernels.
"""

from types import ModuleType

import torch

from . import cpu, fast, reference, schema
from .schema import bag, lookup, tiered, tiers

__all__ = ["backends", "bag", "cpu", "fast", "lookup", "reference", "schema", "tiered", "tiers"]


def _import_gpu() -> ModuleType | None:
    """The Triton kernels, serving their operators; None where torch has no GPU or no Triton."""
    if not torch.backends.cuda.is_built():
        return None
    try:
        from . import gpu
    except ImportError:
        return None
    gpu.register()
    return gpu


_gpu = _import_gpu()


def backends() -> dict[str, str]:
    """Which implementation serves each kind of device.

    Example:
        >>> backends()["cuda"]  # where there is no GPU
        'torch'
    """
    return {
        "cpu": "native" if cpu.available() else "torch",
        "cuda": "triton" if _gpu is not None and _gpu.available() else "torch",
    }
