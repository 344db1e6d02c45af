"""Say what a compressed file holds, and compare it with its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoints import (
    Checkpoint,
    StoredTensor,
    damaged_tensors,
    open_checkpoint,
    same_values,
    tie,
)
from .compress import row_weights
from .config import POPULARITY
from .counts import read_counts
from .frequency import FrequencyStats
from .layout import CodeLayout
from .modules import DecodedTable
from .offline import keys_of_tables, tables_of
from .outcome import table_error
from .skeleton import FLOATS, Progress, Roles, Skeleton, StreamedTable
from .storage import ORIGIN, read_manifest

#: Error relative to that of the report, and absolute, that is the same error.
_SAME_ERROR = (1e-3, 1e-6)


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a compressed file was made; empty where it was not :func:`compress_file` that made it."""
    if ORIGIN not in checkpoint.metadata:
        return {}
    origin = checkpoint.noted(ORIGIN)
    tables, config = origin.get("tables", {}), origin.get("config", {})
    valid = isinstance(tables, dict) and isinstance(config, dict)
    if not valid or not all(_is_about_a_table(about) for about in tables.values()):
        raise ValueError(f"{checkpoint.path}: its metadata {ORIGIN!r} are damaged")
    return origin


def _is_about_a_table(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and isinstance(about.get("error"), (int, float, type(None)))
        and about.get("popularity") in (*POPULARITY, "uniform")
    )


@dataclass(frozen=True)
class StoredTable:
    """What a compressed file holds of one table: names, layout, bytes, and the error then."""

    names: list[str]
    module: str
    rows: int
    dim: int
    layout: str
    codebook_dtype: str
    code_bytes: int
    codebook_bytes: int
    other_bytes: int
    error: float | None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.code_bytes + self.codebook_bytes + self.other_bytes


