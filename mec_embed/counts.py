"""How often each row occurs, from files: .npz of counts, or parquet of ids."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from .frequency import MOST_COUNT, FrequencyStats, parquet_columns
from .skeleton import Progress, Skeleton, alike

#: Counts looked at at once.
_PART = 1 << 20
#: What numpy and zipfile raise for a file that is damaged, encrypted or not theirs.
_DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_counts(
    path: str | Path, skeleton: Skeleton, columns: Mapping[str, str], progress: Progress
) -> FrequencyStats:
    """How often each row occurs, from an .npz file of counts or a parquet file of ids.

    Args:
        path: of the file.
        skeleton: whose tables are counted.
        columns: column of a parquet file -> table; by default columns of the tables' names.
        progress: told of counts that have no use.

    Raises:
        ValueError: counts that do not fit; table, found and expected are named.
        FileNotFoundError: no file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        with _arrow_errors(path):
            return _counted_ids(path, skeleton, columns)
    if columns:
        raise ValueError(f"--column goes with a parquet file, {path} is none")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no file of counts; expected one made by numpy.savez(path, "
            "**{'table': counts}), or a parquet file"
        )
    return _named_counts(_Archive(path), skeleton, progress)


def _named_counts(archive: _Archive, skeleton: Skeleton, progress: Progress) -> FrequencyStats:
    path, counts = archive.path, dict[str, np.ndarray]()
    owners = {name: table for table in skeleton.tables for name in table.names}
    others = [key.removesuffix(".weight") for key in skeleton.checkpoint.tensors]
    for member in archive.names:
        name = member.removesuffix(".weight")
        tables = {owners[one].name: owners[one].rows for one in _fitting(name, [*owners])}
        if not tables and _fitting(name, others):
            progress.note(f"counts of {member!r} have no use: it is not compressed")
            continue
        if not tables:
            raise ValueError(
                f"{path} holds counts of {member!r}, which is no table of the checkpoint"
                f"{alike(name, [*owners])}; rename the array to the table's name"
            )
        for table, rows in tables.items():
            if table in counts:
                raise ValueError(f"{path} holds counts of table {table!r} twice: once {member!r}")
            where = f"{path}: counts of table {table!r}"
            where += f" ({member!r})" if member != table else ""
            counts[table] = archive.read(member, rows, where)
            _check_counts(counts[table], where)
    return FrequencyStats(counts)


def _fitting(name: str, names: Sequence[str]) -> list[str]:
    """Names that ``name`` stands for: itself, those that it is a pattern of or the last part of."""
    if name in names:
        return [name]
    found = [one for one in names if fnmatchcase(one, name)]
    last = [one for one in names if one.rpartition(".")[2] == name]
    return found or (last if len(last) == 1 else [])


class _Archive:
    """An .npz file. What an array says of its shape is compared before that is allocated.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open(path.name) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    @contextmanager
    def _open(self, name: str) -> Iterator[zipfile.ZipFile]:
        """The archive, for reading one array; ValueError where that fails."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except _DAMAGED as error:
            raise ValueError(
                f"{self.path}: {name!r} is no array of numbers or damaged ({error}); save the "
                "counts again"
            ) from error

    def read(self, name: str, rows: int, where: str) -> np.ndarray:
        """An array of numbers (rows,), mapped where it can be; ``where`` begins other messages."""
        with self._open(name) as archive:
            member = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
            info = archive.getinfo(member)
            if info.header_offset < 0:
                raise ValueError("it begins before the file does")
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the format of arrays")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                header = file.tell()
        if dtype.kind not in "iuf":
            raise ValueError(f"{where}: found {dtype}, expected numbers; save them as int64")
        if shape != (rows,):
            raise ValueError(
                f"{where}: found shape {shape}, expected ({rows},), one count a row; count the "
                "ids as the model sees them, padding and unknown ids included"
            )
        with self._open(name) as archive:
            if info.compress_type == zipfile.ZIP_STORED:
                start = self._start(info) + header
                return np.asarray(np.memmap(self.path, dtype, "r", start, (rows,)))
            with archive.open(info) as file:
                values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
                return values

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where the contents of a member begin in the file."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            local = file.read(30)
        lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        return info.header_offset + 30 + sum(lengths)


def _check_counts(values: np.ndarray, where: str) -> None:
    """ValueError unless all are finite and at least 0."""
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        wrong = ~((part >= 0) & (part <= np.float64(MOST_COUNT)))
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{where}: found {part[row]} in row {start + row}, expected a finite number of at "
                f"least 0 and at most {MOST_COUNT:.0e}; repair the counts"
            )


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """What pyarrow raises for a file that is damaged, which it does not name, as a ValueError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        # It has OSErrors of its own, without a number.
        damaged = isinstance(error, OSError) and error.errno is None
        if not damaged and not type(error).__module__.startswith("pyarrow"):
            raise
        raise ValueError(
            f"{path} is no parquet file that can be read ({error}); write it again"
        ) from error


def _counted_ids(path: Path, skeleton: Skeleton, columns: Mapping[str, str]) -> FrequencyStats:
    """Ids of a parquet file, counted."""
    if not columns:
        columns = {
            column: tables[0]
            for column in _column_names(path)
            if len(tables := _fitting(column, skeleton.names)) == 1
        }
    if not columns:
        raise ValueError(
            f"{path} has no column that is named as a table: found "
            f"{', '.join(_column_names(path)[:20])}; name them with --column COLUMN=TABLE"
        )
    for table in columns.values():
        if table not in skeleton.names:
            raise ValueError(
                f"--column names {table!r}, which is no table{alike(table, skeleton.names)}"
            )
    try:
        return FrequencyStats.from_parquet(skeleton.model, path, columns)
    except (IndexError, TypeError) as error:
        raise ValueError(f"{path}: {error}; encode the ids as for the model") from error


def _column_names(path: Path) -> list[str]:
    # Asking for no column finds whether pyarrow is there.
    next(parquet_columns(path, ()), None)
    import pyarrow.parquet as parquet

    return [*parquet.read_schema(path).names]
