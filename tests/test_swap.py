"""Replacing modules: every alias, hooks, optimizers, and all or nothing."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mec_embed import CodeLayout, CompressedEmbedding, CompressionConfig
from mec_embed.swap import replace_modules
from mec_embed.tables import find_tables

"""Finding tables, leaving some alone with a reason, and replacing modules."""


ROWS, DIM = 20, 4
CONFIG = CompressionConfig(min_rows=10)


def table(rows=ROWS, **options):
    return nn.Embedding(rows, DIM, **options)


def compressed(**options):
    return CompressedEmbedding(CodeLayout("additive", ROWS, DIM, 1, 4), **options)


def shared_model():
    shared = table()
    holder = nn.Sequential(shared)
    return nn.ModuleDict({"a": shared, "deep": holder, "same": holder, "other": table()})


def test_shared_module_gets_one_replacement_everywhere():
    model = shared_model()
    found = next(t for t in find_tables(model, CONFIG)[0] if t.module is model["a"])
    new = compressed()
    replace_modules(model, [(found.aliases, found.module, new)])
    assert model["a"] is model["deep"][0] is model["same"][0] is new
    assert type(model["other"]) is nn.Embedding


def replace_only(model, name, new, optimizer=None):
    found = [t for t in find_tables(model, CONFIG)[0] if t.name == name]
    replace_modules(model, [(t.aliases, t.module, new) for t in found], optimizer)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_are_carried_over():
    model = nn.Sequential(table())
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model[0].register_forward_hook(
        lambda module, args, kwargs, out: seen.append(dict(kwargs)), with_kwargs=True
    )
    model[0].register_full_backward_hook(lambda module, gin, gout: seen.append("backward"))
    replace_only(model, "0", compressed())
    model(torch.tensor([1, 2])).sum().backward()
    assert seen == ["pre", (2, DIM), {}, "backward"]


def test_hook_handles_still_remove_their_hook():
    """Whoever has registered a hook can take it away after the swap."""
    model = nn.Sequential(table())
    seen = []
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    replace_only(model, "0", compressed())
    handle.remove()
    model(torch.tensor([1]))
    assert not seen


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_attributes_are_carried_over(training):
    model = nn.Sequential(table()).train(not training)
    model[0].train(training)
    model[0].feature = {"name": "user"}
    new = compressed()
    replace_only(model, "0", new)
    assert new.training is training
    assert all(module.training is training for module in new.modules())
    assert new.feature == {"name": "user"}
    assert new.padding_idx is None and new.layout.num_embeddings == ROWS


EXTRAS = {
    "buffer": lambda module: module.register_buffer("extra", torch.ones(3)),
    "parameter": lambda module: setattr(module, "extra", nn.Parameter(torch.ones(3))),
    "module": lambda module: setattr(module, "extra", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_what_else_a_table_holds_is_not_lost(kind):
    """A table with a tensor or module of its own is left alone, or the replacement has it."""
    model = nn.ModuleDict({"good": table(), "odd": table()})
    EXTRAS[kind](model["odd"])
    extra = model["odd"].extra
    tables, _ = find_tables(model, CONFIG)
    replace_modules(model, [(t.aliases, t.module, compressed()) for t in tables])
    assert getattr(model["odd"], "extra", None) is extra


def trained(model, make_optimizer):
    optimizer = make_optimizer(model.parameters())
    sum(module(torch.tensor([1, 2])).square().sum() for module in model.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def adam(params):
    return torch.optim.Adam(params, lr=0.1)


def test_optimizer_follows_and_drops_state():
    model = nn.ModuleDict({"a": table(), "b": table()})
    optimizer = trained(model, adam)
    old, kept, new = model["a"].weight, model["b"].weight, compressed()
    replace_only(model, "a", new, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(new.codebooks), id(kept)]
    assert old not in optimizer.state and kept in optimizer.state


class FailingDict(dict):
    """Optimizer state whose pop fails the second time."""

    calls = 0

    def pop(self, *args):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().pop(*args)


class FailingModules(dict):
    """Children that cannot be set."""

    def __setitem__(self, key, value):
        if not isinstance(value, nn.Embedding):
            raise RuntimeError("no")
        super().__setitem__(key, value)


def snapshot(model, optimizer):
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = {id(p): (id(values), values["step"].item()) for p, values in optimizer.state.items()}
    return list(map(id, model.modules())), groups, state


@pytest.mark.parametrize("where", ["module", "optimizer", "carry over"])
def test_all_or_nothing(where):
    """An error midway leaves model and optimizers exactly as they were."""
    model = nn.ModuleDict({name: table() for name in "abc"})
    first = trained(model, adam)
    second = trained(model, adam)
    new = {name: compressed() for name in "abc"}
    if where == "optimizer":
        second.state = FailingDict(second.state)
    if where == "module":
        inner = nn.ModuleDict({"d": table()})
        inner._modules = FailingModules(inner._modules)
        model["inner"] = inner
        new["inner.d"] = compressed()
    if where == "carry over":
        new["b"] = None
    before = snapshot(model, first), snapshot(model, second)
    found = find_tables(model, CONFIG)[0]
    with pytest.raises((RuntimeError, KeyboardInterrupt, AttributeError)):
        replace_modules(model, [(t.aliases, t.module, new[t.name]) for t in found], [first, second])
    assert (snapshot(model, first), snapshot(model, second)) == before
    assert type(model["a"]) is nn.Embedding


def test_state_that_new_parameters_started_with_is_undone():
    model = nn.ModuleDict({"a": table()})
    optimizer = torch.optim.Adagrad(model.parameters())
    before, state = snapshot(model, optimizer), optimizer.state_dict()
    found = find_tables(model, CONFIG)[0][0]
    replacement = found.aliases, found.module, compressed()
    with pytest.raises(ZeroDivisionError):
        replace_modules(model, [replacement], optimizer, lambda: 1 / 0)
    assert snapshot(model, optimizer) == before
    assert optimizer.state_dict() == state


def test_unknown_optimizer_changes_nothing():
    model = nn.Sequential(table())
    with pytest.raises(TypeError, match="optimizer"):
        replace_only(model, "0", compressed(), "adam")
    assert type(model[0]) is nn.Embedding


def test_old_module_is_freed():
    model = nn.ModuleDict({"a": table(), "b": table()})
    optimizer = trained(model, adam)
    old = weakref.ref(model["a"]), weakref.ref(model["a"].weight)
    replace_only(model, "a", compressed(), optimizer)
    gc.collect()
    assert old[0]() is None and old[1]() is None


def test_two_old_parameters_with_one_successor_enter_it_once():
    """Tables that come to share codebooks, which the optimizer shall hold once."""
    model = nn.ModuleDict({"a": table(), "b": table()})
    optimizer = trained(model, adam)
    new = compressed()
    other = compressed(codebook_set=new.codebook_set)
    found = find_tables(model, CONFIG)[0]
    pairs = zip(found, (new, other), strict=True)
    replace_modules(model, [(t.aliases, t.module, module) for t, module in pairs], optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(new.codebooks)]
