"""Counting ids: from batches, columns, parquet and counts."""

import numpy as np
import pytest
import tier_model
import torch
from torch import nn

from mec_embed import CompressionConfig, FrequencyStats, TieredEmbedding, compress
from mec_embed.forward import default_forward
from mec_embed.frequency import counts_for_tables, parquet_columns
from mec_embed.tables import EMBEDDINGS


class Net(nn.Module):
    """A shared table (looked up twice), a padded one, and a bag called with keywords."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(10, 4)
        self.again = self.shared
        self.padded = nn.Embedding(6, 4, padding_idx=0)
        self.bag = nn.EmbeddingBag(8, 4, mode="sum", padding_idx=-1)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.head.training, torch.is_grad_enabled()))
        total = self.shared(x["a"]).sum(1) + self.again(x["b"]) + self.padded(x["c"]).sum(1)
        return self.head(total + self.bag(input=x["d"], offsets=x["offsets"]))


BATCH = {
    "a": torch.tensor([[0, 1, 1], [9, 1, 0]]),
    "b": torch.tensor([9, 2]),
    "c": torch.tensor([[0, 0, 5], [1, 0, 5]]),
    "d": torch.tensor([3, 3, 7, 2], dtype=torch.int32),
    "offsets": torch.tensor([0, 2], dtype=torch.int32),
}
EXPECTED = {
    "shared": [2, 3, 1, 0, 0, 0, 0, 0, 0, 2],
    "padded": [0, 1, 0, 0, 0, 2],
    "bag": [0, 0, 1, 2, 0, 0, 0, 0],
}


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in [*module._forward_pre_hooks, *module._forward_hooks]
    ]


def assert_counts(stats, expected):
    assert set(stats) == set(expected)
    for name, counts in expected.items():
        assert stats[name].dtype == np.float64
        np.testing.assert_array_equal(stats[name], counts)


@pytest.mark.parametrize("batches", [[BATCH], [(BATCH, torch.zeros(2))], [[BATCH, 0]]])
def test_batches_count_every_lookup(batches):
    """Shared tables sum their features, padding counts zero, keyword arguments are seen."""
    assert_counts(FrequencyStats.from_batches(Net(), batches), EXPECTED)


def test_batches_add_up_and_forward_can_be_given():
    double = {name: [2 * n for n in counts] for name, counts in EXPECTED.items()}
    batches = iter([{"inputs": BATCH}, {"inputs": BATCH}])
    stats = FrequencyStats.from_batches(Net(), batches, forward=lambda m, b: m(b["inputs"]))
    assert_counts(stats, double)


def test_model_runs_in_eval_mode_without_gradient_and_is_put_back():
    model = Net()
    model.head[1].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    FrequencyStats.from_batches(model, [BATCH])
    assert model.modes == [(False, False, False)]
    assert model.training and model.head.training and not model.head[1].training
    assert not hooks_of(model)
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("training", [True, False])
def test_model_is_put_back_after_an_exception(training):
    model = Net().train(training)

    def fail(model, batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FrequencyStats.from_batches(model, [BATCH], forward=fail)
    assert model.training is training and not hooks_of(model)


def test_own_hooks_of_the_model_stay():
    model = Net()
    seen = []
    model.shared.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    FrequencyStats.from_batches(model, [BATCH])
    assert len(hooks_of(model)) == 1 and len(seen) == 2


@pytest.mark.parametrize("compiled", ["all", "a part"])
def test_lookups_of_a_model_that_was_compiled_and_has_run_are_counted(compiled):
    model = nn.Sequential(nn.Sequential(nn.Embedding(10, 2)), nn.Linear(2, 1)).eval()
    (model if compiled == "all" else model[0]).compile(backend="eager")
    ids = torch.tensor([1, 1, 3])
    with torch.no_grad():
        model(ids)
    stats = FrequencyStats.from_batches(model, [ids])
    assert stats["0.0"].tolist() == [0, 2, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("batches", [[], [{k: v[:0] for k, v in BATCH.items()}]])
def test_no_ids_is_an_error(batches):
    with pytest.raises(ValueError, match="no ids"):
        FrequencyStats.from_batches(
            Net(), batches, forward=lambda m, b: m.shared(b["a"]) if b else None
        )


def test_a_compressed_model_counts_as_the_model_before():
    dense, model, _ = tier_model.shop()
    batches = [torch.randint(tier_model.ROWS, (200, 3)) for _ in range(3)]
    before, after = (FrequencyStats.from_batches(one, batches) for one in (dense, model))
    assert {*after} == {*before} and isinstance(model.shuffled, TieredEmbedding)
    assert all((after[name] == before[name]).all() for name in before)
    model.shuffled.oov_row = 7
    found = FrequencyStats.from_columns(model, {"shuffled": [5, -1, 4000, 0]})["shuffled"]
    assert found.nonzero()[0].tolist() == [5, 7] and found[7] == 2


def test_tables_are_compressed_one_after_the_other_with_counts_of_the_model_as_it_is():
    model = nn.ModuleDict({name: nn.Embedding(3000, 8) for name in ("user", "item")})
    model.forward = lambda ids: model["user"](ids) + model["item"](ids)
    batches = [torch.randint(3000, (500,))]
    for name in ("user", "item"):
        stats = FrequencyStats.from_batches(model, batches)
        other = {"user": "item", "item": "user"}[name]
        shape = {"num_subvectors": 2, "codebook_size": 16, "epochs": 0}
        config = CompressionConfig(**shape, include=(name,), exclude=(other,))
        report = compress(model, stats, config, progress=False)
        assert not any("name no table" in note for note in report.notes)
    assert set(FrequencyStats.from_batches(model, batches)) == {"user", "item"}


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_narrow_ids_of_a_table_with_a_row_for_unknown_ones(dtype):
    model = nn.ModuleDict({"user": nn.Embedding(100_000, 2)})
    config = CompressionConfig(num_subvectors=1, codebook_size=4, epochs=0)
    compress(model, None, config, progress=False)
    model["user"].oov_row = 70_000
    found = FrequencyStats.from_columns(model, {"user": np.array([1, -1], dtype=dtype)})["user"]
    assert found.nonzero()[0].tolist() == [1, 70_000]


def test_batches_that_the_model_does_not_take_are_told():
    model = nn.Bilinear(2, 2, 1)
    with pytest.raises(TypeError, match=r"missing 1 required.*given Tensor; .* forward=lambda"):
        default_forward(model, (torch.zeros(1, 2), torch.zeros(1, 2)))


def test_no_embedding_is_an_error():
    with pytest.raises(ValueError, match="no nn.Embedding"):
        FrequencyStats.from_batches(nn.Linear(2, 2), [torch.zeros(1, 2)])


@pytest.mark.parametrize("wrong", [10, -1])
def test_batch_with_an_id_out_of_range(wrong):
    """The error of a bad id names the table, as from_columns does."""
    model = Net()
    batch = {**BATCH, "b": torch.tensor([wrong, 2])}
    with pytest.raises(IndexError, match="shared"):
        FrequencyStats.from_batches(model, [batch])
    assert not hooks_of(model)


COLUMNS = {
    "shared": np.array([0, 1, 1, 9, 1, 0, 9, 2]),
    "padded": [[5, 1], [5, 5]],
    "bag": torch.tensor([3, 3, 2], dtype=torch.int32),
}


def test_columns_of_any_container_and_shape():
    expected = {**EXPECTED, "padded": [0, 1, 0, 0, 0, 3]}
    assert_counts(FrequencyStats.from_columns(Net(), COLUMNS), expected)


def test_columns_leave_padding_out_as_batches_do():
    stats = FrequencyStats.from_columns(Net(), {"padded": BATCH["c"]})
    np.testing.assert_array_equal(stats["padded"], EXPECTED["padded"])


def test_columns_by_alias_add_up():
    stats = FrequencyStats.from_columns(Net(), {"shared": [1], "again": [1, 2]})
    assert list(stats) == ["shared"] and stats["shared"].tolist()[:3] == [0, 2, 1]


def test_columns_by_last_part(click_model):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"user": nn.Embedding(4, 2)})

    assert list(FrequencyStats.from_columns(Wrapped(), {"user": [3]})) == ["inner.user"]
    with pytest.raises(ValueError, match="f0"):  # both embeddings.f0 and first_order.f0
        FrequencyStats.from_columns(click_model, {"f0": [3]})


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"nothing": [1]}, ValueError, "nothing"),
        ({"shared": [0, 10]}, IndexError, "shared.*10"),
        ({"shared": [-1]}, IndexError, "shared.*-1"),
        ({"shared": [0.5]}, TypeError, "shared"),
        ({"shared": ["x"]}, TypeError, "shared"),
        ({"shared": [True, False]}, TypeError, "shared"),
    ],
)
def test_wrong_columns(columns, error, message):
    with pytest.raises(error, match=message):
        FrequencyStats.from_columns(Net(), columns)


def test_empty_column_counts_nothing():
    assert FrequencyStats.from_columns(Net(), {"shared": []})["shared"].sum() == 0


def write(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("large", [False, True])
def test_parquet_with_lists_and_nulls(tmp_path, large):
    pa = pytest.importorskip("pyarrow")
    kind = (pa.large_list if large else pa.list_)(pa.int32())
    path = write(
        tmp_path / "x.parquet",
        a=pa.array([1, None, 9, 1, 0], pa.int64()),
        b=pa.array([2, 2, None, None, None], pa.uint8()),
        history=pa.array([[1, 5], None, [], [None, 5], [5]], kind),
        unread=pa.array(list("abcde")),
    )
    columns = {"a": "shared", "b": "again", "history": "padded"}
    stats = FrequencyStats.from_parquet(Net(), path, columns)
    assert_counts(
        stats,
        {"shared": [1, 2, 2, 0, 0, 0, 0, 0, 0, 1], "padded": [0, 1, 0, 0, 0, 3]},
    )


def test_parquet_in_pieces(tmp_path):
    """More rows than one piece holds."""
    ids = np.arange(70_000) % 10
    path = write(tmp_path / "x.parquet", a=ids)
    stats = FrequencyStats.from_parquet(Net(), str(path), {"a": "shared"})
    assert stats["shared"].tolist() == [7000.0] * 10


@pytest.mark.parametrize("groups", [1, 20])
def test_parquet_files_are_streamed(tmp_path, groups):
    """What is held of a file of 16 MB, in one row group or many, is a small part of it."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path, rows = tmp_path / "x.parquet", 2_000_000
    table = pa.table({"a": np.random.default_rng(0).integers(0, 2**62, rows)})
    parquet.write_table(table, path, row_group_size=rows // groups, use_dictionary=False)
    del table
    before, held, read = pa.total_allocated_bytes(), 0, 0
    for piece in parquet_columns(path, ["a"]):
        held = max(held, pa.total_allocated_bytes() - before)
        read += len(piece["a"])
    assert read == rows and path.stat().st_size > 15e6
    assert held < 6e6


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"b": "shared"}, ValueError, "b"),
        ({"a": "nothing"}, ValueError, "nothing"),
        ({"a": "padded"}, IndexError, "padded"),
        ({"text": "shared"}, TypeError, "shared"),
    ],
)
def test_wrong_parquet(tmp_path, columns, error, message):
    path = write(tmp_path / "x.parquet", a=[1, 2, 7], text=["1", "2", "3"])
    with pytest.raises(error, match=message):
        FrequencyStats.from_parquet(Net(), path, columns)


