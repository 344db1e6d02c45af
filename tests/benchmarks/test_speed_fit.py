"""The benchmark of compress() measures what it says; how fast it is is not for a test."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.lines import read
from benchmarks.speed import fit
from mec_embed import CompressionConfig, compress


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_method_is_measured_in_turn_and_written_down(tmp_path, monkeypatch):
    file, order = tmp_path / "results" / "fit.csv", []

    def here(*run):
        order.append(run[0])
        return fit._run(*run)

    monkeypatch.setattr(fit, "_alone", here)
    arguments = ["fit", "--rows", "3000", "--dims", "8", "--ratios", "8", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--repetitions", "2", "--out", str(file)])
    fit.main()
    fit.main()
    assert order == [*fit.METHODS] * 4
    rows = read(file)
    assert [row["method"] for row in rows] == [*fit.METHODS] * 2
    ours, other, _ = rows[:3]
    assert abs(int(other["bits"]) - int(ours["bits"])) <= 2
    assert 0 < float(ours["weighted_error"]) < float(other["weighted_error"]) < 1
    for row in rows:
        assert tuple(row) == fit.COLUMNS and all(row.values())
        assert 0 < float(row["least_seconds"]) <= float(row["seconds"])
        assert (row["repetitions"], row["threads"]) == ("2", "1")


@pytest.mark.parametrize(
    ("dim", "bits", "most", "shape"),
    [(40, 24, 8, (4, 6)), (40, 24, 12, (2, 12)), (16, 10, 8, (2, 5)), (7, 10, 8, (1, 8))],
)
def test_faiss_gets_as_many_bits_in_as_few_codes_as_it_may(dim, bits, most, shape):
    assert fit._shape(dim, bits, most) == shape


def test_the_error_is_the_one_of_the_report():
    table, counts = fit._table(2000, 8, "cpu")
    assert int(counts.min()) >= 1 and int(counts.max()) == 20001
    model = nn.ModuleDict({"table": nn.Embedding(2000, 8, _weight=table.clone())})
    report = compress(model, {"table": counts}, CompressionConfig(ratio=8), progress=False)
    found = fit._error(model["table"], table, counts.sqrt())
    assert found == pytest.approx(report.tables[0].weighted_error, rel=1e-4)


@pytest.mark.slow
def test_a_run_has_a_process_of_its_own():
    run = fit._alone("mec_embed", 3000, 8, 8.0, 1, 8, "cpu", False)
    assert run["seconds"] > 0 and run["memory_mb"] >= 0 and 0 < run["weighted_error"] < 1
