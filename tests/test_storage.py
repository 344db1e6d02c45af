"""Files: round trips, atomic writing, and what must be refused without touching the model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_model import ClickModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tier_model import Shop, shop
from tier_model import ids as shop_ids
from torch import Tensor, nn

from mec_embed import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressionConfig,
    CompressionReport,
    FormatError,
    FrequencyStats,
    compress,
    decompress,
    load,
    save,
    storage,
)

ROOT = Path(__file__).parents[1]


class Rich(nn.Module):
    """Shared modules, a bag, padding, batch norm, a tied weight, a plain table and extra state."""

    def __init__(self, rows: int = 600, bag: bool = True, padding: int | None = 0) -> None:
        super().__init__()
        self.user = nn.Embedding(rows, 8)
        self.user_again = self.user
        self.first = nn.Embedding(rows, 1)
        self.item = nn.Embedding(500, 8, padding_idx=padding)
        self.tags = nn.EmbeddingBag(400, 8, mode="sum") if bag else nn.Embedding(400, 8)
        self.tiny = nn.Embedding(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 2)
        self.tied = nn.Linear(8, 2)
        self.tied.weight = self.out.weight
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("seen", torch.zeros(0, 3, dtype=torch.int64))
        self.note: Any = {"threshold": 0.25, "names": ["a", None]}

    def get_extra_state(self) -> Any:
        """What JSON can hold."""
        return self.note

    def set_extra_state(self, state: Any) -> None:
        """Back."""
        self.note = state

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, 2) of ids (batch,)."""
        x = self.user(ids) + self.user_again(ids + 1) + self.item(ids) + self.tiny(ids % 5)
        x = self.norm(x + self.tags(ids[:, None]).reshape(len(ids), 8) + self.first(ids))
        return self.scalar * (self.out(x) + self.tied(x))


CONFIGS = {
    "float32": CompressionConfig(ratio=6, epochs=0),
    "int8": CompressionConfig(ratio=6, epochs=0, codebook_dtype="int8"),
    "float16": CompressionConfig(ratio=6, epochs=0, codebook_dtype="float16"),
    "bfloat16": CompressionConfig(ratio=6, epochs=0, codebook_dtype="bfloat16"),
    "product": CompressionConfig(ratio=5, epochs=0, codes="product"),
    "explicit": CompressionConfig(num_subvectors=3, codebook_size=7, epochs=0),
}
IDS = torch.arange(60) * 5


def _made(kind: str, **options: Any) -> tuple[Rich, CompressionReport]:
    torch.manual_seed(0)
    model = Rich(**options)
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked += 7
    report = compress(model, None, CONFIGS[kind], progress=False)
    return model.eval(), report


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rich, Path]:
    """A compressed model and its file; not to be changed."""
    model, _ = _made("float32")
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save(model, path)
    return model, path


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header and the data after it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _with_manifest(source: Path, target: Path, manifest: Any) -> Path:
    header, data = _header(source)
    header["__metadata__"]["mec_embed"] = (
        manifest if isinstance(manifest, str) else json.dumps(manifest)
    )
    return _write(target, header, data)


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads(_header(path)[0]["__metadata__"]["mec_embed"])


class _Untouched:
    """A model, and the check that nothing of it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {
            key: (value, value.clone() if isinstance(value, Tensor) else copy.deepcopy(value))
            for key, value in model.state_dict(keep_vars=True).items()
        }

    def check(self) -> None:
        now = dict(self.model.named_modules(remove_duplicate=False))
        assert now.keys() == self.modules.keys()
        assert all(now[name] is module for name, module in self.modules.items())
        state = self.model.state_dict(keep_vars=True)
        assert list(state) == list(self.tensors)
        for key, (value, content) in self.tensors.items():
            if isinstance(value, Tensor):
                assert state[key] is value and torch.equal(value, content), key
            else:
                assert state[key] == content, key


def _assert_refused(model: nn.Module, path: Path, *words: str) -> None:
    before = _Untouched(model)
    with pytest.raises(FormatError) as error:
        load(model, path)
    before.check()
    for word in words:
        assert word in str(error.value)


def _assert_same(model: nn.Module, other: nn.Module) -> None:
    state, found = model.state_dict(), other.state_dict()
    assert list(state) == list(found)
    for key, value in state.items():
        if isinstance(value, Tensor):
            assert value.dtype is found[key].dtype and torch.equal(value, found[key]), key
        else:
            assert value == found[key]


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model, _ = _made(kind)
    expected = model(IDS)
    save(model, tmp_path / "m.safetensors")
    torch.manual_seed(99)
    skeleton = Rich().eval()
    skeleton.note = None
    assert load(skeleton, tmp_path / "m.safetensors") is skeleton
    assert torch.equal(skeleton(IDS), expected)
    _assert_same(model, skeleton)
    assert skeleton.note == {"threshold": 0.25, "names": ["a", None]}
    assert skeleton.user_again is skeleton.user
    assert skeleton.tied.weight is skeleton.out.weight
    assert type(skeleton.tags) is CompressedEmbeddingBag and skeleton.tags.mode == "sum"
    assert torch.equal(skeleton.item(torch.tensor([0])), torch.zeros(1, 8))
    for name in ("user", "first", "item", "tags", "tiny"):
        old, new = getattr(model, name), getattr(skeleton, name)
        assert type(old) is type(new) and repr(old) == repr(new)
        assert vars(old).keys() == vars(new).keys()


def test_round_trip_in_another_process(tmp_path: Path) -> None:
    kinds = ["float32", "int8", "float16", "product"]
    models = {kind: _made(kind)[0] for kind in kinds}
    for kind, model in models.items():
        save(model, tmp_path / kind)
    script = f"""
