"""``compress()``, ``plan()`` and ``decompress()``: find, count, plan, learn, swap, report."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .budget import Assignment, Group, Shape, assign, total_count, total_weight
from .config import POPULARITY, CompressionConfig
from .forward import Forward, default_forward, full_precision, grad_mode
from .frequency import FrequencyStats, counts_for_tables
from .learning.fit import CodeShape, Rows
from .learning.kmeans import require_faiss
from .learning.objective import Progress
from .modules import DecodedBags, DecodedTable
from .optimization import trained_by
from .outcome import Fit, Outcome, always_fit
from .ranks import ALONE, Ranks
from .replicas import takes_dtensors
from .report import CompressionReport
from .sensitivity import comparable, fisher_matrices
from .shards import check_sum, is_dtensor
from .swap import Optimizers, all_optimizers, check_held, optimizer_groups, replace_modules
from .tables import (
    EMBEDDINGS,
    SkippedTable,
    Table,
    check_finite,
    check_model,
    find_modules,
    find_replacements,
    find_tables,
    with_shards,
)
from .unsharding import Standing, unsharded
from .warm import Earlier

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("mec_embed")

Counts = FrequencyStats | Mapping[str, Any] | None

#: A row that never occurs counts as this many occurrences: little, but it gets a code.
_UNSEEN = 0.1
#: Which tables are compressed after an earlier version, that version decides.
_ALL: dict[str, Any] = {"include": ("*",), "exclude": (), "min_rows": 1}
#: Rows whose weights are worked out at once.
_WEIGHT_ROWS = 1 << 20


def compress(
    model: nn.Module,
    freq_stats: Counts,
    config: CompressionConfig | None = None,
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward = default_forward,
    optimizer: Optimizers = None,
    device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """Replace the embedding tables of a trained model by codes and codebooks, in place.

    Everything is checked and learned before the first module is replaced: an error or Ctrl-C
    leaves model and optimizer as they were.

    Args:
        model: any module that holds ``nn.Embedding`` or ``nn.EmbeddingBag`` modules.
        freq_stats: how often each row is used: a :class:`~mec_embed.FrequencyStats`, a mapping
            from table name (qualified, or the last part where unambiguous) to counts (rows,), or
            None for uniform weights.
        config: what to aim for; ``CompressionConfig()`` (ratio 50) by default.
        batches: some training batches (up to 64 are read), to measure by gradients what the
            predictions depend on, see :mod:`mec_embed.sensitivity`: better codes for additive
            codes, and better bits for all. None weighs all tables and columns alike.
        forward: how to call the model on a batch, see :meth:`FrequencyStats.from_batches`. It
            returns logits or probabilities (batch,) or (batch, 1).
        optimizer: of a training that shall go on (or several): the codebooks take the place of the
            old tables in their groups, and the state of the old tables is dropped.
        device: to learn on; by default where the table is.
        process_group: of ``torch.distributed``, whose ranks share the work: all of them call, with
            the same arguments but ``batches``, of which each reads its own. Tables are the same on
            every rank, or sharded over the ranks as DTensors. The result is on every rank, and is
            that of one process up to the order of sums. An error of one rank is raised by all. See
            docs/distributed.md.
        progress: show a progress bar (of rank 0).
        start_from: the compressed model of an earlier version, to change few of its codes. Tables,
            layouts, tiers and kinds of codes are as there, whatever ``config`` says, and so are
            rows for unknown ids (``oov_row``); codebooks are refitted from there on, and a row gets
            other codes only where they lower its error clearly. The report counts these rows. Rows
            that were appended since need codes first, see :func:`mec_embed.extend`.

    Returns:
        Every table with its bytes and errors.

    Raises:
        ValueError: no table to compress, a budget that cannot be met, counts that do not fit,
            NaN or infinite rows (or above 1e15), tables that are not those of ``start_from``, an
            optimizer of another model, a device that is not there, ranks that differ in their
            arguments; what is wrong is named.
        TypeError: an argument of another type.
        RuntimeError: faiss is not installed, or a rank has ended or kept the others waiting for
            longer than the time-out of ``process_group``.

    Example:
        >>> report = compress(model, stats, CompressionConfig(ratio=50))  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP

        The next night, with ``old = load(build_model(), "yesterday.safetensors")``:

        >>> report = compress(model, stats, start_from=old)  # doctest: +SKIP
    """
    started = time.perf_counter()
    with Ranks(process_group).guard() as ranks, _unsharded(model, ranks, optimizer) as standing:
        check_device(device)
        draft = _draft(model, freq_stats, config, optimizer, batches, forward, standing, start_from)
        require_faiss()
        draft.notes.extend(check_finite(draft.tables))
        groups = tqdm(
            draft.groups_to_learn(),
            "compressing",
            unit="table",
            disable=not progress or ranks.rank > 0,
        )
        with groups:
            outcome = learn(draft, groups, partial(_teller, groups), device)
        report = outcome.report(time.perf_counter() - started)
        replacements = [
            (t.aliases, t.module, outcome.modules[t]) for t in draft.tables if t in outcome.modules
        ]
        standing.fill([old for _, old, _ in replacements])
        settle = partial(ranks.settle, "replacing tables")
        replace_modules(model, replacements, optimizer, settle)
        standing.kept = True
        emptied = _note_emptied(all_optimizers(model, optimizer))
    return replace(report, notes=(*report.notes, *emptied))


def plan(
    model: nn.Module,
    freq_stats: Counts,
    config: CompressionConfig | None = None,
    *,
    batches: Iterable[Any] | None = None,
    forward: Forward = default_forward,
    optimizer: Optimizers = None,
    process_group: ProcessGroup | None = None,
    start_from: nn.Module | None = None,
) -> CompressionReport:
    """What :func:`compress` would do: layouts, bytes, and what is skipped; learns nothing.

    Args and errors as :func:`compress`. The bytes are exact; errors are predicted
    only: ``report.predicted_error``, and ``report.plot()`` for that of other ratios.

    Example:
        >>> print(plan(model, stats, CompressionConfig(ratio=50)))  # doctest: +SKIP
    """
    with Ranks(process_group).guard() as ranks, _unsharded(model, ranks, optimizer) as standing:
        draft = _draft(model, freq_stats, config, optimizer, batches, forward, standing, start_from)
    return draft.report()


def _unsharded(
    model: nn.Module, ranks: Ranks, optimizer: Optimizers
) -> AbstractContextManager[Standing]:
    if isinstance(model, nn.Module):
        # Before plain modules stand where sharded ones were.
        check_held(model, optimizer)
    if ranks.group is None or not isinstance(model, nn.Module):
        return nullcontext(Standing(model, ranks))
    return unsharded(model, ranks, all_optimizers(model, optimizer))


def check_device(device: torch.device | str | None) -> None:
    """ValueError for a device that is not there to learn on."""
    try:
        torch.zeros(1, device=device).cpu()  # of "meta", nothing comes back
    except (RuntimeError, AssertionError, TypeError) as error:
        # torch itself raises an AssertionError where it was built without CUDA.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}); give one that this machine has, such as "
            "'cpu', or None"
        ) from error


def learn(
    draft: Draft,
    groups: Iterable[tuple[Group, Shape]],
    teller: Callable[[Group], Progress],
    device: torch.device | str | None = None,
    fit: Fit = always_fit,
) -> Outcome:
    """Learn what was planned; the model stays as it is.

    Args:
        draft: the plan, its tables checked.
        groups: what :meth:`Draft.groups_to_learn` returned.
        teller: makes what is told of the progress of a group.
        device: to learn on; by default where the table is.
        fit: may keep the codes of groups, or know them from before.
    """
    outcome = Outcome(draft, fit)
    with grad_mode(), full_precision():
        for group, shape in groups:
            outcome.learn(group, shape, device, teller(group))
        outcome.assemble()
    return outcome


@torch.inference_mode(False)
def decompress(model: nn.Module, *, optimizer: Optimizers = None) -> int:
    """Put dense ``nn.Embedding`` and ``nn.EmbeddingBag`` back, in place.

    They know no ``oov_row``: ids out of range are errors again.

    Args:
        model: a compressed model.
        optimizer: as in :func:`compress`; the dense tables take the place of the codebooks. Of
            int8 codebooks it holds none: add those tables with ``add_param_group``.

    Returns:
        Number of tables put back.

    Raises:
        ValueError: the model holds no compressed table, or one with hooks of
            ``parallelize_module``, which give it ids that a dense table does not take; an
            optimizer of another model.

    Example:
        >>> model = load(build_model(), "small.safetensors")  # doctest: +SKIP
        >>> decompress(model)  # doctest: +SKIP
        26
    """
    check_model(model)
    check_held(model, optimizer)
    found = list(find_replacements(model))
    if not found:
        raise ValueError("the model holds no compressed table; nothing to decompress")
    for old, aliases in found:
        if takes_dtensors(old):
            raise ValueError(
                f"table {aliases[0].name!r} has a hook of parallelize_module that makes ids "
                "DTensors; a dense table is to be a plain one: load() or compress() a model that "
                "parallelize_module has not changed, decompress that, and parallelize it then"
            )
        if any(is_dtensor(parameter) for parameter in old.parameters()):
            raise ValueError(
                f"table {aliases[0].name!r}: its codebooks are DTensors, of which this process "
                "holds a part, expected whole tensors; load the full_tensor() of each into a plain "
                "model, and decompress that"
            )
    replace_modules(model, [(aliases, old, _dense(old)) for old, aliases in found], optimizer)
    return len(found)


def _dense(module: DecodedTable) -> nn.Module:
    """The dense module that decodes as ``module`` does."""
    table = module.dequantize()
    options: dict[str, Any] = {"padding_idx": module.padding_idx, "sparse": module.sparse}
    kind: type[nn.Module] = nn.Embedding
    if isinstance(module, DecodedBags):
        kind = nn.EmbeddingBag
        options |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
    dense = kind(*table.shape, **options, _weight=table)
    dense.weight.requires_grad_(module.trains)
    return dense


@dataclass(frozen=True)
class Draft:
    """What is known before anything is learned."""

    config: CompressionConfig
    order: list[str]
    tables: list[Table]
    skipped: list[SkippedTable]
    popularity: str
    weights: list[Tensor]
    lookups: list[float | None]
    assignment: Assignment
    notes: list[str]
    ranks: Ranks = ALONE
    earlier: Earlier | None = None

    def report(self) -> CompressionReport:
        """What would be done."""
        return Outcome(self).report(None)

    def groups_to_learn(self) -> list[tuple[Group, Shape]]:
        """Groups that change, with their shape."""
        pairs = zip(self.assignment.groups, self.assignment.chosen, strict=True)
        return [(group, choice.shape) for group, choice in pairs if choice.shape]

    def task(
        self, group: Group, shape: Shape, device: torch.device
    ) -> tuple[list[Rows], CodeShape]:
        """Rows of a group whose codes are to be learned on a device, and the codes' shape."""
        dtype = group.layouts(shape, self.config)[0][0].codebook_dtype
        start = group.earlier_codebooks()
        code_shape = CodeShape(
            *shape,
            dtype,
            group.first.widths,
            _metric(group, shape),
            None if start is None else start.to(device),
        )
        rows = [
            Rows(
                partial(field.read, device=device),
                field.weights,
                self.ranks,
                field.bounds,
                field.reader(device),
                None if start is None else field.earlier_codes,
                device,
            )
            for field in group.fields
        ]
        return rows, code_shape


