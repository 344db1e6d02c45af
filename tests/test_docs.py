"""Every block of code in the README and in docs/ runs, but for those that are marked.

Blocks of a page run in their order, in one namespace and a folder of their own. A comment before a
block, which pages do not show, says what it needs:

- ``<!-- set-up: NAME -->``: start anew with the names that a function of ``SET_UPS`` gives;
- ``<!-- goes on from: PAGE -->``: start anew with what the blocks of another page leave;
- ``<!-- slow: REASON -->``: goes on, in a test that is marked as slow;
- ``<!-- not run: REASON -->``: this block cannot run here. ``NOT_RUN`` counts them.

Set-ups of ``ON_RANKS`` start anew in two processes, by torchrun, which runs this file.
"""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click_model import ClickModel
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import mec_embed
from mec_embed.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Blocks of each page that are marked as not run. `pip install` would change the environment that
#: the tests run in (both pages), and `make demo` and `make test` (README.md) would create another
#: and run these tests in it; that what they name exists is tested.
NOT_RUN = {"README.md": 2, "docs/index.md": 1}
#: Optional packages that a page uses.
NEEDS = {
    "README.md": ("matplotlib",),
    "docs/choosing-a-ratio.md": ("matplotlib",),
    "docs/serving.md": ("onnxscript", "onnxruntime"),
    "docs/scale.md": ("pyarrow",),
}
RUN = ("python", "sh")
#: Blocks in other languages: settings, formats, text.
OTHER = ("json", "diff", "")

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>set-up|goes on from|slow|not run): (?P<what>[^\n]+?) -->\n)?"
    r"^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of code: where it is, and the comment before it."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    what: str | None

    def run(self, names: dict[str, Any]) -> None:
        """Run it; what it defines goes into ``names``."""
        if self.language == "python":
            # Empty lines before it: an error then names the line of the page.
            exec(compile("\n" * self.line + self.code, self.page, "exec"), names)
            return
        for line in self.code.splitlines():
            command = shlex.split(line, comments=True)
            if command:
                assert command[0] == "mec-embed", f"{self}: only mec-embed is run"
                assert main([*command[1:], "--quiet"]) == 0, line

    @property
    def page_name(self) -> str:
        """Such as ``docs/index.md``."""
        return self.page.relative_to(ROOT).as_posix()

    def __str__(self) -> str:
        """Page and line."""
        return f"{self.page_name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        language, code = found["language"], found["code"]
        yield Block(page, line, language, code, found["mark"], found["what"])


def runs_of(page: Path) -> list[list[Block]]:
    """Blocks that run one after the other, each list in a namespace of its own."""
    runs: list[list[Block]] = []
    for block in blocks_of(page):
        if block.language in RUN and block.mark != "not run":
            if block.mark in ("set-up", "goes on from") or not runs:
                runs.append([])
            runs[-1].append(block)
    return runs


ALL = [block for page in PAGES for block in blocks_of(page)]
RUNS = [run for page in PAGES for run in runs_of(page)]
MARKED = [block for block in ALL if block.mark == "not run"]


# --- set-ups ------------------------------------------------------------------------------------


def _clicks() -> dict[str, Any]:
    """A small model in training, and what a script imports."""
    torch.manual_seed(0)
    model = ClickModel()
    ids = torch.stack([(rows * torch.rand(4000) ** 3).long() for rows in (3000, 800)], 1)
    batches = list(zip(ids.split(500), (ids.sum(1) % 3 == 0).float().split(500), strict=True))
    stats = mec_embed.FrequencyStats.from_batches(model, batches)
    names = {name: getattr(mec_embed, name) for name in mec_embed.__all__}
    names |= {"copy": __import__("copy"), "model": model, "stats": stats, "train_batches": batches}
    return names | {
        "optimizer": torch.optim.Adam(model.parameters()),
        "build_model": ClickModel,
    }


def _checkpoint() -> dict[str, Any]:
    """The files of the command line."""
    torch.manual_seed(0)
    save_file({"embedding.user.weight": torch.randn(4000, 16)}, "checkpoint.safetensors")
    np.savez("counts.npz", user=np.arange(4000.0)[::-1])
    return {}


def _fuxictr() -> dict[str, Any]:
    pytest.importorskip("fuxictr")
    import fuxictr_zoo as zoo

    from mec_embed.integrations import fuxictr

    loader = zoo.loader("DeepFM", Path())
    names = {"model": zoo.build("DeepFM", Path()), "train_gen": loader, "valid_gen": loader}
    return names | {"fuxictr": fuxictr}


def _deepctr() -> dict[str, Any]:
    pytest.importorskip("deepctr_torch")
    import deepctr_zoo as zoo

    return {"model": zoo.build("DeepFM", Path()), "x_train": zoo.inputs("DeepFM")[0]}


def _rechub() -> dict[str, Any]:
    pytest.importorskip("torch_rechub")
    import rechub_zoo as zoo

    model = zoo.build("DeepFM", Path())
    trainer = zoo.trainer(model, "DeepFM", Path())
    return {"model": model, "train_loader": zoo.loader("DeepFM"), "trainer": trainer}


def _torchrec() -> dict[str, Any]:
    pytest.importorskip("torchrec")
    import torchrec_zoo as zoo

    model = zoo.build("DLRM", Path())
    return {"model": model, "batches": zoo.batches("DLRM"), "optimizer": zoo.optimizer(model)}


