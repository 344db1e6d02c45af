"""The command line: what it writes is what the library writes, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.scale.kill import kill
from mec_embed import CompressionConfig, compress, load, offline, save
from mec_embed.cli import main
from mec_embed.learning.kmeans import require_faiss
from mec_embed.offline import Job

pytest.importorskip("faiss")

#: Learning that takes no time.
FAST = ["--epochs", "0", "--ratio", "30", "--quiet"]


class Model(nn.Module):
    """Tables of several kinds, a layer, a buffer; names in the order of a sorted file."""

    def __init__(self) -> None:
        super().__init__()
        fields = {
            "user": nn.Embedding(2000, 16, padding_idx=0),
            "größe 1": nn.Embedding(1500, 8),
        }
        self.bag = nn.EmbeddingBag(1200, 16, mode="sum", include_last_offset=True)
        self.embedding = nn.ModuleDict(dict(sorted(fields.items())))
        self.first = nn.Embedding(2000, 1)
        self.mlp = nn.Linear(24, 64)
        self.small = nn.Embedding(20, 4)
        self.register_buffer("step", torch.tensor(3))


ROLES = ["--padding-idx", "*.user=0", "--bag", "bag=sum,last"]
COUNTS = {
    "embedding.user": 3000 // (1 + np.arange(2000)),
    "first": 3000 // (1 + np.arange(2000)),
    "bag.weight": np.random.default_rng(0).integers(0, 9, 1200).astype(np.float32),
}


def _model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a checkpoint and counts; what runs write goes there too."""
    save_file(_model().state_dict(), tmp_path / "model.safetensors", {"format": "pt", "by": "me"})
    np.savez(tmp_path / "counts.npz", **COUNTS)
    return tmp_path


def _run(folder: Path, command: str, *options: object) -> int:
    arguments = [str(o) for o in options]
    return main([command, str(folder / "model.safetensors"), *arguments])


def _compress(folder: Path, *options: object) -> int:
    output = ("-o", folder / "small.safetensors")
    return _run(folder, "compress", *output, "--freq", folder / "counts.npz", *FAST, *options)


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"model.safetensors", "counts.npz"}


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["user", "us?r", "*er", "user.weight", "again"])
def test_tables_are_left_out_by_any_of_their_names(tmp_path: Path, capsys, pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"user": nn.Embedding(3000, 8), "item": nn.Embedding(3000, 8)})
    model["again"] = model["user"]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    both = [str(tmp_path / "m.pt"), "--ratio", "4", "--quiet", "--json"]
    for option, name in (("--exclude", "item"), ("--include", "user")):
        assert main(["plan", *both, option, pattern]) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        assert [table["name"] for table in report["tables"]] == [name]
        assert not any("include and exclude" in note for note in report["notes"])
    assert main(["plan", *both, "--exclude", "nosuch"]) == 0
    assert "no table by nosuch; there are user, item" in capsys.readouterr().out


def test_roles_are_of_any_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"user": nn.Embedding(3000, 8, padding_idx=0)})
    model["again"] = model["user"]
    torch.save(model.state_dict(), tmp_path / "m.pt")
    output = str(tmp_path / "small.safetensors")
    roles = ["--padding-idx", "again=0"]
    assert main(["compress", str(tmp_path / "m.pt"), *roles, *FAST, "-o", output]) == 0
    assert load(model, output)["user"].padding_idx == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tables_train_as_those_of_the_model(files: Path, dtype: str) -> None:
    assert _compress(files, *ROLES, "--codebook-dtype", dtype) == 0
    model = _model()
    model.embedding["user"].weight.requires_grad_(False)
    model.first.sparse = True
    load(model, files / "small.safetensors")
    user, first = model.embedding["user"], model.first
    assert not user.trainable and first.trainable
    assert not user.sparse and first.sparse
    assert not any(p.requires_grad for p in user.parameters())
    assert all(p.requires_grad for p in first.parameters())
    save(model, files / "again.safetensors")
    again = load(_model(), files / "again.safetensors")
    assert not again.embedding["user"].trainable and again.first.sparse


