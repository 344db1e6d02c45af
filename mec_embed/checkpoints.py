"""Tensors of checkpoint files, read and written in pieces: a table may be larger than memory.

Read are safetensors files, Hugging Face's ``*.index.json`` over several files, and PyTorch files
(``weights_only``). Safetensors are read through a file handle, not mapped: pages of a mapping would
count as memory of the process. Written are safetensors, with a checksum of every tensor.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import operator
import os
import pickle
import re
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

#: Bytes read or written at once.
CHUNK_BYTES = 4 << 20
#: Entry of the metadata that holds the checksums (SHA-256) of all tensors, as JSON.
CHECKSUMS = "mec_embed_sha256"
#: Largest header that safetensors allows.
_MOST_HEADER = 100_000_000
#: Bytes at the end of a PyTorch file that stand for its contents: its directory of checksums.
_TAIL_BYTES = 1 << 16
#: What torch.load() raises for a file that is none of its own.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
)
#: Where training scripts put the state_dict.
_NESTED = ("state_dict", "model_state_dict", "model")

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
#: Safetensors' name of a dtype -> dtype.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in _NAMES.items()
    if hasattr(torch, attribute)
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(ABC):
    """A tensor that is somewhere else and read in pieces.

    Attributes:
        dtype_name: safetensors' name of its dtype.
        shape: of the tensor.
        nbytes: of its values.
    """

    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype, or None where torch has none of this kind."""
        return DTYPES.get(self.dtype_name)

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a matrix, in memory of their own."""

    @abstractmethod
    def chunks(self) -> Iterator[Any]:
        """The bytes of its values, in order, as buffers."""


class FileTensor(StoredTensor):
    """A tensor in a safetensors file."""

    def __init__(
        self, file: _File, dtype_name: str, shape: tuple[int, ...], start: int, nbytes: int
    ) -> None:
        self.dtype_name, self.shape, self.nbytes = dtype_name, shape, nbytes
        self._file, self._start = file, start

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`StoredTensor`."""
        dtype = self.dtype
        if dtype is None or start >= stop:
            return torch.empty(0, self.shape[1], dtype=dtype)
        width = self.shape[1] * dtype.itemsize
        values = self._file.read(self._start + start * width, (stop - start) * width)
        return torch.frombuffer(values, dtype=dtype).view(stop - start, self.shape[1])

    def chunks(self) -> Iterator[Any]:
        """See :class:`StoredTensor`."""
        for done in range(0, self.nbytes, CHUNK_BYTES):
            yield self._file.read(self._start + done, min(CHUNK_BYTES, self.nbytes - done))

    def mapped(self) -> Tensor:
        """The whole tensor, read-only, in pages that the system reads and drops as it needs."""
        dtype = self.dtype
        if dtype is None or not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        pages = np.memmap(self._file.path, np.uint8, "r", self._start, (self.nbytes,))
        with warnings.catch_warnings():
            # That it cannot be written is what is wanted.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(pages).view(dtype).view(self.shape)


class MemoryTensor(StoredTensor):
    """A tensor that torch holds, perhaps mapped from a file."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.dtype_name = _NAME_OF[tensor.dtype]
        self.shape, self.nbytes = tuple(tensor.shape), tensor.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`StoredTensor`."""
        return self.tensor[start:stop].clone()

    def chunks(self) -> Iterator[Any]:
        """See :class:`StoredTensor`."""
        if self.nbytes:
            for part in self.tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES):
                yield part.numpy()


