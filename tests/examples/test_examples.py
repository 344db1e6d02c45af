"""The examples run from a checkout and keep what compressing and reloading must keep."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {
    "plain_pytorch": None,
    "fuxictr_deepfm": "fuxictr",
    "deepctr_torch_din": "deepctr_torch",
    "torchrec_dlrm": "torchrec",
}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    if NEEDS[name]:
        pytest.importorskip(NEEDS[name])
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--tiny"],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"(0\.\d{4})\s+(0\.\d{4})\s+([\d,]+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 4, done.stdout
    auc, _, size = zip(*lines, strict=True)
    before, compressed, trained, reloaded = map(float, auc)
    assert compressed > before - 0.01
    assert reloaded == trained
    bytes_before, *after = [int(value.replace(",", "")) for value in size]
    assert all(bytes_before / value > 19 for value in after)


def test_serving():
    """What is exported predicts the same, in PyTorch and in onnxruntime."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = subprocess.run(
        [sys.executable, "-m", "examples.serving", "--tiny"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"(0\.\d{4})\s+(0\.\d{4})\s+([\d,]+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 4, done.stdout
    before, compressed, exported, onnx = (float(auc) for auc, _, _ in lines)
    assert compressed > before - 0.01
    assert exported == compressed == onnx
    assert done.stdout.rstrip().endswith("equal to PyTorch's: True")
