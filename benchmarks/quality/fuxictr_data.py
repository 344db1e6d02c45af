"""Folders of the "x1" data sets of BARS and FuxiCTR: ``train.csv``, ``valid.csv``, ``test.csv``.

They can be had from huggingface.co/reczoo. We did not have them: this was written and tested on
small made-up copies with the published columns, and was not run on the full data.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import torch

from examples.ctr.data import SPLITS, ClickData, _encode

LABEL = "label"
#: Data set -> its fields, the columns beside ``label``.
FIELDS: dict[str, tuple[str, ...]] = {
    "Criteo_x1": (*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))),
    "Avazu_x1": tuple(f"feat_{i}" for i in range(1, 23)),
    "Frappe_x1": tuple(
        "user item daytime weekday isweekend homework cost weather country city".split()
    ),
    "MovielensLatest_x1": ("user_id", "item_id", "tag_id"),
}
#: Data set -> fields of numbers; all others hold integer ids.
NUMERIC = {"Criteo_x1": frozenset(f"I{i}" for i in range(1, 14))}
#: Most buckets of a numeric field.
BUCKETS = 100


def load_folder(folder: str | Path, dataset: str, min_count: int = 1) -> ClickData:
    """Read the published CSV files of a data set named in `FIELDS`.

    Ids are numbered as `examples.ctr.data.load_parquet` numbers them: by falling training
    frequency, and ids with fewer than ``min_count`` training occurrences, unseen ones included,
    share the last row. BARS keeps every id that training has, hence the default.

    The numbers of Criteo_x1 come normalised. FuxiCTR multiplies one vector a field by them; here
    every field is a table, so they are cut at the hundredths of their training distribution and
    the buckets numbered like ids. (The transform of raw counts that ``load_parquet`` applies to
    ``I1`` to ``I13`` would floor them all to a few values.) Base models thus differ a little from
    the leaderboard's.

    The CSV files are parsed block by block into 4 bytes a value; these and the int64 ids made from
    them take at most 12 bytes a value at the same time: about 22 GB for Criteo_x1, of which 14 GB
    stay.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the data set is unknown, a column is missing, a label is not 0 or 1, or a value
            is no number. The first two, like missing files, are found before data are read.
    """
    files = _files(Path(folder), dataset)
    tables = {split: _read(path, dataset) for split, path in files.items()}
    labels = {split: _labels(table, files[split]) for split, table in tables.items()}
    ids, rows = _number(tables, dataset, min_count)
    return ClickData(
        name=dataset,
        fields=list(FIELDS[dataset]),
        rows=rows,
        ids={split: torch.from_numpy(array) for split, array in ids.items()},
        labels={split: torch.from_numpy(array) for split, array in labels.items()},
    )


def _files(folder: Path, dataset: str) -> dict[str, Path]:
    """The file of each split, after a look at whether all files and columns are there."""
    if dataset not in FIELDS:
        raise ValueError(f"unknown data set {dataset!r}; known are {', '.join(FIELDS)}")
    files = {split: folder / f"{split}.csv" for split in SPLITS}
    for path in files.values():
        if not path.is_file():
            expected = ", ".join(file.name for file in files.values())
            raise FileNotFoundError(f"{path} is missing: {dataset} is a folder with {expected}")
    for path in files.values():
        _check_header(path, dataset)
    return files


def _check_header(path: Path, dataset: str) -> None:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        header = next(csv.reader(lines), [])
    expected = (LABEL, *FIELDS[dataset])
    missing = [name for name in expected if name not in header]
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: "
            f"the first line of {dataset} names {', '.join(expected)}"
        )


def _read(path: Path, dataset: str) -> pa.Table:
    """Label and fields of one file, float32 and int32; an empty cell is null."""
    # Types given, not guessed: guessing would take 8 bytes a value, and the first block's guess.
    numeric = {LABEL, *NUMERIC.get(dataset, ())}
    names = (LABEL, *FIELDS[dataset])
    types = {name: pa.float32() if name in numeric else pa.int32() for name in names}
    options = pacsv.ConvertOptions(column_types=types, include_columns=list(names))
    try:
        return pacsv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: {error}; expected label 0 or 1, numbers in I1 to I13 of Criteo_x1 and "
            "integer ids elsewhere"
        ) from error


def _labels(table: pa.Table, path: Path) -> np.ndarray:
    labels = table[LABEL].to_numpy().copy()  # Arrow's memory is read-only
    strange = labels[(labels != 0) & (labels != 1)]
    if len(strange):
        raise ValueError(f"{path}: {LABEL} holds {strange[0]:g}; expected 0 or 1")
    return labels


def _number(
    tables: dict[str, pa.Table], dataset: str, min_count: int
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Ids (n, F) of each split, and the rows of each field; empties ``tables`` as it goes."""
    fields, numeric = FIELDS[dataset], NUMERIC.get(dataset, ())
    lengths = {split: len(table) for split, table in tables.items()}
    ids = {split: np.empty((n, len(fields)), dtype=np.int64) for split, n in lengths.items()}
    train = np.arange(sum(lengths.values())) < lengths["train"]
    ends, rows = np.cumsum([lengths[split] for split in SPLITS]), []
    for index, name in enumerate(fields):
        # Training first, as in the Parquet files: ties in frequency go to the first seen.
        values = pa.concat_arrays([part for s in SPLITS for part in tables[s][name].chunks])
        for split in SPLITS:
            tables[split] = tables[split].drop_columns([name])
        if name in numeric:
            values = _bucketise(values, train)
        column, count = _encode(values, train, min_count)
        rows.append(count)
        for split, part in zip(SPLITS, np.split(column, ends[:-1]), strict=True):
            ids[split][:, index] = part
    return ids, rows


def _bucketise(values: pa.Array, train: np.ndarray) -> pa.Array:
    """Cut floats (n,) at their training quantiles: int64 (n,), at most `BUCKETS` and null."""
    missing = values.is_null().to_numpy(zero_copy_only=False)
    raw = values.fill_null(0).to_numpy(zero_copy_only=False)
    known = raw[train & ~missing]
    if not len(known):
        known = np.zeros(1, raw.dtype)  # all that valid and test hold is unseen anyway
    steps = np.arange(1, BUCKETS) / BUCKETS
    # Cuts are values that occur, each the end of its bucket, so a frequent value has its own.
    cuts = np.unique(np.quantile(known, steps, method="inverted_cdf"))
    # The last cut may be the maximum; what lies beyond it belongs to the same bucket.
    return pa.array(np.searchsorted(cuts, np.minimum(raw, known.max())), mask=missing)