import torch
from test_storage import IDS, Rich
from mec_embed import load
for kind in {kinds!r}:
    out = load(Rich(), {str(tmp_path)!r} + "/" + kind).eval()(IDS)
    torch.save(out.detach(), {str(tmp_path)!r} + f"/{{kind}}.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=_environment())
    for kind, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), model(IDS)), kind


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path}


def test_shared_codes_and_codebooks_stay_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = (300, 300, 301)
    model = ClickModel(rows, dim=8)
    with torch.no_grad():
        for name, table in model.first_order.items():
            table.weight.copy_(model.embeddings[name].weight[:, :1])
    counts = {
        f"{kind}.f{i}": 1 + np.arange(n) * (i + 1)
        for i, n in enumerate(rows)
        for kind in ("embeddings", "first_order")
    }
    report = compress(model, counts, CompressionConfig(ratio=12, epochs=0), progress=False)
    assert any(t.shares_codes_with for t in report.tables)
    assert any(t.shares_codebooks_with for t in report.tables)
    path = tmp_path / "m.safetensors"
    save(model, path)
    loaded = load(ClickModel(rows, dim=8), path)
    ids = torch.randint(300, (50, 3))
    assert torch.equal(loaded(ids), model(ids))

    def stores(model: nn.Module) -> list[tuple[int, int]]:
        tables = [m for m in model.modules() if isinstance(m, CompressedEmbedding)]
        codes, books = ([id(m.code_table) for m in tables], [id(m.codebook_set) for m in tables])
        return [(codes.index(c), books.index(b)) for c, b in zip(codes, books, strict=True)]

    assert stores(loaded) == stores(model)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    loaded(ids).sum().backward()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_file_holds_the_bytes_of_the_report_once(kind: str, tmp_path: Path) -> None:
    model, report = _made(kind)
    save(model, tmp_path / "m.safetensors")
    names = ("user", "first", "item", "tags", "tiny")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert not any(key.startswith("user_again") for key in tensors)
    tables = [t.nbytes for key, t in tensors.items() if key.split(".")[0] in names]
    assert sum(tables) == report.bytes_after
    others = sum(p.nbytes for m in (model.norm, model.out) for p in m.state_dict().values())
    assert sum(t.nbytes for t in tensors.values()) == report.bytes_after + others + 8 + 4
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size < sum(t.nbytes for t in tensors.values()) + 8000


def test_nothing_is_unpickled(
    saved: tuple[Rich, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    save(saved[0], tmp_path / "m.safetensors")
    load(Rich(), tmp_path / "m.safetensors")


def test_flags_of_tables_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def build() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "frozen": nn.Embedding(900, 8).requires_grad_(False),
                "free": nn.Embedding(900, 8),
                "sparse": nn.Embedding(900, 8, sparse=True),
                "mean": nn.EmbeddingBag(900, 8, mode="mean", include_last_offset=True),
                "nonzero": nn.Embedding(900, 8, padding_idx=2, _weight=torch.randn(900, 8)),
                "float16": nn.Embedding(900, 8, dtype=torch.float16),
                "float64": nn.Embedding(900, 8, dtype=torch.float64),
            }
        )

    model = build()
    compress(model, None, CONFIGS["explicit"], progress=False)
    save(model, tmp_path / "m.safetensors")
    skeleton = build().requires_grad_(True)
    skeleton["free"].eval()
    load(skeleton, tmp_path / "m.safetensors")
    assert not skeleton["frozen"].codebooks.requires_grad and not skeleton["frozen"].trainable
    assert skeleton["free"].codebooks.requires_grad and skeleton["free"].trainable
    assert skeleton["sparse"].sparse and not skeleton["free"].sparse
    assert skeleton["mean"].mode == "mean" and skeleton["mean"].include_last_offset
    assert not skeleton["nonzero"].zero_padding and skeleton["nonzero"].padding_idx == 2
    # The mode is that of the model, not of the file.
    assert not skeleton["free"].training and skeleton["sparse"].training
    ids = torch.arange(900)
    for name, table in model.items():
        if isinstance(table, CompressedEmbedding):
            out = skeleton[name](ids)
            assert out.dtype is table(ids).dtype and torch.equal(out, table(ids)), name


