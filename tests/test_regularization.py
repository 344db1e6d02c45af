"""Penalties and weight decay of compressed tables mean what they meant for rows."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mec_embed import CompressionConfig, compress, decompress
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


def step(make, codes="product", decay=0.1, **options):
    """Codebooks after one step with weight decay, and those that an explicit penalty gives."""
    results = []
    for explicit in (False, True):
        model = nn.Sequential(nn.Embedding(ROWS, DIM))
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)
        optimizer = make(model.parameters(), lr=0.1, weight_decay=0 if explicit else decay)
        config = CompressionConfig(num_subvectors=2, codebook_size=8, codes=codes, epochs=0)
        compress(model, None, config, optimizer=optimizer, progress=False)
        loss = model(torch.arange(20)).square().sum()
        if explicit:
            loss = loss + decay / 2 * embedding_penalty(model)
        loss.backward()
        optimizer.step()
        results.append(model[0].codebooks.detach().clone())
    return results


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("codes", ["product", "additive"])
def test_weight_decay_counts_a_codeword_for_each_of_its_rows(make, codes):
    got, expected = step(make, codes)
    torch.testing.assert_close(got, expected)


def test_decoupled_decay_shrinks_rows_as_before():
    """AdamW shrinks every row by lr * decay, and so it does codewords."""
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    compress(model, None, config, optimizer=optimizer, progress=False)
    before = model[0].weight.detach().clone()
    (model(torch.tensor([1])) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * 0.95)


def test_maximize_pulls_to_zero_too():
    def ascend(params, **options):
        return torch.optim.SGD(params, maximize=True, **options)

    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = ascend(model.parameters(), lr=1e-4, weight_decay=1.0)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    compress(model, None, config, optimizer=optimizer, progress=False)
    before = model[0].codebooks.detach().clone()
    (model(torch.tensor([1])) * 0).sum().backward()
    optimizer.step()
    rows = rows_per_codeword(model[0])[:, :, None]
    torch.testing.assert_close(model[0].codebooks.detach(), before * (1 - 1e-4 * rows))


def test_tables_that_share_codebooks_count_the_rows_of_both():
    model = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=1.0)
    compress(model, None, CompressionConfig(ratio=12), optimizer=optimizer, progress=False)
    assert model["a"].codebooks is model["b"].codebooks, "the planner should share here"
    before = model["a"].codebooks.detach().clone()
    (model["a"](torch.tensor([1])) * 0).sum().backward()
    optimizer.step()
    rows = (rows_per_codeword(model["a"]) + rows_per_codeword(model["b"]))[:, :, None]
    torch.testing.assert_close(model["a"].codebooks.detach(), before * (1 - 1e-3 * rows))


def test_compressing_twice_keeps_one_decay_and_decompress_takes_it_away():
    model = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=1.0)
    for name in "ab":
        config = CompressionConfig(num_subvectors=2, codebook_size=8, include=(name,), epochs=0)
        compress(model, None, config, optimizer=optimizer, progress=False)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    decompress(model, optimizer=optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    before = model["a"].weight.detach().clone()
    (model["a"](torch.tensor([1])) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model["a"].weight.detach(), before * (1 - 1e-3))


def test_optimizer_does_not_keep_tables_alive():
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    compress(model, None, config, optimizer=optimizer, progress=False)
    table = weakref.ref(model[0])
    del model
    gc.collect()
    assert table() is None
    optimizer.step()
