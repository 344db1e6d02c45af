"""Several processes compress as one does; what one of them raises, all raise; none waits for ever.

Functions that end in ``_on_ranks`` run in each of some processes that gloo connects.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mec_embed
from mec_embed import CompressionConfig, FrequencyStats, decompress, keep_row_steps, save
from mec_embed import outcome as outcomes
from mec_embed.learning import fit
from mec_embed.ranks import ALONE, Ranks

pytestmark = pytest.mark.slow

COMPRESS = sys.modules["mec_embed.compress"]
#: Where functions are called from that tests let fail.
HOMES = {"fit_codes": outcomes, "replace_modules": COMPRESS}
CONFIG = CompressionConfig(ratio=40, epochs=0)
FAST = CompressionConfig(num_subvectors=2, codebook_size=8, epochs=0)
#: In tiers and parts that begin within a byte.
ROWS = {"users": 3003, "bags": 2001, "items": 9001}


class Model(nn.Module):
    """Tables with a first-order table, padding and bags, and a layer on top."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(0)
        self.users = nn.Embedding(ROWS["users"], 16, padding_idx=0)
        self.bags = nn.EmbeddingBag(ROWS["bags"], 16)
        self.items = nn.Embedding(ROWS["items"], 8)
        self.first_order = nn.Embedding(ROWS["users"], 1)
        self.layer = nn.Linear(16, 1)
        with torch.no_grad():
            for table in (self.users, self.bags, self.items):
                rows, dim = table.weight.shape
                low_rank = torch.randn(rows, 3, generator=rng) @ torch.randn(3, dim, generator=rng)
                table.weight.mul_(0.3).add_(low_rank)
            self.users.weight[0] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch,) of ids (batch,)."""
        together = self.users(ids) + self.bags(ids[:, None])
        return (self.layer(together) + self.first_order(ids)).squeeze(1)


def counts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = ROWS | {"first_order": ROWS["users"]}
    popular = {name: rng.zipf(1.3, rows[name]).clip(0, 5000) for name in ROWS}
    popular["first_order"] = popular["users"]
    return {name: np.asarray(values, np.float64) for name, values in popular.items()}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2000, (64,), generator=generator) for _ in range(8)]


def sharded(model: nn.Module, mesh=None, placements=None) -> nn.Module:
    """The model with all tables but ``bags`` and ``a`` by rows over the ranks, or as placed."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for name, table in model.named_children():
        if name not in ("bags", "a", "layer"):
            placed = distribute_tensor(table.weight, mesh, placements or [Shard(0)])
            table.weight = nn.Parameter(placed)
    return model


def run(model: nn.Module, config: CompressionConfig = CONFIG, stats=None, **options):
    stats = counts() if stats is None else stats
    return mec_embed.compress(model, stats, config, progress=False, **options)


def outcome(model: nn.Module, config: CompressionConfig = CONFIG, stats=None, **options) -> tuple:
    """Everything that must not depend on the number of ranks."""
    report = run(model, config, stats, **options)
    errors = {table.name: table.weighted_error for table in report.tables}
    layouts = {table.name: (table.layout, table.bytes_after) for table in report.tables}
    return dict(model.state_dict()), layouts, errors


def small(rows: int = 200) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Embedding(300, 8), "b": nn.Embedding(rows, 8)})


#: What their layouts show -> model, its configuration and counts.
CASES = {
    "| one row": (Model, CONFIG, counts),
    "rows float16": (small, CompressionConfig(ratio=1.9, codebook_dtype="float16"), dict),
}


# --- the same result ---------------------------------------------------------------------------


def retrained() -> Model:
    """Other rows than before, one of them not finite."""
    model = Model()
    with torch.no_grad():
        model.users.weight[1:] += 0.01 * torch.randn(model.users.weight[1:].shape)
        model.items.weight[ROWS["items"] - 1] = float("nan")
    return model


def again(make=lambda model: model, **options) -> tuple:
    """The codes of a retrained model that starts from those of the first."""
    first = Model()
    run(first)
    config = replace(CONFIG, nonfinite="zero")
    return outcome(make(retrained()), config, start_from=first, **options)


