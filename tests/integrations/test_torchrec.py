"""TorchRec's collections, plain and sharded, work as before after compress()."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchrec")

import contract
import processes
import torchrec_zoo as zoo

import mec_embed
from mec_embed import CompressedEmbedding, CompressedEmbeddingBag, CompressionConfig
from mec_embed.integrations import torchrec
from mec_embed.integrations.torchrec import _held


@pytest.fixture(scope="module")
def predictions():
    """Model name -> predictions of the model that was saved."""
    return {}


class WithOptimizer:
    """The zoo with one optimizer for the whole life of a model, as its users have it."""

    def build(self, name, folder):
        model = zoo.build(name, folder)
        self.optimizer = zoo.optimizer(model)
        return model

    def train(self, model, name, folder, epochs=1):
        zoo.train(model, name, folder, epochs=epochs, optimizer=self.optimizer)

    predict = staticmethod(zoo.predict)
    loss = staticmethod(zoo.loss)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_lossless_swap_changes_nothing(name, folder):
    contract.check_lossless_swap(zoo, name, folder)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_life_of_a_compressed_model(name, folder, predictions):
    held = WithOptimizer()

    def compress(model):
        return torchrec.compress(
            model, zoo.batches(name), contract.CONFIG, optimizer=held.optimizer, progress=False
        )

    predictions[name] = contract.check_life(held, name, folder, compress)


def test_next_version(folder):
    def compress(model, **options):
        batches = zoo.batches("DLRM")
        return torchrec.compress(model, batches, contract.CONFIG, progress=False, **options)

    contract.check_next_version(zoo, "DLRM", folder, compress)


def test_reload_in_a_fresh_process(predictions, reload):
    assert predictions, "test_life_of_a_compressed_model has to run first"
    for name, (ours, theirs) in reload("torchrec_zoo", sorted(predictions)).items():
        np.testing.assert_array_equal(ours, predictions[name], err_msg=name)
        np.testing.assert_array_equal(theirs, predictions[name], err_msg=name)


def test_error_changes_nothing(folder, monkeypatch):
    contract.check_error_changes_nothing(zoo, zoo.MODELS[0], folder, monkeypatch)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_frequencies_agree_with_what_the_model_looks_up(name, folder):
    model = zoo.build(name, folder)
    expected = mec_embed.FrequencyStats.from_batches(model, zoo.batches(name))
    got = torchrec.frequencies(model, zoo.batches(name))
    assert set(got) == set(expected)
    for table in got:
        np.testing.assert_array_equal(got[table], expected[table], err_msg=table)


def small(kind: str = "bag") -> nn.Module:
    import torchrec as package

    config = package.EmbeddingBagConfig if kind == "bag" else package.EmbeddingConfig
    collection = package.EmbeddingBagCollection if kind == "bag" else package.EmbeddingCollection
    tables = [
        config(name="t", embedding_dim=8, num_embeddings=60, feature_names=["f", "g"]),
        config(name="u", embedding_dim=8, num_embeddings=40, feature_names=["h"]),
    ]
    return nn.Sequential(collection(tables=tables))


def jagged():
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=["f", "g", "h"],
        values=torch.tensor([1, 2, 3, 1, 1, 5]),
        lengths=torch.tensor([2, 0, 1, 1, 1, 1]),
    )


class Batch:
    sparse_features = None


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_frequencies_of_every_kind_of_batch(kind):
    batch = Batch()
    batch.sparse_features = jagged()
    model = small(kind)
    for held in (jagged(), batch, (jagged(), torch.ones(2)), {"x": batch, "y": torch.ones(2)}):
        stats = torchrec.frequencies(model, [held])
        name = "0.embedding_bags" if kind == "bag" else "0.embeddings"
        assert stats[f"{name}.t"][:4].tolist() == [0, 2, 1, 1]
        assert stats[f"{name}.u"].sum() == 2


def test_frequencies_errors():
    with pytest.raises(TypeError, match="KeyedJaggedTensor"):
        torchrec.frequencies(small(), [torch.ones(3)])
    with pytest.raises(ValueError, match="no table"):
        torchrec.frequencies(nn.Sequential(nn.Linear(1, 1)), [jagged()])


@pytest.mark.parametrize("kind", ["bag", "sequence"])
def test_collections_cannot_be_initialised_anew_by_accident(kind):
    model = small(kind)
    mec_embed.compress(
        model, None, CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0), progress=False
    )
    expected = CompressedEmbeddingBag if kind == "bag" else CompressedEmbedding
    assert all(type(m) is expected for m in contract.tables(model))
    with pytest.raises(RuntimeError, match="decompress"):
        model[0].reset_parameters()
    mec_embed.decompress(model)
    if kind == "bag":
        model[0].reset_parameters()


def test_memory_of_a_large_table_with_adam():
    """A table of 48.8 MiB with Adam (146 MiB of tensors) leaves less than 2 MiB."""
    import torchrec as package

    config = package.EmbeddingBagConfig(
        name="big", embedding_dim=16, num_embeddings=800_000, feature_names=["f"]
    )
    start = contract.held_tensors()
    model = nn.Sequential(package.EmbeddingBagCollection(tables=[config]))
    optimizer = torch.optim.Adam(model.parameters())
    model[0].embedding_bags["big"](torch.tensor([[1]])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert contract.held_tensors() - start > 140 * 2**20
    mec_embed.compress(
        model, None, CompressionConfig(ratio=50, epochs=1), optimizer=optimizer, progress=False
    )
    assert contract.held_tensors() - start < 2 * 2**20


CPU = torch.device("cpu")


def configs(kind):
    import torchrec as package

    config = package.EmbeddingBagConfig if kind == "bag" else package.EmbeddingConfig
    return [config(name="t", embedding_dim=8, num_embeddings=60, feature_names=["f"])]


def fused_bag():
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

    return FusedEmbeddingBagCollection(configs("bag"), torch.optim.SGD, {"lr": 0.1})


def quantized_bag():
    from torchrec.quant.embedding_modules import EmbeddingBagCollection

    return EmbeddingBagCollection(configs("bag"), is_weighted=False, device=CPU)


def quantized_sequence():
    from torchrec.quant.embedding_modules import EmbeddingCollection

    return EmbeddingCollection(configs("sequence"), device=CPU)


@pytest.mark.parametrize("make", [fused_bag, quantized_bag, quantized_sequence])
def test_fused_and_quantized_collections_are_refused(make):
    model = nn.ModuleDict({"sparse": make(), "other": nn.Embedding(100, 8)})
    for call in (
        lambda: mec_embed.compress(model, None, contract.CONFIG, progress=False),
        lambda: torchrec.compress(model, [jagged()], contract.CONFIG, progress=False),
    ):
        with pytest.raises(ValueError, match="'sparse' is a .* of TorchRec.*into a plain"):
            call()
    assert type(model["other"]) is nn.Embedding


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("ddp", [False, True])
def test_sharded_models_are_refused_without_a_group(one_process, ddp):
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.shard import shard_modules

    model = nn.Sequential(small()[0], nn.Linear(8, 1))
    sharded = (
        DistributedModelParallel(model, device=CPU)
        if ddp
        else shard_modules(nn.Sequential(small()[0]), device=CPU)
    )
    with pytest.raises(ValueError, match="of TorchRec.*on all ranks with process_group="):
        mec_embed.compress(sharded, None, contract.CONFIG, progress=False)


def shard(model, kinds, dtensor=False):
    """The model under DistributedModelParallel, each table sharded in its way."""
    import torch.distributed as dist
    from torchrec.distributed import sharding_plan
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    size, collection = dist.get_world_size(), model.collection
    bags = type(collection).__name__ == "EmbeddingBagCollection"
    sharder = EmbeddingBagCollectionSharder() if bags else EmbeddingCollectionSharder()
    plan = sharding_plan.construct_module_sharding_plan(
        collection, kinds, sharder=sharder, world_size=size, local_size=size, device_type="cpu"
    )
    env = ShardingEnv(size, dist.get_rank(), dist.group.WORLD, output_dtensor=dtensor)
    return DistributedModelParallel(
        model,
        env=env,
        device=CPU,
        plan=ShardingPlan(plan={"collection": plan}),
        sharders=[sharder],
    )


def local_rows(collection):
    """(table, first row, rows) of what this rank holds, by the kernels' own parameters."""
    held = {name: value.detach().clone() for name, value in collection.named_parameters()}
    found = []
    for name, sharding in collection.module_sharding_plan.items():
        weight = next(value for key, value in held.items() if key.split(".")[1] == name)
        first = 0
        for one in sharding.sharding_spec.shards if sharding.sharding_spec else ():
            if one.placement.rank() == torch.distributed.get_rank():
                first = one.shard_offsets[0]
        found.append((name, first, weight.view(-1, zoo.DIM)))
    return found


