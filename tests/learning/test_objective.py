"""The three terms of the MEC objective, and what training on them does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mec_embed.learning import objective
from mec_embed.learning.objective import (
    Weights,
    code_distances,
    contrastive_loss,
    reconstruction_loss,
    train_codebooks,
    usage_loss,
)
from mec_embed.learning.quantizers import Quantizer, quantizer_for

KINDS = ["additive", "product"]
ONE = torch.tensor(1.0)


def _rows(rows: int = 600, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of weighted variance 1 and weights of mean 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * torch.linspace(2, 0.5, dim)
    weights = torch.rand(rows, generator=generator) + 0.1
    weights = weights / weights.mean()
    mean = (weights[:, None] * x).mean(0)
    return x / (weights * (x - mean).square().sum(1)).mean().sqrt(), weights


def _start(
    kind: str, count: int = 2, size: int = 16, rows: int = 600
) -> tuple[Quantizer, Tensor, Tensor, Tensor, Tensor]:
    """Quantizer, rows, weights, codes and codebooks after k-means."""
    x, weights = _rows(rows)
    quantizer = quantizer_for(kind)
    codebooks = quantizer.start(x, weights, count, size, 0)
    return quantizer, x, weights, quantizer.encode(x, codebooks, 8), codebooks


def _quiet(stage: str, error: float) -> None:
    pass


def _train(
    kind: str, usage: float, contrastive: float, epochs: int = 3, **shape: int
) -> tuple[Quantizer, Tensor, Tensor, list[dict[str, float]]]:
    quantizer, x, weights, codes, codebooks = _start(kind, **shape)
    trained, history = train_codebooks(
        x,
        weights,
        codes,
        codebooks,
        quantizer,
        Weights(usage, contrastive),
        epochs,
        seed=0,
        progress=_quiet,
    )
    return quantizer, trained, codes, history


def test_code_distances_equal_a_loop() -> None:
    targets, codebooks = torch.randn(5, 3, 4), torch.randn(3, 6, 4)
    distances = code_distances(targets, codebooks)
    for n in range(5):
        for m in range(3):
            for k in range(6):
                expected = (targets[n, m] - codebooks[m, k]).square().sum()
                torch.testing.assert_close(distances[n, m, k], expected, rtol=1e-4, atol=1e-4)


def test_reconstruction_weighs_rows() -> None:
    x, decoded = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 2.0, 2.0]])
    loss = reconstruction_loss(x, decoded, torch.tensor([1.5, 0.5]))
    assert float(loss) == pytest.approx((1.5 * 1 + 0.5 * 8) / 2)


def test_a_row_of_twice_the_weight_counts_as_two() -> None:
    x, decoded = torch.randn(4, 3), torch.randn(4, 3)
    weights = torch.tensor([2.0, 1, 1, 1])
    twice = torch.tensor([0, 0, 1, 2, 3])
    torch.testing.assert_close(
        reconstruction_loss(x, decoded, weights / weights.mean()),
        reconstruction_loss(x[twice], decoded[twice], torch.ones(5)),
    )


@pytest.mark.parametrize("size", [2, 7, 64])
def test_usage_loss_is_zero_for_even_use_and_one_for_collapse(size: int) -> None:
    even = 1e4 * (1 - torch.eye(size))[:, None].expand(size, 3, size)
    assert float(usage_loss(even, torch.ones(size), ONE)) == pytest.approx(0, abs=1e-5)
    collapse = torch.full((20, 3, size), 1e4)
    collapse[:, :, 1] = 0
    assert float(usage_loss(collapse, torch.ones(20), ONE)) == pytest.approx(1, abs=1e-5)
    half = torch.cat([even[:, :1], collapse[:1, :1].expand(size, 1, size)], dim=1)
    assert float(usage_loss(half, torch.ones(size), ONE)) == pytest.approx(0.5, abs=1e-5)


def test_usage_loss_counts_rows_by_weight() -> None:
    distances = 1e4 * (1 - torch.eye(2))[[0, 0, 0, 1]][:, None]
    uneven = usage_loss(distances, torch.ones(4), ONE)
    even = usage_loss(distances, torch.tensor([1.0, 1, 1, 3]), ONE)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert float(uneven) == pytest.approx(1 - entropy, abs=1e-4)
    assert float(even) == pytest.approx(0, abs=1e-5)


def test_usage_loss_does_not_depend_on_the_scale_of_the_weights() -> None:
    distances, weights = torch.rand(50, 2, 8), torch.rand(50)
    torch.testing.assert_close(
        usage_loss(distances, weights, ONE), usage_loss(distances, 17 * weights, ONE)
    )


def test_usage_loss_is_differentiable() -> None:
    distances = torch.rand(6, 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, dtype=torch.float64) + 0.1
    one = torch.tensor(0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: usage_loss(d, weights, one), (distances,))
    usage_loss(distances, weights, one).backward()
    assert bool((distances.grad != 0).any())


def test_a_gradient_step_on_usage_raises_the_entropy_of_the_hard_codes() -> None:
    x, weights = _rows()
    codebooks = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.05
    codebooks[0, 0] = x.mean(0)
    codebooks[0, 1:] += 2.0
    codebooks.requires_grad_()

    def entropy() -> float:
        hard = code_distances(x[:, None], codebooks).argmin(2)[:, 0]
        use = torch.bincount(hard, weights, minlength=8)
        return float(torch.special.entr(use / use.sum()).sum())

    before = entropy()
    for _ in range(100):
        distances = code_distances(x[:, None], codebooks)
        loss = usage_loss(distances, weights, torch.tensor(1.0))
        (gradient,) = torch.autograd.grad(loss, codebooks)
        with torch.no_grad():
            codebooks -= 0.2 * gradient / gradient.norm()
    assert entropy() > before + 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "size"), [(1, 2), (4, 2), (2, 16)])
def test_contrastive_loss_is_that_of_really_replacing_one_code(
    kind: str, count: int, size: int
) -> None:
    quantizer, x, weights, codes, codebooks = _start(kind, count, size, rows=80)
    temperature = torch.tensor(0.3)
    distances = code_distances(quantizer.targets(x, codes, codebooks), codebooks)
    loss = contrastive_loss(
        codes, distances, weights, temperature, torch.Generator().manual_seed(4)
    )
    # The same draws: positions, then how far the other code is.
    generator = torch.Generator().manual_seed(4)
    place = torch.randint(count, (80,), generator=generator)
    shift = torch.randint(1, size, (80,), generator=generator)
    row = torch.arange(80)
    negative = codes.clone()
    negative[row, place] = (codes[row, place] + shift) % size
    assert bool(((negative != codes).sum(1) == 1).all())

    def errors(some: Tensor) -> Tensor:
        return (x - quantizer.decode(some, codebooks)).square().sum(1)

    gap = (errors(negative) - errors(codes)) / temperature
    expected = -(weights * torch.sigmoid(gap).log()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_contrastive_loss_is_log_two_where_codewords_coincide_and_zero_where_far() -> None:
    codes = torch.zeros(30, 2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    same = contrastive_loss(codes, torch.ones(30, 2, 4), torch.ones(30), ONE, generator)
    assert float(same) == pytest.approx(math.log(2), abs=1e-6)
    far = torch.full((30, 2, 4), 1e3)
    far[:, :, 0] = 0
    assert float(contrastive_loss(codes, far, torch.ones(30), ONE, generator)) < 1e-6


def test_contrastive_negatives_reach_every_position_and_every_other_code() -> None:
    rows, count, size = 3000, 3, 5
    codes = torch.randint(size, (rows, count), generator=torch.Generator().manual_seed(0))
    distances = torch.zeros(rows, count, size, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    contrastive_loss(codes, distances, torch.ones(rows), ONE, generator).backward()
    negative = distances.grad < 0
    assert bool((negative.sum((1, 2)) == 1).all())
    own = torch.nn.functional.one_hot(codes, size).bool()
    assert not bool((negative & own).any())
    assert int(negative.sum(0).min()) > rows / (count * size) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_reconstruction_error(kind: str) -> None:
    quantizer, x, weights, codes, codebooks = _start(kind)
    codebooks = codebooks * 0.8
    trained, history = train_codebooks(
        x, weights, codes, codebooks, quantizer, Weights(0, 0), 60, seed=0, progress=_quiet
    )
    values = [epoch["reconstruction"] for epoch in history]
    assert len(values) == 60 and values[-1] < 0.97 * values[0]
    final = reconstruction_loss(x, quantizer.decode(codes, trained), weights)
    assert float(final) == pytest.approx(values[-1], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("usage", "contrastive", "names"),
    [
        (0, 0, {"reconstruction"}),
        (1e-4, 0, {"reconstruction", "usage"}),
        (0, 1e-3, {"reconstruction", "contrastive"}),
        (1e-4, 1e-3, {"reconstruction", "usage", "contrastive"}),
    ],
)
def test_a_weight_of_zero_leaves_its_term_out(
    kind: str, usage: float, contrastive: float, names: set[str]
) -> None:
    _, trained, codes, history = _train(kind, usage, contrastive)
    assert len(history) == 3
    assert all(epoch.keys() == names for epoch in history)
    assert all(math.isfinite(value) for epoch in history for value in epoch.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("usage", "contrastive"), [(0, 0), (10.0, 0), (0, 10.0), (1e6, 1e6)])
def test_codes_stay_in_range_and_given_codebooks_stay_as_they_are(
    kind: str, usage: float, contrastive: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "BATCH_ROWS", 64)
    quantizer, x, weights, codes, codebooks = _start(kind, size=5)
    kept = codebooks.clone()
    trained, _ = train_codebooks(
        x,
        weights,
        codes,
        codebooks,
        quantizer,
        Weights(usage, contrastive),
        4,
        seed=0,
        progress=_quiet,
    )
    assert codes.shape == (600, 2) and codes.dtype is torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 5
    assert torch.equal(codebooks, kept) and not torch.equal(trained, kept)
    assert not trained.requires_grad and bool(trained.isfinite().all())


def _hard_perplexity(kind: str, usage: float) -> float:
    quantizer, x, weights, _, codebooks = _start(kind)
    codebooks = codebooks.clone()
    # Four codewords near the rows, twelve away from them: usage is uneven from the start.
    codebooks[:, 4:] = codebooks[:, 4:] * 0.2 + 0.8
    codes = quantizer.encode(x, codebooks, 8)
    trained, _ = train_codebooks(
        x, weights, codes, codebooks, quantizer, Weights(usage, 0), 20, seed=0, progress=_quiet
    )
    final = quantizer.encode(x, trained, 8)
    use = torch.stack([torch.bincount(column, weights, minlength=16) for column in final.T])
    share = use / use.sum(1, keepdim=True)
    return float(torch.special.entr(share).sum(1).exp().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_usage_weight_raises_the_usage_perplexity(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "BATCH_ROWS", 100)
    monkeypatch.setattr(objective, "LEARNING_RATE", 1e-2)
    assert _hard_perplexity(kind, 10.0) > _hard_perplexity(kind, 0.0) + 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_contrastive_weight_keeps_codewords_apart(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "BATCH_ROWS", 100)
    monkeypatch.setattr(objective, "LEARNING_RATE", 2e-2)

    def spread(contrastive: float) -> float:
        _, trained, _, _ = _train(kind, 0, contrastive, epochs=20)
        return sum(float(torch.pdist(book).mean()) for book in trained)

    assert spread(10.0) > 1.1 * spread(0.0)


def test_training_is_deterministic_per_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = _train("additive", 1e-3, 1e-2)
    second = _train("additive", 1e-3, 1e-2)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert first[3] == second[3]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_light_rows_pull_less_than_heavy_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "BATCH_ROWS", 100)
    quantizer, x, _, codes, codebooks = _start(kind)
    errors = []
    for heavy in (slice(0, 300), slice(300, 600)):
        weights = torch.full((600,), 0.02)
        weights[heavy] = 1.98
        trained, _ = train_codebooks(
            x,
            weights,
            codes.clone(),
            codebooks,
            quantizer,
            Weights(0, 0),
            30,
            seed=0,
            progress=_quiet,
        )
        found = quantizer.encode(x, trained, 8)
        errors.append((x - quantizer.decode(found, trained)).square().sum(1)[:300].mean())
    assert errors[0] < errors[1]


def test_progress_is_told_every_epoch() -> None:
    quantizer, x, weights, codes, codebooks = _start("additive")
    told: list[tuple[str, float]] = []
    _, history = train_codebooks(
        x,
        weights,
        codes,
        codebooks,
        quantizer,
        Weights(0, 0),
        3,
        seed=0,
        progress=lambda stage, error: told.append((stage, error)),
    )
    assert [error for _, error in told] == [epoch["reconstruction"] for epoch in history]
    assert [stage for stage, _ in told] == [f"MEC epoch {i}/3" for i in (1, 2, 3)]
