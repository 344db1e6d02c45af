"""The quality study on a small click log: results, resuming, table and plot."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("matplotlib")

from benchmarks.lines import append, read
from benchmarks.quality import plot, study, tuning
from benchmarks.quality.common import embedding_bytes
from benchmarks.quality.models import DCNv2, settings_for
from examples.ctr.generator import generate

METHODS = ["mec_embed", "int8", "pq", "hashing"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the study on a tiny generator; returns the lines of the result file."""
    small = replace(settings_for("generator", 8), epochs=1, batch_size=256)
    monkeypatch.setattr(study, "settings_for", lambda name, dim: small)
    monkeypatch.setattr(
        study, "_data", lambda name, root: generate(examples=4000, fields=4, max_rows=2000)
    )
    file = tmp_path / "quality.csv"

    def call(*arguments: str) -> list[dict[str, str]]:
        command = ["study", "--data", "generator", "--seeds", "1", "--out", str(file)]
        command += ["--bases", str(tmp_path / "bases"), *arguments]
        monkeypatch.setattr("sys.argv", command)
        study.main()
        return read(file)

    return call


def test_study_writes_both_stages_within_budget_and_resumes(run, monkeypatch, tmp_path, capsys):
    lines = run("--methods", *METHODS, "--ratios", "8")
    stages = {(line["method"], line["stage"]) for line in lines}
    assert ("uncompressed", "trained") in stages and ("hashing", "trained") in stages
    for method in METHODS:
        assert (method, "tuned") in stages
    before = int(lines[0]["bytes"])
    for line in lines[1:]:
        if line["method"] != "int8":
            assert int(line["bytes"]) <= before / 8
    assert all(0.4 < float(line["test_auc"]) < 1 for line in lines)

    monkeypatch.setitem(study.METHODS, "pq", None)  # would fail if it ran again
    assert run("--methods", *METHODS, "--ratios", "8") == lines
    more = run("--methods", "mec_embed", "--ratios", "8", "16", "--no-tuning")
    assert len(more) == len(lines) + 1

    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "quality.csv"), "--plot"])
    monkeypatch.setattr("sys.argv", [*__import__("sys").argv, str(tmp_path / "plot.svg")])
    plot.main()
    printed = capsys.readouterr().out
    assert "| method | 8x | 16x |" in printed and "| mec_embed |" in printed
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_tuning_with_labels_is_a_stage_of_its_own(run, monkeypatch, tmp_path, capsys):
    methods = ["--methods", "mec_embed", "hashing", "fp32", "--ratios", "8"]
    first = run(*methods, "--no-tuning")
    lines = run(*methods, "--labels")
    assert lines[: len(first)] == first
    assert [(line["method"], line["stage"]) for line in lines[len(first) :]] == [
        (method, "labels") for method in ("mec_embed", "hashing", "fp32")
    ]
    auc = {(line["method"], line["stage"]): float(line["valid_auc"]) for line in lines}
    for method, stage in (("mec_embed", "compressed"), ("hashing", "trained")):
        assert auc[method, "labels"] >= auc[method, stage]
    sizes = [line["bytes"] for line in lines if line["method"] == "mec_embed"]
    assert len(set(sizes)) == 1
    assert run(*methods, "--labels") == lines

    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "quality.csv"), "--labels"])
    plot.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["1x", "fp32"],
        ["8x", "mec_embed"],
        ["8x", "hashing"],
    ]
    assert all(row.endswith(" | - | - | - |") for row in rows)  # with labels alone


def test_a_self_distilled_base_is_a_stage_of_its_own(run, monkeypatch, tmp_path, capsys):
    methods = ["--methods", "mec_embed", "--ratios", "8"]
    first = run(*methods, "--labels")
    lines = run(*methods, "--self-distilled")
    assert lines[: len(first)] == first
    [line] = lines[len(first) :]
    assert line["stage"] == "self-distilled" and line["test_auc"] != first[-1]["test_auc"]
    assert run(*methods, "--self-distilled") == lines
    with_labels, lines = lines, run(*methods, "--self-distilled-alone")
    [line] = lines[len(with_labels) :]
    assert line["stage"] == "self-distilled alone"
    assert run(*methods, "--self-distilled-alone") == lines
    more = run(*methods, "--two-teachers")
    assert more[: len(lines)] == lines
    assert [line["stage"] for line in more[len(lines) :]] == ["two teachers"]
    assert len(list((tmp_path / "bases").iterdir())) == 2
    assert run(*methods, "--two-teachers") == more
    assert run(*methods, "--no-tuning")[: len(more)] == more

    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "quality.csv"), "--labels"])
    plot.main()
    [ours] = capsys.readouterr().out.splitlines()[2:]
    assert ours.startswith("| generator, DeepFM, 8 | 8x | mec_embed | ") and "-" not in ours.split()


