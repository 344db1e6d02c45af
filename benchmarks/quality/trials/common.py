"""What the trials share: the options that name a base model, and its compressed version."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

from benchmarks.quality.common import Base
from benchmarks.quality.ours import ours
from benchmarks.quality.study import _base
from examples.ctr.training import evaluate


def parser(doc: str | None, *, data: str, model: str, ratio: float) -> argparse.ArgumentParser:
    """A parser of the options that every trial has, with these defaults."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--data", default=data)
    found.add_argument("--model", default=model)
    found.add_argument("--dim", type=int, default=40)
    found.add_argument("--ratio", type=float, default=ratio)
    found.add_argument("--bases", type=Path, default=Path("benchmarks/bases"))
    found.add_argument("--fuxictr-root", type=Path)
    return found


def base_of(options: argparse.Namespace, seed: int) -> Base:
    """The trained base model that the options name."""
    return _base(options.data, options.model, options, seed)


def teller(base: Base) -> Callable[[str, nn.Module], None]:
    """Prints a stage, and how a model's metrics differ from the base's there."""
    start = [evaluate(base.model, base.data, split) for split in ("valid", "test")]

    def tell(stage: str, model: nn.Module) -> None:
        valid, test = (evaluate(model, base.data, split) for split in ("valid", "test"))
        change = f"test {test.auc - start[1].auc:+.5f} / {test.logloss - start[1].logloss:+.5f}"
        print(f"{stage}: valid {valid.auc - start[0].auc:+.5f}, {change}", flush=True)  # noqa: T201

    return tell


def compressed(base: Base, ratio: float) -> nn.Module:
    """The base model as ours compresses it; ends the trial where the ratio cannot be reached."""
    model = ours(base, ratio)
    if model is None:
        raise SystemExit("the ratio cannot be reached")
    return model
