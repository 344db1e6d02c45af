"""The benchmark of large tables runs, and its line says what it measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.lines import read
from benchmarks.scale import kill, large, ranks


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
    written = read(tmp_path / "scale.csv")
    assert len(written) == 2 and tuple(written[0]) == large.COLUMNS
    assert written[0]["rows"] == "20000"


def test_a_line_of_kills_has_the_columns_of_the_file() -> None:
    line = kill.line_of(kill.Figures(kills=3, wrong=["one", "two"]), 7)
    assert sorted(line) == sorted(kill.COLUMNS)
    assert (line["kills"], line["seed"], line["wrong"]) == (3, 7, "one; two")


def test_rows_do_not_depend_on_the_parts_they_are_made_in(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "PIECE", 300)
    whole = ranks.make_rows(0, 1000, 8)
    parts = [ranks.make_rows(first, end, 8) for first, end in ((0, 250), (250, 701), (701, 1000))]
    assert torch.equal(torch.cat(parts), whole) and whole.unique(dim=0).shape == (1000, 8)
    assert np.sort(ranks.make_counts(1000)).tolist() == sorted(1000 // i for i in range(1, 1001))


@pytest.mark.slow
def test_what_ranks_took_is_one_line_and_one_result(tmp_path: Path) -> None:
    lines = [ranks.measure(5000, 8, size, 20.0) for size in (1, 2)]
    for line in lines:
        ranks.append(tmp_path / "ranks.csv", line, ranks.COLUMNS)
        assert line["ratio"] >= 20 and 0 < line["error"] < 1
        assert 0 < line["encode_cpu_seconds"] + line["learn_cpu_seconds"] < line["cpu_seconds"]
    assert (lines[0]["exchanged_mb"] == 0) and lines[1]["exchanged_mb"] > 0
    same = ("layout", "bytes_after", "error", "rows", "dim")
    assert [lines[0][name] for name in same] == [lines[1][name] for name in same]
    written = read(tmp_path / "ranks.csv")
    assert [line["ranks"] for line in written] == ["1", "2"]
