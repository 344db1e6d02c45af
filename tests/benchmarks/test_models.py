"""The models of the quality study: their formulas, a training step, and compressed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from benchmarks.quality.common import Base, embedding_bytes
from benchmarks.quality.models import GDCN, MODELS, PNN, build
from benchmarks.quality.ours import ours
from examples.ctr.data import counts
from examples.ctr.generator import generate
from examples.ctr.settings import SETTINGS
from examples.ctr.training import train
from mec_embed import CompressedEmbedding

FIELDS, ROWS, DIM = ["a", "b.c", "d"], [5, 6, 3], 4
IDS = torch.tensor([[0, 5, 2], [4, 1, 0], [2, 2, 2]])


@pytest.fixture(scope="module")
def data():
    return generate(examples=3000, fields=4, max_rows=2000)


def _made(kind, **options):
    """A model with weights large enough that every term of its formula shows."""
    torch.manual_seed(0)
    model = kind(FIELDS, ROWS, DIM, **options).double()
    for table in model.embeddings.values():
        nn.init.normal_(table.weight)
    return model


def _fields_of(model, example):
    return [
        table.weight[row] for table, row in zip(model.embeddings.values(), example, strict=True)
    ]


def _linear(layer, inputs):
    """A linear layer, output by output."""
    outputs = []
    for index in range(layer.out_features):
        bias = 0.0 if layer.bias is None else layer.bias[index]
        outputs.append(sum(w * x for w, x in zip(layer.weight[index], inputs, strict=True)) + bias)
    return outputs


def _mlp(model, inputs):
    """The MLP without dropout and batch normalisation."""
    for layer in model.mlp:
        inputs = _linear(layer, inputs) if isinstance(layer, nn.Linear) else inputs
        inputs = [x.clamp(min=0) for x in inputs] if isinstance(layer, nn.ReLU) else inputs
    return inputs[0]


def _pnn_logit(model, example):
    vectors = _fields_of(model, example)
    products = [
        sum(x * y for x, y in zip(one, other, strict=True))
        for one, other in itertools.combinations(vectors, 2)
    ]
    return _mlp(model, [x for vector in vectors for x in vector] + products)


def _gdcn_logit(model, example):
    start = [x for vector in _fields_of(model, example) for x in vector]
    state = start
    for cross, gate in zip(model.cross, model.gates, strict=True):
        straight, opening = _linear(cross, state), _linear(gate, state)
        state = [
            start[i] * straight[i] / (1 + torch.exp(-opening[i])) + state[i]
            for i in range(len(state))
        ]
    return _linear(model.head, state)[0] + _mlp(model, start)


@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)])
@pytest.mark.parametrize(("kind", "logit"), [(PNN, _pnn_logit), (GDCN, _gdcn_logit)])
def test_models_are_their_formulas(kind, logit, hidden):
    model = _made(kind, hidden=hidden)
    expected = torch.stack([logit(model, example) for example in IDS])
    torch.testing.assert_close(model(IDS), expected)
    assert expected.std() > 0.01


def test_gates_have_no_bias_and_are_as_many_as_layers():
    model = _made(GDCN, hidden=(4,), layers=2)
    assert len(model.gates) == len(model.cross) == 2
    assert all(gate.bias is None for gate in model.gates)


@pytest.mark.parametrize("name", ["PNN", "GDCN"])
def test_models_learn_all_their_weights_and_are_compressed(data, name):
    settings = dataclasses.replace(
        SETTINGS["generator"], dim=8, batch_size=512, dropout=0.1, batch_norm=True
    )
    model = build(name, data, settings, seed=0)
    assert type(model) is MODELS[name]
    before = {key: value.clone() for key, value in model.named_parameters()}
    train(model, data, epochs=1, lr=1e-2, batch_size=512, progress=False)
    for key, value in model.named_parameters():
        assert not torch.equal(value, before[key]), f"{key} did not move"
    base = Base(data, settings, model, counts(data), seed=0)
    assert base.nbytes == sum(data.rows) * 8 * 4
    small = ours(base, 8)
    assert embedding_bytes(small) <= base.budget(8)
    assert any(isinstance(module, CompressedEmbedding) for module in small.modules())
    ids = data.ids["valid"]
    with torch.no_grad():
        logits, expected = small(ids), model(ids)
    assert not torch.equal(logits, expected)
    assert torch.corrcoef(torch.stack([logits, expected]))[0, 1] > 0.8
