"""What a person may choose: one frozen, validated, JSON-able dataclass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from .layout import dtype_from_name

DEFAULT_RATIO = 50.0

#: Popularity weightings: how much a row that occurs n times in training counts.
POPULARITY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sqrt": torch.sqrt,
    "linear": lambda counts: counts,
    "log": lambda counts: torch.log2(counts.clamp(min=1)).floor().clamp(min=1),
    "none": torch.ones_like,
}

#: Codewords of additive codes: the least squares over all of them take 8 bytes a pair, twice.
_MOST_CODEWORDS = 1 << 15
_CODEBOOK_DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class CompressionConfig:
    """How :func:`mec_embed.compress` shall compress. Most people set only ``ratio``.

    Args:
        ratio: bytes of all embedding tables of the model before, divided by their bytes after;
            codes, codebooks, padding and the tables left alone all count (not those that an
            earlier call has compressed). The planner spends the budget as far as that lowers the
            error. 50 where no target is given.
        max_bytes: the target as bytes after, instead of ``ratio``.
        num_subvectors: number of codebooks M of every compressed table, instead of a target;
            goes with ``codebook_size``.
        codebook_size: codewords K in each codebook, 2 to 65,536; M * K is at most 32,768 for
            additive codes.
        codes: ``"additive"`` (a row is the sum of M codewords; better at equal bytes) or
            ``"product"`` (their concatenation, as in the MEC paper).
        codebook_dtype: ``None`` for the dtype of the table, so that codebooks train as the table
            did; ``"float32"``, ``"float16"``, ``"bfloat16"``; or ``"int8"``, with bfloat16
            scales, which leaves more bytes for codes and freezes the codebooks (only
            :func:`mec_embed.distill` moves them).
        min_rows: tables with fewer rows stay as they are. Larger ones may stay too,
            where codes would take more or lose too much.
        include: shell-style patterns; a table is compressed if its qualified name matches one.
        exclude: shell-style patterns; a table whose name matches one stays as it is.
        nonfinite: what is done with rows that hold NaN or infinity: ``"error"``, or ``"zero"`` to
            take these entries as zero; the report counts the rows. Tables that stay as they are
            keep them.
        popularity: weight of a row that occurs n times in training: ``"sqrt"``, ``"linear"``,
            ``"log"`` (floor(log2 n), at least 1, as in MEC) or ``"none"``. None is ``"linear"``
            where ``batches=`` tell what a lookup costs, and else ``"sqrt"``.
        tiers: whether popular rows may get more bits than the other rows of their table, where the
            planner predicts a gain; needs counts and a byte target.
        share_codebooks: whether tables that train alike (one group of one optimizer, or none given)
            may have one set of codebooks, where the planner predicts a gain. It is one parameter:
            what trains or freezes one of them does so to all.
        usage_weight: weight of the usage regularizer (even use of the codewords); 0 is off.
        contrastive_weight: weight of the contrastive loss (a row against its own codes with one
            of them replaced); 0 is off.
        epochs: epochs of the MEC objective; 0 leaves the refined k-means codebooks.
        seed: of every random choice; the same seed gives the same codes on the CPU.

    Raises:
        ValueError: a value outside its range, or targets that exclude each other.
        TypeError: a value of the wrong type.

    Example:
        >>> CompressionConfig(ratio=50).to_json() == CompressionConfig().to_json()
        True
    """

    ratio: float | None = None
    max_bytes: int | None = None
    num_subvectors: int | None = None
    codebook_size: int | None = None
    codes: str = "additive"
    codebook_dtype: str | None = None
    min_rows: int = 8
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    nonfinite: str = "error"
    popularity: str | None = None
    tiers: bool = True
    share_codebooks: bool = True
    usage_weight: float = 1e-4
    contrastive_weight: float = 2e-3
    epochs: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # of numpy, which JSON does not take
                object.__setattr__(self, field.name, value.item())
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        self._check_target()
        _one_of("codes", self.codes, ("additive", "product"))
        _one_of("nonfinite", self.nonfinite, ("error", "zero"))
        if self.popularity is not None:
            _one_of("popularity", self.popularity, tuple(POPULARITY))
        if self.codebook_dtype is not None:
            _one_of("codebook_dtype", self.codebook_dtype, _CODEBOOK_DTYPES)
        for name in ("tiers", "share_codebooks"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _integer("min_rows", self.min_rows, low=1)
        _integer("epochs", self.epochs, low=0)
        _integer("seed", self.seed, low=0, high=2**31 - 1)
        _number("usage_weight", self.usage_weight, low=0.0)
        _number("contrastive_weight", self.contrastive_weight, low=0.0)

    def _check_target(self) -> None:
        explicit = (self.num_subvectors, self.codebook_size)
        if any(value is not None for value in explicit):
            if any(value is None for value in explicit):
                raise ValueError(
                    "num_subvectors and codebook_size go together, got "
                    f"num_subvectors={self.num_subvectors}, codebook_size={self.codebook_size}"
                )
            _integer("num_subvectors", self.num_subvectors, low=1, high=256)
            _integer("codebook_size", self.codebook_size, low=2, high=1 << 16)
            words = self.num_subvectors * self.codebook_size  # type: ignore[operator]
            if self.codes == "additive" and words > _MOST_CODEWORDS:
                raise ValueError(
                    f"num_subvectors * codebook_size of additive codes must be at most "
                    f"{_MOST_CODEWORDS:,}, got {self.num_subvectors} * {self.codebook_size} = "
                    f"{words:,}: all codewords are solved for at once; give fewer, or "
                    "codes='product'"
                )
        targets = [self.ratio is not None, self.max_bytes is not None, explicit != (None, None)]
        if sum(targets) > 1:
            raise ValueError(
                "give one of ratio, max_bytes, or num_subvectors with codebook_size, got "
                f"ratio={self.ratio}, max_bytes={self.max_bytes}, "
                f"num_subvectors={self.num_subvectors}, codebook_size={self.codebook_size}"
            )
        if not any(targets):
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        if self.ratio is not None:
            _number("ratio", self.ratio, low=1.0)
            object.__setattr__(self, "ratio", float(self.ratio))  # 50 and 50.0 are one ratio
        if self.max_bytes is not None:
            _integer("max_bytes", self.max_bytes, low=1)

    def budget(self, bytes_before: int) -> int | None:
        """Bytes that all tables may take after; ``None`` where the layout is explicit."""
        if self.ratio is not None:
            return math.floor(bytes_before / self.ratio)
        return self.max_bytes

    def codebook_dtype_for(self, table_dtype: torch.dtype) -> torch.dtype:
        """The codebook dtype of a table whose rows are ``table_dtype``."""
        return dtype_from_name(self.codebook_dtype) if self.codebook_dtype else table_dtype

    def selects(self, names: Sequence[str]) -> bool:
        """Whether one of a table's qualified names is included and none excluded."""
        return _matches(names, self.include) and not _matches(names, self.exclude)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The patterns of ``include`` and ``exclude`` that no name matches."""
        patterns = [*self.include, *self.exclude]
        return [pattern for pattern in patterns if not _matches(names, (pattern,))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` reverses it."""
        return {**asdict(self), "include": list(self.include), "exclude": list(self.exclude)}

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressionConfig:
        """The configuration that :meth:`to_dict` wrote; ValueError for unknown names."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"CompressionConfig has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """The configuration that :meth:`to_json` wrote."""
        return cls.from_dict(json.loads(text))


def matches(name: str, pattern: str) -> bool:
    """Whether a name is the pattern or fits it; it may hold what is special there, as "cat[0]"."""
    return name == pattern or fnmatchcase(name, pattern)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of patterns, got {value!r}")
    patterns = tuple(value)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must hold strings, got {patterns!r}")
    return patterns


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _number(name: str, value: Any, low: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low:
        raise ValueError(f"{name} must be finite and at least {low}, got {value}")
