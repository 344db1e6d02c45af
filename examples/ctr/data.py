"""Click data in memory, and the loader that reads it from a Parquet file."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

SPLITS = ("train", "valid", "test")
NUMERIC_NAME = re.compile(r"I\d+")


@dataclass
class ClickData:
    """Labelled examples of categorical fields, split into train, valid and test.

    Attributes:
        name: name of the data set.
        fields: field names, F of them.
        rows: embedding rows of each field; every id of field f is in ``[0, rows[f])``.
        ids: for each split an int64 tensor (n, F).
        labels: for each split a float32 tensor (n,) of 0 and 1.
        best_auc: test AUC of the true click probabilities where they are known.
    """

    name: str
    fields: list[str]
    rows: list[int]
    ids: dict[str, Tensor]
    labels: dict[str, Tensor]
    best_auc: float | None = None


def load_parquet(path: str | Path, min_count: int = 2) -> ClickData:
    """Read columns ``label``, ``split`` and one column a field from a Parquet file.

    Each field's ids are numbered by falling training frequency, so row 0 is the most frequent.
    Values with fewer than ``min_count`` training occurrences, unseen ones included, share one
    out-of-vocabulary row, the last of the field. A null is a value like any other.

    Numeric fields are recognised by name and type: ``I`` followed by digits (Criteo's naming) in
    an integer or floating column. They are bucketised before they are numbered.
    """
    table = pq.read_table(path).combine_chunks()
    split = table["split"].to_numpy()
    masks = {name: split == name for name in SPLITS}
    fields = [name for name in table.column_names if name not in ("label", "split")]
    encoded = [_encode(_values(table, name), masks["train"], min_count) for name in fields]
    ids = np.stack([column for column, _ in encoded], axis=1)
    labels = table["label"].to_numpy().astype(np.float32)
    return ClickData(
        name=Path(path).stem,
        fields=fields,
        rows=[rows for _, rows in encoded],
        ids={name: torch.from_numpy(ids[mask]) for name, mask in masks.items()},
        labels={name: torch.from_numpy(labels[mask]) for name, mask in masks.items()},
    )


def counts(data: ClickData) -> dict[str, np.ndarray]:
    """Training occurrences of every row: for each field an int64 array (rows,)."""
    ids = data.ids["train"].numpy()
    return {
        name: np.bincount(ids[:, index], minlength=rows)
        for index, (name, rows) in enumerate(zip(data.fields, data.rows, strict=True))
    }


def _values(table: pa.Table, name: str) -> pa.Array:
    """The raw values (n,) of one field, bucketised if the field is numeric."""
    values = pa.concat_arrays(table[name].chunks)
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return _bucketise(values) if NUMERIC_NAME.fullmatch(name) and is_number else values


def _bucketise(values: pa.Array) -> pa.Array:
    """Map x > 2 to floor(log(x)^2) and other x to floor(x), the usual Criteo transform; int64 (n,).

    Buckets start at 1 for x > 2 (log(3)^2 = 1.2) and so meet the small values, as is customary.
    """
    missing = values.is_null().to_numpy(zero_copy_only=False)
    raw = values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    buckets = np.where(raw > 2, np.log(np.maximum(raw, 1)) ** 2, raw)
    return pa.array(np.floor(buckets).astype(np.int64), mask=missing)


def _encode(values: pa.Array, train: np.ndarray, min_count: int) -> tuple[np.ndarray, int]:
    """Number values by falling training frequency: int64 ids (n,), and the number of rows."""
    # Encoding nulls as a dictionary entry of their own makes them a value like any other.
    coded = values.dictionary_encode(null_encoding="encode")
    codes = coded.indices.to_numpy()
    frequency = np.bincount(codes[train], minlength=len(coded.dictionary))
    order = np.argsort(-frequency, kind="stable")
    kept = int((frequency >= max(min_count, 1)).sum())
    row_of = np.full(len(frequency), kept, dtype=np.int64)
    row_of[order[:kept]] = np.arange(kept)
    return row_of[codes], kept + 1