@pytest.mark.parametrize("values", [[1, 0, 2.5], np.array([1, 0, 2.5]), torch.tensor([1, 0, 2.5])])
def test_counts_of_any_container(values):
    stats = FrequencyStats.from_counts({"x": values})
    assert stats["x"].tolist() == [1, 0, 2.5] and "x" in stats and len(stats) == 1


@pytest.mark.parametrize(
    "values",
    [
        [1, -1],
        [1, float("nan")],
        [float("inf")],
        [[1, 2]],
        3,
        ["many"],
        [[1], [1, 2]],
        torch.ones(2, 2),
        {"a": 1},
    ],
    ids=str,
)
def test_wrong_counts_name_the_table(values):
    with pytest.raises(ValueError, match="'user'"):
        FrequencyStats.from_counts({"user": values})


def test_wrong_count_names_the_row():
    with pytest.raises(ValueError, match="row 2"):
        FrequencyStats.from_counts({"user": [1, 2, -3, 4]})


def test_add():
    """Counts of one name add, others join, the operands stay."""
    a = FrequencyStats.from_counts({"x": [1, 2], "y": [1]})
    b = FrequencyStats.from_counts({"x": [10, 0], "z": [5]})
    total = a + b
    assert {name: total[name].tolist() for name in total} == {"x": [11, 2], "y": [1], "z": [5]}
    assert a["x"].tolist() == [1, 2] and b["x"].tolist() == [10, 0]
    with pytest.raises(ValueError, match="'x'"):
        a + FrequencyStats.from_counts({"x": [1, 2, 3]})
    with pytest.raises(TypeError, match="'FrequencyStats' and 'int'"):
        a + 3


