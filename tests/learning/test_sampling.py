"""Samples by weight: what is in them, and sums over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mec_embed.learning.sampling import weighted_sample


def test_a_sample_of_all_rows_is_all_rows() -> None:
    weights = torch.rand(50) + 0.1
    chosen, mass = weighted_sample(weights, 50, torch.Generator())
    assert chosen.tolist() == list(range(50)) and torch.equal(mass, weights)
    mass.zero_()
    assert float(weights.sum()) > 0, "the weights must be a copy"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 1e4), min_size=60, max_size=400),
    st.integers(10, 50),
    st.integers(0, 2**31 - 1),
)
def test_a_sample_holds_the_heavy_rows_with_their_weights(
    values: list[float], size: int, seed: int
) -> None:
    weights = torch.tensor(values)
    chosen, mass = weighted_sample(weights, size, torch.Generator().manual_seed(seed))
    assert torch.equal(chosen, chosen.unique(sorted=True))
    assert len(chosen) == len(mass) <= size + 6 * math.sqrt(size) + 1
    assert bool((mass >= weights[chosen] * (1 - 1e-5)).all())
    # Whatever weighs more than its share of the whole is certain to be in, as it is.
    heavy = (weights > weights.sum() / size * 1.001).nonzero()[:, 0]
    assert set(heavy.tolist()) <= set(chosen.tolist())
    place = torch.searchsorted(chosen, heavy)
    torch.testing.assert_close(mass[place], weights[heavy], rtol=1e-5, atol=0)
    # All others have one weight.
    light = mass[mass > weights[chosen] * (1 + 1e-5)]
    if len(light):
        torch.testing.assert_close(light, light[:1].expand_as(light), rtol=1e-4, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_sums_over_a_sample_are_unbiased(power: float) -> None:
    rows, size, draws = 3000, 300, 200
    weights = (rows / (1.0 + torch.arange(rows))) ** power
    values = torch.randn(rows, generator=torch.Generator().manual_seed(0)).abs() * torch.linspace(
        0, 2, rows
    )
    generator = torch.Generator().manual_seed(1)
    totals, weighted, counts = [], [], []
    for _ in range(draws):
        chosen, mass = weighted_sample(weights, size, generator)
        totals.append(float(mass.sum()))
        weighted.append(float((mass * values[chosen]).sum()))
        counts.append(len(chosen))
    for found, expected in (
        (totals, float(weights.sum())),
        (weighted, float((weights * values).sum())),
        (counts, size),
    ):
        found = torch.tensor(found, dtype=torch.float64)
        tolerance = 4 * float(found.std()) / math.sqrt(draws) + 1e-3 * expected
        assert float(found.mean()) == pytest.approx(expected, abs=tolerance)
        assert tolerance < 0.1 * expected
