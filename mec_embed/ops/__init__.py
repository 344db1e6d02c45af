"""``torch.ops.mec_embed.*``: the lookup as operators on tensors.

``schema`` declares each operator once (schema, fake, autograd); ``reference`` is the plain-torch
implementation that serves every device and that every faster backend is compared with; ``cpu`` is
the C kernel, and ``fast`` the way of whole modules to it.
"""

from . import cpu, fast, reference, schema
from .schema import bag, lookup, tiers

__all__ = ["backends", "bag", "cpu", "fast", "lookup", "reference", "schema", "tiers"]


def backends() -> dict[str, str]:
    """Which implementation serves each kind of device.

    Example:
        >>> backends()["cuda"]
        'torch'
    """
    return {"cpu": "native" if cpu.available() else "torch", "cuda": "torch"}
