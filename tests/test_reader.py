"""The reader without torch: test vectors, agreement with torch, and files that it must refuse."""

from __future__ import annotations

import copy
import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tables import filled
from tier_model import shop
from torch import nn

import mec_embed
from mec_embed import CodeLayout, TieredEmbedding, load, save
from mec_embed.ops import reference
from mec_embed.reader import Reader
from mec_embed.tables import find_replacements
from mec_embed.tiers import TierMap

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.npz"))
READER = Path(mec_embed.__file__).with_name("reader.py")


def _script() -> ModuleType:
    """tests/vectors/make.py."""
    spec = importlib.util.spec_from_file_location("make_vectors", VECTORS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = _script()


def _expected(name: str, folder: Path = VECTORS) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


# --- the vectors --------------------------------------------------------------------------------

# What is copied to a server: the reader's file alone, no torch, no package around it.
ALONE = """
import sys
for name in ("torch", "mec_embed", "safetensors", "ml_dtypes"):
    sys.modules[name] = None
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import numpy as np
spec = spec_from_file_location("reader", sys.argv[1])
sys.modules["reader"] = reader = module_from_spec(spec)
spec.loader.exec_module(reader)
out = Path(sys.argv[2])
for path in sys.argv[3:]:
    one = reader.Reader(path)
    rows = {name: one.rows(name, np.arange(shape[0])) for name, shape in one.tables.items()}
    np.savez(out / Path(path).stem, **rows)
"""


def test_the_reader_alone_reads_the_vectors(tmp_path: Path) -> None:
    files = [str(VECTORS / f"{name}.safetensors") for name in NAMES]
    command = [sys.executable, "-c", ALONE, str(READER), str(tmp_path), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        found, expected = _expected(name, tmp_path), _expected(name)
        assert found.keys() == expected.keys()
        for table, rows in expected.items():
            assert found[table].dtype == np.float32
            np.testing.assert_array_equal(found[table], rows, f"{name}: {table}")


@pytest.mark.parametrize("name", NAMES)
def test_load_reads_the_vectors(name: str) -> None:
    model = load(MAKE.untrained(name), VECTORS / f"{name}.safetensors")
    for table, rows in _expected(name).items():
        found = getattr(model, table).dequantize().numpy()
        np.testing.assert_array_equal(found, rows, f"{name}: {table}")
    assert model.layer.bias.item() == 0.25


def test_the_script_makes_the_vectors(tmp_path: Path) -> None:
    MAKE.make(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in VECTORS.iterdir() if path.suffix in (".npz", ".safetensors")
    )
    for name in NAMES:
        made, kept = (_header(folder / f"{name}.safetensors") for folder in (tmp_path, VECTORS))
        assert _manifest(made[0]) == _manifest(kept[0]) and made[1] == kept[1]
        rows = _expected(name, tmp_path)
        for table, values in _expected(name).items():
            np.testing.assert_array_equal(rows[table], values)


def test_the_example_of_the_specification() -> None:
    """The bytes that docs/format.md works out."""
    header, data = _header(VECTORS / "example.safetensors")
    text = (VECTORS.parents[1] / "docs/format.md").read_text()

    def stored(key: str) -> str:
        first, last = header[key]["data_offsets"]
        return data[first:last].hex(" ")

    codes = stored("item.code_table.codes")
    assert codes == "49 02" + 8 * " 00" and f"`{codes}`" in text
    books = stored("item.codebook_set.codebooks")
    assert ", ".join(f"`{books[start : start + 11]}`" for start in range(0, 71, 12)) in " ".join(
        text.split()
    )
    example = json.loads(text.split("```json")[1].split("```")[0])
    manifest = _manifest(header)
    entry = manifest["tables"][0]
    for field in ("sparse", "trainable", "requires_grad"):
        del entry[field]
    assert example == manifest


# --- agreement with torch -----------------------------------------------------------------------


def _by_operators(module: Any) -> np.ndarray:
    """All rows by the reference, not by the C kernel."""
    options = module.layout, module.codebook_set
    ids = torch.arange(module.num_embeddings)
    rows = reference.lookup(
        torch.zeros_like(ids) if options[0].kind == "shared" else ids,
        module.codes,
        module.codebooks,
        options[1].scales,
        module.num_embeddings,
        module.embedding_dim,
        options[0].bits,
        -1 if module.padding_idx is None else module.padding_idx,
        module.zero_padding,
        False,
        torch.float32,
        "",
    )
    return rows.detach().numpy()


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["additive", "product", "rows", "shared"])
def test_rows_are_those_of_torch_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes of 1 to 16 bits, by both implementations."""
    tables = {}
    for size in (1, 2, 3, 16, 100, 129, 257, 1000, 1025, 5000, 65_536):
        coded = kind in ("additive", "product")
        rows = {"rows": size, "shared": 77}.get(kind, 61)
        shape = (3, size) if coded else (1, rows if kind == "rows" else 1)
        layout = CodeLayout(kind, rows, 6 if size < 5000 else 3, *shape, dtype)
        tables[f"table{size}"] = filled(layout, padding_idx=0 if coded else None)
    save(nn.ModuleDict(tables), tmp_path / "model.safetensors")
    reader = Reader(tmp_path / "model.safetensors")
    assert reader.tables == {n: (m.num_embeddings, m.embedding_dim) for n, m in tables.items()}
    for name, module in tables.items():
        rows = reader.rows(name, np.arange(module.num_embeddings))
        np.testing.assert_array_equal(rows, _by_operators(module))
        np.testing.assert_array_equal(rows, module.dequantize().numpy())


@pytest.mark.parametrize(("dtype", "ratio"), [(None, 40), ("int8", 20), ("bfloat16", 20)])
def test_a_compressed_model(dtype: str | None, ratio: float, tmp_path: Path) -> None:
    """Tiers of both kinds, shared maps and codes, names twice, bags, and a plain table."""
    _, model, _ = shop(dtype, ratio)
    save(model, tmp_path / "model.safetensors")
    reader = Reader(tmp_path / "model.safetensors")
    modules = {alias.name: m for m, aliases in find_replacements(model) for alias in aliases}
    assert reader.tables.keys() == modules.keys() and "again" in modules
    random = np.random.default_rng(0)
    for name, module in modules.items():
        ids = random.integers(module.num_embeddings, size=500)
        expected = module.dequantize().numpy()[ids]
        np.testing.assert_array_equal(reader.rows(name, ids), expected)
    plain = {name for name, m in model.named_modules() if type(m) is nn.Embedding}
    for name in [*plain, "missing"]:
        with pytest.raises(KeyError, match=f"no compressed table '{name}'"):
            reader.rows(name, [0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map_of_tiers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 700))
    popular = np.random.default_rng(data.draw(st.integers(0, 999))).random(count) < data.draw(
        st.sampled_from([0.01, 0.5, 0.99])
    )
    if data.draw(st.booleans()):
        popular = np.sort(popular)[:: data.draw(st.sampled_from([1, -1]))].copy()
    popular[:2] = data.draw(st.sampled_from([(True, False), (False, True)]))
    sizes = int(popular.sum()), int((~popular).sum())
    head, tail = (filled(CodeLayout("rows", size, 2, 1, size)) for size in sizes)
    table = TieredEmbedding(TierMap.of(torch.from_numpy(popular)), head, tail)
    path = tmp_path_factory.getbasetemp() / "any_map.safetensors"
    save(nn.ModuleDict({"item": table}), path)
    found = Reader(path).rows("item", np.arange(count))
    np.testing.assert_array_equal(found, table.dequantize().numpy())


# --- ids ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Of the vector whose table ``first`` has a row for unknown ids."""
    return Reader(VECTORS / "additive_int8.safetensors")


@pytest.mark.parametrize("ids", [[], [40], (3, 3), np.array([7], np.uint8), np.array([0], ">i2")])
def test_ids_of_any_integer_kind(reader: Reader, ids: Any) -> None:
    expected = _expected("additive_int8")["item"][np.array(ids, np.int64)]
    rows = reader.rows("item", ids)
    assert rows.shape == (len(ids), 6) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("wrong", [-1, 41, 2**40, -(2**63), 2**63, 2**64 - 1])
def test_an_id_out_of_range(reader: Reader, wrong: int) -> None:
    with pytest.raises(IndexError, match=f"'item'.* id {wrong} .*0..40"):
        reader.rows("item", np.array([wrong]))
    # This table names a row for them.
    np.testing.assert_array_equal(
        reader.rows("first", np.array([wrong])), _expected("additive_int8")["first"][[8]]
    )


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([0.5], TypeError),
        (["a"], TypeError),
        ([True], TypeError),
        (3, ValueError),
        ([[1]], ValueError),
    ],
)
def test_what_is_no_list_of_ids(reader: Reader, ids: Any, error: type) -> None:
    with pytest.raises(error, match="'item': ids must be"):
        reader.rows("item", ids)


