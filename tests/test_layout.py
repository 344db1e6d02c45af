"""Layouts: bytes as the real tensors have them, and every error."""

import json

import numpy as np
import pytest
import torch

from mec_embed import CodeLayout, CompressedEmbedding
from mec_embed.layout import bits_for, dtype_from_name, dtype_name, packed_bytes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8]
SHAPES = [
    ("additive", 1, 4, 1, 1),
    ("additive", 1001, 7, 3, 5),
    ("additive", 333, 1, 1, 256),
    ("additive", 64, 8, 2, 1 << 16),
    ("product", 1001, 12, 3, 37),
    ("product", 10, 6, 6, 2),
    ("rows", 57, 9, 1, 57),
    ("rows", 1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_tensors(shape, dtype):
    layout = CodeLayout(*shape, dtype)
    module = CompressedEmbedding(layout)
    books = module.codebook_set
    scales = 0 if books.scales is None else books.scales.nbytes
    assert layout.code_bytes == module.codes.nbytes
    assert layout.codebook_bytes == module.codebooks.nbytes + scales
    tensors = [*module.parameters(), *module.buffers()]
    assert layout.code_bytes + layout.codebook_bytes == sum(t.nbytes for t in tensors)
    assert (scales > 0) == (dtype is torch.int8)


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (1 << 16, 16)]
)
def test_bits_for_is_the_least_that_names_every_codeword(size, bits):
    assert bits_for(size) == bits


@pytest.mark.parametrize(("rows", "row_bits", "expected"), [(0, 5, 8), (1, 1, 9), (8, 3, 11)])
def test_packed_bytes_rounds_up_and_pads(rows, row_bits, expected):
    assert packed_bytes(rows, row_bits) == expected


def test_derived_sizes():
    """Widths of a row of codes and of a codeword, for each kind."""
    additive = CodeLayout("additive", 100, 12, 3, 17)
    product = CodeLayout("product", 100, 12, 3, 17)
    rows = CodeLayout("rows", 100, 12, 1, 100)
    assert (additive.bits, additive.row_bits, additive.subvector_dim) == (5, 15, 12)
    assert (product.bits, product.row_bits, product.subvector_dim) == (5, 15, 4)
    assert (rows.bits, rows.row_bits, rows.subvector_dim, rows.code_bytes) == (0, 0, 12, 0)


GOOD = {
    "kind": "additive",
    "num_embeddings": 10,
    "embedding_dim": 6,
    "num_subvectors": 2,
    "codebook_size": 4,
    "codebook_dtype": torch.float32,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "residual"}, "kind"),
        ({"num_embeddings": 0}, "num_embeddings"),
        ({"embedding_dim": 0}, "embedding_dim"),
        ({"num_subvectors": 0}, "num_subvectors"),
        ({"codebook_size": -1}, "codebook_size"),
        ({"codebook_size": (1 << 16) + 1}, "codebook_size"),
        ({"kind": "product", "num_subvectors": 4}, "divide"),
        ({"kind": "rows"}, "rows"),
        ({"kind": "rows", "num_subvectors": 1, "codebook_size": 9}, "rows"),
        ({"codebook_dtype": torch.int32}, "codebook_dtype"),
        ({"codebook_dtype": torch.bool}, "codebook_dtype"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(change, message):
    CodeLayout(**GOOD)
    with pytest.raises(ValueError, match=message):
        CodeLayout(**{**GOOD, **change})


def test_rows_may_exceed_the_largest_codebook():
    assert CodeLayout("rows", 70_000, 1, 1, 70_000, torch.int8).codebook_bytes == 70_000 * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dict_round_trip(dtype):
    for shape in SHAPES:
        layout = CodeLayout(*shape, dtype)
        assert CodeLayout.from_dict(layout.to_dict()) == layout
        assert CodeLayout.from_dict({**layout.to_dict(), "of_later": 1}) == layout
    assert dtype_from_name(dtype_name(dtype)) is dtype


def test_unknown_dtype_name_is_refused():
    with pytest.raises(ValueError, match="int32"):
        dtype_from_name("int32")


def test_describe():
    assert CodeLayout(**GOOD).describe() == "additive 2x4"
    assert CodeLayout("rows", 3, 2, 1, 3, torch.float16).describe() == "rows float16"


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_other_libraries_become_plain_ones(kind):
    layout = CodeLayout("additive", *map(kind, (100, 12, 3, 17)))
    assert layout == CodeLayout("additive", 100, 12, 3, 17)
    assert json.loads(json.dumps(layout.to_dict())) == layout.to_dict()
    assert CodeLayout.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize("value", [True, 3.0, "3", None, np.float64(3), torch.tensor([3, 3])])
@pytest.mark.parametrize("name", ["num_embeddings", "embedding_dim", "num_subvectors"])
def test_what_is_no_integer_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        CodeLayout(**{**GOOD, name: value})


@pytest.mark.parametrize("rows", [2**48 + 1, 2**63, 2**64])
def test_numbers_beyond_64_bits_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="num_embeddings must be at most"):
        CodeLayout("shared", rows, 8, 1, 1)
    assert CodeLayout("shared", 2**48, 8, 1, 1).num_embeddings == 2**48
