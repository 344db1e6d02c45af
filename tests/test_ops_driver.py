"""Kernels that C launches, by a stand-in for the CUDA driver."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops_triton import Case, in_tiers, kernels, some_popular
from torch import Tensor

from mec_embed import CodeLayout, ops
from mec_embed.ops import driver

if not ops.cpu.available():
    pytest.skip("the C kernel was not built", allow_module_level=True)

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
    ctypes.c_void_p,
)
#: What ``get_device`` says of the tensors here.
DEVICE = -1


class Driver:
    """Stands for the CUDA driver: notes what is launched, and does what it is told to."""

    def __init__(self) -> None:
        self.widths = [8] * 40  # bytes of the parameters of every kernel
        self.launched: list[tuple[Any, ...]] = []
        self.words = 0  # parameters to read
        self.failure = 0
        self.device = DEVICE
        self.work: Any = None
        self.cuLaunchKernel = LAUNCH(self._launch)  # noqa: N815

    def _launch(self, function: int, x: int, y: int, z: int, threads: int, *others: Any) -> int:
        *block, shared, stream, parameters, _ = others
        words = [parameters[number][0] for number in range(self.words)]
        self.launched.append((function, x, y, z, threads, *block, shared, stream, words))
        if self.work is not None and not self.failure:
            self.work(words)
        return self.failure

    def cuFuncGetParamInfo(  # noqa: N802
        self, function: Any, number: Any, place: Any, size: Any
    ) -> int:
        if number.value >= len(self.widths):
            return 1
        size._obj.value = self.widths[number.value]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.device)
    # Kept alive, as C may be asked to launch for as long as a kernel lives.
    KEPT.append(found)
    launch = ctypes.cast(found.cuLaunchKernel, ctypes.c_void_p).value
    ops.cpu.kernel.set_up_gpu(launch, lambda: found.device, lambda device: 1000 + device)
    return found


KEPT: list[Driver] = []


class Triton:
    """Stands for a kernel in Triton's language, and for what Triton compiles of it."""

    arg_names = ("one", "other", "number", "ids", "WIDTH")

    def __init__(self, function: Any = None) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.run = function
        self.metadata = SimpleNamespace(num_warps=2, shared=64, num_ctas=1)
        if function is not None:
            self.arg_names = function.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: int) -> Any:
            self.runs.append((grid, *arguments))
            if self.run is not None:
                self.run[grid](*arguments, **constants)
            return SimpleNamespace(metadata=self.metadata, function=77)

        return run


@pytest.fixture
def launcher() -> Any:
    found = kernels._Launcher(Triton(), torch.device("cpu"), (("WIDTH", 4), ("num_warps", 2)))
    found.index = DEVICE
    return found


def test_what_was_compiled_is_launched_by_the_driver(cuda: Driver, launcher: Any) -> None:
    one, ids = torch.zeros(64), torch.arange(9)
    cuda.widths, cuda.words = [8] * 5, 5  # three arguments that are not None, two of Triton
    launcher((3,), one, None, 5, ids)
    assert launcher.function.runs == [((3,), one, None, 5, ids)] and not cuda.launched
    for grid, number in (((7,), 1), ((4, 2), -9), ((1,), 16)):
        launcher(grid, one, None, number, ids[1:])
        x, y = (*grid, 1)[:2]
        words = [one.data_ptr(), number, ids[1:].data_ptr(), 0, 0]
        assert cuda.launched.pop() == (77, x, y, 1, 64, 1, 1, 64, 1000 + DEVICE, words)
    assert len(launcher.function.runs) == 1


def test_triton_compiles_anew_for_other_arguments(cuda: Driver, launcher: Any) -> None:
    one, ids = torch.zeros(64), torch.arange(9)
    cuda.widths, cuda.words = [8] * 4, 4
    launcher((1,), one, None, 5, ids)
    for number, arguments in enumerate(
        [
            (one[1:], None, 5, ids),
            (one.double(), None, 5, ids),
            (one, one, 5, ids),
            (one, None, 5, ids.int()),
            (one, None, None, ids),
            (5, None, 5, ids),
            (one, None, one, ids),
        ],
        2,
    ):
        launcher((1,), *arguments)
        assert len(launcher.function.runs) == number and not cuda.launched
        launcher((1,), *arguments)
        assert len(launcher.function.runs) == number
        words = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        words = [word for word in words if word is not None]
        assert cuda.launched.pop()[-1][: len(words)] == words


