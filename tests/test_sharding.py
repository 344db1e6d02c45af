"""Codes in parts give the lookups, gradients and errors of codes that every rank holds.

Functions that end in ``_on_ranks`` run in each of some processes that gloo connects.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from random_tables import filled
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import mec_embed
from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    TieredEmbedding,
    TieredEmbeddingBag,
    gather_codes,
    shard_codes,
)
from mec_embed.modules import CodePart, DecodedBags, DecodedTable
from mec_embed.regularization import embedding_penalty
from mec_embed.sharding import ShardedEmbedding, ShardedEmbeddingBag
from mec_embed.tiers import TierMap

pytestmark = pytest.mark.slow

ROWS = 1003  # parts end within bytes of codes, and the last one is smaller
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
#: Stored without codes, so that they stay as they are.
WITHOUT_CODES = ("kept", "one_row")


def table(layout: tuple[Any, ...], books: torch.dtype, cls=CompressedEmbedding, **options):
    return filled(CodeLayout(*layout, books), cls, **options)


def tiered(cls, popular: torch.Tensor, head, tail, dtype, **options):
    """A table of 8 columns in tiers; head and tail are kinds and shapes of codes."""
    tiers = [
        table((kind, rows, 8, m, rows if kind == "rows" else k), dtype)
        for (kind, m, k), rows in ((head, int(popular.sum())), (tail, int((~popular).sum())))
    ]
    return cls(TierMap.of(popular), *tiers, **options)


def first_order_of(table: TieredEmbedding, dtype: torch.dtype) -> TieredEmbedding:
    """A first-order table on the map and the codes of a table in tiers."""
    tiers = [
        filled(
            CodeLayout(
                tier.layout.kind,
                tier.num_embeddings,
                1,
                tier.layout.num_subvectors,
                tier.layout.codebook_size,
                dtype,
            ),
            code_table=tier.code_table,
        )
        for tier in table.tiers
    ]
    return TieredEmbedding(table.tier_map, *tiers)


def tables(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Compressed tables of every kind, always the same."""
    coded, fine = ("additive", ROWS, 8, 3, 20), ("additive", 4, 20)
    sorted_rows = torch.arange(ROWS) < 300
    shuffled = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) < 0.4
    popular_padding = int(shuffled.nonzero()[5])
    half = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    model = nn.ModuleDict(
        {
            "plain": table(coded, dtype, padding_idx=7, dtype=half, name="plain"),
            "product": table(("product", 501, 8, 2, 9), dtype),
            "few": table(("additive", 3, 8, 2, 9), dtype),
            "unmasked": table(coded, dtype, padding_idx=900, zero_padding=False),
            "kept": table(("rows", 40, 8, 1, 40), dtype),
            "one_row": table(("shared", 40, 8, 1, 1), dtype),
            "sorted": tiered(
                TieredEmbedding, sorted_rows, fine, ("shared", 1, 1), dtype, padding_idx=ROWS - 1
            ),
            "shuffled": tiered(
                TieredEmbedding,
                shuffled,
                fine,
                ("additive", 1, 20),
                dtype,
                padding_idx=popular_padding,
            ),
            "rows_and_codes": tiered(
                TieredEmbedding, sorted_rows, ("rows", 1, 0), ("additive", 1, 20), dtype
            ),
            "tiered_bags": tiered(
                TieredEmbeddingBag,
                shuffled,
                fine,
                ("additive", 1, 20),
                dtype,
                mode="sum",
                padding_idx=3,
            ),
        }
    )
    model["again"] = model["plain"]
    own = model["plain"]
    model["first_order"] = table((*coded[:2], 1, *coded[3:]), dtype, code_table=own.code_table)
    model["same_books"] = table(coded, dtype, codebook_set=model["unmasked"].codebook_set)
    model["tiered_first_order"] = first_order_of(model["shuffled"], dtype)
    for mode in ("sum", "mean", "max"):
        model[mode] = table(coded, dtype, CompressedEmbeddingBag, mode=mode, padding_idx=3)
    last = {"include_last_offset": True, "mode": "sum"}
    model["last"] = table(coded, dtype, CompressedEmbeddingBag, **last)
    model["unmasked"].oov_row = 5
    return model


