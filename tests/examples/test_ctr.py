"""The click data, the generator and the training that the demo stands on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from examples.ctr.data import counts, load_parquet
from examples.ctr.generator import generate
from examples.ctr.models import DeepFM
from examples.ctr.training import auc, evaluate, train


@pytest.fixture(scope="module")
def generated():
    return generate(examples=4000, fields=4, max_rows=500)


def test_the_generator_repeats_itself_and_numbers_by_frequency(generated):
    again = generate(examples=4000, fields=4, max_rows=500)
    other = generate(examples=4000, fields=4, max_rows=500, seed=1)
    assert torch.equal(generated.ids["train"], again.ids["train"])
    assert not torch.equal(generated.ids["train"], other.ids["train"])
    for occurrences in counts(generated).values():
        assert (np.diff(occurrences) <= 0).all()


def test_no_model_beats_the_planted_one(generated):
    model = DeepFM(generated.fields, generated.rows, dim=4, hidden=(8,))
    train(model, generated, epochs=2, batch_size=256, l2=1e-4, progress=False)
    found = evaluate(model, generated, "test").auc
    assert 0.5 < found < generated.best_auc + 0.02


def test_ids_are_numbered_by_frequency_and_rare_ones_share_the_last_row(tmp_path):
    train_ids = ["a"] * 2 + ["b"] * 5 + ["c"] + [None] * 3
    columns = {
        "label": [0, 1] * 5 + [0] + [1, 0, 1],
        "split": ["train"] * 11 + ["valid", "test", "test"],
        "item": [*train_ids, "c", "new", "b"],
    }
    pq.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    data = load_parquet(tmp_path / "clicks.parquet", min_count=2)
    assert data.rows == [4]
    assert data.ids["train"][:, 0].tolist() == [2] * 2 + [0] * 5 + [3] + [1] * 3
    assert data.ids["valid"][:, 0].tolist() == [3]
    assert data.ids["test"][:, 0].tolist() == [3, 0]


def test_auc_is_the_known_one():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 500), rng.integers(0, 20, 500) / 20
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


def test_real_data_loads(data_folder):
    data = load_parquet(data_folder / "ml1m_ge4.parquet")
    assert {name: len(labels) for name, labels in data.labels.items()} == {
        "train": 800_167,
        "valid": 100_020,
        "test": 100_022,
    }
    assert all(int(data.ids["test"][:, f].max()) < rows for f, rows in enumerate(data.rows))
