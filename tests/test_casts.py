"""Whatever dtype torch makes tensors of, or casts a model to, codes stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from click_model import ClickModel
from torch import Tensor

from mec_embed import CompressionConfig, FrequencyStats, compress, distill, drift
from mec_embed.regularization import embedding_penalty

BATCHES = [torch.randint(800, (256, 2), generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
CONFIGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"codebook_dtype": "int8"},
    "product": {"codes": "product"},
}
#: Whole numbers of a state_dict.
WHOLE = "codes", "starts", "before", "bitmap"


@pytest.fixture
def float32() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def _model(**options: Any) -> ClickModel:
    torch.manual_seed(0)
    model = ClickModel()
    stats = FrequencyStats.from_batches(model, BATCHES)
    config = CompressionConfig(ratio=8, epochs=1, **options)
    compress(model, stats, config, batches=BATCHES, progress=False)
    return model


def _worked_on(default: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """All that comes out of compressing, distilling, training on and drift."""
    torch.manual_seed(0)
    model = ClickModel()
    teacher, stats = copy.deepcopy(model), FrequencyStats.from_batches(model, BATCHES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    torch.set_default_dtype(default)
    config = CompressionConfig(ratio=8, epochs=1, **options)
    compress(model, stats, config, batches=BATCHES, progress=False, optimizer=optimizer)
    distill(model, teacher, BATCHES, progress=False)
    (model(BATCHES[0]).square().sum() + 1e-4 * embedding_penalty(model)).backward()
    optimizer.step()
    rows = teacher.embeddings["f1"].weight.detach()[:50]
    error = drift(model.embeddings["f1"], rows, 0.1).error
    torch.set_default_dtype(torch.float32)
    return [*model.state_dict().values(), torch.tensor(error)]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_default_dtype_changes_nothing(
    default: torch.dtype, options: dict[str, Any], float32: None
) -> None:
    expected = _worked_on(torch.float32, options)
    for found, wanted in zip(_worked_on(default, options), expected, strict=True):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_cast_of_all_tensors_leaves_codes_alone(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = _model(**options)
    cast = copy.deepcopy(model).type(dtype)
    state = model.state_dict()
    for key, value in cast.state_dict().items():
        assert not key.endswith(WHOLE) or torch.equal(value, state[key])
    for name, table in model.embeddings.items():
        rows = cast.embeddings[name].weight
        assert rows.dtype is dtype
        torch.testing.assert_close(rows.float(), table.weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("assign", [False, True])
def test_codes_that_were_cast_are_refused(assign: bool) -> None:
    model = _model()
    state = {key: value.half() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"codes is torch.float16, expected torch.uint8; cast"):
        model.load_state_dict(state, assign=assign)
    assert all(
        value.dtype is torch.uint8
        for key, value in model.state_dict().items()
        if key.endswith("codes")
    )
    floats = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(floats, assign=assign)
