"""Distillation: train codebooks and network to predict as the uncompressed model does.

The labels of a click log over-fit within an epoch; the teacher's probabilities do not, and it can
label combinations of ids that never occurred. A small part of the labels beside them can make the
compressed model better than its teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .forward import Forward, check_batches, default_forward, eval_mode, grad_mode, prediction
from .modules import (
    CodebookSet,
    Compressed,
    DecodedTable,
    check_gathered,
    quantize_codebooks,
)
from .tables import find_modules

logger = logging.getLogger("mec_embed")

Network = Literal["trained", "fresh", "fixed"]
Labels = Callable[[Any], Tensor]

#: Part of the length of a row that one step moves, relative to the learning rate of the network.
_ROW_RATE = 20.0
#: Ids of a column that are counted apart.
_MOST_IDS = 1 << 22
#: Predictions of a model after which all of them within 0 to 1 means probabilities.
_SURE = 2000
#: Mean distance from 0 to 1 of what is no probability: linear heads leave that range a little.
_FAR_OUTSIDE = 0.1
#: Part of all steps in which the learning rate rises.
_WARM_UP = 0.05


def distill(
    model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    epochs: int = 4,
    lr: float = 2e-3,
    mix: float = 0.5,
    labels: Labels | None = None,
    label_weight: float = 0.5,
    rare: int = 200,
    temperature: float = 1.0,
    network: Network = "trained",
    forward: Forward = default_forward,
    score: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train a compressed model against the model it was made from, in place; codes stay.

    The loss is the binary cross entropy against the teacher's probabilities (Hinton et al., 2015,
    arXiv 1503.02531). Both models run in eval mode: no dropout, and batch-norm
    statistics stay as they are. Frozen int8 and half precision codebooks are trained as float32 and
    rounded back at the end.

    An error or an interruption puts the best state back: without a score, the first.

    Args:
        model: the compressed model.
        teacher: the uncompressed model (a ``copy.deepcopy`` made before compressing), or several
            models: the mean of what they return is the target then. Models that were trained from
            other starts err in other places, so that their mean is better than each of them, and a
            model that is taught by it than one taught by its base alone (docs/measured.md). All
            return logits, or all probabilities.
        batches: iterated once an epoch: a DataLoader, a list.
        epochs: passes over ``batches``; a fresh network needs some.
        lr: Adam's learning rate for the network; that of the codebooks follows from it and from
            their scale. It warms up and falls to zero by a cosine.
        mix: part of each batch in which about one column in ten (at least one) is shuffled between
            rows, so that the teacher also labels combinations that the data do not hold. Columns
            are those of an integer tensor (batch, columns), or the entries of a mapping (of its
            only one with ids, if that is a matrix, the columns); other batches are used as they
            are. With labels, these rows also keep what rows of rare ids mean to the teacher; 0 is
            worth a trial, by a ``score``: where rare ids tell little, it unlearns what was learnt
            by heart (docs/experiments.md).
        labels: gives the labels (batch,) or (batch, 1), 0 to 1, of a batch: the target of rows that
            ``mix`` leaves alone is then ``label_weight`` of their label and the rest of the
            teacher's probability. None: the teacher alone.
        label_weight: part of the label in a target, 0 to 1.
        rare: with labels, ids that occur less often than this in ``batches`` are shuffled between
            the rows whose labels count, each column by itself. The rows of rare ids have learnt
            these very labels by heart, and codes were chosen for such rows; the same labels once
            more would teach the model to trust that (docs/experiments.md). Columns are the integer
            ones of ``mix``. They are counted in a pass over ``batches`` before the first epoch, in
            up to 16 MB a column; beyond 4 million ids some are counted together. 0: none is rare.
        temperature: the teacher's logits are divided by it. Models of click logs tend to be too
            sure of themselves; with the temperature of the least log loss on a validation split
            (Guo et al., 2017, arXiv 1706.04599), commonly 1 to 2, the compressed model is
            calibrated where its teacher is not. The order of predictions, and so the AUC, is the
            teacher's at any temperature.
        network: what is done with the trainable parameters outside the tables. ``"trained"``: they
            are trained on. ``"fresh"``: they are drawn anew first, by the ``reset_parameters()`` of
            each module that has one, then trained (others start as they are, and so do the weights
            behind a weight norm); with a ``score``, what was there stays where that was better.
            ``"fixed"``: codebooks alone are trained.
        forward: how to call a model on a batch, see :meth:`FrequencyStats.from_batches`. It
            returns logits or probabilities (batch,) or (batch, 1).
        score: says how good the model is, larger is better, such as its validation AUC. It is
            called before the first and after every epoch, in eval mode, without gradients and with
            codebooks rounded as they are stored, and the best state is kept. None keeps the last.
        seed: of the shuffling.
        progress: show a progress bar.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: the model holds no compressed table or nothing to train, there is no teacher, it
            shares what is trained, or some return logits and some probabilities, there are no
            batches or they can be read once only, a loss is NaN or infinite, an argument is out of
            range, labels are of another length than predictions or outside 0 to 1, or a module
            cannot be drawn anew.
        TypeError: a teacher that is no module, a forward that returns no tensor, labels that are
            none, or a score that is no number.

    Example:
        >>> teacher = copy.deepcopy(model)  # doctest: +SKIP
        >>> compress(model, stats)  # doctest: +SKIP
        >>> distill(model, teacher, train_batches, epochs=2)  # doctest: +SKIP

        With labels, of batches ``(ids, labels)``, and the best epoch by validation:

        >>> distill(  # doctest: +SKIP
        ...     model, teacher, train_batches, labels=lambda batch: batch[1], score=validation_auc
        ... )
    """
    counting = labels is not None and bool(rare) and epochs > 0
    check_batches(batches, epochs + counting)
    check_options(epochs, mix, labels, label_weight, rare, temperature, network)
    teachers = check_teachers(teacher)
    books = _codebook_sets(model)
    dtypes = [book.codebooks.dtype for book in books]
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    with (
        grad_mode(),
        eval_mode(model, *teachers),
        dense_gradients(model),
        _trainable(books) as codebooks,
    ):
        optimizer = torch.optim.Adam(_groups(model, codebooks, network), lr=lr)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        check_apart(teachers, trained)
        best = BestState(model, trained, score, list(zip(codebooks, dtypes, strict=True)))
        counts = count_ids(batches, labels) if counting else {}
        loss_of = Loss(model, teachers, forward, labels, label_weight, temperature, counts, rare)

        def take_step(batch: Any, done: float) -> float:
            set_rate(optimizer, lr, done)
            optimizer.zero_grad()
            loss = loss_of(batch, mix, generator)
            loss.backward()
            optimizer.step()
            return loss.item()

        with best.back_on_error():
            if network == "fresh" and epochs:
                _draw_anew(model, seed)
            for mean in run_epochs(batches, epochs, take_step, "distilling", progress):
                history.append(mean)
                best.update()
        if score is not None:
            best.restore()
        optimizer.zero_grad()
    return history


