"""Fisher matrices of tables, and what compress() makes of them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mec_embed import CompressionConfig, FrequencyStats, compress, distill, plan
from mec_embed.forward import default_forward
from mec_embed.sensitivity import MOST_BATCHES, comparable, fisher_matrices
from mec_embed.tables import find_tables

DIM = 4


class Linear(nn.Module):
    """A logit that is linear in the vectors, so that its Fisher matrix is known."""

    def __init__(self, rows=200, probability=False, bag=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(rows, DIM, mode=bag) if bag else nn.Embedding(rows, DIM)
        self.unused = nn.Embedding(rows, DIM)
        self.weight = nn.Parameter(torch.tensor([3.0, 1.0, 0.1, 0.0]))
        self.probability = probability

    def forward(self, ids):
        logit = self.table(ids).reshape(len(ids), -1, DIM).sum(1) @ self.weight
        return logit.sigmoid() if self.probability else logit


def matrices(model, batches, forward=default_forward):
    tables, _ = find_tables(model, CompressionConfig())
    return dict(
        zip(
            [table.name for table in tables],
            fisher_matrices(model, tables, batches, forward),
            strict=True,
        )
    )


def expected(model, ids):
    """Mean of p (1 - p) w w^T, and what is added to the diagonal."""
    with torch.no_grad():
        chance = model(ids) if model.probability else model(ids).sigmoid()
    weight = model.weight.detach().double().numpy()
    matrix = float((chance * (1 - chance)).double().mean()) * np.outer(weight, weight)
    return matrix + 0.05 * matrix.trace() / DIM * np.eye(DIM)


@pytest.mark.parametrize("probability", [False, True])
def test_linear_model(probability):
    model = Linear(probability=probability)
    ids = torch.arange(200)
    found = matrices(model, ids.split(64))
    np.testing.assert_allclose(found["table"], expected(model, ids), rtol=1e-4, atol=1e-7)
    assert found["unused"] is None


@pytest.mark.parametrize(("bag", "part"), [("sum", 1.0), ("mean", 1 / 3)])
def test_one_id_of_a_bag_moves_a_mean_less(bag, part):
    model = Linear(bag=bag)
    ids = torch.randint(200, (300, 3))
    found = matrices(model, [ids])["table"]
    whole = expected(model, ids)
    np.testing.assert_allclose(found, whole * part**2, rtol=1e-4, atol=1e-7)


class Padded(nn.Module):
    """A mean of ids, padded in three ways."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        if kind == "masked":
            self.table = nn.Embedding(200, DIM, padding_idx=0)
        else:
            self.table = nn.EmbeddingBag(200, DIM, mode="mean", padding_idx=0)
        self.weight = nn.Parameter(torch.tensor([3.0, 1.0, 0.1, 0.0]))

    def forward(self, ids):
        real = ids != 0
        if self.kind == "masked":
            rows = self.table(ids) * real[:, :, None]
            vectors = rows.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        elif self.kind == "padded":
            vectors = self.table(ids)
        else:
            starts = real.sum(1).cumsum(0)
            vectors = self.table(ids[real], torch.cat([starts.new_zeros(1), starts[:-1]]))
        return vectors @ self.weight - 1


def test_padding_is_no_lookup():
    ids = torch.randint(1, 200, (300, 12))
    ids[torch.arange(12) >= torch.randint(0, 6, (300, 1))] = 0  # some bags are empty
    found = [matrices(Padded(kind), [ids])["table"] for kind in ("offsets", "padded", "masked")]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_weights_of_ids_are_part_of_what_they_move():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.EmbeddingBag(200, DIM, mode="sum")
            self.weight = nn.Parameter(torch.tensor([3.0, 1.0, 0.1, 0.0]))

        def forward(self, batch):
            return self.table(batch["ids"], per_sample_weights=batch["weights"]) @ self.weight

    model = Weighted()
    ids = torch.randint(200, (300, 3))
    weights = torch.tensor([0.5, 0.0, 0.25]).expand(300, 3)
    batch = {"ids": ids, "weights": weights}
    with torch.no_grad():
        chance = model(batch).sigmoid()
    vector = model.weight.detach().double().numpy()
    matrix = float((chance * (1 - chance)).mean()) * np.outer(vector, vector)
    matrix += 0.05 * matrix.trace() / DIM * np.eye(DIM)
    found = matrices(model, [batch])["table"]
    np.testing.assert_allclose(found, matrix * (0.5**2 + 0.25**2) / 3, rtol=1e-3, atol=1e-8)


def test_a_hook_may_make_other_rows_of_the_output():
    model, ids = Linear(), torch.randint(200, (300, 3))
    expected_ = matrices(model, [ids])["table"]
    model.table.register_forward_hook(lambda module, args, output: output.sum(1))
    np.testing.assert_allclose(matrices(model, [ids])["table"], expected_, rtol=1e-4)


def test_logits_that_once_lie_between_0_and_1_stay_logits():
    model = Linear()
    ids = torch.arange(200)
    with torch.no_grad():
        inside = ((model(ids) > 0) & (model(ids) < 1)).nonzero()[:, 0]
    outside = ids[~torch.isin(ids, inside)]
    found = matrices(model, [inside, outside])["table"]
    np.testing.assert_allclose(found, expected(model, outside), rtol=1e-4, atol=1e-7)
    found = matrices(model, [outside, inside])["table"]
    np.testing.assert_allclose(found, expected(model, ids), rtol=1e-4, atol=1e-7)


