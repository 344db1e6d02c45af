"""Whole compressed models in the ways that models are served: same predictions as in PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from random_tables import filled
from tier_model import ids as shop_ids
from tier_model import shop
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from examples.ctr.models import DeepFM
from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressionConfig,
    TieredEmbedding,
    TieredEmbeddingBag,
    compress,
    export,
)
from mec_embed.export import decompose
from mec_embed.ops import bag, lookup
from mec_embed.tiers import TierMap

BATCHES = (64, 5, 2, 300)
#: Of predictions, not only of logits.
CLOSE = {"rtol": 0, "atol": 1e-5}
ROWS = {"user": 3000, "item": 2000, "shop": 600}

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


class Bags(nn.Module):
    """Bags of ids with offsets, of fixed length and with weights; as sums, means and maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(900, 8, mode="sum", padding_idx=0)
        self.tags = nn.EmbeddingBag(800, 8, mode="mean", padding_idx=3)
        self.words = nn.EmbeddingBag(700, 8, mode="sum")
        self.best = nn.EmbeddingBag(600, 8, mode="max")
        self.small = nn.EmbeddingBag(5, 8, mode="mean")  # stays as it is
        self.out = nn.Linear(8, 1)

    def forward(self, tags: Tensor, weights: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Probabilities (batch,) of tags and weights (batch, 4), ids (n,) and offsets (batch,)."""
        x = self.tags(tags) + self.tags(ids % 800, offsets) + self.history(ids, offsets)
        x = x + self.words(tags % 700, per_sample_weights=weights) + self.small(ids % 5, offsets)
        return self.out(x + self.best(ids % 600, offsets))[:, 0].sigmoid()


class Predictor(nn.Module):
    """DeepFM up to probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DeepFM(list(ROWS), list(ROWS.values()), 16, (32,))

    def forward(self, ids: Tensor) -> Tensor:
        """Probabilities (batch,) of ids (batch, fields)."""
        return self.model(ids).sigmoid()


def _deepfm(dtype: str | None) -> Predictor:
    """Tiers by bitmap (users), by runs (items), and a table without tiers."""
    model = Predictor()
    for table in [*model.model.embeddings.values(), *model.model.first_order.values()]:
        nn.init.normal_(table.weight)  # as after training, to be seen in the predictions
    zipf = {name: (1e6 / np.arange(1, n + 1) ** 1.6).astype(np.int64) for name, n in ROWS.items()}
    zipf["user"] = np.random.default_rng(0).permutation(zipf["user"])
    zipf["shop"][:] = 100
    kinds = ("embeddings", "first_order")
    counts = {f"model.{kind}.{name}": zipf[name] for kind in kinds for name in ROWS}
    # At 40, unpopular rows become one.
    config = CompressionConfig(ratio=40 if dtype else 20, epochs=0, codebook_dtype=dtype)
    compress(model, counts, config, progress=False)
    tables = model.model.embeddings
    assert isinstance(tables["user"], TieredEmbedding) and tables["user"].tier_map.runs is None
    assert isinstance(tables["item"], TieredEmbedding) and tables["item"].tier_map.runs
    assert isinstance(tables["shop"], CompressedEmbedding)
    return model


def _bags(dtype: str | None) -> Bags:
    """Bags, one of them in tiers."""
    model = Bags()
    config = CompressionConfig(ratio=6, epochs=0, codebook_dtype=dtype)
    compress(model, None, config, progress=False)
    assert isinstance(model.tags, CompressedEmbeddingBag) and type(model.small) is nn.EmbeddingBag
    tiers = [filled(CodeLayout("additive", rows, 8, 3, 9)) for rows in (200, 500)]
    popular = torch.randperm(700, generator=torch.Generator().manual_seed(0)) < 200
    model.words = TieredEmbeddingBag(TierMap.of(popular), *tiers, mode="sum")
    return model


@dataclass
class Case:
    """A model, calls of any batch size, and what it was exported to."""

    model: nn.Module
    dynamic: tuple[dict[int, Any], ...]

    def args(self, batch: int) -> tuple[Tensor, ...]:
        """The arguments of a call."""
        generator = torch.Generator().manual_seed(batch)
        if isinstance(self.model, Predictor):
            columns = [torch.randint(n, (batch,), generator=generator) for n in ROWS.values()]
            return (torch.stack(columns, 1),)
        tags = torch.randint(800, (batch, 4), generator=generator)
        lengths = torch.randint(4, (batch,), generator=generator)
        lengths[0] = 0
        ids = torch.randint(900, (int(lengths.sum()) + 3,), generator=generator)
        ids[: len(ids) // 3] = 0  # padding
        offsets = functional.pad(lengths.cumsum(0)[:-1], (1, 0))
        return tags, torch.rand(tags.shape, generator=generator), ids, offsets

    @cached_property
    def exported(self) -> ExportedProgram:
        """With a dynamic batch size, for inference."""
        with torch.no_grad():
            return torch.export.export(self.model, self.args(8), dynamic_shapes=self.dynamic)

    @cached_property
    def plain(self) -> ExportedProgram:
        """Without operators of this package."""
        return decompose(self.exported)

    def check(self, run: Any, batches: tuple[int, ...] = BATCHES) -> None:
        """``run`` predicts what the model does."""
        for batch in batches:
            args = self.args(batch)
            with torch.no_grad():
                torch.testing.assert_close(torch.as_tensor(run(*args)), self.model(*args), **CLOSE)


def _case(name: str) -> Case:
    torch.manual_seed(0)
    kind, dtype = name.split()
    made = {"DeepFM": _deepfm, "bags": _bags}[kind](None if dtype == "float32" else dtype)
    batch = {0: Dim("batch")}
    shapes = (batch,) if kind == "DeepFM" else (batch, batch, {0: Dim("ids")}, batch)
    return Case(made.eval(), shapes)


CASES = ["DeepFM float32", "DeepFM int8", "bags float32", "bags int8"]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """Made once: exports take seconds."""
    return {name: _case(name) for name in CASES}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """One of them."""
    return cases[request.param]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _in_new_process(code: str, folder: Path) -> None:
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]


# --- compiled -----------------------------------------------------------------------------------


def test_what_is_not_exported_is_told() -> None:
    with pytest.raises(TypeError, match=r"got Linear; export the model with torch.export.export"):
        decompose(nn.Linear(2, 2))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(case: Case, backend: str) -> None:
    """One graph serves all batch sizes."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(case.model, fullgraph=True, backend=counter, dynamic=True)
    case.check(compiled, BATCHES[:1])
    compilations = counter.frame_count
    case.check(compiled, BATCHES[1:])
    assert counter.frame_count == compilations


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["bags int8"])
def test_compile_by_inductor(cases: dict[str, Case], name: str) -> None:
    cases[name].check(torch.compile(cases[name].model, fullgraph=True, dynamic=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
def test_trace(case: Case, tmp_path: Path) -> None:
    """Traced with one batch size, saved, loaded, and called with others."""
    with torch.no_grad():
        traced = torch.jit.trace(case.model, case.args(8))
    traced.save(tmp_path / "model.pt")
    case.check(torch.jit.load(tmp_path / "model.pt"))


# --- exported -----------------------------------------------------------------------------------

LOAD_EXPORTED = """
import sys
from pathlib import Path
import torch
import mec_embed  # the operators
for path in Path(sys.argv[1]).glob("*.pt2"):
    run = torch.export.load(path).module()
    calls = torch.load(path.with_suffix(".args"))
    torch.save([run(*args) for args in calls], path.with_suffix(".out"))
"""


def test_export_is_loaded_in_a_new_process(cases: dict[str, Case], tmp_path: Path) -> None:
    for name, case in cases.items():
        assert "mec_embed" in _operators(case.exported)
        torch.export.save(case.exported, tmp_path / f"{name}.pt2")
        torch.save([case.args(batch) for batch in BATCHES], tmp_path / f"{name}.args")
    _in_new_process(LOAD_EXPORTED, tmp_path)
    for name, case in cases.items():
        results = iter(torch.load(tmp_path / f"{name}.out"))
        case.check(lambda *args, results=results: next(results))


def _operators(program: ExportedProgram) -> set[str]:
    """The namespaces of all operators of a program."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {one.namespace for one in targets if isinstance(one, torch._ops.OpOverload)}


def test_decomposed(case: Case) -> None:
    assert _operators(case.plain) == {"aten"}
    case.check(case.plain.module())
    assert "mec_embed" in _operators(case.exported)


LOAD_COMPILED = """
import sys
from pathlib import Path
import torch
sys.modules["mec_embed"] = None  # not needed
for path in Path(sys.argv[1]).glob("*.pt2"):
    run = torch._inductor.aoti_load_package(str(path))
    calls = torch.load(path.with_suffix(".args"))
    torch.save([run(*args) for args in calls], path.with_suffix(".out"))
"""


@needs_compiler
@pytest.mark.slow
def test_ahead_of_time_by_inductor(cases: dict[str, Case], tmp_path: Path) -> None:
    """Compiled to libraries that run where this package is not."""
    compiled = {name: cases[name] for name in ("DeepFM int8", "bags float32")}
    for name, case in compiled.items():
        path = str(tmp_path / f"{name}.pt2")
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(case.plain, package_path=path)
        torch.save([case.args(batch) for batch in BATCHES], tmp_path / f"{name}.args")
    _in_new_process(LOAD_COMPILED, tmp_path)
    for name, case in compiled.items():
        results = iter(torch.load(tmp_path / f"{name}.out"))
        case.check(lambda *args, results=results: next(results))


# --- ONNX ---------------------------------------------------------------------------------------


class Session:
    """An exported program in onnxruntime."""

    def __init__(self, program: ExportedProgram) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        onnx = torch.onnx.export(program, dynamo=True, verbose=False)
        self.model = onnx.model_proto
        self.session = runtime.InferenceSession(self.model.SerializeToString())

    def __call__(self, *args: Tensor) -> np.ndarray:
        """The only output."""
        names = [one.name for one in self.session.get_inputs()]
        inputs = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
        return self.session.run(None, inputs)[0]


@pytest.mark.parametrize("name", CASES)
def test_onnx(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    session = Session(case.plain)
    case.check(session)
    assert {node.domain for node in session.model.graph.node} == {""}
    stored = sum(len(one.raw_data) for one in session.model.graph.initializer)
    held = sum(tensor.nbytes for tensor in case.model.state_dict().values())
    assert stored < held + 8192 * len(ROWS)  # codes and codebooks as they are, some constants


def test_onnx_of_ids_out_of_range() -> None:
    """They give a row or an error; where a row is named for them, its numbers."""
    model = nn.Sequential(filled(CodeLayout("additive", 100, 4, 3, 7)))
    ids = torch.arange(10)
    options = {"dynamic_shapes": ({0: Dim("n")},)}
    session = Session(decompose(torch.export.export(model, (ids,), **options)))
    for wrong in (-1, 100, -(2**40), 2**40):
        try:
            assert session(torch.tensor([wrong])).shape == (1, 4)
        except Exception as error:
            assert "out of data bounds" in str(error) or "indices" in str(error)
    model[0].oov_row = 5
    session = Session(decompose(torch.export.export(model, (ids,), **options)))
    found = session(torch.tensor([-1, 100, -(2**40), 2**40, 3]))
    np.testing.assert_allclose(found, model(torch.tensor([5, 5, 5, 5, 3])).detach(), atol=1e-6)


# --- the decompositions -------------------------------------------------------------------------

IDS = torch.tensor([[0, 60, 7], [7, 33, 1]])


def _tensors(kind: str, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Codes, codebooks, scales and so on, as the operators take them."""
    subvectors, rows = (1, size) if kind == "rows" else (3, 61)
    layout = CodeLayout(kind, rows, 6, subvectors, size, dtype)
    module = filled(layout)
    shape = layout.num_embeddings, layout.embedding_dim, layout.bits
    return module.codes, module.codebooks, module.codebook_set.scales, *shape


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str
)
@pytest.mark.parametrize("kind", ["additive", "product", "rows"])
def test_lookup(kind: str, dtype: torch.dtype) -> None:
    """Codes of any number of bits, and any shape of ids."""
    sizes = [61, 70] if kind == "rows" else [2**bits - bits % 2 for bits in range(1, 17)]
    for size in sizes:
        table = _tensors(kind, size, dtype)
        for ids in (IDS, IDS.int(), IDS[0], IDS[0, 0], IDS[:, :0]):
            for padding_idx, zero in ((-1, False), (7, True), (7, False)):
                options = padding_idx, zero, False, torch.float32, "item"
                found = export._lookup(ids, *table, *options)
                torch.testing.assert_close(found, lookup(ids, *table, *options))


def test_lookup_of_many_rows() -> None:
    """Bits are found far beyond what float32 counts exactly."""
    rows = 2**23 + 11
    layout = CodeLayout("additive", rows, 1, 1, 8)
    codes = torch.randint(256, (layout.code_bytes,), dtype=torch.uint8)
    options = rows, 1, 3, -1, False, False, torch.float32, "item"
    ids = torch.arange(rows - 50, rows)
    args = ids, codes, torch.randn(1, 8, 1), None, *options
    assert torch.equal(export._lookup(*args), lookup(*args))


@pytest.mark.parametrize("popular", ["bitmap", "runs", "end"])
@pytest.mark.parametrize("shape", [(), (0,), (1000,), (20, 50)], ids=str)
def test_tiers(popular: str, shape: tuple[int, ...]) -> None:
    masks = {"bitmap": torch.rand(1000) < 0.3, "runs": torch.arange(1000) < 70}
    tier_map = TierMap.of(masks.get(popular, torch.arange(1000) >= 900))
    size = int(np.prod(shape))
    ids = torch.randperm(1000)[:size].view(shape)
    for one in (ids, ids.int()):
        args = one, tier_map.starts, tier_map.before, tier_map.bitmap, 1000, "item"
        for found, expected in zip(export._tiers(*args), tier_map(one, "item"), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [-1, 7])
@pytest.mark.parametrize("offsets", [None, [0, 0, 2, 2], [0, 4, 6]], ids=str)
def test_bag(mode: str, padding_idx: int, offsets: list[int] | None) -> None:
    """Also empty bags, bags of padding only, and offsets with the number of ids at their end."""
    table = _tensors("additive", 7, torch.int8)
    last = offsets is not None and offsets[-1] == IDS.numel()
    ids, starts = (IDS, None) if offsets is None else (IDS.flatten(), torch.tensor(offsets))
    for weights in (None, torch.rand(ids.shape)) if mode == "sum" else (None,):
        options = padding_idx, mode, last, False, torch.float32, "item"
        args = ids, starts, weights, *table, *options
        torch.testing.assert_close(export._bag(*args), bag(*args))


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("last", [False, True])
def test_embedding_bag(mode: int, padding_idx: int | None, last: bool) -> None:
    """nn.EmbeddingBag itself, which models may hold beside compressed tables."""
    weight = torch.randn(61, 5)
    offsets = torch.tensor([0, 0, 2, 3, IDS.numel()])
    for weights in (None, torch.rand(IDS.numel())) if mode == 0 else (None,):
        args = weight, IDS.flatten(), offsets, False, mode, False, weights, last, padding_idx
        torch.testing.assert_close(export._embedding_bag(*args)[0], torch.embedding_bag(*args)[0])


def test_sums_of_many_bags_keep_their_digits() -> None:
    """As differences of running sums, in float32 they would not."""
    weight = 1000 + torch.randn(100, 2)
    ids = torch.randint(100, (200_000,))
    offsets = torch.arange(0, 200_000, 3)
    args = weight, ids, offsets, False, 0, False, None, False, None
    torch.testing.assert_close(export._embedding_bag(*args)[0], torch.embedding_bag(*args)[0])


# --- known limits -------------------------------------------------------------------------------


def test_export_of_a_bag_in_tiers_with_padding() -> None:
    _, model, _ = shop()
    batch = ({0: Dim("batch")},)
    program = torch.export.export(model.eval(), (shop_ids(8),), dynamic_shapes=batch)
    run = decompose(program).module()
    for size in (8, 50):
        torch.testing.assert_close(run(shop_ids(size)), model(shop_ids(size)), **CLOSE)


def test_export_of_a_bag_with_gradients() -> None:
    """Without torch.no_grad() around it, as one would write it."""
    module = filled(CodeLayout("additive", 50, 4, 2, 8), CompressedEmbeddingBag, mode="sum")
    batch = ({0: Dim("batch")},)
    program = torch.export.export(nn.Sequential(module), (IDS % 50,), dynamic_shapes=batch)
    ids = torch.randint(50, (7, 3))
    torch.testing.assert_close(program.module()(ids), module(ids))
