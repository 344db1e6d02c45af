"""The beam search by a Triton kernel against that in plain torch.

Without a GPU the kernel runs in Triton's interpreter and is compiled for GPUs that are not there.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mec_embed.learning import quantizers
from mec_embed.learning.quantizers import AdditiveQuantizer, ProductQuantizer, _beam_search

triton = pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
import triton.language as tl  # noqa: E402

from mec_embed.learning import gpu_search  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
#: Codebooks, codewords, columns and beam: sizes that are no power of two, fewer codewords than
#: sums, sums of several strings, a code that ends where a string does.
CASES = [
    (8, 32, 64, 16),
    (3, 20, 8, 8),
    (5, 2, 6, 16),
    (2, 2, 6, 8),
    (17, 16, 12, 8),
    (33, 32, 40, 8),
    (2, 300, 9, 16),
    (3, 40, 9, 16),
    (4, 128, 12, 8),
    (3, 512, 12, 16),
]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module, whose kernels are interpreted."""
    spec: Any = importlib.util.spec_from_file_location(
        "mec_embed.learning._interpreted", gpu_search.__file__
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    # The interpreter knows these, and calls any others once for each number.
    monkeypatch.setattr(module, "_least", tl.standard._elementwise_min)
    monkeypatch.setattr(module, "_sum", tl.standard._sum_combine)
    return module


def _case(count: int, size: int, columns: int, rows: int, device: str = "cpu") -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    books = torch.randn(count, size, columns, generator=generator) / count**0.5
    return x.to(device), books.to(device)


def _expected(x: Tensor, books: Tensor, beam: int) -> Tensor:
    words = books.flatten(0, 1)
    return _beam_search(x, books, words @ words.T, beam)


def _errors(x: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    return (x - AdditiveQuantizer().decode(codes, books)).square().sum(1)


@pytest.mark.parametrize(("count", "size", "columns", "beam"), CASES)
def test_codes_are_as_good_as_those_of_plain_torch(
    count: int, size: int, columns: int, beam: int, interpreted: Any
) -> None:
    x, books = _case(count, size, columns, 2 if count > 9 else 5)
    codes = interpreted.search(x, books, beam)
    expected = _expected(x, books, beam)
    torch.testing.assert_close(
        _errors(x, books, codes), _errors(x, books, expected), rtol=1e-5, atol=1e-5
    )
    assert (codes == expected).all(1).float().mean() >= 0.8


def test_rows_in_several_launches(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, books = _case(3, 8, 6, 7)
    monkeypatch.setattr(interpreted, "WORK_BYTES", 12 * 3 * 8 * 2)
    assert torch.equal(interpreted.search(x, books, 8), _expected(x, books, 8))
    assert interpreted.search(x[:0], books, 8).shape == (0, 3)


def test_of_equal_sums_the_first_is_taken(interpreted: Any) -> None:
    books = torch.ones(2, 5, 4)
    assert interpreted.search(torch.randn(3, 4), books, 8).eq(0).all()


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_search.gpu, "INTERPRETED", True)
    monkeypatch.setattr(gpu_search.gpu, "_serves", lambda device: True)
    x, books = _case(4, 32, 8, 3)
    assert gpu_search.takes(x, books, 16) and gpu_search.takes(x, books, 8)
    assert gpu_search.takes(x, torch.zeros(2, 2048, 8), 16)
    assert not gpu_search.takes(x.double(), books.double(), 16)
    assert not gpu_search.takes(x, books, 12)
    assert not gpu_search.takes(x, torch.zeros(2, 4096, 8), 16)
    assert not gpu_search.takes(x, torch.zeros(256, 256, 8), 16)


def test_a_sum_of_one_codeword_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    x, books = _case(1, 40, 8, 50)
    monkeypatch.setattr(quantizers, "_native", lambda x: False)
    nearest = ProductQuantizer().encode(x, books, 1)
    assert torch.equal(AdditiveQuantizer().encode(x, books, 16), nearest)


LAUNCHES = [(8, 32, 16), (8, 32, 8), (32, 64, 16), (8, 256, 16), (4, 512, 16), (11, 20, 16)]


@pytest.mark.parametrize(("count", "size", "beam"), LAUNCHES)
def test_the_kernel_compiles_for_gpus(
    count: int, size: int, beam: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_ops_triton import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list[Any] = []
    monkeypatch.setattr(
        gpu_search.gpu._Launcher,
        "__call__",
        lambda launcher, grid, *arguments: launches.append(
            (launcher.function, arguments, launcher.constants)
        ),
    )
    words = count * size
    codes = torch.zeros(4, count, dtype=torch.int64)
    gpu_search.launch(torch.zeros(4, words), torch.zeros(words, words), codes, size, beam)
    for arch in (75, 90):
        built = compiled(*launches[0], arch)
        assert built.metadata.shared <= 16 << 10
    assert _spills(built.asm["cubin"], tmp_path) == 0


def _spills(binary: bytes, folder: Path) -> int:
    """Loads of registers that went to memory, in a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    listing = subprocess.run([tool, "-sass", file], capture_output=True, text=True, check=True)
    return listing.stdout.count("LDL")


@needs_gpu
@pytest.mark.parametrize(("count", "size", "columns", "beam"), [*CASES, (32, 64, 32, 16)])
def test_gpu_codes_are_as_good_as_those_of_plain_torch(
    count: int, size: int, columns: int, beam: int
) -> None:
    x, books = _case(count, size, columns, 5000, "cuda")
    assert gpu_search.takes(x, books, beam)
    codes = AdditiveQuantizer().encode(x, books, beam)
    expected = _expected(x, books, beam)
    found, wanted = _errors(x, books, codes), _errors(x, books, expected)
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert (codes == expected).all(1).float().mean() > 0.99


@needs_gpu
def test_gpu_large_codebooks_are_searched_in_plain_torch() -> None:
    x, books = _case(2, 4096, 8, 300, "cuda")
    assert not gpu_search.takes(x, books, 16)
    codes = AdditiveQuantizer().encode(x, books, 16)
    assert torch.equal(codes.cpu(), _expected(x.cpu(), books.cpu(), 16))


@needs_gpu
def test_gpu_tf32_makes_no_difference() -> None:
    x, books = _case(6, 32, 32, 2000, "cuda")
    expected = AdditiveQuantizer().encode(x, books, 16)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(AdditiveQuantizer().encode(x, books, 16), expected)
    finally:
        torch.set_float32_matmul_precision(before)
