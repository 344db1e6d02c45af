"""How often each row of each table is used in training."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .forward import Forward, check_batches, default_forward, eager, eval_mode
from .modules import check_gathered
from .ranks import Ranks
from .shards import is_dtensor
from .tables import find_lookups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: Bytes of a parquet file's column that are read at once.
_BUFFER_BYTES = 1 << 20
#: Largest count of a row: sums of products with it must stay within float32.
MOST_COUNT = 1e19


class FrequencyStats:
    """Popularity: for each table, how often each of its rows occurs in the training data.

    Make one with :meth:`from_batches`, :meth:`from_columns`, :meth:`from_parquet`,
    :meth:`from_count_tables` or :meth:`from_counts`; ``a + b`` adds partial counts,
    :meth:`all_reduce` those of several ranks.

    Example:
        >>> stats = FrequencyStats.from_counts({"user": [5, 0, 1]})
        >>> stats["user"]
        array([5., 0., 1.])
    """

    def __init__(self, counts: Mapping[str, np.ndarray]) -> None:
        """Use the ``from_*`` constructors."""
        self._counts = dict(counts)

    def __getitem__(self, name: str) -> np.ndarray:
        """Counts (rows,) of the table ``name``."""
        return self._counts[name]

    def __contains__(self, name: str) -> bool:
        """Whether there are counts under this name."""
        return name in self._counts

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._counts)

    def keys(self) -> KeysView[str]:
        """The names, for ``dict(stats)`` and ``np.savez("counts.npz", **stats)``."""
        return self._counts.keys()

    def __len__(self) -> int:
        """Number of tables with counts."""
        return len(self._counts)

    def __repr__(self) -> str:
        """Names and total counts."""
        totals = ", ".join(f"{name}: {counts.sum():.0f}" for name, counts in self._counts.items())
        return f"FrequencyStats({totals})"

    def __add__(self, other: FrequencyStats) -> FrequencyStats:
        """Counts of both, added; ValueError where two tables of one name differ in rows."""
        if not isinstance(other, FrequencyStats):
            return NotImplemented
        total = dict(self._counts)
        for name, counts in other._counts.items():
            if name in total and total[name].shape != counts.shape:
                raise ValueError(
                    f"table {name!r}: cannot add counts of {len(counts)} rows to counts of "
                    f"{len(total[name])} rows"
                )
            total[name] = total[name] + counts if name in total else counts
        return FrequencyStats(total)

    def all_reduce(self, process_group: ProcessGroup) -> FrequencyStats:
        """The counts of all ranks of ``torch.distributed``, added; every rank gets them.

        Args:
            process_group: all of its ranks call, each with the counts of its part of the data.

        Raises:
            ValueError: ranks that differ in tables or rows. RuntimeError: a rank has ended.

        Example:
            >>> stats = FrequencyStats.from_batches(model, part_of_this_rank)  # doctest: +SKIP
            >>> stats = stats.all_reduce(dist.group.WORLD)  # doctest: +SKIP
        """
        with Ranks(process_group).guard() as ranks:
            facts = {
                f"table {name!r}": f"{len(counts)} rows" for name, counts in self._counts.items()
            }
            ranks.agree(facts, "comparing counts")
            return FrequencyStats(
                {
                    name: ranks.add(torch.from_numpy(self[name]), f"adding up {name!r}").numpy()
                    for name in sorted(self)
                }
            )

    @classmethod
    def from_counts(cls, counts: Mapping[str, Any]) -> FrequencyStats:
        """From counts (rows,) for each table name: arrays, tensors or lists.

        Raises:
            ValueError: counts that are not one-dimensional, negative, NaN or infinite.
        """
        return cls({name: _checked(name, values) for name, values in counts.items()})

    @classmethod
    def from_batches(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        forward: Forward = default_forward,
    ) -> FrequencyStats:
        """Count the ids that reach each table while ``model`` reads ``batches``.

        The model runs in eval mode without gradient; padding ids count zero; tables looked up by
        several features sum them.

        Args:
            model: any model; its weights are not changed.
            batches: for instance a DataLoader.
            forward: how to call the model on a batch. By default ``model(batch)``, and
                ``model(batch[0])`` where a batch is a tuple or list such as ``(inputs, labels)``.

        Raises:
            ValueError: the model holds no embedding, or no batch reached one.
        """
        check_batches(batches)
        counter = IdCounter(model)
        with _counting(model, counter), torch.no_grad():
            for batch in batches:
                forward(model, batch)
        if not any(values.any() for values in counter.counts.values()):
            raise ValueError("no ids were counted: batches is empty or reached no embedding")
        return cls(counter.counts)

    @classmethod
    def from_columns(cls, model: nn.Module, columns: Mapping[str, Any]) -> FrequencyStats:
        """Count ids that are at hand as arrays.

        Args:
            model: names the tables and their rows.
            columns: table name (or its unambiguous last part) -> integer ids of any shape.

        Raises:
            ValueError: an unknown table name.
            IndexError: an id that is no row of its table.
        """
        counter = IdCounter(model)
        for name, values in columns.items():
            counter.add_by_name(name, values)
        return cls(counter.counts)

    @classmethod
    def from_parquet(
        cls, model: nn.Module, path: str | Path, columns: Mapping[str, str]
    ) -> FrequencyStats:
        """Count encoded ids in a parquet file, read in pieces (needs pyarrow).

        Args:
            model: names the tables and their rows.
            path: the file.
            columns: column of the file -> table name; several columns may share a table. List
                columns (sequences) are flattened, nulls left out.

        Raises:
            ValueError: an unknown table or column.
            IndexError: an id that is no row of its table.
            RuntimeError: pyarrow is not installed.
        """
        counter = IdCounter(model)
        for columns_of in parquet_columns(path, columns):
            for column, ids in columns_of.items():
                counter.add_by_name(columns[column], ids)
        return cls(counter.counts)

    @classmethod
    def from_count_tables(
        cls,
        model: nn.Module,
        tables: Mapping[str, str | Path],
        *,
        id_column: str = "id",
        count_column: str = "count",
    ) -> FrequencyStats:
        """Add up counts that a cluster has made: one line an id, read in pieces (needs pyarrow).

        Such files are what ``GROUP BY id`` gives in Spark, DuckDB or Polars; parts of a folder,
        and lines of the same id, are added.

        Args:
            model: names the tables and their rows.
            tables: table name -> a parquet file, or a folder of them.
            id_column: name of the column of ids, integers.
            count_column: name of the column of their counts.

        Raises:
            ValueError: an unknown table or column, a folder without parquet files, a null, or a
                count that is negative or not finite.
            IndexError: an id that is no row of its table.
            RuntimeError: pyarrow is not installed.

        Example:
            >>> stats = FrequencyStats.from_count_tables(model, {"item": "counts/item"})
            ... # doctest: +SKIP
        """
        counter = IdCounter(model)
        for name, path in tables.items():
            for file in _parquet_files(path):
                for batch in _record_batches(file, [id_column, count_column]):
                    ids, counts = (
                        _without_nulls(name, file, column, batch[column])
                        for column in (id_column, count_column)
                    )
                    counter.add_by_name(name, ids, counts)
        return cls(counter.counts)


def _parquet_files(path: str | Path) -> list[Path]:
    path = Path(path)
    files = [path]
    if path.is_dir():
        found = sorted(path.rglob("*.parquet"))
        files = [file for file in found if not _is_hidden(file.relative_to(path))]
    if not files:
        raise ValueError(f"{path} holds no parquet file; expected files that end in .parquet")
    return files


def _is_hidden(path: Path) -> bool:
    """What Spark and others pass over, such as what a run that failed has left."""
    return any(part.startswith(("_", ".")) for part in path.parts)


def parquet_columns(path: str | Path, columns: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Flat ids of some columns of a parquet file, piece by piece.

    Raises:
        ValueError: a column is missing.
        RuntimeError: pyarrow is not installed.
    """
    wanted = sorted(columns)
    for batch in _record_batches(path, wanted):
        yield {
            column: _flattened(batch[column]).drop_null().to_numpy(zero_copy_only=False)
            for column in wanted
        }