@pytest.mark.parametrize("options", [[], ["--codebook-dtype", "int8"], ["--codes", "product"]])
def test_the_file_is_that_of_the_library(files: Path, options: list[str]) -> None:
    assert _compress(files, *ROLES, *options) == 0
    assert _left(files) == {"small.safetensors"}
    model, extra = _model(), {}
    if options:
        extra = {options[0][2:].replace("-", "_"): options[1]}
    config = CompressionConfig(epochs=0, exclude=("small",), **extra)
    # Counts without "embedding.größe 1", ratio of the chosen tables only.
    chosen = sum(m.weight.nbytes for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    chosen += model.bag.weight.nbytes - model.small.weight.nbytes
    config = CompressionConfig.from_dict(
        config.to_dict() | {"ratio": None, "max_bytes": chosen // 30 + model.small.weight.nbytes}
    )
    counts = {name.removesuffix(".weight"): values for name, values in COUNTS.items()}
    compress(model, counts, config, progress=False)
    save(model, files / "library.safetensors")
    ours = load_file(files / "small.safetensors")
    theirs = load_file(files / "library.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    loaded = load(_model(1), files / "small.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert not loaded.embedding["user"](torch.tensor([0])).any()


def _next_night(files: Path) -> Model:
    """The checkpoint and its compressed file become those of yesterday; the model of today."""
    assert _compress(files, *ROLES) == 0
    (files / "small.safetensors").rename(files / "yesterday.safetensors")
    model = _model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), files / "model.safetensors")
    return model


def test_starting_from_yesterday_is_that_of_the_library(files: Path, capsys) -> None:
    model = _next_night(files)
    yesterday = load(_model(), files / "yesterday.safetensors")
    yesterday.first.oov_row = 3
    save(yesterday, files / "yesterday.safetensors")
    after = [
        "--freq",
        str(files / "counts.npz"),
        "--start-from",
        str(files / "yesterday.safetensors"),
    ]
    after += ["--quiet", "--json"]  # without ROLES: yesterday's file has them
    capsys.readouterr()
    assert _run(files, "plan", *after) == 0
    planned = json.loads(capsys.readouterr().out)["report"]
    assert _run(files, "compress", *after, "-o", files / "small.safetensors") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert planned["bytes_after"] == report["bytes_after"]
    assert any(table["changed_rows"] for table in report["tables"])
    counts = {name.removesuffix(".weight"): values for name, values in COUNTS.items()}
    compress(model, counts, progress=False, start_from=yesterday)
    loaded = load(_model(1), files / "small.safetensors")
    assert loaded.first.oov_row == model.first.oov_row == 3
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_options_win_over_the_roles_of_yesterday(files: Path) -> None:
    _next_night(files)
    after = ["--start-from", files / "yesterday.safetensors", "--bag", "bag=mean,last", "--quiet"]
    assert _run(files, "compress", *after, "-o", files / "small.safetensors") == 0
    model = _model()
    model.bag = nn.EmbeddingBag(1200, 16, mode="mean", include_last_offset=True)
    assert load(model, files / "small.safetensors").bag.mode == "mean"


def test_starting_from_yesterday_where_tied_tables_were_copied(tmp_path: Path, capsys) -> None:
    """Safetensors refuse tensors that share memory, so many a checkpoint holds copies."""
    torch.manual_seed(0)
    table, tied = nn.Embedding(2000, 8), nn.ModuleDict()
    tied["a"] = tied["b"] = table
    torch.save(tied.state_dict(), tmp_path / "m.pt")
    assert main(["compress", str(tmp_path / "m.pt"), *FAST, "-o", str(tmp_path / "old")]) == 0
    state = {key: value.clone() for key, value in tied.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    after = [str(tmp_path / "m.safetensors"), "--start-from", str(tmp_path / "old"), "--quiet"]
    assert main(["compress", *after, "-o", str(tmp_path / "new")]) == 0
    fresh = nn.ModuleDict({"a": nn.Embedding(2000, 8)})
    fresh["b"] = fresh["a"]
    loaded = load(fresh, tmp_path / "new")
    assert loaded["a"] is loaded["b"]
    both = [str(tmp_path / "new"), str(tmp_path / "m.safetensors"), "--quiet"]
    assert main(["verify", *both]) == 0
    state["b.weight"][7, 3] += 1
    save_file(state, tmp_path / "m.safetensors")
    assert main(["verify", *both]) == 1
    capsys.readouterr()
    assert main(["compress", *after, "-o", str(tmp_path / "new")]) == 2
    assert "tables 'a' and 'b' are one table in start_from, but two here" in _said(capsys)


def test_starting_from_a_damaged_manifest(files: Path, capsys) -> None:
    _next_night(files)
    path = files / "yesterday.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["mec_embed"])
    for entry in manifest["tables"]:
        del entry["padding_idx"]
    save_file(load_file(path), path, metadata | {"mec_embed": json.dumps(manifest)})
    capsys.readouterr()
    assert _run(files, "plan", "--start-from", path, "--quiet") == 2
    assert "manifest is damaged" in _said(capsys)


def test_frozen_tables_of_the_model_do_not_share_codebooks_with_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Embedding(3000, 8) for name in "abc"})
    torch.save(model.state_dict(), tmp_path / "m.pt")
    output = str(tmp_path / "small.safetensors")
    command = ["compress", str(tmp_path / "m.pt"), "--ratio", "20", *FAST, "-o", output]
    assert main(command) == 0
    shared = load(nn.ModuleDict({name: nn.Embedding(3000, 8) for name in "abc"}), output)
    assert shared["a"].codebook_set is shared["b"].codebook_set
    model["a"].requires_grad_(False)
    load(model, output)
    assert not model["a"].codebooks.requires_grad and model["b"].codebooks.requires_grad
    assert model["b"].codebook_set is model["c"].codebook_set
    assert all(torch.equal(model[n].weight, shared[n].weight) for n in "abc")
    model.requires_grad_(False)
    load(model, output)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert main([*command, "--no-shared-codebooks"]) == 0
    apart = load(nn.ModuleDict({name: nn.Embedding(3000, 8) for name in "abc"}), output)
    assert len({table.codebook_set for table in apart.values()}) == 3


def test_starting_from_what_does_not_fit(files: Path, capsys) -> None:
    _next_night(files)
    capsys.readouterr()
    output, start = ["-o", files / "small.safetensors", "--quiet"], "--start-from"
    assert _run(files, "compress", *output, start, files / "model.safetensors") == 2
    assert "without a mec_embed manifest" in _said(capsys)
    assert _run(files, "compress", *output, start, files / "none") == 2
    assert "none: no such file" in _said(capsys)
    tensors = load_file(files / "model.safetensors")
    tensors["bag.weight"] = torch.randn(1300, 16)
    save_file(tensors, files / "model.safetensors")
    assert _run(files, "compress", *output, start, files / "yesterday.safetensors") == 2
    assert "'bag' has the shape (1300, 16), expected (1200, 16)" in _said(capsys)
    del tensors["bag.weight"]
    save_file(tensors, files / "model.safetensors")
    assert _run(files, "compress", *output, start, files / "yesterday.safetensors") == 2
    assert "table 'bag' is compressed in start_from" in _said(capsys)
    assert not (files / "small.safetensors").exists()


@pytest.mark.parametrize("kind", ["torch", "sharded", "wrapped"])
def test_other_checkpoints_give_the_same_tensors(files: Path, kind: str) -> None:
    assert _compress(files, *ROLES) == 0
    state, other = _model().state_dict(), files / "other.pt"
    if kind == "sharded":
        keys, other = [*state], files / "m.safetensors.index.json"
        names = {key: f"{number % 2}.safetensors" for number, key in enumerate(keys)}
        for name in ("0.safetensors", "1.safetensors"):
            save_file({k: state[k] for k in keys if names[k] == name}, files / name)
        other.write_text(json.dumps({"weight_map": dict(sorted(names.items()))}))
    else:
        ordered = {key: state[key] for key in sorted(state)}
        torch.save({"state_dict": ordered} if kind == "wrapped" else ordered, other)
    arguments = ["--freq", str(files / "counts.npz"), *FAST, *ROLES, "-o", str(files / "o")]
    assert main(["compress", str(other), *arguments]) == 0
    first, second = load_file(files / "small.safetensors"), load_file(files / "o")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert main(["verify", str(files / "o"), str(other), "--quiet"]) == 0


