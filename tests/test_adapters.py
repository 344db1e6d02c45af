"""Adapters: what a framework's model holds beside its modules follows every swap."""

import pytest
import torch
from torch import nn

from mec_embed import CompressedEmbedding, CompressionConfig, compress, decompress, load, save
from mec_embed.adapters import DELETE, Adapter, has_base, set_attributes
from mec_embed.swap import replace_modules
from mec_embed.tables import Alias

CONFIG = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)


class Framework(nn.Module):
    """Holds its optimizer and a list of parameters, as frameworks do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.optimizer = torch.optim.Adam(self.parameters())
        self.held = [self.table.weight]


class FrameworkAdapter(Adapter):
    fails = False

    def matches(self, module):
        return isinstance(module, Framework)

    def check(self, module, name):
        if getattr(module, "sharded", False):
            raise ValueError(f"{name!r} is sharded")

    def optimizers(self, module):
        return [module.optimizer]

    def beside(self, module):
        return [module.held]

    def follow(self, module, swapped):
        if self.fails:
            raise KeyboardInterrupt
        return set_attributes(module, held=[new for _, new in swapped])


@pytest.fixture
def adapter(monkeypatch):
    one = FrameworkAdapter()
    monkeypatch.setattr("mec_embed.adapters.ADAPTERS", [one])
    return one


@pytest.mark.parametrize("wrapped", [False, True])
def test_compress_decompress_and_load_follow(adapter, wrapped, tmp_path):
    inner = Framework()
    model = nn.Sequential(inner) if wrapped else inner
    compress(model, None, CONFIG, progress=False)
    assert inner.held == [inner.table] and type(inner.table) is CompressedEmbedding
    assert inner.optimizer.param_groups[0]["params"] == [inner.table.codebooks]
    save(model, tmp_path / "m")
    fresh = Framework()
    load(nn.Sequential(fresh) if wrapped else fresh, tmp_path / "m")
    assert fresh.held == [fresh.table]
    assert fresh.optimizer.param_groups[0]["params"] == [fresh.table.codebooks]
    decompress(model)
    assert inner.held == [inner.table] and type(inner.table) is nn.Embedding
    assert inner.optimizer.param_groups[0]["params"] == [inner.table.weight]


def test_optimizer_that_is_given_and_held_is_rebound_once(adapter):
    model = Framework()
    compress(model, None, CONFIG, optimizer=model.optimizer, progress=False)
    assert len(model.optimizer.param_groups[0]["params"]) == 1


def test_what_no_adapter_sees_to_is_no_table_to_replace(monkeypatch):
    monkeypatch.setattr("mec_embed.adapters.ADAPTERS", [])
    with pytest.raises(ValueError, match="the attribute 'held' holds its weight too"):
        compress(Framework(), None, CONFIG, progress=False)


def test_check_is_asked_before_anything(adapter):
    model = nn.ModuleDict({"inner": Framework()})
    model["inner"].sharded = True
    with pytest.raises(ValueError, match="'inner' is sharded"):
        compress(model, None, CONFIG, progress=False)
    assert type(model["inner"].table) is nn.Embedding


def test_error_in_an_adapter_undoes_the_swap(adapter):
    model = nn.ModuleList([Framework(), Framework()])
    held = model[0].held
    adapter.follow = lambda module, swapped: (
        FrameworkAdapter.follow(adapter, module, swapped)
        if module is model[0]
        else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        compress(model, None, CONFIG, progress=False)
    assert model[0].held is held
    for one in model:
        assert type(one.table) is nn.Embedding
        assert one.optimizer.param_groups[0]["params"] == [one.table.weight]
        assert not one.optimizer._optimizer_step_pre_hooks


def test_set_attributes_puts_back():
    class Thing:
        pass

    thing = Thing()
    thing.a = 1
    undo = set_attributes(thing, a=2, b=3)
    assert vars(thing) == {"a": 2, "b": 3}
    undo()
    assert vars(thing) == {"a": 1}
    undo = set_attributes(thing, a=DELETE)
    assert vars(thing) == {}
    undo()
    assert vars(thing) == {"a": 1}


def test_has_base_looks_at_package_and_name():
    assert has_base(nn.Linear(1, 1), "torch", "Linear")
    assert has_base(nn.Linear(1, 1), "torch", "Other", "Module")
    assert not has_base(nn.Linear(1, 1), "tor", "Linear")
    assert not has_base(Framework(), "torch", "Framework")


def test_a_parameter_that_stays_keeps_its_state(adapter):
    model = Framework()
    compress(model, None, CONFIG, progress=False)
    table = model.table
    table(torch.tensor([1])).sum().backward()
    model.optimizer.step()
    state = model.optimizer.state[table.codebooks]
    around = nn.Sequential(table)
    replace_modules(model, [((Alias(model, "table", "table"),), table, around)])
    assert model.held == [around]
    assert model.optimizer.param_groups[0]["params"] == [table.codebooks]
    assert model.optimizer.state[table.codebooks] is state