def test_repr_shows_names_and_totals():
    assert "user: 3" in repr(FrequencyStats.from_counts({"user": [1, 2]}))


def test_from_counts_does_not_follow_later_changes():
    counts = np.ones(2)
    stats = FrequencyStats.from_counts({"x": counts})
    counts[0] = -5
    assert stats["x"].tolist() == [1, 1]


TABLES = [(("a.user", "b.user"), 3), (("a.item",), 2), (("b.item",), 2)]


@pytest.mark.parametrize("name", ["a.user", "b.user", "user"])
def test_counts_found_by_any_name(name):
    found = counts_for_tables({name: [1, 2, 3]}, TABLES, [])
    assert found[0].tolist() == [1, 2, 3] and found[1:] == [None, None]


def test_counts_for_other_tables_are_allowed():
    assert counts_for_tables({"small": [1]}, TABLES, ["x.small"]) == [None] * 3
    assert counts_for_tables(None, TABLES, []) == [None] * 3


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ({"nothing": [1]}, ValueError, "nothing"),
        ({"item": [1, 2]}, ValueError, "item.*several"),
        ({"a.user": [1]}, ValueError, "a.user.*1 for 3"),
        ({"a.user": [1, 2, 3], "b.user": [1, 2, 3]}, ValueError, "a.user.*twice"),
        ({"a.user": [1, 2, -3]}, ValueError, "a.user"),
        ([1, 2, 3], TypeError, "list"),
    ],
)
def test_counts_that_do_not_fit(counts, error, message):
    with pytest.raises(error, match=message):
        counts_for_tables(counts, TABLES, [])


