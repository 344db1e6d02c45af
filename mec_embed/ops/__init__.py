"""``torch.ops.mec_embed.*``: the lookup as operators on tensors.

``schema`` declares each operator once (schema, fake, autograd); ``reference`` is the plain-torch
implementation that serves every device and that every faster backend is compared with.
"""

from . import reference, schema
from .schema import lookup, tiers

__all__ = ["lookup", "reference", "schema", "tiers"]
