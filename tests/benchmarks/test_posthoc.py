"""The post-hoc baselines on a tiny click log: bytes, values, gradients."""

from __future__ import annotations

import functools
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.quality import posthoc
from benchmarks.quality.common import PARTS, Base, embedding_bytes, tables
from benchmarks.quality.posthoc import POSTHOC, ROW_BITS
from examples.ctr.base import build_model
from examples.ctr.data import counts
from examples.ctr.generator import generate
from examples.ctr.models import DNN
from examples.ctr.settings import SETTINGS
from mec_embed import CompressedEmbedding, distill

RATIOS = [2, 4, 8, 16, 32]
CODES = ["pq", "opq", "mec_released", "mec_described"]
#: Where each method finds a way.
FEASIBLE = {"fp16": 2, "int8": 2, "int4": 4, "int2": 4, "svd": 8} | dict.fromkeys(CODES, 16)
HALF = 2.0**-11


@functools.cache
def _base() -> Base:
    data = generate(examples=3000, fields=4, max_rows=2000)
    settings = replace(SETTINGS["generator"], dim=16)
    model = build_model(data.fields, data.rows, settings).eval()
    return Base(data, settings, model, counts(data), seed=0)


@functools.cache
def _compressed(name: str, ratio: float) -> nn.Module | None:
    return POSTHOC[name](_base(), ratio)


def _fresh(name: str) -> nn.Module:
    return POSTHOC[name](_base(), FEASIBLE[name])


def _rows(module: nn.Module, count: int) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.arange(count))


@torch.no_grad()
def _error(model: nn.Module) -> float:
    error = 0.0
    for part in PARTS:
        for field, table in getattr(_base().model, part).items():
            off = _rows(getattr(model, part)[field], table.num_embeddings) - table.weight
            error += float(off.square().sum())
    return error


def _largest() -> torch.Tensor:
    return _base().model.embeddings["field_03"].weight.detach()


def _table_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for part in PARTS for p in getattr(model, part).parameters()]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", POSTHOC)
def test_every_method_keeps_the_budget_or_refuses(name, ratio):
    base, model = _base(), _compressed(name, ratio)
    assert model is not None or ratio > FEASIBLE[name]
    if model is None:
        return
    assert embedding_bytes(model) <= base.budget(ratio)
    assert not list(tables(model)), "a dense table is left"
    ids = base.data.ids["train"][:64]
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (64,) and bool(logits.isfinite().all())
    module = model.embeddings["field_03"]
    assert module(ids[:6, 3].view(2, 3)).shape == (2, 3, 16)
    assert module(ids[:6, 3]).dtype is torch.float32
    assert len(list(tables(base.model))) == 8, "the base has changed"


@pytest.mark.parametrize("name", ["svd", *CODES])
def test_more_bytes_lower_the_error(name):
    models = [model for ratio in RATIOS if (model := _compressed(name, ratio)) is not None]
    errors = [_error(model) for model in models]
    assert len(errors) >= 3
    assert errors == sorted(errors) and errors[0] < 0.5 * errors[-1]


def test_more_bits_lower_the_error():
    errors = [_error(_fresh(name)) for name in ROW_BITS]
    assert errors == sorted(errors)
    square = sum(float(p.detach().square().sum()) for p in _table_parameters(_base().model))
    assert errors[0] < HALF**2 * square and errors[-1] < 0.2 * square


@pytest.mark.parametrize("name", ROW_BITS)
def test_the_natural_ratio_is_the_largest(name):
    base = _base()
    ratio = posthoc.natural_ratio(name, base)
    model = POSTHOC[name](base, ratio)
    assert embedding_bytes(model) == base.budget(ratio)
    assert POSTHOC[name](base, ratio * (1 + 2 / embedding_bytes(model))) is None


def _hard_rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=generator)
    offset = torch.tensor([0, 3, -3, 0, 0.1, 0, 1e-3, -100])[:, None]
    scale = torch.tensor([1, 1e-2, 1e-2, 1e-2, 0, 0, 1e-4, 1e3])[:, None]
    return (offset + scale * x).repeat(20, 1)


