"""The speed benchmarks measure what they say; how fast things are is not for a test."""

from __future__ import annotations

import shutil

import pytest
import torch

from benchmarks.lines import read
from benchmarks.speed import gpu, kernels, lookup, model, plot
from mec_embed.ops import cpu


def test_every_method_looks_up_the_same_rows_and_is_written_down(tmp_path, monkeypatch):
    file = tmp_path / "speed.csv"
    arguments = ["lookup", "--rows", "500", "--dims", "16", "--batches", "1", "64"]
    monkeypatch.setattr("sys.argv", [*arguments, "--ids", "zipf", "--out", str(file)])
    monkeypatch.setattr(lookup, "LEAST_SECONDS", 0.0)
    lookup.main()
    rows = read(file)
    found = {what: [r for r in rows if r["what"] == what] for what in ("rows", "bags")}
    ours = {"dense", "mec_embed int8", "mec_embed float32", "torch int8"}
    assert ours | {"plain torch", "copy"} <= {row["method"] for row in found["rows"]}
    assert ours <= {row["method"] for row in found["bags"]}
    assert all(float(row["microseconds"]) > 0 and int(row["repetitions"]) > 9 for row in rows)
    assert all(row["speed"] == "1.00" for row in rows if row["method"] == "dense")
    assert all(row["layout"].startswith("additive ") == ("mec" in row["method"]) for row in rows)


@pytest.mark.parametrize("shape", [(64,), (8, 20)])
def test_methods_agree(shape):
    methods = lookup._methods(500, 16)["bags" if len(shape) > 1 else "rows"]
    ids = next(lookup.id_batches(500, shape, "zipf"))
    assert int(ids.min()) >= 0 and int(ids.max()) < 500 and len(ids.unique()) > 5
    with torch.no_grad():
        outputs = {name: method(ids) for name, method in methods.items() if name != "copy"}
    assert {tuple(output.shape) for output in outputs.values()} == {(shape[0], 16)}
    weight = methods["dense"].weight.detach()
    # Half a step of the widest row for each id, and the float16 scale and offset.
    error = float((weight.amax(1) - weight.amin(1)).max()) / 255 * (20 if len(shape) > 1 else 1)
    torch.testing.assert_close(outputs["torch int8"], outputs["dense"], atol=error, rtol=0)
    if len(shape) == 1:
        assert torch.equal(outputs["mec_embed int8"], outputs["plain torch"])


@pytest.mark.skipif(not cpu.available(), reason="the kernel was not built")
def test_builds_of_the_kernel_are_compared(tmp_path, monkeypatch):
    # Copies, as limits of vectors are a build's own.
    builds = [shutil.copy(cpu.kernel.__file__, tmp_path / f"{name}.so") for name in ("old", "new")]
    arguments = ["kernels", *map(str, builds), "--rows", "500", "--layout", "3x16"]
    arguments += ["--dims", "16", "--batches", "64", "--vectors", "64", "16"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "kernels.csv")])
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0.0)
    kernels.main()
    found = read(tmp_path / "kernels.csv")
    assert len(found) == 2 * 2 * 2 * 2  # what, dtypes, vectors, builds
    assert {line["build"] for line in found} == {"old", "new"}
    assert all(float(line["nanoseconds"]) > 0 and int(line["repetitions"]) > 9 for line in found)


def test_methods_on_a_gpu_agree(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    methods = gpu._methods(500, 16)
    assert set(methods) == set(gpu.WHATS)
    ids = next(lookup.id_batches(500, (40,), "zipf"))
    with torch.no_grad():
        rows = {name: method(ids) for name, method in methods["rows"].items()}
        bags = {name: method(ids.view(2, 20)) for name, method in methods["bags"].items()}
        tables = {name: method(ids) for name, method in methods["tables"].items()}
    assert {tuple(one.shape) for one in rows.values()} == {(40, 16)}
    assert {tuple(one.shape) for one in bags.values()} == {(2, 16)}
    assert torch.equal(rows["mec_embed float32"], rows["plain torch"])
    for name in ("dense", "mec_embed int8", "mec_embed float32"):
        torch.testing.assert_close(bags[name], rows[name].view(2, 20, 16).sum(1))
    assert {len(one) for one in tables.values()} == {gpu.TABLES}
    assert methods["tiers"]["mec_embed float32"](ids).shape == (40, 16)
    for what in ("gradient", "tables gradient"):
        for method in methods[what].values():
            method(ids)


def test_models_before_and_after(tmp_path, monkeypatch):
    file = tmp_path / "model.csv"
    arguments = ["model", "--rows", "400", "--batches", "1", "8", "--repetitions", "2", "--train"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(file)])
    model.main()
    rows = read(file)
    forward = [row for row in rows if row["what"] == "forward"]
    assert len(forward) == 2 * 6 and {row["batch"] for row in forward} == {"1", "8"}
    steps = {row["method"]: float(row["megabytes"]) for row in rows if row["what"] == "step"}
    assert set(steps) == {"dense", "mec_embed float32", "mec_embed float32, tiers"}
    assert all(float(row["milliseconds"]) > 0 for row in rows)


def test_table_and_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    file = tmp_path / "speed.csv"
    lines = ["what,rows,dim,batch,ids,method,speed"]
    lines += [
        f"rows,{rows},16,{batch},uniform,{method},{speed}"
        for rows in (1000, 10000)
        for batch in (1, 64)
        for method, speed in (("dense", 1), ("mec_embed int8", batch * rows / 1000))
    ]
    file.write_text("\n".join(lines))
    arguments = ["plot", str(file), "--plot", str(tmp_path / "speed.svg")]
    monkeypatch.setattr("sys.argv", arguments)
    plot.main()
    assert "| mec_embed int8 | 1.00 / 5.50 | 64.00 / 352.00 |" in capsys.readouterr().out
    assert "</svg>" in (tmp_path / "speed.svg").read_text()


def test_the_table_by_dimension_counts_what_reaches_the_target(tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.csv"
    lines = ["what,rows,dim,batch,ids,method,speed,processor,threads"]
    lines += [
        f"rows,{rows},{dim},{batch},uniform,{method},{speed},P,2"
        for rows, dim, batch, method, speed in (
            (100_000, 10, 1024, "mec_embed int8", 1.5),
            (1_000_000, 40, 8192, "mec_embed int8", 3),
            (100_000, 16, 1024, "mec_embed int8", 1.25),
            (100_000, 128, 1024, "mec_embed int8", 0.75),
            (10_000, 10, 1024, "mec_embed int8", 9),  # a small table
            (100_000, 10, 64, "mec_embed int8", 9),  # few ids
            (100_000, 10, 1024, "dense", 1),
        )
    ]
    file.write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["plot", str(file), "--dims"])
    plot.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| P | 2 | mec_embed int8 | 1.25 / 1.50 / 3.00, 2 of 3 |  | 0.75 / 0.75 / 0.75, 0 of 1 |"
    ]
