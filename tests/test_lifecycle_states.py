"""Random sequences of what can be done with a compressed model, beside the rows it must give."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from mec_embed import (
    CompressionConfig,
    compress,
    decompress,
    distill,
    extend,
    keep_row_steps,
    load,
    save,
    update,
)
from mec_embed.modules import DecodedTable
from mec_embed.reader import Reader
from mec_embed.tables import find_replacements

#: Ids that all tables have.
IDS = torch.arange(60).view(20, 3) % 20
ROWS = {"item": 600, "first": 600, "tags": 300, "frozen": 200, "few": 20}


class Shop(nn.Module):
    """A table under two names, its first-order weights, bags, a frozen table and a small one."""

    def __init__(self, sparse: bool, rows: dict[str, int] = ROWS) -> None:
        super().__init__()
        self.item = nn.Embedding(rows["item"], 8, padding_idx=3, sparse=sparse)
        self.again = nn.ModuleList([self.item])
        self.first = nn.Embedding(rows["first"], 1, padding_idx=3, sparse=sparse)
        self.tags = nn.EmbeddingBag(rows["tags"], 8, mode="mean", padding_idx=0)
        self.frozen = nn.Embedding(rows["frozen"], 8)
        self.frozen.weight.requires_grad_(False)
        self.few = nn.Embedding(rows["few"], 8)
        self.out = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch,) of ids (batch, 3), of rows that every table has."""
        x = self.item(ids[:, 0]) + self.again[0](ids[:, 1]) + self.frozen(ids[:, 2])
        x = x + self.tags(ids) + self.few(ids[:, 0])
        return (self.out(x) + self.first(ids[:, 0]))[:, 0]


def counts(model: Shop) -> dict[str, np.ndarray]:
    rows = {name: model.get_submodule(name).num_embeddings for name in ROWS}
    return {name: (1e6 / np.arange(1, n + 1) ** 1.6).astype(int) for name, n in rows.items()}


CONFIGS = st.builds(
    CompressionConfig,
    ratio=st.sampled_from([4, 8, 12]),
    codebook_dtype=st.sampled_from([None, "bfloat16", "int8"]),
    codes=st.sampled_from(["additive", "product"]),
    tiers=st.booleans(),
    epochs=st.just(0),
)


