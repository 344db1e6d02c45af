"""Penalties and weight decay of compressed tables mean what they meant for rows."""

import pytest
import torch
from torch import nn

from mec_embed import CompressionConfig, compress
from mec_embed.regularization import (
    embedding_penalty,
    hidden_codebooks,
    rows_per_codeword,
    table_penalty,
    trainable_tables,
)

ROWS, DIM = 300, 8


def compressed(codes="additive", dtype=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, DIM, **options))
    config = CompressionConfig(
        num_subvectors=2, codebook_size=8, codes=codes, codebook_dtype=dtype, epochs=0
    )
    compress(model, None, config, progress=False)
    return model


def test_rows_per_codeword_counts_every_row_once_a_codebook():
    table = compressed()[0]
    counts = rows_per_codeword(table)
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [ROWS, ROWS]


def test_rows_per_codeword_in_several_chunks(monkeypatch):
    table = compressed()[0]
    whole = rows_per_codeword(table)
    monkeypatch.setattr("mec_embed.regularization.DECODE_ROWS", 7)
    table.codes.add_(0)  # a new version of the same codes: counted anew
    assert torch.equal(rows_per_codeword(table), whole)


def test_counts_follow_loaded_codes():
    model, other = compressed(), compressed()
    rows_per_codeword(model[0])
    with torch.no_grad():
        other[0].codes.zero_()
    model.load_state_dict(other.state_dict())
    assert rows_per_codeword(model[0])[:, 0].tolist() == [ROWS, ROWS]


@pytest.mark.parametrize("power", [1, 2])
def test_penalty_of_product_codes_is_that_of_the_rows(power):
    model = compressed("product")
    expected = model[0].weight.abs().pow(power).sum()
    torch.testing.assert_close(embedding_penalty(model, power), expected)
    mine, theirs = (
        torch.autograd.grad(value, model[0].codebooks)[0]
        for value in (table_penalty(model[0], power), expected)
    )
    torch.testing.assert_close(mine, theirs)


def test_penalty_of_additive_codes_leaves_cross_terms_out():
    """The rows that use a codeword count it once each."""
    model = compressed()
    books, counts = model[0].codebooks, rows_per_codeword(model[0])
    expected = sum(counts[m, k] * books[m, k].square().sum() for m in range(2) for k in range(8))
    torch.testing.assert_close(embedding_penalty(model), expected)


def test_frozen_and_int8_codebooks_count_nothing():
    frozen = nn.Sequential(nn.Embedding(ROWS, DIM).requires_grad_(False))
    compress(frozen, None, CompressionConfig(num_subvectors=2, codebook_size=8), progress=False)
    for model in (frozen, compressed(dtype="int8")):
        assert trainable_tables(model) == []
        assert embedding_penalty(model) == 0


def test_hidden_codebooks_are_shown_again_after_an_error():
    model = compressed()
    with pytest.raises(KeyError), hidden_codebooks(trainable_tables(model)):
        assert not model[0].codebooks.requires_grad
        raise KeyError
    assert model[0].codebooks.requires_grad
