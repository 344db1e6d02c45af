"""Self-distillation: what a model learnt by heart is unlearnt before it is compressed.

Rows of ids that are seen a few times remember the labels they were seen with, and the network
learns to trust them; then training has to stop before the rows of popular ids and the network are
done. Here these go on, against labels and the model as it was, while rare ids tell nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import CompressionConfig
from .distill import (
    BestState,
    Labels,
    Loss,
    check_apart,
    check_options,
    check_teachers,
    count_ids,
    dense_gradients,
    gradients_of,
    run_epochs,
    set_rate,
)
from .forward import Forward, check_batches, default_forward, eval_mode, grad_mode
from .frequency import FrequencyStats, counts_for_tables
from .modules import Compressed
from .shards import is_dtensor
from .tables import EMBEDDINGS, Table, find_modules, find_tables


def self_distill(
    model: nn.Module,
    freq_stats: FrequencyStats | Mapping[str, Any],
    batches: Iterable[Any],
    *,
    labels: Labels | None = None,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    epochs: int = 3,
    lr: float = 1e-3,
    label_weight: float = 0.5,
    rare: int = 50,
    l2: float = 5e-4,
    forward: Forward = default_forward,
    score: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train an uncompressed model against labels, itself or better teachers, before ``compress()``.

    A step that one may leave out. Models of click logs are stopped early, as the rows of rare ids
    over-fit; what this gains over the model as it was, :func:`compress` keeps, and
    :func:`distill` from a copy of the result (docs/measured.md). The target is that of born-again
    networks (Furlanello et al., 2018, arXiv 1805.04770): ``label_weight`` of the label, the rest of
    the probability by the model as it was. A second call, taught by the result of the first, gains
    more; one that gains nothing, by ``score``, changes nothing.

    Where most ids are rare, labels bring nothing. A second model does, that was trained as this one
    was but from another start: both learnt other things by heart, the mean of their predictions
    mostly what they have in common. With it as the ``teacher``, and no labels, the model becomes
    nearly as good as that mean (Hinton et al., 2015, arXiv 1503.02531), at its own size.

    Rows of ids that ``freq_stats`` counts less than ``rare`` times do not move (without labels,
    those that it never counts); tables that :func:`compress` would leave as they are, with what is
    tied to them, do not at all. The rows that move are trained by SparseAdam, the network by Adam,
    in eval mode; the learning rate warms up and falls to zero by a cosine. It takes the memory of a
    copy of the model, and three times these rows.

    An error or an interruption puts the best state back: without a score, the first.

    Args:
        model: the trained model, with its tables in this process.
        freq_stats: how often each row occurs in ``batches``, as :func:`compress` takes it.
        batches: training batches, iterated once an epoch and, with labels, once to count: a
            DataLoader, a list.
        labels: gives the labels (batch,) or (batch, 1), 0 to 1, of a batch. None: the teacher
            alone.
        teacher: one model or several, whose mean is the target, as in :func:`distill`; ``model``
            itself among them stands for the model as it was. None: that alone.
        epochs: passes over ``batches``.
        lr: learning rate of both optimizers.
        label_weight: part of the label in a target, 0 to 1.
        rare: with labels, ids of a column that occur less often than this in ``batches`` are
            shuffled between the rows of a batch, as in :func:`distill`. 0: none is rare.
        l2: L2 penalty; ``l2`` times a row is added to its gradient whenever a batch holds it. A
            model that was trained with a small one, or none, is worth a trial with 0.
        forward: how to call the model on a batch, see :meth:`FrequencyStats.from_batches`. It
            returns logits or probabilities (batch,) or (batch, 1).
        score: says how good the model is, larger is better, such as its validation AUC. It is
            called before the first and after every epoch, in eval mode and without gradients, and
            the best state is kept. None keeps the last.
        seed: of the shuffling.
        progress: show a progress bar.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: the model holds compressed, sharded or no tables, counts do not fit them, there
            are no batches or they can be read once only, a teacher holds what is trained, a loss is
            NaN or infinite, an argument is out of range, or labels are of another length than
            predictions or outside 0 to 1.
        TypeError: a forward that returns no tensor, labels that are none, a teacher that is no
            module, or neither labels nor a teacher.

    Example:
        >>> self_distill(  # doctest: +SKIP
        ...     model, stats, train_batches, labels=lambda batch: batch[1], score=validation_auc
        ... )
        >>> teacher = copy.deepcopy(model)  # doctest: +SKIP
        >>> compress(model, stats, batches=train_batches)  # doctest: +SKIP

        With a second model, trained from another seed:

        >>> self_distill(model, stats, train_batches, teacher=[model, second])  # doctest: +SKIP
    """
    check_options(epochs, 0.0, labels, label_weight, rare, 1.0, "trained")
    if labels is None:
        rare = 0
    check_batches(batches, epochs + (rare > 0))
    if labels is None and teacher is None:
        raise TypeError(
            "labels must be a function that gives the labels of a batch, such as lambda batch: "
            "batch[1], got None, and no teacher either"
        )
    given = check_teachers(model if teacher is None else teacher)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0 and finite, got {lr}")
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2 must be 0 or more and finite, got {l2}")
    tables, other_names = _tables_of(model)
    wanted = [(table.names, table.rows) for table in tables]
    counts = counts_for_tables(freq_stats, wanted, other_names)
    _check_counts(tables, counts)
    if not epochs:
        return []
    with (
        grad_mode(),
        eval_mode(model, *(teachers := _apart(given, model))),
        dense_gradients(model),
        gradients_of(_able_of_sparse(tables), sparse=True),
    ):
        popular = _popular_rows(tables, counts, max(rare, 1))
        optimizers = _optimizers(model, popular, lr)
        trained = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        check_apart(teachers, [*trained, *(rows.weight for rows in popular)])
        best = BestState(model, trained, score, [])
        ids = count_ids(batches, labels) if rare else {}
        loss_of = Loss(model, teachers, forward, labels, label_weight, 1.0, ids, rare)
        generator = torch.Generator().manual_seed(seed)

        def take_step(batch: Any, done: float) -> float:
            model.zero_grad()
            loss = loss_of(batch, 0.0, generator)
            loss.backward()
            for rows in popular:
                rows.take_gradient(l2)
            for optimizer in optimizers:
                set_rate(optimizer, lr, done)
                optimizer.step()
            for rows in popular:
                rows.put_back(rows.moved)
            return loss.item()

        history = []
        try:
            with best.back_on_error():
                for mean in run_epochs(batches, epochs, take_step, "self-distilling", progress):
                    history.append(mean)
                    best.update()
            if score is not None:
                best.restore()
        finally:
            for rows in popular:
                rows.put_back()
            model.zero_grad()
    return history