def state_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of the state, in order."""
    return [(name, value.clone()) for name, value in model.state_dict().items()]


def assert_same_state(model: nn.Module, expected: list[tuple[str, Tensor]]) -> None:
    found = state_of(model)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


def nbytes(model: nn.Module) -> int:
    """Bytes of all tables of the model, each tensor once."""
    kinds = (DecodedTable, nn.Embedding, nn.EmbeddingBag)
    tables = [module for module in model.modules() if isinstance(module, kinds)]
    held = {id(t): t.nbytes for table in tables for t in [*table.parameters(), *table.buffers()]}
    return sum(held.values())


def wrong_calls(table: DecodedTable, rows: int, dim: int) -> list[Callable[[], object]]:
    return [
        partial(table, torch.tensor([[0, rows]])),
        partial(table, torch.tensor([[-1]])),
        partial(update, table, torch.tensor([rows]), torch.zeros(1, dim)),
        partial(extend, table, torch.full((1, dim), torch.nan)),
    ]


class Lifecycle(RuleBasedStateMachine):
    """The model, the dense rows that it stands for, and what no operation may change."""

    @initialize(config=CONFIGS, sparse=st.booleans(), seed=st.integers(0, 99))
    def begin(self, config: CompressionConfig, sparse: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.sparse, self.model = sparse, Shop(sparse)
        self.dense = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.compress(config)

    def compress(self, config: CompressionConfig, **more: Any) -> None:
        more |= {"optimizer": self.optimizer, "progress": False}
        report = compress(self.model, counts(self.model), config, **more)
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in self.model.parameters())
        assert report.bytes_after == nbytes(self.model)
        self.note_rows()
        self.flags = self.found_flags()

    def note_rows(self) -> None:
        self.rows = {table: table.dequantize() for table in self.tables()}

    def found_flags(self) -> Any:
        modules, parameters = self.model.named_modules(), self.model.named_parameters()
        modes = [(name, m.training, getattr(m, "sparse", None)) for name, m in modules]
        return modes, [(name, p.requires_grad, p.dtype) for name, p in parameters]

    def tables(self) -> list[DecodedTable]:
        return [table for table, _ in find_replacements(self.model)]

    def go_on_with(self, model: Shop) -> None:
        """A model that must be the same takes the place of the one there was."""
        assert_same_state(model, state_of(self.model))
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        keep_row_steps(self.optimizer, model)
        self.note_rows()

    def sharing(self, number: int) -> list[DecodedTable]:
        """A table, and those that share its codes."""
        tables = self.tables()
        codes = [id(getattr(table, "head", table).codes) for table in tables]
        mine = codes[number % len(tables)]
        return [table for table, own in zip(tables, codes, strict=True) if own == mine]

    @rule()
    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(IDS).square().mean().backward()
        self.optimizer.step()
        self.note_rows()

    @rule()
    def train_by_distilling(self) -> None:
        names = list(self.model.state_dict())
        distill(self.model, self.dense, [IDS, IDS], epochs=1, progress=False)
        assert list(self.model.state_dict()) == names
        self.note_rows()

    @rule(number=st.integers(0, 9), size=st.integers(0, 20))
    def change_rows(self, number: int, size: int) -> None:
        shared = self.sharing(number)
        ids = torch.randperm(shared[0].num_embeddings)[:size]
        try:
            update(shared, ids, [torch.randn(len(ids), table.embedding_dim) for table in shared])
        except ValueError as error:
            assert "stored as one row" in str(error)
        else:
            for table in shared:
                self.rows[table][ids] = table.dequantize()[ids]

    @rule(number=st.integers(0, 9), size=st.integers(0, 20), popular=st.booleans())
    def append_rows(self, number: int, size: int, popular: bool) -> None:
        shared = self.sharing(number)
        rows = [torch.randn(size, table.embedding_dim) for table in shared]
        try:
            extend(shared, rows, popular=popular, optimizer=self.optimizer)
        except ValueError as error:
            assert "stored as one" in str(error)
        else:
            for table in shared:
                before = len(self.rows[table])
                self.rows[table] = torch.cat([self.rows[table], table.dequantize()[before:]])

    @rule(name=st.sampled_from(["item", "tags", "frozen"]))
    def freeze_or_thaw(self, name: str) -> None:
        for parameter in self.model.get_submodule(name).parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        self.flags = self.found_flags()

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy_model(self, how: Callable[[Shop], Shop]) -> None:
        self.go_on_with(how(self.model))

    @rule()
    def save_and_load(self) -> None:
        rows = {name: self.model.get_submodule(name).num_embeddings for name in ROWS}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            save(self.model, path)
            self.go_on_with(load(Shop(self.sparse, rows), path))
            reader = Reader(path)
            for table, aliases in find_replacements(self.model):
                read = reader.rows(aliases[0].name, np.arange(table.num_embeddings))
                assert torch.equal(torch.from_numpy(read.copy()), self.rows[table])

    @rule(config=CONFIGS, again=st.booleans())
    def decompress_and_compress(self, config: CompressionConfig, again: bool) -> None:
        old, found = copy.deepcopy(self.model), [*find_replacements(self.model)]
        trains = [{p.requires_grad for p in table.parameters()} for table, _ in found]
        decompress(self.model)
        for (table, aliases), flags in zip(found, trains, strict=True):
            weight = self.model.get_submodule(aliases[0].name).weight
            assert torch.equal(weight, self.rows[table])
            assert not flags or weight.requires_grad is any(flags)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.compress(config, **({"start_from": old} if again else {}))

    @invariant()
    def all_is_as_noted(self) -> None:
        assert self.found_flags() == self.flags and self.model.again[0] is self.model.item
        assert {*self.tables()} == self.rows.keys()
        for table, rows in self.rows.items():
            ids = torch.randint(len(rows), (3, 5))
            assert torch.equal(table.decode(ids), rows[ids])
            assert torch.equal(table.weight.detach()[ids], rows[ids])
            if table.padding_idx is not None:
                assert not rows[table.padding_idx].any()

    @invariant()
    def wrong_calls_change_nothing(self) -> None:
        before = state_of(self.model)
        for table, rows in self.rows.items():
            for call in wrong_calls(table, *rows.shape):
                with pytest.raises((IndexError, ValueError), match=f"table '{table.name}'"):
                    call()
        assert_same_state(self.model, before)


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=12, stateful_step_count=8, deadline=None, derandomize=True
)