def stored_tables(checkpoint: Checkpoint) -> list[StoredTable]:
    """The tables of a compressed file; tensors that are shared count with the first of them."""
    manifest = read_manifest(checkpoint.path)
    errors = origin_of(checkpoint).get("tables", {})
    try:
        keys = keys_of_tables(checkpoint.tensors, manifest)
        return [_stored_table(entry, keys, checkpoint, errors) for entry in manifest["tables"]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: the manifest is damaged ({error!r})") from error


def _stored_table(
    entry: dict[str, Any],
    keys: Mapping[str, list[str]],
    checkpoint: Checkpoint,
    errors: Mapping[str, Any],
) -> StoredTable:
    parts = entry.get("tiers", [entry])
    layouts = [
        CodeLayout.from_dict(part["layout"] | {"codebook_dtype": part["codebook_dtype"]})
        for part in parts
    ]
    nbytes = dict.fromkeys(("codes", "codebooks", "scales", "map"), 0)
    for key in (key for name in entry["names"] for key in keys[name]):
        last = key.rpartition(".")[2]
        nbytes[last if last in nbytes else "map"] += checkpoint.tensors[key].nbytes
    return StoredTable(
        names=entry["names"],
        module=entry["module"],
        rows=sum(layout.num_embeddings for layout in layouts),
        dim=layouts[0].embedding_dim,
        layout=" | ".join(layout.describe() for layout in layouts),
        codebook_dtype=parts[0]["codebook_dtype"],
        code_bytes=nbytes["codes"],
        codebook_bytes=nbytes["codebooks"] + nbytes["scales"],
        other_bytes=nbytes["map"],
        error=errors.get(entry["names"][0], {}).get("error"),
    )


@dataclass(frozen=True)
class TableErrors:
    """Errors of one table: squared, relative to the variance of its rows.

    Attributes:
        name: of the table.
        weighted: by popularity; None where the counts are not given.
        unweighted: all rows alike.
        reported: by popularity, as found when the file was made; None where the file does not say.
    """

    name: str
    weighted: float | None
    unweighted: float
    reported: float | None

    def problems(self, max_error: float | None) -> Iterator[str]:
        """What is not as it should be."""
        error = self.unweighted if self.weighted is None else self.weighted
        kind = "unweighted" if self.weighted is None else "weighted"
        if not math.isfinite(error):
            yield (
                f"table {self.name!r}: {kind} error {error}, expected a finite one; the checkpoint "
                "holds NaN or infinity in it"
            )
            return
        if max_error is not None and not error <= max_error:
            yield (
                f"table {self.name!r}: {kind} error {error:.6g} is above --max-error {max_error:g}"
            )
        if self.weighted is None or self.reported is None:
            return
        relative, absolute = _SAME_ERROR
        if not abs(self.weighted - self.reported) <= relative * self.reported + absolute:
            yield (
                f"table {self.name!r}: weighted error {self.weighted:.6g}, expected "
                f"{self.reported:.6g} as when it was compressed; the checkpoint or the counts are "
                "others"
            )


@dataclass
class Verified:
    """What :func:`verify_file` found; ``differences`` is empty where all is well."""

    tables: list[TableErrors] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_file(
    path: str | Path,
    checkpoint_path: str | Path,
    *,
    counts: Path | None = None,
    columns: Mapping[str, str] | None = None,
    max_error: float | None = None,
    tables_only: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Compare a compressed file with the checkpoint that it was made from, in pieces.

    Args:
        path: the compressed file.
        checkpoint_path: the checkpoint.
        counts: see :func:`read_counts`; needed for weighted errors.
        columns: see :func:`read_counts`.
        max_error: larger errors of a table (weighted, if known) are differences.
        tables_only: leave out tensors that are no tables, for a model that was trained since.
        progress: told what goes on.
    """
    small, checkpoint = open_checkpoint(path), open_checkpoint(checkpoint_path)
    comparison = _Comparison(small, checkpoint, progress or Progress())
    comparison.checksums()
    comparison.tables(counts, columns or {})
    if not tables_only:
        comparison.other_tensors()
    found = comparison.found
    found.differences += [text for table in found.tables for text in table.problems(max_error)]
    return found


class _Comparison:
    """Fills what was found, step by step."""

    def __init__(self, small: Checkpoint, checkpoint: Checkpoint, progress: Progress) -> None:
        self.small, self.checkpoint, self.progress = small, checkpoint, progress
        self.manifest = read_manifest(small.path)
        self.found = Verified()
        tie(checkpoint, [entry["names"] for entry in self.manifest["tables"]])
        #: Key of each table in the checkpoint, and its name.
        names = [entry["names"][0] for entry in self.manifest["tables"]]
        self.dense_keys = {f"{name}.weight": name for name in names}

    def checksums(self) -> None:
        """Bytes must be those that were written."""
        with self.progress.stage("checking the file", self.small.nbytes):
            damaged = damaged_tensors(self.small, self.progress.advance)
        if damaged is None:
            text = f"{self.small.path} holds no checksums: mec_embed.save() writes none"
            self.found.notes.append(text)
        for key in damaged or ():
            self.found.differences.append(f"{key}: its bytes are not those that were written")

    def tables(self, counts: Path | None, columns: Mapping[str, str]) -> None:
        """Tables must have the errors that were reported."""
        modules, origin = tables_of(self.small, self.manifest), origin_of(self.small)
        chosen = {
            self.dense_keys[key]: stored
            for key, stored in self.checkpoint.tensors.items()
            if key in self.dense_keys and len(stored.shape) == 2 and stored.dtype in FLOATS
        }
        zero = origin.get("config", {}).get("nonfinite") == "zero"
        skeleton = Skeleton(self.checkpoint, chosen, Roles(), self.progress.advance, zero)
        stats = None if counts is None else read_counts(counts, skeleton, columns, self.progress)
        tables = {table.name: table for table in skeleton.tables}
        with self.progress.stage("comparing tables", 2 * skeleton.nbytes):
            for name, module in modules.items():
                about = origin.get("tables", {}).get(name, {})
                self._table(name, module, tables.get(name), about, stats)

    def _table(
        self,
        name: str,
        module: DecodedTable,
        table: StreamedTable | None,
        about: Mapping[str, Any],
        stats: FrequencyStats | None,
    ) -> None:
        expected = (module.num_embeddings, module.embedding_dim)
        if table is None or table.stored.shape != expected:
            shape = "no such table" if table is None else table.stored.shape
            self.found.differences.append(f"table {name!r}: found {shape}, expected {expected}")
            return
        unweighted = table_error(module, table, torch.ones(table.rows))
        weighted = unweighted if about.get("popularity") == "uniform" else None
        if weighted is None and stats is not None and name in stats:
            kind = about.get("popularity", "sqrt")
            weights = row_weights(table.rows, stats[name], kind, 1.0)
            weighted = table_error(module, table, weights)
        if weighted is None:
            self.found.notes.append(f"table {name!r}: no counts, so no weighted error")
        self.found.tables.append(TableErrors(name, weighted, unweighted, about.get("error")))

    def other_tensors(self) -> None:
        """Tensors that are no tables must be those of the checkpoint, to the bit."""
        small, checkpoint, shared = self.small, self.checkpoint, self.manifest["shared"]
        coded = keys_of_tables([*small.tensors, *shared], self.manifest)
        ours = _all_tensors(small.tensors, shared)
        theirs = _all_tensors(checkpoint.tensors, checkpoint.shared)
        tables = {key for keys in coded.values() for key in keys}
        others = (key for key, first in checkpoint.shared.items() if first in self.dense_keys)
        left_out = self.dense_keys.keys() | others
        in_tables = sum(theirs[key].nbytes for key in self.dense_keys if key in theirs)
        with self.progress.stage("comparing other tensors", checkpoint.nbytes - in_tables):
            for key in sorted((ours.keys() - tables) | (theirs.keys() - left_out)):
                if key not in ours or key not in theirs:
                    where = small.path if key not in ours else checkpoint.path
                    self.found.differences.append(f"{key}: {where} does not hold it")
                elif not same_values(ours[key], theirs[key], self.progress.advance):
                    self.found.differences.append(f"{key}: differs from that of the checkpoint")


def _all_tensors(
    tensors: Mapping[str, StoredTensor], shared: Mapping[str, str]
) -> dict[str, StoredTensor]:
    return {**tensors, **{k: tensors[first] for k, first in shared.items() if first in tensors}}
