"""DeepCTR-Torch models train, predict, save and reload as before after compress()."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("deepctr_torch")

import contract
import deepctr_zoo as zoo

import mec_embed
from mec_embed import CompressionConfig
from mec_embed.integrations import deepctr


@pytest.fixture(scope="module")
def predictions():
    """Model name -> predictions of the model that was saved."""
    return {}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_lossless_swap_changes_nothing(name, folder):
    contract.check_lossless_swap(zoo, name, folder)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_life_of_a_compressed_model(name, folder, predictions):
    def compress(model):
        return deepctr.compress(model, zoo.inputs(name)[0], contract.CONFIG, progress=False)

    predictions[name] = contract.check_life(zoo, name, folder, compress)


def test_next_version(folder):
    def compress(model, **options):
        inputs = zoo.inputs("DeepFM")[0]
        return deepctr.compress(model, inputs, contract.CONFIG, progress=False, **options)

    contract.check_next_version(zoo, "DeepFM", folder, compress)


def test_reload_in_a_fresh_process(predictions, reload):
    assert predictions, "test_life_of_a_compressed_model has to run first"
    for name, (ours, theirs) in reload("deepctr_zoo", sorted(predictions)).items():
        np.testing.assert_array_equal(ours, predictions[name], err_msg=name)
        np.testing.assert_array_equal(theirs, predictions[name], err_msg=name)


def test_error_changes_nothing(folder, monkeypatch):
    contract.check_error_changes_nothing(zoo, "DeepFM", folder, monkeypatch)


def exact(name, folder):
    """A model whose tables are 16 distinct rows each, compressed without loss."""
    model = zoo.build(name, folder)
    with torch.no_grad():
        for table in model.modules():
            if isinstance(table, nn.Embedding):
                rows = torch.randn(16, table.embedding_dim)
                table.weight.copy_(rows[torch.arange(len(table.weight)) % 16])
    before = float(model.get_regularization_loss().detach())
    config = CompressionConfig(num_subvectors=1, codebook_size=16, epochs=0)
    mec_embed.compress(model, None, config, progress=False)
    return model, before


@pytest.mark.parametrize("name", zoo.MODELS)
def test_regularization_loss_stays_what_it_was(name, folder):
    model, before = exact(name, folder)
    loss = model.get_regularization_loss()
    assert float(loss.detach()) == pytest.approx(before, rel=1e-3)
    loss.backward()
    penalised = {t for t, l1, l2 in model.get_regularization_loss.terms if l1 or l2}
    assert penalised
    assert all(table.codebooks.grad.abs().sum() > 0 for table in penalised)


def test_tiers(folder):
    contract.check_tiers(zoo, "DeepFM", folder, lambda m: m.get_regularization_loss(), 2e-5)


def test_decompress_puts_the_terms_back(folder):
    model, before = exact("DeepFM", folder)
    mec_embed.decompress(model)
    assert "get_regularization_loss" not in vars(model)
    assert float(model.get_regularization_loss().detach()) == pytest.approx(before, rel=1e-3)
    held = {id(w) for weights, _, _ in model.regularization_weight for w in weights}
    assert {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} <= held
    zoo.train(model, "DeepFM", folder)


def test_terms_of_tables_in_tiers_outlive_another_load(folder, tmp_path):
    model, other = zoo.build("DeepFM", folder), zoo.build("DeepFM", folder)
    counts = {
        name: np.where(np.arange(table.num_embeddings) % 8 == 1, 1000, 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding)
    }
    mec_embed.compress(model, counts, CompressionConfig(ratio=40, epochs=0), progress=False)
    assert any(isinstance(table, mec_embed.TieredEmbedding) for table in model.modules())
    expected = float(model.get_regularization_loss().detach())
    mec_embed.save(model, tmp_path / "model")
    for _ in range(2):
        mec_embed.load(other, tmp_path / "model")
        assert float(other.get_regularization_loss().detach()) == pytest.approx(expected, rel=1e-5)


def test_compressing_some_tables_and_then_the_rest(folder):
    """Terms of both calls are kept."""
    torch.manual_seed(0)
    model = zoo.build("DeepFM", folder)
    before = float(model.get_regularization_loss().detach())
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    for part in (names[:2], names[2:]):
        config = CompressionConfig(
            num_subvectors=4, codebook_size=256, codes="additive", epochs=0, include=tuple(part)
        )
        try:
            mec_embed.compress(model, None, config, progress=False)
        except ValueError as error:
            assert "no table to compress" in str(error)
    assert float(model.get_regularization_loss().detach()) == pytest.approx(before, rel=0.5)
    assert len(model.get_regularization_loss.terms) == len(contract.tables(model))


def test_copies_and_pickles_keep_their_own_regularization(folder):
    """DeepCTR's ModelCheckpoint pickles whole models."""
    model, before = exact("DeepFM", folder)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        held = other.get_regularization_loss
        assert held.model is other
        assert {id(table) for table, _, _ in held.terms} <= {id(m) for m in other.modules()}
        assert float(held().detach()) == pytest.approx(before, rel=1e-3)


