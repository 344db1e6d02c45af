"""The benchmark of lookups measures what it says; how fast they are is not for a test."""

from __future__ import annotations

import csv

import torch

from benchmarks.speed import lookup


def test_every_method_looks_up_the_same_rows_and_is_written_down(tmp_path, monkeypatch):
    file = tmp_path / "speed.csv"
    arguments = ["lookup", "--rows", "500", "--dims", "10", "--batches", "1", "64"]
    monkeypatch.setattr("sys.argv", [*arguments, "--ids", "zipf", "--out", str(file)])
    monkeypatch.setattr(lookup, "LEAST_SECONDS", 0.0)
    lookup.main()
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 2 * 4  # codebooks, batches, methods
    assert {row["method"] for row in rows} == {"nn.Embedding", "mec_embed", "plain torch", "copy"}
    assert all(float(row["microseconds"]) > 0 and int(row["repetitions"]) > 9 for row in rows)
    assert all(row["speed"] == "1.00" for row in rows if row["method"] == "nn.Embedding")
    methods = lookup._methods(500, 10, "int8")
    ids = next(lookup._ids(500, 64, "zipf"))
    assert int(ids.min()) >= 0 and int(ids.max()) < 500 and len(ids.unique()) > 5
    with torch.no_grad():
        assert torch.equal(methods["mec_embed"](ids), methods["plain torch"](ids))
