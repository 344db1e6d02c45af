"""Encode, decode and refit against brute force, loops and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mec_embed.learning import quantizers
from mec_embed.learning.quantizers import (
    AdditiveQuantizer,
    ProductQuantizer,
    Quantizer,
    flat_codes,
    quantizer_for,
)

KINDS = ["additive", "product"]


def _seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _case(
    kind: str, rows: int = 200, dim: int = 12, count: int = 3, size: int = 5, seed: int = 0
) -> tuple[Quantizer, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizer, rows, weights, codes and codebooks, all random."""
    generator = torch.Generator().manual_seed(seed)
    width = dim // count if kind == "product" else dim
    x = torch.randn(rows, dim, generator=generator)
    weights = torch.rand(rows, generator=generator) * 3 + 0.05
    codes = torch.randint(size, (rows, count), generator=generator)
    codebooks = torch.randn(count, size, width, generator=generator)
    return quantizer_for(kind), x, weights, codes, codebooks


def _naive_decode(kind: str, codes: torch.Tensor, codebooks: torch.Tensor) -> np.ndarray:
    rows = []
    for row in codes.tolist():
        words = [codebooks[m, k].numpy() for m, k in enumerate(row)]
        rows.append(np.concatenate(words) if kind == "product" else np.sum(words, axis=0))
    return np.stack(rows)


def _weighted_error(
    quantizer: Quantizer,
    x: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
) -> float:
    difference = x.double() - quantizer.decode(codes, codebooks).double()
    return float((weights.double() * difference.square().sum(1)).sum())


def test_quantizer_for_names() -> None:
    assert isinstance(quantizer_for("product"), ProductQuantizer)
    assert isinstance(quantizer_for("additive"), AdditiveQuantizer)


def test_flat_codes_number_the_codewords_of_all_codebooks() -> None:
    codes = torch.tensor([[0, 1, 2], [4, 4, 4]])
    assert flat_codes(codes, 5).tolist() == [[0, 6, 12], [4, 9, 14]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "count", "size"), [(12, 3, 5), (8, 1, 2), (6, 6, 7), (4, 4, 1)])
