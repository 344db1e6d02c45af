"""TorchRec's DLRM, start to end: train, compress in place, train on, save, load, compare.

Run ``python -m examples.torchrec_dlrm``; needs torchrec and fbgemm-gpu (or fbgemm-gpu-cpu).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import mec_embed
from examples.ctr.data import ClickData, counts
from examples.ctr.generator import generate
from examples.ctr.training import auc, iterate_batches
from mec_embed import CompressionConfig
from mec_embed.integrations import torchrec

DIM = 16
SPLITS = ("train", "test")
ROW = "{:<22}{:>10}{:>10}{:>17}"


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="little data, for a quick check")
    tiny = parser.parse_args().tiny
    data = generate(20_000, 6, max_rows=5_000) if tiny else generate(200_000, 12, max_rows=50_000)
    train_batches, test_batches = (read(data, name, 128 if tiny else 1024) for name in SPLITS)

    model = build(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=3e-4)
    train(model, optimizer, train_batches)
    lines = [describe("uncompressed", model, test_batches)]

    config = CompressionConfig(ratio=20)
    report = torchrec.compress(model, train_batches, config, optimizer=optimizer)
    print(report)
    lines.append(describe("compressed", model, test_batches))

    train(model, optimizer, train_batches)  # the same loop, model and optimizer
    lines.append(describe("trained on", model, test_batches))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dlrm.safetensors"
        mec_embed.save(model, file)
        fresh = mec_embed.load(build(data), file)
    lines.append(describe("saved and loaded", fresh, test_batches))
    print("", ROW.format("", "test AUC", "logloss", "embedding bytes"), *lines, sep="\n")


def build(data: ClickData) -> DLRM:
    """An untrained DLRM with one table a field."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(rows, DIM, f"table_{field}", feature_names=[field])
        for field, rows in zip(data.fields, data.rows, strict=True)
    ]
    return DLRM(EmbeddingBagCollection(tables), len(data.fields), [64, DIM], [64, 1])


def read(data: ClickData, split: str, size: int) -> list[Batch]:
    """Batches as TorchRec takes them: ids as jagged features, their log counts as dense ones."""
    log_counts = [torch.from_numpy(count).float().log1p() for count in counts(data).values()]
    batches = []
    for ids, labels in iterate_batches(data, split, size, shuffle=False):
        columns = ids.unbind(1)
        dense = torch.stack([log[c] for log, c in zip(log_counts, columns, strict=True)], 1)
        lengths = torch.ones(ids.numel(), dtype=torch.int64)  # one id a bag
        sparse = KeyedJaggedTensor(data.fields, torch.cat(columns), lengths=lengths)
        batches.append(Batch(dense, sparse, labels))
    return batches


def train(model: DLRM, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """One epoch, as any training loop would do it."""
    model.train()
    for number in torch.randperm(len(batches)).tolist():
        optimizer.zero_grad()
        logits = predict(model, batches[number])
        nn.functional.binary_cross_entropy_with_logits(logits, batches[number].labels).backward()
        optimizer.step()


def predict(model: DLRM, batch: Batch) -> Tensor:
    """Logits (batch,)."""
    return model(batch.dense_features, batch.sparse_features).squeeze(1)


def describe(stage: str, model: DLRM, batches: list[Batch]) -> str:
    """A line of the table."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([predict(model, batch) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    logloss = nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    tables = model.sparse_arch.embedding_bag_collection
    size = sum(tensor.nbytes for tensor in [*tables.parameters(), *tables.buffers()])
    return ROW.format(
        stage, f"{auc(labels.numpy(), logits.numpy()):.4f}", f"{logloss:.4f}", f"{size:,}"
    )


if __name__ == "__main__":
    main()