def _draft(
    model: nn.Module,
    freq_stats: Counts,
    config: CompressionConfig | None,
    optimizer: Optimizers,
    batches: Iterable[Any] | None,
    forward: Forward,
    standing: Standing,
    start_from: nn.Module | None,
) -> Draft:
    check_model(model)
    optimizers = all_optimizers(model, optimizer)
    groups_of = optimizer_groups(optimizers)
    if config is None:
        config = CompressionConfig()
    if not isinstance(config, CompressionConfig):
        raise TypeError(f"config must be a CompressionConfig, got {type(config).__name__}")
    ranks = standing.ranks
    earlier = None if start_from is None else Earlier.of(start_from)
    every = config if earlier is None else replace(config, **_ALL)
    tables, skipped = find_tables(model, every, ranks, standing.shards)
    if earlier is not None:
        tables, skipped = earlier.choose(tables, skipped)
    measure = None
    if batches is not None:
        others = partial(_sharded_among, model, skipped, standing)
        measure = partial(_measured, model, tables, batches, forward, others)
    draft = draft_tables(
        model, tables, skipped, freq_stats, config, groups_of, measure, ranks, earlier
    )
    names = [name for found in (tables, skipped) for table in found for name in table.names]
    draft.notes.extend(note_patterns(config, names, _compressed_names(model)))
    draft.notes.extend(_note_untrained(tables, groups_of) + _note_own(model, tables, optimizers))
    return draft


