"""What else holds the tables of a model: the place where integrations of frameworks plug in.

A framework's model may keep its optimizer, lists of parameters or paths of checkpoints beside its
modules. An adapter knows these for one kind of module; every swap asks all adapters about every
module, so that the generic :func:`mec_embed.compress` is right for every framework.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .shards import Part

#: (old module, new module) for every table that a swap replaces.
Swapped = Sequence[tuple[nn.Module, nn.Module]]
Undo = Callable[[], None]


@dataclass(frozen=True)
class Unsharded:
    """A plain module that does what a sharded one does.

    Attributes:
        module: the plain module; its sharded tables hold no values.
        parts: of these, by name: the dense module and what this rank holds of its rows.
    """

    module: nn.Module
    parts: Mapping[str, tuple[nn.Module, Part]]


class Adapter(ABC):
    """Knows what modules of one kind hold beside their submodules; the base knows nothing."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter knows ``module``; must not import the framework."""

    def check(self, module: nn.Module, name: str) -> None:  # noqa: B027
        """ValueError where a model that holds ``module`` cannot be compressed."""

    def unshard(self, module: nn.Module, name: str) -> Unsharded | None:
        """What takes the place of a sharded module; None for others; ValueError if it cannot."""
        return None

    def optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        """Optimizers that ``module`` holds."""
        return []

    def beside(self, module: nn.Module) -> list[object]:
        """What ``module`` holds of tables beside its submodules, and :meth:`follow` sees to."""
        return []

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        """After a swap: let what ``module`` holds beside follow; returns how to undo that."""
        return do_nothing


def do_nothing() -> None:
    """Undoes nothing."""


#: All adapters; modules of :mod:`mec_embed.integrations` add theirs.
ADAPTERS: list[Adapter] = []


def adapted(model: nn.Module) -> Iterator[tuple[Adapter, nn.Module, str]]:
    """(adapter, module, qualified name) for every module that an adapter knows."""
    for name, module in model.named_modules():
        for adapter in ADAPTERS:
            if adapter.matches(module):
                yield adapter, module, name


def held_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers that modules of the model hold."""
    return [one for adapter, module, _ in adapted(model) for one in adapter.optimizers(module)]


def has_base(module: nn.Module, package: str, *names: str) -> bool:
    """Whether the module's class or a base of it is one of ``names`` from ``package``."""
    return any(
        base.__name__ in names and base.__module__.split(".")[0] == package
        for base in type(module).__mro__
    )


#: As a value for :func:`set_attributes`: delete the attribute.
DELETE = object()


def set_attributes(owner: object, **values: object) -> Undo:
    """Set or delete plain attributes of an object; returns how to put the old ones back."""
    held = vars(owner)
    before = {name: held[name] for name in values if name in held}
    for name, value in values.items():
        if value is DELETE:
            held.pop(name, None)
        else:
            held[name] = value

    def undo() -> None:
        for name in values:
            held.pop(name, None)
        held.update(before)

    return undo
