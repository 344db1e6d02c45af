"""The benchmark of large tables runs, and its line says what it measured."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.scale import kill, large


def test_a_table_is_made_in_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(large, "PIECE", 300)
    large.make_table(tmp_path / "t", 1000, 8)
    weight = load_file(tmp_path / "t")["embedding.weight"]
    assert weight.shape == (1000, 8) and weight.isfinite().all()
    assert weight.unique(dim=0).shape == (1000, 8)


@pytest.mark.parametrize("shuffled", [False, True])
def test_counts_are_made_in_pieces(shuffled: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(large, "PIECE", 300)
    large.make_counts(tmp_path / "c.npz", 1000, shuffled)
    counts = np.load(tmp_path / "c.npz")["embedding"]
    assert counts.shape == (1000,) and counts.max() == 1000 and counts.min() == 1
    assert (np.sort(counts) == np.sort(1000 // np.arange(1, 1001))).all()
    assert (counts[0] == 1000) and (counts[:-1] >= counts[1:]).all() == (not shuffled)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_it_took_is_one_line(tmp_path: Path) -> None:
    options = {"rows": 20_000, "dim": 8, "ratio": 20.0, "counts": "shuffled"}
    options |= {"options": "--quiet --epochs 0", "out": tmp_path / "scale.csv"}
    line = large.measure(argparse.Namespace(**options), tmp_path)
    assert line["output_bytes"] == (tmp_path / "small").stat().st_size
    assert line["ratio"] >= 20 and 0 < line["error"] < 1
    assert line["anonymous_mb"] > line["interpreter_mb"] > 0 and line["file_mb"] > 0
    for _ in range(2):
        large.append(tmp_path / "scale.csv", line, large.COLUMNS)
    written = [*csv.DictReader(io.StringIO((tmp_path / "scale.csv").read_text()))]
    assert len(written) == 2 and tuple(written[0]) == large.COLUMNS
    assert written[0]["rows"] == "20000"


def test_a_line_of_kills_has_the_columns_of_the_file() -> None:
    line = kill.line_of(kill.Figures(kills=3, wrong=["one", "two"]), 7)
    assert sorted(line) == sorted(kill.COLUMNS)
    assert (line["kills"], line["seed"], line["wrong"]) == (3, 7, "one; two")