def compress_on_ranks():
    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    fit.CHUNK_ROWS = 1 << 10  # so that a part has several
    found = {}
    for kind, (make, config, stats) in CASES.items():
        found[kind] = outcome(make(), config, stats(), process_group=world)
        found[f"{kind}, sharded"] = outcome(sharded(make()), config, stats(), process_group=world)
    found["again"] = again(process_group=world)
    found["again, sharded"] = again(sharded, process_group=world)
    part = FrequencyStats({name: np.floor(c / size) for name, c in counts().items()})
    planned = mec_embed.plan(sharded(Model()), counts(), CONFIG, process_group=world)
    own = batches()[rank::size]
    found["batches"] = outcome(Model(), process_group=world, batches=own)
    # The first rank has one more than it is asked for.
    more = [*own, batches()[0]] if rank == 0 else own
    model = sharded(Model())
    found["batches, sharded"] = outcome(model, process_group=world, batches=more)
    # A table that stays as it is has to be looked up in, sharded as it is.
    most, config = [], replace(FAST, exclude=("users",))
    for model in (Model(), sharded(Model())):
        most.append(outcome(model, config, process_group=world, batches=own)[1:])
    found["one stays"] = most
    return found, {
        "planned": planned.bytes_after,
        "added": {name: part.all_reduce(world)[name] for name in part},
    }


@pytest.fixture(scope="module")
def of_one():
    found = {
        kind: outcome(make(), config, stats()) for kind, (make, config, stats) in CASES.items()
    }
    found["again"] = again()
    return found, outcome(Model(), batches=batches())


def check_equal(outcomes: list[tuple], expected: tuple) -> None:
    """The outcomes of all ranks are the same, and that of one process but for rounding."""
    state, layouts, errors = expected
    for got, got_layouts, got_errors in outcomes:
        assert got_layouts == layouts
        assert got_errors == pytest.approx(errors, rel=1e-6)
        assert got.keys() == state.keys()
        for key, tensor in state.items():
            # Rows as near to two codewords may take either, but the same on all ranks.
            assert torch.equal(got[key], outcomes[0][0][key]), key
            if tensor.dtype is torch.uint8:
                assert (got[key] != tensor).sum() <= 1e-3 * len(tensor), key
            else:
                torch.testing.assert_close(got[key], tensor)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_what_one_gives(size, tmp_path, of_one):
    ranks = processes.run(compress_on_ranks, size, tmp_path)
    for kind, (state, layouts, errors) in of_one[0].items():
        assert kind == "again" or any(kind in layout for layout, _ in layouts.values()), layouts
        for name in (kind, f"{kind}, sharded"):
            check_equal([of_rank[name] for of_rank, _ in ranks], (state, layouts, errors))
    # Gradients get other random signs on other ranks.
    whole, parted = ([of_rank[k] for of_rank, _ in ranks] for k in ("batches", "batches, sharded"))
    check_equal(parted, whole[0])
    for of_rank, _ in ranks:
        (layouts, errors), (other, others) = of_rank["one stays"]
        assert layouts == other and errors == pytest.approx(others)
    for _, layouts, errors in whole:
        assert layouts == of_one[1][1]
        assert errors == pytest.approx(of_one[1][2], rel=1e-3)
    for _, told in ranks:
        assert told["planned"] == sum(nbytes for _, nbytes in of_one[0]["| one row"][1].values())
        for name, each in counts().items():
            np.testing.assert_array_equal(told["added"][name], np.floor(each / size) * size)


#: On a mesh of 2 x 2 processes.
PLACED = {
    "copies of shards": (Replicate(), Shard(0)),
    "shards of copies": (Shard(0), Replicate()),
    "shards of shards": (Shard(0), Shard(0)),
    "copies": (Replicate(), Replicate()),
}
COLUMNS = {
    "copies of columns": (Replicate(), Shard(1)),
    "rows of columns": (Shard(1), Shard(0)),
    "columns of rows": (Shard(0), Shard(1)),
    "columns of columns": (Shard(1), Shard(1)),
}


