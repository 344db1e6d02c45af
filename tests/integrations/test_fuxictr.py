"""FuxiCTR models train, predict, save and reload as before after compress()."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("fuxictr")

import contract
import fuxictr_zoo as zoo

import mec_embed
from mec_embed import CompressionConfig
from mec_embed.integrations import fuxictr
from mec_embed.regularization import table_penalty


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
        loader = zoo.loader(name, folder)
        return fuxictr.compress(model, loader, contract.CONFIG, progress=False)

    predictions[name] = contract.check_life(zoo, name, folder, compress)


def test_next_version(folder):
    def compress(model, **options):
        loader = zoo.loader("DeepFM", folder)
        return fuxictr.compress(model, loader, contract.CONFIG, progress=False, **options)

    contract.check_next_version(zoo, "DeepFM", folder, compress)


def test_reload_in_a_fresh_process(predictions, reload):
    """By mec_embed.load, and strictly by FuxiCTR's own checkpoint after it."""
    assert predictions, "test_life_of_a_compressed_model has to run first"
    for name, (ours, theirs) in reload("fuxictr_zoo", sorted(predictions)).items():
        np.testing.assert_array_equal(ours, predictions[name], err_msg=name)
        np.testing.assert_array_equal(theirs, predictions[name], err_msg=name)


def test_error_changes_nothing(folder, monkeypatch):
    contract.check_error_changes_nothing(zoo, "DeepFM", folder, monkeypatch)


def compressed(name, folder, **options):
    model = zoo.build(name, folder)
    config = CompressionConfig(num_subvectors=2, codebook_size=16, epochs=0, **options)
    mec_embed.compress(model, None, config, progress=False)
    return model


def dense_loss(model) -> float:
    """What FuxiCTR computes for an uncompressed model of the same values."""
    dense = copy.deepcopy(model)
    mec_embed.decompress(dense)
    return float(dense.regularization_loss())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_regularization_loss_of_product_codes_is_that_of_the_rows(name, folder):
    model = zoo.build(name, folder)
    with torch.no_grad():
        for table in model.modules():
            if isinstance(table, nn.Embedding):
                table.weight.normal_()
                if table.padding_idx is not None:
                    table.weight[table.padding_idx] = 0
    config = CompressionConfig(num_subvectors=1, codebook_size=16, epochs=0)
    mec_embed.compress(model, None, config, progress=False)
    loss = model.regularization_loss()
    # The zero row of padding is masked: its codeword counts one row too many.
    extra = sum(
        float(m.decode(torch.tensor([0])).detach().square().sum()) + one_row(m)
        for m in padded(model)
    )
    assert loss.item() == pytest.approx(dense_loss(model), abs=1e-3 * extra + 1e-6, rel=2e-3)
    loss.backward()
    assert all(m.codebooks.grad.abs().sum() > 0 for m in contract.tables(model) if m.trainable)


def padded(model):
    return [m for m in contract.tables(model) if m.padding_idx is not None]


def one_row(module) -> float:
    return float(module.codebooks.detach().square().sum(2).max())


@pytest.mark.parametrize("name", ["DeepFM", "MMoE"])
def test_regularization_loss_counts_tables_once(name, folder):
    """Each codeword for each row that uses it; the network as before."""
    model = compressed(name, folder)
    held = contract.tables(model)
    weight = float(model._embedding_regularizer)
    mine = sum(weight / 2 * float(table_penalty(table)) for table in held)
    with torch.no_grad():
        for table in held:
            table.codebooks.zero_()
    assert float(compressed(name, folder).regularization_loss()) == pytest.approx(
        float(model.regularization_loss()) + mine, rel=1e-4
    )


def test_tiers(folder):
    weight = float(zoo.build("DeepFM", folder)._embedding_regularizer)
    contract.check_tiers(zoo, "DeepFM", folder, lambda m: m.regularization_loss(), weight)


def test_checkpoint_of_the_uncompressed_model_is_not_overwritten(folder):
    model = zoo.build("FM", folder)
    zoo.train(model, "FM", folder)
    best = Path(model.checkpoint)
    before = best.read_bytes()
    mec_embed.compress(model, None, contract.CONFIG, progress=False)
    assert Path(model.checkpoint).name == "FM_compressed.model" or "_compressed" in model.checkpoint
    zoo.train(model, "FM", folder)
    assert best.read_bytes() == before
    assert Path(model.checkpoint).exists()
    mec_embed.decompress(model)
    assert "_decompressed" in model.checkpoint and "_compressed" not in model.checkpoint


def test_decompress_gives_the_methods_back(folder):
    model = compressed("DeepFM", folder)
    assert "regularization_loss" in vars(model)
    mec_embed.decompress(model)
    assert "regularization_loss" not in vars(model)
    zoo.train(model, "DeepFM", folder)


