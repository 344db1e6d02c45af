"""Folders in the layout of FuxiCTR's x1 data sets, made up; and a model trained on one."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.quality.common import Base, embedding_bytes, tables
from benchmarks.quality.configs import FUXICTR_SETTINGS
from benchmarks.quality.fuxictr_data import FIELDS, load_folder
from benchmarks.quality.models import build
from benchmarks.quality.ours import ours
from examples.ctr.data import SPLITS, ClickData, counts, load_parquet
from examples.ctr.models import DeepFM
from examples.ctr.training import evaluate, train_with
from mec_embed import CompressedEmbedding

SIZES = {"train": 600, "valid": 90, "test": 120}
#: Trainable parameters of DeepFM in the training logs of BARS.
PUBLISHED = {
    "Criteo_x1": 23_429_477,
    "Avazu_x1": 14_696_590,
    "Frappe_x1": 423_280,
    "MovielensLatest_x1": 1_328_630,
}
Columns = dict[str, list]


def _write(folder: Path, splits: dict[str, Columns]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        with (folder / f"{split}.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return folder


def _made_up(dataset: str, seed: int = 0, sizes: dict[str, int] = SIZES) -> dict[str, Columns]:
    """Skewed ids, some of them in no training example; numbers of one digit in I1 to I13."""
    rng = np.random.default_rng(seed)
    splits = {}
    for split, n in sizes.items():
        columns: Columns = {"label": rng.integers(0, 2, n).tolist()}
        for name in FIELDS[dataset]:
            ids = (rng.pareto(0.7, n) * 4).astype(int) % 3000 + 10 * (split != "train")
            number = name.startswith("I")
            columns[name] = rng.integers(0, 10, n).tolist() if number else ids.tolist()
            if number:
                columns[name] = [value / 10 for value in columns[name]]
        splits[split] = columns
    return splits


def _movielens(train: list, valid: list, test: list) -> dict[str, Columns]:
    """Made-up MovielensLatest_x1 with these users and one item and tag."""
    return {
        split: {"label": [0] * len(users), "user_id": users}
        | {name: [7] * len(users) for name in ("item_id", "tag_id")}
        for split, users in zip(SPLITS, (train, valid, test), strict=True)
    }


def _criteo(train: list, valid: list, test: list) -> dict[str, Columns]:
    """Made-up Criteo_x1 with these numbers in I1 and one value in each other field."""
    return {
        split: {"label": [1] * len(numbers), "I1": numbers}
        | {name: [3] * len(numbers) for name in FIELDS["Criteo_x1"][1:]}
        for split, numbers in zip(SPLITS, (train, valid, test), strict=True)
    }


def _same(first: ClickData, second: ClickData) -> bool:
    return (first.fields, first.rows) == (second.fields, second.rows) and all(
        torch.equal(getattr(first, part)[split], getattr(second, part)[split])
        for part in ("ids", "labels")
        for split in SPLITS
    )


@pytest.mark.parametrize("min_count", [1, 2, 5])
@pytest.mark.parametrize("dataset", FIELDS)
def test_ids_are_those_of_load_parquet(tmp_path, dataset, min_count):
    splits = _made_up(dataset, seed=min_count)
    loaded = load_folder(_write(tmp_path / dataset, splits), dataset, min_count)
    joined: Columns = {"split": [split for split in SPLITS for _ in splits[split]["label"]]}
    for name in ("label", *FIELDS[dataset]):
        joined[name] = [value for split in SPLITS for value in splits[split][name]]
        if name.startswith("I"):  # ten values are ten buckets; text keeps load_parquet's hands off
            joined[name] = list(map(str, joined[name]))
    pq.write_table(pa.table(joined), tmp_path / "clicks.parquet")
    assert _same(loaded, load_parquet(tmp_path / "clicks.parquet", min_count))
    assert loaded.name == dataset


@pytest.mark.parametrize("dataset", FIELDS)
def test_shapes_types_and_order_of_what_is_loaded(tmp_path, dataset):
    splits = _made_up(dataset)
    data = load_folder(_write(tmp_path, splits), dataset, min_count=2)
    assert data.fields == list(FIELDS[dataset])
    for split, n in SIZES.items():
        assert data.ids[split].dtype is torch.int64 and data.ids[split].is_contiguous()
        assert data.ids[split].shape == (n, len(data.fields))
        assert data.labels[split].dtype is torch.float32
        assert data.labels[split].tolist() == splits[split]["label"]
        assert bool((data.ids[split] < torch.tensor(data.rows)).all())
    for occurrences in counts(data).values():
        kept = occurrences[:-1]
        assert (np.diff(kept) <= 0).all() and kept.min() >= 2


def test_rare_and_unseen_ids_share_the_last_row_and_an_empty_cell_is_an_id(tmp_path):
    folder = _write(tmp_path, _movielens([5, 9, 9, "", "", "", 4], [4, 9], [77, "", 5]))
    data = load_folder(folder, "MovielensLatest_x1", min_count=2)
    assert data.rows == [3, 2, 2]
    assert data.ids["train"][:, 0].tolist() == [2, 1, 1, 0, 0, 0, 2]
    assert data.ids["valid"][:, 0].tolist() == [2, 1]
    assert data.ids["test"][:, 0].tolist() == [2, 0, 2]
    every_id = load_folder(folder, "MovielensLatest_x1")
    assert every_id.rows == [5, 2, 2]
    assert every_id.ids["test"][:, 0].tolist() == [4, 0, 2]


def test_files_longer_than_a_block_are_read_whole(tmp_path):
    sizes = {"train": 120_000, "valid": 70_000, "test": 3}  # pyarrow's blocks are of 1 MiB
    splits = _made_up("MovielensLatest_x1", sizes=sizes)
    for columns in splits.values():
        columns["user_id"] = [10**9 + user for user in columns["user_id"]]
    data = load_folder(_write(tmp_path, splits), "MovielensLatest_x1")
    assert (tmp_path / "train.csv").stat().st_size > 2 * 2**20
    for split, n in sizes.items():
        assert data.labels[split].tolist() == splits[split]["label"]
        users, ids = np.array(splits[split]["user_id"]), data.ids[split][:, 0].numpy()
        seen = ids < data.rows[0] - 1
        assert len(ids) == n and len(np.unique(users[seen])) == len(np.unique(ids[seen]))
        assert len({*zip(users[seen], ids[seen], strict=True)}) == len(np.unique(ids[seen]))


def test_columns_are_found_by_name(tmp_path):
    splits = _made_up("Frappe_x1")
    turned = {
        split: {"extra": ["x"] * SIZES[split], **dict(reversed(columns.items()))}
        for split, columns in splits.items()
    }
    first = load_folder(_write(tmp_path / "a", splits), "Frappe_x1")
    assert _same(first, load_folder(_write(tmp_path / "b", turned), "Frappe_x1"))


def test_numbers_are_cut_into_equal_intervals_of_the_training_distribution(tmp_path):
    rng = np.random.default_rng(0)
    numbers = {split: rng.lognormal(size=n).tolist() for split, n in SIZES.items()}
    numbers["train"] = [0.0] * 200 + rng.lognormal(size=1000).tolist()
    data = load_folder(_write(tmp_path, _criteo(**numbers)), "Criteo_x1")
    occurrences = counts(data)["I1"]
    assert occurrences[0] == 200 and data.ids["train"][:200, 0].tolist() == [0] * 200
    assert occurrences[1:-1].max() <= 2 * 1200 / 100 and 80 <= data.rows[0] - 1 <= 100
    together = np.concatenate([numbers[split] for split in SPLITS])
    ids = torch.cat([data.ids[split] for split in SPLITS])[:, 0].numpy()
    along = ids[np.argsort(together, kind="stable")]
    assert 1 + np.count_nonzero(np.diff(along)) == len(np.unique(ids)), "a bucket has a hole"


def test_numbers_outside_training_do_not_move_the_buckets(tmp_path):
    numbers = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3]
    plain = load_folder(_write(tmp_path / "a", _criteo(numbers, [0.2], [0.2])), "Criteo_x1")
    strange = _criteo(numbers, [5.0, 6.0, 7.0, -4.0], [9.0, ""])
    other = load_folder(_write(tmp_path / "b", strange), "Criteo_x1")
    assert torch.equal(plain.ids["train"], other.ids["train"])
    assert other.ids["train"][:, 0].tolist() == [2, 1, 1, 0, 0, 0]
    # Outside the range is in the outermost bucket; a missing number is unseen in training.
    assert other.ids["valid"][:, 0].tolist() == [0, 0, 0, 2]
    assert other.ids["test"][:, 0].tolist() == [0, 3]


def test_missing_numbers_are_a_bucket_of_their_own(tmp_path):
    folder = _write(tmp_path, _criteo(["", ""], [""], ["", 1.0]))
    assert load_folder(folder, "Criteo_x1").ids["test"][:, 0].tolist() == [0, 1]
    numbers = ["", 0.0, "", 0.0, "", 1.0]
    data = load_folder(_write(tmp_path, _criteo(numbers, [0.0], ["", 1.0])), "Criteo_x1")
    assert data.ids["train"][:, 0].tolist() == [0, 1, 0, 1, 0, 2]
    assert data.ids["test"][:, 0].tolist() == [0, 2]


def test_what_is_missing_is_named_before_data_are_read(tmp_path, monkeypatch):
    splits = _made_up("Avazu_x1")
    del splits["test"]["feat_7"], splits["test"]["feat_9"]
    monkeypatch.setattr("pyarrow.csv.read_csv", None)  # would fail if it were called
    with pytest.raises(ValueError, match=r"test\.csv has no column feat_7, feat_9.*label, feat_1"):
        load_folder(_write(tmp_path, splits), "Avazu_x1")
    (tmp_path / "valid.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.csv is missing: Avazu_x1 .*test\.csv"):
        load_folder(tmp_path, "Avazu_x1")
    with pytest.raises(ValueError, match=r"unknown data set 'avazu'; known are Criteo_x1"):
        load_folder(tmp_path, "avazu")


def test_an_empty_file_has_no_columns(tmp_path):
    _write(tmp_path, _movielens([1], [1], [1]))
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(ValueError, match=r"train\.csv has no column label, user_id"):
        load_folder(tmp_path, "MovielensLatest_x1")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("user_id", "u17", r"valid\.csv: .*u17.*expected .*integer ids"),
        ("label", "2", r"valid\.csv: label holds 2; expected 0 or 1"),
        ("label", "", r"valid\.csv: label holds nan; expected 0 or 1"),
    ],
)
def test_a_strange_value_is_named_with_its_file(tmp_path, column, value, message):
    splits = _movielens([1, 2], [1, 2], [1, 2])
    splits["valid"][column][1] = value
    with pytest.raises(ValueError, match=message):
        load_folder(_write(tmp_path, splits), "MovielensLatest_x1")


@pytest.mark.parametrize("dataset", FIELDS)
def test_settings_give_the_published_number_of_parameters(dataset):
    settings = FUXICTR_SETTINGS[dataset]
    fields = FIELDS[dataset]
    model = DeepFM(
        fields,
        [1] * len(fields),
        settings.dim,
        settings.hidden,
        settings.dropout,
        settings.batch_norm,
    )
    mlp = sum(parameter.numel() for parameter in model.mlp.parameters())
    # What is left are rows of the two tables, of dimension 10 and 1.
    assert (PUBLISHED[dataset] - mlp) % (settings.dim + 1) == 0
    assert set(FUXICTR_SETTINGS) == set(FIELDS)


def test_a_loaded_folder_trains_and_compresses(tmp_path):
    sizes = {"train": 3000, "valid": 300, "test": 300}
    splits = _made_up("MovielensLatest_x1", sizes=sizes)
    for columns in splits.values():  # a click depends on the item
        columns["label"] = [item % 2 for item in columns["item_id"]]
    data = load_folder(_write(tmp_path, splits), "MovielensLatest_x1")
    published = FUXICTR_SETTINGS["MovielensLatest_x1"]
    settings = replace(published, hidden=(8,), l2=1e-4, lr=1e-2, batch_size=128, epochs=1)
    model = build("DeepFM", data, settings, seed=0)
    history = train_with(settings, model, data)
    assert len(history) == 1 and history[0].auc > 0.6
    base = Base(data, settings, model.eval(), counts(data), seed=0)
    small = ours(base, 8)
    assert small is not None and embedding_bytes(small) <= base.budget(8)
    assert any(isinstance(module, CompressedEmbedding) for module in small.modules())
    assert len(list(tables(base.model))) == 6, "the base has changed"
    assert evaluate(small, data, "test").auc > 0.55
