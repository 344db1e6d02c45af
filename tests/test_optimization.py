"""Learning rate and weight decay keep their meaning for rows after a swap."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressionConfig,
    compress,
    decompress,
    keep_row_steps,
    load,
    save,
)
from mec_embed.regularization import embedding_penalty, rows_per_codeword

ROWS, DIM = 300, 8
PLAIN = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)


def compressed(make, model=None, config=PLAIN, **options):
    """A model and its optimizer after compress(), with codebooks of normal values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, DIM)) if model is None else model
    optimizer = make(model.parameters(), **options)
    compress(model, None, config, optimizer=optimizer, progress=False)
    return model, optimizer


def step_without_loss(model, optimizer):
    """Codebooks before and after a step whose gradients are zero."""
    table = next(iter(model.children()))
    before = table.codebooks.detach().clone()
    sum((module(torch.tensor([1])) * 0).sum() for module in model.children()).backward()
    optimizer.step()
    return before, table.codebooks.detach()


@pytest.mark.parametrize("codes", ["product", "additive"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_moves_a_codeword_by_the_mean_of_its_rows(codes, momentum):
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codes=codes, epochs=0)
    model, optimizer = compressed(torch.optim.SGD, config=config, lr=0.1, momentum=momentum)
    before = model[0].codebooks.detach().clone()
    model(torch.arange(50)).square().sum().backward()
    gradient = model[0].codebooks.grad.clone()
    optimizer.step()
    rows = rows_per_codeword(model[0])[:, :, None]
    expected = before - 0.1 * gradient / rows.clamp(min=1) / (2 if codes == "additive" else 1)
    torch.testing.assert_close(model[0].codebooks.detach(), expected)


def test_sgd_step_of_one_codebook_is_the_projected_dense_step():
    """With product codes, dense rows that step alone and are then averaged give the same."""
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codes="product", epochs=0)
    model, optimizer = compressed(torch.optim.SGD, config=config, lr=0.1)
    dense = copy.deepcopy(model)
    decompress(dense)
    ids = torch.arange(ROWS)
    for one, stepper in (
        (model, optimizer),
        (dense, torch.optim.SGD(dense.parameters(), lr=0.1)),
    ):
        one(ids[:50]).sin().sum().backward()
        stepper.step()
    # Of rows that share both codewords, those that moved and those that did not are averaged.
    for m in range(2):
        own = slice(4 * m, 4 * m + 4)
        moved = dense[0].weight.detach()[:, own]
        got = model[0].weight.detach()[:, own]
        torch.testing.assert_close(got.sum(0), moved.sum(0))


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW],
    ids=lambda make: make.__name__,
)
def test_adaptive_steps_shrink_by_the_root_of_the_rows(make):
    """And by the two codewords that a row is the sum of."""
    model, optimizer = compressed(make, lr=0.1, weight_decay=0)
    twin = copy.deepcopy(model)
    plain = make(twin.parameters(), lr=0.1, weight_decay=0)
    before = model[0].codebooks.detach().clone()
    for one, stepper in ((model, optimizer), (twin, plain)):
        one(torch.arange(ROWS)).square().sum().backward()
        stepper.step()
    rows = rows_per_codeword(model[0]).clamp(min=1)[:, :, None]
    whole = twin[0].codebooks.detach() - before
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(model[0].codebooks.detach(), before + whole / rows.sqrt() / 2)


def test_network_steps_as_before():
    model, optimizer = compressed(
        torch.optim.Adam, nn.ModuleDict({"t": nn.Embedding(ROWS, DIM), "l": nn.Linear(DIM, 1)})
    )
    twin = copy.deepcopy(model)
    plain = torch.optim.Adam(twin.parameters())
    for one, stepper in ((model, optimizer), (twin, plain)):
        one["l"](one["t"](torch.arange(20))).square().sum().backward()
        stepper.step()
    torch.testing.assert_close(model["l"].weight, twin["l"].weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("codes", ["product", "additive"])
def test_weight_decay_is_the_penalty_of_all_rows(make, codes):
    results = []
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codes=codes, epochs=0)
    for explicit in (False, True):
        model, optimizer = compressed(
            make, config=config, lr=0.1, weight_decay=0 if explicit else 0.1
        )
        loss = model(torch.arange(20)).square().sum()
        if explicit:
            loss = loss + 0.1 / 2 * embedding_penalty(model)
        loss.backward()
        optimizer.step()
        results.append(model[0].codebooks.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_weight_decay_shrinks_rows_as_before(maximize):
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codes="product", epochs=0)
    options = {"lr": 0.1, "weight_decay": 0.5, "maximize": maximize}
    model, optimizer = compressed(torch.optim.SGD, config=config, **options)
    before, after = step_without_loss(model, optimizer)
    torch.testing.assert_close(after, before * 0.95)