def test_embedding_subclasses_are_counted():
    class Mine(nn.Embedding):
        pass

    model = nn.Sequential(Mine(4, 2))
    assert isinstance(model[0], EMBEDDINGS)
    assert FrequencyStats.from_batches(model, [torch.tensor([3])])["0"].tolist() == [0, 0, 0, 1]


def write_counts(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_counts_that_a_cluster_has_made(tmp_path):
    """Parts of a folder, and lines of the same id, are added."""
    write_counts(tmp_path / "a" / "part-0.parquet", id=[1, 3, 1], n=[5, 1, 2])
    write_counts(tmp_path / "a" / "deep" / "part-1.parquet", id=[3, 0], n=[10.0, 0.5])
    for left in ("_temporary/0/part-2.parquet", ".part-3.parquet"):
        write_counts(tmp_path / "a" / left, id=[3], n=[100])
    one = write_counts(tmp_path / "b.parquet", id=[2], n=[7])
    stats = FrequencyStats.from_count_tables(
        Net(), {"shared": tmp_path / "a", "bag": str(one)}, count_column="n"
    )
    expected = np.zeros(len(stats["shared"]))
    expected[[0, 1, 3]] = 0.5, 7, 11
    assert np.array_equal(stats["shared"], expected)
    assert stats["bag"][2] == 7 and stats["bag"].sum() == 7


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"id": [10_000], "count": [1]}, IndexError, "id 10000 is out of range"),
        ({"id": [1], "count": [-1]}, ValueError, "finite and not negative, got -1"),
        ({"id": [1], "count": [float("nan")]}, ValueError, "finite and not negative, got nan"),
        ({"id": [1, 2], "count": [1, None]}, ValueError, "column 'count' of .* holds a null"),
        ({"id": [1, None, 3], "count": [1, 2, None]}, ValueError, "column 'id' of .* holds a null"),
        ({"id": [[1, 2]], "count": [1]}, ValueError, "2 ids and 1 counts, expected one for each"),
        ({"id": [1], "n": [1]}, ValueError, "has no column count; it has id, n"),
        ({"id": [1.5], "count": [1]}, TypeError, "ids must be integers"),
    ],
)
def test_wrong_counts_of_a_cluster(tmp_path, columns, error, message):
    path = write_counts(tmp_path / "c.parquet", **columns)
    with pytest.raises(error, match=message):
        FrequencyStats.from_count_tables(Net(), {"shared": path})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no parquet file"):
        FrequencyStats.from_count_tables(Net(), {"shared": tmp_path / "empty"})


def test_counts_of_another_type_are_shown_in_short():
    with pytest.raises(
        ValueError, match="'user': counts must be numbers, got \\['a', 'a'"
    ) as error:
        FrequencyStats.from_counts({"user": ["a"] * 3000})
    assert len(str(error.value)) < 120


def test_counts_go_into_files_for_the_command_line(tmp_path):
    stats = FrequencyStats.from_counts({"user": [5, 0, 1], "item": [2, 2]})
    np.savez(tmp_path / "counts.npz", **stats)
    with np.load(tmp_path / "counts.npz") as found:
        assert {name: found[name].tolist() for name in found} == {
            "user": [5.0, 0.0, 1.0],
            "item": [2.0, 2.0],
        }
    assert list(dict(stats)) == ["user", "item"]