def check_teachers(given: Any) -> list[nn.Module]:
    """One teacher, or several, as a list."""
    # A subclass may be a model of its own.
    several = isinstance(given, Sequence) or type(given) is nn.ModuleList
    teachers = list(given) if several else [given]
    for teacher in teachers:
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"a teacher must be a model (nn.Module), got {type(teacher).__name__}; pass the "
                "copy.deepcopy(model) that was made before compress(), or a list of such models"
            )
    if not teachers:
        raise ValueError("teacher is an empty list, expected at least one model")
    return teachers


def check_apart(teachers: Iterable[nn.Module], trained: Iterable[Tensor]) -> None:
    """ValueError for a teacher that would be trained as well."""
    own = {id(parameter) for parameter in trained}
    for teacher in teachers:
        shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
        if shared:
            raise ValueError(
                f"the teacher holds {len(shared)} parameters that are trained, {shared[0]!r} among "
                "them, expected a model of its own; pass a copy.deepcopy(model) that was made "
                "before training"
            )


def _groups(model: nn.Module, codebooks: list[nn.Parameter], network: str) -> list[dict[str, Any]]:
    """Groups of an optimizer: what is trained, and at which rate."""
    groups = [{"params": [book], "rate": _codebook_rate(book)} for book in codebooks]
    if network != "fixed":
        held = {id(book) for book in codebooks}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        groups += [{"params": others, "rate": 1.0}] if others else []
    if not groups:
        raise ValueError(
            f"nothing to train: all compressed tables are frozen, and with network={network!r} so "
            "is all else; compress a model whose tables require gradients"
        )
    return groups