class _File:
    """A file that is read at given places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def read(self, start: int, size: int) -> bytearray:
        """Bytes ``start`` to ``start + size``; ValueError where it does not give them."""
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        self._file.seek(start)
        while done < size:
            try:
                count = self._file.readinto(view[done:])
            except OSError as error:
                # Not an OSError: what is written meanwhile would be blamed for it.
                raise ValueError(
                    f"{self.path} cannot be read at byte {start + done:,} ({error.strerror}); copy "
                    "it again"
                ) from error
            if not count:
                raise ValueError(
                    f"{self.path} has {self.path.stat().st_size:,} bytes, expected at least "
                    f"{start + size:,}: it was changed while it was read; run again"
                )
            done += count
        return buffer


@dataclass
class Checkpoint:
    """What one checkpoint holds.

    Attributes:
        path: that was opened.
        tensors: by key, each once.
        shared: key -> key in ``tensors`` of the same tensor.
        extra: entries that are no tensors.
        metadata: texts that the file holds beside.
        identity: name, size, time and hash of the header of each file: equal for equal contents.
        files: all that are read: the one that was opened, and the shards that it names.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    shared: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    identity: list[list[Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def noted(self, key: str) -> dict[str, Any]:
        """The JSON object that the metadata hold under a key; ValueError where it is none."""
        try:
            values = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: its metadata {key!r} are damaged ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.path}: its metadata {key!r} are damaged: no JSON object")
        return values

    def mapped(self, key: str) -> Tensor:
        """A tensor of a safetensors file, whole but not in memory; TypeError in other files."""
        stored = self.tensors[key]
        if not isinstance(stored, FileTensor):
            raise TypeError(f"{self.path}: {key!r} is not in a safetensors file")
        return stored.mapped()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; tensors are not read yet.

    Raises:
        OSError: no file, or one that cannot be read.
        ValueError: a file that is damaged or no checkpoint; what was found is named.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, expected a file; give the .safetensors, .index.json or .pt file "
            "in it"
        )
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file():
        # Of a pipe, nothing could be read twice; of a device, nothing is to be expected.
        raise ValueError(
            f"{path} is a pipe or a device, expected a file; copy it into a file first"
        )
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    with open(path, "rb") as file:
        start = file.read(9)
    # A zip archive, or a pickle of torch before 1.6; the length of a header may begin as that does.
    pickled = start[:2] in (b"\x80\x02", b"\x80\x04") and start[8:] != b"{"
    if start[:4] == b"PK\x03\x04" or pickled:
        return _open_torch(path)
    return _open_safetensors(path)


def _open_sharded(path: Path) -> Checkpoint:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {key: str(PurePosixPath(name)) for key, name in places.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of a sharded checkpoint ({error!r}): expected JSON with a "
            "'weight_map' from tensor to file"
        ) from error
    whole = Checkpoint(path, {}, identity=[_identity(path, path.read_bytes())], files=[path])
    shards: dict[str, Checkpoint] = {}
    for key, name in names.items():
        # Windows knows more ways out than "/" and "..", and all of those.
        parts = PureWindowsPath(name)
        if parts.anchor or ".." in parts.parts:
            raise ValueError(f"{path}: {key!r} is said to be in {name}, outside the index's folder")
        if not name.isprintable() or name.endswith(".index.json"):
            raise ValueError(
                f"{path}: {key!r} is said to be in {name!r}, which is no file of tensors"
            )
        if name not in shards:
            if not (path.parent / name).exists():
                raise ValueError(
                    f"{path}: {key!r} is said to be in {name}, which is not there; put all files "
                    "of the checkpoint beside the index"
                )
            shards[name] = open_checkpoint(path.parent / name)
            whole.identity += shards[name].identity
            whole.files += shards[name].files
            whole.metadata |= shards[name].metadata
        first = shards[name].shared.get(key, key)
        if first != key and names.get(first) == name:
            whole.shared[key] = first
        elif first in shards[name].tensors:
            whole.tensors[key] = shards[name].tensors[first]
        elif key in shards[name].extra:
            whole.extra[key] = shards[name].extra[key]
        else:
            raise ValueError(
                f"{path}: {key!r} is said to be in {name}, which does not hold it; the index and "
                "its files do not belong together"
            )
    return whole


