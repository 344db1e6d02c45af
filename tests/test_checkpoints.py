"""Checkpoint files: read in pieces, written with checksums, refused where they are damaged."""

from __future__ import annotations

import errno
import json
import os
from collections import OrderedDict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from mec_embed.checkpoints import (
    CHECKSUMS,
    CHUNK_BYTES,
    FileTensor,
    MemoryTensor,
    damaged_tensors,
    open_checkpoint,
    write_safetensors,
)
from mec_embed.config import CompressionConfig
from mec_embed.skeleton import Roles, Skeleton, StreamedTable, choose_tables
from mec_embed.tables import Table, find_tables


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(300, 5, generator=generator),
        "half": torch.randn(7, 3, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "double": torch.randn(2, 3, 4, generator=generator).double(),
        "count": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "größe.ü 1": torch.arange(9, dtype=torch.uint8),
    }


def _bytes(stored) -> bytes:
    return b"".join(bytes(chunk) for chunk in stored.chunks())


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _saved(kind: str, folder: Path) -> Path:
    if kind == "torch":
        torch.save(OrderedDict(_tensors()), folder / "model.pt")
        return folder / "model.pt"
    if kind == "safetensors":
        save_file(_tensors(), folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"
    tensors, names = _tensors(), {}
    for number, keys in enumerate((["a.weight", "half"], [*tensors][2:])):
        names |= dict.fromkeys(keys, f"part-{number}.safetensors")
        save_file({key: tensors[key] for key in keys}, folder / f"part-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "torch", "sharded"])
def test_every_tensor_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_saved(kind, tmp_path))
    assert checkpoint.tensors.keys() == _tensors().keys()
    for key, tensor in _tensors().items():
        stored = checkpoint.tensors[key]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert stored.nbytes == tensor.nbytes and _bytes(stored) == _raw(tensor)
    assert torch.equal(checkpoint.tensors["a.weight"].rows(7, 20), _tensors()["a.weight"][7:20])
    assert torch.equal(checkpoint.tensors["half"].rows(0, 7), _tensors()["half"])
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in _tensors().values())


def test_rows_are_memory_of_their_own(tmp_path: Path) -> None:
    for kind in ("safetensors", "torch"):
        path = _saved(kind, tmp_path)
        before = path.read_bytes()
        open_checkpoint(path).tensors["a.weight"].rows(0, 300).fill_(7)
        assert path.read_bytes() == before


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    header = json.dumps({"t.weight": entry}).encode()
    header += b" " * (1 - len(header) % 2)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    stored = open_checkpoint(path).tensors["t.weight"]
    assert torch.equal(stored.rows(1, 3), torch.from_numpy(values).view(4, 3)[1:3])


