"""The same fine-tuning for every method: distillation from the base model, best by validation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.common import PARTS, Base
from benchmarks.quality.posthoc import freeze, thaw
from examples.ctr.training import evaluate
from mec_embed import CompressedEmbedding, distill
from mec_embed.distill import count_ids, mixed, without_rare

Batches = list[tuple[Tensor, Tensor]]

#: Learning rates that a baseline may choose from, by validation; ours has one.
RATES = (3e-4, 2e-3)


class Targets(NamedTuple):
    """What is learnt, and for how many epochs; see :func:`mec_embed.distill`."""

    label_weight: float = 0.0
    rare: int = 0
    mix: float = 0.5
    epochs: int = 4


#: The first takes labels as they are, which suits tables that know none, such as hashed ones. The
#: last two give up what the rows of rare ids mean, the one before keeps it.
LABELS = (Targets(0.1), Targets(0.5, 200), Targets(0.5, 100, 0.0), Targets(0.5, 50, 0.0, 8))


def _teacher_alone(base: Base) -> Targets:
    """Without labels."""
    return Targets(epochs=base.settings.distill_epochs)


def tune(
    model: nn.Module, base: Base, *, labels: bool = False, calibrated: bool = False
) -> nn.Module:
    """The best, by validation AUC, of the model as it is and of tuned ones.

    Args:
        model: not changed.
        base: its teacher.
        labels: labels are mixed into the targets, and a fresh network is tried as well; baselines
            have nine trials to choose from by validation, ours four.
        calibrated: the teacher is softened so that its validation log loss is the least, and the
            best is that of the least validation log loss.
    """
    temperature = temperature_of(base) if calibrated else 1.0
    batches = list(base.batches(base.seed + 1))
    is_ours = any(isinstance(module, CompressedEmbedding) for module in model.modules())
    tuner = _ours if is_ours else _others
    metrics = {
        one: evaluate(one, base.data, "valid")
        for one in [model, *tuner(model, base, batches, labels, temperature)]
    }
    return max(metrics, key=lambda one: -metrics[one].logloss if calibrated else metrics[one].auc)


def temperature_of(base: Base) -> float:
    """What the base model's logits are divided by for the least validation log loss."""
    logits, labels = logits_of(base.model, base, "valid")
    return 1 / float(logistic_weights(logits[:, None], labels)[0])


def logistic_weights(inputs: Tensor, labels: Tensor) -> Tensor:
    """Weights (columns,) of inputs (n, columns) for the least log loss, by Newton's method.

    From 1 for the first column and 0 for the others.
    """
    weights = torch.zeros_like(inputs[0])
    weights[0] = 1
    for _ in range(20):
        chance = (inputs @ weights).sigmoid()
        curvature = inputs.T @ (inputs * (chance * (1 - chance))[:, None])
        weights -= torch.linalg.solve(curvature, inputs.T @ (chance - labels))
    return weights


@torch.no_grad()
def logits_of(model: nn.Module, base: Base, split: str) -> tuple[Tensor, Tensor]:
    """What a model returns for a split, and the labels there, both float64."""
    ids, labels = base.data.ids[split], base.data.labels[split].double()
    return torch.cat([model.eval()(part) for part in ids.split(8192)]).double().flatten(), labels


def _ours(
    model: nn.Module, base: Base, batches: Batches, labels: bool, temperature: float
) -> Iterator[nn.Module]:
    trials = [("trained", _teacher_alone(base))]
    if labels:
        trials = [("fresh", LABELS[0]), *(("trained", targets) for targets in LABELS[1:])]
    for network, targets in trials:
        tuned = copy.deepcopy(model)
        distill(
            tuned,
            base.model,
            batches,
            labels=(lambda batch: batch[1]) if labels else None,
            **targets._asdict(),
            temperature=temperature,
            network=network,  # type: ignore[arg-type]
            # A softened teacher's AUC is the same from the start on.
            score=(lambda one: evaluate(one, base.data, "valid").auc) if temperature == 1 else None,
            seed=base.seed,
            progress=False,
        )
        yield tuned


def _others(
    model: nn.Module, base: Base, batches: Batches, labels: bool, temperature: float
) -> Iterator[nn.Module]:
    for rate, targets in itertools.product(RATES, LABELS if labels else (_teacher_alone(base),)):
        tuned = copy.deepcopy(model)
        yield _distilled(tuned, base, batches, rate, labels, temperature, targets)
    if labels:
        fresh = copy.deepcopy(model)
        _draw_anew(fresh, base.seed)
        yield _distilled(fresh, base, batches, RATES[-1], labels, temperature, LABELS[0])


def _draw_anew(model: nn.Module, seed: int) -> None:
    """Initial values for the layers outside the tables."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if name.partition(".")[0] not in PARTS and isinstance(module, nn.Linear):
            module.reset_parameters()


def _distilled(
    model: nn.Module,
    base: Base,
    batches: Batches,
    rate: float,
    labels: bool,
    temperature: float,
    targets: Targets,
) -> nn.Module:
    """Plain distillation: the loss, batches and schedule of :func:`mec_embed.distill`."""
    is_half = thaw(model)
    model.eval()
    generator = torch.Generator().manual_seed(base.seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    steps = targets.epochs * len(batches)
    counts = count_ids(batches) if targets.rare else {}
    best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
    for step in range(steps):
        batch = batches[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        inputs = mixed(batch, targets.mix, generator)
        if targets.rare:
            inputs = without_rare(inputs, counts, targets.rare, targets.mix, generator)
        _loss(model, base, inputs, targets, temperature).backward()
        optimizer.step()
        if labels and (step + 1) % len(batches) == 0:
            # Ours keeps its best epoch.
            score = evaluate(model, base.data, "valid").auc
            if score > best[0]:
                best = score, copy.deepcopy(model.state_dict())
    if best[1]:
        model.load_state_dict(best[1])
    if is_half:
        freeze(model)
    return model


def _loss(
    model: nn.Module,
    base: Base,
    inputs: tuple[Tensor, Tensor],
    targets: Targets,
    temperature: float,
) -> Tensor:
    ids, own = inputs
    with torch.no_grad():
        target = (base.model.eval()(ids) / temperature).sigmoid()
    whole = int(targets.mix * len(target))
    target[whole:] = target[whole:].lerp(own[whole:], targets.label_weight)
    return F.binary_cross_entropy_with_logits(model(ids), target)