def test_a_method_that_only_has_a_self_distilled_base_is_no_curve(run, monkeypatch, tmp_path):
    run("--methods", "mec_embed", "pq", "--ratios", "8", "--no-tuning")
    file = tmp_path / "quality.csv"
    ours = file.read_text().replace(",compressed,", ",self-distilled alone,", 1)
    assert ours != file.read_text()
    file.write_text(ours)
    arguments = ["plot", str(file), "--plot", str(tmp_path / "plot.svg")]
    monkeypatch.setattr("sys.argv", arguments)
    plot.main()
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_tuning_from_a_softened_teacher_is_a_stage_of_its_own(run):
    methods = ["--methods", "mec_embed", "hashing", "--ratios", "8"]
    first = run(*methods, "--no-tuning")
    lines = run(*methods, "--calibrated")
    assert [(line["method"], line["stage"]) for line in lines[len(first) :]] == [
        (method, "calibrated") for method in ("mec_embed", "hashing")
    ]
    loss = {(line["method"], line["stage"]): float(line["valid_logloss"]) for line in lines}
    for method, stage in (("mec_embed", "compressed"), ("hashing", "trained")):
        assert loss[method, "calibrated"] <= loss[method, stage]
    assert run(*methods, "--calibrated") == run(*methods, "--no-tuning") == lines


def test_the_temperature_of_the_least_log_loss():
    torch.manual_seed(0)
    logits = torch.randn(20_000).double()
    labels = torch.bernoulli(logits.sigmoid())
    data = SimpleNamespace(ids={"valid": 2.5 * logits[:, None]}, labels={"valid": labels})
    base = SimpleNamespace(model=torch.nn.Flatten(0), data=data)
    assert tuning.temperature_of(base) == pytest.approx(2.5, rel=0.1)


def test_the_short_table(run, monkeypatch, tmp_path, capsys):
    run("--methods", "pq", "--ratios", "8", "--no-tuning")
    monkeypatch.setattr(
        plot, "SHORT", ((("generator", "DeepFM", "8"), 8.0), (("a", "b", "c"), 2.0))
    )
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "quality.csv"), "--short"])
    plot.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | generator 8x | a 2x |" and len(lines) == 12
    assert lines[2] == "| mec_embed | - | - |"
    assert lines[3].startswith(("| pq | -0.", "| pq | +0.")) and lines[3].endswith("| - |")


@pytest.mark.parametrize(
    "lower, best, labels", [(False, "+0.3000 b", "+0.7000 b"), (True, "-0.2000 a", "+0.6000 b")]
)
def test_the_summary_compares_ours_with_the_best_of_the_others(lower, best, labels):
    at_ten = {
        "mec_embed": {10.0: {"right after": [0.1, 0.3]}},
        "mec_embed without batches": {10.0: {"right after": [9.0]}},
        "a": {10.0: {"right after": [-0.2], "tuned": [0.1]}},
        "b": {10.0: {"right after": [0.3], "labels": [0.6], "self-distilled": [0.7]}},
        "fp16": {0.0: {"right after": [2.0]}},
    }
    lines = plot.summary({("d", "DNN", "8"): at_ten}, lower).splitlines()
    assert lines[0].startswith("| data | ratio | right after | best of others | distilled |")
    assert lines[2:] == [f"| d, DNN, 8 | 10x | +0.2000 | {best} | - | +0.1000 a | - | {labels} |"]


def test_a_stage_says_how_many_seeds_it_has():
    cell = {"right after": [0.1, 0.3], "tuned": [0.2], "labels": [0.5]}
    assert plot._cell(cell) == "+0.2000 (2) / +0.2000"


def test_another_base_than_that_of_the_results_is_refused(run, tmp_path):
    run("--methods", "pq", "--ratios", "8", "--no-tuning")
    file = next((tmp_path / "bases").iterdir())
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="use the bases of those results"):
        run("--methods", "pq", "--ratios", "16", "--no-tuning")


def test_changes_are_from_the_base_of_the_same_processor(run, tmp_path, monkeypatch):
    run("--methods", "pq", "--ratios", "8", "--no-tuning")
    monkeypatch.setattr(study, "processor", lambda: "another")
    written = run("--methods", "pq", "--ratios", "16", "--no-tuning")
    assert [line["method"] for line in written] == ["uncompressed", "pq", "uncompressed", "pq"]
    file = tmp_path / "quality.csv"
    file.unlink()
    for line in written:
        if line["processor"] == "another":
            line["test_auc"] = str(float(line["test_auc"]) - 0.25)
        append(file, line, study.COLUMNS)
    [methods] = plot.read([file], "test_auc").values()
    for cell in methods["pq"].values():
        assert abs(cell["right after"][0]) < 0.1


def test_method_over_its_budget_is_an_error(run, monkeypatch):
    monkeypatch.setitem(study.METHODS, "pq", lambda base, ratio: base.copy())
    with pytest.raises(RuntimeError, match="pq takes more than its budget at 8x"):
        run("--methods", "pq", "--ratios", "8")


def test_impossible_budgets_are_written_down(run):
    lines = run("--methods", "mec_embed", "--ratios", "2000", "--no-tuning")
    assert [line["stage"] for line in lines] == ["trained", "impossible"]


def test_dcnv2_is_its_formula():
    torch.manual_seed(0)
    model = DCNv2(["a", "b"], [5, 6], dim=3, hidden=(4,), layers=2)
    ids = torch.tensor([[1, 2], [4, 5]])
    x0 = torch.cat([model.embeddings["a"](ids[:, 0]), model.embeddings["b"](ids[:, 1])], 1)
    x = x0
    for layer in model.cross:
        x = x0 * (x @ layer.weight.T + layer.bias) + x
    torch.testing.assert_close(model(ids), (model.head(x) + model.mlp(x0))[:, 0])
    assert embedding_bytes(model) == (5 + 6) * 3 * 4
