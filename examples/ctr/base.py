"""Base models: load a data set by name, build its model, train it, save it and load it again.

Run ``python -m examples.ctr.base NAME... --out FOLDER`` to train and save base models.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from examples.ctr.data import ClickData, load_parquet
from examples.ctr.generator import generate
from examples.ctr.models import DeepFM
from examples.ctr.settings import SETTINGS, Settings
from examples.ctr.training import evaluate, train_with

FOLDER_VARIABLE = "MEC_EMBED_DATA"


def load_data(name: str, folder: str | Path | None = None) -> ClickData:
    """Generate the built-in click log (``"generator"``) or read ``<folder>/<name>.parquet``.

    The folder defaults to the environment variable MEC_EMBED_DATA.
    """
    if name == "generator":
        return generate()
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise ValueError(f"{name} needs a data folder: pass one or set {FOLDER_VARIABLE}")
    return load_parquet(Path(folder) / f"{name}.parquet", SETTINGS[name].min_count)


def build_model(fields: list[str], rows: list[int], settings: Settings, seed: int = 0) -> DeepFM:
    """An untrained DeepFM; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return DeepFM(
        fields, rows, settings.dim, settings.hidden, settings.dropout, settings.batch_norm
    )


def train_base(data: ClickData, settings: Settings, seed: int = 0) -> tuple[DeepFM, dict]:
    """Train a base model; returns it with its checkpoint, as `load_base` reads it."""
    model = build_model(data.fields, data.rows, settings, seed)
    start = time.perf_counter()
    history = train_with(settings, model, data, seed)
    seconds = time.perf_counter() - start
    test = evaluate(model, data, "test")
    checkpoint = {
        "state_dict": model.state_dict(),
        "fields": data.fields,
        "rows": data.rows,
        "dim": settings.dim,
        "hidden": settings.hidden,
        "dropout": settings.dropout,
        "batch_norm": settings.batch_norm,
        "valid": max(metrics.auc for metrics in history),
        "test": test.auc,
        "test_logloss": test.logloss,
        "epochs": len(history),
        "seconds": seconds,
    }
    return model, checkpoint


def load_base(path: str | Path) -> tuple[DeepFM, dict]:
    """A saved base model in evaluation mode, and its checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    names = ("fields", "rows", "dim", "hidden", "dropout", "batch_norm")
    model = DeepFM(*(checkpoint[name] for name in names))
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval(), checkpoint


def main() -> None:
    """Train and save the base models named on the command line."""
    parser = argparse.ArgumentParser(description="Train and save base DeepFM models.")
    parser.add_argument("names", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--data", help=f"folder of Parquet files (default: ${FOLDER_VARIABLE})")
    parser.add_argument("--out", type=Path, required=True, help="folder for <name>.pt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        data = load_data(name, options.data)
        _, checkpoint = train_base(data, SETTINGS[name], options.seed)
        torch.save(checkpoint, options.out / f"{name}.pt")
        best = f", best possible {data.best_auc:.4f}" if data.best_auc else ""
        print(
            f"{name}: AUC valid {checkpoint['valid']:.4f}, test {checkpoint['test']:.4f}{best}, "
            f"test log loss {checkpoint['test_logloss']:.4f}, {checkpoint['epochs']} epochs, "
            f"{checkpoint['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