@pytest.mark.parametrize("read", [_hard_rows, _largest])
def test_int8_rows_are_off_by_half_a_step_at_most(read):
    weight = read()
    module = posthoc._quantized_rows(weight, bits=8)
    assert isinstance(module, posthoc.RowQuantized)
    step = module.affine.detach().float()[:, :1]
    off = (_rows(module, len(weight)) - weight).abs()
    assert bool((off <= 0.5 * step * (1 + 1e-3) + 1e-6 * weight.abs()).all())
    spread = weight.amax(1) - weight.amin(1)
    allowed = spread * 1.02 + HALF * 2 * weight.abs().amax(1) + 255 * 2.0**-24
    assert bool((255 * step[:, 0] <= allowed).all()), "steps are wider than the range asks"


@pytest.mark.parametrize("bits", [2, 4])
def test_clipping_is_never_worse_than_the_whole_range(bits):
    x = _largest().numpy()
    whole = posthoc._affine_error(x, x.min(1, keepdims=True), x.max(1, keepdims=True), bits)
    clipped = posthoc._affine_error(x, *posthoc._range(x, bits), bits)
    assert (clipped <= whole).all() and clipped.sum() < 0.95 * whole.sum()


def test_svd_of_full_rank_is_exact_to_fp16():
    weight = _largest()
    directions, energy = posthoc._principal(weight, torch.linspace(0.1, 1, len(weight)))
    off = _rows(posthoc.low_rank(weight, directions, 16), len(weight)) - weight
    assert float(off.norm()) < 2 * HALF * float(weight.norm())


def test_svd_loses_the_weighted_energy_of_the_ranks_left_out():
    weight, weights = _largest(), torch.linspace(0.1, 1, len(_largest()))
    directions, energy = posthoc._principal(weight, weights)
    assert bool((energy.diff() <= 0).all())
    for rank in (1, 5, 12):
        off = _rows(posthoc.low_rank(weight, directions, rank), len(weight)) - weight
        lost = float((weights * off.square().sum(1)).sum())
        assert lost == pytest.approx(float(energy[rank:].sum()), rel=1e-3)


def test_bytes_go_where_they_bring_most():
    steps = [[(10, 5.0), (10, 4.0), (10, 0.1)], [(10, 3.0), (20, 6.0)]]
    levels = [posthoc._spend(steps, budget) for budget in (19, 20, 30, 40, 60)]
    assert levels == [None, [1, 1], [2, 1], [3, 1], [3, 2]]


def test_svd_finds_planted_ranks():
    base = _base()
    model = base.copy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for field, rank in {"field_02": 1, "field_03": 3}.items():
            weight = model.embeddings[field].weight
            weight.copy_(weight[:, :rank] @ torch.randn(rank, 16, generator=generator))
    planted = replace(base, model=model)
    found = POSTHOC["svd"](planted, 4)
    weight = model.embeddings["field_03"].weight.detach()
    off = _rows(found.embeddings["field_03"], len(weight)) - weight
    assert float(off.norm()) < 3 * HALF * float(weight.norm())


def test_pq_decodes_as_faiss_does():
    weight = _largest()
    x = weight.numpy()
    layout = posthoc._code_layout(*weight.shape, subvectors=4, bits=5)
    quantizer = posthoc.product_quantizer(x, 4, 5, seed=0)
    expected = quantizer.decode(quantizer.compute_codes(x))
    found = _rows(posthoc.faiss_table(weight, layout, seed=0), len(weight)).numpy()
    np.testing.assert_allclose(found, expected, rtol=HALF, atol=2.0**-25)


