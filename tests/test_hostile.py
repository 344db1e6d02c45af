"""Files that lie: every reader refuses them with a ValueError or reads them, within little memory.

Files of the format's test vectors, and an index over shards, are damaged in their bytes, in their
headers and in their manifests.
"""

from __future__ import annotations

import contextlib
import copy
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from vectors import make

from mec_embed import CompressionConfig, load
from mec_embed.checkpoints import damaged_tensors, open_checkpoint
from mec_embed.cli import main
from mec_embed.counts import read_counts
from mec_embed.offline import tables_of
from mec_embed.reader import Reader
from mec_embed.skeleton import Progress, Roles, Skeleton, choose_tables
from mec_embed.storage import read_manifest
from mec_embed.verify import stored_tables

resource = pytest.importorskip("resource")

VECTORS = Path(__file__).parent / "vectors"
FILES = sorted(VECTORS.glob("*.safetensors"))
#: Rows that are decoded of a table, at most: a file may say truly that it has many.
ROWS = 500
#: Memory that may be taken above what the process has: the files are a few kB.
ROOM = 256 << 20

FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a lying size makes a reader allocate fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- what reads files -----------------------------------------------------------------------------


def _read(path: Path, name: str) -> None:
    reader = Reader(path)
    for table, (rows, dim) in reader.tables.items():
        ids = np.arange(min(rows, ROWS))
        assert reader.rows(table, ids).shape == (len(ids), dim)


def _load(path: Path, name: str) -> None:
    load(make.untrained(name), path)


def _open(path: Path, name: str) -> None:
    checkpoint = open_checkpoint(path)
    damaged_tensors(checkpoint, lambda nbytes: None)
    for tensor in checkpoint.tensors.values():
        assert sum(len(chunk) for chunk in tensor.chunks()) == tensor.nbytes


def _inspect(path: Path, name: str) -> None:
    for table in stored_tables(open_checkpoint(path)):
        assert table.nbytes >= 0


def _tables(path: Path, name: str) -> None:
    for table in tables_of(open_checkpoint(path), read_manifest(path)).values():
        with contextlib.suppress(IndexError):  # a damaged code, as an id out of range
            table.decode(torch.arange(min(table.num_embeddings, ROWS)))


READERS: dict[str, Callable[[Path, str], None]] = {
    "reader": _read,
    "load": _load,
    "open_checkpoint": _open,
    "inspect": _inspect,
    "tables": _tables,
}


def _attempt(path: Path, name: str) -> set[str]:
    """Let every reader read the file; those that refuse it, all of which name the file."""
    refused: set[str] = set()
    for reader, read in READERS.items():
        try:
            read(path, name)
        except ValueError as error:
            assert str(path) in str(error), f"{reader}: {error!r}"
            refused.add(reader)
    return refused


# --- what is done to files ------------------------------------------------------------------------

HOSTILE = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2, 7, 2**31, 2**48, 2**63 - 1, 2**64, 10**30, -(10**30),
        10**400, 1.5, float("nan"), float("inf"), 1e308, "", "..", "../../x", "/etc/passwd", "\0",
        "item", "int8", "rows", "shared", "additive", "x" * 5000, "\ud800", [], {}, [[]], [0],
        [-1, -1], [2**62, 2**62], [1] * 70, {"": {}}, {"names": ["item"]},
    ]
)  # fmt: skip


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within JSON."""
    if not isinstance(value, (dict, list)):
        return []
    inside = [*value.items()] if isinstance(value, dict) else [*enumerate(value)]
    return [one for key, child in inside for one in ((*way, key), *_places(child, (*way, key)))]


def _changed(draw: st.DrawFn, values: Any) -> str:
    """JSON text in which some values are missing, others, or there twice."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 2))):
        places = _places(values)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        parent = values
        for key in way:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "delete", "copy", "twice"]))
        if what == "delete":
            del parent[last]
        elif what == "replace":
            parent[last] = copy.deepcopy(draw(HOSTILE))
        elif what == "twice" and isinstance(parent, list):
            parent.append(parent[last])
        else:
            other = draw(st.sampled_from(places))
            parent[last] = _at(values, other)
    text = json.dumps(values)
    if draw(st.booleans()) and text.startswith("{") and len(text) > 2:
        # A key for the second time: which of the two counts is up to the parser.
        key = draw(st.sampled_from([*values]))
        text = f"{{{json.dumps(key)}: {json.dumps(copy.deepcopy(draw(HOSTILE)))}, {text[1:]}"
    return text


def _at(values: Any, way: tuple[Any, ...]) -> Any:
    """What is there, or nothing where the way has gone."""
    for key in way:
        try:
            values = values[key]
        except (LookupError, TypeError):
            return None
    return copy.deepcopy(values)