def _record_batches(path: str | Path, wanted: list[str]) -> Iterator[Any]:
    """Record batches of some columns of a parquet file; raises as :func:`parquet_columns`."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RuntimeError("reading parquet needs pyarrow: pip install pyarrow") from error
    # By default, all pages of the columns are read before the first batch.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        missing = sorted(set(wanted) - set(file.schema_arrow.names))
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; "
                f"it has {', '.join(file.schema_arrow.names)}"
            )
        yield from file.iter_batches(batch_size=1 << 16, columns=wanted)


def _flattened(array: Any) -> Any:
    """An arrow column whose lists, of any depth, follow each other."""
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        array = array.flatten()
    return array


def _without_nulls(name: str, path: Path, column: str, array: Any) -> np.ndarray:
    """The numbers of an arrow column; ValueError for a null: ids and counts would not pair."""
    flat = _flattened(array)
    if array.null_count or flat.null_count:
        raise ValueError(
            f"table {name!r}: column {column!r} of {path} holds a null, expected an id and a count "
            "in each line; leave such lines out"
        )
    numbers: np.ndarray = flat.to_numpy(zero_copy_only=False)
    return numbers


def _checked(name: str, values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        counts = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        found = reprlib.repr(values)
        raise ValueError(f"table {name!r}: counts must be numbers, got {found}") from error
    if counts.ndim != 1:
        raise ValueError(f"table {name!r}: counts must have shape (rows,), got {counts.shape}")
    wrong = ~((counts >= 0) & (counts <= MOST_COUNT))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"table {name!r}: counts must be finite and not negative, got {counts[row]} in row "
            f"{row}; at most {MOST_COUNT:.0e} is possible"
        )
    return counts


def _tables_by_name(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Every accepted name of a table -> (qualified name, module)."""
    full: dict[str, tuple[str, Any]] = {}
    short: dict[str, list[tuple[str, Any]]] = {}
    for module, aliases in find_lookups(model):
        entry = (aliases[0].name, module)
        full.update({alias.name: entry for alias in aliases})
        for last in {alias.name.rpartition(".")[2] for alias in aliases}:
            short.setdefault(last, []).append(entry)
    return {name: entries[0] for name, entries in short.items() if len(entries) == 1} | full


