"""Count ids by feature, for frameworks whose batches are columns named after features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..frequency import FrequencyStats, IdCounter

#: Feature -> the tables that look it up.
Lookups = Mapping[str, Sequence[nn.Module]]


def count_features(
    model: nn.Module, lookups: Lookups, batches: Iterable[Mapping[str, Any]]
) -> FrequencyStats:
    """Counts of all tables that ``lookups`` names.

    Args:
        model: that holds the tables.
        lookups: feature -> tables; ids of features that share a table are summed.
        batches: feature -> ids of any shape, integers or floats that hold integers; other entries
            are passed over.

    Raises:
        ValueError: no feature of ``lookups`` occurs in ``batches``.
    """
    counter = IdCounter(model)
    for batch in batches:
        for feature, tables in lookups.items():
            if tables and feature in batch:
                ids = whole_numbers(feature, batch[feature])
                for table in tables:
                    counter.add(table, ids, feature)
    if not counter.counts:
        raise ValueError(
            f"no ids were counted: none of the features {', '.join(sorted(lookups))} is in the "
            "data, or their tables are compressed already"
        )
    return FrequencyStats(counter.counts)


def whole_numbers(feature: str, values: Any) -> np.ndarray:
    """Ids as int64, from integers or from floats that hold integers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    ids = array.astype(np.int64)
    # Objects may be floats, and unsigned numbers may be larger than any of int64.
    if array.dtype.kind in "fuO" and not np.array_equal(ids, array):
        wrong = array[ids != array].tolist()[0]
        raise ValueError(f"feature {feature!r}: ids must be whole numbers, got {wrong!r}")
    return ids