def _open_safetensors(path: Path) -> Checkpoint:
    file, size = _File(path), path.stat().st_size
    header, raw = _header(file, size)
    metadata = header.pop("__metadata__", {})
    data = 8 + len(raw)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in header.items():
        tensors[key] = _file_tensor(file, key, entry, data, size)
    found = data + sum(tensor.nbytes for tensor in tensors.values())
    if found != size:
        raise ValueError(
            f"{path} has {size:,} bytes, its header says {found:,}: it is truncated or damaged; "
            "copy it again"
        )
    # safetensors.torch.save_model() notes names that share a tensor in this way.
    shared = {k: v for k, v in metadata.items() if v in tensors and k not in tensors}
    rest = {k: v for k, v in metadata.items() if k not in shared}
    return Checkpoint(path, tensors, shared, {}, rest, [_identity(path, raw)], [path])


def _header(file: _File, size: int) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, parsed and as it is."""
    problem = f"{file.path} is no checkpoint that can be read"
    advice = "give a safetensors file, a *.index.json or a PyTorch file"
    if size < 8:
        raise ValueError(f"{problem}: it has {size} bytes; {advice}")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(size - 8, _MOST_HEADER):
        raise ValueError(
            f"{problem}: a safetensors header of {length:,} bytes does not fit into a file of "
            f"{size:,}; {advice}"
        )
    raw = bytes(file.read(8, length))
    try:
        header = json.loads(raw)
        texts = header.get("__metadata__", {}).values()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("metadata that is no text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{problem}: its safetensors header is damaged ({error})") from error
    return header, raw


def _file_tensor(file: _File, key: str, entry: Any, data: int, size: int) -> FileTensor:
    """The tensor of one entry of a header; ``data`` is where values start in the file."""
    try:
        dtype, shape = entry["dtype"], [operator.index(size) for size in entry["shape"]]
        start, stop = map(operator.index, entry["data_offsets"])
        items = math.prod(shape)
        fits = 0 <= start <= stop <= size - data and min(shape, default=0) >= 0
        if dtype in DTYPES and items * DTYPES[dtype].itemsize != stop - start:
            fits = False
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: the entry of {key!r} is damaged ({error!r})") from error
    if not fits:
        raise ValueError(
            f"{file.path}: {key!r}, {dtype} {shape}, is said to be in bytes {start} to {stop} of "
            f"{size - data}, which cannot be: it is truncated or damaged; copy it again"
        )
    return FileTensor(file, dtype, tuple(shape), data + start, stop - start)


def _open_torch(path: Path) -> Checkpoint:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _LOAD_ERRORS as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the system; torch's own, of files that are cut short, name none
        raise ValueError(
            f"{path} cannot be loaded as plain tensors ({_refused(error)}); make it again with "
            "torch.save(model.state_dict(), path), by torch 1.6 or later"
        ) from error
    for name in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(
            f"{path} holds a {type(loaded).__name__}{_keys_of(loaded)}, expected a state_dict: a "
            f"mapping from name to tensor, or one under {', '.join(map(repr, _NESTED))}"
        )
    with open(path, "rb") as file:
        file.seek(-min(_TAIL_BYTES, path.stat().st_size), os.SEEK_END)
        checkpoint = Checkpoint(path, {}, identity=[_identity(path, file.read())], files=[path])
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in loaded.items():
        _add(checkpoint, str(key), value, seen)
    return checkpoint


def _keys_of(loaded: Any) -> str:
    """The end of a message: the keys of a mapping, the first ones of many."""
    if not isinstance(loaded, Mapping):
        return ""
    keys = [repr(key) for key in loaded]
    return f" with {', '.join(keys[:10]) or 'no keys'}{' and others' if len(keys) > 10 else ''}"


def _refused(error: Exception) -> str:
    """Why torch.load() took no file, without its advice to let the code in it run."""
    text = str(error).strip()
    if not text.startswith("Weights only load failed"):
        return text.partition("\n")[0]
    found = re.search(r"GLOBAL:? ([\w.]+)", text)
    if found is None:
        return "it is damaged, or holds more than tensors"
    return f"it holds {found[1]}, which is no tensor and might run code"


def _add(checkpoint: Checkpoint, key: str, value: Any, seen: dict[tuple[Any, ...], str]) -> None:
    """Put one entry of a state_dict into a checkpoint; ``seen`` finds tensors that are shared."""
    if not isinstance(value, Tensor):
        checkpoint.extra[key] = value
        return
    if value.is_meta:
        raise ValueError(
            f"{checkpoint.path}: {key!r} is on the meta device, where it has no values; save the "
            "model with its values"
        )
    if value.layout is not torch.strided or value.dtype not in _NAME_OF:
        raise ValueError(
            f"{checkpoint.path}: {key!r} is a {value.layout} tensor of {value.dtype}, expected a "
            "dense one of a plain dtype; take it out of the checkpoint"
        )
    identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    if value.numel() and identity in seen:
        checkpoint.shared[key] = seen[identity]
        return
    seen[identity] = key
    checkpoint.tensors[key] = MemoryTensor(value)


def _identity(path: Path, header: bytes) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def damaged_tensors(checkpoint: Checkpoint, told: Callable[[int], None]) -> list[str] | None:
    """Tensors whose values are not those that were written; None where there are no checksums.

    Args:
        checkpoint: to read whole.
        told: told of bytes as they are read.
    """
    if CHECKSUMS not in checkpoint.metadata:
        return None
    expected = checkpoint.noted(CHECKSUMS)
    wrong = []
    for key, tensor in checkpoint.tensors.items():
        digest = hashlib.sha256()
        for chunk in tensor.chunks():
            digest.update(chunk)
            told(len(chunk))
        if expected.get(key) != digest.hexdigest():
            wrong.append(key)
    return wrong


def same_values(
    one: StoredTensor, other: StoredTensor, told: Callable[[int], None] = lambda nbytes: None
) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; ``told`` is told of these."""
    if (one.dtype_name, one.shape) != (other.dtype_name, other.shape):
        return False
    for ours, theirs in zip(one.chunks(), other.chunks(), strict=True):
        told(len(ours))
        if not np.array_equal(np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)):
            return False
    return True


