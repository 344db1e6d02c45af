"""Learning of codes for whole arrays: weights, rounding, stages and what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mec_embed.config import CompressionConfig
from mec_embed.learning import fit
from mec_embed.learning.fit import CodeShape, FittedCodes, Rows, fit_codes
from mec_embed.learning.quantizers import quantizer_for
from mec_embed.modules import quantize_codebooks
from mec_embed.packing import unpack

KINDS = ["additive", "product"]


def _seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(x: Tensor, weights: Tensor | None = None) -> Rows:
    return Rows(lambda ids: x[ids], torch.ones(len(x)) if weights is None else weights)


def _shape(
    kind: str = "additive",
    count: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, ...] = (8,),
) -> CodeShape:
    return CodeShape(kind, count, size, dtype, widths)  # type: ignore[arg-type]


def _config(**options: object) -> CompressionConfig:
    return CompressionConfig(**{"epochs": 2, **options})  # type: ignore[arg-type]


def _decoded(fitted: FittedCodes, shape: CodeShape, rows: int, array: int = 0) -> Tensor:
    codes = unpack(
        fitted.encoded[array].packed, shape.num_subvectors, shape.bits, torch.arange(rows)
    )
    assert int(codes.max()) < shape.codebook_size
    return quantizer_for(shape.kind).decode(codes, fitted.codebooks)


def _relative(x: Tensor, decoded: Tensor, weights: Tensor | None = None) -> float:
    weights = torch.ones(len(x)) if weights is None else weights
    share = (weights / weights.sum()).double()[:, None]
    x, decoded = x.double(), decoded.double()
    variance = (share * (x - (share * x).sum(0)).square()).sum()
    return float((share * (x - decoded).square()).sum() / variance)


def _error(x: Tensor, shape: CodeShape, config: CompressionConfig | None = None) -> float:
    fitted = fit_codes([_rows(x)], shape, config or _config())
    return _relative(x, _decoded(fitted, shape, len(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_popularity_survives_the_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SAMPLE_ROWS", 400)
    x, shape = _seeded(3000, 8), _shape(kind)
    weights = torch.full((3000,), 0.5)
    heavy = torch.arange(0, 3000, 100)
    weights[heavy] = 300.0
    light = (weights < 1).nonzero()[:, 0]

    def errors(some: Tensor) -> tuple[float, float]:
        fitted = fit_codes([_rows(x, some)], shape, _config())
        rows = (x - _decoded(fitted, shape, len(x))).square().sum(1)
        return float(rows[heavy].mean()), float(rows[light].mean())

    weighted, uniform = errors(weights), errors(torch.ones(3000))
    assert weighted[0] < 0.6 * weighted[1]
    assert weighted[0] < 0.6 * uniform[0]
    assert weighted[1] > uniform[1]


def test_a_sample_reads_no_more_rows_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SAMPLE_ROWS", 200)
    x, largest = _seeded(2000, 8), []

    def read(ids: Tensor) -> Tensor:
        largest.append(len(ids))
        return x[ids]

    fit_codes([Rows(read, torch.ones(2000))], _shape(), _config())
    assert largest[0] < 300 and sum(largest[1:]) == 2000


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_are_those_of_least_error_for_all_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SAMPLE_ROWS", 200)
    monkeypatch.setattr(fit, "CHUNK_BYTES", 300 * 32)
    x, shape = _seeded(2000, 8), _shape(kind, size=8)
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(1)) + 0.1
    arrays = [_rows(x[:1200], weights[:1200]), _rows(x[1200:], weights[1200:])]
    fitted = fit_codes(arrays, shape, _config())
    codes = torch.cat(
        [
            unpack(each.packed, 2, 3, torch.arange(rows))
            for each, rows in zip(fitted.encoded, (1200, 800), strict=True)
        ]
    ).long()
    quantizer, design = quantizer_for(kind), torch.nn.functional.one_hot(codes, 8).flatten(1)
    root = weights.sqrt().double()[:, None]
    if kind == "additive":
        least = torch.linalg.lstsq(design * root, x * root, driver="gelsd").solution
        expected = design.double() @ least
    else:
        halves = (x * weights[:, None]).view(-1, 2, 4).double().transpose(0, 1)
        parts = design.view(-1, 2, 8).double().transpose(0, 1)
        mass = (parts * weights[:, None]).sum(1)[:, :, None]
        means = (parts.transpose(1, 2) @ halves) / mass
        expected = (parts @ means).transpose(0, 1).flatten(1)
    found = quantizer.decode(codes, fitted.codebooks)
    error, best = (_relative(x, decoded, weights) for decoded in (found, expected))
    assert best <= error + 1e-6 < 1.0002 * best + 1e-6


def test_rounds_go_on_where_errors_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    x, shape = _seeded(4000, 4), _shape(count=5, size=64, widths=(4,))
    errors = []
    for part in (1.0, fit.LEAST_PART):
        monkeypatch.setattr(fit, "LEAST_PART", part)
        errors.append(fit_codes([_rows(x)], shape, _config(epochs=0)).error)
    assert errors[1] < 0.95 * errors[0] < 1e-4


@pytest.mark.parametrize("scale", [3e4, 4e4])
def test_rows_at_the_end_of_half_precision(scale: float) -> None:
    x = _seeded(3000, 8, seed=2) * scale / 100
    generator = torch.Generator().manual_seed(2)
    outliers = torch.rand(3000, 1, generator=generator) < 0.01
    x += outliers * torch.randn(3000, 8, generator=generator).sign() * scale
    shape = _shape(count=4, dtype=torch.float16)
    fitted = fit_codes([_rows(x)], shape, _config())
    assert bool(fitted.codebooks.isfinite().all())
    assert _relative(x, _decoded(fitted, shape, 3000)) < 0.05


def test_codebooks_are_fitted_to_a_sample_of_very_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "SAMPLE_ROWS", 200)
    monkeypatch.setattr(fit, "CHUNK_BYTES", 320 * 32)
    x, shape = _seeded(4000, 8), _shape(size=8)
    weights = 1 / torch.arange(1, 4001).float()
    rows, seen = _rows(x, weights), []
    add = fit._Refit.add

    def spy(self: fit._Refit, part: Tensor, mass: Tensor, codes: Tensor) -> None:
        seen.append(len(part))
        add(self, part, mass, codes)

    monkeypatch.setattr(fit._Refit, "add", spy)
    errors = []
    for most in (4000, 1000, 100):
        monkeypatch.setattr(fit, "REFIT_ROWS", most)
        seen.clear()
        fitted = fit_codes([rows], shape, _config())
        errors.append(_relative(x, _decoded(fitted, shape, len(x)), weights))
        assert sum(seen) <= 1.2 * most + 13
    assert errors[0] < errors[1] < errors[2]


def test_ranks_draw_the_rows_that_one_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "REFIT_ROWS", 300)
    rows = _rows(_seeded(1000, 8), torch.rand(1000) + 0.01)
    whole, mass = fit._drawn(rows, 256, 512, 256)
    parts = [fit._drawn(rows, start, stop, 256) for start, stop in ((256, 300), (300, 512))]
    assert torch.equal(whole, torch.cat([parts[0][0], parts[1][0] + 44]))
    assert torch.equal(mass, torch.cat([part[1] for part in parts]))
    assert 50 < len(whole) < 110


@pytest.mark.parametrize(("count", "size", "gain"), [(4, 32, 0.99), (24, 4, 1.02)])
def test_relaxed_rounds_find_less_error_and_no_more_with_many_codebooks(
    count: int, size: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, shape = _seeded(4000, 16), _shape(count=count, size=size, widths=(16,))
    found = []
    for relaxation in ((0.0, 0.0), fit.RELAXATION):
        monkeypatch.setattr(fit, "RELAXATION", relaxation)
        fitted = [fit_codes([_rows(x)], shape, _config(epochs=0, seed=seed)) for seed in range(3)]
        found.append(sum(each.error for each in fitted))
    assert found[1] < gain * found[0]


# --- what is learned ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("usage", "contrastive"), [(0, 0), (1e-4, 2e-3), (50.0, 0), (0, 50.0), (1e8, 1e8), (1e38, 1e38)]
)
def test_the_error_is_never_larger_than_after_the_start(
    kind: str,
    dtype: torch.dtype,
    usage: float,
    contrastive: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "ROUNDS", 2)
    x, shape = _seeded(400, 8), _shape(kind, dtype=dtype)
    config = _config(usage_weight=usage, contrastive_weight=contrastive, epochs=6)
    fitted = fit_codes([_rows(x)], shape, config)
    assert 0 < fitted.error <= fitted.start_error < 1
    # What is claimed is what is decoded: the final beam is wider, so it may only be better.
    found = _relative(x, _decoded(fitted, shape, 400))
    assert found <= fitted.error * 1.01
    assert found >= fitted.error * 0.9
    assert len(fitted.history) == 6


def test_training_that_goes_astray_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    far = []

    def astray(x, weights, codes, codebooks, *rest):  # noqa: ANN001
        far.append(codebooks)
        return codebooks + 1e3, [{"reconstruction": 1.0}]

    monkeypatch.setattr(fit, "train_codebooks", astray)
    fitted = fit_codes([_rows(_seeded(400, 8))], _shape(), _config())
    assert far and fitted.error <= fitted.start_error


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_that_ends_in_nan_is_taken_back(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fit, "train_codebooks", lambda x, w, codes, books, *rest: (books * value, [])
    )
    fitted = fit_codes([_rows(_seeded(400, 8))], _shape(), _config())
    assert bool(fitted.codebooks.isfinite().all()) and fitted.error <= fitted.start_error


def test_refinement_lowers_the_error_and_reports_every_stage() -> None:
    stages: list[tuple[str, float]] = []
    fitted = fit_codes(
        [_rows(_seeded(600, 8))],
        _shape(count=3),
        _config(epochs=1),
        lambda stage, error: stages.append((stage, error)),
    )
    names = [stage for stage, _ in stages]
    assert names[0] == "k-means" and names[-1] == "MEC" and names[-2] == "MEC epoch 1/1"
    assert set(names[1:-2]) == {"refine"}
    errors = [error for stage, error in stages if not stage.startswith("MEC")]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    assert stages[0][1] == fitted.start_error and stages[-1][1] == fitted.error


@pytest.mark.parametrize("kind", KINDS)
def test_no_epochs_leave_the_history_empty(kind: str) -> None:
    fitted = fit_codes([_rows(_seeded(300, 8))], _shape(kind), _config(epochs=0))
    assert fitted.history == [] and fitted.error <= fitted.start_error


@pytest.mark.parametrize("kind", KINDS)
def test_dead_codewords_are_revived(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shape = _seeded(600, 8), _shape(kind)
    x[:40] += 12.0
    quantizer = type(quantizer_for(kind))

    def mostly_dead(self, x, weights, count, size, seed):  # noqa: ANN001
        books = torch.full((count, size, 8 // count if kind == "product" else 8), 1e3)
        books[:, :2] = torch.tensor([-0.1, 0.1])[:, None]
        return books

    monkeypatch.setattr(quantizer, "start", mostly_dead)
    fitted = fit_codes([_rows(x)], shape, _config(epochs=0))
    assert fitted.error < 0.5 * fitted.start_error
    monkeypatch.setattr(fit._Learner, "_revive", lambda self, codebooks, codes: codebooks)
    without = fit_codes([_rows(x)], shape, _config(epochs=0))
    assert without.encoded[0].dead_codes >= 24
    assert fitted.encoded[0].dead_codes < 8
    assert fitted.error < 0.8 * without.error


def test_revived_codewords_go_to_heavy_rows() -> None:
    x = torch.cat([torch.zeros(200, 4), torch.eye(4).repeat(5, 1) * 10])
    weights = torch.ones(len(x))
    weights[200] = 1e6
    units = fit.Units.of(x, weights, _shape("product", 1, 4, widths=(4,)))
    learner = fit._Learner(x, weights, units, _config(), lambda stage, error: None)
    codebooks = torch.zeros(1, 4, 4)
    revived = learner._revive(codebooks, torch.zeros(len(x), 1, dtype=torch.int64))
    assert torch.equal(revived[0, 0], torch.zeros(4))
    torch.testing.assert_close(revived[0, 1:], x[200].expand(3, 4))
    assert not codebooks.any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_result(kind: str) -> None:
    x, state = _seeded(500, 8), torch.get_rng_state()
    first, again, other = (
        fit_codes([_rows(x)], _shape(kind), _config(seed=seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.codebooks, again.codebooks)
    assert torch.equal(first.encoded[0].packed, again.encoded[0].packed)
    assert first.history == again.history and first.error == again.error
    assert not torch.equal(first.encoded[0].packed, other.encoded[0].packed)
    assert torch.equal(state, torch.get_rng_state())


def test_additive_codes_beat_product_codes_on_correlated_columns() -> None:
    x = _seeded(1000, 4, seed=1) @ _seeded(4, 16, seed=2)
    x += 0.1 * _seeded(1000, 16, seed=3)
    errors = [_error(x, _shape(kind, 4, 16, widths=(16,))) for kind in KINDS]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_more_codebooks_and_more_codewords_lower_the_error(kind: str) -> None:
    x = _seeded(800, 8)
    errors = [_error(x, _shape(kind, *shape)) for shape in ((1, 8), (2, 8), (2, 32), (4, 32))]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


# --- extreme arrays -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 15, 16])
def test_as_many_codewords_as_rows_are_exact(kind: str, count: int, rows: int) -> None:
    x, shape = _seeded(rows, 8), _shape(kind, count)
    fitted = fit_codes([_rows(x)], shape, _config())
    torch.testing.assert_close(_decoded(fitted, shape, rows), x, rtol=1e-4, atol=1e-5)
    assert fitted.error <= fitted.start_error < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-4])
def test_rows_that_are_all_equal(kind: str, dtype: torch.dtype, value: float) -> None:
    x, shape = torch.full((300, 8), value), _shape(kind, dtype=dtype)
    x[:, 1] *= 0.7
    fitted = fit_codes([_rows(x)], shape, _config())
    decoded = _decoded(fitted, shape, 300)
    assert bool((decoded == decoded[0]).all())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 1e-2}
    assert float((decoded - x).abs().max()) <= tolerance[dtype] * abs(value)


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_the_origin_the_error_is_that_of_the_centred_rows(kind: str) -> None:
    x, shape = _seeded(500, 8), _shape(kind)
    assert _error(x + 30.0, shape) < 1.1 * _error(x, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("magnitude", [1e3, 1e-2, 1e-3, 1e-4])
def test_the_magnitude_of_the_rows_does_not_matter(
    kind: str, dtype: torch.dtype, magnitude: float
) -> None:
    """Tables that were initialised with a std of 1e-4, as FuxiCTR's, are common."""
    x, shape = _seeded(400, 8), _shape(kind, count=4, size=16, dtype=dtype)
    fitted = fit_codes([_rows(x * magnitude)], shape, _config())
    found = _relative(x * magnitude, _decoded(fitted, shape, 400))
    assert found < 1.1 * _error(x, shape)
    assert found < 1.05 * fitted.error


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_lookups_does_not_matter(kind: str) -> None:
    x, weights, shape = _seeded(400, 8), torch.rand(400) + 0.1, _shape(kind)
    small, large = (
        fit_codes([_rows(x, weights * scale)], shape, _config()) for scale in (1e-3, 1e7)
    )
    assert small.error == pytest.approx(large.error, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_very_uneven_weights(kind: str) -> None:
    x, shape = _seeded(500, 8), _shape(kind)
    weights = 10.0 ** (torch.arange(500) % 10 - 2.0)
    fitted = fit_codes([_rows(x, weights)], shape, _config())
    decoded = _decoded(fitted, shape, 500)
    assert fitted.error < 0.3 and bool(decoded.isfinite().all())
    assert _relative(x, decoded, weights) == pytest.approx(fitted.error, rel=0.1)


# --- storage dtypes, several arrays -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_codebooks_are_exactly_what_their_dtype_can_hold(kind: str, dtype: torch.dtype) -> None:
    shape = _shape(kind, dtype=dtype)
    books = fit_codes([_rows(_seeded(400, 8))], shape, _config()).codebooks
    assert books.dtype is torch.float32 and books.shape == (2, 16, 4 if kind == "product" else 8)
    if dtype is torch.int8:
        steps, scales = quantize_codebooks(books)
        stored = steps.float() * scales.float()[:, :, None]
    else:
        stored = books.to(dtype).float()
    torch.testing.assert_close(stored, books, rtol=0, atol=0)


def test_int8_columns_that_are_stored_apart_have_scales_of_their_own() -> None:
    x = _seeded(400, 9)
    x[:, 8] *= 1e-3
    together = _shape(dtype=torch.int8, widths=(9,))
    apart = _shape(dtype=torch.int8, widths=(8, 1))
    books = fit_codes([_rows(x)], apart, _config()).codebooks
    for part in books.split((8, 1), 2):
        steps, scales = quantize_codebooks(part)
        assert torch.equal(steps.float() * scales.float()[:, :, None], part)
    assert books[:, :, 8].abs().max() > 0
    rounded = together.round(_seeded(2, 16, 9))
    assert not torch.equal(rounded, apart.round(_seeded(2, 16, 9)))


def test_int8_errors_are_measured_on_rounded_codebooks() -> None:
    x = _seeded(16, 8)
    fitted = fit_codes([_rows(x)], _shape(count=1, dtype=torch.int8), _config())
    assert 1e-6 < fitted.error < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_several_arrays_share_codebooks(kind: str) -> None:
    x, shape = _seeded(900, 8), _shape(kind)
    parts = x.split((500, 1, 399))
    fitted = fit_codes([_rows(part) for part in parts], shape, _config())
    whole = fit_codes([_rows(x)], shape, _config())
    assert len(fitted.encoded) == 3 and len(whole.encoded) == 1
    assert torch.equal(fitted.codebooks, whole.codebooks)
    decoded = torch.cat([_decoded(fitted, shape, len(p), i) for i, p in enumerate(parts)])
    torch.testing.assert_close(decoded, _decoded(whole, shape, 900))


@pytest.mark.parametrize("sample", [300, 1 << 17])
def test_an_array_of_many_lookups_is_fitted_better(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SAMPLE_ROWS", sample)
    first, second, shape = _seeded(500, 8, seed=1), _seeded(500, 8, seed=2) * 2 + 5, _shape()
    fitted = fit_codes(
        [_rows(first), _rows(second, torch.full((500,), 1e-2))], shape, _config(epochs=0)
    )
    swapped = fit_codes(
        [_rows(first, torch.full((500,), 1e-2)), _rows(second)], shape, _config(epochs=0)
    )
    for number, x in enumerate((first, second)):
        errors = [_relative(x, _decoded(f, shape, 500, number)) for f in (fitted, swapped)]
        assert (errors[0] < 0.8 * errors[1]) is (number == 0)


def test_perplexity_and_dead_codes_describe_the_final_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "CHUNK_ROWS", 64)
    x, shape = _seeded(300, 8), _shape(size=32)
    encoded = fit_codes([_rows(x)], shape, _config()).encoded[0]
    codes = unpack(encoded.packed, 2, 5, torch.arange(300))
    used = torch.stack([torch.bincount(column, minlength=32) for column in codes.T])
    share = used / 300
    assert encoded.dead_codes == int((used == 0).sum())
    assert encoded.perplexity == pytest.approx(torch.special.entr(share).sum(1).exp().tolist())
    assert all(1 < value < 32 for value in encoded.perplexity)


@pytest.mark.parametrize(("limit", "value"), [("CHUNK_ROWS", 64), ("CHUNK_BYTES", 20 * 4 * 8)])
def test_rows_are_encoded_in_chunks_as_at_once(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, shape = _seeded(300, 8), _shape(size=5)
    at_once = fit_codes([_rows(x)], shape, _config())
    monkeypatch.setattr(fit, limit, value)
    sizes: list[int] = []

    def read(ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return x[ids]

    in_chunks = fit_codes([Rows(read, torch.ones(300))], shape, _config())
    # The sample is read first.
    assert max(sizes[1:]) == (64 if limit == "CHUNK_ROWS" else 16) and sum(sizes[1:]) == 300
    assert torch.equal(at_once.encoded[0].packed, in_chunks.encoded[0].packed)
    assert at_once.encoded[0].dead_codes == in_chunks.encoded[0].dead_codes


def test_a_codebook_size_that_is_no_power_of_two() -> None:
    x, shape = _seeded(400, 8), _shape(size=11)
    assert shape.bits == 4
    fitted = fit_codes([_rows(x)], shape, _config())
    assert fitted.error < 0.5 and fitted.codebooks.shape == (2, 11, 8)
    _decoded(fitted, shape, 400)