def _parts() -> dict[str, Any]:
    """Each rank has some of the batches."""
    names = _clicks()
    return names | {"part_of_this_rank": names["train_batches"][int(os.environ["RANK"]) :: 2]}


def _compressed() -> dict[str, Any]:
    names = _clicks()
    mec_embed.compress(names["model"], names["stats"], progress=False)
    dist.init_process_group("gloo")
    return names | {"dist": dist}


def _fully_sharded() -> dict[str, Any]:
    names = _clicks()
    dist.init_process_group("gloo")
    fully_shard(names["model"])
    names["sharded"] = names.pop("model")
    return names | {"dist": dist, "fully_shard": fully_shard, "nn": nn, "torch": torch}


ON_RANKS: dict[str, Callable[[], dict[str, Any]]] = {
    "parts of ranks": _parts,
    "compressed on ranks": _compressed,
    "fully sharded": _fully_sharded,
}
SET_UPS: dict[str, Callable[[], dict[str, Any]]] = {
    **ON_RANKS,
    "clicks": _clicks,
    "checkpoint": _checkpoint,
    "fuxictr": _fuxictr,
    "deepctr": _deepctr,
    "rechub": _rechub,
    "torchrec": _torchrec,
}


def names_for(block: Block) -> dict[str, Any]:
    """The namespace that a run starts with."""
    names: dict[str, Any] = {"__name__": "docs"}
    if block.mark == "set-up":
        return names | SET_UPS[str(block.what)]()
    if block.mark == "goes on from":
        for before in runs_of(block.page.parent / str(block.what))[0]:
            before.run(names)
    return names


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here"
)


# --- tests --------------------------------------------------------------------------------------


def run_blocks(run: list[Block]) -> None:
    """In the current folder."""
    names = names_for(run[0])
    for block in run:
        block.run(names)


def run_on_ranks(run: list[Block], folder: Path) -> None:
    """In two processes, as torchrun starts them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(Path(__file__).resolve()), str(RUNS.index(run))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def run_as_rank(number: int) -> None:
    """What one of these processes does; the end is that of ``processes.run``."""
    run_blocks(RUNS[number])
    dist.barrier()
    os._exit(0)


def kinds_of(run: list[Block]) -> Iterator[Any]:
    """A run without its slow blocks, and one with them; on ranks all are slow."""
    quick = [block for block in run if block.mark != "slow"]
    on_ranks = run[0].mark == "set-up" and run[0].what in ON_RANKS
    yield pytest.param(quick, id=str(run[0]), marks=[pytest.mark.slow] * on_ranks)
    if quick != run:
        yield pytest.param(run, id=f"{run[0]} whole", marks=[pytest.mark.slow, needs_compiler])


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.parametrize("run", [kind for run in RUNS for kind in kinds_of(run)])
def test_blocks_run(run: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(run[0].page_name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests" / "integrations")
    if run[0].mark == "set-up" and run[0].what in ON_RANKS:
        run_on_ranks(run, tmp_path)
    else:
        run_blocks(run)


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_marked_blocks_name_what_exists(block: Block) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.code.splitlines():
        program, what, *rest = shlex.split(line, comments=True)
        if program == "make":
            assert not rest and re.search(rf"^{what}:", makefile, re.MULTILINE), line
        else:
            assert (program, what) == ("pip", "install"), line
            extra = re.fullmatch(r"mec-embed\[(\w+)\]", rest[0])
            assert extra and re.search(rf"^{extra[1]} = \[", project, re.MULTILINE), line


def test_no_block_is_left_out() -> None:
    """Counts of marked blocks; every fence is found, and in a language that is known."""
    marked = [block.page_name for block in MARKED]
    assert {page: marked.count(page) for page in marked} == NOT_RUN
    assert {block.language for block in ALL} <= {*RUN, *OTHER}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(blocks_of(page))
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found)
        marks = re.findall("<!-- (?:set-up|goes on from|slow|not run)", text)
        assert len(marks) == sum(block.mark is not None for block in found)


def test_examples_of_docstrings_run() -> None:
    """But for those that are marked to be skipped, as they need a trained model or files."""
    tried = 0
    for found in pkgutil.walk_packages(mec_embed.__path__, "mec_embed."):
        if found.name.rpartition(".")[2] in ("__main__", "_native", "gpu", "gpu_search"):
            continue  # the last two need Triton
        result = doctest.testmod(importlib.import_module(found.name))
        assert not result.failed, found.name
        tried += result.attempted
    assert tried > 20


def test_json_blocks_are_json() -> None:
    for block in ALL:
        if block.language == "json":
            json.loads(block.code)


def test_errors_name_the_line_of_the_page() -> None:
    block = Block(ROOT / "docs" / "index.md", 10, "python", "x = 1\n1 / 0\n", None, None)
    with pytest.raises(ZeroDivisionError) as error:
        block.run({})
    last = error.traceback[-1]
    assert str(last.path).endswith("index.md") and last.lineno == 11


def test_pages_are_in_the_site() -> None:
    """Every page of docs/ is in the navigation, and pictures and links of the README exist."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert re.search(rf": {re.escape(page.name)}$", site, re.MULTILINE), page.name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", readme):
        assert target.startswith("https://") or (ROOT / target).exists(), target


if __name__ == "__main__":
    run_as_rank(int(sys.argv[1]))
