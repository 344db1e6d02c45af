"""The main jobs on tables on a GPU; the same bodies run on the CPU, where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tier_model
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mec_embed import (
    CompressedEmbeddingBag,
    CompressionConfig,
    CompressionReport,
    FrequencyStats,
    TieredEmbedding,
    compress,
    decompress,
    distill,
    drift,
    extend,
    load,
    plan,
    save,
    update,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
every_device = pytest.mark.parametrize("device", DEVICES)
ROWS, TAGS, DIM = 4000, 900, 16
RATIO = 20


class Clicks(nn.Module):
    """Rows of few directions and noise, looked up one by one and in bags."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.tags = nn.Embedding(ROWS, DIM), nn.EmbeddingBag(TAGS, DIM, mode="sum")
        self.first = nn.Embedding(ROWS, 1)
        self.out = nn.Sequential(nn.Linear(2 * DIM, 16), nn.ReLU(), nn.Linear(16, 1))
        for table in (self.items, self.tags, self.first):
            rows, dim = table.weight.shape
            with torch.no_grad():
                table.weight.copy_(torch.randn(rows, 4) @ torch.randn(4, dim))
                table.weight += 0.1 * torch.randn(rows, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, 3): an item and two tags."""
        items, tags = ids[:, 0], ids[:, 1:] % TAGS
        both = torch.cat([self.items(items), self.tags(tags).to(self.items(items).dtype)], dim=1)
        return (self.out(both) + self.first(items))[:, 0]


def _model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Clicks:
    torch.manual_seed(0)
    return Clicks().to(device, dtype)


def _counts() -> dict[str, np.ndarray]:
    mixed = np.random.default_rng(0).permutation(1 + ROWS // np.arange(1, ROWS + 1))
    return {"items": mixed, "tags": 1 + TAGS // np.arange(1, TAGS + 1), "first": mixed}


def _ids(device: str, batch: int = 500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(ROWS, (batch, 3), generator=generator).to(device)


def _config(**options: Any) -> CompressionConfig:
    return CompressionConfig(**{"ratio": RATIO, "epochs": 1, **options})


def _compressed(place: str, config: Any = None, **options: Any) -> tuple[Any, CompressionReport]:
    model = _model(place)
    config = config or _config()
    return model, compress(model, _counts(), config, progress=False, **options)


def _check_like_on_cpu(found: CompressionReport, expected: CompressionReport) -> None:
    """The same plan and bytes, and codes that are as good."""
    assert found.bytes_after == expected.bytes_after
    for one, other in zip(found.tables, expected.tables, strict=True):
        assert one.layout == other.layout and one.bytes_after == other.bytes_after
        if other.weighted_error is not None:
            # Sums that round in another way may lead to another local minimum.
            assert one.weighted_error == pytest.approx(other.weighted_error, rel=0.15, abs=1e-6)
            assert one.learned_error <= one.start_error + 1e-9
    errors = [sum(t.weighted_error or 0 for t in report.tables) for report in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def _check_devices(model: nn.Module, device: str) -> None:
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}


@every_device
@pytest.mark.parametrize("dtype", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("codes", ["additive", "product"])
def test_compress(device: str, codes: str, dtype: str | None) -> None:
    config = _config(codes=codes, codebook_dtype=dtype)
    model, report = _compressed(device, config)
    assert report.ratio >= RATIO
    _check_like_on_cpu(report, _compressed("cpu", config)[1])
    _check_devices(model, device)
    assert isinstance(model.tags, CompressedEmbeddingBag)
    out = model(_ids(device))
    assert out.device.type == device and bool(out.isfinite().all())
    copied = copy.deepcopy(model).cpu()
    torch.testing.assert_close(out.cpu(), copied(_ids("cpu")), rtol=1e-4, atol=1e-4)


@every_device
def test_compress_with_batches(device: str) -> None:
    given = [_ids(device, seed=seed) for seed in range(3)]
    report = _compressed(device, batches=given)[1]
    expected = _compressed("cpu", batches=[ids.cpu() for ids in given])[1]
    _check_like_on_cpu(report, expected)


@every_device
def test_the_same_plan_on_every_device(device: str) -> None:
    found, expected = (plan(_model(d), _counts(), _config()) for d in (device, "cpu"))
    assert [t.layout for t in found.tables] == [t.layout for t in expected.tables]
    assert found.predicted_error == pytest.approx(expected.predicted_error, rel=1e-4)


@every_device
def test_learning_on_another_device_than_that_of_the_tables(device: str) -> None:
    model, report = _compressed("cpu", device=device)
    _check_devices(model, "cpu")
    _check_like_on_cpu(report, _compressed("cpu")[1])


@every_device
@pytest.mark.parametrize("ratio", [20, 40])
def test_tiers(device: str, ratio: float) -> None:
    torch.manual_seed(0)
    model = tier_model.Shop()
    on_cpu, model = copy.deepcopy(model), model.to(device)
    config = tier_model.config(ratio=ratio, epochs=1)
    report = compress(model, tier_model.counts(), config, progress=False)
    _check_like_on_cpu(report, compress(on_cpu, tier_model.counts(), config, progress=False))
    _check_devices(model, device)
    assert isinstance(model.shuffled, TieredEmbedding)
    out = model(tier_model.ids().to(device))
    out.sum().backward()
    expected = copy.deepcopy(model).cpu()(tier_model.ids())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tables(device: str, dtype: torch.dtype) -> None:
    model, on_cpu = _model(device, dtype), _model("cpu", dtype)
    report = compress(model, _counts(), _config(), progress=False)
    _check_like_on_cpu(report, compress(on_cpu, _counts(), _config(), progress=False))
    assert model.items(_ids(device)).dtype is dtype


@every_device
def test_start_from_an_earlier_version(device: str) -> None:
    old = _compressed(device)[0]
    model = _model(device)
    with torch.no_grad():
        model.items.weight[:50] += 2
    report = compress(model, _counts(), _config(), progress=False, start_from=old)
    changed = next(table.changed_rows for table in report.tables if table.name == "items")
    assert changed is not None and 1 <= changed < ROWS // 2
    _check_devices(model, device)


@every_device
def test_rows_that_are_not_finite(device: str) -> None:
    model = _model(device)
    with torch.no_grad():
        model.items.weight[7, 3] = torch.nan
    with pytest.raises(ValueError, match="row 7"):
        compress(model, _counts(), _config(), progress=False)
    report = compress(model, _counts(), _config(nonfinite="zero"), progress=False)
    assert any("1 rows" in note for note in report.notes)


@every_device
def test_counts_from_batches(device: str) -> None:
    batches = [_ids(device, seed=seed) for seed in range(3)]
    stats = FrequencyStats.from_batches(_model(device), batches)
    expected = FrequencyStats.from_batches(_model("cpu"), [ids.cpu() for ids in batches])
    assert all(np.array_equal(stats[name], expected[name]) for name in expected)


@every_device
@pytest.mark.parametrize("to", DEVICES)
def test_save_and_load(device: str, to: str, tmp_path: Path) -> None:
    model = _compressed(device)[0]
    save(model, tmp_path / "model.safetensors")
    loaded = load(_model(to), tmp_path / "model.safetensors")
    _check_devices(loaded, to)
    found, expected = loaded(_ids(to)), model(_ids(device))
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


@every_device
def test_decompress(device: str) -> None:
    model = _compressed(device)[0]
    before = model(_ids(device))
    assert decompress(model) == 3
    assert type(model.items) is nn.Embedding
    _check_devices(model, device)
    torch.testing.assert_close(model(_ids(device)), before, rtol=1e-4, atol=1e-4)


@every_device
def test_extend_update_and_drift(device: str) -> None:
    config = _config(ratio=None, num_subvectors=4, codebook_size=32, include=("items", "tags"))
    model, report = _compressed(device, config)
    dense = _model(device).items.weight.detach()
    with torch.no_grad():
        held = model.items.weight.clone()
        ids = extend(model.items, dense[:9])
        assert (ids.start, ids.stop) == (ROWS, ROWS + 9)
        rows = model.items(torch.arange(ROWS, ROWS + 9, device=device))
        # Codes are found anew, so that they may be better than those of the whole table.
        assert (rows - dense[:9]).square().sum() <= 1.1 * (held[:9] - dense[:9]).square().sum()
        changed = update(model.items, torch.arange(5, device=device), dense[100:105])
        assert 1 <= changed <= 5
        after = model.items.weight[:ROWS]
        assert torch.equal(after[5:], held[5:])
    expected = next(table.weighted_error for table in report.tables if table.name == "items")
    assert expected is not None
    assert not drift(model.items, dense, expected).drifted
    assert drift(model.items, torch.randn(300, DIM, device=device), expected).drifted
    _check_devices(model, device)


@every_device
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_distill(device: str, dtype: str | None) -> None:
    teacher = _model(device).eval()
    model = copy.deepcopy(teacher)
    compress(model, _counts(), _config(codebook_dtype=dtype), progress=False)
    for table in (model.items, model.tags):  # something to mend
        for part in table._tables():
            part.codebook_set.store(part.codebook_set.values() * 0.5)
    batches = [_ids(device, 256, seed) for seed in range(6)]

    def divergence() -> float:
        ids = _ids(device, 2000, seed=99)
        with torch.no_grad():
            target, found = teacher(ids).sigmoid(), model(ids)
        return float(F.binary_cross_entropy_with_logits(found, target))

    before = divergence()
    history = distill(model, teacher, batches, epochs=3, lr=1e-3, progress=False)
    assert len(history) == 3 and all(np.isfinite(history))
    assert divergence() < before
    _check_devices(model, device)


@every_device
def test_distill_with_a_fresh_network(device: str) -> None:
    model = _compressed(device)[0]
    batches = [_ids(device, 256, seed) for seed in range(3)]
    before = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    history = distill(
        model, _model(device).eval(), batches, epochs=1, network="fresh", progress=False
    )
    assert np.isfinite(history).all()
    after = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(before, after)


@every_device
def test_training_goes_on_after_the_swap(device: str) -> None:
    model = _model(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = _ids(device)
    labels = (torch.arange(len(ids), device=device) % 2).float()

    def step() -> float:
        loss = F.binary_cross_entropy_with_logits(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    compress(model, _counts(), _config(), optimizer=optimizer, progress=False)
    books = model.items.codebooks
    before = books.detach().clone()
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert books.device.type == device and not torch.equal(books.detach(), before)


@every_device
def test_torch_compile(device: str) -> None:
    model = _compressed(device)[0]
    ids = _ids(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    out, expected = compiled(ids), model(ids)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert model.items.codebooks.grad is not None


@needs_gpu
def test_gpu_codes_are_packed_as_on_the_cpu() -> None:
    from mec_embed.packing import pack

    for bits, count in ((5, 8), (3, 7), (11, 2), (1, 1)):
        codes = torch.randint(1 << bits, (70_001, count))
        assert torch.equal(pack(codes.cuda(), bits).cpu(), pack(codes, bits))


@needs_gpu
def test_gpu_samples_are_those_of_the_cpu() -> None:
    from mec_embed.learning.sampling import weighted_sample

    weights = torch.rand(3_000_000) ** -1.5
    found, mass = weighted_sample(weights.cuda(), 50_000, torch.Generator().manual_seed(0))
    expected, masses = weighted_sample(weights, 50_000, torch.Generator().manual_seed(0))
    assert found.is_cpu and mass.is_cuda
    # Levels may differ in their last digits, and so a few rows.
    assert len(np.setxor1d(found.numpy(), expected.numpy())) < 10
    assert float(mass.sum()) == pytest.approx(float(masses.sum()), rel=1e-3)
