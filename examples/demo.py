"""The main job, end to end: train a DeepFM, compress it, distil, save, reload, and compare.

``python -m examples.demo`` uses the built-in generator; ``--data FILE.parquet`` a click log with
columns ``label``, ``split`` and one column a field.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mec_embed
from examples.ctr.base import build_model
from examples.ctr.data import ClickData, load_parquet
from examples.ctr.generator import generate
from examples.ctr.settings import SETTINGS, Settings
from examples.ctr.training import Metrics, evaluate, iterate_batches, train_with
from mec_embed import CompressionConfig, FrequencyStats, compress, distill, load, save

COLUMNS = ("stage", "test AUC", "change", "logloss", "embedding bytes", "file bytes", "seconds")


def main() -> None:
    """Parse the command line, run every seed, print the table."""
    options = _parse()
    if options.evaluate:
        _evaluate_saved(options.evaluate)
        return
    data, settings = _data(options)
    runs = []
    for seed in range(options.seeds):
        run = run_once(data, settings, options, seed)
        runs.append(run)
        print(
            f"\n{data.name}, seed {seed}: {len(data.labels['train']):,} training examples, "
            f"{len(data.fields)} fields, {sum(data.rows):,} rows, dim {settings.dim}, "
            f"ratio {run['ratio']:.1f}" + _best(data)
        )
        print(_table(run["stages"]))
    if options.json:
        options.json.write_text(json.dumps(_result(data, settings, options, runs), indent=1) + "\n")


def run_once(
    data: ClickData, settings: Settings, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Train, compress, distil, save and reload with one seed; metrics and bytes of every stage."""
    options.out.mkdir(parents=True, exist_ok=True)
    dense_file, small_file = options.out / "dense.safetensors", options.out / "small.safetensors"
    model = build_model(data.fields, data.rows, settings, seed)
    if options.dense:
        _, seconds = _timed(lambda: model.load_state_dict(load_file(options.dense)))
    else:
        _, seconds = _timed(lambda: train_with(settings, model, data, seed))
    save_file(model.state_dict(), dense_file)
    stages = [_stage("uncompressed", model, data, seconds, dense_file)]

    batches = list(iterate_batches(data, "train", settings.batch_size, shuffle=True, seed=seed))
    teacher = copy.deepcopy(model)
    config = CompressionConfig(
        ratio=options.ratio, codebook_dtype=options.codebook_dtype, seed=seed
    )
    report, seconds = _timed(
        lambda: compress(
            model, FrequencyStats.from_batches(model, batches), config, batches=batches
        )
    )
    print(report)
    stages.append(_stage("compressed", model, data, seconds))

    _, seconds = _timed(
        lambda: distill(
            model,
            teacher,
            batches,
            epochs=settings.distill_epochs,
            mix=settings.distill_mix,
            labels=lambda batch: batch[1],
            score=lambda student: evaluate(student, data, "valid").auc,
            seed=seed,
        )
    )
    save(model, small_file)
    stages.append(_stage("distilled", model, data, seconds, small_file))

    reloaded, seconds = _timed(lambda: _reload_elsewhere(data, settings, options.out, small_file))
    stages.append(reloaded | {"stage": "reloaded", "seconds": seconds})
    return {"seed": seed, "ratio": report.ratio, "stages": stages, "report": report.to_dict()}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a Parquet click log instead of the generator")
    parser.add_argument("--ratio", type=float, default=50.0, help="bytes before / bytes after")
    parser.add_argument("--codebook-dtype", default="int8", help="see CompressionConfig")
    parser.add_argument("--distill-epochs", type=int, help="default: as in settings.py")
    parser.add_argument("--dense", type=Path, help="a trained dense.safetensors, to skip training")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds 0, 1, ...")
    parser.add_argument("--tiny", action="store_true", help="a small generator, for a quick check")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for models")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _data(options: argparse.Namespace) -> tuple[ClickData, Settings]:
    name = options.data.stem if options.data else "generator"
    settings = SETTINGS.get(name, SETTINGS["generator"])
    if options.tiny:
        settings = replace(settings, dim=16, epochs=2, batch_size=512)
    if options.distill_epochs is not None:
        settings = replace(settings, distill_epochs=options.distill_epochs)
    if options.data:
        return load_parquet(options.data, settings.min_count), settings
    if options.tiny:
        return generate(examples=40_000, fields=8, max_rows=20_000), settings
    return generate(), settings


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started


def embedding_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the model's embedding tables, each once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for part in (model.embeddings, model.first_order)
        for tensor in [*part.parameters(), *part.buffers()]
    }
    return sum(tensors.values())


def _stage(
    name: str, model: nn.Module, data: ClickData, seconds: float, file: Path | None = None
) -> dict[str, Any]:
    return {
        "stage": name,
        **asdict(evaluate(model, data, "test")),
        "embedding_bytes": embedding_bytes(model),
        "file_bytes": file.stat().st_size if file else None,
        "seconds": seconds,
    }


def _reload_elsewhere(
    data: ClickData, settings: Settings, folder: Path, file: Path
) -> dict[str, Any]:
    """What a fresh Python process reads from the file and measures on the test split."""
    save_file(
        {"ids": data.ids["test"].contiguous(), "labels": data.labels["test"]},
        folder / "test.safetensors",
    )
    job = folder / "evaluate.json"
    job.write_text(
        json.dumps(
            {
                "fields": data.fields,
                "rows": data.rows,
                "settings": asdict(settings),
                "test": str(folder / "test.safetensors"),
                "file": str(file),
            }
        )
    )
    command = [sys.executable, "-m", "examples.demo", "--evaluate", str(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the fresh process failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _evaluate_saved(job: Path) -> None:
    """In the fresh process: build the skeleton, load the file, print the metrics as JSON."""
    wanted = json.loads(job.read_text())
    settings = Settings(**wanted["settings"])
    test = load_file(wanted["test"])
    data = ClickData(
        "saved", wanted["fields"], wanted["rows"], {"test": test["ids"]}, {"test": test["labels"]}
    )
    file = Path(wanted["file"])
    model = load(build_model(data.fields, data.rows, settings), file)
    json.dump(_stage("reloaded", model, data, 0.0, file), sys.stdout)


def _best(data: ClickData) -> str:
    return f", best possible test AUC {data.best_auc:.4f}" if data.best_auc else ""


def _table(stages: list[dict[str, Any]]) -> str:
    lines = [COLUMNS]
    for stage in stages:
        metrics = Metrics(stage["auc"], stage["logloss"])
        lines.append(
            (
                stage["stage"],
                f"{metrics.auc:.4f}",
                f"{metrics.auc - stages[0]['auc']:+.4f}",
                f"{metrics.logloss:.4f}",
                f"{stage['embedding_bytes']:,}",
                f"{stage['file_bytes']:,}" if stage["file_bytes"] else "-",
                f"{stage['seconds']:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _result(
    data: ClickData, settings: Settings, options: argparse.Namespace, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything needed to read the figures later: settings, versions, hardware."""
    return {
        "data": data.name,
        "best_auc": data.best_auc,
        "settings": asdict(settings),
        "ratio": options.ratio,
        "codebook_dtype": options.codebook_dtype,
        "mec_embed": mec_embed.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
