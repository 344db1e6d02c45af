"""Serving: compress, export, run the model in onnxruntime, and read single rows with numpy alone.

Run ``python -m examples.serving`` (needs onnx, onnxscript and onnxruntime: the extra ``serving``).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from examples.ctr.base import build_model
from examples.ctr.data import ClickData
from examples.ctr.generator import generate
from examples.ctr.settings import SETTINGS
from examples.ctr.training import evaluate, iterate_batches, train_with
from mec_embed import CompressionConfig, FrequencyStats, compress, save
from mec_embed.export import decompose
from mec_embed.reader import Reader

ROW = "{:<28}{:>10}{:>10}{:>14}"


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="little data, for a quick check")
    tiny = parser.parse_args().tiny
    data = generate(20_000, 6, max_rows=5_000) if tiny else generate(200_000, 12, max_rows=50_000)
    settings = replace(SETTINGS["generator"], dim=16, batch_size=128 if tiny else 1024, epochs=1)

    model = build_model(data.fields, data.rows, settings)
    train_with(settings, model, data)
    lines = [describe("trained", model, data, size_of(model))]
    batches = iterate_batches(data, "train", settings.batch_size, shuffle=False)
    stats = FrequencyStats.from_batches(model, batches)
    compress(model, stats, CompressionConfig(ratio=20, codebook_dtype="int8"))
    lines.append(describe("compressed", model, data, size_of(model)))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = export(model, data.ids["test"][:8])
        torch.export.save(program, folder / "model.pt2")  # for PyTorch; needs `import mec_embed`
        loaded = torch.export.load(folder / "model.pt2").module()
        lines.append(describe("torch.export, loaded", Run(loaded), data, size_of(loaded)))

        onnx = torch.onnx.export(decompose(program), dynamo=True, verbose=False)
        onnx.save(folder / "model.onnx")  # for any runtime
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        stored = sum(len(one.raw_data) for one in onnx.model_proto.graph.initializer)
        lines.append(describe("onnxruntime", Run(Onnx(session)), data, stored))

        save(model, folder / "model.safetensors")  # for rows without a model
        reader = Reader(folder / "model.safetensors")
        tables = len(reader.tables)
        equal = all(same_rows(reader, model, table) for table in reader.tables)
    print(ROW.format("", "test AUC", "logloss", "model bytes"), *lines, sep="\n")
    print(f"\nnumpy reads the rows of {tables} tables, equal to PyTorch's: {equal}")


def export(model: nn.Module, ids: Tensor) -> torch.export.ExportedProgram:
    """The model for inference, with any batch size."""
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(model.eval(), (ids,), dynamic_shapes=batch)


class Onnx:
    """A session of onnxruntime, called as a model."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.input = session.get_inputs()[0].name

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, fields)."""
        return torch.from_numpy(self.session.run(None, {self.input: ids.numpy()})[0])


class Run(nn.Module):
    """What is not in evaluation mode, but made for it, as a module that can be evaluated."""

    def __init__(self, call: nn.Module | Onnx) -> None:
        super().__init__()
        self.calls = [call]  # in a list, as exported modules refuse eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, fields)."""
        return self.calls[0](ids)


def same_rows(reader: Reader, model: nn.Module, table: str) -> bool:
    """Whether some rows of a table are the same, bit for bit."""
    module = model.get_submodule(table)
    ids = np.random.default_rng(0).integers(module.num_embeddings, size=100)
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).numpy()
    return np.array_equal(reader.rows(table, ids), expected)


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def describe(stage: str, model: nn.Module, data: ClickData, size: int) -> str:
    """A line of the table."""
    metrics = evaluate(model, data, "test")
    return ROW.format(stage, f"{metrics.auc:.4f}", f"{metrics.logloss:.4f}", f"{size:,}")


if __name__ == "__main__":
    main()