SHARDED = CompressionConfig(ratio=10, epochs=0, min_rows=100)
SHARDED_MODELS = ("EmbeddingBagCollection", "EmbeddingCollection")


def compress_sharded_on_ranks():
    """For each model, (rows held, state and report after, predictions); then what is refused."""
    import torch.distributed as dist
    from torchrec.distributed.sharding_plan import data_parallel, row_wise, table_wise

    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    rows = {"t_brand": row_wise(compute_kernel="fused"), "t_item": row_wise()}
    found = {}
    for name, dtensor, device in zip(
        SHARDED_MODELS, (False, True), (data_parallel(), table_wise(rank=0)), strict=True
    ):
        kinds = {"t_device": device, "t_city": table_wise(rank=1), **rows}
        model = shard(zoo.build(name, None), kinds, dtensor).module
        held, sharded = local_rows(model.collection), model.collection
        part = zoo.batches(name)[rank::size]
        planned = mec_embed.plan(model, torchrec.frequencies(model, part, world), SHARDED,
                                 process_group=world)  # fmt: skip
        assert model.collection is sharded
        report = torchrec.compress(model, part, SHARDED, process_group=world, progress=False)
        assert type(model.collection).__name__ == name
        layouts = [(table.name, table.layout, table.bytes_after) for table in report.tables]
        assert report.bytes_after == planned.bytes_after
        state = {key: value.clone() for key, value in model.state_dict().items()}
        found[name] = held, state, layouts, zoo.predict(model, name, None)
        model.train()
        zoo.train(model, name, None)
        assert not torch.equal(state["network.0.weight"], model.network[0].weight)

    kinds |= {"t_device": table_wise(rank=0), "t_city": table_wise(rank=0), **rows}
    wrapped = shard(zoo.build("EmbeddingBagCollection", None), kinds)
    model = wrapped.module
    sharded = model.collection
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = next(p for n, p in sharded.named_parameters() if "t_item" in n)
    attempts = {
        "wrapper": lambda: refused(wrapped, process_group=world),
        "itself": lambda: refused(sharded, process_group=world),
        "optimizer": lambda: refused(model, optimizer=optimizer, process_group=world),
        "NaN": lambda: refused(model, process_group=world),
    }
    for name, attempt in attempts.items():
        with torch.no_grad():
            bad[len(bad) - 1, 0] = float("nan") if name == "NaN" and rank == size - 1 else 0.0
        found[name] = attempt()
    assert model.collection is sharded
    return found


