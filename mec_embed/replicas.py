"""Ids that every rank holds as a DTensor, as the hooks of ``parallelize_module`` give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .shards import is_dtensor


def any_dtensor(*values: Any) -> bool:
    """Whether one of them is a DTensor; costs plain tensors next to nothing."""
    for value in values:  # a generator would take a microsecond
        if type(value) is not Tensor and is_dtensor(value):
            return True
    return False


def takes_dtensors(module: nn.Module) -> bool:
    """Whether a hook of ``parallelize_module`` makes its ids DTensors."""
    homes = (getattr(hook, "__module__", "") for hook in module._forward_pre_hooks.values())
    return any(str(home).startswith("torch.distributed.tensor") for home in homes)


def on_replicas(look_up: Callable[..., Tensor], name: str, *values: Any) -> Tensor:
    """What ``look_up`` gives for values of which some are DTensors.

    Every rank looks all ids up, so that codebooks get the whole gradient on each, and the same one
    if what follows is the same.

    Args:
        look_up: takes plain tensors.
        name: of the table, for errors.
        values: ids, and what belongs to them: tensors or None, at least one of them a DTensor.

    Returns:
        A DTensor that every rank holds as a whole.

    Raises:
        ValueError: a DTensor of which a rank holds only a part.
    """
    from torch.distributed.tensor import DTensor, Replicate

    given = [value for value in values if any_dtensor(value)]
    for value in given:
        if not all(placement.is_replicate() for placement in value.placements):
            raise ValueError(
                f"table {name!r}: ids are a DTensor placed as {tuple(value.placements)}, expected "
                "Replicate() on every dimension of its mesh, as every rank holds the whole table; "
                "redistribute them, or look the rank's own ids up (to_local())"
            )
    local = [value.to_local() if any_dtensor(value) else value for value in values]
    mesh = given[0].device_mesh
    # Nothing is exchanged: all ranks have looked up the same.
    return DTensor.from_local(look_up(*local), mesh, [Replicate()] * mesh.ndim, run_check=False)