def placed_on_ranks():
    """What meshes of two dimensions give, to all of their ranks or to one set of shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    world, found = dist.group.WORLD, {}
    for name, placements in PLACED.items():
        model = sharded(Model(), mesh, placements)
        found[name] = outcome(model, process_group=world)
    copies = PLACED["copies of shards"]
    groups = {name: mesh.get_group(name) for name in ("copy", "shard")}
    found["one set"] = outcome(sharded(Model(), mesh, copies), process_group=groups["shard"])
    for name, placements in COLUMNS.items():
        found[name] = outcome(sharded(small(), mesh, placements), FAST, {}, process_group=world)
    alone = sharded(small(), mesh, PLACED["copies"])
    found["alone"] = outcome(alone, FAST, {})

    def refused(model, group):
        return raised(lambda: run(model, FAST, {}, process_group=group))

    part_of = sharded(small(), mesh, copies)
    different = sharded(small(), mesh, copies)
    different["b"].weight.data.to_local()[5, 3] += dist.get_rank() == 3
    elsewhere = sharded(small(), DeviceMesh("cpu", [0, 1]))
    errors = [refused(part_of, groups["copy"])]
    return found, errors + [refused(model, world) for model in (different, elsewhere)]


def test_meshes_of_two_dimensions_give_what_one_process_gives(tmp_path, of_one):
    ranks = processes.run(placed_on_ranks, 4, tmp_path)
    for name in (*PLACED, "one set"):
        check_equal([found[name] for found, _ in ranks], of_one[0]["| one row"])
    of_small = outcome(small(), FAST, {})
    for name in ("alone", *COLUMNS):
        check_equal([found[name] for found, _ in ranks], of_small)
    for rank, (_, (part_of, different, elsewhere)) in enumerate(ranks):
        rows = "[(0, 100)]" if rank % 2 == 0 else "[(100, 200)]"
        assert part_of.startswith(f"ValueError: table 'b': the ranks hold the rows {rows}, expec")
        assert different.startswith("ValueError: ranks differ in the rows 100 to 200 of table 'b'")
        assert "table 'b' is a DTensor on DeviceMesh((2,)" in elsewhere
        assert "which this process is not in" in elsewhere


# --- fully_shard -------------------------------------------------------------------------------


class Small(nn.Module):
    """Tables of which the second rank has a part, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(301, 8)
        self.one, self.other = nn.Embedding(1, 8), nn.Embedding(1, 8)
        self.layer = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch,) of ids (batch,)."""
        return self.layer(self.items(ids) + self.one(0 * ids) + self.other(0 * ids)).sum(1)


def fully_sharded_on_ranks():
    """Why tables are skipped; then the way round it, which docs/distributed.md shows."""
    world, found, tables = dist.group.WORLD, {}, (nn.Embedding, nn.EmbeddingBag)
    model = Small()
    fully_shard(model.items)
    fully_shard(model)
    refused = [raised(lambda: run(model, FAST, {}, process_group=world))]
    model(IDS[0])
    refused.append(raised(lambda: run(model, FAST, {}, process_group=world)))

    names = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, tables)}
    state = {k: v if k in names else v.full_tensor() for k, v in model.state_dict().items()}
    with torch.device("meta"):
        plain = Small()
    plain.load_state_dict(state, assign=True)
    report = run(plain, FAST, {}, process_group=world)
    for module in plain.modules():
        if isinstance(module, tables):
            module.weight = nn.Parameter(module.weight.full_tensor())

    alone, by_rows = Small(), sharded(Small())
    for table in (by_rows.one, by_rows.other):  # on rank 1, memory of no bytes
        held = table.weight.to_local().detach().clone()
        shape = {"shape": torch.Size([1, 8]), "stride": (8, 1)}
        mesh, placed = table.weight.device_mesh, table.weight.placements
        table.weight = nn.Parameter(DTensor.from_local(held, mesh, placed, **shape))
    run(by_rows, FAST, {}, process_group=world)
    found["by rows"] = by_rows.items.codes, plain.items.codes
    reports = [report, run(alone, FAST, {})]
    found["errors"] = [[table.weighted_error for table in one.tables] for one in reports]
    found["bytes"] = [[table.bytes_after for table in one.tables] for one in reports]
    found["states"] = [copy.deepcopy(dict(one.state_dict())) for one in (plain, alone)]
    fully_shard(plain)
    for one in (plain, alone):
        optimizer = torch.optim.Adam(one.parameters(), weight_decay=0.1)
        keep_row_steps(optimizer, one)
        one(IDS[0]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found["trained"] = [plain(IDS[0]), alone(IDS[0])]
    parts = [raised(lambda: save(plain, "none.safetensors")), raised(lambda: decompress(plain))]
    return refused, found, parts


def test_fully_sharded_tables_are_compressed_in_a_plain_model(tmp_path):
    for refused, found, parts in processes.run(fully_sharded_on_ranks, 2, tmp_path):
        assert all("codebook" in text and "load the full_tensor()" in text for text in parts)
        for message in refused:
            assert "items (301 x 8): fully_shard (FSDP2) holds its weight" in message
        for got, expected in found.values():
            torch.testing.assert_close(got, expected)


# --- what is measured --------------------------------------------------------------------------


class Scaled(nn.Embedding):
    """Looks up ids of any size, and in a DTensor as well."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Other rows than those of the table."""
        weight = self.weight.full_tensor() if isinstance(self.weight, DTensor) else self.weight
        return 3 * nn.functional.embedding(ids % len(weight), weight)


