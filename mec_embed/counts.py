"""How often each row occurs, from files: .npz of counts, or parquet of ids."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from .frequency import FrequencyStats, parquet_columns
from .skeleton import Progress, Skeleton, alike

#: Counts looked at at once.
_PART = 1 << 20


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
        return _counted_ids(path, skeleton, columns)
    if columns:
        raise ValueError(f"--column goes with a parquet file, {path} is none")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no file of counts; expected one made by numpy.savez(path, "
            "**{'table': counts}), or a parquet file"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return _named_counts(path, arrays, skeleton, progress)


def _named_counts(
    path: Path, arrays: Any, skeleton: Skeleton, progress: Progress
) -> FrequencyStats:
    counts: dict[str, np.ndarray] = {}
    owners = {name: table for table in skeleton.tables for name in table.names}
    others = [key.removesuffix(".weight") for key in skeleton.checkpoint.tensors]
    for member in arrays.files:
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
        values = _member(path, arrays, member)
        for table, rows in tables.items():
            if table in counts:
                raise ValueError(f"{path} holds counts of table {table!r} twice: once {member!r}")
            _check_counts(path, member, table, values, rows)
            counts[table] = values
    return FrequencyStats(counts)


def _fitting(name: str, names: Sequence[str]) -> list[str]:
    """Names that ``name`` stands for: itself, those that it is a pattern of or the last part of."""
    if name in names:
        return [name]
    found = [one for one in names if fnmatchcase(one, name)]
    last = [one for one in names if one.rpartition(".")[2] == name]
    return found or (last if len(last) == 1 else [])


def _member(path: Path, arrays: Any, name: str) -> np.ndarray:
    """One array of an .npz file; mapped where it can be."""
    try:
        place = _place(path, arrays.zip, name)
        if place is not None:
            return np.asarray(np.memmap(path, place[0], "r", *place[1:]))
        values: np.ndarray = arrays[name]
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path}: {name!r} is no array of numbers or damaged ({error}); save the counts again"
        ) from error
    return values


def _place(
    path: Path, archive: zipfile.ZipFile, name: str
) -> tuple[np.dtype[Any], int, tuple[int, ...]] | None:
    """Dtype, place in the file and shape of an array; None where it cannot be mapped."""
    member = f"{name}.npy"
    info = archive.getinfo(member if member in archive.namelist() else name)
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
        lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        file.seek(sum(lengths), os.SEEK_CUR)
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or 0 in (len(shape), *shape):
            return None
        return dtype, file.tell(), shape


def _check_counts(path: Path, member: str, table: str, values: np.ndarray, rows: int) -> None:
    """ValueError unless these are counts of a table of ``rows`` rows."""
    where = f"{path}: counts of table {table!r}" + (f" ({member!r})" if member != table else "")
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{where}: found {values.dtype}, expected numbers; save them as int64")
    if values.shape != (rows,):
        raise ValueError(
            f"{where}: found shape {values.shape}, expected ({rows},), one count a row; count the "
            "ids as the model sees them, padding and unknown ids included"
        )
    for start in range(0, rows, _PART):
        part = values[start : start + _PART]
        wrong = ~(part >= 0) | (part == np.inf)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{where}: found {part[row]} in row {start + row}, expected a finite number of at "
                "least 0; repair the counts"
            )


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
