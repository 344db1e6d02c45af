"""Finding tables, leaving some alone with a reason, and replacing modules."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from mec_embed import CodeLayout, CompressedEmbedding, CompressionConfig
from mec_embed.tables import check_finite, check_model, find_tables

ROWS, DIM = 20, 4
CONFIG = CompressionConfig(min_rows=10)


def table(rows=ROWS, **options):
    return nn.Embedding(rows, DIM, **options)


def compressed(**options):
    return CompressedEmbedding(CodeLayout("additive", ROWS, DIM, 1, 4), **options)


class MyEmbedding(nn.Embedding):
    """A subclass."""


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class TiedHead(nn.Module):
    """A language model's head on its input table."""

    def __init__(self):
        super().__init__()
        self.skipped = table()
        self.head = nn.Linear(DIM, ROWS, bias=False)
        self.head.weight = self.skipped.weight


class TiedBuffer(nn.Module):
    """Another tensor over the same memory."""

    def __init__(self):
        super().__init__()
        self.skipped = table()
        self.register_buffer("part", self.skipped.weight.detach()[3:5])


class TiedList(nn.Module):
    """The parameter in a list as well."""

    def __init__(self):
        super().__init__()
        self.skipped = table()
        self.weights = nn.ParameterList([self.skipped.weight])


def with_module(module, change=lambda module: None):
    change(module)
    return nn.ModuleDict({"skipped": module})


def replace_forward(module):
    module.forward = lambda ids: torch.zeros(1)


