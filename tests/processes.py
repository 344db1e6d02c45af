"""Run a function in several processes that torch.distributed connects (gloo, CPU)."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)


def run(
    function: Callable[..., Any],
    processes: int,
    folder: Path,
    *args: Any,
    timeout: timedelta = TIMEOUT,
) -> list[Any]:
    """``function(*args)`` in each of ``processes``; what each returned, by rank.

    None of a rank that has ended itself, with exit code 0.
    """
    torch.multiprocessing.spawn(
        _run_one, (processes, folder, function, args, timeout), nprocs=processes
    )
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def _run_one(
    rank: int, processes: int, folder: Path, function: Callable, args: tuple, timeout: timedelta
) -> None:
    """One process; it ends without the interpreter's clean-up.

    Threads of torch that want the interpreter's lock while it goes away abort the process now and
    then, long after all that is tested has happened.
    """
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", timeout, processes, rank)
        torch.save(function(*args), folder / f"{rank}.pt")
        # Not before the others are done; one that has ended itself is not waited for.
        with suppress(RuntimeError):
            dist.barrier()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