def test_a_module_with_two_names_and_extra_state_load_again(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Embedding(2000, 8)
            self.b = self.a
            self.n = 0

        def get_extra_state(self):
            return {"n": self.n}

        def set_extra_state(self, state) -> None:
            self.n = state["n"]

    model = Twice()
    model.n = 7
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert main(["compress", str(tmp_path / "m.pt"), "-o", str(tmp_path / "s"), *FAST]) == 0
    np.savez(tmp_path / "c.npz", b=np.ones(2000))
    assert main(["plan", str(tmp_path / "m.pt"), "--freq", str(tmp_path / "c.npz"), *FAST]) == 0
    loaded = load(Twice(), tmp_path / "s")
    assert loaded.a is loaded.b and loaded.n == 7
    assert main(["verify", str(tmp_path / "s"), str(tmp_path / "m.pt"), "--quiet"]) == 0


@pytest.mark.parametrize("left_out", ["--padding-idx", "--bag"])
def test_load_says_what_was_left_out(files: Path, left_out: str) -> None:
    place = ROLES.index(left_out)
    assert _compress(files, *ROLES[:place], *ROLES[place + 2 :]) == 0
    with pytest.raises(ValueError, match=r"'bag'|padding_idx"):
        load(_model(1), files / "small.safetensors")


def test_two_runs_write_the_same_bytes_and_metadata_stays(files: Path) -> None:
    assert _compress(files) == 0
    first = (files / "small.safetensors").read_bytes()
    assert _compress(files) == 0
    assert (files / "small.safetensors").read_bytes() == first
    with safe_open(files / "small.safetensors", framework="pt") as file:
        assert file.metadata()["by"] == "me"


@pytest.mark.parametrize("shared", [True, False])
def test_a_thousand_small_tables(shared: bool, tmp_path: Path, capsys) -> None:
    fields = {f"{number:04}": torch.randn(40, 4) for number in range(1000)}
    save_file({f"f.{k}.weight": v for k, v in fields.items()}, tmp_path / "m.safetensors")
    options = ["--include", "f.*", "--quiet", "--json"]
    if shared:
        options += ["--epochs", "0", "--ratio", "8"]
    else:  # an explicit layout: each table is a group of its own
        values = {"num_subvectors": 1, "codebook_size": 4, "epochs": 0}
        (tmp_path / "config.json").write_text(json.dumps(values))
        options += ["--config", str(tmp_path / "config.json")]
    arguments = [str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "s"), *options]
    assert main(["compress", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert len(report["tables"]) == 1000
    modules = {number: nn.Embedding(40, 4) for number in fields}
    load(nn.ModuleDict({"f": nn.ModuleDict(modules)}), tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert len(about["tables"]) == 1000 and about["table_bytes"] == report["bytes_after"]


# --- plan, inspect, verify ----------------------------------------------------------------------


def test_plan_says_what_compress_does_and_writes_nothing(files: Path, capsys) -> None:
    options = ["--freq", files / "counts.npz", *FAST, *ROLES, "--json"]
    assert _run(files, "plan", *options) == 0
    planned = json.loads(capsys.readouterr().out)
    assert _left(files) == set()
    assert planned["left_alone"].keys() == {"mlp.weight", "small.weight"}
    assert _compress(files, *ROLES, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == (files / "small.safetensors").stat().st_size
    for before, after in zip(planned["report"]["tables"], done["report"]["tables"], strict=True):
        assert before["weighted_error"] is None and after["weighted_error"] is not None
        same = ("name", "rows", "dim", "layout", "bytes_before", "bytes_after", "lookups")
        assert all(before[name] == after[name] for name in same)


def test_texts_name_tables_and_bytes(files: Path, capsys) -> None:
    assert _run(files, "plan", *FAST) == 0
    out = capsys.readouterr().out
    assert "embedding.größe 1" in out and "left alone: small.weight: has fewer than" in out
    assert _compress(files) == 0
    assert "wrote " in capsys.readouterr().out
    assert _run(files, "inspect") == 0
    out = capsys.readouterr().out
    assert "by: me" in out and "128000" in out and "left alone: mlp.weight" in out
    assert main(["inspect", str(files / "small.safetensors")]) == 0
    assert "additive" in capsys.readouterr().out
    assert main(["verify", *_both(files), "--quiet"]) == 0
    assert "all is well" in capsys.readouterr().out


def _both(folder: Path) -> list[str]:
    return [str(folder / "small.safetensors"), str(folder / "model.safetensors")]


@pytest.mark.parametrize("ratio", ["4", "30"])
def test_inspect_counts_the_bytes_of_the_file(files: Path, ratio: str, capsys) -> None:
    assert _compress(files, *ROLES, "--ratio", ratio, "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert main(["inspect", str(files / "small.safetensors"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    parts = ("table_bytes", "other_tensor_bytes", "header_bytes")
    size = (files / "small.safetensors").stat().st_size
    assert sum(about[part] for part in parts) == about["file_bytes"] == size
    told = {table["name"]: table for table in report["tables"]}
    for table in about["tables"]:
        expected = told[table["names"][0]]
        for name in ("rows", "dim", "layout", "code_bytes", "codebook_bytes", "other_bytes"):
            assert table[name] == expected[name]
        assert table["bytes"] == expected["bytes_after"]
        assert table["error"] == expected["weighted_error"]


def test_inspect_and_verify_take_files_of_save(files: Path, capsys) -> None:
    model = _model()
    compress(model, None, CompressionConfig(ratio=10, epochs=0), progress=False)
    save(model, files / "small.safetensors")
    assert main(["inspect", str(files / "small.safetensors"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["table_bytes"] + about["other_tensor_bytes"] == about["tensor_bytes"]
    assert {table["names"][0] for table in about["tables"]} >= {"bag", "embedding.user"}
    assert main(["verify", *_both(files), "--json", "--quiet"]) == 0
    assert "no checksums" in capsys.readouterr().out


def test_verify_finds_the_errors_of_the_report(files: Path, capsys) -> None:
    assert _compress(files, *ROLES, "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert main(["verify", *_both(files), "--freq", str(files / "counts.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fine"] and not found["notes"]
    reported = {table["name"]: table["weighted_error"] for table in report["tables"]}
    model = load(_model(1), files / "small.safetensors")
    for table in found["tables"]:
        assert table["reported"] == reported[table["name"]]
        assert table["weighted"] == pytest.approx(table["reported"], rel=1e-6)
        dense = _model().get_submodule(table["name"]).weight.detach().double()
        decoded = model.get_submodule(table["name"]).dequantize()
        error = (decoded - dense).square().sum()
        variance = (dense - dense.mean(0)).square().sum()
        assert table["unweighted"] == pytest.approx(float(error / variance), rel=1e-6)


@pytest.mark.parametrize("key", ["mec_embed_origin", "mec_embed_sha256"])
@pytest.mark.parametrize(
    "value",
    ["", "{", "3", "[]", "null", "[" * 100_000, '{"tables": []}', '{"tables": {"first": 3}}']
    + ['{"config": null}', '{"tables": {"first": {"error": "x", "popularity": "sqrt"}}}']
    + ['{"tables": {"first": {"error": 0.1, "popularity": []}}}'],
)
def test_metadata_that_lie_are_refused(key: str, value: str, files: Path, capsys) -> None:
    assert _compress(files, *ROLES) == 0
    tensors = load_file(files / "small.safetensors")
    with safe_open(files / "small.safetensors", framework="pt") as file:
        metadata = file.metadata() | {key: value}
    save_file(tensors, files / "small.safetensors", metadata)
    capsys.readouterr()
    code = main(["verify", *_both(files), "--freq", str(files / "counts.npz"), "--quiet"])
    captured = capsys.readouterr()
    if key == "mec_embed_sha256" and value.startswith('{"'):  # an object, of other checksums
        assert code == 1 and "not those that were written" in captured.out
    else:
        assert code == 2 and f"small.safetensors: its metadata '{key}' are damaged" in captured.err


def test_json_has_no_numbers_that_are_not_finite(files: Path, capsys) -> None:
    assert _compress(files) == 0
    tensors = _model().state_dict()
    tensors["first.weight"][7] = torch.nan
    save_file(tensors, files / "model.safetensors")
    capsys.readouterr()
    both = [str(files / "small.safetensors"), str(files / "model.safetensors")]
    assert main(["verify", *both, "--json", "--quiet"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {t["name"]: t["unweighted"] for t in found["tables"]}["first"] is None
    # Without counts, too, this is no checkpoint that the file was made from.
    assert found["differences"] == [
        "table 'first': unweighted error nan, expected a finite one; the checkpoint holds NaN or "
        "infinity in it"
    ]


def test_verify_exits_1_for_what_differs(files: Path, capsys) -> None:
    assert _compress(files) == 0
    both, counts = _both(files), ["--freq", str(files / "counts.npz"), "--quiet"]
    assert main(["verify", *both, *counts, "--max-error", "0.001"]) == 1
    assert "above --max-error 0.001" in capsys.readouterr().out
    whole = (files / "small.safetensors").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) - 20] ^= 1
    (files / "small.safetensors").write_bytes(damaged)
    assert main(["verify", *both, *counts]) == 1
    assert "not those that were written" in capsys.readouterr().out
    (files / "small.safetensors").write_bytes(whole)
    state = _model().state_dict()
    state["mlp.bias"][3] += 1
    save_file(state, files / "model.safetensors")
    assert main(["verify", *both, *counts]) == 1
    assert "mlp.bias: differs" in capsys.readouterr().out
    assert main(["verify", *both, *counts, "--tables-only"]) == 0
    state["bag.weight"] *= 2
    del state["first.weight"], state["step"]
    save_file(state, files / "model.safetensors")
    assert main(["verify", *both, "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "table 'first': found no such table, expected (2000, 1)" in out
    assert "step: " in out
    assert main(["verify", *both, *counts[2:], "--tables-only"]) == 1


# --- input that does not fit --------------------------------------------------------------------


def _said(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("command", ["plan", "compress", "inspect", "verify"])
def test_a_missing_file_is_named(command: str, tmp_path: Path, capsys) -> None:
    more = {"compress": ["-o", str(tmp_path / "s")], "verify": [str(tmp_path / "x")]}
    assert main([command, str(tmp_path / "none"), *more.get(command, [])]) == 2
    assert f"{tmp_path / 'none'}: no such file" in _said(capsys)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_no_checkpoint(files: Path, capsys) -> None:
    (files / "model.safetensors").write_text("label,id\n")
    assert _compress(files) == 2
    assert "no checkpoint that can be read" in _said(capsys)
    assert _left(files) == set()


def test_rows_that_hold_nan_are_named(files: Path, capsys) -> None:
    state = _model().state_dict()
    state["embedding.user.weight"][1234, 5] = float("nan")
    save_file(state, files / "model.safetensors")
    assert _compress(files) == 2
    assert "'embedding.user': row 1234 holds NaN or infinity" in _said(capsys)
    assert _left(files) == set()


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
@pytest.mark.parametrize(("scale", "dtype"), [(1e30, torch.float32), (1e300, torch.float64)])
def test_rows_that_are_too_large_to_square_are_named(
    scale: float, dtype: torch.dtype, nonfinite: str, files: Path, capsys
) -> None:
    state = _model().state_dict()
    state["embedding.user.weight"] = torch.randn(2000, 16, dtype=dtype) * scale
    save_file(state, files / "model.safetensors")
    assert _compress(files, "--nonfinite", nonfinite) == 2
    said = _said(capsys)
    assert "table 'embedding.user': row " in said and "expected at most 1e+15" in said
    assert _left(files) == set()


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, torch.ones(1, 1)])
def test_what_the_file_cannot_hold_is_said_at_once(value, files: Path, capsys, monkeypatch) -> None:
    torch.save({**_model().state_dict(), "more": {"x": value}}, files / "m.pt")
    monkeypatch.setattr(offline, "learn", None)
    assert main(["compress", str(files / "m.pt"), *FAST, "-o", str(files / "s")]) == 2
    said = _said(capsys)
    assert "m.pt: state_dict entry 'more' is a dict, which the file cannot hold" in said


def test_entries_that_are_not_finite_may_be_taken_as_zero(files: Path, capsys) -> None:
    state, written = _model().state_dict(), []
    for value in (float("nan"), 0.0):
        state["embedding.user.weight"][1234, 5:9] = value
        save_file(state, files / "model.safetensors")
        assert _compress(files, "--nonfinite", "zero") == 0
        said = capsys.readouterr().out
        assert ("'embedding.user': 1 rows hold NaN or infinity" in said) == (value != 0)
        written.append(load_file(files / "small.safetensors"))
        assert main(["verify", *_both(files), "--freq", str(files / "counts.npz"), "--quiet"]) == 0
        capsys.readouterr()
    assert all(torch.equal(written[0][key], value) for key, value in written[1].items())


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ({"first": np.ones(1999)}, ["'first'", "(1999,)", "(2000,)"]),
        ({"first": np.ones((2000, 1))}, ["'first'", "(2000, 1)", "(2000,)"]),
        ({"first": np.array(3)}, ["'first'", "()", "(2000,)"]),
        ({"first": np.where(np.arange(2000) == 77, -2, 1)}, ["'first'", "-2", "row 77"]),
        ({"first": np.where(np.arange(2000) == 77, np.nan, 1)}, ["'first'", "nan", "row 77"]),
        ({"first": np.where(np.arange(2000) == 77, np.inf, 1)}, ["'first'", "inf", "row 77"]),
        ({"first": np.full(2000, 1e300)}, ["'first'", "1e+300", "at most 1e+19"]),
        ({"first": np.array(["a"] * 2000)}, ["'first'", "<U1", "numbers"]),
        ({"frist": np.ones(2000)}, ["'frist'", "first", "rename"]),
        ({"nope.*": np.ones(2000)}, ["'nope.*'", "rename"]),
        ({"embedding.*": np.ones(2000)}, ["'embedding.größe 1'", "(2000,)", "(1500,)"]),
        ({"first": np.ones(2000), "fir*": np.ones(2000)}, ["'first' twice", "'fir*'"]),
        ({"first": np.array([object()] * 2000)}, ["'first'", "object", "numbers"]),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_counts_that_do_not_fit(
    counts: dict[str, np.ndarray], parts: list[str], compressed: bool, files: Path, capsys
) -> None:
    (np.savez_compressed if compressed else np.savez)(files / "counts.npz", **counts)
    assert _compress(files) == 2
    said = _said(capsys)
    assert all(part in said for part in [*parts, "counts.npz"]), said
    assert _left(files) == set()


@pytest.mark.parametrize("contents", [b"", b"nonsense", b"PK\x03\x04nonsense", b"\x93NUMPY"])
def test_a_file_that_holds_no_counts(contents: bytes, files: Path, capsys) -> None:
    (files / "counts.npz").write_bytes(contents)
    assert _compress(files) == 2
    assert "is no file of counts" in _said(capsys)


def test_one_array_and_a_missing_file_are_no_counts(files: Path, capsys) -> None:
    np.save(files / "counts.npy", np.ones(2000))
    assert _run(files, "plan", "--freq", files / "counts.npy") == 2
    assert "is no file of counts" in _said(capsys)
    for missing in ("none.npz", "counts.npy/none.npz"):
        assert _run(files, "plan", "--freq", files / missing) == 2
        assert f"{missing}: no such file" in _said(capsys)


def test_counts_are_found_by_pattern_last_part_and_in_any_type(files: Path, capsys) -> None:
    values = np.arange(2000) % 90  # more in all than half precision holds
    for dtype in (np.int64, np.uint8, np.float32, np.float16, ">i4"):
        for name in ("first", "first.weight", "fir?t"):
            np.savez(files / "counts.npz", **{name: values.astype(dtype), "user": values})
            assert _run(files, "plan", "--freq", files / "counts.npz", "--json", "--quiet") == 0
            report = json.loads(capsys.readouterr().out)["report"]
            lookups = {table["name"]: table["lookups"] for table in report["tables"]}
            assert lookups["first"] == lookups["embedding.user"] == values.sum()
    np.savez(files / "counts.npz", small=np.ones(20), first=values)
    assert _run(files, "plan", "--freq", files / "counts.npz", "--json") == 0
    assert "counts of 'small' have no use" in capsys.readouterr().err


def test_a_parquet_file_that_is_damaged_or_cannot_be_read(files: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("pyarrow")
    (files / "log.parquet").write_bytes(b"PAR1" + b"\0" * 50 + b"PAR1")
    assert _run(files, "plan", "--freq", files / "log.parquet") == 2
    assert "log.parquet is no parquet file that can be read" in _said(capsys)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert _run(files, "plan", "--freq", files / "log.parquet") == 3
    assert "pip install pyarrow" in _said(capsys)


def test_columns_without_a_file_are_refused(files: Path, capsys) -> None:
    assert _run(files, "plan", "--column", "a=first") == 2
    assert "--column goes with --freq" in _said(capsys)


@pytest.mark.parametrize("option", ["--freq", "--config", "--start-from"])
def test_a_folder_is_no_file(option: str, files: Path, capsys) -> None:
    assert _run(files, "plan", option, files) == 2
    assert f"{files} is a folder, expected a file" in _said(capsys)


def test_ids_of_a_parquet_file_are_counted(files: Path, capsys) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = files / "log.parquet"
    table = {"label": [0, 1, 0], "user": [5, 5, 1999], "other": [[1], [2, 2], None]}
    parquet.write_table(pa.table(table), path)

    def lookups(*options: str) -> dict[str, float]:
        assert _run(files, "plan", "--freq", path, "--json", "--quiet", *options) == 0
        report = json.loads(capsys.readouterr().out)["report"]
        return {table["name"]: table["lookups"] for table in report["tables"]}

    assert lookups()["embedding.user"] == 3
    found = lookups("--column", "user=first", "--column", "other=bag")
    assert (found["first"], found["bag"], found["embedding.user"]) == (3, 3, None)
    for wrong, part in (("user=none", "'none'"), ("user=bag", "1999"), ("x=bag", "no column x")):
        assert _run(files, "plan", "--freq", path, "--column", wrong) == 2
        assert part in _said(capsys)
    parquet.write_table(pa.table({"x": [1]}), path)
    assert _run(files, "plan", "--freq", path) == 2
    assert "no column that is named as a table: found x" in _said(capsys)
    assert _run(files, "plan", "--freq", files / "counts.npz", "--column", "a=b") == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--include", "nope*"], "no table to compress; seen: bag.weight: its name"),
        (["--padding-idx", "nope=0"], "'nope', which fits none"),
        (["--padding-idx", "first=2000"], "padding row 2000 is none of its 2000 rows"),
        (["--bag", "nope=sum"], "'nope', which fits none"),
        (["--ratio", "0.5"], "ratio must be finite and at least 1"),
        (["--ratio", "100000"], "cannot fit"),
        (["--min-rows", "0"], "min_rows must be at least 1"),
        (["--ratio", "1"], "nothing to compress"),
        (["--config", "bad.json"], "bad.json: no such file"),
    ],
)
def test_options_that_do_not_fit(options: list[str], part: str, files: Path, capsys) -> None:
    assert _compress(files, *options) == 2
    assert part in _said(capsys)
    assert not (files / "small.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--bag", "first"],
        ["--bag", "first=max,first"],
        ["--padding-idx", "first=x"],
        ["--ratio", "x"],
        ["--ratio", "2", "--max-bytes", "3"],
        ["--device", "nothing"],
        ["--device", "meta"],
        ["--device", "xpu:99"],
        ["--unknown"],
    ],
)
def test_options_that_cannot_be_read_exit_2(options: list[str], files: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        _run(files, "plan", *options) if "--device" not in options else _compress(files, *options)
    assert caught.value.code == 2
    assert "usage: mec-embed" in _said(capsys)


def test_a_configuration_may_come_from_a_file(files: Path, capsys) -> None:
    config = CompressionConfig(max_bytes=30_000, codebook_dtype="int8", min_rows=1600)
    (files / "config.json").write_text(config.to_json())
    assert _run(files, "plan", "--config", files / "config.json", "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["config"] == config.to_dict() and len(report["tables"]) == 2
    options = ["--ratio", "12", "--include", "first", "--no-tiers", "--json"]
    assert _run(files, "plan", "--config", files / "config.json", *options) == 0
    found = json.loads(capsys.readouterr().out)["report"]["config"]
    assert (found["ratio"], found["max_bytes"], found["tiers"]) == (12, None, False)
    capsys.readouterr()
    texts = ["", "[]", "{", "[" * 100_000, '{"unknown": 1}', '{"epochs": "x"}', "\xff"]
    for text in texts:
        (files / "config.json").write_text(text, encoding="latin-1")
        assert _run(files, "plan", "--config", files / "config.json") == 2
        said = _said(capsys)
        assert "config.json" in said and "unsupported operand" not in said


def test_compressed_files_are_not_compressed_again(files: Path, capsys) -> None:
    assert _compress(files) == 0
    shutil.move(files / "small.safetensors", files / "model.safetensors")
    capsys.readouterr()
    assert _compress(files) == 2
    assert "is compressed already" in _said(capsys)


# --- output -------------------------------------------------------------------------------------


def test_the_input_is_never_the_output(files: Path, capsys) -> None:
    before = (files / "model.safetensors").read_bytes()
    assert _run(files, "compress", *FAST, "-o", files / "model.safetensors") == 2
    assert "is also read" in _said(capsys)
    assert (files / "model.safetensors").read_bytes() == before


def test_a_shard_of_the_input_is_never_the_output(files: Path, capsys) -> None:
    index, shard = files / "m.index.json", files / "model.safetensors"
    keys = [*_model().state_dict()]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, shard.name)}))
    before = shard.read_bytes()
    assert main(["compress", str(index), *FAST, "-o", str(shard)]) == 2
    assert "is also read" in _said(capsys)
    assert shard.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_device_is_never_replaced(files: Path, capsys) -> None:
    os.mkfifo(files / "pipe")
    assert _run(files, "compress", *FAST, "-o", files / "pipe") == 2
    assert "pipe is a pipe or a device" in _said(capsys)
    assert (files / "pipe").is_fifo()
    assert _left(files) == {"pipe"}


@pytest.mark.parametrize("name", ["output", "lock"])
def test_an_input_in_the_folder_of_finished_groups_is_left_alone(
    name: str, files: Path, capsys
) -> None:
    (files / "s.partial").mkdir()
    path = shutil.copy(files / "model.safetensors", files / "s.partial" / name)
    assert main(["compress", str(path), *FAST, "-o", str(files / "s")]) == 2
    assert "where a run keeps what it has finished" in _said(capsys)
    assert Path(path).read_bytes() == (files / "model.safetensors").read_bytes()


def test_a_file_where_finished_groups_are_kept(files: Path, capsys) -> None:
    (files / "small.safetensors.partial").write_text("mine")
    assert _compress(files) == 2
    assert "small.safetensors.partial is a file, expected a folder" in _said(capsys)
    assert (files / "small.safetensors.partial").read_text() == "mine"


def test_outputs_that_cannot_be_written(files: Path, capsys) -> None:
    assert _run(files, "compress", *FAST, "-o", files / "none" / "s") == 2
    assert "there is no folder" in _said(capsys)
    assert _run(files, "compress", *FAST, "-o", files) == 2
    assert "is a folder" in _said(capsys)
    # As Python reads a name of bytes that are not UTF-8.
    assert _run(files, "compress", *FAST, "-o", files / "\udcff") == 2
    assert "is not UTF-8, and safetensors opens no such file; choose" in _said(capsys)


def test_a_folder_that_is_read_only(files: Path, capsys, monkeypatch) -> None:
    folder = files / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere

        def refuse(path: Path, *args: object, **options: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert _run(files, "compress", *FAST, "-o", folder / "s") == 3
    said = _said(capsys)
    assert f"{folder / 's.partial'} cannot be written (Permission denied)" in said
    assert "choose another folder" in said
    assert not [*folder.iterdir()]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_in_which_no_file_can_be_made(files: Path, capsys) -> None:
    assert _run(files, "compress", *FAST, "-o", "/proc/s") == 3
    said = _said(capsys)
    assert "error: /proc/s.partial cannot be written (No such file" in said
    assert "choose another folder" in said


def test_a_folder_that_goes_away_meanwhile(files: Path, capsys, monkeypatch) -> None:
    folder, learn = files / "s.partial", offline.learn

    def cleaned(*args: object) -> object:
        outcome = learn(*args)
        shutil.rmtree(folder)
        return outcome

    monkeypatch.setattr(offline, "learn", cleaned)
    assert _run(files, "compress", *FAST, "-o", files / "s") == 3
    assert f"error: {files / 's'} cannot be written (No such file" in _said(capsys)
    assert _left(files) == set()


UNPRIVILEGED = """
import os, sys
from mec_embed.cli import main
# As root, so that all that is imported when it is needed is there.
assert main({first!r}) == 0
if os.getuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
sys.exit(main({then!r}))
"""


@pytest.fixture
def open_files(files: Path) -> Iterator[Path]:
    """As ``files``, in a folder that any user can read: those of pytest are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        shutil.copy(files / "model.safetensors", path)
        (path / "model.safetensors").chmod(0o444)
        for name, mode in (("open", 0o777), ("locked", 0o555), ("warm", 0o755)):
            (path / name).mkdir()
            (path / name).chmod(mode)
        yield path
        (path / "locked").chmod(0o755)


def _as_a_user(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """A run that has no rights of root."""
    command = ["compress", str(folder / "model.safetensors"), *FAST, "-o"]
    first, then = [*command, str(folder / "warm" / "s")], [*command, str(output)]
    script = UNPRIVILEGED.format(first=first, then=then)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_file_that_may_only_be_read_is_compressed_and_stays(open_files: Path) -> None:
    path, output = open_files / "model.safetensors", open_files / "open" / "s"
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode
    run = _as_a_user(open_files, output)
    assert run.returncode == 0, run.stderr
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) == before
    assert output.read_bytes() == (open_files / "warm" / "s").read_bytes()
    assert [one.name for one in output.parent.iterdir()] == ["s"]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_folder_that_may_not_be_written(open_files: Path) -> None:
    output = open_files / "locked" / "s"
    run = _as_a_user(open_files, output)
    assert run.returncode == 3
    assert f"error: {output}.partial cannot be written (Permission denied); " in run.stderr
    assert run.stderr.count("\n") == 1
    assert not [*output.parent.iterdir()]


def test_space_is_checked_first(files: Path, capsys, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(offline, "learn", None)
    assert _compress(files) == 3
    said = _said(capsys)
    assert "not enough space" in said and "5,000 are free" in said and "bytes are needed" in said


def test_a_disk_that_fills_up_leaves_no_output(files: Path) -> None:
    script = f"""
import resource, sys
from mec_embed.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.exit(main({["compress", *_both(files)[1:], "-o", _both(files)[0], *FAST]!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 3 and "File too large" in run.stderr, run.stderr
    assert not (files / "small.safetensors").exists()
    # The next run goes on, and leaves nothing behind.
    assert _run(files, "compress", *FAST, "-o", files / "small.safetensors") == 0
    assert _left(files) == {"small.safetensors"}


def test_an_older_output_stays_until_the_new_one_is_whole(files: Path, monkeypatch, capsys) -> None:
    (files / "small.safetensors").write_text("old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(offline, "write_safetensors", full)
        assert _compress(files) == 3
    assert (files / "small.safetensors").read_text() == "old"
    assert _compress(files) == 0
    assert (files / "small.safetensors").read_bytes()[:3] != b"old"


# --- going on -----------------------------------------------------------------------------------


class Stop(BaseException):
    """A kill, as far as the process can simulate one."""


def _interrupted(files: Path, monkeypatch, groups: int, *options: str) -> None:
    """A run that ends after so many groups."""
    fit, done = offline.Partial.fit, []

    def stopping(self, *args):
        if len(done) == groups:
            raise Stop
        done.append(1)
        return fit(self, *args)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(offline.Partial, "fit", stopping)
        _compress(files, *options)


def _resumed(files: Path, capsys, *options: str) -> int:
    capsys.readouterr()
    assert _compress(files, "--json", *options) == 0
    return json.loads(capsys.readouterr().out)["resumed_groups"]


def test_finished_groups_are_used_again(files: Path, monkeypatch, capsys) -> None:
    assert _compress(files) == 0
    whole = (files / "small.safetensors").read_bytes()
    (files / "small.safetensors").unlink()
    _interrupted(files, monkeypatch, 2)
    assert _left(files) == {"small.safetensors.partial"}
    assert _resumed(files, capsys) == 2
    assert (files / "small.safetensors").read_bytes() == whole
    assert _left(files) == {"small.safetensors"}


@pytest.mark.parametrize(
    "change", ["--seed", "--no-resume", "counts", "input", "damage", "version"]
)
def test_groups_of_another_run_are_not_used(change: str, files: Path, monkeypatch, capsys) -> None:
    _interrupted(files, monkeypatch, 2)
    options = {"--seed": ["--seed", "5"], "--no-resume": ["--no-resume"]}.get(change, [])
    if change == "counts":
        np.savez(files / "counts.npz", first=np.ones(2000))
    if change == "input":
        save_file(_model(3).state_dict(), files / "model.safetensors")
    if change == "version":
        monkeypatch.setattr(offline, "__version__", "0.0.0")
    if change == "damage":
        for path in (files / "small.safetensors.partial").glob("*.group"):
            path.write_bytes(path.read_bytes()[:-9] + b"\1" * 9)
    assert _resumed(files, capsys, *options) == 0
    resumed = (files / "small.safetensors").read_bytes()
    assert _compress(files, *options) == 0
    assert (files / "small.safetensors").read_bytes() == resumed


def test_a_folder_of_someone_else_is_left_alone(files: Path, capsys) -> None:
    folder = files / "small.safetensors.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("all of it")
    assert _compress(files) == 2
    assert "holds thesis.tex" in _said(capsys)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_the_folder_is_gone_before_another_run_can_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = offline.Partial(tmp_path / "small.safetensors", "", True, offline.Progress())
    seen = []
    with partial:
        inner = partial._lock

        class Lock:
            def __exit__(self, *exception: object) -> None:
                seen.append(partial.folder.exists())
                inner.__exit__(None, None, None)

        monkeypatch.setattr(partial, "_lock", Lock())
    assert seen == [False] and not partial.folder.exists()


def test_two_runs_with_one_output_are_refused(files: Path, capsys) -> None:
    pytest.importorskip("fcntl")
    with offline.Partial(files / "small.safetensors", "", True, offline.Progress()):
        assert _compress(files) == 2
    assert "another process works in" in _said(capsys)
    assert _compress(files) == 0


def test_a_checkpoint_that_changes_meanwhile_is_noticed(files: Path, monkeypatch, capsys) -> None:
    learn = offline.learn

    def changing(*args, **options):
        result = learn(*args, **options)
        os.utime(files / "model.safetensors", ns=(1, 1))
        return result

    monkeypatch.setattr(offline, "learn", changing)
    assert _compress(files) == 2
    assert "was changed while it was read" in _said(capsys)
    assert not (files / "small.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kills_at_random_points_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    figures = kill(folder, 10, random.randrange(10**6), tables=3)
    assert not figures.wrong, figures
    assert figures.kills == 10 and figures.with_finished and figures.finished


# --- memory and the rest ------------------------------------------------------------------------

LIMITED = """
import resource, sys
from mec_embed.cli import main
for argv in {first!r}:  # what libraries take at their first use is not the table's
    assert main(argv) == 0
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {room}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for argv in {then!r}:
    assert main(argv) == 0, argv
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_table_larger_than_the_memory_that_is_allowed(tmp_path: Path) -> None:
    dim, room, commands = 512, 320 << 20, []
    for name, rows in (("small", 3000), ("large", 230_000)):
        path, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.out"
        entry = {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, rows * dim * 4]}
        header = json.dumps({"t.weight": entry}).encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(np.random.default_rng(0).random((3000, dim), np.float32).tobytes())
            # The rest is a hole, of rows that are zero.
            file.truncate(8 + len(header) + rows * dim * 4)
        options = ["--include", "t", "--epochs", "0", "--quiet", "-o", str(output), "--ratio"]
        commands.append(
            [
                ["compress", str(path), *options, "100" if name == "small" else "1000"],
                ["verify", str(output), str(path), "--quiet"],
            ]
        )
    assert path.stat().st_size > 1.3 * room
    script = LIMITED.format(room=room, first=commands[0], then=commands[1])
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


def test_ctrl_c_and_lack_of_memory_are_said(files: Path, monkeypatch, capsys) -> None:
    gpu = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
    errors = [(KeyboardInterrupt(), 130, "goes on"), (MemoryError(), 3, "enough memory")]
    errors += [(full, 3, "enough memory"), (gpu, 3, "enough memory")]
    for error, code, part in errors:
        monkeypatch.setattr(offline, "check_finite", Mock(side_effect=error))
        assert _compress(files) == code
        assert part in _said(capsys)


def test_only_what_is_kept_goes_on_after_ctrl_c(files: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Job, "draft", Mock(side_effect=KeyboardInterrupt))
    assert _run(files, "plan") == 130
    assert _said(capsys) == "mec-embed plan: error: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed(closed: str, files: Path) -> None:
    command = f'"$0" -m mec_embed inspect "$1" --json {closed}'
    arguments = [sys.executable, str(files / "model.safetensors")]
    run = subprocess.run(["sh", "-c", command, *arguments], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert bool(run.stdout) is not closed.startswith(">")


@pytest.mark.parametrize("json_wanted", [True, False])
def test_names_that_the_terminal_cannot_show(json_wanted: bool, files: Path) -> None:
    arguments = ["inspect", str(files / "model.safetensors"), *["--json"] * json_wanted]
    run = subprocess.run(
        [sys.executable, "-m", "mec_embed", *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0, run.stderr
    if json_wanted:
        names = [table["names"][0] for table in json.loads(run.stdout)["tables"]]
        assert "embedding.größe 1" in names
    else:
        assert b"embedding.gr\\xf6\\xdfe 1" in run.stdout


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys) -> None:
    path, small = tmp_path / "m.safetensors", tmp_path / "s"
    names = ("a\x1b[2J\nall is well", "\u202eb", "c")
    tensors = {f"{name}.weight": torch.randn(1200, 8) for name in names}
    save_file(tensors | {"\x1b.weight": torch.ones(9, 8)}, path, {"by\x07": "me\nsafe: yes"})
    assert main(["compress", str(path), "-o", str(small), "--epochs", "0", "--ratio", "10"]) == 0
    assert main(["verify", str(small), str(path)]) == 0
    tensors = {f"{name}.weight": torch.zeros(1200, 8) for name in names}
    save_file(tensors, tmp_path / "other.safetensors")
    assert main(["verify", str(small), str(tmp_path / "other.safetensors")]) == 1
    for command in ("inspect", "plan"):
        assert main([command, str(path)]) == 0
    assert main(["inspect", "\x1bnone"]) == 2
    said = "".join(capsys.readouterr())
    assert "\\x1b[2J\\nall is well" in said and "by\\x07: me\\nsafe: yes" in said
    assert not {*"\x1b\u202e\x07"} & {*said}


def test_faiss_that_is_missing_is_said(files: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError):
        require_faiss()
    assert _compress(files) == 3
    assert "pip install" in _said(capsys)


@pytest.mark.parametrize("command", [[], ["plan"], ["compress"], ["inspect"], ["verify"]])
def test_help_teaches_by_examples(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"mec-embed {' '.join(command)}" in out and "examples:" in out and "exit codes:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_progress_is_on_stderr_and_can_be_silent(files: Path, capsys) -> None:
    options = ["--epochs", "0", "--ratio", "10", "-o", str(files / "s"), "--json"]
    assert _run(files, "compress", *options) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "compressing" in captured.err and "writing" in captured.err
    assert _run(files, "compress", *options, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_it_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mec_embed", "--version"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.startswith("mec-embed ")