SKIPPED = {
    "subclass": (lambda: with_module(MyEmbedding(ROWS, DIM)), "subclass.*MyEmbedding"),
    "bag subclass": (
        lambda: with_module(type("MyBag", (nn.EmbeddingBag,), {})(ROWS, DIM)),
        "subclass.*MyBag",
    ),
    "parametrized": (
        lambda: with_module(
            table(), lambda m: parametrize.register_parametrization(m, "weight", Twice())
        ),
        "Parametrized|plain parameter",
    ),
    "pruned": (
        lambda: with_module(table(), lambda m: prune.identity(m, "weight")),
        "plain parameter",
    ),
    "tied head": (TiedHead, "tied"),
    "tied buffer": (TiedBuffer, "tied"),
    "tied list": (TiedList, "tied"),
    "max_norm": (lambda: with_module(table(max_norm=1.0)), "max_norm"),
    "bag max_norm": (lambda: with_module(nn.EmbeddingBag(ROWS, DIM, max_norm=1.0)), "max_norm"),
    "scale_grad_by_freq": (
        lambda: with_module(table(scale_grad_by_freq=True)),
        "scale_grad_by_freq",
    ),
    "few rows": (lambda: with_module(table(9)), "fewer than min_rows=10"),
    "no rows": (lambda: with_module(table(0)), "empty"),
    "no columns": (lambda: with_module(nn.Embedding(ROWS, 0)), "empty"),
    "complex": (
        lambda: with_module(
            nn.Embedding.from_pretrained(torch.zeros(ROWS, DIM, dtype=torch.complex64))
        ),
        "dtype torch.complex64",
    ),
    "gradient hook": (
        lambda: with_module(table(), lambda m: m.weight.register_hook(lambda grad: grad)),
        "gradient hooks",
    ),
    "accumulate hook": (
        lambda: with_module(
            table(), lambda m: m.weight.register_post_accumulate_grad_hook(lambda param: None)
        ),
        "gradient hooks",
    ),
    "replaced forward": (lambda: with_module(table(), replace_forward), "forward"),
    "state_dict hook": (
        lambda: with_module(table(), lambda m: m.register_state_dict_post_hook(lambda *args: None)),
        "state_dict hooks",
    ),
    "state_dict pre-hook": (
        lambda: with_module(table(), lambda m: m.register_state_dict_pre_hook(lambda *args: None)),
        "state_dict hooks",
    ),
    "load pre-hook": (
        lambda: with_module(
            table(), lambda m: m.register_load_state_dict_pre_hook(lambda *args: None)
        ),
        "state_dict hooks",
    ),
    "load post-hook": (
        lambda: with_module(
            table(), lambda m: m.register_load_state_dict_post_hook(lambda *args: None)
        ),
        "state_dict hooks",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_table_is_left_alone_with_the_reason(case):
    make, reason = SKIPPED[case]
    model = nn.ModuleDict({"good": table(), "odd": make()})
    tables, skipped = find_tables(model, CONFIG)
    assert [t.name for t in tables] == ["good"]
    assert [s.name for s in skipped] == ["odd.skipped"]
    with pytest.raises(ValueError, match=f"odd.skipped.*({reason})"):
        find_tables(nn.ModuleDict({"odd": model["odd"]}), CONFIG)


def test_a_table_that_is_compiled_alone_is_left_alone():
    model = nn.ModuleDict({"good": table(), "odd": torch.compile(table(), backend="eager")})
    found, skipped = find_tables(model, CompressionConfig())
    assert [one.name for one in found] == ["good"]
    assert [one.name for one in skipped] == ["odd._orig_mod"] and "compile" in skipped[0].reason
    with pytest.raises(ValueError, match="is itself an Embedding"):
        find_tables(model["odd"], CompressionConfig())


def test_names_select():
    model = nn.ModuleDict({"users": table(), "goods": table()})
    config = CompressionConfig(min_rows=10, exclude=["us*"])
    tables, skipped = find_tables(model, config)
    assert [t.name for t in tables] == ["goods"]
    assert "include and exclude" in skipped[0].reason
    config = CompressionConfig(min_rows=10, include=["us*"])
    assert [t.name for t in find_tables(model, config)[0]] == ["users"]


def test_excluding_one_alias_excludes_the_table():
    """exclude wins, whichever name of a shared table it matches."""
    shared = table()
    model = nn.ModuleDict({"a": shared, "b": shared, "c": table()})
    config = CompressionConfig(min_rows=10, exclude=["b"])
    assert [t.name for t in find_tables(model, config)[0]] == ["c"]


def test_min_rows_is_inclusive():
    assert find_tables(nn.Sequential(table(10)), CONFIG)[0][0].rows == 10


def nested():
    return nn.ModuleDict(
        {
            "list": nn.ModuleList([table(), nn.Sequential(nn.ReLU(), table())]),
            "dict": nn.ModuleDict({"bag": nn.EmbeddingBag(ROWS, DIM)}),
        }
    )


def test_nested_containers():
    names = {t.name for t in find_tables(nested(), CONFIG)[0]}
    assert names == {"list.0", "list.1.1", "dict.bag"}


def test_tables_of_every_floating_dtype_are_found():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    model = nn.Sequential(*[table(dtype=dtype) for dtype in dtypes])
    tables, _ = find_tables(model, CONFIG)
    assert [t.weight.dtype for t in tables] == dtypes


def shared_model():
    shared = table()
    holder = nn.Sequential(shared)
    return nn.ModuleDict({"a": shared, "deep": holder, "same": holder, "other": table()})


def test_shared_module_is_one_table_with_all_its_names():
    model = shared_model()
    tables, _ = find_tables(model, CONFIG)
    assert len(tables) == 2
    first = next(t for t in tables if t.module is model["a"])
    assert set(first.names) == {"a", "deep.0", "same.0"}


def test_meta_table_is_refused():
    model = nn.ModuleDict({"good": table(), "empty": table(device="meta")})
    with pytest.raises(ValueError, match="'empty'.*meta"):
        find_tables(model, CONFIG)


@pytest.mark.parametrize("module", [table(), nn.EmbeddingBag(ROWS, DIM)], ids=["plain", "bag"])
def test_model_that_is_itself_a_table_is_refused(module):
    with pytest.raises(ValueError, match="Sequential"):
        find_tables(module, CONFIG)


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
@pytest.mark.parametrize("inside", [False, True])
def test_wrapper_is_refused(name, inside):
    wrapper = type(name, (nn.Module,), {})()
    wrapper.module = nn.Sequential(table())
    model = nn.ModuleDict({"part": wrapper}) if inside else wrapper
    with pytest.raises(ValueError, match=f"part.*{name}" if inside else name):
        check_model(model)


def test_real_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DataParallel"):
        find_tables(nn.DataParallel(nn.Sequential(table())), CONFIG)


@pytest.mark.parametrize("model", [None, "model", torch.zeros(3), {}], ids=repr)
def test_model_that_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match="nn.Module"):
        check_model(model)


def test_nothing_to_compress_lists_what_was_seen():
    model = nn.ModuleDict({"small": table(3), "mine": MyEmbedding(ROWS, DIM)})
    with pytest.raises(ValueError) as caught:
        find_tables(model, CONFIG)
    for part in ("small (3 x 4)", "min_rows", "mine (20 x 4)", "MyEmbedding"):
        assert part in str(caught.value)


def test_model_without_tables_lists_its_modules():
    with pytest.raises(ValueError, match="ReLU"):
        find_tables(nn.Sequential(nn.ReLU()), CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_table_and_row(value, monkeypatch):
    monkeypatch.setattr("mec_embed.tables.CHECK_ROWS", 6)
    model = nn.ModuleDict({"good": table(), "bad": table()})
    tables, _ = find_tables(model, CONFIG)
    check_finite(tables)
    with torch.no_grad():
        model["bad"].weight[13, 2] = value
    with pytest.raises(ValueError, match="'bad'.*row 13"):
        check_finite(tables)


def test_two_tables_with_tensors_over_one_buffer_are_tied():
    whole = torch.randn(2 * ROWS, DIM)
    model = nn.ModuleDict(
        {
            "a": nn.Embedding.from_pretrained(whole[:ROWS], freeze=False),
            "b": nn.Embedding.from_pretrained(whole[ROWS:], freeze=False),
            "c": table(),
        }
    )
    assert "c" in [t.name for t in find_tables(model, CONFIG)[0]]
    tied = nn.ModuleDict({"a": table(), "b": table(), "c": table()})
    tied["b"].weight = tied["a"].weight
    assert [t.name for t in find_tables(tied, CONFIG)[0]] == ["c"]
