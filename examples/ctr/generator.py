"""A built-in click-log generator with a known best AUC."""

import numpy as np
import torch

from examples.ctr.data import ClickData
from examples.ctr.training import auc

TRAIN_SHARE, VALID_SHARE = 0.8, 0.1
CLICK_BIAS = -1.4


def generate(
    examples: int = 1_000_000,
    fields: int = 26,
    max_rows: int = 200_000,
    min_rows: int = 4,
    exponent: float = 1.2,
    latent_dim: int = 8,
    interaction_share: float = 0.15,
    logit_std: float = 1.35,
    seed: int = 0,
) -> ClickData:
    """Draw a click log whose labels follow a planted factorization machine.

    The row counts of the fields are log-spaced from ``min_rows`` to ``max_rows``, and each field's
    ids are independent Zipf draws. A label is a Bernoulli draw from
    ``sigmoid(bias + first-order weights + pairwise inner products of latent vectors)``, with
    Gaussian weights and latent vectors. No model can beat ``best_auc``, the AUC of the true logit
    on the test labels, but by chance. The same arguments give the same data.

    Args:
        examples: examples in all; 80 % train, 10 % valid, 10 % test.
        fields: number of fields.
        max_rows: rows of the largest field.
        min_rows: rows of the smallest field.
        exponent: Zipf exponent of the id frequencies.
        latent_dim: dimension of the planted latent vectors.
        interaction_share: part of the logit's variance that comes from the interactions.
        logit_std: standard deviation of the logit.
        seed: seed of everything drawn.
    """
    rng = np.random.default_rng(seed)
    rows = [int(count) for count in np.geomspace(min_rows, max_rows, fields).round()]
    ids = np.stack([_zipf_ids(rng, count, exponent, examples) for count in rows], axis=1)
    first_order, interactions = _planted_terms(rng, ids, rows, latent_dim)
    logit = CLICK_BIAS + logit_std * (
        np.sqrt(1 - interaction_share) * _standardise(first_order)
        + np.sqrt(interaction_share) * _standardise(interactions)
    )
    labels = (rng.random(examples) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    splits = _splits(examples)
    for index, count in enumerate(rows):
        ids[:, index] = _by_frequency(ids[:, index], splits["train"], count)
    return ClickData(
        name="generator",
        fields=[f"field_{index:02d}" for index in range(fields)],
        rows=rows,
        ids={name: torch.from_numpy(ids[part]) for name, part in splits.items()},
        labels={name: torch.from_numpy(labels[part]) for name, part in splits.items()},
        best_auc=auc(labels[splits["test"]], logit[splits["test"]]),
    )


def _zipf_ids(rng: np.random.Generator, rows: int, exponent: float, n: int) -> np.ndarray:
    """Draw int64 ids (n,) in [0, rows) with probability proportional to rank ** -exponent."""
    cumulative = np.cumsum(np.arange(1, rows + 1) ** -exponent)
    # cumulative[-1] itself is out of the draws' reach, so no id reaches ``rows``.
    return np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")


def _planted_terms(
    rng: np.random.Generator, ids: np.ndarray, rows: list[int], latent_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """First-order and pairwise terms of the planted model, float64 (n,) each, for ids (n, F).

    Only four or five fields interact, the largest among them: spread evenly over all pairs, the
    interactions would be too faint to learn from this many examples.
    """
    stride = max(1, len(rows) // 4)
    linear = np.zeros(len(ids))
    total = np.zeros((len(ids), latent_dim))
    squares = np.zeros(len(ids))
    for index, count in enumerate(rows):
        linear += rng.standard_normal(count)[ids[:, index]]
        if (len(rows) - 1 - index) % stride:
            continue
        latent = rng.standard_normal((count, latent_dim))
        total += latent[ids[:, index]]
        squares += np.square(latent).sum(axis=1)[ids[:, index]]
    return linear, 0.5 * (np.square(total).sum(axis=1) - squares)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Shift and scale to mean 0 and standard deviation 1: (n,) -> (n,)."""
    return (values - values.mean()) / values.std()


def _splits(examples: int) -> dict[str, slice]:
    """Consecutive train, valid and test parts; the examples are independent already."""
    first, second = round(TRAIN_SHARE * examples), round((TRAIN_SHARE + VALID_SHARE) * examples)
    return {"train": slice(first), "valid": slice(first, second), "test": slice(second, None)}


def _by_frequency(column: np.ndarray, train: slice, rows: int) -> np.ndarray:
    """Renumber int64 ids (n,) by falling training frequency."""
    order = np.argsort(-np.bincount(column[train], minlength=rows), kind="stable")
    row_of = np.empty(rows, dtype=np.int64)
    row_of[order] = np.arange(rows)
    return row_of[column]