def test_decode_equals_a_loop(kind: str, dim: int, count: int, size: int) -> None:
    quantizer, _, _, codes, codebooks = _case(kind, 40, dim, count, size)
    decoded = quantizer.decode(codes, codebooks)
    np.testing.assert_allclose(
        decoded.numpy(), _naive_decode(kind, codes, codebooks), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_every_codeword_one_gradient_for_each_use(kind: str) -> None:
    quantizer, _, _, codes, codebooks = _case(kind)
    codebooks.requires_grad_()
    quantizer.decode(codes, codebooks).sum().backward()
    uses = torch.stack([torch.bincount(column, minlength=5) for column in codes.T])
    torch.testing.assert_close(codebooks.grad, uses[:, :, None].float().expand_as(codebooks))


@pytest.mark.parametrize("work_bytes", [64, 8 << 20], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("dim", "count", "size"), [(12, 3, 5), (8, 1, 20), (6, 6, 3)])
def test_product_encode_finds_the_nearest_codewords(
    work_bytes: int, dim: int, count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers, "_WORK_BYTES", work_bytes)
    quantizer, x, _, _, codebooks = _case("product", 150, dim, count, size)
    codes = quantizer.encode(x, codebooks, 1)
    parts = x.view(len(x), count, -1)
    distances = (parts[:, :, None] - codebooks[None]).square().sum(3)
    assert codes.dtype is torch.int64
    assert torch.equal(codes, distances.argmin(2))


@pytest.mark.parametrize("work_bytes", [64, 8 << 20], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("count", "size"), [(1, 6), (2, 6), (3, 4), (4, 3)])
def test_additive_encode_with_a_full_beam_is_exhaustive_search(
    work_bytes: int, count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers, "_WORK_BYTES", work_bytes)
    quantizer, x, _, _, codebooks = _case("additive", 60, 5, count, size)
    codes = quantizer.encode(x, codebooks, size ** (count - 1))
    every = torch.tensor(list(itertools.product(range(size), repeat=count)))
    sums = torch.from_numpy(_naive_decode("additive", every, codebooks))
    best = every[(x[:, None] - sums[None]).square().sum(2).argmin(1)]
    assert codes.shape == (60, count)
    assert torch.equal(codes, best)


def test_a_wider_beam_helps_and_any_beam_beats_or_equals_greedy_on_average() -> None:
    quantizer, x, weights, _, codebooks = _case("additive", 400, 8, 4, 16)
    errors = [
        _weighted_error(quantizer, x, weights, quantizer.encode(x, codebooks, beam), codebooks)
        for beam in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kind", KINDS)
def test_encode_recovers_the_codes_of_decoded_rows(kind: str) -> None:
    quantizer, _, _, codes, codebooks = _case(kind, 100)
    x = quantizer.decode(codes, codebooks)
    assert torch.equal(quantizer.encode(x, codebooks, 64), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_of_one_codeword_and_one_row(kind: str) -> None:
    quantizer, x, _, _, codebooks = _case(kind, 1, size=1)
    assert quantizer.encode(x, codebooks, 8).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_greedy_kmeans_and_reconstructs_better_with_every_codebook(kind: str) -> None:
    quantizer, x, weights, _, _ = _case(kind, 500)
    errors = []
    for count in (1, 2, 4):
        codebooks = quantizer.start(x, weights, count, 16, seed=1)
        assert codebooks.shape == (count, 16, 12 // count if kind == "product" else 12)
        codes = quantizer.encode(x, codebooks, 8)
        errors.append(_weighted_error(quantizer, x, weights, codes, codebooks))
        assert torch.equal(codebooks, quantizer.start(x, weights, count, 16, seed=1))
    assert errors[0] > errors[1] > errors[2]


def test_product_refit_takes_weighted_means_and_leaves_unused_codewords() -> None:
    quantizer, x, weights, codes, codebooks = _case("product")
    codes[codes == 4] = 0
    refitted = quantizer.refit(x, weights, codes, codebooks)
    parts = x.view(len(x), 3, 4)
    for m, k in itertools.product(range(3), range(4)):
        own = codes[:, m] == k
        mean = np.average(parts[own, m].numpy(), axis=0, weights=weights[own].numpy())
        np.testing.assert_allclose(refitted[m, k].numpy(), mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(refitted[:, 4], codebooks[:, 4])


@pytest.mark.parametrize("count", [1, 3])
def test_additive_refit_is_weighted_least_squares(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdditiveQuantizer, "ridge", 1e-10)
    quantizer, x, weights, codes, codebooks = _case("additive", 300, 6, count)
    refitted = quantizer.refit(x, weights, codes, codebooks)
    design = np.zeros((300, count * 5))
    np.put_along_axis(design, flat_codes(codes, 5).numpy(), 1, axis=1)
    root = np.sqrt(weights.double().numpy())[:, None]
    best = np.linalg.lstsq(root * design, root * x.double().numpy(), rcond=None)[0]
    # Codebooks are determined up to constants between them; what they decode to is unique.
    np.testing.assert_allclose(
        quantizer.decode(codes, refitted).numpy(), design @ best, rtol=1e-3, atol=1e-4
    )


def test_additive_refit_with_its_ridge_leaves_unused_codewords_where_they_were() -> None:
    quantizer, x, weights, codes, codebooks = _case("additive")
    codes[codes == 4] = 0
    refitted = quantizer.refit(x, weights, codes, codebooks)
    torch.testing.assert_close(refitted[:, 4], codebooks[:, 4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(refitted[:, 0], codebooks[:, 0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_refit_never_increases_the_weighted_error(kind: str, seed: int) -> None:
    quantizer, x, weights, codes, codebooks = _case(kind, 60, 12, 6, 16, seed)
    weights = weights**6
    errors = [_weighted_error(quantizer, x, weights, codes, codebooks)]
    for _ in range(4):
        codebooks = quantizer.refit(x, weights, codes, codebooks)
        errors.append(_weighted_error(quantizer, x, weights, codes, codebooks))
    assert errors[1] < 0.9 * errors[0]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", KINDS)
def test_refit_follows_the_weights(kind: str) -> None:
    """A heavy row is decoded better after a weighted refit than after a uniform one."""
    quantizer, x, _, codes, codebooks = _case(kind)
    weights = torch.ones(len(x))
    weights[3] = 1e4
    errors = [
        float((x - quantizer.decode(codes, quantizer.refit(x, w, codes, codebooks)))[3].norm())
        for w in (torch.ones(len(x)), weights)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_additive_refit_of_many_rows_adds_up_its_pieces() -> None:
    quantizer = AdditiveQuantizer()
    rows = (1 << 16) + 500
    x, codes = _seeded(rows, 2), torch.arange(rows)[:, None] % 3
    refitted = quantizer.refit(x, torch.ones(rows), codes, torch.zeros(1, 3, 2))
    means = torch.stack([x[codes[:, 0] == k].mean(0) for k in range(3)])
    torch.testing.assert_close(refitted[0], means, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_to_a_target_changes_as_the_row_error_does(kind: str) -> None:
    quantizer, x, _, codes, codebooks = _case(kind, 30)
    targets = quantizer.targets(x, codes, codebooks)
    assert targets.shape == (30, 3, codebooks.shape[2])

    def row_errors(some: torch.Tensor) -> torch.Tensor:
        return (x - quantizer.decode(some, codebooks)).square().sum(1)

    for m, k in itertools.product(range(3), range(5)):
        other = codes.clone()
        other[:, m] = k
        change = (codebooks[m, k] - targets[:, m]).square().sum(1)
        change -= (codebooks[m, codes[:, m]] - targets[:, m]).square().sum(1)
        torch.testing.assert_close(
            change, row_errors(other) - row_errors(codes), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_codeword_put_on_its_target_decodes_the_row_exactly(kind: str) -> None:
    quantizer, x, _, codes, codebooks = _case(kind, 1)
    targets = quantizer.targets(x, codes, codebooks)
    places = range(3) if kind == "product" else [1]
    for m in places:
        codebooks[m, codes[0, m]] = targets[0, m]
    torch.testing.assert_close(quantizer.decode(codes, codebooks), x, rtol=1e-5, atol=1e-5)
