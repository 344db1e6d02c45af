"""Sharded modules of frameworks give way to plain ones while their tables are compressed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from .adapters import Unsharded, adapted
from .ranks import Ranks
from .shards import Part, Shard, shards_of
from .swap import optimizer_groups
from .tables import EMBEDDINGS, Alias, Table, find_modules

logger = logging.getLogger("mec_embed")


class Standing:
    """The plain modules that stand where sharded ones were.

    Args:
        model: that holds them.
        ranks: the processes over which they are sharded.
        found: (name, sharded module, what stands there) of each.

    Attributes:
        kept: whether they stay.
        ranks: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        found: Sequence[tuple[str, nn.Module, Unsharded]] = (),
    ) -> None:
        self.kept = False
        self.ranks, self._model, self._found = ranks, model, found

    @cached_property
    def shards(self) -> dict[nn.Module, Shard]:
        """What this rank works on of each dense module without values in them.

        All ranks ask for it; the first time, tables in columns are put into shards by rows.
        """
        return _shards(self._found, self.ranks)

    def fill(self, replaced: Sequence[nn.Module]) -> None:
        """Gather the rows of modules that stay dense: all but those to be replaced."""
        for module, aliases in find_modules(self._model, EMBEDDINGS):
            if module in self.shards and module not in replaced:
                table = Table(module, aliases, ranks=self.ranks, shard=self.shards[module])
                trainable = module.weight.requires_grad
                module.weight = nn.Parameter(table.whole(), requires_grad=trainable)


@contextmanager
def unsharded(
    model: nn.Module, ranks: Ranks, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Iterator[Standing]:
    """While open, plain modules stand where sharded ones were, unless they are kept for good.

    Args:
        model: that holds the sharded modules.
        ranks: over which they are sharded.
        optimizers: must not train sharded tables: those of several ranks cannot be followed.

    Raises:
        ValueError: a module that cannot be unsharded, or that an optimizer trains.
    """
    found = list(_plain_modules(model))
    standing = Standing(model, ranks, found)
    done: list[tuple[Alias, nn.Module]] = []
    try:
        _check_optimizers(found, optimizers)
        places = [_places(model, old) for _, old, _ in found]
        for (name, old, plain), aliases in zip(found, places, strict=True):
            logger.info("%s: unsharded; the state of its own optimizer is dropped", name)
            for alias in aliases:
                done.append((alias, old))
                alias.parent._modules[alias.attribute] = plain.module
        yield standing
    finally:
        if not standing.kept:
            for alias, old in done:
                alias.parent._modules[alias.attribute] = old


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Unsharded]]:
    """(name, sharded module, what takes its place)."""
    for adapter, module, name in adapted(model):
        plain = adapter.unshard(module, name)
        if plain is not None:
            plain.module.train(module.training)
            yield name, module, plain


def _places(model: nn.Module, module: nn.Module) -> tuple[Alias, ...]:
    """Where the model holds a module."""
    for one, aliases in find_modules(model, (type(module),)):
        if one is module:
            return aliases
    raise ValueError(
        f"model is itself a {type(module).__name__} and cannot be replaced in place; pass the "
        "module that holds it"
    )


def _check_optimizers(
    found: Sequence[tuple[str, nn.Module, Unsharded]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    trained = optimizer_groups(optimizers)
    for name, module, _ in found:
        if any(id(parameter) in trained for parameter in module.parameters()):
            raise ValueError(
                f"an optimizer trains the sharded tables of {name!r}, whose parameters are other "
                "tensors than those of plain tables; compress without it, and make an optimizer "
                "of the compressed model"
            )


def _shards(
    found: Sequence[tuple[str, nn.Module, Unsharded]], ranks: Ranks
) -> dict[nn.Module, Shard]:
    parts: dict[str, Part] = {}
    modules: dict[str, nn.Module] = {}
    for name, _, plain in found:
        for table, (module, part) in plain.parts.items():
            parts[f"{name}.{table}"], modules[f"{name}.{table}"] = part, module
    facts = {f"table {name!r}": f"{part.rows} rows, sharded" for name, part in parts.items()}
    ranks.agree(facts, "comparing sharded tables")
    return {modules[name]: shard for name, shard in shards_of(parts, ranks).items()}
