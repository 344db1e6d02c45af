"""The test vectors of the file format: small files, and the rows that a reader must find in them.

``python tests/vectors/make.py`` writes them anew beside this script. The rows are computed from
codes and codewords by numpy, not by the library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mec_embed import (
    CodeLayout,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    TieredEmbedding,
    TieredEmbeddingBag,
    save,
)
from mec_embed.modules import CodebookSet, CodeTable
from mec_embed.packing import pack
from mec_embed.tiers import TierMap

FOLDER = Path(__file__).parent


class Model(nn.Module):
    """Tables and a layer that no reader of tables looks into."""

    def __init__(self, **tables: nn.Module) -> None:
        super().__init__()
        for name, table in tables.items():
            setattr(self, name, table)
        self.layer = nn.Linear(3, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.constant_(self.layer.bias, 0.25)


class Maker:
    """Draws tables, and keeps their rows as plain arrays."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def books(self, layout: CodeLayout) -> tuple[CodebookSet, np.ndarray]:
        """Codebooks, and their values (M, K, width) float32; all of them exact in any dtype."""
        shape = (layout.num_subvectors, layout.codebook_size, layout.subvector_dim)
        books = CodebookSet(layout)
        values = torch.from_numpy(self.random.integers(-127, 128, shape))
        with torch.no_grad():
            books.codebooks.copy_(values if books.scales is not None else values * 2.0**-6)
            if books.scales is None:
                return books, books.codebooks.detach().float().numpy()
            # Scales that use all bits of bfloat16, so that products have to be rounded.
            books.scales.copy_(torch.from_numpy(self.random.uniform(0.001, 0.1, shape[:2])))
            scales = books.scales.float().numpy()
            return books, books.codebooks.numpy().astype(np.float32) * scales[..., None]

    def codes(self, layout: CodeLayout) -> tuple[CodeTable, np.ndarray]:
        """Packed codes, and codes (rows, M)."""
        shape = (layout.num_embeddings, layout.num_subvectors)
        table = CodeTable(layout)
        if not layout.bits:
            place = np.arange(shape[0]) if layout.kind == "rows" else np.zeros(shape[0], np.int64)
            return table, place[:, None]
        raw = self.random.integers(layout.codebook_size, size=shape)
        table.codes.copy_(pack(torch.from_numpy(raw), layout.bits))
        return table, raw

    def table(
        self, *layout: Any, cls: Any = CompressedEmbedding, share: Any = None, **options: Any
    ) -> tuple[Any, np.ndarray]:
        """A table and its rows (rows, dim) float32; ``share`` is (module, codes) of another."""
        shape = CodeLayout(*layout)
        codes, raw = (share[0].code_table, share[1]) if share else self.codes(shape)
        books, values = self.books(shape)
        module = cls(shape, code_table=codes, codebook_set=books, **options)
        words = [values[m][raw[:, m]] for m in range(raw.shape[1])]
        rows = np.concatenate(words, 1) if shape.kind == "product" else _sum(words)
        return module, _padded(rows, **options)

    def tiers(
        self, popular: np.ndarray, head: tuple, tail: tuple, cls: Any = TieredEmbedding, **options
    ) -> tuple[Any, np.ndarray]:
        """A table of two tiers and its rows."""
        first, second = (
            self.table(kind, int(mine.sum()), *rest)
            for (kind, *rest), mine in ((head, popular), (tail, ~popular))
        )
        tier_map = TierMap.of(torch.from_numpy(popular))
        rows = np.empty((len(popular), first[1].shape[1]), np.float32)
        rows[popular], rows[~popular] = first[1], second[1]
        return cls(tier_map, first[0], second[0], **options), _padded(rows, **options)


def _sum(words: list[np.ndarray]) -> np.ndarray:
    """From the first codebook to the last, in float32."""
    rows = words[0].copy()
    for word in words[1:]:
        rows += word
    return rows


def _padded(
    rows: np.ndarray, padding_idx: int | None = None, zero_padding: bool = True, **_: Any
) -> np.ndarray:
    if padding_idx is not None and zero_padding:
        rows[padding_idx] = 0
    return rows


def example() -> dict[str, Any]:
    """The example of docs/format.md."""
    module = CompressedEmbedding(CodeLayout("additive", 3, 2, 2, 3, torch.float16), padding_idx=2)
    raw = torch.tensor([[1, 2], [0, 1], [2, 0]])
    books = torch.tensor([[[1, 0], [0, 1], [2, 2]], [[0.5, 0], [0, 0.5], [-1, 1]]])
    module.codes.copy_(pack(raw, 2))
    module.codebook_set.store(books)
    return {"item": (module, np.array([[-1, 2], [1, 0.5], [0, 0]], np.float32))}