def refused(model, **options):
    with pytest.raises(ValueError) as caught:
        mec_embed.compress(model, None, SHARDED, progress=False, **options)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_models_are_compressed_by_all_ranks_together(size, tmp_path):
    found = processes.run(compress_sharded_on_ranks, size, tmp_path)
    for name in SHARDED_MODELS:
        model = zoo.build(name, None)
        tables = {n.rpartition(".")[2]: m for n, m in model.named_modules() if hasattr(m, "weight")}
        seen = {}
        for held, *_ in (rank[name] for rank in found):
            for table, first, rows in held:
                tables[table].weight.data[first : first + len(rows)] = rows
                seen.setdefault(table, set()).update(range(first, first + len(rows)))
        assert all(len(seen[f"t_{feature}"]) == rows for feature, rows in zoo.ROWS.items())
        report = torchrec.compress(model, zoo.batches(name), SHARDED, progress=False)
        for _, state, layouts, predictions in (rank[name] for rank in found):
            assert layouts == [(t.name, t.layout, t.bytes_after) for t in report.tables]
            torch.testing.assert_close(state, dict(model.state_dict()))
            np.testing.assert_allclose(predictions, zoo.predict(model, name, None), rtol=1e-5)
    for number, rank in enumerate(found):
        other = "" if number == size - 1 else f"rank {size - 1}: "
        assert "compress the .module of its DistributedModelParallel" in rank["wrapper"]
        assert "itself a ShardedEmbeddingBagCollection" in rank["itself"]
        assert "an optimizer trains the sharded tables of 'collection'" in rank["optimizer"]
        assert rank["NaN"].startswith(f"{other}table 'collection.embedding_bags.t_item': row 2999")


