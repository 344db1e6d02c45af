"""The C kernel that searches codes and adds up normal equations, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mec_embed.learning import quantizers
from mec_embed.learning.quantizers import AdditiveQuantizer, ProductQuantizer, quantizer_for
from mec_embed.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the kernel was not built")


def _case(rows: int, dim: int, count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, and codebooks that get finer, as those of residuals do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    scale = 0.7 ** torch.arange(count)
    return x, torch.randn(count, size, dim, generator=generator) * scale[:, None, None]


def _lane_codes(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes (n, M) as ``native/search.h`` says it finds them, row by row and in plain steps."""
    count, size, _ = codebooks.shape
    words = codebooks.flatten(0, 1)
    cross = (2 * words @ words.T).view(count, size, count, size)
    alone = (words.square().sum(1) - 2 * x @ words.T).view(-1, count, size)
    given = zip(x.square().sum(1), alone, strict=True)
    rows = [_lane_search(*row, cross, min(beam, 32)) for row in given]
    return torch.tensor(rows, dtype=torch.int64).view(-1, count)


def _lane_search(norm: Tensor, alone: Tensor, cross: Tensor, beam: int) -> list[int]:
    """Codes of one row: of each of 16 lanes the two best sums are kept, of these ``beam``."""
    count, size = alone.shape
    sums: list[tuple[float, list[int]]] = [(float(norm), [])]
    turn = 4 if size in (3, 4) else 1
    number = 32 << max(0, math.ceil(math.log2(-(-size // 16))))
    for m in range(count):
        lanes: list[list[tuple[int, float, list[int]]]] = [[] for _ in range(16)]
        for i, (error, codes) in enumerate(sums):
            totals = alone[m] + error
            for d, code in enumerate(codes):
                totals = totals + cross[d, code, m]
            keys = totals.view(torch.int32) // number
            for k, (key, total) in enumerate(zip(keys.tolist(), totals.tolist(), strict=True)):
                # The first lane is the one that the last sum has its first codeword in.
                lane = (k - turn * (len(sums) - 1 - i)) % 16
                lanes[lane].append((key, total, [*codes, k]))
        if m == count - 1:
            return min((each for lane in lanes for each in lane), key=lambda each: each[1])[2]
        ranked = [sorted(lane, key=lambda each: each[0]) for lane in lanes]
        best = [lane[place] for place in (0, 1) for lane in ranked if len(lane) > place]
        bound = sorted([key for key, *_ in best] + [1 << 31] * beam)[beam - 1]
        best = [each for each in best if each[0] < bound] + [e for e in best if e[0] == bound]
        sums = [(total, codes) for _, total, codes in best[:beam]]
    raise AssertionError


def _torch_codes(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    words = codebooks.flatten(0, 1)
    return quantizers._beam_search(x, codebooks, words @ words.T, beam)


def _errors(x: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    decoded = AdditiveQuantizer().decode(codes, codebooks)
    return (x - decoded).square().sum(1).double()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 20),
    dim=st.integers(1, 12),
    count=st.integers(1, 6),
    size=st.integers(1, 40),
    beam=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_codes_are_as_good_as_those_of_plain_steps(
    rows: int, dim: int, count: int, size: int, beam: int, seed: int
) -> None:
    x, codebooks = _case(rows, dim, count, size, seed)
    codes = AdditiveQuantizer().encode(x, codebooks, beam)
    assert codes.shape == (rows, count) and codes.dtype is torch.int64
    if not rows:
        return
    assert int(codes.min()) >= 0 and int(codes.max()) < size
    found = _errors(x, codes, codebooks)
    expected = _errors(x, _lane_codes(x, codebooks, beam), codebooks)
    # Rounding may change which of two nearly equal sums is kept, for few rows.
    close = (found - expected).abs() <= 1e-4 + 1e-3 * expected
    assert int((~close).sum()) <= 1
    assert float(found.sum()) <= 1.2 * float(expected.sum()) + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 6),
    size=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 40, 64, 130]),
    beam=st.integers(1, 33),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_codes_are_those_of_every_length_of_vectors(
    count: int, size: int, beam: int, rows: int, seed: int
) -> None:
    x, codebooks = _case(rows, 9, count, size, seed)
    x[seed % rows] *= (1.0, 1e-20, 1e20, math.nan)[seed % 4]
    if seed % 8 == 4:  # NaN of all bits, the last of all keys
        x[seed % rows] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    found = []
    try:
        for most in (16, 32, 64):
            cpu.kernel.limit_vectors(most)
            found.append(AdditiveQuantizer().encode(x, codebooks, beam))
    finally:
        cpu.kernel.limit_vectors(64)
    assert found[0].equal(found[1]) and found[0].equal(found[2])


@pytest.mark.parametrize(
    ("count", "size", "beam"),
    [
        (1, 300, 16),
        (2, 1024, 16),
        (3, 256, 24),
        (3, 257, 8),
        (4, 100, 64),
        (5, 33, 7),
        (6, 4, 32),
        (7, 3, 20),
        (8, 64, 1),
        (12, 16, 64),
        (17, 128, 16),
        (16, 2, 5),
        (2, 2048, 4),
    ],
)
def test_codes_equal_those_of_plain_steps(count: int, size: int, beam: int) -> None:
    x, codebooks = _case(60, 40, count, size)
    codes = AdditiveQuantizer().encode(x, codebooks, beam)
    expected = _lane_codes(x, codebooks, beam)
    difference = _errors(x, codes, codebooks) - _errors(x, expected, codebooks)
    assert int((difference.abs() < 1e-5).sum()) >= 58


@pytest.mark.parametrize(("count", "size"), [(3, 256), (6, 64), (8, 16), (12, 4), (24, 2)])
def test_lanes_lose_little_against_the_best_sums(count: int, size: int) -> None:
    x, codebooks = _case(400, 40, count, size)
    for beam in (4, 8, 16):
        found = _errors(x, AdditiveQuantizer().encode(x, codebooks, beam), codebooks).sum()
        best = _errors(x, _torch_codes(x, codebooks, beam), codebooks).sum()
        assert float(found) <= 1.01 * float(best)


@pytest.mark.parametrize(("count", "size"), [(2, 16), (2, 32), (3, 4), (6, 2), (4, 3)])
def test_where_all_sums_fit_the_search_is_exhaustive(count: int, size: int) -> None:
    x, codebooks = _case(200, 6, count, size)
    codes = AdditiveQuantizer().encode(x, codebooks, 32)
    every = torch.cartesian_prod(*[torch.arange(size)] * count)
    least = torch.cdist(x, AdditiveQuantizer().decode(every, codebooks)).amin(1).square()
    torch.testing.assert_close(_errors(x, codes, codebooks).float(), least, rtol=1e-3, atol=1e-5)


def test_product_codes_are_the_nearest_codewords_the_first_of_equal_ones() -> None:
    x, codebooks = _case(500, 6, 1, 37)
    codebooks = codebooks.view(37, 3, 2).transpose(0, 1).contiguous()
    codebooks[:, 20:] = codebooks[:, :17]
    codes = ProductQuantizer().encode(x, codebooks, 1)
    distances = (x.view(-1, 3, 1, 2) - codebooks).square().sum(3)
    torch.testing.assert_close(distances.gather(2, codes[:, :, None])[:, :, 0], distances.amin(2))
    assert int(codes.max()) < 20


def test_of_equal_codewords_the_first_is_chosen() -> None:
    codes = AdditiveQuantizer().encode(torch.ones(9, 3), torch.ones(1, 50, 3), 8)
    assert not codes.any()


def test_of_equal_sums_the_first_is_extended() -> None:
    # Both words of the first codebook, with the other of the second, make the row.
    codebooks = torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]]])
    codes = AdditiveQuantizer().encode(torch.full((9, 1), 3.0), codebooks, 8)
    assert codes.tolist() == [[0, 0]] * 9


