"""What a swap must keep, for every framework: one set of checks over each framework's zoo.

A zoo is a module with ``MODELS``, ``build``, ``train``, ``predict`` and ``loss``; see
``fuxictr_zoo.py``.
"""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import mec_embed
from mec_embed import CompressedEmbedding, CompressedEmbeddingBag, CompressionConfig
from mec_embed.adapters import ADAPTERS, Adapter
from mec_embed.layout import CodeLayout
from mec_embed.modules import CodebookSet, CodeTable
from mec_embed.regularization import rows_per_codeword
from mec_embed.swap import replace_modules
from mec_embed.tables import EMBEDDINGS, find_modules, find_tables
from mec_embed.tiers import TieredEmbedding

CONFIG = CompressionConfig(ratio=8, epochs=1)
COMPRESSED = (CompressedEmbedding, CompressedEmbeddingBag)


def tables(model: nn.Module) -> list[nn.Module]:
    """The compressed modules, each once."""
    return [module for module, _ in find_modules(model, COMPRESSED)]


def lossless(table: nn.Module) -> nn.Module:
    """A stand-in that holds every row as it is."""
    rows, dim = table.weight.shape
    layout = CodeLayout("rows", rows, dim, 1, rows, codebook_dtype=table.weight.dtype)
    books = CodebookSet(layout)
    books.store(table.weight.detach()[None])
    options = {"padding_idx": table.padding_idx, "dtype": table.weight.dtype}
    options |= {"code_table": CodeTable(layout), "codebook_set": books}
    # A table made without padding may still hold a zero row: only padding is masked.
    if isinstance(table, nn.EmbeddingBag):
        options |= {"mode": table.mode, "include_last_offset": table.include_last_offset}
        return CompressedEmbeddingBag(layout, **options)
    return CompressedEmbedding(layout, **options)


def swap_lossless(model: nn.Module) -> int:
    """Put lossless stand-ins in for all tables; returns how many."""
    found, _ = find_tables(model, CompressionConfig(min_rows=2))
    replace_modules(model, [(t.aliases, t.module, lossless(t.module)) for t in found])
    return len(found)


def check_lossless_swap(zoo: ModuleType, name: str, folder: Path) -> None:
    """Predictions do not change at all, and go back to what they were."""
    model = zoo.build(name, folder)
    zoo.train(model, name, folder)
    before = zoo.predict(model, name, folder)
    assert swap_lossless(model) > 0
    assert np.array_equal(zoo.predict(model, name, folder), before)
    mec_embed.decompress(model)
    assert np.array_equal(zoo.predict(model, name, folder), before)


