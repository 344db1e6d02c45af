"""torch-rechub models train, predict, save and reload as before after compress()."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torch_rechub")

import contract
import rechub_zoo as zoo

import mec_embed
from mec_embed import CompressionConfig
from mec_embed.integrations import rechub


@pytest.fixture(scope="module")
def predictions():
    """Model name -> predictions of the model that was saved."""
    return {}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_lossless_swap_changes_nothing(name, folder):
    contract.check_lossless_swap(zoo, name, folder)


class WithTrainer:
    """The zoo with one trainer for the whole life of a model, as its users have it."""

    def __init__(self, name, folder):
        self.name, self.folder, self.trainer = name, folder, None

    def build(self, name, folder):
        model = zoo.build(name, folder)
        self.trainer = zoo.trainer(model, name, folder)
        return model

    def train(self, model, name, folder, epochs=1):
        zoo.train(model, name, folder, epochs=epochs, trainer=self.trainer)

    predict = staticmethod(zoo.predict)
    loss = staticmethod(zoo.loss)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_life_of_a_compressed_model(name, folder, predictions):
    with_trainer = WithTrainer(name, folder)

    def compress(model):
        loader = zoo.loader(name)
        trainer = with_trainer.trainer
        return rechub.compress(model, loader, contract.CONFIG, trainer=trainer, progress=False)

    predictions[name] = contract.check_life(with_trainer, name, folder, compress)


def test_next_version(folder):
    def compress(model, **options):
        loader = zoo.loader("DeepFM")
        return rechub.compress(model, loader, contract.CONFIG, progress=False, **options)

    contract.check_next_version(zoo, "DeepFM", folder, compress)


def test_reload_in_a_fresh_process(predictions, reload):
    assert predictions, "test_life_of_a_compressed_model has to run first"
    for name, (ours, theirs) in reload("rechub_zoo", sorted(predictions)).items():
        np.testing.assert_array_equal(ours, predictions[name], err_msg=name)
        np.testing.assert_array_equal(theirs, predictions[name], err_msg=name)


def test_error_changes_nothing(folder, monkeypatch):
    contract.check_error_changes_nothing(zoo, "DeepFM", folder, monkeypatch)


def features(model):
    layers = [m for m in model.modules() if type(m).__name__ == "EmbeddingLayer"]
    return list({id(f): f for layer in layers for f in layer.features}.values())


def test_features_let_go_of_their_table(folder):
    """The next model over the same features starts with a table of its own."""
    model = zoo.build("DeepFM", folder)
    assert any(hasattr(f, "embed") for f in features(model))
    mec_embed.compress(model, None, contract.CONFIG, progress=False)
    kept = {id(m) for m in model.modules()}
    for feature in features(model):
        assert not hasattr(feature, "embed") or id(feature.embed) in kept
        if hasattr(feature, "get_embedding_layer"):
            assert type(feature.get_embedding_layer()) is nn.Embedding


def test_penalty_of_the_trainer_stays_what_it_was(folder):
    model = zoo.build("DeepFM", folder)
    with torch.no_grad():
        for table in model.modules():
            if isinstance(table, nn.Embedding):
                rows = torch.randn(16, table.embedding_dim)
                table.weight.copy_(rows[torch.arange(len(table.weight)) % 16])
    trainer = zoo.trainer(model, "DeepFM", folder)
    trainer.reg_loss_fn.dense_l2 = 1e-3
    before = float(trainer.reg_loss_fn(model))
    config = CompressionConfig(num_subvectors=1, codebook_size=16, epochs=0)
    rechub.compress(model, zoo.loader("DeepFM"), config, trainer=trainer, progress=False)
    assert float(trainer.reg_loss_fn(model)) == pytest.approx(before, rel=1e-3)


def test_early_stopping_forgets_weights_that_no_longer_fit(folder):
    model = zoo.build("DeepFM", folder)
    trainer = zoo.trainer(model, "DeepFM", folder)
    trainer.early_stopper.stop_training(0.9, model.state_dict())
    rechub.compress(model, zoo.loader("DeepFM"), contract.CONFIG, trainer=trainer, progress=False)
    assert trainer.early_stopper.best_weights is None
    assert not trainer.early_stopper.stop_training(0.6, model.state_dict())


def test_frequencies_agree_with_what_the_model_looks_up(folder):
    for name in zoo.MODELS:
        model = zoo.build(name, folder)
        expected = mec_embed.FrequencyStats.from_batches(model, zoo.loader(name))
        got = rechub.frequencies(model, zoo.loader(name))
        assert len(got) > 2
        for table in got:
            # WideDeep looks every table up twice, for its wide and for its deep part.
            times = expected[table].sum() / got[table].sum()
            assert times in (1, 2)
            np.testing.assert_array_equal(got[table] * times, expected[table], f"{name} {table}")


@pytest.mark.parametrize("pooling", ["mean", "sum", "concat"])
def test_padding_that_pooling_leaves_out_is_not_counted(pooling):
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import WideDeep

    item = SparseFeature("item", 60, 8)
    options = {"pooling": pooling, "shared_with": "item", "padding_idx": 0}
    history = SequenceFeature("history", 60, 8, **options)
    features = [item, history] if pooling != "concat" else [item, history, history]
    model = WideDeep(features, [item], {"dims": [8]})
    x = {"item": torch.arange(1, 21), "history": torch.tensor([[3, 3, 0, 0, 0]]).repeat(20, 1)}
    for columns in (x, {name: ids.numpy() for name, ids in x.items()}, [(x, None)]):
        counts = rechub.frequencies(model, columns)["embedding.embed_dict.item"]
        # Without pooling, rows of padding reach the network.
        assert counts[0] == (60 if pooling == "concat" else 0)
        assert counts[3] == 41 and counts[4] == 1


def test_frequencies_of_arrays(folder):
    model = zoo.build("DeepFM", folder)
    columns: dict[str, list[np.ndarray]] = {}
    for x, _ in zoo.loader("DeepFM"):
        for key, value in x.items():
            columns.setdefault(key, []).append(value.numpy())
    arrays = {key: np.concatenate(values) for key, values in columns.items()}
    expected = rechub.frequencies(model, zoo.loader("DeepFM"))
    got = rechub.frequencies(model, arrays)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_frequencies_errors():
    with pytest.raises(TypeError, match="a batch is a Tensor, expected a mapping"):
        rechub.frequencies(zoo.build("DeepFM", None), [torch.zeros(2)])
    with pytest.raises(ValueError, match="EmbeddingLayer"):
        rechub.frequencies(nn.Sequential(nn.Embedding(3, 2)), {})


def test_a_trainer_made_afterwards_can_be_told(folder):
    model = zoo.build("DeepFM", folder)
    mec_embed.compress(model, None, contract.CONFIG, progress=False)
    trainer = zoo.trainer(model, "DeepFM", folder)
    alone = float(trainer.reg_loss_fn(model))
    rechub.follow(trainer, model)
    assert trainer.optimizer._optimizer_step_pre_hooks
    assert float(trainer.reg_loss_fn(model)) > 10 * alone
    rechub.follow(trainer, model)  # once more changes nothing
    assert len(trainer.optimizer._optimizer_step_pre_hooks) == 1


def test_trainers_that_hold_no_optimizer_are_refused_before_anything(folder):
    model = zoo.build("DeepFM", folder)
    with pytest.raises(ValueError, match="holds no optimizer"):
        rechub.compress(model, zoo.loader("DeepFM"), trainer=object.__new__(_Trainer))
    assert not contract.tables(model)


class _Trainer:
    """Holds nothing."""