def scaled() -> nn.ModuleDict:
    model = small()
    model["b"] = Scaled(200, 8, _weight=model["b"].weight.detach())
    return model


def with_a_forward() -> nn.ModuleDict:
    model = small()
    model["b"].forward = lambda ids: Scaled.forward(model["b"], ids)
    return model


def by_rows(model: nn.ModuleDict) -> None:
    """Its table ``b`` is given ids as DTensors."""
    parallelize_module(
        model,
        init_device_mesh("cpu", (2,)),
        {"b": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())},
    )


#: Models, and ways to shard a table that stays as it is.
STAYING = {
    "with a forward": (with_a_forward, sharded),
    "subclass": (scaled, sharded),
    "hooks": (small, by_rows),
    "fully_shard": (small, lambda model: fully_shard(model["b"])),
}


def measured_on_ranks():
    """Traces of what is measured, with a table that stays, whole and sharded."""
    found, comparable = {}, COMPRESS.comparable
    ids = torch.arange(250).view(10, 25)
    for kind, (make, shard) in STAYING.items():
        for parted in (False, True):
            model, own = make(), ids % 200 if make is small else ids
            if parted:
                shard(model)
            # Rank 1 has one more than it is asked for, where ranks run the model at once.
            some = [own] * (1 + (dist.get_rank() if parted else 0))
            traces = found.setdefault(kind, [])
            COMPRESS.comparable = lambda tables, matrices, traces=traces: (
                traces.extend(matrix.trace() for matrix in matrices) or comparable(tables, matrices)
            )
            run(
                model,
                replace(FAST, exclude=("b",)),
                {},
                process_group=dist.group.WORLD,
                batches=some,
                forward=lambda model, ids: (model["a"](ids) * model["b"](ids)).sum((1, 2)) / 9,
            )
            assert ("forward" in vars(model["b"])) is (kind == "with a forward")
    COMPRESS.comparable = comparable
    return found


def test_sharded_tables_with_a_way_of_their_own_keep_it(tmp_path):
    timeout = timedelta(seconds=30)
    for found in processes.run(measured_on_ranks, 2, tmp_path, timeout=timeout):
        assert found.keys() == STAYING.keys()
        for whole, parted in found.values():
            assert parted == pytest.approx(whole)


# --- ids that come as DTensors -----------------------------------------------------------------

#: How tables are sharded and give rows out, and the part of all rows that a rank then has.
OUTPUTS = {
    "whole": (RowwiseParallel, Replicate(), lambda rows, rank: rows),
    "ids": (RowwiseParallel, Shard(1), lambda rows, rank: rows.chunk(2, 1)[rank]),
    "columns": (RowwiseParallel, Shard(-1), lambda rows, rank: rows.chunk(2, -1)[rank]),
    "by columns": (ColwiseParallel, Shard(-1), lambda rows, rank: rows.chunk(2, -1)[rank]),
}
PARALLEL = ("users", "items")
IDS = torch.arange(60).view(10, 6)


