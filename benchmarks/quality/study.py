"""Run methods on data sets at byte budgets; results go, line by line, into a CSV file.

``python -m benchmarks.quality.study --data criteo_dac80k --ratios 25 50 100 --seeds 3`` appends to
``benchmarks/results/quality.csv`` what is not in it yet: an interrupted study goes on where it
stopped. ``--quick`` is a subset of about ten minutes. Data are read from ``MEC_EMBED_DATA``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import mec_embed
from benchmarks import lines
from benchmarks.hardware import processor
from benchmarks.quality.big_generator import TOTAL_IDS, generate_named, train_sparse
from benchmarks.quality.common import Base, Method, embedding_bytes
from benchmarks.quality.fuxictr_data import FIELDS, load_folder
from benchmarks.quality.models import ALL_IDS, MODELS, STUDY_SETTINGS, build, settings_for
from benchmarks.quality.ours import ABLATION, OURS, self_distilled, taught
from benchmarks.quality.plot import ALONE, LABELS, SELF_DISTILLED, TUNED, TWO_TEACHERS
from benchmarks.quality.posthoc import POSTHOC
from benchmarks.quality.trained import TRAINED
from benchmarks.quality.tuning import tune
from examples.ctr.data import ClickData, counts, load_parquet
from examples.ctr.generator import generate
from examples.ctr.training import evaluate, train_with

#: The uncompressed model itself, to tell what tuning brings.
WHOLE: dict[str, Method] = {"fp32": lambda base, ratio: base.copy()}
METHODS: dict[str, Method] = {**OURS, **WHOLE, **POSTHOC, **TRAINED, **ABLATION}
#: What runs where no method is named.
USUAL = [*OURS, *POSTHOC, *TRAINED]
#: Methods of one size; they run once, at whatever ratio that is.
ONE_SIZE = ("retrained", "fp32", "fp16", "int8", "int4", "int2")
KEY = ("data", "model", "dim", "seed", "method", "ratio")
COLUMNS = (
    *KEY, "stage", "bytes", "bytes_before", "valid_auc", "valid_logloss", "test_auc",
    "test_logloss", "seconds", "mec_embed", "torch", "processor", "threads",
)  # fmt: skip
#: A stage of its own: from a softened teacher.
CALIBRATED = "calibrated"
OWN_STAGES = LABELS, SELF_DISTILLED, ALONE, TWO_TEACHERS, CALIBRATED
#: Beyond the seeds of bases: that of the second teacher.
SECOND_SEED = 100
#: Test AUCs of one base that was read again differ by less.
_SAME_AUC = 2e-5


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    done = read_keys(options.out, options.stage)
    jobs = [job for job in _jobs(options) if _key(job, options) not in done]
    with tqdm(total=len(jobs), unit="run") as bar:
        for (name, model, seed), group in itertools.groupby(jobs, key=lambda job: job[:3]):
            base = _base(name, model, options, seed)
            label = {"data": name, "model": model, "dim": base.settings.dim, "seed": seed}
            _record_base(options.out, base, label)
            if options.stage in (SELF_DISTILLED, ALONE):
                base = self_distilled(base)
            if options.stage == TWO_TEACHERS:
                base = taught(base, _base(name, model, options, seed + SECOND_SEED))
            for *_, method, ratio in group:
                bar.set_postfix_str(f"{name} {model} {method} {ratio:g}x")
                _run(options, base, label, method, ratio)
                bar.update()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["criteo_dac80k"], choices=STUDY_SETTINGS)
    parser.add_argument("--models", nargs="+", default=["DeepFM"], choices=MODELS)
    parser.add_argument("--dim", type=int, help="default: as in the settings of the data set")
    parser.add_argument("--ratios", nargs="+", type=float, default=[10, 25, 50, 100, 200])
    parser.add_argument("--methods", nargs="+", default=USUAL, choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-tuning", action="store_true", help="only right after compressing")
    stages = parser.add_mutually_exclusive_group()
    helps = {
        LABELS: "only tuning with labels, a stage of its own",
        SELF_DISTILLED: "the same, of a base that was self-distilled with labels before",
        ALONE: "of such a base, tuning without labels, a stage of its own",
        TWO_TEACHERS: "of a base taught by itself and a second model, tuning without labels",
        CALIBRATED: "only tuning from a softened teacher, a stage of its own",
    }
    for stage, text in helps.items():
        option = f"--{stage.replace(' ', '-')}"
        stages.add_argument(option, dest="stage", action="store_const", const=stage, help=text)
    parser.set_defaults(stage=TUNED)
    parser.add_argument("--quick", action="store_true", help="one seed, 25x, fewer methods")
    parser.add_argument("--fuxictr-root", type=Path, help="folder of Criteo_x1, Avazu_x1, ...")
    parser.add_argument("--bases", type=Path, default=Path("benchmarks/bases"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.csv"))
    options = parser.parse_args()
    if options.quick:
        options.ratios, options.seeds = [25.0], 1
        options.methods = [name for name in options.methods if name not in ONE_SIZE]
    return options


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, int, str, float]]:
    """(data, model, seed, method, ratio) of all runs."""
    for name, model, seed in itertools.product(options.data, options.models, range(options.seeds)):
        for method in options.methods:
            ratios = [0.0] if method in ONE_SIZE else options.ratios
            yield from ((name, model, seed, method, ratio) for ratio in ratios)


def _key(job: tuple[str, str, int, str, float], options: argparse.Namespace) -> tuple[str, ...]:
    name, model, seed, method, ratio = job
    dim = settings_for(name, options.dim).dim
    return tuple(map(str, (name, model, dim, seed, method, ratio)))


def read_keys(file: Path, stage: str = TUNED) -> set[tuple[str, ...]]:
    """The runs that a result file already holds: of a stage of its own, or those of the usual."""
    return {
        tuple(row[name] for name in KEY)
        for row in lines.read(file)
        if row["stage"] in ("impossible", stage)
        or (stage == TUNED and row["stage"] not in OWN_STAGES)
    }


@functools.lru_cache(maxsize=1)
def _data(name: str, fuxictr_root: Path | None = None) -> ClickData:
    if name == "generator":
        return generate()
    if name in TOTAL_IDS:
        return generate_named(name)
    if name in FIELDS:
        if fuxictr_root is None:
            raise SystemExit(f"{name}: give --fuxictr-root, the folder that holds {name}/train.csv")
        return load_folder(fuxictr_root / name, name, STUDY_SETTINGS[name].min_count)
    folder = os.environ.get("MEC_EMBED_DATA")
    if not folder:
        raise SystemExit("set MEC_EMBED_DATA to the folder of the data sets")
    file = Path(folder) / f"{name.removesuffix(ALL_IDS)}.parquet"
    return load_parquet(file, STUDY_SETTINGS[name].min_count)


def _base(name: str, model: str, options: argparse.Namespace, seed: int) -> Base:
    """The trained base model, from its file where there is one."""
    settings, data = settings_for(name, options.dim), _data(name, options.fuxictr_root)
    trained = build(model, data, settings, seed)
    file = options.bases / f"{name}_{model}_{settings.dim}_{seed}.safetensors"
    if file.exists():
        trained.load_state_dict(load_file(file))
    else:
        if name in TOTAL_IDS:
            # Dense Adam would move millions of rows that a batch does not use.
            train_sparse(trained, data, settings, seed)
        else:
            train_with(settings, trained, data, seed)
        options.bases.mkdir(parents=True, exist_ok=True)
        save_file(trained.state_dict(), file)
    return Base(data, settings, trained.eval(), counts(data), seed)


def _record_base(file: Path, base: Base, label: dict[str, Any]) -> None:
    """The line that the others are compared with: of the same base, so of the same processor.

    The same training gives another model where floating-point sums are ordered otherwise.
    """
    known = [
        row
        for row in lines.read(file)
        if row["method"] == "uncompressed"
        and row["processor"] == processor()
        and all(row[name] == str(value) for name, value in label.items())
    ]
    if not known:
        record(file, base, label, "uncompressed", 1.0, "trained", base.model, 0.0)
        return
    auc = evaluate(base.model, base.data, "test").auc
    if abs(auc - float(known[0]["test_auc"])) > _SAME_AUC:
        raise SystemExit(
            f"{label}: the base has test AUC {auc:.6f}, that of {file} {known[0]['test_auc']}; use "
            "the bases of those results, or another --out"
        )


def _run(
    options: argparse.Namespace, base: Base, label: dict[str, Any], method: str, ratio: float
) -> None:
    """One method at one ratio: right after compressing and tuned, or tuned in another way."""
    torch.manual_seed(base.seed)
    started = time.perf_counter()
    model = METHODS[method](base, ratio or 1.0)
    seconds = time.perf_counter() - started
    if model is None:
        line = {**label, "method": method, "ratio": ratio, "stage": "impossible"}
        lines.append(options.out, line, COLUMNS)
        return
    if ratio and embedding_bytes(model) > base.budget(ratio):
        raise RuntimeError(f"{method} takes more than its budget at {ratio:g}x")
    if options.stage == TUNED:
        stage = "trained" if method in TRAINED else "compressed"
        record(options.out, base, label, method, ratio, stage, model, seconds)
    if options.no_tuning:
        return
    started = time.perf_counter()
    labels = options.stage in (LABELS, SELF_DISTILLED)
    tuned = tune(model, base, labels=labels, calibrated=options.stage == CALIBRATED)
    seconds = time.perf_counter() - started
    record(options.out, base, label, method, ratio, options.stage, tuned, seconds)


def record(
    file: Path,
    base: Base,
    label: dict[str, Any],
    method: str,
    ratio: float,
    stage: str,
    model: torch.nn.Module,
    seconds: float,
) -> None:
    """Evaluate a model and append a line."""
    line: dict[str, Any] = {**label, "method": method, "ratio": ratio, "stage": stage}
    for split in ("valid", "test"):
        metrics = asdict(evaluate(model, base.data, split))
        line |= {f"{split}_{name}": f"{value:.6f}" for name, value in metrics.items()}
    line |= {"bytes": embedding_bytes(model), "bytes_before": base.nbytes}
    line |= {"seconds": f"{seconds:.1f}", "mec_embed": mec_embed.__version__}
    line |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    lines.append(file, line | {"processor": processor()}, COLUMNS)


if __name__ == "__main__":
    main()