def tie(checkpoint: Checkpoint, tables: Iterable[Sequence[str]]) -> None:
    """Take copies of a table for one tensor again, in place.

    Files of safetensors hold tensors that are tied once for each name, where they were copied.

    Args:
        checkpoint: copies that differ are left alone.
        tables: all names of each table.
    """
    for names in tables:
        keys = [key for key in (f"{name}.weight" for name in names) if key in checkpoint.tensors]
        for key in keys[1:]:
            if same_values(checkpoint.tensors[keys[0]], checkpoint.tensors[key]):
                del checkpoint.tensors[key]
                for other, first in [*checkpoint.shared.items(), (key, key)]:
                    if first == key:
                        checkpoint.shared[other] = keys[0]


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    told: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write a file with the checksums of all tensors in its metadata.

    Args:
        path: of the file, overwritten.
        tensors: by key.
        metadata: texts.
        told: told of bytes as they are written.
    """
    # Large items first, as safetensors does: each tensor starts at a multiple of its items' size.
    order = sorted(tensors, key=lambda key: (-_itemsize(tensors[key]), key))
    digests = dict.fromkeys(order, "0" * 64)
    with open(path, "wb") as file:
        file.write(_header_bytes(order, tensors, metadata, digests))
        for key in order:
            digest = hashlib.sha256()
            for chunk in tensors[key].chunks():
                digest.update(chunk)
                file.write(chunk)
                told(len(chunk))
            digests[key] = digest.hexdigest()
        # The header comes first but knows the checksums last: it is as long as before.
        file.seek(0)
        file.write(_header_bytes(order, tensors, metadata, digests))


def _itemsize(tensor: StoredTensor) -> int:
    return tensor.dtype.itemsize if tensor.dtype else 1


def _header_bytes(
    order: list[str],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    digests: Mapping[str, str],
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {**metadata, CHECKSUMS: json.dumps(digests)}}
    start = 0
    for key in order:
        tensor = tensors[key]
        stop = start + tensor.nbytes
        header[key] = {
            "dtype": tensor.dtype_name,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def lock(path: Path) -> AbstractContextManager[Any]:
    """Hold a file that no other process can hold; ValueError where one does."""
    file = open(path, "wb")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # Windows; there, two runs with one output are not noticed.
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"another process works in {path.parent}; wait for it or use another output"
        ) from error
    return file
