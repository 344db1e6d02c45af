"""TorchRec: embedding collections, plain or sharded; fused and quantized ones are refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import (
    ADAPTERS,
    DELETE,
    Adapter,
    Swapped,
    Undo,
    Unsharded,
    has_base,
    set_attributes,
)
from ..compress import compress as compress_model
from ..config import CompressionConfig
from ..forward import Forward, default_forward
from ..frequency import FrequencyStats
from ..modules import Compressed
from ..ranks import Ranks
from ..report import CompressionReport
from ..shards import Block, Part, is_dtensor
from ..swap import Optimizers
from ..tables import EMBEDDINGS, check_model
from ..unsharding import unsharded
from .counting import count_features

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    process_group: ProcessGroup | None = None,
    progress: bool = True,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """Count the ids of ``batches``, then :func:`mec_embed.compress` the model in place.

    With ``process_group``, the collections may be sharded: of a ``DistributedModelParallel``, give
    its ``.module``. Plain collections take their places on every rank, whose ids are looked up on
    the rank itself: the tables are small now. Train on under DistributedDataParallel, or serve.

    Args:
        model: with ``EmbeddingBagCollection`` or ``EmbeddingCollection`` modules, trained.
        batches: the training data (of each rank, its part), as :func:`frequencies` takes it.
        config: as in :func:`mec_embed.compress`.
        forward: how to call the model on a batch, to measure what its predictions depend on
            (``batches=`` of :func:`mec_embed.compress`); not measured without.
        optimizer: as in :func:`mec_embed.compress`.
        device: as in :func:`mec_embed.compress`.
        process_group: as in :func:`mec_embed.compress`.
        progress: as in :func:`mec_embed.compress`.
        start_from: as in :func:`mec_embed.compress`.

    Raises:
        ValueError: fused or quantized modules, sharded ones without ``process_group``; else as
            :func:`mec_embed.compress`.

    Example:
        >>> report = torchrec.compress(model, batches, optimizer=optimizer)  # doctest: +SKIP
    """
    return compress_model(
        model,
        frequencies(model, batches, process_group),
        config,
        batches=None if forward is None else batches,
        forward=forward or default_forward,
        optimizer=optimizer,
        device=device,
        process_group=process_group,
        progress=progress,
        start_from=start_from,
    )


def frequencies(
    model: nn.Module, batches: Iterable[Any], process_group: ProcessGroup | None = None
) -> FrequencyStats:
    """Count ids in ``KeyedJaggedTensor`` batches; features that share a table are summed.

    Args:
        model: with collections, sharded ones only with ``process_group``.
        batches: each a ``KeyedJaggedTensor``, an object that has one as ``sparse_features`` or
            ``idlist_features``, or a tuple, list or mapping that holds one of these.
        process_group: all of its ranks call, each with its part of the data; the counts are added.

    Raises:
        ValueError: no feature of the model is in the data, or the model changes ids before it
            looks them up.
        TypeError: batches of another kind.
    """
    if process_group is None:
        return _frequencies(model, batches)
    with Ranks(process_group).guard() as ranks, unsharded(model, ranks):
        stats = _frequencies(model, batches)
    return stats.all_reduce(process_group)


def _frequencies(model: nn.Module, batches: Iterable[Any]) -> FrequencyStats:
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
                "kernels of its own; of a sharded model, compress the .module of its "
                "DistributedModelParallel on all ranks with process_group=; of others, load the "
                "weights into a plain EmbeddingBagCollection or EmbeddingCollection and compress "
                "that"
            )

    def unshard(self, module: nn.Module, name: str) -> Unsharded | None:
        for kind, make, tables in (
            ("ShardedEmbeddingBagCollection", _plain_bags, "embedding_bags"),
            ("ShardedEmbeddingCollection", _plain_sequences, "embeddings"),
        ):
            if has_base(module, "torchrec", kind):
                plain = make(module)
                return Unsharded(plain, dict(_parts(module, plain, tables)))
        return None

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        compressed = any(isinstance(m, Compressed) for m in module.modules())
        return set_attributes(module, reset_parameters=_refuse_reset if compressed else DELETE)


def _plain_bags(module: Any) -> Any:
    """A plain collection like a sharded one, without values."""
    make = import_module("torchrec").EmbeddingBagCollection
    configs = list(module._embedding_bag_configs)
    plain = make(configs, module._is_weighted, torch.device("meta"))
    plain._device = module._device
    return plain


def _plain_sequences(module: Any) -> Any:
    """A plain collection like a sharded one, without values."""
    make = import_module("torchrec").EmbeddingCollection
    configs = list(module._embedding_configs)
    plain = make(configs, torch.device("meta"), module._need_indices)
    plain._device = module._device
    return plain


def _parts(module: Any, plain: Any, tables: str) -> Iterator[tuple[str, tuple[nn.Module, Part]]]:
    """Name in the collection -> (plain table, what this rank holds); whole tables are filled in."""
    state = module.state_dict()
    for table, dense in getattr(plain, tables).items():
        weight = state[f"{tables}.{table}.weight"]
        held = _held(weight)
        if held is None:
            dense.weight = nn.Parameter(weight.detach(), dense.weight.requires_grad)
            continue
        rows, dim = dense.weight.shape
        like = torch.empty(0, dim, dtype=dense.weight.dtype, device=module._device)
        yield f"{tables}.{table}", (dense, Part(held, rows, like))


def _held(weight: Any) -> tuple[Block, ...] | None:
    """The blocks that this rank holds; None of a table that every rank has."""
    pairs: Iterable[tuple[Sequence[int], Tensor]]
    if is_dtensor(weight):
        local = weight.to_local()
        # A rank without rows has no shard, but an offset.
        pairs = zip(local.local_offsets(), local.local_shards(), strict=False)
    elif hasattr(weight, "local_shards"):
        pairs = [(one.metadata.shard_offsets, one.tensor) for one in weight.local_shards()]
    else:
        return None
    return tuple(Block(shard.detach(), *offset) for offset, shard in pairs if shard.numel())


def _refuse_reset() -> None:
    """Instead of writing random values into rows that were decoded for the occasion."""
    raise RuntimeError(
        "compressed tables cannot be initialised anew; build the model again, or put dense tables "
        "back with mec_embed.decompress(model)"
    )


ADAPTERS.append(_Adapter())