def _parted(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _joined(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of a vector, and bytes that are no longer it."""
    path = draw(st.sampled_from(FILES))
    what = draw(st.sampled_from(["bytes", "header", "manifest", "manifest", "manifest"]))
    if what == "bytes":
        return path.stem, _damaged_bytes(draw, path.read_bytes())
    header, data = _parted(path)
    if what == "manifest":
        manifest = json.loads(header["__metadata__"]["mec_embed"])
        header["__metadata__"]["mec_embed"] = _changed(draw, manifest)
        return path.stem, _joined(json.dumps(header), data)
    return path.stem, _joined(_changed(draw, header), data)


def _damaged_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    values = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(values) - 1))
        values[place] = draw(st.integers(0, 255))
    length = draw(st.sampled_from([len(values), len(values), draw(st.integers(0, len(values)))]))
    return bytes(values[:length]) + draw(st.binary(max_size=3))


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_vectors_are_read_by_all(path: Path) -> None:
    assert _attempt(path, path.stem) == set()


@FUZZ
@given(file=damaged())
def test_any_damage_is_refused_or_harmless(file: tuple[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file[1])
    refused = _attempt(path, file[0])
    if not refused:
        tables = tables_of(open_checkpoint(path), read_manifest(path))
        for name, table in tables.items():
            ids = np.arange(min(table.num_embeddings, ROWS))
            with torch.no_grad():
                ours = table.decode(torch.from_numpy(ids)).float().numpy()
            np.testing.assert_array_equal(Reader(path).rows(name, ids).astype(ours.dtype), ours)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("names", [3, [], {}, None, [3], ["item", None]])
def test_the_command_line_says_what_is_wrong(
    command: str, names: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (header, data) = tmp_path / "m.safetensors", _parted(VECTORS / "example.safetensors")
    manifest = json.loads(header["__metadata__"]["mec_embed"])
    manifest["tables"][0]["names"] = names
    header["__metadata__"]["mec_embed"] = json.dumps(manifest)
    path.write_bytes(_joined(json.dumps(header), data))
    more = [str(path), "--quiet"] if command == "verify" else []
    assert main([command, str(path), *more]) == 2
    said = capsys.readouterr()
    assert not said.out and f"error: {path}: a table of the mec_embed manifest" in said.err


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The index of two shards, in a folder beside a file that is none of them."""
    folder = tmp_path / "inside"
    (folder / "deep").mkdir(parents=True)
    places = {"a": "one.safetensors", "b": "deep/two.safetensors"}
    for key, name in places.items():
        save_file({key: torch.ones(4, 4)}, folder / name)
    save_file({"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}, tmp_path / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 128}, "weight_map": places}))
    return path


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "deep/../../secret.safetensors", "..\\secret.safetensors", "C:x"],
)
def test_no_shard_is_outside_the_folder(name: str, index: Path) -> None:
    for place in (name, str(index.parent.parent / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(ValueError, match="outside the index's folder"):
            open_checkpoint(index)


def test_an_index_of_itself_is_refused(index: Path) -> None:
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(ValueError, match="'a' is said to be in .* no file of tensors"):
        open_checkpoint(index)


PLACES = st.one_of(
    HOSTILE,
    st.lists(
        st.sampled_from(["..", ".", "", "deep", "secret.safetensors", "one.safetensors", "\\"])
    ).map("/".join),
)


@FUZZ
@given(
    data=st.data(),
    places=st.dictionaries(st.sampled_from(["a", "b", "", "../x"]), PLACES, min_size=1),
    damage=st.booleans(),
)
def test_any_index_is_refused_or_read(
    data: st.DataObject, places: dict[str, Any], damage: bool, index: Path
) -> None:
    values = {"weight_map": copy.deepcopy(places)}
    text = json.dumps(values)
    if damage:
        text = data.draw(st.composite(lambda draw: _changed(draw, values))())
    index.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        checkpoint = open_checkpoint(index)
    except ValueError as error:
        assert str(index.parent) in str(error)
        return
    except OSError:  # no such shard
        return
    for tensor in checkpoint.tensors.values():
        assert tensor.rows(0, 4).eq(1).all(), "a tensor from outside the folder"


# --- counts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    """A table of 50 rows."""
    path = tmp_path_factory.mktemp("counts") / "model.safetensors"
    save_file({"a.weight": torch.zeros(50, 4)}, path)
    checkpoint = open_checkpoint(path)
    chosen, _ = choose_tables(checkpoint, CompressionConfig(min_rows=8))
    return Skeleton(checkpoint, chosen, Roles(), lambda nbytes: None)


def _counts(path: Path, skeleton: Skeleton) -> None:
    """The counts are read, or refused by an error that names the file."""
    try:
        stats = read_counts(path, skeleton, {}, Progress())
        assert "a" not in stats or (stats["a"].shape == (50,) and (stats["a"] >= 0).all())
    except ValueError as error:
        assert str(path) in str(error)


@FUZZ
@given(data=st.data(), compressed=st.booleans())
def test_damaged_counts_are_refused_or_read(
    data: st.DataObject, compressed: bool, skeleton: Skeleton, tmp_path: Path
) -> None:
    path = tmp_path / "counts.npz"
    (np.savez_compressed if compressed else np.savez)(path, a=np.arange(50))
    raw = path.read_bytes()
    path.write_bytes(data.draw(st.composite(lambda draw: _damaged_bytes(draw, raw))()))
    _counts(path, skeleton)


SHAPES = [(2**40,), (2**62,), (2**70,), (-1,), (-50,), (50, 1), (), (0,), (50.0,), ("x",), (True,)]


@pytest.mark.parametrize("kind", ["<i8", "|O", "|S5", "<M8[s]", "V1000000000", "x", [("a", "<i8")]])
@pytest.mark.parametrize("shape", [(50,), *SHAPES], ids=str)
def test_arrays_that_lie_cost_nothing(
    shape: tuple[Any, ...], kind: Any, skeleton: Skeleton, tmp_path: Path
) -> None:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(11 + len(header)) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(400)
    path = tmp_path / "counts.npz"
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("a.npy", array)
        if (shape, kind) == ((50,), "<i8"):
            _counts(path, skeleton)
        else:
            with pytest.raises(ValueError, match="counts.npz: "):
                read_counts(path, skeleton, {}, Progress())