def _apart(teachers: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The teachers, and for the model itself a copy of what it is now."""
    own = copy.deepcopy(model) if any(one is model for one in teachers) else model
    return [own if one is model else one for one in teachers]


def _able_of_sparse(tables: list[Table]) -> list[nn.Embedding | nn.EmbeddingBag]:
    """Modules that can give sparse gradients; a dense one takes as much as its table."""
    return [t.module for t in tables if getattr(t.module, "mode", None) != "max"]


def _popular_rows(tables: list[Table], counts: list[Any], least: int) -> list[_PopularRows]:
    """Those of each table that has any."""
    found = [
        _PopularRows(table.module, torch.from_numpy(one), least)
        for table, one in zip(tables, counts, strict=True)
    ]
    return [rows for rows in found if len(rows.values)]


def _tables_of(model: nn.Module) -> tuple[list[Table], list[str]]:
    """The tables that are trained by rows, and the names of those left alone."""
    compressed = [aliases[0].name for _, aliases in find_modules(model, (Compressed,))]
    if compressed:
        raise ValueError(
            f"{', '.join(compressed)} are compressed already; call self_distill() before "
            "compress(), or train on with distill()"
        )
    for module, aliases in find_modules(model, EMBEDDINGS):
        if type(module) in EMBEDDINGS and is_dtensor(getattr(module, "weight", None)):
            # Before find_tables(), which would ask for a process_group that is none of ours.
            raise ValueError(
                f"table {aliases[0].name!r} is sharded between ranks; self_distill() trains tables "
                "that are whole in this process: gather it (full_tensor()) into a plain model"
            )
    tables, skipped = find_tables(model, CompressionConfig(min_rows=1))
    trained = [table for table in tables if table.weight.requires_grad]
    frozen = [name for table in tables if not table.weight.requires_grad for name in table.names]
    return trained, [*frozen, *(name for t in skipped for name in t.names)]


def _check_counts(tables: list[Table], counts: list[Any]) -> None:
    """ValueError for tables without counts: it is not known which of their rows are rare."""
    missing = [t.name for t, found in zip(tables, counts, strict=True) if found is None]
    if missing:
        raise ValueError(
            f"freq_stats holds no counts of {', '.join(missing)}; count all tables, for instance "
            "by FrequencyStats.from_batches(model, batches)"
        )


class _PopularRows:
    """The rows of one table that are trained: a float copy, which an optimizer moves."""

    def __init__(self, module: nn.Embedding | nn.EmbeddingBag, counts: Tensor, least: int) -> None:
        self.weight = module.weight
        self.rows = (counts >= least).nonzero()[:, 0].to(self.weight.device)
        self.slots = torch.full((len(counts),), -1, device=self.weight.device)
        self.slots[self.rows] = torch.arange(len(self.rows), device=self.weight.device)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.values = nn.Parameter(self.weight.detach()[self.rows].to(wide))
        self.moved = self.rows[:0]

    @torch.no_grad()
    def take_gradient(self, l2: float) -> None:
        """From the table to ``values``, sparse and with that of the penalty; of these rows only."""
        found, self.weight.grad = self.weight.grad, None
        self.values.grad, self.moved = None, self.rows[:0]
        if found is None:
            return
        if found.is_sparse:
            found = found.to(self.values.dtype).coalesce()
            ids, gradient = found.indices()[0], found.values()
        else:
            ids = found.any(dim=1).nonzero()[:, 0]
            gradient = found[ids].to(self.values.dtype)
        slots = self.slots[ids]
        kept = slots >= 0
        slots = self.moved = slots[kept]
        gradient = gradient[kept].add(self.values[slots], alpha=l2)
        self.values.grad = torch.sparse_coo_tensor(
            slots[None], gradient, self.values.shape, check_invariants=False, is_coalesced=True
        )

    @torch.no_grad()
    def put_back(self, slots: Tensor | slice = slice(None)) -> None:
        """From ``values`` to the table: those in ``slots``, or all."""
        self.weight[self.rows[slots]] = self.values[slots].to(self.weight.dtype)


def _optimizers(
    model: nn.Module, popular: list[_PopularRows], lr: float
) -> list[torch.optim.Optimizer]:
    """SparseAdam of popular rows, and Adam of what is trainable outside the tables."""
    # Rows of tables that are skipped, rare ones among them, would move with the network.
    others = [module for module, _ in find_modules(model, EMBEDDINGS)]
    held = {id(param) for module in others for param in module.parameters(recurse=False)}
    network = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    found: list[torch.optim.Optimizer] = []
    if popular:
        groups = [{"params": [rows.values for rows in popular], "rate": 1.0}]
        found.append(torch.optim.SparseAdam(groups, lr=lr))
    if network:
        found.append(torch.optim.Adam([{"params": network, "rate": 1.0}], lr=lr))
    return found
