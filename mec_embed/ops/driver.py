"""Kernels that Triton compiled, launched by the CUDA driver's own function, from C.

What Triton does in Python around a launch takes longer than a small kernel does. Kernels here take
addresses and whole numbers of 8 bytes, and after them addresses of scratch memory that Triton adds
and does not use, which C gives as zeros; a driver that can say so (CUDA 12.4) is asked whether that
is what a kernel takes. Hooks of Triton's launches, of its profiler say, are not called.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu

#: ``Kernel`` of C, and what each argument has to be: a dtype of a tensor, ``int``, or None.
Compiled = tuple[bytes, tuple[Any, ...]]

#: Addresses of scratch memory that Triton adds, at most; and arguments that C has room for.
_MOST_ADDED = 2
_MOST_ARGUMENTS = 32
#: The same of those that are no lookup's own.
_MOST_FIXED = _MOST_ARGUMENTS - 5
_WORD_BYTES = 8
_ALIGNED_BYTES = 16
_WARP_THREADS = 32


@functools.cache
def _driver() -> Any:
    """The CUDA driver; None where there is none."""
    if not cpu.available() or torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    launch = ctypes.cast(library.cuLaunchKernel, ctypes.c_void_p).value
    cpu.kernel.set_up_gpu(launch, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream)
    return library


def _takes_words(function: int, count: int) -> bool:
    """Whether a kernel takes ``count`` words, and as many more as may be added, or none can say."""
    if not hasattr(_driver(), "cuFuncGetParamInfo"):
        return True
    place, size = ctypes.c_size_t(), ctypes.c_size_t()
    found = 0
    while not _driver().cuFuncGetParamInfo(
        ctypes.c_void_p(function),
        ctypes.c_size_t(found),
        ctypes.byref(place),
        ctypes.byref(size),
    ):
        if size.value != _WORD_BYTES:
            return False
        found += 1
    return count <= found <= count + _MOST_ADDED


def compiled(
    kernel: Any, device: int | None, arguments: Sequence[Any], names: Sequence[str], anywhere: Any
) -> Compiled | None:
    """What Triton compiled for ``arguments``, for C; None where Triton has to launch it.

    Args:
        kernel: a ``CompiledKernel`` of Triton that has run on ``device``.
        device: number of the GPU.
        arguments: the first of the kernel; all others are constants.
        names: of the arguments.
        anywhere: names of tensors that may start at any address; others start, or do not, at a
            multiple of 16 bytes, as the ones given do.
    """
    metadata = kernel.metadata
    given = sum(one is not None for one in arguments)
    if _driver() is None or device is None or len(arguments) > _MOST_ARGUMENTS:
        return None
    added = "global_scratch_size", "profile_scratch_size"
    if any(getattr(metadata, name, 0) for name in added) or metadata.num_ctas != 1:
        return None
    if not _takes_words(kernel.function, given):
        return None
    aligned = bound = 0
    for number, (name, one) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(one, Tensor) and name not in anywhere:
            bound |= 1 << number
            aligned |= (one.data_ptr() % _ALIGNED_BYTES == 0) << number
    threads = metadata.num_warps * _WARP_THREADS
    fields = kernel.function, threads, metadata.shared, device, aligned, bound
    return struct.pack(f"={len(fields)}q", *fields), tuple(_kind(one) for one in arguments)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype
    return None if argument is None else int


def plan(compiled: Compiled, shape: tuple[int, int, int, int], fixed: tuple[int, ...]) -> bytes:
    """``Lookups`` of C.

    Args:
        compiled: the kernel.
        shape: columns of a row, chunks that one is decoded in, chunks of a program, and ids of a
            call at most.
        fixed: what the kernel takes after ids, output, stride, count and ``zero_id``.
    """
    fields = *shape, *fixed, *[0] * (_MOST_FIXED - len(fixed))
    return compiled[0] + struct.pack(f"={len(fields)}q", *fields)