def run_epochs(
    batches: Iterable[Any],
    epochs: int,
    take_step: Callable[[Any, float], float],
    what: str,
    progress: bool,
) -> Iterator[float]:
    """Train, and give the mean loss after each epoch.

    ``take_step`` gets a batch and the part of all training that is done; it returns its loss.
    """
    try:
        steps = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader has the method, and its dataset perhaps no length
        steps = None
    for epoch in range(epochs):
        bar = tqdm(batches, desc=f"{what} {epoch + 1}/{epochs}", disable=not progress)
        total, seen = 0.0, 0
        for step, batch in enumerate(bar):
            share = step / steps if steps else 0.5
            loss = take_step(batch, (epoch + share) / epochs)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of batch {step} of epoch {epoch + 1} is {loss}, expected a finite "
                    "one; look for NaN in what the teacher predicts, train a float16 model as "
                    "float32, or lower lr"
                )
            total, seen = total + loss, seen + 1
            bar.set_postfix(loss=f"{total / seen:.4f}", refresh=False)
        if not seen:
            raise ValueError("batches is empty in this epoch; pass a list or a DataLoader")
        yield total / seen


class BestState:
    """The best state of what is trained, as it will be stored; without a score, the first."""

    def __init__(
        self,
        model: nn.Module,
        trained: list[nn.Parameter],
        score: Callable[[nn.Module], float] | None,
        codebooks: list[tuple[nn.Parameter, torch.dtype]],
    ) -> None:
        self.model, self.score = model, score
        self.codebooks = [pair for pair in codebooks if pair[1] is not pair[0].dtype]
        self.trained = trained
        self.value = -math.inf
        self.state: list[Tensor] = []
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Keep the state if it is the best so far."""
        if self.score is None and self.state:
            return
        with self._rounded():
            value = self.value if self.score is None else _score_of(self.score(self.model))
            self.model.eval()  # a score may have left the model in another mode
            if value > self.value or not self.state:
                self.value, self.state = value, [p.detach().clone() for p in self.trained]

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """While open, codebooks are as they are read when they have been stored."""
        exact = [book.detach().clone() for book, _ in self.codebooks]
        try:
            for book, dtype in self.codebooks:
                book.copy_(_as_stored(book, dtype))
            yield
        finally:
            for (book, _), values in zip(self.codebooks, exact, strict=True):
                book.copy_(values)

    @contextmanager
    def back_on_error(self) -> Iterator[None]:
        """An error, or an interruption, puts the best state back: without a score, the first."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for param, value in zip(self.trained, self.state, strict=True):
            param.copy_(value)