def by_columns_on_ranks():
    """For each model, what the sharded and the whole tables give, and the compressed model."""
    import torch.distributed as dist
    from torchrec.distributed.sharding_plan import column_wise, row_wise, table_row_wise

    mec_embed.shards._PIECE_BYTES = 1 << 14
    world, rank, found = dist.group.WORLD, dist.get_rank(), {}
    for name, dtensor, item in zip(
        SHARDED_MODELS, (False, True), (table_row_wise(host_index=0), row_wise()), strict=True
    ):
        both, one = column_wise(ranks=[0, 1]), column_wise(ranks=[1, 1])
        kinds = {"t_device": both, "t_city": one, "t_brand": both, "t_item": item}
        trained = zoo.build(name, None)
        wrapped = shard(zoo.build(name, None), kinds, dtensor)
        wrapped.load_state_dict(as_sharded(trained.state_dict(), wrapped.state_dict()))
        model = wrapped.module
        looked_up = [torch.empty(0)] * 2
        if name == "EmbeddingBagCollection":  # looking sequences up on the CPU crashes in TorchRec
            features = zoo.batches(name)[rank].sparse_features
            with torch.no_grad():
                both = [one.collection(features).to_dict() for one in (model, trained)]
            looked_up = [[one[feature] for feature in zoo.ROWS] for one in both]
        report = torchrec.compress(
            model, zoo.batches(name)[rank::2], SHARDED, process_group=world, progress=False
        )
        layouts = [(table.name, table.layout, table.bytes_after) for table in report.tables]
        found[name] = looked_up, dict(model.state_dict()), layouts
        # Measured through the plain collections, which ask the ranks for rows.
        measured = []
        for again in (trained, shard(zoo.build(name, None), kinds, dtensor)):
            if again is not trained:
                again.load_state_dict(
                    as_sharded(zoo.build(name, None).state_dict(), again.state_dict())
                )
            plain = getattr(again, "module", again)
            options = {"process_group": world, "forward": lambda one, batch: one(batch)}
            part = zoo.batches(name)[rank::2]
            report = torchrec.compress(plain, part, SHARDED, progress=False, **options)
            layouts = [(table.layout, table.weighted_error) for table in report.tables]
            measured.append((layouts, dict(plain.state_dict())))
        found[f"{name}, measured"] = measured
    return found


def as_sharded(state, like):
    """A whole state dict, cut as that of a sharded model is; ``like`` is changed."""
    for key, value in like.items():
        for block in _held(value) or ():
            a, b, c, d = block.bounds
            block.values.copy_(state[key][a:b, c:d])
    return like


@pytest.mark.slow
def test_tables_sharded_by_columns_are_compressed_as_by_one_process(tmp_path):
    found = processes.run(by_columns_on_ranks, 2, tmp_path)
    for name in SHARDED_MODELS:
        model = zoo.build(name, None)
        report = torchrec.compress(model, zoo.batches(name), SHARDED, progress=False)
        for rank in found:
            (layouts, state), (expected_layouts, expected) = rank[f"{name}, measured"]
            assert [one for one, _ in layouts] == [one for one, _ in expected_layouts]
            torch.testing.assert_close(state, expected)
        for (looked_up, expected), state, layouts in (rank[name] for rank in found):
            # The blocks are where TorchRec looks them up.
            torch.testing.assert_close(looked_up, expected)
            assert layouts == [(t.name, t.layout, t.bytes_after) for t in report.tables]
            torch.testing.assert_close(state, dict(model.state_dict()))


def test_optimizers_that_wrap_others_are_refused():
    """Their step() would go past what keeps row steps, and they would keep old tables alive."""
    from torchrec.optim.keyed import KeyedOptimizerWrapper
    from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

    model = small()
    keyed = KeyedOptimizerWrapper(dict(model.named_parameters()), torch.optim.Adam)
    warm = WarmupOptimizer(keyed, [WarmupStage(WarmupPolicy.LINEAR, max_iters=3)])
    for optimizer in (keyed, warm):
        with pytest.raises(ValueError, match="pass those, and wrap them anew"):
            mec_embed.compress(model, None, contract.CONFIG, optimizer=optimizer, progress=False)
    assert not contract.tables(model)
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    mec_embed.compress(model, None, config, optimizer=keyed._optimizer, progress=False)


def test_tables_trained_in_backward_are_left_alone():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.ModuleDict({"fused": nn.Embedding(60, 8), "plain": nn.Embedding(60, 8)})
    _apply_optimizer_in_backward(torch.optim.SGD, model["fused"].parameters(), {"lr": 0.1})
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    report = mec_embed.compress(model, None, config, progress=False)
    assert type(model["fused"]) is nn.Embedding
    assert "_apply_optimizer_in_backward" in report.tables[0].reason


def test_compressing_twice_says_that_nothing_is_left():
    model = small()
    config = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
    torchrec.compress(model, [jagged()], config, progress=False)
    with pytest.raises(ValueError, match="not compressed yet"):
        torchrec.compress(model, [jagged()], config, progress=False)
