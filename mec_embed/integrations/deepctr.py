"""DeepCTR-Torch: models of ``deepctr_torch.models`` and the input they are fitted on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters import ADAPTERS, DELETE, Adapter, Swapped, Undo, has_base, set_attributes
from ..compress import compress as compress_model
from ..config import CompressionConfig
from ..frequency import FrequencyStats
from ..modules import DecodedTable
from ..regularization import table_penalty, trainable_tables
from ..report import CompressionReport
from ..sensitivity import MOST_BATCHES
from .counting import Lookups, count_features, whole_numbers

#: Examples in a batch of those that measure sensitivity.
_BATCH = 512
#: (table, weight of L1, weight of L2)
Term = tuple[nn.Module, float, float]


def compress(
    model: nn.Module,
    x: Any,
    config: CompressionConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """Count the ids of ``x``, then :func:`mec_embed.compress` the model in place.

    Some rows of ``x`` also measure what the predictions depend on (``batches=`` of
    :func:`mec_embed.compress`). The model's own optimizer goes on with the codebooks, and its L1
    and L2 terms keep their meaning (see :mod:`mec_embed.regularization`).

    Args:
        model: a DeepCTR-Torch model, trained.
        x: what ``fit`` takes: a mapping from feature to array, or the list of arrays.
        config: as in :func:`mec_embed.compress`.
        device: as in :func:`mec_embed.compress`.
        progress: as in :func:`mec_embed.compress`.
        start_from: as in :func:`mec_embed.compress`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mec_embed.compress`.

    Example:
        >>> model.fit(x, y, epochs=10)  # doctest: +SKIP
        >>> report = deepctr.compress(model, x)  # doctest: +SKIP
    """
    stats = frequencies(model, x)
    return compress_model(
        model,
        stats,
        config,
        batches=_batches(model, _columns(model, x)),
        device=device,
        progress=progress,
        start_from=start_from,
    )


def frequencies(model: nn.Module, x: Any) -> FrequencyStats:
    """Count ids in what ``fit`` takes; features of one ``embedding_name`` are summed.

    Of sequences (``VarLenSparseFeat``), only the positions that are pooled count: the first
    ``length_name`` ones, or where there is none those that are not 0. Of a ``SparseFeat``, id 0 is
    an id like any other.

    Args:
        model: a DeepCTR-Torch model.
        x: a mapping from feature to array, or the list of arrays in the model's order.

    Raises:
        ValueError: an array is missing, or the model is of another kind.
        TypeError: ``x`` of another kind.
    """
    columns = _columns(model, x)
    return count_features(model, _lookups(model), _ids(model, columns))


def _feature_columns(model: Any) -> dict[str, Any]:
    """Feature -> its SparseFeat or VarLenSparseFeat."""
    found = list(model.dnn_feature_columns)
    for module in model.modules():
        for name in ("sparse_feature_columns", "varlen_sparse_feature_columns"):
            found += getattr(module, name, [])
    return {column.name: column for column in found if hasattr(column, "embedding_name")}


def _lookups(model: nn.Module) -> Lookups:
    """Feature -> the tables of its ``embedding_name``, in whichever part of the model."""
    by_name: dict[str, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Embedding):
                by_name[name].append(child)
    columns = _feature_columns(model)
    return {name: by_name[column.embedding_name] for name, column in columns.items()}


def _columns(model: Any, x: Any) -> dict[str, np.ndarray]:
    """Feature -> array, from either form of ``x``."""
    if not hasattr(model, "feature_index"):
        raise ValueError(
            f"model is a {type(model).__name__} without a feature_index, expected a model of "
            "DeepCTR-Torch; use mec_embed.compress with FrequencyStats.from_batches"
        )
    names = list(model.feature_index)
    if isinstance(x, Mapping):
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"x has no array for {', '.join(missing)}, which the model reads")
        arrays = [x[name] for name in names]
    elif isinstance(x, (list, tuple)):
        if len(x) != len(names):
            raise ValueError(f"x has {len(x)} arrays, the model reads {len(names)}: {names}")
        arrays = list(x)
    else:
        raise TypeError(f"x must be a mapping or a list of arrays, got {type(x).__name__}")
    return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}


def _batches(model: Any, columns: dict[str, np.ndarray]) -> list[Tensor]:
    """Rows of ``x``, drawn at random, as ``forward`` takes them: float32 (batch, columns)."""
    examples = len(next(iter(columns.values())))
    rows = np.random.default_rng(0).permutation(examples)[: MOST_BATCHES * _BATCH]
    wide = [np.reshape(array[rows], (len(rows), -1)) for array in columns.values()]
    x = torch.from_numpy(np.concatenate(wide, 1).astype(np.float32)).to(model.device)
    return list(x.split(_BATCH))


def _ids(model: nn.Module, columns: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Ids of each feature that reach the model's pooling."""
    for name, column in _feature_columns(model).items():
        # Models get one float32 matrix, in which ids above 2^24 are rounded.
        ids = whole_numbers(name, columns[name].astype(np.float32))
        if hasattr(column, "maxlen"):
            ids = ids.reshape(len(ids), -1)
            if column.length_name is None:
                ids = ids[ids != 0]
            else:
                lengths = whole_numbers(column.length_name, columns[column.length_name])
                ids = ids[np.arange(ids.shape[1]) < lengths.reshape(-1, 1)]
        yield {name: ids}


class _Adapter(Adapter):
    def matches(self, module: nn.Module) -> bool:
        return has_base(module, "deepctr_torch", "BaseModel")

    def optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        one = getattr(module, "optim", None)
        return [one] if isinstance(one, torch.optim.Optimizer) else []

    def beside(self, module: nn.Module) -> list[object]:
        return [module.regularization_weight, vars(module).get("get_regularization_loss")]

    def follow(self, module: nn.Module, swapped: Swapped) -> Undo:
        held = getattr(module, "get_regularization_loss", None)
        terms = list(held.terms) if isinstance(held, _RegularizationLoss) else []
        entries: Any = module.regularization_weight
        new_of = {old: new for old, new in swapped}
        owners = {id(p): old for old in new_of for p in old.parameters()}
        left = []
        for weights, l1, l2 in entries:
            gone = {id(_tensor(w)) for w in weights if id(_tensor(w)) in owners}
            terms += [(owners[key], l1, l2) for key in gone]
            left.append(([w for w in weights if id(_tensor(w)) not in gone], l1, l2))
        terms = [(new_of.get(table, table), l1, l2) for table, l1, l2 in terms]
        dense = [term for term in terms if not isinstance(term[0], DecodedTable)]
        left += [([table.weight], l1, l2) for table, l1, l2 in dense]
        terms = [term for term in terms if isinstance(term[0], DecodedTable)]
        return set_attributes(
            module,
            regularization_weight=left,
            get_regularization_loss=_RegularizationLoss(module, terms) if terms else DELETE,
        )


def _tensor(entry: Any) -> Tensor:
    """The parameter of an entry, which may be a pair (name, parameter)."""
    return entry[1] if isinstance(entry, tuple) else entry


class _RegularizationLoss:
    """Stands in for ``model.get_regularization_loss``: codewords count once for each row."""

    def __init__(self, model: nn.Module, terms: list[Term]) -> None:
        self.model, self.terms = model, terms

    def __call__(self) -> Tensor:
        loss: Tensor = type(self.model).get_regularization_loss(self.model)  # type: ignore[attr-defined]
        trainable = trainable_tables(self.model)
        for table, l1, l2 in self.terms:
            inside = set(table.modules())  # a table in tiers has two
            for part in (one for one in trainable if one in inside):
                for power, weight in ((1, l1), (2, l2)):
                    if weight > 0:
                        loss = loss + weight * table_penalty(part, power)
        return loss


ADAPTERS.append(_Adapter())