class Loss:
    """Cross entropy of the student against teachers and labels, in logits or probabilities."""

    def __init__(
        self,
        model: nn.Module,
        teachers: Sequence[nn.Module],
        forward: Forward,
        labels: Labels | None,
        label_weight: float,
        temperature: float,
        counts: Mapping[Any, Tensor],
        rare: int,
    ) -> None:
        self.model, self.teachers, self.forward = model, teachers, forward
        self.counts, self.rare = counts, rare
        self.labels, self.label_weight, self.temperature = labels, label_weight, temperature
        self.probabilities: bool | None = None
        #: Predictions of each teacher so far, if all of them lay within 0 to 1; else 0.
        self.inside = [1] * len(teachers)
        #: Entries that hold the labels; None while that is not known.
        self.beside: frozenset[Any] | None = None

    def __call__(self, batch: Any, mix: float, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch, whose columns are shuffled as asked for."""
        if self.beside is None:
            self.beside = _label_entries(batch, self.labels)
        beside = self.beside or frozenset()
        inputs = mixed(batch, mix, generator, beside)
        if self.counts:
            inputs = without_rare(inputs, self.counts, self.rare, mix, generator, beside)
        with torch.no_grad():
            found = [prediction(self.forward(teacher, inputs)) for teacher in self.teachers]
            target = torch.stack(found).mean(0)
        output = prediction(self.forward(self.model, inputs))
        if any(self.inside):
            self._tell_logits(found, output.detach())
        target = self._softened(target)
        if self.labels is not None:
            # Rows that were mixed are other examples than those that the labels are of.
            changed = _rows_mixed(batch, mix, len(target), beside)
            own = _labels_of(self.labels(batch), target)
            target = torch.cat(
                [target[:changed], target[changed:].lerp(own[changed:], self.label_weight)]
            )
        if self.probabilities:
            return F.binary_cross_entropy(output.clamp(1e-7, 1 - 1e-7), target)
        return F.binary_cross_entropy_with_logits(output, target)

    def _tell_logits(self, found: Sequence[Tensor], output: Tensor) -> None:
        """Whether teachers return logits, as far as is known: some batch has one outside 0 to 1.

        Logits that all lie there would mean a model that knows nothing, or a small batch.
        """
        for number, values in enumerate(found):
            within = self.inside[number] and bool(((values >= 0) & (values <= 1)).all())
            self.inside[number] = self.inside[number] + len(values) if within else 0
        within = all(self.inside)
        if not within and max(self.inside) > _SURE:
            raise ValueError(
                f"teacher {self.inside.index(max(self.inside))} returns probabilities and teacher "
                f"{self.inside.index(0)} logits, expected the same of all; pass forward= or wrap "
                "one of them"
            )
        if within and min(self.inside) > _SURE and _outside(output) > _FAR_OUTSIDE:
            raise ValueError(
                "the teacher returns probabilities and the model logits, expected the same of "
                "both; pass forward= or wrap one of them"
            )
        if within is not self.probabilities:
            self.probabilities = within
            logger.info("distill: outputs are %s", "probabilities" if within else "logits")

    def _softened(self, target: Tensor) -> Tensor:
        """Probabilities at the temperature, from what the teacher returned."""
        if self.probabilities and self.temperature == 1:
            return target
        logits = target.logit(1e-7) if self.probabilities else target
        return (logits / self.temperature).sigmoid()


def _outside(values: Tensor) -> float:
    """Mean distance from 0 to 1."""
    return float((values - values.clamp(0, 1)).abs().mean())


def _score_of(found: Any) -> float:
    """What a score returned, as a number; TypeError or ValueError where it is none."""
    expected = "expected a number that is larger for the better"
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"score returned {found!r}, {expected}") from error
    if math.isnan(value):
        raise ValueError(f"score returned NaN, {expected}")
    return value


def check_options(
    epochs: int,
    mix: float,
    labels: Any,
    label_weight: float,
    rare: int,
    temperature: float,
    network: str,
) -> None:
    """ValueError for what is out of range, TypeError for labels that cannot be called."""
    for name, count in (("epochs", epochs), ("rare", rare)):
        if count < 0:
            raise ValueError(f"{name} must be 0 or more, got {count}")
    if network not in get_args(Network):
        raise ValueError(f"network must be one of {', '.join(get_args(Network))}, got {network!r}")
    for name, value in (("mix", mix), ("label_weight", label_weight)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be 0 to 1, got {value}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if labels is None:
        return
    if not callable(labels):
        raise TypeError(
            f"labels must be a function that gives the labels of a batch, such as "
            f"lambda batch: batch[1], got {type(labels).__name__}"
        )
    if mix == 1:
        raise ValueError("mix=1 leaves no row whose label holds; give a smaller mix, or no labels")


def _labels_of(found: Any, target: Tensor) -> Tensor:
    """Labels (batch,) like the predictions ``target``, checked."""
    if not isinstance(found, Tensor):
        raise TypeError(f"labels returned a {type(found).__name__}, expected a tensor (batch,)")
    labels = found.reshape(-1).to(target)
    if labels.shape != target.shape:
        raise ValueError(
            f"labels returned {tuple(found.shape)}, expected one for each of {len(target)} "
            "predictions"
        )
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError(
            f"labels lie between {labels.min():g} and {labels.max():g}, expected 0 to 1"
        )
    return labels


def _draw_anew(model: nn.Module, seed: int) -> None:
    """Initial values outside the tables.

    Drawn are modules with a ``reset_parameters()`` whose own parameters are all trainable. Their
    buffers, such as the statistics of a batch norm, stay: the network runs in eval mode.
    """
    tables = (nn.Embedding, nn.EmbeddingBag, DecodedTable)
    kept = {id(p) for m in model.modules() if isinstance(m, tables) for p in m.parameters()}
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        # Not torch.manual_seed, which also seeds devices that are not forked here.
        for generator in _generators(sorted(devices)):
            generator.manual_seed(seed)
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if not own or not callable(getattr(module, "reset_parameters", None)):
                continue
            if all(p.requires_grad and id(p) not in kept for p in own):
                _reset(name, module, kept)


def _generators(devices: list[int]) -> list[torch.Generator]:
    """That of the CPU, and those of CUDA devices."""
    return [torch.default_generator, *(torch.cuda.default_generators[n] for n in devices)]


@torch.no_grad()
def _reset(name: str, module: nn.Module, kept: set[int]) -> None:
    """Call ``reset_parameters()``; buffers, frozen parameters and those ``kept`` stay.

    It may reach into submodules, and may put new tensors in the place of those that are trained.
    """
    held = [(part, {**part._parameters}, {**part._buffers}) for part in module.modules()]
    stay = [p for p in module.parameters() if not p.requires_grad or id(p) in kept]
    values = [(tensor, tensor.clone()) for tensor in (*stay, *module.buffers())]
    try:
        module.reset_parameters()  # type: ignore[operator]
        for part, parameters, _ in held:
            for key, old in parameters.items():
                new = part._parameters.get(key)
                if old is not None and new is not None and new is not old:
                    old.copy_(new)
    except Exception as error:
        raise ValueError(
            f"network='fresh' cannot draw module {name!r} ({type(module).__name__}) anew: its "
            f"reset_parameters() raises {type(error).__name__} ({error}), expected a method to "
            "call without arguments; initialise the network yourself and pass network='trained'"
        ) from error
    finally:
        for part, parameters, buffers in held:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for tensor, value in values:
            tensor.copy_(value)


def _label_entries(batch: Any, labels: Labels | None) -> frozenset[Any] | None:
    """Entries of a mapping that hold the labels: whole numbers, perhaps, but no ids.

    None for a batch whose labels are all the same, as other entries may be, too.
    """
    entries = _first(batch)
    own = labels(batch) if labels is not None and isinstance(entries, Mapping) else None
    if not isinstance(own, Tensor):
        return frozenset()
    if not own.numel() or bool((own == own.flatten()[0]).all()):
        return None
    return frozenset(
        name
        for name, value in entries.items()
        if isinstance(value, Tensor)
        and value.numel() == own.numel()
        and torch.equal(value.reshape(-1).to(own), own.reshape(-1))
    )


def mixed(batch: Any, part: float, generator: torch.Generator, beside: Collection[Any] = ()) -> Any:
    """``batch`` with some columns shuffled between the rows of its first ``part``.

    Entries ``beside`` are none.
    """
    if part <= 0:
        return batch
    return _with_columns(batch, lambda columns: _shuffled(columns, part, generator), beside)


def count_ids(batches: Iterable[Any], labels: Labels | None = None) -> dict[Any, Tensor]:
    """How often each id occurs in each integer column: ``found[column][id % len]``."""
    found: dict[Any, Tensor] = {}
    beside: frozenset[Any] | None = None
    for batch in batches:
        if beside is None:
            beside = _label_entries(batch, labels)
        for name, column in _columns(_first(batch), beside or ()).items():
            if not _holds_ids(column):
                continue
            ids = column.flatten().long() % _MOST_IDS
            known = found.get(name, ids.new_zeros(1, dtype=torch.int32))
            least = 1 << int(ids.max()).bit_length() if len(ids) else 1
            if least > len(known):
                known = F.pad(known, (0, least - len(known)))
            found[name] = known.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
    return found


def without_rare(
    batch: Any,
    counts: Mapping[Any, Tensor],
    least: int,
    part: float,
    generator: torch.Generator,
    beside: Collection[Any] = (),
) -> Any:
    """``batch`` with ids that occur less than ``least`` times shuffled, but in its first ``part``.

    Between the rows that have such an id in that column; the others keep theirs.
    """

    def change(columns: dict[Any, Tensor]) -> dict[Any, Tensor]:
        changed = dict(columns)
        for name, column in columns.items():
            if name not in counts or not _holds_ids(column):
                continue
            start = int(part * len(column))
            ids, known = column[start:], counts[name].to(column.device)
            rare = known[ids.long() % _MOST_IDS % len(known)] < least
            changed[name] = torch.cat([column[:start], _permuted(ids, rare, generator)])
        return changed

    return _with_columns(batch, change, beside)


def _permuted(ids: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """``ids`` (n, ...), those that are ``chosen`` (bool) permuted between rows, in their places.

    What stands beside each other in an entry may be a sequence, or ids of several fields.
    """
    wide, places = ids.reshape(len(ids), -1).clone(), chosen.reshape(len(ids), -1)
    for column, here in zip(wide.unbind(1), places.unbind(1), strict=True):
        rows = here.nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        column[rows] = column[rows[order]]
    return wide.view_as(ids)


def _with_columns(
    batch: Any,
    change: Callable[[dict[Any, Tensor]], dict[Any, Tensor]],
    beside: Collection[Any],
) -> Any:
    """``batch`` with other columns."""
    if isinstance(batch, (tuple, list)) and batch:
        items = [_with_columns(batch[0], change, beside), *batch[1:]]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    columns = _columns(batch, beside)
    if not columns:
        return batch
    changed = change(columns)
    if isinstance(batch, Tensor):
        return torch.stack(list(changed.values()), 1)
    fields = [name for name in changed if isinstance(name, _Field)]
    if fields:
        matrix = torch.stack([changed.pop(name) for name in fields], 1)
        changed[fields[0].entry] = matrix
    entries = {**batch, **changed}
    try:  # a model may read entries as attributes
        made = type(batch)(entries)
        same = made.keys() == entries.keys() and all(made[n] is v for n, v in entries.items())
    except Exception:  # its constructor takes something else
        return entries
    return made if same else entries


def _first(batch: Any) -> Any:
    """What of a batch may have columns."""
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return batch


def _holds_ids(column: Tensor) -> bool:
    return column.dtype in (torch.int32, torch.int64)


def _columns(batch: Any, beside: Collection[Any]) -> dict[Any, Tensor]:
    """The columns of a tensor or mapping that can be shuffled between rows: none, or several.

    Entries ``beside`` are none.
    """
    columns: dict[Any, Tensor] = {}
    if isinstance(batch, Tensor) and batch.dim() == 2 and not batch.is_floating_point():
        columns = dict(enumerate(batch.unbind(1)))
    elif isinstance(batch, Mapping):
        tensors = {n: v for n, v in batch.items() if isinstance(v, Tensor) and v.dim()}
        columns = {name: value for name, value in tensors.items() if name not in beside}
        # Entries of another length, such as offsets of bags, are no columns.
        rows = len(next(iter(columns.values()), ()))
        columns = {name: value for name, value in columns.items() if len(value) == rows}
        columns = _with_fields(columns)
    return columns if len(columns) > 1 else {}


class _Field(NamedTuple):
    """A column of an entry that holds the ids of all fields."""

    entry: Any
    number: int


def _with_fields(columns: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """A matrix (batch, fields) that is the only entry with ids, as one column a field.

    Beside others with ids a matrix is a sequence, whose ids are all of one kind.
    """
    with_ids = [name for name, column in columns.items() if _holds_ids(column)]
    if len(with_ids) != 1 or columns[with_ids[0]].dim() != 2:
        return columns
    matrix = columns[with_ids[0]]
    others = {name: column for name, column in columns.items() if name != with_ids[0]}
    return others | {_Field(with_ids[0], i): one for i, one in enumerate(matrix.unbind(1))}


def _rows_mixed(batch: Any, part: float, predictions: int, beside: Collection[Any]) -> int:
    """How many of the predictions for ``batch``, the first ones, are not of its own rows."""
    columns = _columns(_first(batch), beside)
    if not columns or part <= 0:
        return 0
    rows = len(next(iter(columns.values())))
    # Each row may have several predictions, of several tasks.
    if rows and predictions % rows:
        raise ValueError(
            f"the columns that mix shuffles have {rows} rows for {predictions} predictions, "
            "expected one for each: which labels hold is not known; pass mix=0, or no labels"
        )
    return int(part * rows) * (predictions // rows) if rows else 0


def _shuffled(
    columns: dict[Any, Tensor], part: float, generator: torch.Generator
) -> dict[Any, Tensor]:
    """Columns with one in ten, at least one, permuted over the first ``part`` of the rows."""
    changed, names = dict(columns), list(columns)
    rows = int(part * len(columns[names[0]]))
    count = max(1, len(names) // 10)
    for number in torch.randperm(len(names), generator=generator)[:count].tolist():
        column = columns[names[number]]
        order = torch.randperm(rows, generator=generator).to(column.device)
        changed[names[number]] = torch.cat([column[order], column[rows:]])
    return changed


def _as_stored(codebooks: Tensor, dtype: torch.dtype) -> Tensor:
    """Float codebooks (M, K, S) rounded to a dtype; rounding them again changes nothing."""
    if dtype is torch.int8:
        steps, scales = quantize_codebooks(codebooks)
        return steps.float() * scales.float()[:, :, None]
    return codebooks.to(dtype).float()


def _codebook_rate(codebooks: Tensor) -> float:
    """Learning rate of codebooks (M, K, S) relative to that of the network.

    Adam moves every entry by about the learning rate, whatever its size. Scaled so, M codewords
    together move a row by the same part of its length for every table.
    """
    values = codebooks.detach()
    return _ROW_RATE * float(values.square().mean().sqrt()) / math.sqrt(len(values))


def set_rate(optimizer: torch.optim.Optimizer, lr: float, progress: float) -> None:
    """Linear warm-up, as Adam's first steps are its wildest, then a cosine to zero."""
    warm = min(1.0, (progress + 1e-3) / _WARM_UP)
    decayed = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"] * warm * decayed


def _codebook_sets(model: nn.Module) -> list[CodebookSet]:
    """Codebooks of the tables that are trainable, each once."""
    check_gathered(model)
    found = list(find_modules(model, (Compressed,)))
    if not found:
        raise ValueError("the model holds no compressed table; call compress() first")
    return list({id(m.codebook_set): m.codebook_set for m, _ in found if m.trains}.values())


@contextmanager
def _trainable(books: list[CodebookSet]) -> Iterator[list[nn.Parameter]]:
    """The codebooks as trainable float parameters; rounded back on leaving, by error too."""
    narrow = [
        (book, book.codebooks, book.scales)
        for book in books
        if book.codebooks.dtype in (torch.int8, torch.float16, torch.bfloat16)
    ]
    for book, _, _ in narrow:
        book.thaw()
    try:
        yield [book.codebooks for book in books]  # type: ignore[misc]
    finally:
        for book, codebooks, scales in narrow:
            book.freeze(codebooks, scales)


def dense_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Adam takes no sparse gradients: tables that give them give dense ones for a while."""
    # Some tables say what those do that they hold, which are modules as well.
    found = [
        module
        for module in model.modules()
        if getattr(module, "sparse", None) is True
        and not isinstance(getattr(type(module), "sparse", None), property)
    ]
    return gradients_of(found, sparse=False)


@contextmanager
def gradients_of(tables: Sequence[Any], *, sparse: bool) -> Iterator[None]:
    """Tables give sparse or dense gradients for a while; each gets its own setting back."""
    before = [table.sparse for table in tables]
    try:
        for table in tables:
            table.sparse = sparse
        yield
    finally:
        for table, value in zip(tables, before, strict=True):
            table.sparse = value
