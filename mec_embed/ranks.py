"""What the processes of a ``torch.distributed`` group tell each other while tables are compressed.

Every exchange starts with a round in which each rank says whether it is fine and where it is. So
an error of one rank is raised by all of them, at the next exchange, and no rank waits for another
that has given up. A rank that died is noticed by the group itself, at the latest after its
time-out. Ctrl-C waits for the end of an exchange: a rank that left in the middle of one would be a
step ahead of the others.
"""

from __future__ import annotations

import json
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Bytes that are added up at once: gloo makes a copy of them.
_PIECE_BYTES = 64 << 20
#: Of the gloo group of ranks whose own group is of another kind: that of torch.
_TIMEOUT = timedelta(minutes=30)
#: How many gloo groups were made for each group of another kind; equal on its ranks.
_made: MutableMapping[ProcessGroup, int] = WeakKeyDictionary()
#: Errors that keep their type on the ranks that hear of them; others become a RuntimeError.
_TOLD_AS = {kind.__name__: kind for kind in (ValueError, TypeError, IndexError, MemoryError)}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """While open, Ctrl-C waits."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield  # a handler that Python cannot put back, or a thread that hears of no signal
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


class Ranks:
    """The processes that work on the same tables, or this one alone.

    All ranks must make the same calls in the same order, the last of them within :meth:`guard`.

    Args:
        group: of ``torch.distributed``; None for this process alone.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or this process is not in the group.

    Attributes:
        size: number of ranks.
        rank: number of this one, from 0.
        group: as given.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.size, self.rank, self.group = 1, 0, group
        self._group: Any = None
        self._over = False
        if group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "process_group is given but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first (torchrun starts the processes)"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"process_group must be a group that this process is in, got {group!r}; only its "
                "members call"
            )
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        # What is exchanged is small and on the CPU; and NCCL ends a process at a time-out, where
        # gloo raises an error.
        if self.size == 1 or "gloo" in dist.get_backend(group):
            self._group = group
        else:
            self._group = self._gloo_group(group)

    def _gloo_group(self, group: ProcessGroup) -> Any:
        """Connections between the ranks of a group, which close when they are referred to no more.

        Not by ``dist.new_group``: that needs all processes, or names groups by how many each member
        knows, so that members of different groups do not meet, and a later group of the same
        members meets the addresses of one that is gone.
        """
        from torch.distributed.distributed_c10d import _world

        _made[group] = number = _made.get(group, 0) + 1
        prefix = f"mec_embed/{number}"
        store = dist.PrefixStore(prefix, _world.pg_map[group][1])  # type: ignore[attr-defined]
        with self._reached("meeting them"):
            return dist.ProcessGroupGloo(store, self.rank, self.size, _TIMEOUT)

    def part(self, rows: int) -> tuple[int, int]:
        """First row and end of what this rank works on, of rows that all ranks hold."""
        return rows * self.rank // self.size, rows * (self.rank + 1) // self.size

    def add(self, values: Tensor, what: str) -> Tensor:
        """The sum of all ranks' tensors of one shape and dtype, on each of them.

        Args:
            values: of this rank; unchanged.
            what: is being done, for messages.
        """
        if self.size == 1:
            return values
        total = values.detach().cpu().clone()
        with _uninterrupted():
            self._round(f"{what}, {tuple(total.shape)}")
            self._all_reduce(total.view(-1), what)
        return total.to(values.device)

    def merge(self, values: Tensor, what: str) -> Tensor:
        """What each rank has filled in of a tensor of zeros, together; every bit as it was.

        Args:
            values: of this rank; on the CPU it is changed, and what is returned.
            what: is being done, for messages.
        """
        if self.size == 1:
            return values
        merged = values.detach().cpu().contiguous()
        with _uninterrupted():
            self._round(f"{what}, {tuple(merged.shape)}")
            # No bit is set by two ranks, so that sums of bytes neither carry nor round.
            self._all_reduce(merged.view(-1).view(torch.uint8), what)
        return merged.to(values.device)

    def tell(self, value: Any, what: str) -> list[Any]:
        """The values of all ranks, by rank: anything that JSON can hold."""
        if self.size == 1:
            return [value]
        with _uninterrupted():
            self._round(what)
            return [json.loads(text) for text in self._texts(json.dumps(value), what)]

    def agree(self, facts: Mapping[str, str], what: str) -> None:
        """ValueError, on every rank, where ranks differ in a fact: name -> value."""
        own, *others = self.tell(dict(facts), what)
        for rank, other in enumerate(others, 1):
            for name in [*own, *other]:
                if own.get(name) != other.get(name):
                    raise ValueError(
                        f"ranks differ in {name}: rank 0 has {own.get(name, 'none')}, rank {rank} "
                        f"has {other.get(name, 'none')}; give every rank the same model, counts "
                        "and configuration"
                    )

    def settle(self, what: str) -> None:
        """Raise here what another rank has raised."""
        if self.size > 1:
            with _uninterrupted():
                self._round(what)

    @contextmanager
    def guard(self) -> Iterator[Ranks]:
        """What one rank raises inside, every rank raises; all leave together, for good."""
        try:
            yield self
            self.settle("finishing")
        except BaseException as error:
            if self.size > 1 and not self._over:
                self._fail(error)
            raise
        finally:
            self._group = None  # and with it, the connections that were made for this alone

    def _fail(self, error: BaseException) -> None:
        """Tell the others, who are at the next exchange or will be."""
        self._over = True
        # The error itself says more than that the others are gone as well.
        with _uninterrupted(), suppress(RuntimeError):
            self._numbers(1, 0, "telling an error")
            self._texts(json.dumps([type(error).__name__, str(error)]), "telling an error")

    def _round(self, what: str) -> None:
        """Raise what another rank has failed with, or where ranks are at different places."""
        place = zlib.crc32(what.encode())
        numbers = self._numbers(0, place, what)
        failed = [rank for rank, (failure, _) in enumerate(numbers) if failure]
        if failed:
            self._over = True
            kind, message = json.loads(self._texts("null", what)[failed[0]])
            raise _TOLD_AS.get(kind, RuntimeError)(f"rank {failed[0]}: {message or kind}")
        if any(other != place for _, other in numbers):
            self._over = True
            raise RuntimeError(
                f"rank {self.rank} is {what}, but another rank is elsewhere; all ranks must make "
                "the same calls, with the same number of threads and the same versions"
            )

    def _numbers(self, failure: int, place: int, what: str) -> list[list[int]]:
        """(whether it has failed, where it is) of every rank."""
        return self._gather(torch.tensor([failure, place]), what).tolist()  # type: ignore[no-any-return]

    def _texts(self, text: str, what: str) -> list[str]:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = self._gather(torch.tensor([len(data)]), what)[:, 0].tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = self._gather(padded, what)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]

    def _gather(self, own: Tensor, what: str) -> Tensor:
        """Tensors (n,) of all ranks, (ranks, n)."""
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with self._reached(what):
            self._group.allgather([rows], [own]).wait()
        return torch.stack(rows)

    def _all_reduce(self, total: Tensor, what: str) -> None:
        with self._reached(what):
            for piece in total.split(_PIECE_BYTES // total.itemsize):
                self._group.allreduce([piece]).wait()

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        """While open, errors of the network say what they mean."""
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise RuntimeError(
                f"rank {self.rank} lost the other ranks while {what}: a process has ended, or was "
                "busy for longer than the time-out of process_group; see what the other ranks "
                f"report ({error})"
            ) from error


#: This process, without others.
ALONE = Ranks()