def test_what_the_driver_cannot_launch_is_left_to_triton(cuda: Driver, launcher: Any) -> None:
    one, ids = torch.zeros(64), torch.arange(9)
    cuda.widths = [8] * 4
    launcher((1,), one, None, 5, ids)
    cuda.failure = 201
    launcher((1,), one, None, 5, ids)
    assert len(cuda.launched) == 1 and len(launcher.function.runs) == 2
    assert len(launcher.compiled) == 1
    with pytest.raises(TypeError):
        ops.cpu.kernel.launch(*launcher.compiled[0], 1, 1, one)


@pytest.mark.parametrize(
    ("widths", "metadata"),
    [
        ([8] * 2, {}),
        ([8] * 6, {}),
        ([8, 4, 8], {}),
        ([8] * 3, {"global_scratch_size": 8}),
        ([8] * 3, {"profile_scratch_size": 8}),
        ([8] * 3, {"num_ctas": 2}),
    ],
)
def test_kernels_that_take_something_else_are_left_to_triton(
    widths: list[int], metadata: dict[str, int], cuda: Driver, launcher: Any
) -> None:
    cuda.widths = widths
    vars(launcher.function.metadata).update(metadata)
    for _ in range(2):
        assert launcher((1,), torch.zeros(4), None, 5, torch.arange(3)) is None
    assert len(launcher.function.runs) == 2 and not cuda.launched