def test_model_is_left_as_it_was():
    model = Linear().train()
    model.table.weight.grad = torch.ones_like(model.table.weight)
    before = copy.deepcopy(model.state_dict())
    matrices(model, [torch.arange(10)])
    assert model.training and model.table.training
    assert not model.table._forward_hooks and not model.table._forward_hooks_with_kwargs
    assert model.table.weight.grad.eq(1).all() and model.weight.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_forward_leaves_on_a_module_is_taken_back():
    class Auxiliary(Linear):
        auxiliary = None

        def forward(self, ids):
            logit = super().forward(ids)
            self.auxiliary = logit.square().mean()
            return logit

    model = Auxiliary()
    matrices(model, [torch.arange(10)])
    assert model.auxiliary is None


def test_frozen_tables_and_in_place_models_are_measured():
    class InPlace(Linear):
        def forward(self, ids):
            vectors = self.table(ids)
            vectors.mul_(2)
            return vectors @ self.weight

    model = InPlace()
    model.table.requires_grad_(False)
    assert matrices(model, [torch.arange(10)])["table"].trace() > 0


def test_several_tasks_do_not_mix():
    """Two outputs that read different columns: no product between these columns is left."""

    class Tasks(Linear):
        def forward(self, ids):
            return self.table(ids)[:, :2]

    model = Tasks()
    found = matrices(model, torch.arange(200).repeat(50).split(200))["table"]
    assert abs(found[0, 1]) < 0.1 * found[0, 0]


def test_reads_no_more_batches_than_it_needs():
    read = []

    def batches():
        for number in range(1000):
            read.append(number)
            yield torch.arange(10)

    matrices(Linear(), batches())
    assert len(read) == MOST_BATCHES


def test_errors():
    with pytest.raises(ValueError, match="batches is empty"):
        matrices(Linear(), [])
    model = Linear()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="'table'.*NaN or infinite"):
        matrices(model, [torch.arange(10)])
    with pytest.raises(TypeError, match="pass forward="):
        matrices(Linear(), [torch.arange(10)], lambda model, batch: (model(batch), 1))
    with pytest.raises(ValueError, match="no gradient by the rows of table 'table'.*detach"):
        matrices(Linear(), [torch.arange(10)], lambda model, batch: model(batch).detach())


def test_a_forward_that_is_computed_again_for_gradients():
    model, batches = Linear(), [torch.arange(10)]
    again = matrices(
        model, batches, lambda some, batch: checkpoint(some, batch, use_reentrant=False)
    )
    assert np.allclose(again["table"], matrices(model, batches)["table"])


def test_a_model_that_was_compiled_and_has_run_is_measured():
    model, batches = Linear(), [torch.arange(10)]
    model.compile(backend="eager")
    model.eval()(batches[0])
    assert np.allclose(matrices(model, batches)["table"], matrices(Linear(), batches)["table"])


@pytest.mark.parametrize("batches", [3, object()])
def test_what_is_no_batches_is_refused(batches):
    model = nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(4, 1))
    teacher = copy.deepcopy(model)
    calls = [
        lambda: compress(model, None, batches=batches, progress=False),
        lambda: FrequencyStats.from_batches(model, batches),
        lambda: distill(model, teacher, batches),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"batches must be .*, got {type(batches).__name__}"):
            call()


def test_comparable_gives_the_mean_to_tables_that_were_not_seen():
    tables, _ = find_tables(Linear(), CompressionConfig())
    seen = np.diag([1.0, 2.0, 3.0, 6.0])
    filled = comparable(tables, [seen, None])
    np.testing.assert_array_equal(filled[0], seen)
    np.testing.assert_array_equal(filled[1], 3 * np.eye(DIM))
    assert comparable(tables, [None, None]) == [None, None]


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_compress_spends_its_codes_on_what_the_model_looks_at(dtype):
    model = Linear(rows=3000)
    batches = torch.randint(3000, (20, 500)).unbind(0)
    before = model(torch.arange(3000)).detach()
    config = CompressionConfig(num_subvectors=3, codebook_size=16, codebook_dtype=dtype)
    errors = {}
    for name, some in (("plain", None), ("measured", batches)):
        one = copy.deepcopy(model)
        compress(one, None, config, batches=some, progress=False)
        errors[name] = float((one(torch.arange(3000)).detach() - before).square().mean())
    assert errors["measured"] < 0.5 * errors["plain"]


def test_the_planner_gives_bits_to_the_table_that_matters():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Embedding(3000, 8), nn.Embedding(3000, 8)

        def forward(self, ids):
            return self.a(ids).sum(1) + 0.01 * self.b(ids).sum(1)

    batches = torch.randint(3000, (5, 500)).unbind(0)
    config = CompressionConfig(ratio=15)
    bits = {t.name: t.row_bits for t in plan(Two(), None, config, batches=batches).tables}
    assert bits["a"] > 2 * bits["b"]
    # Without batches the two are alike.
    alike = {t.name: t.row_bits for t in plan(Two(), None, config).tables}
    assert alike["a"] == pytest.approx(alike["b"], abs=2)


def test_product_codes_use_it_for_bits_only():
    model = Linear(rows=3000)
    batches = torch.randint(3000, (5, 500)).unbind(0)
    config = CompressionConfig(num_subvectors=2, codebook_size=16, codes="product", epochs=0)
    twin = copy.deepcopy(model)
    compress(model, None, config, batches=batches, progress=False)
    compress(twin, None, config, progress=False)
    assert torch.equal(model.table.codes, twin.table.codes)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_off_outside(context):
    """compress() measures all the same."""
    model = Linear(rows=3000)
    batches = torch.randint(3000, (5, 500)).unbind(0)
    config = CompressionConfig(num_subvectors=2, codebook_size=16, epochs=0)
    with context():
        compress(model, None, config, batches=batches, progress=False)
    assert model.table.codebooks.requires_grad
