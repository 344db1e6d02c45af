"""torch-rechub: models over its feature objects, and the trainers that train them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import ADAPTERS, DELETE, Adapter, Swapped, Undo, has_base, set_attributes
from ..compress import compress as compress_model
from ..config import CompressionConfig
from ..frequency import FrequencyStats
from ..optimization import keep_row_steps
from ..regularization import hidden_codebooks, table_penalty, trainable_tables
from ..report import CompressionReport
from .counting import count_features


def compress(
    model: nn.Module,
    data: Any,
    config: CompressionConfig | None = None,
    *,
    trainer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """Count the ids of ``data``, then :func:`mec_embed.compress` the model in place.

    From a loader, some batches also measure what the predictions depend on (``batches=`` of
    :func:`mec_embed.compress`).

    Args:
        model: a torch-rechub model, trained.
        data: the training loader, as :func:`frequencies` takes it.
        config: as in :func:`mec_embed.compress`.
        device: as in :func:`mec_embed.compress`.
        progress: as in :func:`mec_embed.compress`.
        start_from: as in :func:`mec_embed.compress`.
        trainer: of a training that shall go on. Its optimizer goes on with the codebooks, its
            penalty on embeddings keeps its meaning, and its early stopping forgets the weights
            from before, which no longer fit.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mec_embed.compress`.

    Example:
        >>> trainer.fit(train_loader, valid_loader)  # doctest: +SKIP
        >>> report = rechub.compress(model, train_loader, trainer=trainer)  # doctest: +SKIP
    """
    optimizer = None if trainer is None else _optimizers(trainer)
    report = compress_model(
        model,
        frequencies(model, data),
        config,
        batches=None if isinstance(data, Mapping) else data,
        forward=_predictions,
        optimizer=optimizer,
        device=device,
        progress=progress,
        start_from=start_from,
    )
    if trainer is not None:
        follow(trainer, model)
    return report


def follow(trainer: Any, model: nn.Module) -> None:
    """Let a trainer that was made after compressing (or loading) train the model as it should.

    Its penalty on embeddings then reaches the codebooks, its optimizer keeps row steps
    (:func:`mec_embed.keep_row_steps`), and its early stopping starts anew.

    Args:
        trainer: over the parameters of ``model``.
        model: with compressed tables.
    """
    for optimizer in _optimizers(trainer):
        keep_row_steps(optimizer, model)
    penalty = getattr(trainer, "reg_loss_fn", None)
    if hasattr(penalty, "embedding_l2"):
        trainer.reg_loss_fn = _RegularizationLoss(penalty)
    stopper: Any = getattr(trainer, "early_stopper", None)
    if hasattr(stopper, "best_weights"):
        fresh = copy.copy(stopper)
        fresh.best_weights, fresh.trial_counter = None, 0
        fresh.best_auc = float("inf") if getattr(fresh, "mode", "max") == "min" else 0
        trainer.early_stopper = fresh


def _optimizers(trainer: Any) -> list[torch.optim.Optimizer]:
    """All that a trainer holds (those of adaptive multitask methods are several)."""
    found = [one for one in vars(trainer).values() if isinstance(one, torch.optim.Optimizer)]
    if not found:
        raise ValueError(
            f"trainer is a {type(trainer).__name__} that holds no optimizer; pass a torch-rechub "
            "trainer, or leave it out"
        )
    return found


def _predictions(model: nn.Module, batch: Any) -> Any:
    """Predictions; of models with a loss of their own (``loss_mode=False``), the first output."""
    device = next(model.parameters()).device
    output = model({name: values.to(device) for name, values in batch[0].items()})
    return output[0] if isinstance(output, tuple) else output


def frequencies(model: nn.Module, data: Any) -> FrequencyStats:
    """Count ids in what a trainer trains on; shared tables are summed, padding counts zero.

    Args:
        model: a torch-rechub model.
        data: the training loader, of pairs ``(x, y)``; or a mapping from feature to ids.

    Raises:
        ValueError: no feature of the model is in the data.
    """
    batches: Iterable[Any] = [data] if isinstance(data, Mapping) else data
    paddings = _paddings(model)
    columns = (
        _real_ids(batch[0] if isinstance(batch, (tuple, list)) else batch, paddings)
        for batch in batches
    )
    return count_features(model, _lookups(model), columns)


def _paddings(model: nn.Module) -> dict[str, int]:
    """Feature -> the id that pooling leaves out, whatever its table does with it."""
    features = [f for m in model.modules() if _is_layer(m) for f in m.features]  # type: ignore[union-attr]
    found = {f.name: f.padding_idx for f in features if _pools(f) and f.padding_idx is not None}
    # Looked up without pooling as well, which leaves nothing out.
    whole = {feature.name for feature in features if not _pools(feature)}
    return {name: padding for name, padding in found.items() if name not in whole}


def _pools(feature: Any) -> bool:
    return getattr(feature, "pooling", "concat") != "concat"


def _real_ids(batch: Mapping[str, Any], paddings: Mapping[str, int]) -> dict[str, Any]:
    """The batch without the padding ids of each feature."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, expected a mapping from feature to ids, or a "
            "pair (x, y) of one; pass torch-rechub's loader"
        )
    columns = dict(batch)
    for feature in paddings.keys() & columns.keys():
        ids = columns[feature]
        ids = ids if isinstance(ids, Tensor) else np.asarray(ids)
        columns[feature] = ids[ids != paddings[feature]]
    return columns


def _is_layer(module: nn.Module) -> bool:
    return has_base(module, "torch_rechub", "EmbeddingLayer")


def _lookups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Feature -> tables that look it up."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for layer in model.modules():
        if not _is_layer(layer):
            continue
        tables: Any = layer.embed_dict
        for feature in layer.features:  # type: ignore[union-attr]
            owner = getattr(feature, "shared_with", None) or feature.name
            table = tables[owner] if owner in tables else None
            if isinstance(table, nn.Embedding) and table not in found[feature.name]:
                found[feature.name].append(table)
    if not found:
        raise ValueError(
            "model holds no EmbeddingLayer of torch-rechub; use mec_embed.compress with "
            "FrequencyStats.from_batches"
        )
    return found


class _Adapter(Adapter):
    """Features keep their table for the next model: it would stay in memory after a swap."""

    def matches(self, module: nn.Module) -> bool:
        return _is_layer(module)

    def beside(self, module: nn.Module) -> list[object]:
        return [*module.features]  # type: ignore[misc]

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        replaced = {old for old, _ in swapped}
        features: Any = module.features
        undo = [
            set_attributes(feature, embed=DELETE)
            for feature in features
            if vars(feature).get("embed") in replaced
        ]
        return partial(_all, undo)


def _all(steps: list[Undo]) -> None:
    for step in steps:
        step()


class _RegularizationLoss(nn.Module):
    """Stands in for torch-rechub's: embeddings are recognised, codewords count for each row."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, model: nn.Module) -> Any:
        tables = trainable_tables(model)
        with hidden_codebooks(tables):
            loss = self.inner(model)
        for power, weight in ((1, self.inner.embedding_l1), (2, self.inner.embedding_l2)):
            if weight > 0:
                loss = loss + weight * sum(table_penalty(table, power) for table in tables)
        return loss


ADAPTERS.append(_Adapter())
