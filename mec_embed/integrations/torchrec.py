"""TorchRec: unsharded embedding collections; sharded, fused and quantized ones are refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..adapters import ADAPTERS, DELETE, Adapter, Swapped, Undo, has_base, set_attributes
from ..compress import compress as compress_model
from ..config import CompressionConfig
from ..forward import Forward, default_forward
from ..frequency import FrequencyStats
from ..regularization import Compressed
from ..report import CompressionReport
from ..swap import Optimizers
from ..tables import EMBEDDINGS, check_model
from .counting import count_features

#: Collections that hold plain ``nn.EmbeddingBag`` or ``nn.Embedding`` modules.
_PLAIN = ("EmbeddingBagCollection", "EmbeddingCollection")
#: Collections that change ids before the lookup.
_REMAPPING = (
    "ManagedCollisionEmbeddingBagCollection",
    "ManagedCollisionEmbeddingCollection",
    "ITEPEmbeddingBagCollection",
    "ITEPEmbeddingCollection",
)
#: What holds its tables in kernels of its own.
_OTHERS = (
    "DistributedModelParallel",
    "ShardedModule",
    "FusedEmbeddingBagCollection",
    "FusedEmbeddingCollection",
)


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    *,
    forward: Forward | None = None,
    optimizer: Optimizers = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Count the ids of ``batches``, then :func:`mec_embed.compress` the model in place.

    Compress before the model is sharded or after it is gathered: in training as a plain module,
    under DistributedDataParallel (the tables are small now), and for serving.

    Args:
        model: with ``EmbeddingBagCollection`` or ``EmbeddingCollection`` modules, trained.
        batches: the training data, as :func:`frequencies` takes it.
        config: as in :func:`mec_embed.compress`.
        forward: how to call the model on a batch, to measure what its predictions depend on
            (``batches=`` of :func:`mec_embed.compress`); not measured without.
        optimizer: as in :func:`mec_embed.compress`.
        device: as in :func:`mec_embed.compress`.
        progress: as in :func:`mec_embed.compress`.

    Raises:
        ValueError: sharded, fused or quantized modules; else as :func:`mec_embed.compress`.

    Example:
        >>> report = torchrec.compress(model, batches, optimizer=optimizer)  # doctest: +SKIP
    """
    return compress_model(
        model,
        frequencies(model, batches),
        config,
        batches=None if forward is None else batches,
        forward=forward or default_forward,
        optimizer=optimizer,
        device=device,
        progress=progress,
    )


def frequencies(model: nn.Module, batches: Iterable[Any]) -> FrequencyStats:
    """Count ids in ``KeyedJaggedTensor`` batches; features that share a table are summed.

    Args:
        model: with unsharded collections.
        batches: each a ``KeyedJaggedTensor``, an object that has one as ``sparse_features`` or
            ``idlist_features``, or a tuple, list or mapping that holds one of these.

    Raises:
        ValueError: no feature of the model is in the data, or the model changes ids before it
            looks them up.
        TypeError: batches of another kind.
    """
    check_model(model)
    columns = ({key: kjt[key].values() for key in kjt.keys()} for kjt in map(_jagged, batches))
    return count_features(model, _lookups(model), columns)


def _lookups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Feature -> tables that look it up."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for collection in model.modules():
        if has_base(collection, "torchrec", *_REMAPPING):
            raise ValueError(
                f"{type(collection).__name__} changes ids before it looks them up; count with "
                "FrequencyStats.from_batches(model, batches) and call mec_embed.compress"
            )
        for config, table in _tables(collection):
            for feature in config.feature_names if isinstance(table, EMBEDDINGS) else ():
                found[feature].append(table)
    if not found:
        raise ValueError(
            "model holds no table in an EmbeddingBagCollection or EmbeddingCollection of TorchRec "
            "that is not compressed yet"
        )
    return found


def _tables(module: Any) -> Iterator[tuple[Any, nn.Module]]:
    """(config, table) of a plain collection."""
    if has_base(module, "torchrec", "EmbeddingBagCollection"):
        yield from ((c, module.embedding_bags[c.name]) for c in module.embedding_bag_configs())
    elif has_base(module, "torchrec", "EmbeddingCollection"):
        yield from ((c, module.embeddings[c.name]) for c in module.embedding_configs())


def _jagged(batch: Any) -> Any:
    """The KeyedJaggedTensor of a batch."""
    found = _find_jagged(batch)
    if found is None:
        raise TypeError(
            "a batch must be or hold a KeyedJaggedTensor (as sparse_features, or in a tuple or "
            f"mapping), got {type(batch).__name__}"
        )
    return found


def _find_jagged(batch: Any) -> Any:
    if type(batch).__name__ == "KeyedJaggedTensor":
        return batch
    for name in ("sparse_features", "idlist_features"):
        if hasattr(batch, name):
            return getattr(batch, name)
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return next((kjt for kjt in map(_find_jagged, batch) if kjt is not None), None)
    return None


class _Adapter(Adapter):
    def matches(self, module: nn.Module) -> bool:
        return has_base(module, "torchrec", *_PLAIN, *_OTHERS)

    def check(self, module: nn.Module, name: str) -> None:
        where = f"{name!r}" if name else "model"
        quantized = any(".quant" in base.__module__ for base in type(module).__mro__)
        if quantized or has_base(module, "torchrec", *_OTHERS):
            raise ValueError(
                f"{where} is a {type(module).__name__} of TorchRec, which keeps its tables in "
                "kernels of its own; compress the plain EmbeddingBagCollection or "
                "EmbeddingCollection instead: load the gathered weights into the unsharded model, "
                "compress, and train or serve that (DistributedDataParallel works)"
            )

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        compressed = any(isinstance(m, Compressed) for m in module.modules())
        return set_attributes(module, reset_parameters=_refuse_reset if compressed else DELETE)


def _refuse_reset() -> None:
    """Instead of writing random values into rows that were decoded for the occasion."""
    raise RuntimeError(
        "compressed tables cannot be initialised anew; build the model again, or put dense tables "
        "back with mec_embed.decompress(model)"
    )


ADAPTERS.append(_Adapter())
