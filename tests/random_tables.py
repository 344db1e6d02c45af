"""Compressed tables of random codes and codebooks."""

from __future__ import annotations

from typing import Any

import torch

from mec_embed import CodeLayout, CompressedEmbedding
from mec_embed.packing import pack


def filled(layout: CodeLayout, cls: Any = CompressedEmbedding, **options: Any) -> Any:
    """A module of this layout, always the same; ``options`` are its own."""
    generator = torch.Generator().manual_seed(layout.codebook_size)
    module = cls(layout, **options)
    module.codebook_set.store(torch.randn(module.codebooks.shape, generator=generator))
    if layout.bits:
        shape = layout.num_embeddings, layout.num_subvectors
        codes = torch.randint(layout.codebook_size, shape, generator=generator)
        module.codes.copy_(pack(codes, layout.bits))
    return module
