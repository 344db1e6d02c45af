"""Our method as a user calls it, and with one part taken away at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from benchmarks.quality.common import Base, Method, tables
from examples.ctr.training import evaluate
from mec_embed import CompressionConfig, budget, compress, self_distill


def ours(base: Base, ratio: float, *, measured: bool = True, **options: Any) -> nn.Module | None:
    """``compress()`` with int8 codebooks; ``measured``: with ``batches=``."""
    model = base.copy()
    values: dict[str, Any] = {"codebook_dtype": "int8", "seed": base.seed} | options
    # max_bytes, not ratio: rounding shall not decide whether the budget is kept.
    config = CompressionConfig(ratio=None, max_bytes=base.budget(ratio), **values)
    try:
        batches = list(base.batches()) if measured else None
        compress(model, _counts(base), config, batches=batches, progress=False)
    except ValueError as error:
        if "the least possible" in str(error) or "left alone take" in str(error):
            return None
        raise
    return model


def self_distilled(base: Base, *, calls: int = 2, **options: Any) -> Base:
    """A base whose model has been trained on by ``self_distill()``, the best by validation.

    The second call teaches by what the first one made; a third one gained nothing
    (docs/experiments.md).
    """
    model = base.copy()
    for _ in range(calls):
        _train_on(base, model, labels=lambda batch: batch[1], **options)
    return replace(base, model=model)


def taught(base: Base, second: Base) -> Base:
    """A base whose model has been taught by itself and a second one, without labels."""
    model = base.copy()
    _train_on(base, model, teacher=[model, second.model], epochs=4)
    return replace(base, model=model)


def _train_on(base: Base, model: nn.Module, **options: Any) -> None:
    """``self_distill()``, the best epoch by validation AUC."""
    self_distill(
        model,
        _counts(base),
        list(base.batches(base.seed + 1)),
        score=lambda one: evaluate(one, base.data, "valid").auc,
        seed=base.seed,
        progress=False,
        **{"l2": base.settings.self_distill_l2, **options},
    )


def _counts(base: Base) -> dict[str, np.ndarray]:
    """Qualified name -> training occurrences of each row (rows,)."""
    first = base.model.embeddings
    return {
        f"{'embeddings' if held is first else 'first_order'}.{field}": base.counts[field]
        for held, field, _ in tables(base.model)
    }


def _apart(base: Base, ratio: float) -> nn.Module | None:
    """First-order tables have codes of their own."""
    with mock.patch.object(budget, "_partners", lambda *arguments: {}):
        return ours(base, ratio)


OURS: dict[str, Method] = {
    "mec_embed": ours,
    "mec_embed without batches": partial(ours, measured=False),
}
#: For the ablation: one part of the method less than "mec_embed".
ABLATION: dict[str, Method] = {
    "product codes": partial(ours, codes="product"),
    "uniform weights": partial(ours, popularity="none"),
    "square-root weights": partial(ours, popularity="sqrt"),
    "no shared codes": _apart,
    "no shared codebooks": partial(ours, share_codebooks=False),
    "no tiers": partial(ours, tiers=False),
    "log weights": partial(ours, popularity="log"),
    "no MEC epochs": partial(ours, epochs=0),
    "no usage term": partial(ours, usage_weight=0.0),
    "no contrastive term": partial(ours, contrastive_weight=0.0),
    "float16 codebooks": partial(ours, codebook_dtype="float16"),
}