def test_codebooks_frozen_after_compressing_stay_frozen(tmp_path: Path) -> None:
    model, _ = _made("float32")
    model.user.codebooks.requires_grad_(False)
    save(model, tmp_path / "m.safetensors")
    skeleton = load(Rich(), tmp_path / "m.safetensors")
    assert not skeleton.user.codebooks.requires_grad
    assert skeleton.out.weight.requires_grad


def test_int8_tables_remember_whether_they_were_trainable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(900, 8), "b": nn.Embedding(900, 8)})
    model["a"].requires_grad_(False)
    compress(model, None, CONFIGS["int8"], progress=False)
    save(model, tmp_path / "m.safetensors")
    loaded = load(
        nn.ModuleDict({"a": nn.Embedding(900, 8), "b": nn.Embedding(900, 8)}),
        tmp_path / "m.safetensors",
    )
    assert [loaded[name].trainable for name in "ab"] == [False, True]
    assert not list(loaded.parameters())


def test_a_compressed_model_can_be_loaded_into(saved: tuple[Rich, Path]) -> None:
    model, path = saved
    other, _ = _made("float32")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    load(other, path)
    _assert_same(model, other)
    assert torch.equal(model(IDS), other(IDS))
    different, _ = _made("int8")
    load(different, path)
    _assert_same(model, different)