def squares(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (batch,) that depend on two tables."""
    return sum(model.get_submodule(name)(ids).square().sum((1, 2)) for name in PARALLEL) / 500


def parallel_on_ranks():
    """What tables give that were parallel, and what they are to give, by kind of output."""
    mesh, rank, found = init_device_mesh("cpu", (2,)), dist.get_rank(), {}
    for kind, (make, output, part) in OUTPUTS.items():
        style = make(input_layouts=Replicate(), output_layouts=output)
        model = parallelize_module(Model(), mesh, dict.fromkeys(PARALLEL, style))
        stats = FrequencyStats.from_batches(model, [IDS], forward=lambda m, ids: m.items(ids))
        found[f"{kind}, counted"] = stats["items"].sum(), 60.0
        optimizer, alone = torch.optim.Adam(model.parameters()), Model()
        options = {}
        if kind == "whole":  # with parts of rows, a rank would not make the logits of all
            options = {"batches": [IDS, IDS[:4]], "forward": squares}
            # Tables that are sharded differently do not share codes.
            options["config"] = replace(CONFIG, exclude=("first_order",))
        run(model, optimizer=optimizer, process_group=dist.group.WORLD, **options)
        one = torch.optim.Adam(alone.parameters())
        run(alone, optimizer=one, **options)
        alone.load_state_dict(model.state_dict())
        compiled = torch.compile(model.items, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            expected = part(alone.items(IDS), rank)
            found[f"{kind}, watched by nothing"] = model.items(IDS), expected
            found[f"{kind}, compiled"] = compiled(IDS), expected
        state = copy.deepcopy(dict(model.state_dict()))
        message = raised(lambda model=model: decompress(model))
        found[f"{kind}, decompress is refused"] = (
            torch.tensor("'users' has a hook of parallelize_module" in message),
            torch.tensor(True),
        )
        found[f"{kind}, and nothing changed"] = copy.deepcopy(dict(model.state_dict())), state
        whole, parts = trained(alone, one), trained(model, optimizer)
        for name in PARALLEL:
            found[f"{kind}, rows of {name}"] = parts.pop(name), part(whole.pop(name), rank)
        found[f"{kind}, gradients and one step"] = parts, whole
    return found


def trained(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Rows of ``PARALLEL``; gradients and values of all parameters after a step."""
    rows = {name: model.get_submodule(name)(IDS) for name in PARALLEL}
    sum(values.square().sum() for values in rows.values()).backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    grads = {f"{name} grad": p.grad for name, p in parameters.items() if p.grad is not None}
    return {name: value.detach() for name, value in (rows | grads | parameters).items()}


def test_parallel_tables_look_up_and_train_as_plain_ones(tmp_path):
    first, second = processes.run(parallel_on_ranks, 2, tmp_path)
    for found in (first, second):
        for kind, (got, expected) in found.items():
            torch.testing.assert_close(got, expected, msg=lambda text, kind=kind: f"{kind}: {text}")
    for kind in OUTPUTS:
        after, other = (found[f"{kind}, gradients and one step"][0] for found in (first, second))
        assert any(name.startswith("users") and name.endswith("grad") for name in after)
        torch.testing.assert_close(after, other, rtol=0, atol=0)


def dtensors_on_ranks():
    """What bags make of DTensors, and what is refused."""
    mesh, rank, found = init_device_mesh("cpu", (2,)), dist.get_rank(), {}

    def placed(values, placement):
        return DTensor.from_local(values, mesh, [placement], run_check=False)

    torch.manual_seed(0)
    tables = {"bags": nn.EmbeddingBag(300, 8, mode="sum"), "rows": nn.Embedding(300, 8)}
    model = nn.ModuleDict(tables)
    run(model, FAST, {})
    bags, rows = model["bags"], model["rows"]
    ids, offsets = IDS.view(-1), torch.arange(0, 60, 7)
    weights = torch.linspace(1, 2, 60, requires_grad=True)
    with torch.no_grad():
        expected = bags(ids, offsets)
    for name, call in {
        "ids": (placed(ids, Replicate()), offsets),
        "offsets": (ids, placed(offsets, Replicate())),
    }.items():
        out = bags(*call)
        found[name] = out.placements == (Replicate(),) and torch.equal(out.to_local(), expected)
    gradients = []
    for place in (lambda values: values, lambda values: placed(values, Replicate())):
        out = bags(place(ids), place(offsets), place(weights))
        # The sum of what each rank makes of its columns is that of all.
        out = out.redistribute(mesh, [Shard(1)]).to_local() if type(out) is DTensor else out
        gradients.append(torch.autograd.grad(out.square().sum(), (weights, bags.codebooks)))
    for name, plain, got in zip(("weights", "codebooks"), *gradients, strict=True):
        found[f"gradients of {name}"] = torch.allclose(plain, got)
    part = placed(ids.chunk(2)[rank], Shard(0))
    found["refused"] = [raised(lambda table=table: table(part)) for table in (bags, rows)]
    return found


def test_dtensors_that_every_rank_has_are_looked_up(tmp_path):
    for found in processes.run(dtensors_on_ranks, 2, tmp_path):
        for name, message in zip(("bags", "rows"), found.pop("refused"), strict=True):
            assert message.startswith(
                f"ValueError: table {name!r}: ids are a DTensor placed as (Shard(dim=0),), "
                "expected Replicate() on every dimension of its mesh"
            )
        assert all(found.values()), found


# --- errors of one rank ------------------------------------------------------------------------


def raised(call) -> str:
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fails_on_rank_1(name: str, error: BaseException):
    """Stands in for a function of the package, and fails on rank 1."""
    original = getattr(HOMES[name], name)

    def stand_in(*args, **options):
        if dist.get_rank() == 1:
            raise error
        return original(*args, **options)

    return stand_in


def errors_on_ranks():
    world, rank = dist.group.WORLD, dist.get_rank()
    found, models = {}, {}

    def attempt(name, model, config=FAST, stats=None, **options):
        models[name] = model
        options = {"process_group": world, "progress": False} | options
        found[name] = raised(lambda: mec_embed.compress(model, stats, config, **options))

    attempt("shape", small(200 + rank))
    attempt("config", small(), CompressionConfig(num_subvectors=2 + rank, codebook_size=8))
    attempt("counts", small(), stats={"b": np.full(200, 1.0 + rank)})
    attempt("one without counts", small(), stats={"b": np.ones(200)} if rank else None)
    attempt("unknown counts", small(), stats={"c": np.ones(200)} if rank else None)
    model = small()
    model["b"].weight.data[7, 3] += rank
    attempt("values", model)
    model = small()
    model["b"].weight.data[150, 3] = float("nan")  # rank 1 has the second half of the rows
    attempt("NaN", model)
    parted = sharded(small())
    attempt("no group", parted, process_group=None)
    options = {"forward": lambda model, ids: model["b"](ids).sum(1)}
    few = [] if rank else [torch.tensor([1])]
    attempt("no batches", parted, batches=few, **options)
    bad = torch.tensor([[1, 2], [5, 200]][rank])
    attempt("ids", parted, batches=[bad], **options)
    stays, some = replace(FAST, exclude=("b",)), [torch.tensor([1])] if rank else None
    attempt("batches of one", sharded(small()), stays, batches=some, **options)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    attempt("another group", parted, process_group=alone)
    placed, mesh = small(), init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(placed["b"].weight.detach(), mesh, [Partial()])
    placed["b"].weight = nn.Parameter(partial)
    attempt("placement", placed)
    for name, error in (
        ("fit_codes", MemoryError("no room")),
        ("fit_codes", KeyboardInterrupt()),
        ("fit_codes", OSError("disk")),
        ("replace_modules", ValueError("cannot replace")),
    ):
        original = getattr(HOMES[name], name)
        setattr(HOMES[name], name, fails_on_rank_1(name, error))
        attempt(f"{name} {type(error).__name__}", small())
        setattr(HOMES[name], name, original)
    stats = FrequencyStats.from_counts({"a": np.ones(3 + rank)})
    found["adding"] = raised(lambda: stats.all_reduce(world))
    found["changed"] = [
        name
        for name, model in models.items()
        if any(type(m) is not nn.Embedding or "forward" in vars(m) for m in model.values())
    ]
    # And the ranks can still work together.
    attempt("in the end", small())
    return found


ERRORS = {
    "shape": "ValueError: ranks differ in table 'b': rank 0 has 200 x 8 float32, rank 1 has "
    "201 x 8 float32",
    "config": "ValueError: ranks differ in config.num_subvectors: rank 0 has 2, rank 1 has 3;",
    "counts": "ValueError: ranks differ in the counts of table 'b': rank 0 has 200",
    "one without counts": "ValueError: ranks differ in the counts of table 'b': rank 0 has none",
    "values": "ValueError: ranks differ in the rows of table 'b'",
    "no batches": "ValueError: batches is empty on rank 1; give every rank some",
    "batches of one": "ValueError: ranks differ in whether batches are given: rank 0 has False",
    "no group": "ValueError: table 'b' is sharded over 2 processes",
    "another group": "ValueError: table 'b' is sharded over 2 processes",
    "placement": "ValueError: table 'b' is a DTensor placed as (Partial(sum),), expected Shard()",
    "adding": "ValueError: ranks differ in table 'a': rank 0 has 3 rows, rank 1 has 4 rows",
}
#: What rank 1 raises, and what the other hears.
TOLD = {
    "unknown counts": ("ValueError: freq_stats names 'c'", "ValueError: rank 1: freq_stats names"),
    "NaN": ("ValueError: table 'b': row 150 holds NaN", "ValueError: rank 1: table 'b': row 150"),
    "ids": (
        "IndexError: table 'b': ids lie between 5 and 200, expected 0 to 199",
        "IndexError: rank 1: table 'b'",
    ),
    "fit_codes MemoryError": ("MemoryError: no room", "MemoryError: rank 1: no room"),
    "fit_codes KeyboardInterrupt": ("KeyboardInterrupt", "RuntimeError: rank 1: Keyboard"),
    "fit_codes OSError": ("OSError: disk", "RuntimeError: rank 1: disk"),
    "replace_modules ValueError": ("ValueError: cannot", "ValueError: rank 1: cannot replace"),
}


def test_an_error_of_one_rank_is_raised_by_all_and_changes_nothing(tmp_path):
    for rank, found in enumerate(processes.run(errors_on_ranks, 2, tmp_path)):
        assert found.pop("changed") == []
        assert found.pop("in the end") == "nothing"
        assert found.keys() == ERRORS.keys() | TOLD.keys()
        for name, message in ERRORS.items():
            assert found[name].startswith(message), (rank, name, found[name])
        for name, (own, heard) in TOLD.items():
            assert found[name].startswith(own if rank else heard), (rank, name, found[name])


def interrupted_on_ranks(folder, both):
    """Ctrl-C while rank 1 waits for rank 0, in each kind of exchange; or on both, as in a shell."""
    found, rank = [], dist.get_rank()
    for exchange, values in (("add", [torch.ones(2)]), ("tell", [1]), ("settle", [])):
        done = [folder / f"{exchange} {number}" for number in range(2)]
        dist.barrier()
        if rank or both:
            threading.Timer(0.5, interrupt, [done[rank]]).start()
        own = done[rank] if rank or both else None
        found.append(raised(lambda n=exchange, v=values, d=done, o=own: meet_late(n, v, d[1], o)))
    return found


def interrupt(done):
    os.kill(os.getpid(), signal.SIGINT)
    done.touch()


def meet_late(exchange, values, interrupted, own):
    """Rank 0 comes when rank 1 was interrupted; none leaves before it was, if it is to be."""
    try:
        with Ranks(dist.group.WORLD).guard() as ranks:
            while not ranks.rank and not interrupted.exists():
                time.sleep(0.05)
            getattr(ranks, exchange)(*values, "meeting")
    finally:
        while own is not None and not own.exists():
            time.sleep(0.05)
        time.sleep(0.2)


@pytest.mark.parametrize("both", [False, True])
def test_ctrl_c_in_an_exchange_leaves_no_rank_in_it(both, tmp_path):
    timeout = timedelta(seconds=30)
    arguments = tmp_path, both
    first, second = processes.run(interrupted_on_ranks, 2, tmp_path, *arguments, timeout=timeout)
    assert second == ["KeyboardInterrupt: "] * 3
    assert first == (second if both else ["RuntimeError: rank 1: KeyboardInterrupt"] * 3)


# --- groups that are not gloo's ----------------------------------------------------------------


def connections() -> int:
    """Open files and sockets of this process; the groups of torch.distributed where unknown."""
    folder = Path("/proc/self/fd")
    return (
        len(list(folder.iterdir())) if folder.exists() else len(dist.distributed_c10d._world.pg_map)
    )


def gloo_for_others_on_ranks():
    """Connections that are left over after calls that talk by a group of their own, by call."""
    dist.get_backend = lambda group=None: "nccl"
    world, rank, found = dist.group.WORLD, dist.get_rank(), {}
    part = dist.new_group([0, 1], backend="gloo")  # the third rank knows a group less
    counts = FrequencyStats.from_counts({"a": np.ones(300)})
    calls = {
        "compress": lambda: run(small(), FAST, {}, process_group=world),
        "plan": lambda: mec_embed.plan(small(), {}, FAST, process_group=world),
        "error": lambda: run(small(200 + rank), FAST, {}, process_group=world),
        "all_reduce": lambda: counts.all_reduce(world),
        "of some": lambda: rank < 2 and run(small(), FAST, {}, process_group=part),
    }
    raised(calls["compress"])  # faiss and others open files when they are first used
    for _ in range(2):
        for name, call in calls.items():
            before = connections()
            message = raised(call)
            gc.collect()
            found.setdefault(name, []).append((message[:25], connections() - before))
    return found


def test_no_group_is_left_over(tmp_path):
    for found in processes.run(gloo_for_others_on_ranks, 3, tmp_path):
        assert found.pop("error") == [("ValueError: ranks differ ", 0)] * 2
        assert all(each == [("nothing", 0)] * 2 for each in found.values()), found


# --- ranks that die or stall -------------------------------------------------------------------


def lost_on_ranks(told):
    """Rank 1 of a first pair keeps the other waiting; then rank 2 dies while it learns."""
    rank, found = dist.get_rank(), {}
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    learn = outcomes.fit_codes

    def stall(*args, **options):
        while rank == 1 and not told.exists():
            time.sleep(0.1)
        return learn(*args, **options)

    def die(*args, **options):
        if rank == 2:
            os._exit(0)
        return learn(*args, **options)

    for name, stand_in, group in (("stalls", stall, pair), ("dies", die, dist.group.WORLD)):
        if rank == 2 and group is pair:
            continue
        outcomes.fit_codes = stand_in
        model = small()
        message = raised(lambda m=model, g=group: run(m, FAST, stats={}, process_group=g))
        found[name] = message, all(type(module) is nn.Embedding for module in model.values())
        if rank == 0:
            told.touch()
    return found


def test_a_rank_that_dies_or_stalls_is_an_error_on_the_others(tmp_path):
    """Rank 1 goes on only when rank 0 has given up, so that no clock is needed."""
    timeout = timedelta(seconds=30)
    found = processes.run(lost_on_ranks, 3, tmp_path, tmp_path / "told", timeout=timeout)
    assert found[2] is None
    message, unchanged = found[0]["stalls"]
    assert message.startswith("RuntimeError: rank 0 lost the other ranks while ") and unchanged
    for rank in (0, 1):
        message, unchanged = found[rank]["dies"]
        assert message.startswith(f"RuntimeError: rank {rank} lost the other ranks"), message
        assert unchanged


# --- one process -------------------------------------------------------------------------------


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="init_process_group first"):
        run(small(), FAST, stats={}, process_group=object())


def test_one_rank_needs_nobody(tmp_path):
    values = torch.arange(3)
    assert ALONE.add(values, "x") is values and ALONE.merge(values, "x") is values
    assert ALONE.tell({"a": 1}, "x") == [{"a": 1}] and ALONE.part(7) == (0, 7)
    dist.init_process_group("gloo", f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    try:
        model = small()
        run(model, FAST, stats={}, process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="must be a group that this process is in"):
            Ranks(dist.GroupMember.NON_GROUP_MEMBER)
    finally:
        dist.destroy_process_group()
    assert type(model["a"]) is mec_embed.CompressedEmbedding