# --- files to refuse ----------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _manifest(header: dict[str, Any]) -> dict[str, Any]:
    return json.loads(header["__metadata__"]["mec_embed"])


def _write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _changed(source: str, path: Path, change: Callable[[Any, dict[str, Any]], Any]) -> Path:
    """A copy of a vector whose manifest and header were given to ``change``."""
    header, data = _header(VECTORS / f"{source}.safetensors")
    manifest = _manifest(header)
    manifest = change(manifest, header) or manifest
    header["__metadata__"]["mec_embed"] = json.dumps(manifest)
    return _write(path, header, data)


def _refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        Reader(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file(name: str, tmp_path: Path) -> None:
    whole = (VECTORS / f"{name}.safetensors").read_bytes()
    path = tmp_path / "part.safetensors"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        _refused(path)
    path.write_bytes(whole + b"\0")
    _refused(path, "goes on")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "missing")


HEADERS = {
    "length": (struct.pack("<Q", 2**63) + b"{}", "longer than the file"),
    "no UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "UTF-8"),
    "no JSON": (struct.pack("<Q", 2) + b"{,", "no JSON"),
    "deep": (struct.pack("<Q", 200_000) + 200_000 * b"[", "no JSON"),
    "list": (struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "no manifest": (struct.pack("<Q", 2) + b"{}", "no manifest"),
    "number": (struct.pack("<Q", 6) + b'{"a":1', "no JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[case][0])
    _refused(path, HEADERS[case][1])


def _set(*keys: Any) -> Callable[[Any, dict[str, Any]], None]:
    """Sets the last of ``keys`` where the others lead, from the manifest."""

    def change(manifest: Any, header: dict[str, Any]) -> None:
        for key in keys[:-2]:
            manifest = manifest[key]
        manifest[keys[-2]] = keys[-1]

    return change


def _set_tensor(key: str, field: str, value: Any) -> Callable[[Any, dict[str, Any]], None]:
    def change(manifest: Any, header: dict[str, Any]) -> None:
        header[key][field] = value

    return change


LAYOUT = ("tables", 0, "layout")
MALFORMED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "list": ("example", lambda m, h: [1], "no JSON object"),
    "newer": ("example", _set("version", 3), "version 3"),
    "version 0": ("example", _set("version", 0), "positive"),
    "version true": ("example", _set("version", True), "'version' must be int, got bool"),
    "tables": ("example", _set("tables", {}), "'tables' must be list"),
    "table": ("example", _set("tables", [3]), "JSON object"),
    "names": ("example", _set("tables", 0, "names", [3]), "names"),
    "no name": ("example", _set("tables", 0, "names", []), "names"),
    "twice": ("example", lambda m, h: m["tables"].append(m["tables"][0]), "'item' is there twice"),
    "module": ("example", _set("tables", 0, "module", "Linear"), "'Linear'"),
    "padding": ("example", _set("tables", 0, "padding_idx", 3), "'padding_idx' is no row"),
    "oov": ("example", _set("tables", 0, "oov_row", -1), "'oov_row' is no row"),
    "kind": ("example", _set(*LAYOUT, "kind", "sum"), "'sum'"),
    "many rows": ("example", _set(*LAYOUT, "num_embeddings", 10**12), "codes' is U8 .10."),
    "endless rows": ("example", _set(*LAYOUT, "num_embeddings", 10**400), "impossible numbers"),
    "no rows": ("example", _set(*LAYOUT, "num_embeddings", 0), "impossible numbers"),
    "many columns": ("example", _set(*LAYOUT, "embedding_dim", 10**9), "codebooks' is F16"),
    "codewords": ("example", _set(*LAYOUT, "codebook_size", 4), "codebooks' is F16"),
    "much too many": ("example", _set(*LAYOUT, "codebook_size", 70_000), "at most 65536"),
    "float": ("example", _set(*LAYOUT, "codebook_size", 3.0), "must be int, got float"),
    "dtype": ("example", _set("tables", 0, "codebook_dtype", "int4"), "'int4'"),
    "no scales": ("example", _set("tables", 0, "codebook_dtype", "int8"), "codebooks' is F16"),
    "columns": ("product_float16", _set(*LAYOUT, "num_subvectors", 3), "does not divide"),
    "rows": ("rows", _set(*LAYOUT, "codebook_size", 11), "other codebooks"),
    "shared key": ("shared", _set("shared", "first.code_table.codes", "x"), "not in the file"),
    "shared kind": ("shared", _set("shared", "first.code_table.codes", []), "not in the file"),
    "one tier": ("tiers_runs", lambda m, h: m["tables"][0]["tiers"].pop() and None, "two tiers"),
    "sum of tiers": ("tiers_runs", _set("tables", 0, "rows", 199), "make up"),
    "runs": ("tiers_runs", _set("tables", 0, "runs", 17), "17 runs"),
    "other runs": ("tiers_runs", _set("tables", 0, "runs", 6), "starts' is I64"),
    "no runs": ("tiers_runs", _set("tables", 0, "runs", None), "starts' is I64"),
    "offsets": ("example", _set_tensor("layer.bias", "data_offsets", [0, 8]), "another size"),
    "negative": ("example", _set_tensor("layer.bias", "data_offsets", [-4, 0]), "valid"),
    "shape": ("example", _set_tensor("layer.bias", "shape", [2**70]), "another size"),
    "long shape": ("example", _set_tensor("layer.bias", "shape", [1] * 10**5), "valid"),
    "overlap": (
        "example",
        _set_tensor("layer.bias", "data_offsets", [4, 8]),
        "not at its place",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file(case: str, tmp_path: Path) -> None:
    source, change, match = MALFORMED[case]
    _refused(_changed(source, tmp_path / "model.safetensors", change), match)


def _fields(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all fields of objects within a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    places = [] if isinstance(value, list) else [(*path, key) for key in value]
    for key, one in inner:
        if isinstance(one, (dict, list)):
            places += _fields(one, (*path, key))
    return places


#: Fields that a reader of rows has no use for.
FOR_TRAINING = {"codes_of", "codebooks_of", "map_of", "dtype", "extra", "mode"} | {
    "sparse",
    "trainable",
    "requires_grad",
    "include_last_offset",
}


@pytest.mark.parametrize("name", NAMES)
def test_missing_fields_and_other_types(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    manifest = _manifest(_header(VECTORS / f"{name}.safetensors")[0])
    for keys in _fields(manifest):
        layout_dtype = keys[-2:] == ("layout", "codebook_dtype")
        if keys[-1] in FOR_TRAINING or layout_dtype or len(keys) == 2 and keys[0] == "shared":
            continue
        for other in ("missing", 1.5, float("nan")):
            changed = copy.deepcopy(manifest)
            parent: Any = changed
            for key in keys[:-1]:
                parent = parent[key]
            if other != "missing":
                parent[keys[-1]] = other
            elif keys[-1] != "oov_row":  # which need not be there
                del parent[keys[-1]]
            else:
                continue
            _refused(_changed(name, path, lambda m, h, changed=changed: changed), keys[-1])


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes_never_crash(name: str, tmp_path: Path) -> None:
    """A file with some bytes changed is refused, or read; nothing else happens."""
    whole = np.fromfile(VECTORS / f"{name}.safetensors", np.uint8)
    random = np.random.default_rng(0)
    path, outcomes = tmp_path / "model.safetensors", set()
    for _ in range(150):
        damaged = whole.copy()
        places = random.integers(len(whole), size=random.integers(1, 4))
        damaged[places] = random.integers(256, size=len(places))
        damaged.tofile(path)
        try:
            reader = Reader(path)
            for table, (rows, dim) in reader.tables.items():
                found = reader.rows(table, np.arange(min(rows, 2000)))
                assert found.shape == (min(rows, 2000), dim)
            outcomes.add("read")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("key", ["starts", "before", "bitmap"])
@pytest.mark.parametrize("name", ["tiers_runs", "tiers_bitmap"])
def test_a_map_that_contradicts_itself(name: str, key: str, tmp_path: Path) -> None:
    header, data = _header(VECTORS / f"{name}.safetensors")
    first, last = header[f"item.tier_map.{key}"]["data_offsets"]
    path = tmp_path / "model.safetensors"
    for place in range(first, last):
        damaged = bytearray(data)
        damaged[place] ^= 1
        _refused(_write(path, header, bytes(damaged)), "'item': the map of the tiers is damaged")


def test_codes_that_name_no_codeword(tmp_path: Path) -> None:
    """Codes are looked at when they are read: 3 codewords have the codes 0 to 2."""
    header, data = _header(VECTORS / "example.safetensors")
    first, _ = header["item.code_table.codes"]["data_offsets"]
    damaged = bytearray(data)
    damaged[first] |= 0b11
    reader = Reader(_write(tmp_path / "model.safetensors", header, bytes(damaged)))
    np.testing.assert_array_equal(reader.rows("item", [1]), [[1, 0.5]])
    with pytest.raises(ValueError, match="table 'item': a code is no codeword"):
        reader.rows("item", [1, 0])
