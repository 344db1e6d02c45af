"""Find the tables of any model, and say why some stay as they are."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes

import torch
from torch import Tensor, nn

from .adapters import adapted
from .config import CompressionConfig
from .layout import dtype_name
from .modules import DecodedTable, check_gathered
from .ranks import ALONE, Ranks
from .shards import Shard, is_dtensor, part_of_dtensor, shards_of

#: Rows looked at in one go while checking.
CHECK_ROWS = 1 << 14
#: Largest entry of a row: sums of squares must stay within float32.
LARGEST = 1e15
#: Bytes of float32 rows that a GPU looks at in one go: the host waits for the answer.
DEVICE_BYTES = 64 << 20

_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
#: Where hooks of ``fully_shard`` are defined.
_FSDP = "torch.distributed.fsdp."
#: What holds no table, or is told of a swap in another way.
_NO_HOLDERS = (
    *ProxyTypes,
    *(str, bytes, int, float, type, ModuleType, FunctionType, torch.optim.Optimizer),
)
#: Values that an attribute is searched through, at most.
_MOST_VALUES = 100_000
#: What a module holds of its own: tensors, submodules and hooks.
_MODULE_DICTS = frozenset(vars(nn.Module()))
_WRAPPERS = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DataParallel",
)


@dataclass(frozen=True)
class Alias:
    """One place that holds a module: ``parent._modules[attribute]``."""

    parent: nn.Module
    attribute: str
    name: str


@dataclass(frozen=True, eq=False)
class Table:
    """One embedding table of a model, under every name it has.

    Attributes:
        module: the dense module.
        aliases: where the model holds it.
        ranks: the processes that work on the table.
        shard: what this one holds of a sharded table; None where it holds all rows.
        zero_nonfinite: whether NaN and infinite entries are read as zero.
    """

    module: nn.Embedding | nn.EmbeddingBag
    aliases: tuple[Alias, ...] = field(repr=False)
    ranks: Ranks = field(default=ALONE, repr=False, kw_only=True)
    shard: Shard | None = field(default=None, repr=False, kw_only=True)
    zero_nonfinite: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """Qualified name of the first alias."""
        return self.aliases[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of all aliases."""
        return tuple(alias.name for alias in self.aliases)

    @property
    def weight(self) -> Tensor:
        """The dense table (rows, dim)."""
        return self.module.weight

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Columns of the table."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense table."""
        return self.weight.nbytes

    @property
    def device(self) -> torch.device:
        """Where rows are read to."""
        return self.weight.device if self.shard is None else self.shard.rows.device

    @property
    def bounds(self) -> tuple[int, int]:
        """First row and end of what this rank does of work that is shared between ranks."""
        if self.shard is None:
            return self.ranks.part(self.rows)
        return self.shard.bounds[self.ranks.rank]

    def at_once(self, size: int) -> int:
        """Rows to work on in one go: ``size`` on the CPU, more on other devices."""
        if self.device.type == "cpu":
            return size
        return max(size, DEVICE_BYTES // (4 * self.dim))

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """``bounds`` in parts of at most ``size`` rows, or of what a GPU takes in one go."""
        first, end = self.bounds
        size = self.at_once(size)
        for start in range(first, end, size):
            yield start, min(start + size, end)

    def piece(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, within ``bounds``."""
        return self.repaired(self.stored_piece(start, stop))

    def read(self, ids: Tensor) -> Tensor:
        """Rows (n, dim) of ``ids`` (n,), within ``bounds``."""
        return self.repaired(self.stored_read(ids))

    def repaired(self, rows: Tensor) -> Tensor:
        """Rows (..., dim), other entries for those that are NaN or infinite if asked for."""
        return rows.nan_to_num(0, 0, 0) if self.zero_nonfinite else rows

    def stored_piece(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, within ``bounds``, as they are."""
        if self.shard is None:
            return self.weight.detach()[start:stop]
        first = self.bounds[0]
        return self.shard.rows[start - first : stop - first]

    def stored_read(self, ids: Tensor) -> Tensor:
        """Rows (n, dim) of ``ids`` (n,), within ``bounds``, as they are."""
        if self.shard is None:
            return self.weight.detach()[ids.to(self.device)]
        return self.shard.rows[(ids - self.bounds[0]).to(self.device)]

    def read_any(self, ids: Tensor) -> Tensor:
        """Rows (n, dim) of any ``ids`` (n,); all ranks ask for the same and get the same."""
        if self.shard is None:
            return self.read(ids)
        first, end = self.bounds
        own = (ids >= first) & (ids < end)
        rows = torch.zeros(len(ids), self.dim, dtype=self.weight.dtype)
        rows[own] = self.read(ids[own]).to(rows.device)
        return self.ranks.merge(rows, f"reading rows of table {self.name!r}").to(self.device)

    def whole(self) -> Tensor:
        """All rows (rows, dim), on every rank; a view where this rank holds them."""
        if self.shard is None:
            return self.piece(0, self.rows)
        rows = torch.zeros(self.rows, self.dim, dtype=self.weight.dtype)
        first, end = self.bounds
        rows[first:end] = self.piece(first, end).to(rows.device)
        return self.ranks.merge(rows, f"gathering table {self.name!r}").to(self.device)

    @property
    def zero_padding(self) -> bool:
        """Whether the padding row exists and is exactly zero."""
        padding_idx = self.module.padding_idx
        return padding_idx is not None and not bool(
            self.read_any(torch.tensor([padding_idx])).any()
        )


@dataclass(frozen=True)
class SkippedTable:
    """A table that stays as it is, and why."""

    name: str
    rows: int
    dim: int
    nbytes: int
    reason: str
    dtype: str = "none"
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the table."""
        return (self.name, *self.aliases)


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def find_modules(
    model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[Any, tuple[Alias, ...]]]:
    """Every module of these kinds (subclasses too) once, with all places that hold it."""
    places: dict[int, list[Alias]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if isinstance(child, kinds):
                alias = Alias(parent, attribute, f"{prefix}.{attribute}" if prefix else attribute)
                modules[id(child)] = child
                places[id(child)].append(alias)
    for key, module in modules.items():
        yield module, tuple(places[key])


def find_lookups(model: nn.Module) -> list[tuple[Any, tuple[Alias, ...]]]:
    """Every table that ids are looked up in, dense or replaced, with all places that hold it."""
    return [*find_modules(model, EMBEDDINGS), *find_replacements(model)]


def find_replacements(model: nn.Module) -> Iterator[tuple[DecodedTable, tuple[Alias, ...]]]:
    """Every replacement of a table once, with all places that hold it; tiers are parts of one.

    So is what a table whose codes are in parts holds of them.
    """
    for module, aliases in find_modules(model, (DecodedTable,)):
        if not isinstance(aliases[0].parent, DecodedTable):
            yield module, aliases


def plain_model(model: Any) -> Any:
    """What ``torch.compile`` wrapped as a whole."""
    return model._orig_mod if _is_compiled(model) else model


def _is_compiled(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule"


def check_model(model: Any) -> None:
    """Raise for what no table can be replaced in."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    inner = plain_model(model)
    if isinstance(inner, EMBEDDINGS):
        raise ValueError(
            f"model is itself an {type(inner).__name__} and cannot be replaced in place; pass the "
            "module that holds it, for instance nn.Sequential(embedding)"
        )
    for adapter, module, name in adapted(model):
        adapter.check(module, name)
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            where = f"{name!r}" if name else "model"
            raise ValueError(
                f"{where} is a {type(module).__name__}, which has taken hold of the parameters; "
                "pass the module inside it and wrap the result again"
            )
    check_gathered(model)


def find_tables(
    model: nn.Module,
    config: CompressionConfig,
    ranks: Ranks = ALONE,
    shards: Mapping[nn.Module, Shard] | None = None,
) -> tuple[list[Table], list[SkippedTable]]:
    """The tables to compress, and those that stay as they are with the reason.

    Args:
        model: that holds them.
        config: says which.
        ranks: the processes that work on them.
        shards: what this one holds of modules without values.

    Raises:
        ValueError: a table on the meta device, one that is sharded in another way than over the
            ranks, tables that differ between ranks, or no table to compress (all seen are listed).
    """
    check_model(model)
    shards = shards or {}
    tables, skipped = [], []
    reasons = reasons_to_stay(model, config)
    counted: set[int] = set()
    for module, aliases in find_modules(model, EMBEDDINGS):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            skipped.append(SkippedTable(aliases[0].name, 0, 0, 0, "has no weight tensor"))
            continue
        if weight.is_meta and module not in shards:
            raise ValueError(
                f"table {aliases[0].name!r} is on the meta device and holds no values; load the "
                "trained weights before compressing"
            )
        reason = reasons.get(id(module))
        if reason:
            table = untouched(module, aliases, reason)
            # Tied tables are one tensor: its bytes count with the first.
            shared = bool(table.nbytes) and _storage(weight) in counted
            skipped.append(replace(table, nbytes=0) if shared else table)
            counted.add(_storage(weight))
        else:
            zero, shard = config.nonfinite == "zero", shards.get(module)
            found = Table(module, aliases, ranks=ranks, shard=shard, zero_nonfinite=zero)
            tables.append(found)
    if not tables:
        raise ValueError(_nothing_matched(model, skipped))
    facts = {f"table {t.name!r}": _described(t) for t in tables}
    facts |= {f"table {t.name!r}": f"{t.rows} x {t.dim} {t.dtype}, {t.reason}" for t in skipped}
    ranks.agree(facts, "comparing tables")
    return with_shards(tables, ranks), skipped


def reasons_to_stay(model: nn.Module, config: CompressionConfig) -> dict[int, str]:
    """``id`` of each dense table that stays as it is -> why."""
    holders = _storage_holders(model)
    found = _held_elsewhere(model)
    for module, aliases in find_modules(model, EMBEDDINGS):
        reason = _reason_to_skip(module, aliases, holders, config)
        if reason:
            found[id(module)] = reason
    return found


def with_shards(tables: Sequence[Table], ranks: Ranks) -> list[Table]:
    """The tables, each that is a DTensor with what this rank holds of it; all ranks call."""
    sharded = [table for table in tables if is_dtensor(table.weight)]
    parts = {table.name: part_of_dtensor(table.name, table.weight, ranks) for table in sharded}
    held = shards_of(parts, ranks)
    return [replace(t, shard=held[t.name]) if t in sharded else t for t in tables]


def _described(table: Table) -> str:
    kind = ", sharded" if table.shard or is_dtensor(table.weight) else ""
    return f"{table.rows} x {table.dim} {dtype_name(table.weight.dtype)}{kind}"


def untouched(module: nn.Module, aliases: tuple[Alias, ...], reason: str) -> SkippedTable:
    """A table that stays as it is, for this reason."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    names = tuple(alias.name for alias in aliases)
    return SkippedTable(
        names[0],
        module.num_embeddings,  # type: ignore[arg-type]
        module.embedding_dim,  # type: ignore[arg-type]
        weight.nbytes,
        reason,
        dtype_name(weight.dtype),
        names[1:],
    )


def _nothing_matched(model: nn.Module, skipped: list[SkippedTable]) -> str:
    done = [aliases[0].name for _, aliases in find_replacements(model)]
    if done:
        return (
            f"no table to compress: {', '.join(done)} are compressed already; call "
            "decompress(model) first to compress them anew"
        )
    if not skipped:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        return (
            "no table to compress: the model holds no nn.Embedding or nn.EmbeddingBag, only "
            f"{', '.join(kinds)}"
        )
    seen = "; ".join(
        f"{table.name} ({table.rows} x {table.dim}): {table.reason}" for table in skipped
    )
    return f"no table to compress; seen and skipped: {seen}"


def _storage_holders(model: nn.Module) -> dict[int, set[tuple[int, str]]]:
    """For each parameter storage, the (module, attribute) places that hold it."""
    holders: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for module in model.modules():
        held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for attribute, tensor in held.items():
            if tensor is not None and tensor.layout is torch.strided and not tensor.is_meta:
                holders[_storage(tensor)].add((id(module), attribute))
    return holders


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
    """``id(module)`` -> why it stays, for those that an attribute holds beside the modules.

    A forward that reads them, or their weights, from there would go on with the dense tables.
    """
    tables = {id(table): table for table, _ in find_modules(model, EMBEDDINGS)}
    by_weight = {id(getattr(table, "weight", None)): key for key, table in tables.items()}
    network = {id(param) for param in model.parameters()} - by_weight.keys()
    known = [one for adapter, module, _ in adapted(model) for one in adapter.beside(module)]
    met = {id(one): one for one in known}
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _MODULE_DICTS:
                continue
            reached = {id(item) for item in _reachable(value, met)}
            where = f"{name}.{attribute}" if name else attribute
            for key in reached & tables.keys():
                found[key] = (
                    f"the attribute {where!r} holds it too, where a forward may read it; hold it "
                    "in an nn.ModuleList or nn.ModuleDict"
                )
            if network and network <= reached:
                continue  # of all parameters: for an average, clipping or the like, not to look up
            for weight in reached & by_weight.keys():
                found[by_weight[weight]] = (
                    f"the attribute {where!r} holds its weight too, where a forward may read it; "
                    "delete it before compressing, and make it anew afterwards"
                )
    return found


def _reachable(value: Any, met: dict[int, Any]) -> Iterator[Any]:
    """Modules and tensors that containers and plain objects hold, at any depth.

    Not those inside modules and optimizers, nor in what was ``met`` before, nor beyond many other
    values.
    """
    todo, left = [value], _MOST_VALUES
    while todo and left:
        one, left = todo.pop(), left - 1
        if isinstance(one, _NO_HOLDERS):
            continue
        if isinstance(one, (nn.Module, Tensor)):
            yield one
        elif id(one) not in met:
            met[id(one)] = one  # kept, so that no other object gets its id
            todo += _held_by(one)


def _held_by(one: Any) -> list[Any]:
    """What a container, a bound method, a partial function or a plain object holds."""
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        return [*islice(one, _MOST_VALUES)]
    if isinstance(one, MethodType):
        return [one.__self__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    # Other mappings may read a file, or fail, when asked for values; what they hold is in here.
    values = one if isinstance(one, dict) else _attributes(one)
    return [*islice(values.values(), _MOST_VALUES)]


def _attributes(one: Any) -> dict[str, Any]:
    """The attributes of an object, by none of its own methods."""
    try:
        held = object.__getattribute__(one, "__dict__")
    except Exception:  # its class has another notion of them
        return {}
    return held if isinstance(held, dict) else {}


def _storage(tensor: Tensor) -> int:
    """Equal for tensors that are one."""
    held: Any = tensor
    if tensor.is_meta:
        return id(tensor)
    if is_dtensor(tensor):
        held = held.to_local()
    # A rank may hold no row of several tables: all of these are at 0.
    return held.untyped_storage().data_ptr() or id(tensor)


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``torch.distributed.fsdp.fully_shard`` has sharded its parameters, by its hooks."""
    hooks = [hook for name in _STATE_HOOKS for hook in getattr(module, name, {}).values()]
    return any(getattr(hook, "__module__", "").startswith(_FSDP) for hook in hooks)


def _reason_to_skip(
    module: Any,
    aliases: tuple[Alias, ...],
    holders: Mapping[int, set[tuple[int, str]]],
    config: CompressionConfig,
) -> str | None:
    """Why a table must stay as it is, or None."""
    if _is_fully_sharded(module):
        return (
            "fully_shard (FSDP2) holds its weight and cannot let go of it; compress before "
            "fully_shard, or load the sharded state dict into a plain model, see "
            "docs/distributed.md"
        )
    if any(_is_compiled(alias.parent) for alias in aliases):
        return "torch.compile holds it alone, and what it compiled; compile after compressing"
    if type(module) not in (nn.Embedding, nn.EmbeddingBag):
        return f"is a subclass of an embedding ({type(module).__name__})"
    if "forward" in vars(module):
        return "its forward has been replaced"
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (weight norm, pruning or the like)"
    if not weight.numel():
        return "is empty"
    if len(module._parameters) > 1 or module._buffers or module._modules:
        return "it holds more than its weight"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"has dtype {weight.dtype}"
    if len(holders[_storage(weight)]) > 1:
        return "its parameter is tied: another module holds the same tensor"
    if module.max_norm is not None:
        return "max_norm changes its rows at every lookup"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales gradients by row, which codes do not have"
    if getattr(weight, "_in_backward_optimizers", None):
        return "an optimizer in its backward pass trains it (_apply_optimizer_in_backward)"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks"
    if any(getattr(module, hooks, None) for hooks in _STATE_HOOKS):
        return "it has state_dict hooks"
    if not config.selects([alias.name for alias in aliases]):
        return "its name is not selected by include and exclude"
    if weight.shape[0] < config.min_rows:
        return f"has fewer than min_rows={config.min_rows} rows"
    return None


def _in_range(piece: Tensor) -> bool:
    """Whether all entries are finite, and their squares such as float32 can add up."""
    low, high = piece.aminmax()  # NaN where an entry is
    return max(-float(low), float(high)) <= LARGEST


def _check_size(table: Table, start: int, piece: Tensor) -> None:
    """ValueError for finite entries of rows from ``start`` on that are out of range."""
    if not _in_range(piece):
        row = int(piece.abs().amax(1).argmax())
        raise ValueError(
            f"table {table.name!r}: row {start + row} holds {float(piece[row].abs().max()):.3g}, "
            f"expected at most {LARGEST:.0e}; repair the table, or scale it before compressing"
        )


def check_finite(tables: Sequence[Table]) -> list[str]:
    """Look for rows with NaN or infinite entries, or such as are too large to compute with.

    Returns:
        A note for each table with such rows where they are read as zero.

    Raises:
        ValueError: a table with such rows where they are not, or with entries that are too large;
            it and a row are named.
    """
    notes = []
    for table in tables:
        count = 0
        for start, stop in table.parts(CHECK_ROWS):
            piece = table.stored_piece(start, stop)
            if _in_range(piece):
                continue
            finite = piece.isfinite().all(1)
            if not table.zero_nonfinite and not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                raise ValueError(
                    f"table {table.name!r}: row {row} holds NaN or infinity, expected finite "
                    "values; repair the table before compressing, or let nonfinite='zero' "
                    "(--nonfinite zero) read such entries as zero"
                )
            _check_size(table, start, piece.nan_to_num(0, 0, 0))
            count += len(finite) - int(finite.sum())
        table.ranks.settle(f"checking table {table.name!r}")
        count = int(table.ranks.add(torch.tensor([count]), "counting rows that are not finite"))
        if count:
            notes.append(
                f"table {table.name!r}: {count:,} rows hold NaN or infinity; these entries are "
                "taken as zero, where the table does not stay as it was"
            )
    return notes
