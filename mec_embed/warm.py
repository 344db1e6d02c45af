"""What the compressed model of an earlier version decides for its successor.

Layouts, tiers and sharing are taken over as a plan; codebooks and codes are what learning starts
from.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from .budget import Assignment, Choice, Field, Group, joint_fisher
from .config import CompressionConfig
from .modules import DecodedTable, check_gathered
from .shards import check_sums
from .tables import SkippedTable, Table, find_replacements, untouched
from .tiers import TieredTable


class Earlier:
    """The compressed tables of an earlier version of a model.

    Args:
        by_name: the tables, under every name.
    """

    def __init__(self, by_name: Mapping[str, DecodedTable]) -> None:
        self._by_name = by_name
        self._of: dict[Table, DecodedTable] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Earlier:
        """Those of a compressed model.

        Raises:
            TypeError: no module.
            ValueError: a model without compressed tables.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"start_from must be a compressed model, got {type(model).__name__}; load() makes "
                "one from a file"
            )
        check_gathered(model)
        found = [*find_replacements(model)]
        if not found:
            raise ValueError("start_from holds no compressed table; give a compressed model")
        return cls({alias.name: module for module, aliases in found for alias in aliases})

    def choose(
        self, tables: Sequence[Table], skipped: Sequence[SkippedTable]
    ) -> tuple[list[Table], list[SkippedTable]]:
        """The tables that were compressed before, and all others with the reason.

        Raises:
            ValueError: a table that was compressed before is not there, cannot be compressed any
                more, has another shape, or is shared with other places; it is named.
        """
        left = [*skipped]
        for table in tables:
            module = next((self._by_name[n] for n in table.names if n in self._by_name), None)
            if module is None:
                reason = "is not compressed in start_from"
                left.append(untouched(table.module, table.aliases, reason))
                continue
            before, now = (module.num_embeddings, module.embedding_dim), (table.rows, table.dim)
            if before != now:
                raise ValueError(
                    f"table {table.name!r} has the shape {now}, expected {before} as in "
                    "start_from; append new rows to that one with extend(), or compress without "
                    "start_from"
                )
            same = next((other for other, one in self._of.items() if one is module), None)
            if same is not None:
                raise ValueError(
                    f"tables {same.name!r} and {table.name!r} are one table in start_from, but two "
                    "here; make them one module again, or compress without start_from"
                )
            self._of[table] = module
        found = {*self._of.values()}
        missing = [name for name, module in self._by_name.items() if module not in found]
        if missing:
            reasons = {name: one.reason for one in left for name in one.names}
            for table in self._of:
                reasons |= {name: f"it is one with {table.name!r} now" for name in table.names}
            raise ValueError(
                f"table {missing[0]!r} is compressed in start_from, but cannot be here: "
                f"{reasons.get(missing[0], 'the model has no such table')}; compress without "
                "start_from"
            )
        return [*self._of], left

    def oov_row(self, table: Table) -> int | None:
        """The row of unknown ids that a table had."""
        return self._of[table].oov_row

    def facts(self) -> dict[str, str]:
        """What several ranks must agree on: name -> check sums of all tensors."""
        return {
            f"the earlier version of table {table.name!r}": check_sums(module)
            for table, module in self._of.items()
        }

    def assignment(
        self,
        weights: Sequence[Tensor],
        fishers: Sequence[np.ndarray | None],
        keys: Mapping[Table, Hashable],
        config: CompressionConfig,
    ) -> Assignment:
        """The plan of the earlier version, for the tables that :meth:`choose` returned.

        Args:
            weights: popularity weights (rows,) of each.
            fishers: Fisher matrix of each, or None.
            keys: equal for tables that may share codebooks.
            config: given by the caller.

        Raises:
            ValueError: tables that shared codes or codebooks cannot share them now.
        """
        by_codes: dict[int, list[Field]] = {}
        for table, own, fisher in zip(self._of, weights, fishers, strict=True):
            part = self._of[table]._tables()[0]
            field = Field(table, None, own, fisher, earlier=(part,))
            by_codes.setdefault(id(part.code_table), []).append(field)
        groups: dict[int, list[Field]] = {}
        for fields in by_codes.values():
            for tier in self._tiers(_joined(fields)):
                groups.setdefault(id(tier.earlier[0].codebook_set), []).append(tier)
        for fields in groups.values():
            _check_keys(fields, keys)
        found = [Group(tuple(fields)) for fields in groups.values()]
        return Assignment(found, [_choice(group, config) for group in found])

    def _tiers(self, field: Field) -> list[Field]:
        """The field, or its two tiers."""
        module = self._of[field.table]
        if not isinstance(module, TieredTable):
            return [field]
        ids = torch.arange(field.rows, device=module.tier_map.before.device)
        popular, _ = module.tier_map(ids, field.table.name)
        # As counts: rows that occur once are in the head.
        counts = popular.cpu().numpy().astype(np.uint8)
        parts = zip(*(self._of[table]._tables() for table in field.tables), strict=True)
        return [
            replace(field, counts=counts, cut=1, tier=tier, earlier=part)
            for tier, part in zip(("head", "tail"), parts, strict=True)
        ]


def _joined(fields: list[Field]) -> Field:
    """Fields that have the same codes as one: vectors, and their first-order weights."""
    if len(fields) == 1:
        return fields[0]
    first, *others = sorted(fields, key=lambda field: -field.table.dim)
    if len(others) > 1:
        raise ValueError(
            f"tables {[field.table.name for field in fields]} share their codes in start_from, "
            "expected two at most; compress without start_from"
        )
    return replace(
        first,
        partner=others[0].table,
        fisher=joint_fisher(first.fisher, others[0].fisher),
        earlier=(*first.earlier, *others[0].earlier),
    )


def _check_keys(fields: Sequence[Field], keys: Mapping[Table, Hashable]) -> None:
    """ValueError for fields whose codebooks cannot be the same parameters."""
    if len({tuple(keys[table] for table in field.tables) for field in fields}) > 1:
        raise ValueError(
            f"tables {[field.table.name for field in fields]} share their codebooks in "
            "start_from, but differ now in dtype, device, requires_grad, sparse or optimizer "
            "group; make them alike, or compress without start_from"
        )


def _choice(group: Group, config: CompressionConfig) -> Choice:
    layout = group.first.earlier[0].layout
    shape = (layout.kind, layout.num_subvectors, layout.codebook_size)
    return Choice(shape, group.layout_bytes(shape, config), 0.0)