def test_names_that_share_a_tensor_are_found(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(10, 2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    save_model(model, str(tmp_path / "m.safetensors"))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert {*checkpoint.shared, *checkpoint.shared.values()} == {"a.weight", "b.weight"}
        assert len(checkpoint.tensors) == 3


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_nested_state_dict_is_found(key: str, tmp_path: Path) -> None:
    torch.save({key: _tensors(), "epoch": 3}, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").tensors.keys() == _tensors().keys()


def test_what_is_no_tensor_is_extra(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 2), "b._extra_state": {"n": 1}}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert checkpoint.extra == {"b._extra_state": {"n": 1}}


class Code:
    """Something that only a full unpickler would load."""


def test_a_pickle_of_objects_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Code()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"plain tensors.*state_dict") as caught:
        open_checkpoint(tmp_path / "model.pt")
    # Named, and without torch's advice to load it with weights_only=False.
    assert "it holds test_checkpoints.Code, which is no tensor" in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kept", [-1, 8000, 100, 9])
def test_torch_files_that_are_cut_short_are_refused(kept: int, tmp_path: Path) -> None:
    path = _saved("torch", tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cannot be loaded as plain tensors") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.empty(3, 2, device="meta")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'a.weight' is on the meta device.*save the model"):
        open_checkpoint(tmp_path / "model.pt")


def test_old_and_other_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(_tensors(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch 1.6 or later"):
        open_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, expected a state_dict"):
        open_checkpoint(path)
    torch.save({"epoch": 3, "net": _tensors()}, path)
    with pytest.raises(ValueError, match="a dict with 'epoch', 'net', expected .* or one under 's"):
        open_checkpoint(path)
    torch.save({"a": torch.zeros(2, 2).to_sparse()}, path)
    with pytest.raises(ValueError, match=r"'a' is a torch.sparse_coo"):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_the_length_of_a_header_may_look_like_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.eye(2)}, path, {"made": "here"})
    old = path.read_bytes()
    end = 8 + int.from_bytes(old[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + old[8:end].ljust(length) + old[end:])
    found = open_checkpoint(path)
    assert found.metadata == {"made": "here"}  # torch.load reads such files too, without this
    assert _bytes(found.tensors["t"]) == _raw(torch.eye(2))


def _header(**entry: object) -> bytes:
    usual = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"t": usual | entry}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "0 bytes"),
        (b"label,id\n1,2\n3,4\n", "no checkpoint"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "does not fit"),
        ((4).to_bytes(8, "little") + b"nope", "header is damaged"),
        ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
        (_header() + b"\0" * 15, "'t', F32.*truncated"),
        (_header() + b"\0" * 17, "its header says"),
        (_header(shape=[2, 3]) + b"\0" * 16, "cannot be"),
        (_header(shape=[-2, -2]) + b"\0" * 16, "cannot be"),
        (_header(shape="ab") + b"\0" * 16, "entry of 't' is damaged"),
        (_header(shape=[2.5, 2]) + b"\0" * 16, "entry of 't' is damaged"),
        (_header(data_offsets=[0]) + b"\0" * 16, "entry of 't' is damaged"),
        (_header(data_offsets=[0.0, 16.0]) + b"\0" * 16, "entry of 't' is damaged"),
        (_header(data_offsets=[-16, 0]) + b"\0" * 16, "cannot be"),
        (b"PK\x03\x04 no archive", "cannot be loaded"),
    ],
)
def test_a_damaged_file_is_refused(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = _saved("safetensors", tmp_path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="has 100 bytes, expected at least"):
        _bytes(checkpoint.tensors["a.weight"])


def test_a_disk_that_fails_names_the_file(tmp_path: Path, monkeypatch) -> None:
    path = _saved("safetensors", tmp_path)
    stored = open_checkpoint(path).tensors["a.weight"]
    failing = Mock(readinto=Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    monkeypatch.setattr(stored._file, "_file", failing)
    with pytest.raises(ValueError, match="cannot be read at byte .*Input/output error") as caught:
        stored.rows(0, 3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "no index"),
        ("{", "no index"),
        ('{"weight_map": {"a": 3}}', "no index"),
        ('{"weight_map": {"a": "../part-0.safetensors"}}', "outside the index's folder"),
        ('{"weight_map": {"a": "/part-0.safetensors"}}', "outside the index's folder"),
        ('{"weight_map": {"a": "part-0.safetensors"}}', "does not hold it"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: str, message: str, tmp_path: Path) -> None:
    path = _saved("sharded", tmp_path)
    path.write_text(index)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_shards_may_hold_tied_tensors_and_extra_state(tmp_path: Path) -> None:
    table = torch.randn(10, 2)
    tied = {"a.weight": table, "b.weight": table, "n": 3, "unused": torch.ones(2)}
    torch.save(tied, tmp_path / "0.bin")
    torch.save({"c.weight": table}, tmp_path / "1.bin")
    names = dict.fromkeys(("b.weight", "a.weight", "n"), "0.bin") | {"c.weight": "1.bin"}
    index = tmp_path / "m.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    checkpoint = open_checkpoint(index)
    assert checkpoint.shared == {"b.weight": "a.weight"} and checkpoint.extra == {"n": 3}
    assert [*checkpoint.tensors] == ["a.weight", "c.weight"]
    assert checkpoint.files == [index, tmp_path / "0.bin", tmp_path / "1.bin"]
    # The first name of a tensor is not in the index.
    index.write_text(json.dumps({"weight_map": {"b.weight": "0.bin"}}))
    checkpoint = open_checkpoint(index)
    assert [*checkpoint.tensors] == ["b.weight"] and not checkpoint.shared


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or a device, expected a file"):
        open_checkpoint(tmp_path / "pipe")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = _saved("sharded", tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(
        ValueError, match="in part-1.safetensors, which is not there; put"
    ) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "sharded"])
def test_identity_changes_with_the_file(kind: str, tmp_path: Path) -> None:
    path = _saved(kind, tmp_path)
    first = open_checkpoint(path).identity
    assert open_checkpoint(path).identity == first
    other = tmp_path / ("part-1.safetensors" if kind == "sharded" else path.name)
    other.touch()
    assert open_checkpoint(path).identity != first


# --- writing ------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = _tensors() | {"large": torch.arange(CHUNK_BYTES // 4 + 5, dtype=torch.int32)}
    path, told = tmp_path / "out.safetensors", []
    stored = {key: MemoryTensor(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, stored, {"note": 'ü"'}, told.append)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype is tensor.dtype and torch.equal(loaded[key], tensor)
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["note"] == 'ü"' and sum(told) == checkpoint.nbytes
    for key, one in checkpoint.tensors.items():
        assert isinstance(one, FileTensor) and torch.equal(checkpoint.mapped(key), tensors[key])
        if one.dtype is not None and one.nbytes:
            assert checkpoint.mapped(key).data_ptr() % one.dtype.itemsize == 0


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write_safetensors(path, {k: MemoryTensor(t) for k, t in _tensors().items()}, {})
    assert damaged_tensors(open_checkpoint(path), int) == []
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1  # of the last tensor: the smallest items come last
    path.write_bytes(raw)
    assert damaged_tensors(open_checkpoint(path), int) == ["größe.ü 1"]


def test_files_of_others_have_no_checksums(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_saved("safetensors", tmp_path))
    assert CHECKSUMS not in checkpoint.metadata and damaged_tensors(checkpoint, int) is None


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_streamed_table_reads_as_one_in_memory(kind: str, dtype, tmp_path: Path) -> None:
    weight = torch.randn(5000, 24).to(dtype)
    weight[3] = 0
    path = tmp_path / "table"
    (save_file if kind == "safetensors" else torch.save)({"t.weight": weight}, path)
    checkpoint, told = open_checkpoint(path), []
    chosen, _ = choose_tables(checkpoint, CompressionConfig())
    (table,) = Skeleton(checkpoint, chosen, Roles(paddings=(("t", 3),)), told.append).tables
    model = nn.ModuleDict({"t": nn.Embedding(5000, 24, padding_idx=3, _weight=weight)})
    (dense,), _ = find_tables(model, CompressionConfig())
    for ids in (
        torch.arange(100, 900),
        torch.tensor([4999]),
        torch.tensor([7, 4000, 7, 0, 4999, 41]),
        torch.randint(5000, (700,)).int(),
        torch.arange(0, 5000, 37),
    ):
        assert torch.equal(table.read(ids), dense.read(ids))
    assert torch.equal(table.piece(4990, 5000), dense.piece(4990, 5000))
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(table.read(none), dense.read(none))
    for name in ("rows", "dim", "nbytes", "zero_padding", "name", "names", "device"):
        assert getattr(table, name) == getattr(dense, name)
    assert isinstance(table, StreamedTable) and isinstance(dense, Table) and sum(told) > 0


def _chosen(tensors: dict[str, torch.Tensor], path: Path, **options):
    torch.save(tensors, path / "m.pt")
    return choose_tables(open_checkpoint(path / "m.pt"), CompressionConfig(**options))


def test_tables_are_found_by_shape_or_by_name(tmp_path: Path) -> None:
    tensors = {
        "user.weight": torch.zeros(2000, 8),
        "first.weight": torch.zeros(2000, 1),
        "small.weight": torch.zeros(500, 8),
        "dense.weight": torch.zeros(2000, 8),
        "dense.bias": torch.zeros(2000),
        "wide.weight": torch.zeros(2000, 1000),
        "raw": torch.zeros(2000, 8),
        "ids.weight": torch.zeros(2000, 8, dtype=torch.int64),
        "cube.weight": torch.zeros(2000, 8, 2),
        "a.weight": torch.zeros(2000, 8),
        "a.b.weight": torch.zeros(2000, 8),
    }
    chosen, reasons = _chosen(tensors, tmp_path, min_rows=1000)
    assert [*chosen] == ["user", "first", "a.b"]
    assert {key: reason.split()[0] for key, reason in reasons.items()} == {
        "small.weight": "has",
        "dense.weight": "its",
        "wide.weight": "has",
        "raw": "its",
        "a.weight": "its",
    }
    chosen, _ = _chosen(tensors, tmp_path, include=("[uw]*", "small.weight"), exclude=("us*",))
    assert [*chosen] == ["small", "wide"]


@pytest.mark.parametrize("key", [".weight", "..weight", "a..b.weight"])
def test_names_that_no_module_has_are_left_alone(key: str, tmp_path: Path) -> None:
    chosen, reasons = _chosen({key: torch.zeros(2000, 8)}, tmp_path)
    assert not chosen and "empty part" in reasons[key]


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"head.weight": None, "head.bias": torch.zeros(2000)}, "it is one tensor with 'head.w"),
        ({"decoder": None}, "it is one tensor with 'decoder', which is no table"),
        ({"b.weight": None}, None),
    ],
)
def test_a_table_that_is_tied_to_no_table_is_left_alone(
    others: dict[str, torch.Tensor | None], reason: str | None, tmp_path: Path
) -> None:
    table = torch.zeros(2000, 8)
    tied = {key: table if value is None else value for key, value in others.items()}
    chosen, reasons = _chosen({"a.weight": table, **tied}, tmp_path)
    assert [*chosen] == ([] if reason else ["a"])
    assert reason is None or reason in reasons["a.weight"]


@pytest.mark.parametrize("name", ["type", "a.training", "forward.0", "ü ñ.x", "a.b.c.d.e"])
def test_a_table_may_have_any_name(name: str, tmp_path: Path) -> None:
    torch.save({f"{name}.weight": torch.zeros(2000, 8)}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    chosen, _ = choose_tables(checkpoint, CompressionConfig())
    skeleton = Skeleton(checkpoint, chosen, Roles(), int)
    assert [table.name for table in skeleton.tables] == [name]
    assert dict(skeleton.model.named_modules())[name] is skeleton.tables[0].module


def test_roles_name_a_table_whose_name_holds_brackets(tmp_path: Path) -> None:
    torch.save({"cat[0].weight": torch.zeros(2000, 8)}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    chosen, _ = choose_tables(checkpoint, CompressionConfig())
    roles = Roles(bags=(("cat[0]", ("mean", True)),), paddings=(("cat[0]", 5),))
    (table,) = Skeleton(checkpoint, chosen, roles, int).tables
    assert table.module.mode == "mean" and table.module.padding_idx == 5