def test_load_into_a_fresh_model_rebinds_its_optimizer(folder, tmp_path):
    mec_embed.save(compressed("DeepFM", folder), tmp_path / "m.safetensors")
    model = mec_embed.load(zoo.build("DeepFM", folder), tmp_path / "m.safetensors")
    held = {id(p) for group in model.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert "_compressed" in model.checkpoint


def test_copies_and_pickles_keep_their_own_regularization(folder):
    model = compressed("DeepFM", folder)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.regularization_loss.model is other
        assert float(other.regularization_loss()) == float(model.regularization_loss())


def test_reset_parameters_leaves_codebooks_alone(folder):
    model = compressed("DeepFM", folder)
    before = [m.codebooks.detach().clone() for m in contract.tables(model)]
    model.reset_parameters()
    for module, old in zip(contract.tables(model), before, strict=True):
        assert torch.equal(module.codebooks, old)


def test_frequencies_of_every_source_agree(folder, tmp_path):
    """Loader, pair of loaders, make_iterator, arrays, npz, parquet and folders."""
    import pyarrow
    import pyarrow.parquet

    model = zoo.build("DIN", folder)
    loader = zoo.loader("DIN", folder)
    columns = {}
    for batch in loader:
        for key, value in batch.items():
            columns.setdefault(key, []).append(value.numpy())
    columns = {key: np.concatenate(values) for key, values in columns.items()}
    np.savez(tmp_path / "train.npz", **columns)
    table = {key: list(v) if v.ndim > 1 else v for key, v in columns.items()}
    (tmp_path / "blocks").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "blocks" / "part_0.parquet")

    class Repository:
        def make_iterator(self):
            return loader, None

    expected = fuxictr.frequencies(model, loader)
    assert len(expected) > 3
    sources = {
        "pair": (loader, None),
        "repository": Repository(),
        "arrays": columns,
        "npz": tmp_path / "train.npz",
        "text": str(tmp_path / "train.npz"),
        "folder": tmp_path / "blocks",
        "parquet": tmp_path / "blocks" / "part_0.parquet",
    }
    for kind, source in sources.items():
        got = fuxictr.frequencies(model, source)
        assert set(got) == set(expected), kind
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=kind)


def test_frequencies_agree_with_what_the_model_looks_up(folder):
    """Shared features are summed, padding counts zero: as hooks on the tables count."""
    for name in ("DIN", "DeepFM"):
        model = zoo.build(name, folder)
        loader = zoo.loader(name, folder)
        expected = mec_embed.FrequencyStats.from_batches(model, loader)
        got = fuxictr.frequencies(model, loader)
        for table in expected:
            np.testing.assert_array_equal(got[table], expected[table], err_msg=f"{name} {table}")


def test_frequencies_of_batches_of_several_mappings(folder):
    """As the models of LongCTR take them: columns, columns of the items, a mask."""
    model = zoo.build("DIN", folder)
    batches = list(zoo.loader("DIN", folder))
    expected = fuxictr.frequencies(model, batches)
    names = list(batches[0])
    parts = [({n: b[n] for n in names[:2]}, {n: b[n] for n in names[2:]}, None) for b in batches]
    for data in (parts, iter(parts)):
        got = fuxictr.frequencies(model, data)
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[table], expected[table]) for table in expected)
    pair = fuxictr.frequencies(model, (batches, batches))  # train and valid
    assert all(np.array_equal(pair[table], expected[table]) for table in expected)
    with pytest.raises(TypeError, match="a batch is a list, expected a mapping"):
        fuxictr.frequencies(model, [[1, 2]])
    with pytest.raises(TypeError, match="a batch is a Tensor"):
        fuxictr.frequencies(model, iter([torch.zeros(2)]))


def test_frequencies_errors(folder, tmp_path):
    model = zoo.build("FM", folder)
    with pytest.raises(ValueError, match="none of the features"):
        fuxictr.frequencies(model, {"nothing": np.array([1])})
    with pytest.raises(TypeError, match="loader"):
        fuxictr.frequencies(model, 3)
    with pytest.raises(ValueError, match="expected encoded data"):
        fuxictr.frequencies(model, tmp_path / "train.csv")
    with pytest.raises(ValueError, match="expected encoded data"):
        fuxictr.frequencies(model, tmp_path)
    with pytest.raises(ValueError, match="FeatureEmbeddingDict"):
        fuxictr.frequencies(nn.Sequential(nn.Embedding(3, 2)), {})


def test_memory_of_a_large_table_with_adam(folder):
    """A table of 48.8 MiB with Adam (146 MiB of tensors) leaves less than 2 MiB."""
    model = zoo.build("FM", folder)
    zoo.train(model, "FM", folder)
    mec_embed.compress(model, None, contract.CONFIG, progress=False)
    layers = next(m for m in model.modules() if type(m).__name__ == "FeatureEmbeddingDict")
    small = contract.held_tensors()
    name = next(iter(layers.embedding_layers))
    layers.embedding_layers[name] = nn.Embedding(800_000, 16)
    model.optimizer = torch.optim.Adam(model.parameters())
    layers.embedding_layers[name](torch.tensor([1])).sum().backward()
    model.optimizer.step()
    model.optimizer.zero_grad()
    assert contract.held_tensors() - small > 140 * 2**20
    mec_embed.compress(model, None, CompressionConfig(ratio=50, epochs=1), progress=False)
    gc.collect()
    assert contract.held_tensors() - small < 2 * 2**20