def held_tensors() -> int:
    """Bytes of all distinct tensor storages that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # By type first: isinstance() would ask lazy objects of other packages what they are.
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            # Exports and compilers keep stand-ins, which have no memory: some are on "meta" below
            # the device that they tell, others raise where their address is asked for.
            with suppress(RuntimeError):
                if storage.device.type != "meta":
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def check_life(zoo: ModuleType, name: str, folder: Path, compress) -> np.ndarray:
    """Train, compress, evaluate, train on; returns the predictions of the saved file.

    Args:
        compress: (model) -> report, the framework's own call.
    """
    model = zoo.build(name, folder)
    untrained = zoo.loss(model, name, folder)
    zoo.train(model, name, folder, epochs=2)
    trained = zoo.loss(model, name, folder)
    assert trained < untrained
    dense = {alias[0].name: m for m, alias in find_modules(model, EMBEDDINGS)}
    memory = held_tensors()

    report = compress(model)

    kept = {t.name for t in report.tables if not t.compressed}
    gone = [weakref.ref(dense[n]) for n in dense if n not in kept]
    gone += [weakref.ref(dense[n].weight) for n in dense if n not in kept]
    del dense
    gc.collect()
    assert gone and not [ref() for ref in gone if ref() is not None], "an old table is still held"
    # Adam held two tensors of the size of each table beside the table itself.
    assert held_tensors() < memory - 2 * (report.bytes_before - report.bytes_after)
    compressed = zoo.loss(model, name, folder)
    assert compressed < untrained

    check_training_goes_on(zoo, model, name, folder, compressed)
    file = folder / f"{name.replace(' ', '_')}.safetensors"
    mec_embed.save(model, file)
    torch.save(model.state_dict(), file.with_suffix(".pt"))
    return zoo.predict(model, name, folder)


def check_training_goes_on(
    zoo: ModuleType, model: nn.Module, name: str, folder: Path, loss_before: float
) -> None:
    """Codebooks move, codes stay, the loss falls."""
    found = tables(model)
    codes = [m.codes.clone() for m in found]
    books = [m.codebooks.detach().clone() for m in found]
    zoo.train(model, name, folder, epochs=2)
    assert all(torch.equal(m.codes, old) for m, old in zip(found, codes, strict=True))
    trainable = [(m, old) for m, old in zip(found, books, strict=True) if m.trainable]
    assert trainable
    still = [m for m, old in trainable if torch.equal(m.codebooks, old)]
    # The row that stands for ids that training never meets has no gradient.
    assert all(m.layout.kind == "shared" for m in still), still
    assert zoo.loss(model, name, folder) < loss_before


def check_error_changes_nothing(zoo: ModuleType, name: str, folder: Path, monkeypatch) -> None:
    """An error after the swap began leaves model, optimizer and what else is held as it was."""
    model = zoo.build(name, folder)
    zoo.train(model, name, folder)
    predictions = zoo.predict(model, name, folder)
    before = copy.copy(vars(model))

    class Last(Adapter):
        def matches(self, module):
            return module is model

        def follow(self, module, swapped):
            raise KeyboardInterrupt

    monkeypatch.setattr("mec_embed.adapters.ADAPTERS", [*ADAPTERS, Last()])
    with pytest.raises(KeyboardInterrupt):
        mec_embed.compress(model, None, CONFIG, progress=False)
    assert not tables(model)
    assert {k: id(v) for k, v in vars(model).items()} == {k: id(v) for k, v in before.items()}
    assert np.array_equal(zoo.predict(model, name, folder), predictions)
    monkeypatch.undo()
    zoo.train(model, name, folder)


def check_next_version(zoo: ModuleType, name: str, folder: Path, compress) -> None:
    """A retrained model takes layouts and most codes from the one before.

    Args:
        compress: (model, **options) -> report, the framework's own call.
    """
    models = [zoo.build(name, folder) for _ in range(2)]
    for model in models:
        zoo.train(model, name, folder)
    models[1].load_state_dict(models[0].state_dict())
    zoo.train(models[1], name, folder)
    first = compress(models[0])
    second = compress(models[1], start_from=models[0])
    assert [t.layout for t in second.tables] == [t.layout for t in first.tables]
    coded = [t for t in second.tables if t.changed_rows is not None]
    assert coded and all(0 <= t.changed_rows <= t.rows for t in coded)
    assert np.isfinite(zoo.predict(models[1], name, folder)).all()


def check_tiers(zoo: ModuleType, name: str, folder: Path, penalty, weight: float) -> None:
    """Tables in tiers predict as their dense rows, train on, and are penalised for each row.

    Args:
        penalty: (model) -> the framework's penalty, ``weight / 2 * |row|^2`` of each row.
    """
    model = zoo.build(name, folder)
    zoo.train(model, name, folder)
    counts = {
        aliases[0].name: np.where(np.arange(table.num_embeddings) % 8 == 1, 1000, 1)
        for table, aliases in find_modules(model, EMBEDDINGS)
    }
    mec_embed.compress(model, counts, CompressionConfig(ratio=40, epochs=0), progress=False)
    found = [m for m in model.modules() if isinstance(m, TieredEmbedding)]
    parts = [part for table in found for part in table.tiers]
    assert len(found) > 1
    dense = copy.deepcopy(model)
    mec_embed.decompress(dense)
    expected = zoo.predict(dense, name, folder)
    np.testing.assert_allclose(zoo.predict(model, name, folder), expected, rtol=1e-5, atol=1e-6)
    dense.zero_grad()
    penalty(dense).backward()
    for table in [n for n, m in model.named_modules() if isinstance(m, TieredEmbedding)]:
        rows = dense.get_submodule(table).weight
        torch.testing.assert_close(rows.grad, weight * rows.detach())
    model.zero_grad()
    penalty(model).backward()
    for books in {part.codebooks for part in parts}:
        rows = sum(rows_per_codeword(m) for m in tables(model) if m.codebooks is books)
        torch.testing.assert_close(books.grad, weight * rows[:, :, None] * books.detach())
    model.zero_grad()
    check_training_goes_on(zoo, model, name, folder, zoo.loss(model, name, folder))
