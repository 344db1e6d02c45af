"""The configuration: what is refused, the JSON form, the budget, name patterns."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mec_embed import CompressionConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 0.5),
        ("ratio", 0),
        ("ratio", float("nan")),
        ("ratio", float("inf")),
        ("max_bytes", 0),
        ("max_bytes", -5),
        ("codes", "residual"),
        ("codebook_dtype", "float8"),
        ("popularity", "square"),
        ("nonfinite", "nan"),
        ("min_rows", 0),
        ("epochs", -1),
        ("seed", -1),
        ("seed", 2**31),
        ("usage_weight", -1e-9),
        ("usage_weight", float("nan")),
        ("contrastive_weight", float("inf")),
    ],
)
def test_value_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        CompressionConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", "50"),
        ("ratio", True),
        ("max_bytes", 10.5),
        ("min_rows", 2.0),
        ("min_rows", True),
        ("epochs", "4"),
        ("epochs", None),
        ("seed", 1.0),
        ("usage_weight", "0"),
        ("contrastive_weight", None),
        ("include", "*"),
        ("exclude", "user"),
        ("include", [1]),
        ("exclude", [None]),
        ("tiers", None),
        ("tiers", 1),
        ("tiers", "yes"),
    ],
)
def test_value_of_wrong_type(field, value):
    with pytest.raises(TypeError, match=field):
        CompressionConfig(**{field: value})


@pytest.mark.parametrize("field", ["include", "exclude"])
@pytest.mark.parametrize("value", [None, 3])
def test_patterns_that_are_no_sequence_name_the_field(field, value):
    with pytest.raises(TypeError, match=field):
        CompressionConfig(**{field: value})


@pytest.mark.parametrize("field", ["codes", "codebook_dtype", "popularity"])
@pytest.mark.parametrize("value", [3, ["additive"], torch.float32])
def test_choices_of_wrong_type_name_the_field(field, value):
    with pytest.raises((TypeError, ValueError), match=field):
        CompressionConfig(**{field: value})


@pytest.mark.parametrize(
    ("shape", "error", "field"),
    [
        ((0, 16), ValueError, "num_subvectors"),
        ((257, 16), ValueError, "num_subvectors"),
        ((2.0, 16), TypeError, "num_subvectors"),
        ((2, 1), ValueError, "codebook_size"),
        ((2, 65537), ValueError, "codebook_size"),
        ((2, "16"), TypeError, "codebook_size"),
        ((2, None), ValueError, "codebook_size"),
        ((None, 16), ValueError, "num_subvectors"),
    ],
)
def test_explicit_shape_is_checked(shape, error, field):
    with pytest.raises(error, match=field):
        CompressionConfig(num_subvectors=shape[0], codebook_size=shape[1])


def test_codewords_of_additive_codes_are_limited():
    assert CompressionConfig(num_subvectors=2, codebook_size=1 << 14).codebook_size == 1 << 14
    with pytest.raises(ValueError, match=r"at most 32,768, got 3 \* 16384 = 49,152.*'product'"):
        CompressionConfig(num_subvectors=3, codebook_size=1 << 14)
    product = CompressionConfig(num_subvectors=3, codebook_size=1 << 16, codes="product")
    assert product.num_subvectors == 3


@pytest.mark.parametrize(
    "targets",
    [
        {"ratio": 50, "max_bytes": 1000},
        {"ratio": 50, "num_subvectors": 2, "codebook_size": 4},
        {"max_bytes": 1000, "num_subvectors": 2, "codebook_size": 4},
    ],
    ids=str,
)
def test_targets_exclude_each_other(targets):
    with pytest.raises(ValueError, match="give one of"):
        CompressionConfig(**targets)


def test_default_ratio_is_50_only_without_another_target():
    assert CompressionConfig().ratio == 50
    assert CompressionConfig(max_bytes=10).ratio is None
    assert CompressionConfig(num_subvectors=2, codebook_size=4).ratio is None


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CompressionConfig)])
def test_frozen(field):
    config = CompressionConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))


def test_lists_of_patterns_become_tuples():
    config = CompressionConfig(include=["a.*"], exclude=["b"])
    assert (config.include, config.exclude) == (("a.*",), ("b",))
    assert hash(config) == hash(CompressionConfig(include=("a.*",), exclude=("b",)))


def test_numbers_of_numpy_are_numbers():
    config = CompressionConfig(ratio=np.float32(20), epochs=np.int64(2), seed=np.uint8(3))
    assert config == CompressionConfig(ratio=20.0, epochs=2, seed=3)
    assert CompressionConfig.from_json(config.to_json()) == config
    with pytest.raises(TypeError, match="epochs"):
        CompressionConfig(epochs=np.float64(2))
    with pytest.raises(TypeError, match="ratio"):
        CompressionConfig(ratio=np.bool_(True))


TARGETS = st.one_of(
    st.just({}),
    st.floats(1, 1e9).map(lambda x: {"ratio": x}),
    st.integers(1, 1000).map(lambda x: {"ratio": x}),
    st.integers(1, 2**60).map(lambda x: {"max_bytes": x}),
    st.tuples(st.integers(1, 256), st.integers(2, 1 << 7)).map(
        lambda x: {"num_subvectors": x[0], "codebook_size": x[1]}
    ),
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "codes": st.sampled_from(["additive", "product"]),
        "codebook_dtype": st.sampled_from([None, "float32", "float16", "bfloat16", "int8"]),
        "min_rows": st.integers(1, 2**40),
        "include": st.lists(st.text(), max_size=3),
        "exclude": st.lists(st.text(), max_size=3),
        "popularity": st.sampled_from([None, "sqrt", "linear", "log", "none"]),
        "tiers": st.booleans(),
        "usage_weight": st.floats(0, 1e30),
        "contrastive_weight": st.floats(0, 1e30),
        "epochs": st.integers(0, 10**6),
        "seed": st.integers(0, 2**31 - 1),
    },
)


@given(TARGETS, OTHERS)
def test_json_round_trip(target, others):
    config = CompressionConfig(**target, **others)
    text = config.to_json()
    assert CompressionConfig.from_json(text) == config
    assert CompressionConfig.from_dict(config.to_dict()) == config
    assert json.loads(text) == config.to_dict()


def test_whole_and_broken_ratios_are_one():
    assert CompressionConfig(ratio=50).to_json() == CompressionConfig().to_json()


def test_unknown_key_is_named():
    with pytest.raises(ValueError, match="ratoi"):
        CompressionConfig.from_dict({"ratoi": 50})


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="ratoi"):
        CompressionConfig(ratoi=50)


def test_budget_rounds_down():
    """So that the ratio asked for is reached."""
    assert CompressionConfig(ratio=3).budget(1000) == 333
    assert CompressionConfig(max_bytes=77).budget(1000) == 77
    assert CompressionConfig(num_subvectors=1, codebook_size=2).budget(1000) is None


@pytest.mark.parametrize(
    ("include", "exclude", "selected"),
    [
        (["*"], [], True),
        (["emb.*"], [], True),
        (["other.*"], [], False),
        ([], [], False),
        (["*"], ["emb.us??"], False),
        (["*"], ["user"], True),
        (["EMB.*"], [], False),
        (["x", "emb.[tu]ser"], ["y"], True),
    ],
)
def test_patterns_select_by_qualified_name(include, exclude, selected):
    assert CompressionConfig(include=include, exclude=exclude).selects(["emb.user"]) is selected


def test_a_name_is_a_pattern_for_itself():
    config = CompressionConfig(include=["cat[0]", "cat[12]"], exclude=["cat[*]x"])
    assert [config.selects([name]) for name in ("cat[0]", "cat0", "cat1", "cat[1]")] == [
        True,
        True,
        True,
        False,
    ]
    assert config.unmatched(["cat[0]", "cat1"]) == ["cat[*]x"]


def test_codebook_dtype_follows_the_table_by_default():
    assert CompressionConfig().codebook_dtype_for(torch.bfloat16) is torch.bfloat16
    assert CompressionConfig(codebook_dtype="int8").codebook_dtype_for(torch.float32) is torch.int8
