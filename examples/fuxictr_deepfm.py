"""FuxiCTR: train a DeepFM with FuxiCTR's own ``fit``, compress it, train on, save and reload.

Run ``python -m examples.fuxictr_deepfm`` (needs fuxictr; ``--tiny`` for a few seconds).
"""

import argparse
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

import mec_embed
from examples.ctr.data import SPLITS, ClickData
from examples.ctr.generator import generate
from mec_embed import CompressionConfig
from mec_embed.integrations import fuxictr

DIM = 16


class DeepFM(BaseModel):
    """DeepFM from FuxiCTR's layers, as its model zoo has it."""

    def __init__(self, feature_map: FeatureMap, **params) -> None:
        super().__init__(feature_map, model_id="DeepFM", **params)
        self.embedding_layer = FeatureEmbedding(feature_map, DIM)
        self.fm = FactorizationMachine(feature_map)
        inputs = feature_map.sum_emb_out_dim()
        self.mlp = MLP_Block(inputs, hidden_units=[128, 64], output_dim=1)
        self.compile("adam", "binary_crossentropy", lr=1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Click probabilities (B, 1) of a batch."""
        features = self.get_inputs(inputs)
        vectors = self.embedding_layer(features)
        logit = self.fm(features, vectors) + self.mlp(vectors.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logit)}


def main() -> None:
    """Train, compress, train on, save, reload; print AUC, log loss and bytes of each stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="little data, for a quick check")
    if parser.parse_args().tiny:
        data, batch_size = generate(examples=20_000, fields=6, max_rows=5000), 256
    else:
        data, batch_size = generate(examples=300_000, fields=12, max_rows=50_000), 1024
    with TemporaryDirectory() as folder:
        run(data, Path(folder), batch_size)


def run(data: ClickData, folder: Path, batch_size: int) -> None:
    """The whole example on one click log."""
    feature_map = write_data(data, folder)
    files = {f"{name}_data": str(folder / f"{name}.npz") for name in SPLITS}
    loaders = RankDataLoader(feature_map, batch_size=batch_size, num_workers=0, **files)
    train_gen, valid_gen, test_gen = loaders
    model = build(feature_map, folder)
    model.fit(train_gen, validation_data=valid_gen, epochs=2)
    metrics = {"FuxiCTR DeepFM": model.evaluate(test_gen)}

    report = fuxictr.compress(model, train_gen, CompressionConfig(ratio=20))
    print(report)
    metrics["compressed"] = model.evaluate(test_gen)

    # Many rows share a codeword, so it goes on with a smaller learning rate than a table would.
    model.lr_decay(0.03)
    model.fit(train_gen, validation_data=valid_gen, epochs=1)
    metrics["one epoch more"] = model.evaluate(test_gen)

    mec_embed.save(model, folder / "small.safetensors")
    reloaded = mec_embed.load(build(feature_map, folder), folder / "small.safetensors")
    metrics["saved and reloaded"] = reloaded.evaluate(test_gen)

    print(f"\n{'stage':<20}{'test AUC':>10}{'logloss':>10}{'embedding bytes':>18}")
    for index, (stage, found) in enumerate(metrics.items()):
        size = report.bytes_after if index else report.bytes_before
        print(f"{stage:<20}{found['AUC']:>10.4f}{found['logloss']:>10.4f}{size:>18,}")


def build(feature_map: FeatureMap, folder: Path) -> DeepFM:
    """A fresh model."""
    torch.manual_seed(0)
    options = {"embedding_regularizer": 5e-4, "metrics": ["AUC", "logloss"], "verbose": 0}
    return DeepFM(feature_map, model_root=str(folder), **options)


def write_data(data: ClickData, folder: Path) -> FeatureMap:
    """Write the splits as FuxiCTR's encoded npz files, and describe them as its FeatureMap."""
    feature_map = FeatureMap("clicks", str(folder))
    spec = {"source": "", "type": "categorical", "padding_idx": 0}
    # Row 0 is padding and the last row out-of-vocabulary, as FuxiCTR's own tokenizer has it.
    feature_map.features = OrderedDict(
        (name, spec | {"vocab_size": rows + 2})
        for name, rows in zip(data.fields, data.rows, strict=True)
    )
    feature_map.labels = ["click"]
    feature_map.default_emb_dim = DIM
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    for split in SPLITS:
        columns = dict(zip(data.fields, data.ids[split].numpy().T + 1, strict=True))
        np.savez(folder / f"{split}.npz", click=data.labels[split].numpy(), **columns)
    (folder / feature_map.dataset_id).mkdir()  # for the checkpoints, which fit() writes
    return feature_map


if __name__ == "__main__":
    main()