class IdCounter:
    """Adds up how often each row of a model's tables is looked up; padding counts zero.

    Attributes:
        counts: qualified table name -> counts (rows,) float64 of the tables counted so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, np.ndarray] = {}
        self._by_name = _tables_by_name(model)
        self._names = {id(module): name for name, module in self._by_name.values()}

    def add_by_name(self, name: str, values: Any, weights: Any = None) -> None:
        """Count integer ids of any shape for the table of this name, or its last part."""
        if name not in self._by_name:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise ValueError(f"no table is named {name!r}; the model has {known}")
        self.add(self._by_name[name][1], values, name, weights)

    def add(self, module: Any, values: Any, name: str | None = None, weights: Any = None) -> None:
        """Count integer ids of any shape for a table of the model, each so often as weights say."""
        qualified = self._names[id(module)]
        if is_dtensor(values):
            values = values.to_local()
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        ids = np.asarray(values).reshape(-1)
        rows = module.num_embeddings
        total = self.counts.setdefault(qualified, np.zeros(rows))
        if not ids.size:
            return
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"table {name or qualified!r}: ids must be integers, got {ids.dtype}")
        unknown = getattr(module, "oov_row", None)  # of a compressed table
        if unknown is not None:
            ids = np.where((ids < 0) | (ids >= rows), unknown, ids.astype(np.int64))
        low, high = ids.min(), ids.max()
        if low < 0 or high >= rows:
            found = low if low < 0 else high
            raise IndexError(
                f"table {name or qualified!r}: id {found} is out of range, expected 0..{rows - 1}"
            )
        if weights is None:
            np.add.at(total, ids, 1.0)
        else:
            if len(weights) != len(ids):
                raise ValueError(
                    f"table {name or qualified!r}: {len(ids)} ids and {len(weights)} counts, "
                    "expected one for each; count each id in a line of its own"
                )
            np.add.at(total, ids, _checked(name or qualified, weights))
        if module.padding_idx is not None:
            total[module.padding_idx] = 0


@contextmanager
def _counting(model: nn.Module, counter: IdCounter) -> Iterator[None]:
    """While open, every lookup is counted; mode and hooks are put back after."""
    check_gathered(model)
    handles = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter.add(module, args[0] if args else kwargs["input"])

    for module, _ in find_lookups(model):
        counter.add(module, ())
        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    if not handles:
        raise ValueError(
            "the model holds no nn.Embedding, nn.EmbeddingBag or compressed table to count ids for"
        )
    try:
        with eager(), eval_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def counts_for_tables(
    freq_stats: FrequencyStats | Mapping[str, Any] | None,
    tables: list[tuple[tuple[str, ...], int]],
    other_names: list[str],
) -> list[np.ndarray | None]:
    """Counts (rows,) of each table, None where there are none.

    Args:
        freq_stats: as :func:`mec_embed.compress` takes it.
        tables: (all qualified names, rows) of each table.
        other_names: names of tables that are not compressed; counts for them are allowed.

    Raises:
        TypeError: another type.
        ValueError: an unknown or ambiguous name, a wrong length.
    """
    if freq_stats is None:
        return [None] * len(tables)
    if not isinstance(freq_stats, FrequencyStats):
        if not isinstance(freq_stats, Mapping):
            raise TypeError(
                "freq_stats must be a FrequencyStats, a mapping from table name to counts, or "
                f"None, got {type(freq_stats).__name__}"
            )
        freq_stats = FrequencyStats.from_counts(freq_stats)
    owners = _owners([names for names, _ in tables], other_names)
    found: list[np.ndarray | None] = [None] * len(tables)
    for name in freq_stats:
        index = _owner_of(name, owners)
        if index is None:
            continue
        rows, counts = tables[index][1], freq_stats[name]
        if len(counts) != rows:
            raise ValueError(
                f"table {tables[index][0][0]!r}: counts must have one entry a row, got "
                f"{len(counts)} for {rows} rows; count the ids as the model sees them"
            )
        if found[index] is not None:
            raise ValueError(
                f"table {tables[index][0][0]!r}: counts are given twice, one under {name!r}"
            )
        found[index] = counts
    return found


def _owners(names: list[tuple[str, ...]], other_names: list[str]) -> dict[str, set[int | None]]:
    """Accepted name -> tables (None: one that is not compressed) it may mean."""
    owners: dict[str, set[int | None]] = {}
    everything: list[tuple[int | None, str]] = [
        (index, name) for index, group in enumerate(names) for name in group
    ]
    everything += [(None, name) for name in other_names]
    for index, name in everything:
        owners.setdefault(name.rpartition(".")[2], set()).add(index)
    for index, name in everything:
        owners[name] = {index}
    return owners


def _owner_of(name: str, owners: dict[str, set[int | None]]) -> int | None:
    if name not in owners:
        known = ", ".join(sorted(full for full in owners))
        raise ValueError(f"freq_stats names {name!r}, which is no table of the model: {known}")
    if len(owners[name]) > 1:
        raise ValueError(
            f"freq_stats names {name!r}, which is the last part of several tables; use the "
            "qualified name"
        )
    return next(iter(owners[name]))