def test_no_driver(monkeypatch: pytest.MonkeyPatch, launcher: Any) -> None:
    monkeypatch.setattr(driver, "_driver", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    for _ in range(2):
        assert launcher((1,), torch.zeros(4), None, 5, torch.arange(3)) is None
    assert len(launcher.function.runs) == 2


def test_a_driver_that_cannot_be_asked(
    cuda: Driver, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_driver", lambda: SimpleNamespace())
    cuda.words = 34  # as many as C gives; those after the arguments are zeros
    one, ids = torch.zeros(64), torch.arange(9)
    for _ in range(2):
        launcher((3,), one, None, 5, ids)
    words = [one.data_ptr(), 5, ids.data_ptr(), *[0] * 31]
    assert cuda.launched.pop()[-1] == words and len(launcher.function.runs) == 1


@pytest.mark.parametrize("missing", ["library", "CUDA"])
def test_where_there_is_no_such_driver(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(driver.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.version, "cuda", None if missing == "CUDA" else "13.0")
    assert driver._driver.__wrapped__() is None


@pytest.fixture
def on_gpu(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Takes all tensors for such on a GPU, and interpreted kernels for compiled ones."""
    monkeypatch.setattr(ops.fast, "on_gpu", kernels)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    launchers: dict[Any, Any] = {}

    def launcher_of(function: Any, *others: Any) -> Any:
        key = (function.__name__, *others)
        if key not in launchers:
            launchers[key] = kernels._Launcher(Triton(function), *others)
            launchers[key].index = DEVICE
        return launchers[key]

    monkeypatch.setattr(kernels, "_launcher", launcher_of)
    monkeypatch.setattr(kernels, "_chunked", kernels._chunked.__wrapped__)
    monkeypatch.setattr(kernels, "_tiered", kernels._tiered.__wrapped__)
    return cuda


#: A table of each kind, and how many arguments its kernel takes.
TABLES = {
    "plain": (lambda: Case(CodeLayout("additive", 300, 6, 2, 8), padding_idx=7).table, 9),
    "product": (
        lambda: Case(CodeLayout("product", 300, 12, 3, 20, torch.int8), padding_idx=7).table,
        10,
    ),
    "bitmap": (lambda: in_tiers(some_popular("bitmap"), 12, "rows", "int8", padding_idx=7), 18),
    "runs": (lambda: in_tiers(some_popular("runs"), 12, "additive", "one row", padding_idx=7), 17),
}


def decode_from(every: Tensor) -> Any:
    """Does what a kernel would, from the first words that it is given and all rows."""

    def work(words: list[int]) -> None:
        place, out, stride, count, zero_id = words[:5]
        given = (ctypes.c_int64 * ((count - 1) * stride + 1)).from_address(place)[::stride]
        rows = every[given]
        rows[[one == zero_id for one in given]] = 0
        ctypes.memmove(out, rows.data_ptr(), rows.nbytes)

    return work


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_a_module(kind: str, on_gpu: Driver) -> None:
    """From the second call on C makes the output and launches the kernel."""
    make, on_gpu.words = TABLES[kind]
    on_gpu.widths, table = [8] * on_gpu.words, make()
    every = table._decode(torch.arange(300)).detach()
    on_gpu.work = decode_from(every)
    ids = torch.randint(300, (4, 5))
    ids[0, 1] = 7
    with torch.no_grad():
        assert torch.equal(table(ids), every[ids]) and not on_gpu.launched
        for given in (ids, ids[2], ids[:, 1], ids[0, 1]):
            assert torch.equal(table(given), every[given])
            assert on_gpu.launched.pop()[5:9] == (1, 1, 64, 1000 + DEVICE)
        for given, launched in ((ids[:0], 0), (ids[:, ::2], 1), (ids.int(), 0)):
            found = table(given)
            assert torch.equal(found, every[given.long()]) and found.dtype is every.dtype
            assert len(on_gpu.launched) == launched
            on_gpu.launched.clear()
        with pytest.raises(TypeError, match="float32"):
            table(ids.float())
        on_gpu.failure = 1
        assert torch.equal(table(ids), every[ids]) and on_gpu.launched.pop()


def test_the_numbers_of_a_lookup(on_gpu: Driver) -> None:
    table = TABLES["plain"][0]()
    on_gpu.widths, on_gpu.words = [8] * 10, 10
    ids = torch.randint(300, (1000,))
    with torch.no_grad():
        for _ in range(2):
            table(ids)
    function, x, y, *_, words = on_gpu.launched.pop()
    assert (function, x, y) == (77, -(-1000 * 6 // kernels.ROW_ENTRIES), 1)
    tensors = table.codes.data_ptr(), table.codebooks.data_ptr()
    assert words[0] == ids.data_ptr() and words[2:] == [1, 1000, 7, *tensors, 300, 8, 0]


def test_other_tensors_are_made_ready_anew(on_gpu: Driver) -> None:
    table = TABLES["plain"][0]()
    on_gpu.widths = [8] * 9
    ids = torch.randint(300, (9,))
    with torch.no_grad():
        for _ in range(3):
            table(ids)
        assert len(on_gpu.launched) == 2
        table.code_table.codes = table.codes.clone()
        table(ids)
        assert len(on_gpu.launched) == 3, "by the launcher: not of the old codes"
        on_gpu.words = 6
        table(ids)
        assert on_gpu.launched[-1][-1][5] == table.codes.data_ptr()


def test_more_lookups_than_codewords_unpack_int8(
    on_gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "UNPACK_ENTRIES", 20 * 12 + 1)
    table = TABLES["product"][0]()
    every = table._decode(torch.arange(300))
    on_gpu.widths, on_gpu.words, on_gpu.work = [8] * 10, 10, decode_from(every)
    ids = torch.randint(300, (21,))
    with torch.no_grad():
        for count, launched in ((20, 0), (20, 1), (21, 1), (20, 2)):
            assert torch.equal(table(ids[:count]), every[ids[:count]])
            assert len(on_gpu.launched) == launched


def test_rows_that_are_trained(on_gpu: Driver) -> None:
    table = TABLES["plain"][0]()
    every = table._decode(torch.arange(300)).detach()
    on_gpu.widths, on_gpu.words = [8] * 9, 9
    ids, weights = torch.randint(300, (9,)), torch.randn(9, 6)
    expected = torch.autograd.grad((table._decode(ids) * weights).sum(), table.codebooks)[0]
    for launched in (0, 1):
        on_gpu.work = decode_from(every)
        rows = table(ids)
        assert torch.equal(rows, every[ids]) and len(on_gpu.launched) == launched
    on_gpu.work = None
    on_gpu.failure = 1  # the kernel of the gradient is Triton's here
    found = torch.autograd.grad((rows * weights).sum(), table.codebooks)[0]
    torch.testing.assert_close(found, expected)


def test_no_output_is_made_twice_where_another_device_is_current(
    on_gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Current:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            self.number, on_gpu.device = on_gpu.device, self.number

        def __exit__(self, *_: Any) -> None:
            on_gpu.device = self.number

    monkeypatch.setattr(torch.cuda, "device", Current)
    table = TABLES["plain"][0]()
    on_gpu.widths, ids, made = [8] * 9, torch.randint(300, (9,)), []
    with torch.no_grad():
        for _ in range(2):
            table(ids)
        assert len(on_gpu.launched) == 1
        rows = table._fast._rows[0]
        monkeypatch.setattr(rows, "ready", (made.append, *rows.ready[1:]))
        on_gpu.device = 5
        table(ids)
    assert not made and len(on_gpu.launched) == 2 and on_gpu.launched[-1][8] == 1000 + DEVICE