def test_a_loaded_model_can_be_saved_and_trained_again(
    saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    loaded = load(Rich(), saved[1])
    save(loaded, tmp_path / "again.safetensors")
    again = _header(tmp_path / "again.safetensors")
    assert again[1] == _header(saved[1])[1] and again[0].keys() == _header(saved[1])[0].keys()
    assert _manifest(tmp_path / "again.safetensors") == _manifest(saved[1])
    loaded(IDS).sum().backward()
    assert loaded.user.codebooks.grad is not None
    before = loaded.user.codebooks.detach().clone()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(before, loaded.user.codebooks)
    assert torch.equal(load(Rich(), saved[1]).user.codebooks, before), "the file has changed"


def test_names_are_those_without_torch_compile(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Rich().eval()
    compiled = torch.compile(model, backend="eager")
    dense = compiled(IDS)
    stats = FrequencyStats.from_batches(compiled, [IDS] * 3)
    compress(compiled, stats, CONFIGS["float32"], progress=False)
    assert torch.equal(compiled(IDS), model(IDS)) and not torch.equal(compiled(IDS), dense)
    paths = tmp_path / "compiled.safetensors", tmp_path / "plain.safetensors"
    save(compiled, paths[0])
    save(model, paths[1])
    assert _header(paths[0]) == _header(paths[1])
    other = torch.compile(Rich().eval(), backend="eager")
    assert load(other, paths[0]) is other
    assert torch.equal(other(IDS), model(IDS))
    tensors, manifest = storage.contents(compiled)  # as of a checkpoint of its state_dict
    assert all(key.startswith("_orig_mod.") for key in tensors)
    metadata = {storage.KEY: json.dumps(manifest), "format": "pt"}
    save_file(tensors, paths[0], metadata)
    again = load(torch.compile(Rich().eval(), backend="eager"), paths[0])
    assert torch.equal(again(IDS), model(IDS))
    assert decompress(other) == decompress(model)
    assert torch.equal(other(IDS), compiled(IDS))


def test_overlapping_tensors_and_views_are_saved(tmp_path: Path) -> None:
    model, _ = _made("float32")
    base = torch.arange(12.0)
    model.register_buffer("head", base[:8])
    model.register_buffer("tail", base[4:])
    model.register_buffer("turned", base.view(3, 4).T)
    save(model, tmp_path / "m.safetensors")
    skeleton = Rich()
    for name, shape in (("head", 8), ("tail", 8), ("turned", (4, 3))):
        skeleton.register_buffer(name, torch.zeros(shape))
    load(skeleton, tmp_path / "m.safetensors")
    _assert_same(model, skeleton)


@pytest.mark.parametrize("state", [{1, 2}, {"a": object()}, (1, 2), {1: "a"}, b"x", float("nan")])
def test_extra_state_that_json_cannot_hold_is_refused(state: Any, tmp_path: Path) -> None:
    model, _ = _made("float32")
    model.note = state
    with pytest.raises(ValueError, match="_extra_state.*JSON"):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [None, 1, 0.1, "x", [], {"a": {"b": [True, None, 1e-300]}}])
def test_extra_state_that_json_can_hold_is_kept(state: Any, tmp_path: Path) -> None:
    model, _ = _made("float32")
    model.note = state
    save(model, tmp_path / "m.safetensors")
    assert load(Rich(), tmp_path / "m.safetensors").note == state


def test_extra_state_may_be_a_tensor(tmp_path: Path) -> None:
    model, _ = _made("float32")
    model.note = torch.arange(3)
    save(model, tmp_path / "m.safetensors")
    skeleton = Rich()
    skeleton.note = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(load(skeleton, tmp_path / "m.safetensors").note, torch.arange(3))


# --- writing ------------------------------------------------------------------------------------


def test_an_uncompressed_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no compressed table.*compress\(\)"):
        save(Rich(), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("old", [b"the file before", None])
def test_an_error_while_writing_leaves_the_old_file(
    error: BaseException,
    old: bytes | None,
    saved: tuple[Rich, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "m.safetensors"
    if old:
        path.write_bytes(old)

    def broken(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(storage, "save_file", broken)
    with pytest.raises(type(error)):
        save(saved[0], path)
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old else [])
    assert old is None or path.read_bytes() == old


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of the system")
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model, _ = _made("float32")
    save(model, path)
    old = path.read_bytes()
    script = f"""
import errno, resource
from mec_embed import load, save
from test_storage import Rich
model = load(Rich(), {str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(old) // 2}, resource.RLIM_INFINITY))
try:
    save(model, {str(path)!r})
except OSError as error:
    assert error.errno == errno.EFBIG and error.filename == {str(path)!r}, error
else:
    raise SystemExit("was written")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], env=_environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == old


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model, _ = _made("float32")
    save(model, path)
    old = path.read_bytes()
    script = f"""
import os, signal
from mec_embed import load, storage
from test_storage import Rich
model = load(Rich(), {str(path)!r})
whole = storage.save_file
def half(tensors, name, metadata):
    whole(tensors, name, metadata)
    os.truncate(name, os.path.getsize(name) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
storage.save_file = half
storage.save(model, {str(path)!r})
"""
    run = subprocess.run(
        [sys.executable, "-c", script], env=_environment(), capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert path.read_bytes() == old
    load(Rich(), path)


def test_saving_replaces_and_follows_the_umask(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    mask = os.umask(0o027)
    try:
        save(saved[0], str(path))
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
    assert _manifest(path) == _manifest(saved[1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_saving_into_no_folder_is_an_os_error(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder to save in; make it") as caught:
        save(saved[0], tmp_path / "nowhere" / "m.safetensors")
    assert caught.value.filename == str(tmp_path / "nowhere")


def test_a_name_that_could_not_be_opened_again_is_refused(saved: tuple[Rich, Path]) -> None:
    with pytest.raises(ValueError, match=r"'\\udcff' is not UTF-8.*choose another name"):
        save(saved[0], "\udcff")  # as Python reads a name of other bytes


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_never_replaced(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match="is there and no file") as caught:
            save(saved[0], tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and len([*tmp_path.iterdir()]) == 2
    with pytest.raises(FormatError, match="is a folder, expected a file"):
        load(saved[0], tmp_path / "folder")


def test_saving_leaves_the_model_as_it_was(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    before = _Untouched(saved[0])
    save(saved[0], tmp_path / "m.safetensors")
    before.check()


def test_tensors_that_the_file_cannot_hold_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(2000, 8))
    model.register_buffer("graph", torch.eye(5).to_sparse())
    compress(model, None, CompressionConfig(ratio=6, epochs=0), progress=False)
    with pytest.raises(ValueError, match="'graph' is a tensor of the layout torch.sparse_coo"):
        save(model, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_an_optimizer_follows_a_second_load_once(tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Embedding(3000, 8) for _ in range(3)))

    model = made()
    compress(model, None, CompressionConfig(ratio=20, epochs=0), progress=False)
    assert model[0].codebook_set is model[1].codebook_set
    save(model, tmp_path / "model.safetensors")
    again = made()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    for _ in range(2):
        load(again, tmp_path / "model.safetensors", optimizer=optimizer)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in again.parameters())


def test_conjugated_tensors_keep_their_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(2000, 8))
    value = torch.tensor([1 + 2j, 3 - 1j])
    model.register_buffer("phase", value.conj())
    model.register_buffer("value", value)
    compress(model, None, CompressionConfig(ratio=6, epochs=0), progress=False)
    save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Embedding(2000, 8))
    for name in ("phase", "value"):
        fresh.register_buffer(name, torch.zeros(2, dtype=torch.complex64))
    load(fresh, tmp_path / "model.safetensors")
    assert fresh.phase.tolist() == [1 - 2j, 3 + 1j] and torch.equal(fresh.value, value)


# --- models that do not fit ---------------------------------------------------------------------


class Scaled(nn.Embedding):
    """What codes do not do."""

    def forward(self, ids: Tensor) -> Tensor:
        """Rows times 10."""
        return super().forward(ids) * 10


def _changed(change: Any) -> nn.Module:
    model = Rich()
    change(model)
    return model


MISFITS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "other rows": (
        lambda m: setattr(m, "item", nn.Embedding(501, 8, padding_idx=0)),
        ("'item'", "num_embeddings=500", "501"),
    ),
    "other dim": (
        lambda m: setattr(m, "item", nn.Embedding(500, 9, padding_idx=0)),
        ("'item'", "embedding_dim=8", "9"),
    ),
    "other padding": (
        lambda m: setattr(m, "item", nn.Embedding(500, 8, padding_idx=3)),
        ("'item'", "padding_idx=0", "3"),
    ),
    "no padding": (
        lambda m: setattr(m, "item", nn.Embedding(500, 8)),
        ("'item'", "padding_idx=0", "None"),
    ),
    "no bag": (
        lambda m: setattr(m, "tags", nn.Embedding(400, 8)),
        ("'tags'", "CompressedEmbeddingBag", "Embedding"),
    ),
    "a bag": (
        lambda m: setattr(m, "item", nn.EmbeddingBag(500, 8, padding_idx=0)),
        ("'item'", "EmbeddingBag"),
    ),
    "another mode": (
        lambda m: setattr(m, "tags", nn.EmbeddingBag(400, 8, mode="mean")),
        ("'tags'", "mode=sum", "mean"),
    ),
    "another last offset": (
        lambda m: setattr(m, "tags", nn.EmbeddingBag(400, 8, mode="sum", include_last_offset=True)),
        ("'tags'", "include_last_offset=False", "True"),
    ),
    "a subclass": (
        lambda m: setattr(m, "item", Scaled(500, 8, padding_idx=0)),
        ("'item'", "is a subclass of an embedding (Scaled)", "--exclude"),
    ),
    "max_norm": (
        lambda m: setattr(m, "item", nn.Embedding(500, 8, padding_idx=0, max_norm=1.0)),
        ("'item'", "max_norm changes its rows"),
    ),
    "held elsewhere": (
        lambda m: setattr(m, "tables", [m.item]),
        ("'item'", "the attribute 'tables' holds it too"),
    ),
    "missing table": (lambda m: delattr(m, "item"), ("'item'",)),
    "new table": (lambda m: setattr(m, "more", nn.Embedding(5, 2)), ("more.weight",)),
    "not shared": (
        lambda m: setattr(m, "user_again", nn.Embedding(600, 8)),
        ("'user'", "user_again"),
    ),
    "shared more": (lambda m: setattr(m, "third", m.user), ("'user'", "third")),
    "no embedding": (
        lambda m: [delattr(m, n) for n in ("user", "user_again", "first", "item", "tags", "tiny")],
        ("no embedding",),
    ),
    "a linear instead": (lambda m: setattr(m, "item", nn.Linear(8, 500)), ("'item'",)),
    "other network": (
        lambda m: setattr(m, "out", nn.Linear(8, 3)),
        ("out.weight", "(2, 8)", "(3, 8)"),
    ),
    "no batch norm": (lambda m: setattr(m, "norm", nn.Identity()), ("norm.bias",)),
    "half network": (lambda m: m.out.half(), ("out.", "float16")),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_not_touched(name: str, saved: tuple[Rich, Path]) -> None:
    change, words = MISFITS[name]
    _assert_refused(_changed(change), saved[1], *words)


def test_other_names_are_named(saved: tuple[Rich, Path]) -> None:
    _assert_refused(nn.ModuleDict({"rich": Rich()}), saved[1], "'user'", "rich.user")


@pytest.mark.parametrize("bad", [3, nn.Embedding(600, 8), "x"])
def test_what_is_no_model_is_refused(bad: Any, saved: tuple[Rich, Path]) -> None:
    with pytest.raises((TypeError, ValueError), match="model"):
        load(bad, saved[1])


# --- files that are damaged ---------------------------------------------------------------------


def test_no_file(tmp_path: Path) -> None:
    before = _Untouched(Rich())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(before.model, tmp_path / "nowhere")
    before.check()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is a folder, expected a file"):
        load(Rich(), tmp_path)


def test_tables_need_no_memory_before_they_are_loaded(saved: tuple[Rich, Path]) -> None:
    with torch.device("meta"):
        model = Rich()
    with pytest.raises(ValueError, match="is on the meta device and can take no value"):
        load(model, saved[1])
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module is model.tiny:
            module.to_empty(device="cpu", recurse=False)
    with torch.device("meta"):
        model.norm.register_buffer("unsaved", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match="'norm.unsaved' of .* and set it: it is no part of the f"):
        load(model, saved[1])
    del model.norm.unsaved
    load(model, saved[1])
    loaded, expected = model.state_dict(), saved[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded if key != "_extra_state")


def test_a_model_that_was_built_in_inference_mode(saved: tuple[Rich, Path]) -> None:
    with torch.inference_mode():
        model = load(Rich(), saved[1])
        rows = model.item(torch.arange(500))
    assert torch.equal(rows, saved[0].item.weight)
    assert torch.equal(model.norm.running_mean, saved[0].norm.running_mean)


@pytest.mark.parametrize("call", [decompress, load])
def test_an_optimizer_of_another_model_is_refused(call: Any, saved: tuple[Rich, Path]) -> None:
    model = saved[0] if call is decompress else Rich()
    before, other = _Untouched(model), torch.optim.Adam(Rich().parameters())
    with pytest.raises(ValueError, match="Adam holds .* parameters, none of them of the model"):
        call(model, *([] if call is decompress else [saved[1]]), optimizer=other)
    before.check()


def test_truncated_files(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    raw, path, model = saved[1].read_bytes(), tmp_path / "m.safetensors", Rich()
    before = _Untouched(model)
    lengths = {0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1, *range(200, len(raw), 997)}
    for length in sorted(lengths):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"m\.safetensors"):
            load(model, path)
    before.check()
    path.write_bytes(raw + b"\0")
    _assert_refused(model, path)


def test_flipped_bytes_in_the_header(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    raw, path = saved[1].read_bytes(), tmp_path / "m.safetensors"
    (length,) = struct.unpack("<Q", raw[:8])
    model, accepted, tried = Rich(), 0, 0
    before = _Untouched(model)
    for place in [*range(12), *range(12, 8 + length, 23)]:
        for flip in (0x01, 0x80):
            damaged = bytearray(raw)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            tried += 1
            try:
                load(model, path)
            except FormatError:
                before.check()
            else:
                # Some bytes mean nothing, such as the "format" entry; the model must work.
                accepted += 1
                model(IDS)
                model = Rich()
                before = _Untouched(model)
    assert accepted < 0.15 * tried


@pytest.mark.parametrize(
    "content",
    [b"", b"not a safetensors file", b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, b"\0" * 64],
)
def test_not_a_safetensors_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    _assert_refused(Rich(), path, "safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_safetensors_file_without_a_manifest(metadata: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.zeros(3)}, path, metadata)
    _assert_refused(Rich(), path, "without a mec_embed manifest")


@pytest.mark.parametrize("version", [3, 10**6, 0, -1, "1", None, 1.0, [1]])
def test_other_versions(version: Any, saved: tuple[Rich, Path], tmp_path: Path) -> None:
    manifest = {**_manifest(saved[1]), "version": version}
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    newer = isinstance(version, int) and version > storage.FORMAT_VERSION
    _assert_refused(Rich(), path, "version", *(["upgrade"] if newer else []))


def test_a_file_without_tiers_is_of_the_first_version(
    saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    """So that older versions of mec_embed read it; the second version reads the same."""
    manifest = _manifest(saved[1])
    assert manifest["version"] == 1
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", {**manifest, "version": 2})
    _assert_same(load(Rich(), path), saved[0])


def test_an_entry_is_ignored_that_a_reader_does_not_need(
    saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = {**_manifest(saved[1]), "comment": "hello"}
    load(Rich(), _with_manifest(saved[1], tmp_path / "m.safetensors", manifest))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"x"', "{}", '{"version": 1}', "[" * 100_000]
)
def test_manifests_that_are_no_manifests(
    text: str, saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", text)
    _assert_refused(Rich(), path, "manifest")


@pytest.mark.parametrize("value", [10**9, 10**15, 2**63 - 1, 2**63, 10**30, -1, 0, 1.5, "x", None])
@pytest.mark.parametrize(
    "name", ["num_embeddings", "embedding_dim", "num_subvectors", "codebook_size"]
)
def test_sizes_that_lie_cost_nothing(
    name: str, value: Any, saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved[1])
    manifest["tables"][0]["layout"][name] = value
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Rich(), path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("names", []),
        ("names", ["user"]),
        ("names", "user"),
        ("names", [3]),
        ("names", {"user": 1}),
        ("module", "Linear"),
        ("module", None),
        ("module", ["CompressedEmbedding"]),
        ("layout", None),
        ("layout", {}),
        ("codebook_dtype", "complex64"),
        ("codebook_dtype", "int8"),
        ("codebook_dtype", 3),
        ("dtype", "int8"),
        ("dtype", "float99"),
        ("dtype", None),
        ("padding_idx", 3),
        ("padding_idx", "0"),
        ("sparse", "no"),
        ("zero_padding", []),
        ("trainable", "yes"),
        ("requires_grad", "yes"),
        ("codes_of", 5),
        ("codes_of", -1),
        ("codes_of", None),
        ("codebooks_of", 1),
        ("codebooks_of", "0"),
    ],
)
def test_entries_of_a_wrong_type_or_value(
    name: str, value: Any, saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved[1])
    manifest["tables"][0][name] = value
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Rich(), path)


@pytest.mark.parametrize("name", ["mode", "include_last_offset"])
@pytest.mark.parametrize("value", ["most", None, 7, [1]])
def test_bag_options_of_a_wrong_type_or_value(
    name: str, value: Any, saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved[1])
    (entry,) = (e for e in manifest["tables"] if e["module"] == "CompressedEmbeddingBag")
    entry[name] = value
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Rich(), path)


@pytest.mark.parametrize(
    "change",
    [
        {"tables": {}},
        {"tables": [3]},
        {"tables": []},
        {"tables": [None]},
        {"shared": []},
        {"shared": {"x": "y"}},
        {"shared": {"x": ["out.weight"]}},
        {"shared": {"x": {}}},
        {"shared": {"out.weight": "out.bias"}},
        {"shared": {}},
        {"extra": []},
        {"extra": {}},
        {"extra": {"more": 3}},
        {"extra": {"_extra_state": 1, "out.weight": 3}},
        {"extra": {"_extra_state": 1, "user.codebook_set.codebooks": "x"}},
    ],
    ids=str,
)
def test_parts_of_the_manifest_that_lie(
    change: dict[str, Any], saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = {**_manifest(saved[1]), **change}
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Rich(), path)


def test_a_table_named_twice(saved: tuple[Rich, Path], tmp_path: Path) -> None:
    manifest = _manifest(saved[1])
    manifest["tables"].append(copy.deepcopy(manifest["tables"][0]))
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Rich(), path)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inside:
        found.append((*at, key))
        if isinstance(child, (dict, list)):
            found += _paths(child, (*at, key))
    return found


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float16", "int8", "additive", "product", "rows", "user", "sum"]),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), delete=st.booleans(), value=junk)
def test_any_change_of_the_manifest_is_refused_or_harmless(
    data: st.DataObject, delete: bool, value: Any, saved: tuple[Rich, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved[1])
    *way, last = data.draw(st.sampled_from(_paths(manifest)))
    place: Any = manifest
    for key in way:
        place = place[key]
    if delete:
        del place[last]
    else:
        place[last] = value
    path = _with_manifest(saved[1], tmp_path / "m.safetensors", manifest)
    model = Rich()
    before = _Untouched(model)
    try:
        load(model, path)
    except FormatError:
        before.check()
    else:
        assert model.eval()(IDS).shape == (60, 2)


# --- tables in tiers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_tiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, Path]:
    """A model in tiers, with runs and bitmaps, and its file; not to be changed."""
    model = shop()[1]
    path = tmp_path_factory.mktemp("tiers") / "model.safetensors"
    save(model, path)
    return model, path


@pytest.mark.parametrize(("dtype", "ratio"), [(None, 40), (None, 20), ("int8", 40), ("int8", 30)])
def test_round_trip_of_tiers(dtype: str | None, ratio: float, tmp_path: Path) -> None:
    _, model, report = shop(dtype, ratio)
    path = tmp_path / "m.safetensors"
    save(model, path)
    assert _manifest(path)["version"] == 2
    loaded = load(Shop(), path)
    assert torch.equal(loaded(shop_ids()), model(shop_ids()))
    _assert_same(model, loaded)
    again = Shop()
    load(again, path)
    again.load_state_dict(model.state_dict(), strict=True)
    assert loaded.again is loaded.shuffled
    for name in ("shuffled", "first", "sorted", "tags", "small"):
        assert repr(getattr(loaded, name)) == repr(getattr(model, name))
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tables = [t.nbytes for key, t in tensors.items() if not key.startswith("out.")]
    assert sum(tables) == report.bytes_after
    save(loaded, tmp_path / "again.safetensors")
    assert _manifest(tmp_path / "again.safetensors") == _manifest(path)


def test_tiers_share_what_they_shared_before_saving(saved_tiers: tuple[Shop, Path]) -> None:
    model, loaded = saved_tiers[0], load(Shop(), saved_tiers[1])
    for one in (model, loaded):
        assert one.first.tier_map is one.shuffled.tier_map is not one.sorted.tier_map
        assert one.first.head.code_table is one.shuffled.head.code_table
        assert one.sorted.head.codebook_set is one.tags.head.codebook_set
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    loaded(shop_ids()).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_tiers_can_be_loaded_into_other_tiers(saved_tiers: tuple[Shop, Path]) -> None:
    model, path = saved_tiers
    for other in (shop()[1], shop("int8", 30)[1]):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        other.out.load_state_dict(model.out.state_dict())
        assert torch.equal(load(other, path)(shop_ids()), model(shop_ids()))


@pytest.mark.parametrize("key", ["sorted.tier_map.before", "shuffled.tier_map.bitmap"])
def test_a_map_that_leads_nowhere_is_refused(
    key: str, saved_tiers: tuple[Shop, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    with safe_open(saved_tiers[1], framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors[key][-1] ^= 1
    save_file(tensors, path, metadata)
    _assert_refused(Shop(), path, key.partition(".")[0], "damaged", "popular rows")


def _tiers(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    (entry,) = (entry for entry in manifest["tables"] if name in entry["names"])
    return entry


@pytest.mark.parametrize("table", ["shuffled", "sorted", "tags", "first"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 4001),
        ("rows", 1499),
        ("rows", 1),
        ("rows", -1),
        ("rows", 2**62),
        ("rows", 10**30),
        ("rows", "4000"),
        ("runs", 0),
        ("runs", 1),
        ("runs", 3),
        ("runs", 17),
        ("runs", -2),
        ("runs", 10**12),
        ("runs", True),
        ("runs", "2"),
        ("map_of", -1),
        ("map_of", 99),
        ("map_of", None),
        ("tiers", None),
        ("tiers", []),
        ("tiers", [{}, {}]),
        ("tiers", [None, None]),
        ("padding_idx", 2),
        ("module", "CompressedEmbedding"),
        ("module", "TieredLinear"),
    ],
)
def test_maps_that_lie(
    table: str, key: str, value: Any, saved_tiers: tuple[Shop, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved_tiers[1])
    _tiers(manifest, table)[key] = value
    path = _with_manifest(saved_tiers[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Shop(), path)


def _one_more(entry: dict[str, Any]) -> None:
    entry["tiers"][0]["layout"]["num_embeddings"] += 1


def _moved(entry: dict[str, Any]) -> None:
    entry["tiers"][0]["layout"]["num_embeddings"] += 100
    entry["tiers"][1]["layout"]["num_embeddings"] -= 100


def _wider(entry: dict[str, Any]) -> None:
    entry["tiers"][1]["layout"]["embedding_dim"] += 1


TIER_CHANGES: dict[str, Any] = {
    "one more row": _one_more,
    "rows of the other tier": _moved,
    "another dim": _wider,
    "turned": lambda entry: entry["tiers"].reverse(),
    "one tier": lambda entry: entry["tiers"].pop(),
    "three tiers": lambda entry: entry["tiers"].append(entry["tiers"][0]),
    "later codes": lambda entry: entry["tiers"][0].update(codes_of=99),
    "negative codebooks": lambda entry: entry["tiers"][1].update(codebooks_of=-1),
    "no layout": lambda entry: entry["tiers"][1].pop("layout"),
    "a bitmap": lambda entry: entry.update(runs=None),
    "no map": lambda entry: entry.pop("map_of"),
}


@pytest.mark.parametrize("name", TIER_CHANGES)
def test_tiers_that_do_not_make_up_the_table(
    name: str, saved_tiers: tuple[Shop, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved_tiers[1])
    TIER_CHANGES[name](_tiers(manifest, "sorted"))
    path = _with_manifest(saved_tiers[1], tmp_path / "m.safetensors", manifest)
    _assert_refused(Shop(), path)


def test_tables_that_share_codes_must_be_alike(
    saved_tiers: tuple[Shop, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved_tiers[1])
    tail = _tiers(manifest, "first")["tiers"][1]
    assert tail["layout"]["kind"] == "shared"
    tail["layout"]["kind"] = "additive"  # its codes are those of "shuffled", which has none
    _assert_refused(Shop(), _with_manifest(saved_tiers[1], tmp_path / "m.safetensors", manifest))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), delete=st.booleans(), value=junk)
def test_any_change_of_a_manifest_with_tiers_is_refused_or_harmless(
    data: st.DataObject, delete: bool, value: Any, saved_tiers: tuple[Shop, Path], tmp_path: Path
) -> None:
    manifest = _manifest(saved_tiers[1])
    *way, last = data.draw(st.sampled_from(_paths(manifest["tables"])))
    place: Any = manifest["tables"]
    for key in way:
        place = place[key]
    if delete:
        del place[last]
    else:
        place[last] = value
    path = _with_manifest(saved_tiers[1], tmp_path / "m.safetensors", manifest)
    model = Shop()
    before = _Untouched(model)
    try:
        load(model, path)
    except FormatError:
        before.check()
    else:
        assert model(shop_ids()).shape == (200,)


def test_the_row_of_unknown_ids_is_kept(saved_tiers: tuple[Shop, Path], tmp_path: Path) -> None:
    model = copy.deepcopy(saved_tiers[0])
    assert all("oov_row" not in entry for entry in _manifest(saved_tiers[1])["tables"])
    model.sorted.oov_row = np.int64(4)
    save(model, tmp_path / "m.safetensors")
    again = load(Shop(), tmp_path / "m.safetensors")
    assert (again.sorted.oov_row, again.shuffled.oov_row) == (4, None)
    manifest = _manifest(tmp_path / "m.safetensors")
    next(e for e in manifest["tables"] if "sorted" in e["names"])["oov_row"] = 10**9
    path = _with_manifest(tmp_path / "m.safetensors", tmp_path / "n.safetensors", manifest)
    _assert_refused(Shop(), path)