@pytest.mark.parametrize(("count", "size"), [(3, 16), (3, 256), (2, 32)])
def test_codewords_that_are_equal_do_not_displace_better_ones(count: int, size: int) -> None:
    x, codebooks = _case(200, 8, count, size)
    codebooks[:, : size // 2] = 0
    for beam in (1, 4, 8, 16):
        found = _errors(x, AdditiveQuantizer().encode(x, codebooks, beam), codebooks).sum()
        best = _errors(x, _torch_codes(x, codebooks, beam), codebooks).sum()
        assert float(found) <= 1.02 * float(best)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize(("count", "size"), [(1, 5), (3, 5), (3, 40)])
def test_codewords_that_are_no_numbers_are_not_chosen(value: float, count: int, size: int) -> None:
    x, codebooks = _case(50, 4, count, size)
    codebooks[0, 1] = value
    codes = AdditiveQuantizer().encode(x, codebooks, 8)
    assert not bool((codes[:, 0] == 1).any())
    codebooks[:] = value
    assert int(AdditiveQuantizer().encode(x, codebooks, 8).max()) < size


@pytest.mark.parametrize(("count", "size", "beam"), [(3, 256, 16), (7, 31, 12)])
def test_threads_and_pieces_change_nothing(
    count: int, size: int, beam: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codebooks = _case(2000, 8, count, size)
    before, found = torch.get_num_threads(), []
    try:
        for threads, work_bytes in ((1, 4 << 20), (2, 4 << 20), (5, 4 << 20), (3, 1 << 19)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(quantizers, "_WORK_BYTES", work_bytes)
            found.append(AdditiveQuantizer().encode(x, codebooks, beam))
    finally:
        torch.set_num_threads(before)
    # Products of other shapes may round otherwise, which ties alone could show.
    assert all(int((codes != found[0]).any(1).sum()) <= 1 for codes in found)


def test_rows_need_not_be_contiguous() -> None:
    x, codebooks = _case(50, 12, 3, 20)
    wide = torch.randn(50, 30)
    wide[:, 5:17] = x
    quantizer = AdditiveQuantizer()
    expected = quantizer.encode(x, codebooks, 4)
    assert torch.equal(quantizer.encode(wide[:, 5:17], codebooks, 4), expected)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("size", [5, 64])
def test_rows_that_are_no_numbers_get_some_code(value: float, size: int) -> None:
    x, codebooks = _case(30, 4, 3, size)
    clean = AdditiveQuantizer().encode(x, codebooks, 8)
    x[7] = value
    x[11, 2] = value
    codes = AdditiveQuantizer().encode(x, codebooks, 8)
    assert int(codes.min()) >= 0 and int(codes.max()) < size
    others = [row for row in range(30) if row not in (7, 11)]
    assert torch.equal(codes[others], clean[others])
    codebooks[1, 3] = value
    codes = AdditiveQuantizer().encode(x, codebooks, 8)
    assert int(codes.min()) >= 0 and int(codes.max()) < size


def test_gradients_of_rows_and_codebooks_do_not_matter() -> None:
    x, codebooks = _case(20, 4, 2, 8)
    expected = AdditiveQuantizer().encode(x, codebooks, 4)
    found = AdditiveQuantizer().encode(x.requires_grad_(), codebooks.requires_grad_(), 4)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["additive", "product"])
def test_without_the_kernel_torch_does_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebooks = _case(300, 12, 3, 16)
    weights = torch.rand(300) + 0.1
    if kind == "product":
        codebooks = codebooks[:, :, :4].contiguous()
    quantizer = quantizer_for(kind)

    def learned(codes: Tensor) -> tuple[Tensor, Tensor]:
        found = quantizer.encode(x, codebooks, 32)
        return found, quantizer.refit(x, weights, codes, codebooks)

    given = torch.randint(16, (300, 3))
    codes, refitted = learned(given)
    monkeypatch.setattr(cpu, "kernel", None)
    assert not cpu.available()
    plain_codes, plain_refitted = learned(given)
    same = (codes == plain_codes).all(1)
    assert int(same.sum()) >= (300 if kind == "product" else 290)
    torch.testing.assert_close(refitted, plain_refitted)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 60),
    dim=st.integers(1, 9),
    count=st.integers(1, 6),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
)
def test_normal_equations_equal_those_of_the_design_matrix(
    rows: int, dim: int, count: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    weights = torch.rand(rows, generator=generator)
    codes = torch.randint(size, (rows, count), generator=generator)
    normal, right = quantizers._normal_equations(x, weights, codes, size)
    design = torch.nn.functional.one_hot(codes, size).double().flatten(1)
    scaled = design.T * weights.double()
    blocks = torch.ones(count, count).tril().bool().repeat_interleave(size, 0)
    blocks = blocks.repeat_interleave(size, 1)
    torch.testing.assert_close(normal[blocks], (scaled @ design)[blocks])
    torch.testing.assert_close(right, scaled @ x.double())


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_that_name_no_codeword_are_refused(code: int) -> None:
    codes = torch.zeros(10, 2, dtype=torch.int64)
    codes[6, 0] = code
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        quantizers._normal_equations(torch.randn(10, 3), torch.ones(10), codes, 4)
