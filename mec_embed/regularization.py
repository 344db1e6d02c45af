"""Penalties that stay what they were when a table becomes codebooks.

A codeword stands for all rows that use it. The penalty of a table, ``sum_r |row_r|^p``, becomes
``sum_mk rows_mk |codeword_mk|^p`` with ``rows_mk`` the number of rows that use codeword k of
codebook m: the same for product codes, and the same but for the products of different codewords
for additive ones. Counting each codeword once instead all but switches the penalty off; see
``docs/experiments.md`` for what that costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .modules import DECODE_ROWS, CodePart, Compressed
from .packing import unpack

#: Counts of codewords, kept as long as their table lives: (state of the codes, counts).
_COUNTS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def trainable_tables(model: nn.Module) -> list[Compressed]:
    """Compressed tables of the model whose codebooks train, each once."""
    found = [m for m in model.modules() if isinstance(m, Compressed)]
    return [m for m in found if m.codebooks.is_floating_point() and m.codebooks.requires_grad]


def rows_per_codeword(table: Compressed) -> Tensor:
    """Rows (M, K) float32 of the table that use each codeword."""
    codes = table.codes
    if isinstance(table.code_table, CodePart):
        return table.code_table.rows_per_codeword.float()
    # Codes change when a state is loaded, which counts up their version, and when rows are added,
    # to new memory, which may be where other codes were before.
    version = 0 if codes.is_inference() else codes._version
    state = (codes.data_ptr(), version, codes.device, table.num_embeddings)
    known = _COUNTS.get(table)
    if known is None or known[0] != state:
        known = _COUNTS[table] = (state, count_rows(table))
    return known[1]


@torch.inference_mode(False)
@torch.no_grad()
def count_rows(table: Compressed, first: int = 0, end: int | None = None) -> Tensor:
    """Rows (M, K) float32 that use each codeword, of ``first`` up to ``end`` (or all)."""
    layout, codes = table.layout, table.codes
    end = layout.num_embeddings if end is None else end
    shape = (layout.num_subvectors, layout.codebook_size)
    if not layout.bits:
        users = layout.num_embeddings if layout.kind == "shared" else 1
        return torch.full(shape, float(users), dtype=torch.float32, device=codes.device)
    total = torch.zeros(shape, dtype=torch.float32, device=codes.device)
    for start in range(first, end, DECODE_ROWS):
        stop = min(start + DECODE_ROWS, end)
        ids = torch.arange(start, stop, device=codes.device)
        chunk = unpack(codes, layout.num_subvectors, layout.bits, ids)
        for m in range(layout.num_subvectors):
            total[m] += torch.bincount(chunk[:, m], minlength=layout.codebook_size)
    return total


def table_penalty(table: Compressed, power: float = 2) -> Tensor:
    """``sum_mk rows_mk |codeword_mk|^power`` of one table, differentiable in the codebooks."""
    size = table.codebooks.abs().pow(power).sum(2)
    return (rows_per_codeword(table) * size).sum()


def embedding_penalty(model: nn.Module, power: float = 2) -> Tensor:
    """``sum |entry|^power`` over all rows of all compressed tables, by their codewords.

    For training loops that add a penalty of their own. Optimizers that were passed to
    :func:`mec_embed.compress` keep their weight decay by themselves.

    Args:
        model: with compressed tables; frozen and int8 codebooks count nothing.
        power: of the norm: 2 for L2, 1 for L1.

    Returns:
        A scalar, differentiable.

    Example:
        >>> loss = criterion + 1e-5 / 2 * embedding_penalty(model)  # doctest: +SKIP
    """
    parts = [table_penalty(table, power) for table in trainable_tables(model)]
    return torch.stack(parts).sum() if parts else torch.zeros(())


@contextmanager
def hidden_codebooks(tables: Iterable[Compressed]) -> Iterator[None]:
    """Codebooks look frozen for a while: to a framework that sums a penalty over parameters."""
    books = {id(table.codebooks): table.codebooks for table in tables}
    for book in books.values():
        book.requires_grad_(False)
    try:
        yield
    finally:
        for book in books.values():
            book.requires_grad_(True)
