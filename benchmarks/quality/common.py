"""What methods take and give, and the one place that counts bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from examples.ctr.data import ClickData
from examples.ctr.settings import Settings
from examples.ctr.training import iterate_batches

#: Children of a model that hold its embedding tables, one module a field.
PARTS = ("embeddings", "first_order")


@dataclass(frozen=True)
class Base:
    """A trained uncompressed model, and all that a method may use.

    Attributes:
        data: the click log; methods must not look at its test split.
        settings: that the model was built and trained with.
        model: trained; methods work on a copy.
        counts: field -> training occurrences of each row (rows,).
        seed: of the model, the batches and the method.
    """

    data: ClickData
    settings: Settings
    model: nn.Module
    counts: dict[str, np.ndarray]
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed tables."""
        return embedding_bytes(self.model)

    def budget(self, ratio: float) -> int:
        """Bytes that all tables together may take."""
        return int(self.nbytes / ratio)

    def copy(self) -> nn.Module:
        """A copy of the model to compress."""
        return copy.deepcopy(self.model)

    def batches(self, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled training batches (ids, labels)."""
        seed = self.seed if seed is None else seed
        return iterate_batches(self.data, "train", self.settings.batch_size, True, seed)


#: (base, ratio) -> a model of no more than ``base.budget(ratio)`` bytes in its tables, or None
#: where the method cannot be made that small. It maps ids (B, F) to logits (B,), as the base does.
Method = Callable[[Base, float], "nn.Module | None"]


def embedding_bytes(model: nn.Module) -> int:
    """Bytes of all distinct tensors, buffers included, of the model's tables."""
    storages = {}
    for part in PARTS:
        for tensor in _tensors(getattr(model, part, None)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _tensors(part: nn.Module | None) -> list[Tensor]:
    if part is None:
        return []
    return [t for t in [*part.parameters(), *part.buffers()] if t.numel()]


def tables(model: nn.Module) -> Iterator[tuple[nn.ModuleDict, str, nn.Embedding]]:
    """(ModuleDict, field, table) for every dense table: of the vectors, then first order."""
    for part in PARTS:
        held = getattr(model, part, None) or {}
        for field, table in list(held.items()):
            if isinstance(table, nn.Embedding):
                yield held, field, table
