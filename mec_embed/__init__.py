"""Compress the embedding tables of trained CTR models into codes and small trainable codebooks."""

from . import integrations
from ._version import __version__
from .compress import compress, decompress, plan
from .config import CompressionConfig
from .distill import distill
from .frequency import FrequencyStats
from .layout import CodeLayout
from .lifecycle import Drift, drift, extend, update
from .modules import CompressedEmbedding, CompressedEmbeddingBag
from .optimization import keep_row_steps
from .report import CompressionReport, TableReport
from .self_distill import self_distill
from .sharding import gather_codes, shard_codes
from .storage import FormatError, load, save
from .tiers import TieredEmbedding, TieredEmbeddingBag

__all__ = [
    "CodeLayout",
    "CompressedEmbedding",
    "CompressedEmbeddingBag",
    "CompressionConfig",
    "CompressionReport",
    "Drift",
    "FormatError",
    "FrequencyStats",
    "TableReport",
    "TieredEmbedding",
    "TieredEmbeddingBag",
    "__version__",
    "compress",
    "decompress",
    "distill",
    "drift",
    "extend",
    "gather_codes",
    "integrations",
    "keep_row_steps",
    "load",
    "plan",
    "save",
    "self_distill",
    "shard_codes",
    "update",
]