def test_opq_decodes_as_faiss_does(monkeypatch):
    weight = _largest()
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    weight = weight @ torch.diag(torch.logspace(0, -1.5, 16)) @ mixing
    layout = posthoc._code_layout(*weight.shape, subvectors=4, bits=5)
    module = posthoc.opq_table(weight, layout, seed=0)
    rotation = module.rotation.float()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=5e-3, rtol=0)
    transform = faiss.LinearTransform(16, 16)
    faiss.copy_array_to_vector(rotation.numpy().ravel(), transform.A)
    transform.is_orthonormal = transform.is_trained = True
    rotated = transform.apply(weight.numpy())
    quantizer = posthoc.product_quantizer(rotated, 4, 5, seed=0)
    expected = transform.reverse_transform(quantizer.decode(quantizer.compute_codes(rotated)))
    off = np.abs(_rows(module, len(weight)).numpy() - expected)
    # A row between two codewords may get the other one: the rows are rotated in another order.
    assert np.median(off) < 1e-3 * np.abs(expected).mean()
    monkeypatch.setattr(posthoc, "OPQ_ITERATIONS", 0)
    others = [posthoc.faiss_table(weight, layout, 0), posthoc.opq_table(weight, layout, 0)]
    errors = [float((_rows(m, len(weight)) - weight).norm()) for m in (module, *others)]
    assert errors[0] < 0.98 * min(errors[1:])


def test_released_mec_loses_more_than_described_mec():
    assert _error(_compressed("mec_released", 8)) > 2 * _error(_compressed("mec_described", 8))


def test_codebooks_of_released_mec_are_best_for_their_codes():
    weight = _largest()
    weights = torch.linspace(0.1, 1, len(weight))
    layout = posthoc._code_layout(*weight.shape, subvectors=4, bits=4)
    module = posthoc._projected(weight, weights, layout, seed=0)
    off = weights[:, None] * (module(torch.arange(len(weight))) - weight)
    loss = 0.5 * (off * (module(torch.arange(len(weight))) - weight)).sum()
    loss.backward()
    worst = module.codebooks.grad.float().abs().max()
    assert float(worst) < 10 * HALF * float((weights[:, None] * weight.abs()).sum(0).max())


@pytest.mark.parametrize("name", POSTHOC)
def test_every_float_parameter_gets_a_gradient(name):
    model = _fresh(name)
    for ids, _ in list(_base().batches())[:1]:
        model(ids).square().sum().backward()
    found = _table_parameters(model)
    assert found and all(p.dtype is torch.float16 for p in found)
    for parameter in found:
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any())


@pytest.mark.parametrize("name", POSTHOC)
def test_thaw_train_and_freeze_keep_the_bytes(name):
    model = _fresh(name)
    before = embedding_bytes(model)
    ids, labels = next(iter(_base().batches()))
    posthoc.thaw(model)
    assert all(p.dtype is torch.float32 for p in _table_parameters(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    posthoc.freeze(model)
    with torch.no_grad():
        after = nn.functional.binary_cross_entropy_with_logits(model(ids), labels).item()
    assert after < losses[0] and embedding_bytes(model) == before


@pytest.mark.parametrize("name", CODES)
def test_distill_trains_what_holds_mec_embed_modules(name):
    model, base = _fresh(name), _base()
    before = embedding_bytes(model)
    losses = distill(model, base.model, list(base.batches()), epochs=1, progress=False)
    assert np.isfinite(losses).all() and embedding_bytes(model) == before
    with torch.no_grad():
        assert bool(model(base.data.ids["valid"]).isfinite().all())


@pytest.mark.parametrize("name", POSTHOC)
def test_models_hold_fp16_parameters_of_one_kind(name):
    """Those of mec_embed, which its distill() widens, or others, but never both."""
    model = _fresh(name)
    coded = [m for m in model.modules() if isinstance(m, CompressedEmbedding)]
    owned = {id(p) for module in coded for p in module.parameters()}
    kinds = {id(p) in owned for p in _table_parameters(model)}
    assert kinds == {name in CODES}


@pytest.mark.parametrize("name", POSTHOC)
def test_no_first_order_tables_and_names_with_dots(name):
    base = _base()
    fields = [field.replace("_", ".") for field in base.data.fields]
    model = DNN(fields, base.data.rows, dim=10, hidden=(8,)).eval()
    renamed = {field.replace("_", "."): values for field, values in base.counts.items()}
    other = replace(base, model=model, counts=renamed)
    ratio = min(FEASIBLE[name], 8) if name not in ("int4", "int2") else 2
    if name == "int8":
        ratio = posthoc.natural_ratio(name, other)
    found = POSTHOC[name](other, ratio)
    assert embedding_bytes(found) <= other.budget(ratio)
    assert found(base.data.ids["valid"]).shape == (len(base.data.labels["valid"]),)