def test_model_checkpoint_and_early_stopping(folder, tmp_path):
    from deepctr_torch.callbacks import EarlyStopping, ModelCheckpoint

    model = zoo.build("DeepFM", folder)
    zoo.train(model, "DeepFM", folder)
    x, y = zoo.inputs("DeepFM")
    deepctr.compress(model, x, contract.CONFIG, progress=False)
    file = tmp_path / "best.pt"
    callbacks = [
        ModelCheckpoint(str(file), monitor="val_binary_crossentropy", save_best_only=True),
        EarlyStopping(monitor="val_binary_crossentropy", patience=1),
    ]
    model.compile(model.optim, "binary_crossentropy", metrics=["binary_crossentropy"])
    model.fit(x, y, batch_size=256, epochs=2, verbose=0, validation_split=0.2, callbacks=callbacks)
    again = torch.load(file, weights_only=False)
    assert contract.tables(again)
    assert again.predict(x).shape == model.predict(x).shape


def test_frequencies_count_what_is_pooled(folder):
    """Sequences up to their length, or without zeros; shared tables summed; id 0 is an id."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import WDL

    item = SparseFeat("item", 6, embedding_dim=4)
    columns = [
        item,
        DenseFeat("price", 1),
        VarLenSparseFeat(
            SparseFeat("hist", 6, embedding_dim=4, embedding_name="item"), 3, length_name="length"
        ),
        VarLenSparseFeat(SparseFeat("tags", 5, embedding_dim=4), 2),
    ]
    model = WDL(columns, columns)
    x = {
        "item": np.array([0, 1, 1]),
        "price": np.array([0.5, 1.5, 2.5]),
        "hist": np.array([[2, 0, 0], [3, 0, 4], [5, 5, 5]]),
        "length": np.array([1, 2, 0]),
        "tags": np.array([[1, 0], [0, 0], [2, 1]]),
    }
    stats = deepctr.frequencies(model, x)
    for prefix in ("embedding_dict", "linear_model.embedding_dict"):
        assert stats[f"{prefix}.item"].tolist() == [2, 2, 1, 1, 0, 0]
        assert stats[f"{prefix}.tags"].tolist() == [0, 2, 1, 0, 0]
    as_list = [x[name] for name in model.feature_index]
    again = deepctr.frequencies(model, as_list)
    assert all(np.array_equal(stats[name], again[name]) for name in stats)


def test_frequencies_errors(folder):
    model = zoo.build("DeepFM", folder)
    x, _ = zoo.inputs("DeepFM")
    with pytest.raises(ValueError, match=f"no array for {next(iter(x))}"):
        deepctr.frequencies(model, {k: v for k, v in x.items() if k != next(iter(x))})
    with pytest.raises(ValueError, match="x has 1 arrays, the model reads"):
        deepctr.frequencies(model, [np.zeros(3)])
    with pytest.raises(ValueError, match="Linear without a feature_index, expected a model of"):
        deepctr.compress(torch.nn.Linear(2, 2), x)
    with pytest.raises(TypeError, match="mapping or a list"):
        deepctr.frequencies(model, 3)
    sparse = next(k for k, v in x.items() if np.issubdtype(np.asarray(v).dtype, np.integer))
    with pytest.raises(ValueError, match=f"{sparse!r}: ids must be whole numbers, got 0.5"):
        deepctr.frequencies(model, {**x, sparse: np.full(len(x[sparse]), 0.5)})


def test_memory_of_a_large_table_with_adam(folder):
    """A table of 48.8 MiB with Adam (146 MiB of tensors) leaves less than 2 MiB."""
    model = zoo.build("DeepFM", folder)
    mec_embed.compress(model, None, contract.CONFIG, progress=False)
    small = contract.held_tensors()
    model.embedding_dict["big"] = nn.Embedding(800_000, 16)
    model.add_regularization_weight(model.embedding_dict["big"].parameters(), l2=1e-5)
    model.compile("adam", "binary_crossentropy")
    model.embedding_dict["big"](torch.tensor([1])).sum().backward()
    model.optim.step()
    model.optim.zero_grad()
    assert contract.held_tensors() - small > 140 * 2**20
    mec_embed.compress(model, None, CompressionConfig(ratio=50, epochs=1), progress=False)
    assert contract.held_tensors() - small < 2 * 2**20
