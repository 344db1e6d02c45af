"""Plain PyTorch, start to end: train, compress in place, train on, save, load, compare.

Run ``python -m examples.plain_pytorch``.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from examples.ctr.base import build_model
from examples.ctr.data import ClickData
from examples.ctr.generator import generate
from examples.ctr.settings import SETTINGS
from examples.ctr.training import evaluate, iterate_batches
from mec_embed import CompressionConfig, FrequencyStats, compress, load, save

ROW = "{:<22}{:>10}{:>10}{:>17}"


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="little data, for a quick check")
    tiny = parser.parse_args().tiny
    data = generate(20_000, 6, max_rows=5_000) if tiny else generate(200_000, 12, max_rows=50_000)
    settings = replace(SETTINGS["generator"], dim=16, batch_size=128 if tiny else 1024)

    model = build_model(data.fields, data.rows, settings)  # any nn.Module with nn.Embedding tables
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=3e-4)
    train(model, optimizer, data, settings.batch_size, seed=0)
    lines = [describe("uncompressed", model, data)]

    batches = iterate_batches(data, "train", settings.batch_size, shuffle=False)
    stats = FrequencyStats.from_batches(model, batches)
    report = compress(model, stats, CompressionConfig(ratio=20), optimizer=optimizer)
    print(report)
    lines.append(describe("compressed", model, data))

    train(model, optimizer, data, settings.batch_size, seed=1)  # the same loop, model and optimizer
    lines.append(describe("trained on", model, data))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save(model, file)
        fresh = load(build_model(data.fields, data.rows, settings), file)
    lines.append(describe("saved and loaded", fresh, data))
    print("", ROW.format("", "test AUC", "logloss", "embedding bytes"), *lines, sep="\n")


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: ClickData, size: int, seed: int
) -> None:
    """One epoch, as any training loop would do it."""
    model.train()
    for ids, labels in iterate_batches(data, "train", size, shuffle=True, seed=seed):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(ids), labels).backward()
        optimizer.step()


def describe(stage: str, model: nn.Module, data: ClickData) -> str:
    """A line of the table."""
    metrics = evaluate(model, data, "test")
    tables = nn.ModuleList([model.embeddings, model.first_order])
    size = sum(tensor.nbytes for tensor in [*tables.parameters(), *tables.buffers()])
    return ROW.format(stage, f"{metrics.auc:.4f}", f"{metrics.logloss:.4f}", f"{size:,}")


if __name__ == "__main__":
    main()
