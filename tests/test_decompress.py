"""decompress(): dense tables back, with the same outputs, in the optimizer."""

import copy
import gc
import weakref

import pytest
import torch
from click_model import ClickModel
from torch import nn

from mec_embed import CompressedEmbedding, CompressionConfig, compress, decompress

CONFIG = CompressionConfig(num_subvectors=2, codebook_size=8, min_rows=8, epochs=0)
IDS = torch.tensor([[1, 2], [3, 0], [19, 7]])


class Mixed(nn.Module):
    """Plain, padded, frozen, shared and narrow tables, and bags."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Embedding(200, 8)
        self.padded = nn.Embedding(200, 8, padding_idx=3)
        self.frozen = nn.Embedding(300, 8)
        self.frozen.weight.requires_grad_(False)
        self.again = nn.Sequential(self.plain)
        self.narrow = nn.Embedding(200, 8, dtype=torch.float16)
        self.bag = nn.EmbeddingBag(200, 8, mode="max", padding_idx=2)
        self.sparse = nn.Embedding(200, 8, sparse=True)
        self.offsets = nn.EmbeddingBag(200, 8, mode="sum", include_last_offset=True)

    def forward(self, ids):
        last = self.offsets(ids.flatten(), torch.tensor([0, 0, 4, 6]))
        modules = [self.plain, self.padded, self.frozen, self.again, self.narrow, self.sparse]
        return [module(ids) for module in modules] + [self.bag(ids), last]


OPTIONS = ("padding_idx", "sparse", "mode", "include_last_offset", "max_norm", "training")


@pytest.mark.parametrize("codebook_dtype", [None, "int8"])
def test_dense_tables_come_back(codebook_dtype):
    model = Mixed()
    model.bag.eval()
    model.plain.note = "mine"
    dense = copy.deepcopy(model)
    config = CompressionConfig.from_dict({**CONFIG.to_dict(), "codebook_dtype": codebook_dtype})
    compress(model, None, config, progress=False)
    expected = model(IDS)
    assert decompress(model) == 7
    torch.testing.assert_close(model(IDS), expected)
    assert model.again[0] is model.plain and model.plain.note == "mine"
    for name, old in dense.named_modules():
        new = model.get_submodule(name)
        assert type(new) is type(old)
        if isinstance(old, (nn.Embedding, nn.EmbeddingBag)):
            assert new.weight.dtype is old.weight.dtype
            assert new.weight.requires_grad is old.weight.requires_grad
            assert isinstance(new.weight, nn.Parameter) and new.weight.shape == old.weight.shape
            for option in OPTIONS:
                assert getattr(new, option, None) == getattr(old, option, None), option


def test_state_dict_is_that_of_the_dense_model():
    model = Mixed()
    keys = {name: value.shape for name, value in model.state_dict().items()}
    compress(model, None, CONFIG, progress=False)
    decompress(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == keys
    Mixed().load_state_dict(model.state_dict())


@pytest.mark.parametrize("frozen", [False, True])
def test_tables_train_as_their_codebooks_did(frozen):
    model = Mixed().requires_grad_(not frozen)
    compress(model, None, CONFIG, progress=False)
    model.requires_grad_(frozen)
    decompress(model)
    assert {p.requires_grad for p in model.parameters()} == {frozen}


def test_tables_train_that_came_back_in_inference_mode():
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    with torch.inference_mode():
        decompress(model)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).sum().backward()
    optimizer.step()
    assert not model[0].weight.equal(before)


def test_nothing_of_the_codes_is_left():
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    model[0].oov_row = 3
    model(IDS)
    codes = weakref.ref(model[0].codes)
    decompress(model)
    gc.collect()
    assert codes() is None and vars(model[0]).keys() == vars(nn.Embedding(2, 2)).keys()


def test_padding_row_stays_zero_in_training():
    model = nn.Sequential(nn.Embedding(200, 8, padding_idx=3))
    compress(model, None, CONFIG, progress=False)
    decompress(model)
    model(torch.tensor([3, 4])).sum().backward()
    assert model[0].weight[3].eq(0).all() and model[0].weight.grad[3].eq(0).all()
    assert model[0].weight.grad[4].eq(1).all()


def click_model(rows=(300, 200)):
    torch.manual_seed(0)
    return ClickModel(rows, 8)


def train(model, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    model(IDS).square().sum().backward()
    optimizer.step()
    return [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def held(optimizer, group=0):
    return sorted(id(p) for p in optimizer.param_groups[group]["params"])


def test_optimizer_follows():
    model = click_model()
    tables = [*model.embeddings.parameters(), *model.first_order.parameters()]
    optimizer = torch.optim.Adam([{"params": model.mlp.parameters()}, {"params": tables}])
    compress(model, None, CONFIG, optimizer=optimizer, progress=False)
    train(model, optimizer)
    decompress(model, optimizer=optimizer)
    dense = [*model.embeddings.parameters(), *model.first_order.parameters()]
    assert held(optimizer, 1) == sorted(map(id, dense))
    assert len(optimizer.state) == len(list(model.mlp.parameters()))
    assert train(model, optimizer) == []


def test_optimizer_follows_where_codebooks_were_shared():
    """One parameter of the optimizer becomes several."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"t{i}": nn.Embedding(400, 8) for i in range(6)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = CompressionConfig(ratio=20, epochs=0)
    report = compress(model, None, config, optimizer=optimizer, progress=False)
    assert any(table.shares_codebooks_with for table in report.tables)
    decompress(model, optimizer=optimizer)
    assert held(optimizer) == sorted(map(id, model.parameters()))


def test_int8_tables_return_to_the_optimizer_or_it_can_be_made_anew():
    """Frozen codebooks are in no group, but the dense tables are trainable again."""
    model = click_model()
    config = CompressionConfig.from_dict({**CONFIG.to_dict(), "codebook_dtype": "int8"})
    compress(model, None, config, progress=False)
    decompress(model)
    assert train(model, torch.optim.SGD(model.parameters(), lr=0.1)) == []


def test_changes_of_codebooks_are_kept():
    """What was trained after compression is in the dense table."""
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    with torch.no_grad():
        model[0].codebooks.mul_(3)
    expected = model(IDS)
    decompress(model)
    torch.testing.assert_close(model(IDS), expected)


def test_dtype_follows_the_model():
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    decompress(model.double())
    assert model[0].weight.dtype is torch.float64


def test_compress_after_decompress():
    model = nn.Sequential(nn.Embedding(200, 8))
    for _ in range(2):
        compress(model, None, CONFIG, progress=False)
        assert isinstance(model[0], CompressedEmbedding)
        decompress(model)
        assert type(model[0]) is nn.Embedding


def test_nothing_to_decompress():
    with pytest.raises(ValueError, match="no compressed table"):
        decompress(click_model())


def test_wrong_optimizer_changes_nothing():
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    module = model[0]
    with pytest.raises(TypeError, match="optimizer"):
        decompress(model, optimizer="adam")
    assert model[0] is module


def test_wrapper_is_refused():
    model = nn.Sequential(nn.Embedding(200, 8))
    compress(model, None, CONFIG, progress=False)
    with pytest.raises(ValueError, match="DataParallel"):
        decompress(nn.DataParallel(model))