def ids(rows: int, size: int, seed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Ids (size, 3), some of them many times."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(rows, (size, 3), generator=generator)
    return drawn.where(torch.rand(size, 3, generator=generator) < 0.7, drawn % 10 % rows).to(dtype)


def look_up(model: nn.ModuleDict, size: int, seed: int, dtype=torch.int64) -> dict[str, Any]:
    """What each table gives for ids of its own."""
    found = {}
    for name, module in model.items():
        own = ids(module.num_embeddings, size, seed, dtype)
        if name == "unmasked":
            own = own.where(own % 11 > 0, own + 10_000)  # unknown ones
        found[name] = module(own)
        if name == "sum":
            weights = torch.linspace(-1, 1, own.numel())
            found["weighted"] = module(own, None, weights.view_as(own))
            offsets = torch.arange(0, own.numel(), 2, dtype=dtype)
            found["offsets"] = module(own.flatten(), offsets, weights)
        if name == "last":
            offsets = torch.tensor([0, own.numel() // 2, own.numel()], dtype=dtype)
            found[name] = module(own.flatten(), offsets)
    return found


def code_bytes(model: nn.Module) -> int:
    """Bytes of all code tensors, each once, wherever a module holds them."""
    held = {
        tensor.data_ptr(): tensor.nbytes
        for module in model.modules()
        for values in (vars(module), module._buffers)
        for name, tensor in values.items()
        if name != "bitmap" and isinstance(tensor, torch.Tensor) and tensor.dtype is torch.uint8
    }
    return sum(held.values())


# --- lookups ------------------------------------------------------------------------------------


def lookups_on_ranks(kind: str) -> dict[str, Any]:
    """Pairs of what codes in parts and whole codes give, and the bytes of both."""
    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    whole, model = tables(DTYPES[kind]), tables(DTYPES[kind])
    assert shard_codes(model, world) == len(whole) - 1 - len(WITHOUT_CODES)
    found: dict[str, Any] = {"bytes": (code_bytes(model), code_bytes(whole))}
    found["types"] = {name: type(module) for name, module in model.items()}
    found["same"] = model["again"] is model["plain"]
    for dtype in (torch.int64, torch.int32):
        for number, batch in enumerate((17 + 5 * rank, 0 if rank == 1 else 4, 300)):
            seed = 10 * number + rank
            got = look_up(model, batch, seed, dtype)
            found[f"{dtype}, {batch}"] = got, look_up(whole, batch, seed, dtype)
    found["weight"] = [
        {name: module.weight.detach() for name, module in one.items()} for one in (model, whole)
    ]
    found["attributes"] = [described(one) for one in (model, whole)]
    copied = copy.deepcopy(model)
    found["copied"] = look_up(copied, 9, rank), look_up(whole, 9, rank)
    for part in (m for m in model.modules() if isinstance(m, CodePart)):
        part.codes.zero_()
    model.load_state_dict(copied.state_dict())
    found["loaded"] = look_up(model, 9, rank), look_up(whole, 9, rank)
    assert gather_codes(model) == len(whole) - 1 - len(WITHOUT_CODES)
    found["state"] = dict(model.state_dict()), dict(whole.state_dict())
    found["gathered"] = look_up(model, 9, rank), look_up(whole, 9, rank)
    found["described"] = repr(model), repr(whole)
    found["shared"] = (
        model["first_order"].code_table is model["plain"].code_table
        and model["tiered_first_order"].tier_map is model["shuffled"].tier_map
        and len(model["plain"].code_table.holders) == 2
    )
    assert size > 1
    return found


def described(model: nn.ModuleDict) -> dict[str, Any]:
    names = ("num_embeddings", "embedding_dim", "padding_idx", "zero_padding", "sparse")
    names += ("trainable", "oov_row", "name", "training")
    return {key: [getattr(one, name) for name in names] for key, one in model.items()}


def check_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: Any) -> None:
    """Rows to the bit, bags but for the order of sums."""
    bags = {"sum", "mean", "weighted", "offsets", "last", "tiered_bags"}
    assert got.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert got[name].dtype == rows.dtype and got[name].shape == rows.shape, (where, name)
        if name in bags:
            torch.testing.assert_close(got[name], rows, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got[name], rows), (where, name)


@pytest.mark.parametrize(("size", "kind"), [(2, "float32"), (4, "int8"), (4, "bfloat16")])
def test_lookups_are_those_of_whole_codes(size: int, kind: str, tmp_path) -> None:
    for rank, found in enumerate(processes.run(lookups_on_ranks, size, tmp_path, kind)):
        parts, whole = found.pop("bytes")
        assert parts <= whole / size + 16 * 20  # some bytes for each of the code tables
        for name, kind_of in found.pop("types").items():
            bag = name in ("sum", "mean", "max", "last", "tiered_bags")
            wanted = ShardedEmbeddingBag if bag else ShardedEmbedding
            assert kind_of is (CompressedEmbedding if name in WITHOUT_CODES else wanted), name
        got, wanted = found.pop("attributes")
        assert got == wanted
        got, wanted = found.pop("state")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
        got, wanted = found.pop("described")
        assert got == wanted
        assert found.pop("same") and found.pop("shared")
        for where, (got, wanted) in found.items():
            check_equal(got, wanted, (rank, where))


# --- training -----------------------------------------------------------------------------------


class Clicks(nn.Module):
    """Logits from some of the tables."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tables = tables(dtype)
        del self.tables["kept"]  # its own rows move with the order of sums
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 1)

    def forward(self, seed: int, size: int) -> torch.Tensor:
        """Logits (size,)."""
        total = self.layer.weight.new_zeros(size, 8)
        for number, (name, module) in enumerate(self.tables.items()):
            own = ids(module.num_embeddings, size, seed + number)
            if name == "last":
                rows = module(own.flatten(), torch.arange(0, 3 * size + 1, 3))
            else:
                rows = module(own)
            total = total + (rows if isinstance(module, DecodedBags) else rows.sum(1))
        return self.layer(total)[:, 0]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, size: int) -> float:
    optimizer.zero_grad()
    logits = model(seed, size)
    loss = (logits.tanh() - 0.5).square().sum()
    loss = loss + 1e-4 * embedding_penalty(model.module)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train(model: Clicks, make: Any, shard: bool) -> tuple[Any, ...]:
    """Steps before, while and after codes are in parts; every rank has batches of its own."""
    rank, world = dist.get_rank(), dist.group.WORLD
    optimizer = make(model.parameters())
    mec_embed.keep_row_steps(optimizer, model)
    losses = []
    for number, change in enumerate((None, shard_codes, None, gather_codes, None)):
        if change is not None and shard:
            change(*[model, world][: 2 if change is shard_codes else 1])
        if change is None:
            ddp = DistributedDataParallel(model)
            size = 0 if rank == 1 and number == 2 else 20 + 5 * rank
            losses += [step(ddp, optimizer, 100 * number + 10 * rank + i, size) for i in range(2)]
    return losses, dict(model.named_parameters())


def training_on_ranks() -> list[tuple[Any, Any]]:
    return [
        (train(Clicks(), make, True), train(Clicks(), make, False))
        for make in (
            lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
            lambda params: torch.optim.Adagrad(params, lr=0.05),
        )
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_training_is_that_of_whole_codes(size: int, tmp_path) -> None:
    ranks = processes.run(training_on_ranks, size, tmp_path)
    start = dict(Clicks().named_parameters())
    for found in ranks:
        for (losses, parameters), (wanted_losses, wanted) in found:
            assert losses == pytest.approx(wanted_losses, rel=1e-4)
            assert parameters.keys() == wanted.keys()
            for name, parameter in wanted.items():
                assert not torch.equal(parameter, start[name]), name
                torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-5)
    # All ranks have the same codebooks.
    for number, ((_, parameters), _) in enumerate(ranks[0]):
        for found in ranks[1:]:
            other = found[number][0][1]
            assert all(torch.equal(other[name], parameters[name]) for name in parameters)


# --- errors and what is refused -------------------------------------------------------------------


def raised(call: Any) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def small() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "user": table(("additive", 100, 8, 3, 20), torch.float32, name="user"),
            "tiers": tiered(
                TieredEmbedding,
                torch.arange(100) < 30,
                ("additive", 4, 20),
                ("additive", 1, 20),
                torch.float32,
                name="tiers",
            ),
        }
    )


def errors_on_ranks() -> dict[str, Any]:
    world, rank = dist.group.WORLD, dist.get_rank()
    found: dict[str, Any] = {}
    models = []

    def attempt(name: str, model: Any, group: Any = world) -> None:
        found[name] = raised(lambda: shard_codes(model, group))
        models.append(model)

    dense = nn.Sequential(nn.Embedding(9, 4))
    attempt("dense", dense)
    attempt("dense on rank 1", dense if rank else small())
    attempt("no module", 7)
    attempt("no group", small(), None)
    attempt("another group", small(), "world")
    attempt("wrapped", DistributedDataParallel(small()))
    codes, books = small(), small()
    codes["user"].codes[3] ^= rank
    attempt("codes", codes)
    books["tiers"].tail.codebooks.data[0, 0, 0] += rank
    attempt("codebooks", books)
    layouts = small()
    if rank:
        layouts["user"] = table(("additive", 101, 8, 3, 20), torch.float32)
    attempt("layouts", layouts)
    found["unchanged"] = not any(
        isinstance(module, CodePart)
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
    )
    found["whole"] = raised(lambda: gather_codes(small()))
    return found


ERRORS = {
    "dense": "ValueError: the model holds no compressed table with codes; call compress() first",
    "no module": "TypeError: model must be an nn.Module, got int",
    "no group": "ValueError: process_group must be a group of torch.distributed, got None",
    "another group": "ValueError: process_group must be a group that this process is in",
    "wrapped": "ValueError: model is a DistributedDataParallel",
    "codes": "ValueError: ranks differ in the codes and codebooks of table 'user': rank 0 has",
    "codebooks": "ValueError: ranks differ in the codes and codebooks of table 'tiers': rank 0",
    "layouts": "ValueError: ranks differ in the layout of table 'user': rank 0 has {'kind'",
    "whole": "ValueError: the model holds no codes in parts; nothing to gather",
}


def test_errors_are_raised_by_all_and_change_nothing(tmp_path) -> None:
    for rank, found in enumerate(processes.run(errors_on_ranks, 2, tmp_path)):
        assert found.pop("unchanged")
        told = found.pop("dense on rank 1")
        assert told.startswith(f"ValueError: {'' if rank else 'rank 1: '}the model holds no"), told
        assert found.keys() == ERRORS.keys()
        for name, message in ERRORS.items():
            assert found[name].startswith(message), (name, found[name])


def bad_ids_on_ranks() -> dict[str, Any]:
    rank, model = dist.get_rank(), small()
    shard_codes(model, dist.group.WORLD)
    good, found = torch.tensor([1, 99]), {}
    cases = {
        "high": torch.tensor([5, 100]),
        "low": torch.tensor([-1]),
        "empty float": torch.tensor([]),
        "meta": torch.tensor([1], device="meta"),
        "list": [1, 2],
    }
    for name in model:
        for case, bad in cases.items():
            found[f"{name} {case}"] = raised(lambda b=bad, m=model[name]: m(b if rank else good))
    bags = Holder().bags
    shard_codes(nn.Sequential(held := nn.ModuleDict({"bags": bags})), dist.group.WORLD)
    starts = torch.tensor([0, 1])
    for case, given in {
        "falling": (torch.arange(3), torch.tensor([0, 2, 1])),
        "offsets": (good, [0, 1]),
        "list": ([1, 2], starts),
        "shape": (good, starts[None]),
        "late": (good, starts + 1),
        "long": (good, starts * 3),
        "weights": (good, starts, torch.ones(3)),
        "mode": (good, starts, torch.ones(2)),
    }.items():
        given = given if rank else (good, starts)
        found[f"bags {case}"] = raised(lambda given=given: held["bags"](*given))
    wanted, again = small(), {name: module(good) for name, module in model.items()}
    found["after"] = all(torch.equal(again[name], wanted[name](good)) for name in wanted)
    return found


def test_bad_ids_of_one_rank_are_an_error_on_all(tmp_path) -> None:
    first, second = processes.run(bad_ids_on_ranks, 2, tmp_path)
    assert first.pop("after") and second.pop("after")
    for name in ("user", "tiers"):
        heard = f"RuntimeError: table {name!r}: rank 1 has raised an error for the ids"
        own = {
            "high": f"IndexError: table {name!r}: id 100 is out of range, expected 0..99",
            "low": f"IndexError: table {name!r}: id -1 is out of range, expected 0..99",
            "empty float": f"TypeError: table {name!r}: ids must be int32 or int64, got",
            "meta": f"ValueError: table {name!r}: ids are on meta, expected cpu",
            "list": f"TypeError: table {name!r}: ids must be a tensor, got list",
        }
        for case, message in own.items():
            assert first.pop(f"{name} {case}").startswith(heard)
            assert second.pop(f"{name} {case}").startswith(message)
    for case, message in {
        "falling": "ValueError: table 'embedding': offsets go from 2 to 1 at bag 1",
        "offsets": "TypeError: table 'embedding': offsets must be a tensor, got list",
        "list": "TypeError: table 'embedding': ids must be a tensor, got list",
        "shape": "ValueError: offsets has to be a 1D Tensor",
        "late": "RuntimeError: offsets[0] has to be 0",
        "long": "RuntimeError: offsets[-1] can not be greater than input's length 2",
        "weights": "ValueError: embedding_bag: If per_sample_weights (torch.Size([3]))",
        "mode": "NotImplementedError: embedding_bag: per_sample_weights was not None",
    }.items():
        assert first.pop(f"bags {case}").startswith("RuntimeError: table 'embedding': rank 1 has")
        assert second.pop(f"bags {case}").startswith(message)
    assert not first and not second


@pytest.fixture
def one_rank(tmp_path):
    """This process as the only rank."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = small()["user"]
        self.bags = table(("additive", 100, 8, 3, 20), torch.float32, CompressedEmbeddingBag)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Sums (batch,) of rows of ids (batch, n)."""
        return self.items(ids).sum((1, 2))


def test_what_needs_all_codes_says_so(one_rank, tmp_path) -> None:
    model, rows = Holder(), torch.zeros(1, 8)
    shard_codes(model, one_rank)
    batch = torch.tensor([[1, 2]])
    replicated = distribute_tensor(batch, init_device_mesh("cpu", (1,)), [Replicate()])
    calls = {
        "save": lambda: mec_embed.save(model, tmp_path / "model.safetensors"),
        "load": lambda: mec_embed.load(model, tmp_path / "model.safetensors"),
        "decompress": lambda: mec_embed.decompress(model),
        "compress": lambda: mec_embed.compress(model, None),
        "plan": lambda: mec_embed.plan(model, None),
        "start_from": lambda: mec_embed.compress(
            nn.Sequential(nn.Embedding(100, 8)), None, start_from=model
        ),
        "distill": lambda: mec_embed.distill(model, Holder(), [batch], progress=False),
        "extend": lambda: mec_embed.extend(model.items, rows),
        "extend a part": lambda: mec_embed.extend(model.items.local, rows),
        "update": lambda: mec_embed.update(model.items, torch.tensor([3]), rows),
        "drift": lambda: mec_embed.drift(model.items, rows, 0.1),
        "again": lambda: shard_codes(model, one_rank),
        "DTensor": lambda: model.items(replicated),
        "DTensor in bags": lambda: model.bags(replicated),
        "export": lambda: torch.export.export(model, (batch,)),
        "pickle": lambda: pickle.dumps(model),
    }
    for name, call in calls.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"gather_codes\(model\) f"):
            call()
        assert isinstance(model.items, ShardedEmbedding), name
    state = model.state_dict()
    part = state["items.local.code_table._extra_state"]
    part["codes"] = part["codes"][:-1]
    with pytest.raises(ValueError, match="sharded over as many ranks"):
        model.load_state_dict(state)
    gather_codes(model)
    mec_embed.save(model, tmp_path / "model.safetensors")
    mec_embed.extend(model.items, rows)


def test_the_rest_of_the_model_goes_on(one_rank) -> None:
    """Hooks, attributes, mode, optimizers, dtypes and compiled models."""
    model, whole = Holder().eval(), Holder()
    optimizer = torch.optim.Adam(model.parameters())
    books, seen = model.items.codebooks, []
    model.items.register_forward_hook(lambda *_: seen.append(1))
    model.items.note = "mine"
    batch = torch.tensor([[1, 2], [99, 2]])
    model(batch).sum().backward()
    optimizer.step()
    state = optimizer.state[books]
    seen.clear()
    shard_codes(model, one_rank)
    assert not model.items.training and model.items.note == "mine"
    assert next(model.parameters()) is books and optimizer.state[books] is state
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(batch), model(batch))
    assert len(seen) == 2
    model.items.later = 3
    assert model.half()(batch).dtype is torch.float16
    gather_codes(model.float())
    assert type(model.items) is CompressedEmbedding and not model.items.training
    assert model.items.note == "mine" and model.items.later == 3
    assert not {"exchange", "parts"} & vars(model.items).keys()
    assert isinstance(model.items, DecodedTable)
    assert torch.equal(model.items.codes, whole.items.codes)
    model(batch)
    assert len(seen) == 4
