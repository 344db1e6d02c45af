"""FuxiCTR: models of ``fuxictr.pytorch.models``, its data loaders and encoded files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import ADAPTERS, DELETE, Adapter, Swapped, Undo, has_base, set_attributes
from ..compress import compress as compress_model
from ..config import CompressionConfig
from ..frequency import FrequencyStats, parquet_columns
from ..modules import Compressed
from ..regularization import hidden_codebooks, table_penalty, trainable_tables
from ..report import CompressionReport
from .counting import count_features

_SUFFIXES = ("_compressed", "_decompressed")


def compress(
    model: nn.Module,
    data: Any,
    config: CompressionConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """Count the ids of ``data``, then :func:`mec_embed.compress` the model in place.

    From a loader, some batches also measure what the predictions depend on (``batches=`` of
    :func:`mec_embed.compress`). The model's own optimizer goes on with the codebooks,
    ``regularization_loss`` keeps its meaning (see :mod:`mec_embed.regularization`), and
    ``checkpoint`` gets a new name, so that the next ``fit`` does not overwrite the best
    uncompressed weights.

    Args:
        model: a FuxiCTR model (a ``BaseModel``), trained.
        data: the training data, as :func:`frequencies` takes it.
        config: as in :func:`mec_embed.compress`.
        device: as in :func:`mec_embed.compress`.
        progress: as in :func:`mec_embed.compress`.
        start_from: as in :func:`mec_embed.compress`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mec_embed.compress`.

    Example:
        >>> model.fit(train_gen, validation_data=valid_gen, epochs=10)  # doctest: +SKIP
        >>> report = fuxictr.compress(model, train_gen)  # doctest: +SKIP
    """
    data = _unpacked(data)
    return compress_model(
        model,
        frequencies(model, data),
        config,
        batches=None if isinstance(data, (str, Path, Mapping)) else data,
        forward=_predictions,
        device=device,
        progress=progress,
        start_from=start_from,
    )


def _predictions(model: nn.Module, batch: Any) -> Tensor:
    """Predictions (batch, tasks)."""
    output = model(batch)
    return torch.cat([v.flatten(1) for k, v in output.items() if k.endswith("_pred")], 1)


def frequencies(model: nn.Module, data: Any) -> FrequencyStats:
    """Count ids in what FuxiCTR trains on; shared embeddings are summed, padding counts zero.

    Args:
        model: a FuxiCTR model.
        data: the training loader; the pair (train, valid) that ``RankDataLoader`` returns, or an
            object with ``make_iterator``, as in FuxiCTR's repository; a path of an encoded
            ``.npz`` or ``.parquet`` file or a folder of them; or a mapping from feature to ids.

    Raises:
        ValueError: no feature of the model is in the data.
        TypeError: data, or a batch, of another kind.
    """
    lookups = _lookups(model)
    batches = _batches(data, set(lookups))
    columns = (_real_ids(model, part) for batch in batches for part in _columns(batch))
    return count_features(model, lookups, columns)


def _columns(batch: Any) -> list[Mapping[str, Any]]:
    """The mappings from feature to ids in a batch: itself, or some in a tuple, as LongCTR's are."""
    found = [batch] if isinstance(batch, Mapping) else []
    if isinstance(batch, (tuple, list)):
        found = [part for part in batch if isinstance(part, Mapping)]
    if not found:
        raise TypeError(
            f"a batch is a {type(batch).__name__}, expected a mapping from feature to ids, or a "
            "tuple that holds some; pass FuxiCTR's loader, or count by FrequencyStats.from_batches"
        )
    return found


def _lookups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Feature -> tables that look it up."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        if has_base(module, "fuxictr", "FeatureEmbeddingDict"):
            for feature, layer in module.embedding_layers.items():  # type: ignore[operator, union-attr]
                found[feature] += [m for m in layer.modules() if isinstance(m, nn.Embedding)]
    if not found:
        raise ValueError(
            "model holds no FeatureEmbeddingDict of FuxiCTR; use mec_embed.compress with "
            "FrequencyStats.from_batches"
        )
    return found


def _real_ids(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the padding ids of each feature."""
    features = getattr(getattr(model, "feature_map", None), "features", {})
    columns = dict(batch)
    for feature, values in columns.items():
        padding = features.get(feature, {}).get("padding_idx")
        if padding is not None and isinstance(values, (Tensor, np.ndarray)):
            columns[feature] = values[values != padding]
    return columns


def _unpacked(data: Any) -> Any:
    """The training part of what a data loader of FuxiCTR returns."""
    if hasattr(data, "make_iterator"):
        data = data.make_iterator()
    batch = Mapping if isinstance(data, tuple) else (Mapping, tuple, list)
    if isinstance(data, (tuple, list)) and data and not isinstance(data[0], batch):
        data = data[0]  # RankDataLoader returns (train, valid) or (train, valid, test)
    return data


def _batches(data: Any, features: set[str]) -> Iterable[Mapping[str, Any]]:
    data = _unpacked(data)
    if isinstance(data, Mapping):
        return [data]
    if isinstance(data, (str, Path)):
        return _files(Path(data), features)
    if not isinstance(data, Iterable):
        raise TypeError(
            "data must be a FuxiCTR loader, a path or a mapping from feature to ids, got "
            f"{type(data).__name__}"
        )
    return data


def _files(path: Path, features: set[str]) -> Iterator[Mapping[str, Any]]:
    """Columns of an encoded file, or of every one in a folder."""
    kinds = (".npz", ".parquet")
    files = sorted(p for p in path.iterdir() if p.suffix in kinds) if path.is_dir() else [path]
    if not files or any(file.suffix not in kinds for file in files):
        raise ValueError(f"{path}: expected encoded data, a .npz or .parquet file or a folder")
    for file in files:
        read = _npz if file.suffix == ".npz" else parquet_columns
        yield from read(file, features)


def _npz(file: Path, features: set[str]) -> Iterator[Mapping[str, Any]]:
    with np.load(file, allow_pickle=False) as arrays:
        for feature in features & set(arrays.files):
            yield {feature: arrays[feature]}


class _Adapter(Adapter):
    def matches(self, module: nn.Module) -> bool:
        return has_base(module, "fuxictr", "BaseModel")

    def optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        one = getattr(module, "optimizer", None)
        return [one] if isinstance(one, torch.optim.Optimizer) else []

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        compressed = any(isinstance(m, Compressed) for m in module.modules())
        return set_attributes(
            module,
            checkpoint=_renamed(getattr(module, "checkpoint", None), compressed),
            regularization_loss=_RegularizationLoss(module) if compressed else DELETE,
        )


def _renamed(checkpoint: str | None, compressed: bool) -> str | None:
    """Another file, so that training after a swap keeps the weights from before it."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    stem = path.stem
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    return str(path.with_name(f"{stem}{_SUFFIXES[0 if compressed else 1]}{path.suffix}"))


class _RegularizationLoss:
    """Stands in for ``model.regularization_loss``: codewords count once for each row."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> Any:
        from fuxictr.pytorch.torch_utils import get_regularizer

        model: Any = self.model
        tables = trainable_tables(model)
        with hidden_codebooks(tables):
            loss = type(model).regularization_loss(model)
        inside = _embedding_modules(model)
        terms = get_regularizer(model._embedding_regularizer) or []
        others = get_regularizer(model._net_regularizer) or []
        for table in tables:
            for power, weight in terms if table in inside else others:
                loss = loss + weight / power * table_penalty(table, power)
        return loss


def _embedding_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters FuxiCTR takes for embeddings."""
    if has_base(model, "fuxictr", "MultiTaskModel"):
        return set(model.modules())
    tops = [m for m in model.modules() if type(m).__name__ == "FeatureEmbeddingDict"]
    return {part for top in tops for part in top.modules()}


ADAPTERS.append(_Adapter())