def _note_untrained(tables: Sequence[Table], groups_of: Mapping[int, Hashable]) -> list[str]:
    """Says which tables no optimizer will train, where there are optimizers."""
    weights = [(table.name, table.weight) for table in tables if table.weight.requires_grad]
    left = [name for name, weight in weights if id(weight) not in groups_of]
    if not groups_of or not left:
        return []
    return [
        f"no optimizer that was given holds {', '.join(left)}: another one that does goes on with "
        "the dense tables, not with the codebooks; give all that train the model"
    ]


def _note_own(
    model: nn.Module, tables: Sequence[Table], known: Sequence[torch.optim.Optimizer]
) -> list[str]:
    """Says which optimizers that an attribute holds train tables, and were not given."""
    names = {id(table.weight): table.name for table in tables}
    notes = []
    for where, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.optim.Optimizer) or any(value is one for one in known):
                continue
            trained = trained_by(value)
            held = [name for key, name in names.items() if key in trained]
            path = f"{where}.{attribute}" if where else attribute
            if held:
                notes.append(
                    f"the attribute {path!r} holds an optimizer that trains {', '.join(held)} and "
                    "was not given: it goes on with the dense tables, and keeps them in memory; "
                    f"pass optimizer=model.{path}"
                )
    return notes


def _note_emptied(optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Says which optimizers have nothing left to train."""
    return [
        f"optimizer {type(one).__name__} holds no parameter any more, as int8 codebooks are "
        "frozen: leave it out of GradScaler.step() and of checkpoints"
        for one in optimizers
        if not any(group["params"] for group in one.param_groups)
    ]


def _compressed_names(model: nn.Module) -> list[str]:
    """Names of tables that were compressed earlier: counts and patterns may name them."""
    return [alias.name for _, aliases in find_replacements(model) for alias in aliases]


def _measured(
    model: nn.Module,
    tables: Sequence[Table],
    batches: Iterable[Any],
    forward: Forward,
    others: Callable[[], Sequence[Table]],
) -> Sequence[Any]:
    # All ranks look for the others at once: not before they agree on whether there are batches.
    return fisher_matrices(model, tables, batches, forward, others())


def _sharded_among(
    model: nn.Module, skipped: Sequence[SkippedTable], standing: Standing
) -> list[Table]:
    """Sharded tables that stay as they are, and have to be looked up in where the model is run.

    Not those with a forward of their own, which does what no other can do for it: a subclass, such
    as ``fully_shard`` makes, or a forward that has been replaced; nor those that
    ``parallelize_module`` gives ids that they take.
    """
    ranks, names = standing.ranks, {table.name for table in skipped}
    found = [
        Table(module, aliases, ranks=ranks, shard=standing.shards.get(module))
        for module, aliases in find_modules(model, EMBEDDINGS)
        if aliases[0].name in names
        and type(module) in EMBEDDINGS
        and "forward" not in vars(module)
        and isinstance(getattr(module, "weight", None), Tensor)
        and not takes_dtensors(module)
    ]
    return [table for table in with_shards(found, ranks) if table.shard is not None]


def draft_tables(
    model: nn.Module,
    tables: list[Table],
    skipped: list[SkippedTable],
    freq_stats: Counts,
    config: CompressionConfig,
    groups_of: Mapping[int, Hashable] | None = None,
    measure: Callable[[], Sequence[Any]] | None = None,
    ranks: Ranks = ALONE,
    earlier: Earlier | None = None,
) -> Draft:
    """Plan tables that were found already.

    Args:
        model: that holds the tables.
        tables: to compress.
        skipped: tables that stay as they are.
        freq_stats: as :func:`compress` takes it.
        config: what to aim for.
        groups_of: group of its optimizer for the ``id`` of a parameter.
        measure: finds the Fisher matrices, see :mod:`mec_embed.sensitivity`; None without batches.
        ranks: the processes that share the work.
        earlier: whose plan is taken over, if any; it chose the tables.
    """
    counts = counts_for_tables(
        freq_stats,
        [(table.names, table.rows) for table in tables],
        [*(name for table in skipped for name in table.names), *_compressed_names(model)],
    )
    missing = [table.name for table, c in zip(tables, counts, strict=True) if c is None]
    # Its rows do not weigh nothing: more likely, the model reads its weight without looking up.
    unused = [t.name for t, c in zip(tables, counts, strict=True) if c is not None and not c.any()]
    counts = [c if c is not None and c.any() else None for c in counts]
    keys = {table: _share_key(table, groups_of or {}) for table in tables}
    if ranks.size > 1:
        facts = _facts(config, tables, counts, keys, measure is not None)
        ranks.agree(facts | ({} if earlier is None else earlier.facts()), "comparing tables")
    totals = [None if c is None else total_count(c) for c in counts]
    popularity = config.popularity or ("sqrt" if measure is None else "linear")
    known = [max(total, 1.0) for total in totals if total is not None]
    # A table without counts is looked up as often as the others are on average.
    usual = sum(known) / len(known) if known else 1.0
    weights = [
        row_weights(table.rows, c, popularity, usual)
        for table, c in zip(tables, counts, strict=True)
    ]
    fishers: Sequence[Any] = [None] * len(tables)
    if measure is not None:
        fishers = comparable(tables, measure())
    if earlier is None:
        budget = _budget(tables, skipped, config)
        assignment = assign(tables, weights, counts, fishers, keys, config, budget)
    else:
        assignment = earlier.assignment(weights, fishers, keys, config)
    order = [aliases[0].name for _, aliases in find_modules(model, EMBEDDINGS)]
    return Draft(
        config,
        order,
        tables,
        skipped,
        popularity,
        weights,
        totals,
        assignment,
        _notes(freq_stats, missing, unused),
        ranks,
        earlier,
    )


def _budget(
    tables: Sequence[Table], skipped: Sequence[SkippedTable], config: CompressionConfig
) -> int | None:
    """Bytes that the tables to compress may take; None where the layout is explicit."""
    alone = sum(table.nbytes for table in skipped)
    budget = config.budget(sum(table.nbytes for table in tables) + alone)
    if budget is None:
        return None
    if alone > budget:
        raise ValueError(
            f"the tables left alone take {alone:,} bytes, more than the budget of {budget:,}; "
            "lower ratio (or raise max_bytes) or compress more tables (min_rows, include, "
            "exclude)"
        )
    return budget - alone


def _facts(
    config: CompressionConfig,
    tables: Sequence[Table],
    counts: Sequence[Any],
    keys: Mapping[Table, tuple[Hashable, ...]],
    measured: bool,
) -> dict[str, str]:
    """What all ranks must agree on before they work together."""
    facts = {f"config.{option}": str(value) for option, value in config.to_dict().items()}
    facts["whether batches are given"] = str(measured)
    for table, count in zip(tables, counts, strict=True):
        name = f"table {table.name!r}"
        # Devices are numbered by rank.
        key = [part for part in keys[table] if not isinstance(part, torch.device)]
        facts[f"how {name} is trained"] = str(key)
        told = "none"
        if count is not None:
            told = f"{count.sum():.0f} ({zlib.crc32(np.ascontiguousarray(count).data):x})"
        facts[f"the counts of {name}"] = told
        if table.shard is None:
            facts[f"the rows of {name}"] = f"values with check sum {check_sum(table.weight):x}"
    return facts


def _notes(freq_stats: Counts, missing: list[str], unused: list[str]) -> list[str]:
    if freq_stats is None:
        return ["no freq_stats: all rows weigh the same; counts of training ids give better codes"]
    notes = []
    if missing:
        notes.append(f"no counts for {', '.join(missing)}: their rows weigh the same")
    if unused:
        notes.append(
            f"freq_stats counts no lookup of {', '.join(unused)}: their rows weigh the same, and "
            "together as much as those of another table; exclude what the model reads as a whole"
        )
    return notes


def note_patterns(
    config: CompressionConfig, names: Sequence[str], others: Sequence[str] = ()
) -> list[str]:
    """A note on patterns that name nothing: a misspelt one would pass unseen.

    Args:
        config: with the patterns.
        names: of all tables.
        others: names that patterns may name as well.
    """
    wrong = config.unmatched([*names, *others])
    if not wrong:
        return []
    return [
        f"include and exclude name no table by {', '.join(wrong)}; there are {', '.join(names)}"
    ]


def row_weights(rows: int, counts: Any, popularity: str, usual: float) -> Tensor:
    """Popularity weights (rows,) float32 whose sum is the number of lookups of the table.

    Args:
        rows: of the table.
        counts: occurrences (rows,) of each row, or None.
        popularity: how a row's weight grows with them.
        usual: number of lookups where they are not known.
    """
    if counts is None:
        return torch.full((rows,), usual / rows, dtype=torch.float32)
    weights = torch.empty(rows, dtype=torch.float32)
    # In parts: as float64, large tables' counts would take more memory than their codes.
    for start in range(0, rows, _WEIGHT_ROWS):
        # A copy: torch warns of arrays that it may not write to, as those mapped from a file.
        part = np.array(counts[start : start + _WEIGHT_ROWS], dtype=np.float64)
        popular = POPULARITY[popularity](torch.from_numpy(part).clamp(min=_UNSEEN))
        weights[start : start + _WEIGHT_ROWS] = popular
    return weights.mul_(max(total_count(counts), 1.0) / total_weight(weights))


def _share_key(table: Table, groups_of: Mapping[int, Hashable]) -> tuple[Hashable, ...]:
    """Equal for tables whose codebooks may be one parameter."""
    weight = table.weight
    return (
        table.dim,
        weight.dtype,
        weight.device,
        weight.requires_grad,
        table.module.sparse,
        groups_of.get(id(weight)),
    )


def _metric(group: Group, shape: Shape) -> Tensor | None:
    """What additive codes measure errors by; product codes keep their columns apart."""
    if shape[0] == "product" or group.metric is None:
        return None
    # Only ratios matter within a group; the largest at 1 keeps float32 in range.
    return torch.from_numpy(group.metric / abs(group.metric).max()).float()


def _teller(bar: Any, group: Group) -> Progress:
    """Shows stage and error of a group on the progress bar, and logs them."""
    name = group.first.table.name

    def tell(stage: str, error: float) -> None:
        bar.set_postfix_str(f"{name}: {stage}, error {error:.4f}")
        logger.debug("%s: %s, relative weighted error %.4f", name, stage, error)

    return tell