def test_decoupled_decay_shrinks_rows_as_before():
    model, optimizer = compressed(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    before, after = step_without_loss(model, optimizer)
    torch.testing.assert_close(after, before * 0.95)


def test_tables_that_share_codebooks_count_the_rows_of_both():
    tables = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)})
    model, optimizer = compressed(torch.optim.Adagrad, tables, CompressionConfig(ratio=12), lr=0.1)
    assert model["a"].codebooks is model["b"].codebooks, "the planner should share here"
    before = model["a"].codebooks.detach().clone()
    sum(table(torch.arange(ROWS)).square().sum() for table in model.values()).backward()
    optimizer.step()
    rows = rows_per_codeword(model["a"]) + rows_per_codeword(model["b"])
    # Adagrad's first step is the learning rate in every entry that has a gradient.
    moved = (model["a"].codebooks.detach() - before).abs()
    expected = 0.1 / rows.clamp(min=1).sqrt() / len(moved)
    expected = expected[:, :, None].expand_as(moved)
    torch.testing.assert_close(moved[rows > 0], expected[rows > 0], rtol=1e-3, atol=1e-6)


def hooks(optimizer):
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


def test_compressing_twice_keeps_one_pair_of_hooks_and_decompress_takes_it_away():
    tables = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)})
    optimizer = torch.optim.SGD(tables.parameters(), lr=1e-3, weight_decay=1.0)
    mine = optimizer.register_step_pre_hook(lambda *args: None)
    for name in "ab":
        config = CompressionConfig(num_subvectors=2, codebook_size=8, include=(name,), epochs=0)
        compress(tables, None, config, optimizer=optimizer, progress=False)
    assert len(hooks(optimizer)) == 3
    decompress(tables, optimizer=optimizer)
    assert len(hooks(optimizer)) == 1
    mine.remove()
    before = tables["a"].weight.detach().clone()
    (tables["a"](torch.tensor([1])) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(tables["a"].weight.detach(), before * (1 - 1e-3))


def test_schedulers_go_on():
    """Groups stay as they are, so a scheduler made before the swap fits after it."""
    model = nn.Sequential(nn.Embedding(ROWS, DIM), nn.Linear(DIM, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    compress(model, None, PLAIN, optimizer=optimizer, progress=False)
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05]


def test_optimizer_does_not_keep_tables_alive():
    model, optimizer = compressed(torch.optim.Adam, weight_decay=0.1)
    table = weakref.ref(model[0])
    del model
    gc.collect()
    assert table() is None
    optimizer.step()


def test_tables_kept_as_rows_step_as_before():
    """A table stored in a narrower dtype has one row a codeword."""
    layout = CodeLayout("rows", ROWS, DIM, 1, ROWS, torch.float32)
    model = nn.Sequential(CompressedEmbedding(layout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    keep_row_steps(optimizer, model)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert model[0].codebooks[0, 1].tolist() == [-0.5] * DIM
    assert not model[0].codebooks[0, 2].any()


def two_tables(**options):
    return nn.ModuleDict({name: nn.Embedding(ROWS, DIM, **options) for name in "ab"})


@pytest.mark.parametrize("frozen", [True, False])
def test_decoupled_decay_leaves_tables_alone_that_get_no_gradient(frozen):
    model = two_tables()
    model["a"].weight.requires_grad_(not frozen)
    model, optimizer = compressed(torch.optim.AdamW, model, lr=0.1, weight_decay=0.1)
    before = model["a"].codebooks.detach().clone()
    model["b"](torch.arange(9)).sum().backward()
    optimizer.step()
    assert torch.equal(model["a"].codebooks, before)


def test_one_optimizer_over_two_models_keeps_the_steps_of_both():
    model = two_tables()
    towers = {name: nn.Sequential(model[name]) for name in "ab"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for tower in towers.values():
        compress(tower, None, PLAIN, optimizer=optimizer, progress=False)
    before = {name: tower[0].codebooks.detach().clone() for name, tower in towers.items()}
    for tower in towers.values():
        tower(torch.arange(ROWS)).sum().backward()
    optimizer.step()
    for name, tower in towers.items():
        # Each codeword gets the gradient of its rows, once for each, and moves by half of one.
        moved = (tower[0].codebooks.detach() - before[name]).abs().max()
        assert moved.item() == pytest.approx(0.5)
    decompress(towers["a"], optimizer=optimizer)
    assert len(hooks(optimizer)) == 2
    decompress(towers["b"], optimizer=optimizer)
    assert not hooks(optimizer)


def test_weight_decay_with_a_closure():
    config = CompressionConfig(num_subvectors=2, codebook_size=8, codes="product", epochs=0)
    model, optimizer = compressed(torch.optim.SGD, config=config, lr=0.1, weight_decay=0.5)
    before = model[0].codebooks.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.tensor([1])) * 0).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model[0].codebooks.detach(), before * 0.95)


def test_gradients_are_after_the_step_what_they_were_before():
    model, optimizer = compressed(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    model(torch.arange(9)).sum().backward()
    before = model[0].codebooks.grad.clone()
    for _ in range(3):
        optimizer.step()
    assert torch.equal(model[0].codebooks.grad, before)


def test_overflow_under_a_grad_scaler_moves_nothing():
    model, optimizer = compressed(torch.optim.AdamW, lr=0.1, weight_decay=0.5, fused=True)
    before = model[0].codebooks.detach().clone()
    model(torch.arange(9)).sum().backward()
    # What GradScaler does around the step of a fused optimizer.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(model[0].codebooks, before)


@pytest.mark.parametrize("name", ["LBFGS", "Muon"])
def test_optimizers_whose_steps_cannot_be_kept_are_refused(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = getattr(torch.optim, name)(model.parameters())
    with pytest.raises(ValueError, match=f"optimizer is a {name}.*by another one"):
        compress(model, None, PLAIN, optimizer=optimizer, progress=False)
    assert type(model[0]) is nn.Embedding


def test_wrappers_are_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    with pytest.raises(ValueError, match="Wrapper, which keeps parameters of the optimizers"):
        optimizer = Wrapper(torch.optim.SGD(model.parameters()))
        compress(model, None, PLAIN, optimizer=optimizer, progress=False)


def test_wrappers_under_any_name_are_refused():
    class Sharpness(torch.optim.Optimizer):
        """As sharpness-aware minimisation is commonly written."""

        def __init__(self, params):
            super().__init__(params, {})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    with pytest.raises(ValueError, match="Sharpness, which keeps parameters of the optimizers in"):
        keep_row_steps(Sharpness(model.parameters()), model)


def test_an_optimizer_beside_another_is_no_wrapper():
    model, _ = compressed(torch.optim.SGD, lr=0.1)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    one.itself, one.partner = one, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    one.optimizer = "sgd"
    keep_row_steps(one, model)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_of_an_unknown_optimizer_is_told(decay, caplog):
    class Lion(torch.optim.Optimizer):
        """Of another package."""

    model, _ = compressed(torch.optim.SGD, lr=0.1)
    keep_row_steps(Lion(model.parameters(), {"lr": 0.1, "weight_decay": decay}), model)
    told = "optimizer Lion is none of torch's: its weight_decay=0.1" in caplog.text
    assert told is bool(decay)


def test_penalty_in_inference_mode_does_not_spoil_training():
    model, _ = compressed(torch.optim.SGD)
    with torch.inference_mode():
        embedding_penalty(model)
    embedding_penalty(model).backward()
    assert model[0].codebooks.grad is not None


class OfConstructor(torch.optim.Optimizer):
    """Makes its state when it is made, from what its group says."""

    def __init__(self, params, lr=0.1, start=0.0):
        super().__init__(params, {"lr": lr, "start": start})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["m"] = torch.full_like(param, group["start"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["m"] += param.grad
                param -= group["lr"] * self.state[param]["m"]


def test_state_that_a_constructor_makes_is_made_for_codebooks():
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = OfConstructor([{"params": model.parameters(), "start": 2.0}])
    compress(model, None, PLAIN, optimizer=optimizer, progress=False)
    assert torch.equal(optimizer.state[model[0].codebooks]["m"], torch.full((2, 8, DIM), 2.0))
    step_without_loss(model, optimizer)
    decompress(model, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["m"].shape == (ROWS, DIM)
    assert len(optimizer.state) == 1
    model[0](torch.tensor([1])).sum().backward()
    optimizer.step()


class Averaging(torch.optim.SGD):
    """Adds state to that of torch's, and takes fewer options."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["average"] = param.detach().clone()

    def step(self, closure=None):
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["average"].lerp_(param.detach(), 0.5)


def test_subclasses_of_torchs_optimizers_get_the_state_of_their_constructor():
    model, optimizer = compressed(Averaging)
    assert torch.equal(optimizer.state[model[0].codebooks]["average"], model[0].codebooks)
    step_without_loss(model, optimizer)
    assert "momentum_buffer" in optimizer.state[model[0].codebooks]


def test_a_constructor_of_other_arguments_is_let_be():
    class Other(torch.optim.SGD.__base__):
        def __init__(self, model, lr=0.1):
            super().__init__(model.parameters(), {"lr": lr})

        def step(self, closure=None):
            """Nothing."""

    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = Other(model)
    compress(model, None, PLAIN, optimizer=optimizer, progress=False)
    assert optimizer.param_groups[0]["params"] == [model[0].codebooks] and not optimizer.state


@pytest.mark.parametrize("begun", [False, True])
def test_fused_sgd_goes_on_with_momentum(begun):
    model = nn.Sequential(nn.Embedding(ROWS, DIM), nn.Linear(DIM, 1))
    results = []
    for fused in (False, True):
        one = copy.deepcopy(model)
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-4, momentum=0.9, fused=fused)
        for swap in (lambda one, optimizer: None, _compressed, decompress, _compressed):
            swap(one, optimizer=optimizer)
            for _ in range(2 * begun):
                optimizer.zero_grad()
                one(torch.arange(50)).square().sum().backward()
                optimizer.step()
        results.append([p.detach() for p in one.parameters()])
    torch.testing.assert_close(*results)


def _compressed(model, optimizer):
    compress(model, None, PLAIN, optimizer=optimizer, progress=False)


def test_hooks_after_steps_see_where_rows_end():
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    seen = []

    def hook(*_):
        seen.append(model[0].codebooks.detach().clone())
        with torch.no_grad():
            model[0].codebooks.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(hook)
    _compressed(model, optimizer)
    expected = copy.deepcopy(model)
    alone = torch.optim.Adam(expected.parameters(), lr=0.1)
    keep_row_steps(alone, expected)
    for one in (model, expected):
        one(torch.arange(50)).sum().backward()
    optimizer.step()
    alone.step()
    assert torch.equal(seen[0], expected[0].codebooks)
    assert float(model[0].codebooks.detach().abs().max()) == pytest.approx(0.1)
    keep_row_steps(optimizer, model)
    optimizer.step()
    assert float(model[0].codebooks.detach().abs().max()) == pytest.approx(0.1)


class Stepping(torch.optim.Optimizer):
    """Takes something else than a closure first."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, losses, scale=1.0):
        return losses, scale


def test_arguments_of_steps_stay_as_they_are():
    model = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = Stepping(model.parameters())
    _compressed(model, optimizer)
    assert optimizer.step([1, 2]) == ([1, 2], 1.0)
    assert optimizer.step(losses=3, scale=4) == (3, 4)
    closure, scale = optimizer.step(lambda: 5, 6)
    assert closure() == 5 and scale == 6
    assert optimizer.step(losses=None) == (None, 1.0)


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (torch.optim.Adam, {}, True),
        (torch.optim.Adagrad, {}, True),
        (torch.optim.Adam, {"eps": 1e-4}, False),
        (torch.optim.Adam, {"fused": True}, False),
        (torch.optim.SGD, {"lr": 0.1}, False),
    ],
)
def test_eps_that_float16_does_not_know_is_told(make, options, told, caplog):
    config = CompressionConfig(
        num_subvectors=2, codebook_size=8, epochs=0, codebook_dtype="float16"
    )
    with caplog.at_level("WARNING"):
        compressed(make, config=config, **options)
    assert ("table '0': its codebooks are float16, in which eps=" in caplog.text) == told
    caplog.clear()
    with caplog.at_level("WARNING"):
        compressed(make, **options)
    assert "float16" not in caplog.text


def test_adagrad_has_its_state_as_its_constructor_gives_it():
    model, optimizer = compressed(torch.optim.Adagrad, initial_accumulator_value=0.5)
    state = optimizer.state[model[0].codebooks]
    assert state["sum"].eq(0.5).all() and float(state["step"]) == 0
    model(torch.arange(9)).sum().backward()
    optimizer.step()


def test_load_takes_an_optimizer(tmp_path):
    model, _ = compressed(torch.optim.SGD)
    save(model, tmp_path / "m")
    fresh = nn.Sequential(nn.Embedding(ROWS, DIM))
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    load(fresh, tmp_path / "m", optimizer=optimizer)
    assert optimizer.param_groups[0]["params"] == [fresh[0].codebooks]
    assert len(hooks(optimizer)) == 2


def test_an_optimizer_made_later_can_be_told():
    model, optimizer = compressed(torch.optim.SGD, lr=0.1)
    later = torch.optim.SGD(model.parameters(), lr=0.1)
    undo = keep_row_steps(later, model)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    keep_row_steps(twin_optimizer, twin)
    for one, stepper in ((model, later), (twin, twin_optimizer)):
        one(torch.arange(9)).sum().backward()
        stepper.step()
    assert torch.equal(model[0].codebooks, twin[0].codebooks)
    undo()
    assert not hooks(later) and len(hooks(optimizer)) == 2