def additive_int8() -> dict[str, Any]:
    """3 bits a code, codes across bytes, a size that is no power of two, padding, unknown ids."""
    maker = Maker(1)
    plain = maker.table("additive", 41, 6, 3, 7, torch.int8, padding_idx=5)
    kept = maker.table("additive", 9, 1, 1, 2, torch.int8, padding_idx=0, zero_padding=False)
    kept[0].oov_row = 8
    return {"item": plain, "first": kept}


def product_float16() -> dict[str, Any]:
    """Concatenated codewords, in a bag; and 10 bits a code, which take three bytes."""
    maker = Maker(2)
    options = {"cls": CompressedEmbeddingBag, "mode": "mean", "padding_idx": 3}
    bag = maker.table("product", 33, 8, 4, 5, torch.float16, **options)
    return {"tags": bag, "wide": maker.table("additive", 30, 1, 2, 520, torch.float16)}


def tiers_bitmap() -> dict[str, Any]:
    """Popular rows in no order, in several blocks; a tail of codes, and one of one row."""
    maker = Maker(3)
    popular = maker.random.random(300) < 0.3
    head = ("additive", 4, 3, 6, torch.bfloat16)
    coded = maker.tiers(popular, head, ("additive", 4, 1, 4, torch.bfloat16), padding_idx=299)
    single = ("shared", 4, 1, 1, torch.float32)
    flipped = maker.tiers(~popular, ("rows", 4, 1, int((~popular).sum()), torch.int8), single)
    return {"item": coded, "other": flipped}


def tiers_runs() -> dict[str, Any]:
    """Popular rows first but for some, and popular rows at the end; a bag."""
    maker = Maker(4)
    first, last = np.arange(200) < 20, np.arange(200) >= 190
    first[[2, 150, 199]] ^= True
    head, tail = ("additive", 4, 4, 8, torch.float32), ("product", 4, 2, 3, torch.float32)
    options = {"cls": TieredEmbeddingBag, "mode": "sum", "padding_idx": 0}
    return {
        "item": maker.tiers(first, head, tail),
        "tags": maker.tiers(last, head, tail, **options),
    }


def rows() -> dict[str, Any]:
    """No codes: a codeword a row."""
    maker = Maker(5)
    kinds = [torch.bfloat16, torch.int8, torch.float64]
    return {
        str(kind).replace("torch.", "rows_"): maker.table("rows", 12, 5, 1, 12, kind, padding_idx=1)
        for kind in kinds
    }


def shared() -> dict[str, Any]:
    """One codeword for all rows; a table under two names; a table with the codes of another."""
    maker = Maker(6)
    one = maker.table("shared", 1000, 4, 1, 1, torch.float16)
    layout = CodeLayout("additive", 50, 4, 2, 16, torch.float32)
    codes, raw = maker.codes(layout)
    books, values = maker.books(layout)
    module = CompressedEmbedding(layout, code_table=codes, codebook_set=books)
    user = module, _sum([values[m][raw[:, m]] for m in range(2)])
    first = maker.table("additive", 50, 1, 2, 16, torch.float32, share=(module, raw))
    return {"one": one, "user": user, "again": user, "first": first}


VECTORS = (
    example,
    additive_int8,
    product_float16,
    tiers_bitmap,
    tiers_runs,
    rows,
    shared,
)


def make(folder: Path) -> None:
    """Write every vector into ``folder``."""
    for vector in VECTORS:
        tables = vector()
        save(
            Model(**{name: module for name, (module, _) in tables.items()}),
            folder / f"{vector.__name__}.safetensors",
        )
        expected = {name: values for name, (_, values) in tables.items()}
        np.savez_compressed(folder / f"{vector.__name__}.npz", **expected)


def untrained(name: str) -> Model:
    """A model to load a vector into, uncompressed."""
    made = next(vector for vector in VECTORS if vector.__name__ == name)()
    dense: dict[int, nn.Module] = {}
    return Model(
        **{
            table: dense.setdefault(id(module), _dense(module))
            for table, (module, _) in made.items()
        }
    )


def _dense(module: Any) -> nn.Module:
    shape = (module.num_embeddings, module.embedding_dim)
    if hasattr(module, "mode"):
        return nn.EmbeddingBag(*shape, mode=module.mode, padding_idx=module.padding_idx)
    return nn.Embedding(*shape, padding_idx=module.padding_idx)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
