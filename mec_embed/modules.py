"""The modules that take the place of ``nn.Embedding`` and ``nn.EmbeddingBag``."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from . import ops
from .layout import SCALE_DTYPE, CodeLayout, dtype_name
from .replicas import any_dtensor, on_replicas

#: Rows decoded at once where a whole table is decoded.
DECODE_ROWS = 1 << 14


class SharedModule(nn.Module):
    """What several tables of a model may hold: walks over a model meet it once.

    ``torch.func.functional_call`` goes over all names of a parameter, puts other tensors in under
    each, and puts back what it found there: under the second name of a module that is registered
    twice, that is what it had put in under the first.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself, the first time that it is met, with ``remove_duplicate=False`` as well."""
        return super().named_modules(memo, prefix, True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts are for the output: the format knows one dtype of each buffer."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, held in before.items():
            now = self._buffers[name]
            if held is not None and now is not None and now.dtype != held.dtype:
                setattr(self, name, held.to(now.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Whole numbers that were cast on the way are refused: large ones have lost digits."""
        for name, held in self._buffers.items():
            given = state_dict.get(f"{prefix}{name}")
            if held is None or not isinstance(given, Tensor) or held.is_floating_point():
                continue
            if given.dtype != held.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype}, expected {held.dtype}; cast floating "
                    "tensors of a state_dict alone, and take none while distill() runs"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class CodeTable(SharedModule):
    """The packed codes of one or more tables: a module, so that sharing survives ``.to()``."""

    codes: Tensor

    def __init__(self, layout: CodeLayout) -> None:
        """Zeroed codes for ``layout``."""
        super().__init__()
        self.register_buffer("codes", torch.zeros(layout.code_bytes, dtype=torch.uint8))
        #: The tables whose codes these are.
        self.holders: WeakSet[Compressed] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Copies are held by copies of tables, which say so themselves.
        return {**self.__dict__, "holders": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.holders = WeakSet()


class CodePart(CodeTable):
    """The codes of the rows that this rank holds, see :mod:`mec_embed.sharding`.

    They are no buffer: ``DistributedDataParallel`` would write those of rank 0 over all others.

    Args:
        layout: of the part.
        codes: packed, uint8 (bytes,).
        rows_per_codeword: rows (M, K) int64 of the whole table that use each codeword.
    """

    def __init__(self, layout: CodeLayout, codes: Tensor, rows_per_codeword: Tensor) -> None:
        """A part that holds these tensors themselves."""
        with torch.device("meta"):
            super().__init__(layout)
        del self.codes
        self.codes, self.rows_per_codeword = codes, rows_per_codeword

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.codes, self.rows_per_codeword = fn(self.codes), fn(self.rows_per_codeword)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> dict[str, Tensor]:
        """The part, as ``state_dict`` holds it."""
        return {"codes": self.codes, "rows_per_codeword": self.rows_per_codeword}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Copy what :meth:`get_extra_state` gave on the same rank of as many."""
        for name, held in self.get_extra_state().items():
            if held.shape != state[name].shape:
                raise ValueError(
                    f"{name} of a part of codes have the shape {tuple(state[name].shape)}, "
                    f"expected {tuple(held.shape)}; load the state of a model that was sharded "
                    "over as many ranks"
                )
            held.copy_(state[name])


class CodebookSet(SharedModule):
    """The codebooks of one or more tables: trainable floats, or int8 with scales."""

    codebooks: Tensor
    scales: Tensor | None

    def __init__(self, layout: CodeLayout, requires_grad: bool = True) -> None:
        """Zeroed codebooks for ``layout``."""
        super().__init__()
        shape = (layout.num_subvectors, layout.codebook_size, layout.subvector_dim)
        codebooks = torch.zeros(shape, dtype=layout.codebook_dtype)
        if layout.codebook_dtype is torch.int8:
            self.register_buffer("codebooks", codebooks)
            self.register_buffer("scales", torch.zeros(shape[:2], dtype=SCALE_DTYPE))
        else:
            self.register_parameter("codebooks", nn.Parameter(codebooks, requires_grad))
            self.register_buffer("scales", None)

    def store(self, values: Tensor) -> None:
        """Put float codebooks (M, K, subvector_dim) in, rounded to the dtype of this set."""
        with torch.no_grad():
            if self.scales is None:
                self.codebooks.copy_(values)
            else:
                codebooks, scales = quantize_codebooks(values)
                self.codebooks.copy_(codebooks)
                self.scales.copy_(scales)

    def values(self) -> Tensor:
        """The codebooks (M, K, subvector_dim) in float32, scales applied, without gradient."""
        values = self.codebooks.detach().float()
        return values if self.scales is None else values * self.scales.float()[:, :, None]

    def thaw(self) -> nn.Parameter:
        """Hold the codebooks as a trainable float32 parameter until :meth:`freeze`."""
        values = self.values()
        del self.codebooks
        self.scales = None
        self.register_parameter("codebooks", nn.Parameter(values))
        return self.codebooks  # type: ignore[return-value]

    def freeze(self, codebooks: Tensor, scales: Tensor | None) -> None:
        """Store what :meth:`thaw` made trainable into the tensors held before."""
        values = self.codebooks.detach()
        del self.codebooks, self.scales  # both: their order in the state is what it was
        if isinstance(codebooks, nn.Parameter):
            self.register_parameter("codebooks", codebooks)
        else:
            self.register_buffer("codebooks", codebooks)
        self.register_buffer("scales", scales)
        self.store(values)


#: Scales of codebooks that are added are powers of two, none less than the largest divided by this.
SCALE_RANGE = 16


def quantize_codebooks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round codebooks (M, K, D) to int8 with one bfloat16 scale (M, K) a codeword.

    Each of several codebooks has the same scale for all its codewords, a power of two, near to
    those of the others: then rows and bags are sums of whole numbers, exact in any order, and the C
    kernel makes them in 16 bits.
    """
    peak = values.abs().amax(2).float()
    least = torch.finfo(SCALE_DTYPE).tiny
    # Steps are taken against the scale as it is stored, so that no entry is off by more than half
    # a step (the largest, of a scale that is no power of two, is 126.5 to 127.5 steps and becomes
    # 127), and rounding what was rounded changes nothing.
    scales = (peak / 127).clamp(min=least)
    if len(values) > 1:
        scales = torch.exp2(scales.amax(1, keepdim=True).log2().ceil()).expand_as(scales)
        scales = torch.maximum(scales, scales.max() / SCALE_RANGE).clamp(min=least)
    scales = scales.to(SCALE_DTYPE)
    steps = values.float() / scales.float()[:, :, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def padding_row(padding_idx: int | None, rows: int, name: str) -> int | None:
    """The padding row of a table; negative numbers count from the end, as in ``nn.Embedding``."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"table {name!r}: padding_idx must be in {-rows}..{rows - 1} or None, got {padding_idx}"
        )
    return padding_idx % rows


def known_mode(mode: str, name: str) -> str:
    """The mode of bags; ValueError for none that there is."""
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"table {name!r}: mode must be 'sum', 'mean' or 'max', got {mode!r}")
    return mode


class DecodedTable(nn.Module, ABC):
    """What all replacements of a table share: rows are decoded when asked for."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    sparse: bool
    trainable: bool
    name: str

    def __init__(self) -> None:
        super().__init__()
        self._fast = ops.fast.FastPath()
        self._oov_row: int | None = None

    @property
    def trains(self) -> bool:
        """Whether it trains now: what its codebooks say; int8 ones say nothing, and remember."""
        books = [part.codebooks for part in self._tables()]
        flags = [book.requires_grad for book in books if book.is_floating_point()]
        return any(flags) if flags else self.trainable

    @property
    def oov_row(self) -> int | None:
        """Row that ids out of range read; None (the default) makes them an error on the CPU.

        Example:
            >>> table = CompressedEmbedding(CodeLayout("additive", 1000, 8, 2, 16))
            >>> table.oov_row = 0
            >>> torch.equal(table(torch.tensor([5000])), table(torch.tensor([0])))
            True
        """
        return self._oov_row

    @oov_row.setter
    def oov_row(self, row: int | None) -> None:
        try:
            # Of numpy or torch as well; the manifest of a file takes Python's only.
            number = None if row is None else operator.index(row)
        except TypeError:
            number = -1
        if number is not None and not 0 <= number < self.num_embeddings:
            raise ValueError(
                f"table {self.name!r}: oov_row must be in 0..{self.num_embeddings - 1} or None, "
                f"got {row!r}"
            )
        self._oov_row = number

    def _known(self, ids: Tensor) -> Tensor:
        """``ids``, those out of range replaced if there is a row for them."""
        self._check_tensor("ids", ids)
        if self._oov_row is None:
            return ids
        return ids.masked_fill((ids < 0) | (ids >= self.num_embeddings), self._oov_row)

    def _check_tensor(self, what: str, given: Any) -> None:
        """TypeError for an argument that is no tensor, nor stands for one while it is traced."""
        if not isinstance(given, Tensor) and not hasattr(given, "__torch_function__"):
            raise TypeError(
                f"table {self.name!r}: {what} must be a tensor, got {type(given).__name__}; make "
                "one with torch.tensor()"
            )

    def decode(self, ids: Tensor) -> Tensor:
        """Rows (*ids.shape, embedding_dim) of ``ids``, int32 or int64."""
        # An id out of range sends the kernel's caller back to here.
        rows = self._fast.rows(self, ids)
        if rows is not None:
            return rows
        if any_dtensor(ids):
            return self._on_dtensors(self.decode, ids)
        return self._decode(self._known(ids))

    def _on_dtensors(self, look_up: Callable[..., Tensor], *values: Any) -> Tensor:
        """What ``look_up`` gives for ids, and what belongs to them, of which some are DTensors."""
        return on_replicas(look_up, self.name, *values)

    @abstractmethod
    def _decode(self, ids: Tensor) -> Tensor:
        """What :meth:`decode` returns, by the operators."""

    @abstractmethod
    def _tables(self) -> tuple[Compressed, ...]:
        """The tables whose codebooks are read: itself, or both tiers."""

    @abstractmethod
    def _places(self) -> ops.fast.Places:
        """Where the tensors are that :meth:`_pack_plan` reads."""

    @abstractmethod
    def _pack_plan(self) -> bytes | None:
        """The table as the kernel takes it, or None where it cannot."""

    def _rows_on_gpu(self) -> Any:
        """The table as the kernels on a GPU take it, or None where they cannot."""
        return None

    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor with the dtype of the output, on the device of the table."""

    def _replicate_for_data_parallel(self) -> DecodedTable:
        replica: DecodedTable = super()._replicate_for_data_parallel()
        replica._fast = ops.fast.NO_FAST_PATH
        return replica

    def _apply(self, *args: Any, **options: Any) -> DecodedTable:
        # Tensors move or change their dtype.
        self._fast.forget()
        return super()._apply(*args, **options)

    @property
    def weight(self) -> Tensor:
        """The dense table (num_embeddings, embedding_dim): decoded, differentiable, read-only."""
        return self.decode(torch.arange(self.num_embeddings, device=self._like().device))

    @weight.setter
    def weight(self, value: Any) -> NoReturn:
        self._refuse_weight()

    def _refuse_weight(self) -> NoReturn:
        raise AttributeError(
            f"table {self.name!r}: weight is read-only, as rows are decoded; change rows with "
            "mec_embed.update(), append some with mec_embed.extend()"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; ``weight`` cannot be one."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    def dequantize(self) -> Tensor:
        """The dense table (num_embeddings, embedding_dim), decoded in chunks, without gradient."""
        like = self._like()
        table = like.new_empty(self.num_embeddings, self.embedding_dim)
        with torch.no_grad():
            for start in range(0, self.num_embeddings, DECODE_ROWS):
                rows = table[start : start + DECODE_ROWS]
                ids = torch.arange(start, start + len(rows), device=like.device)
                rows.copy_(self.decode(ids))
        return table


class DecodedRows(DecodedTable):
    """Looks rows up, as ``nn.Embedding`` does."""

    def forward(self, input: Tensor) -> Tensor:
        """Decode the rows ``input``."""
        return self.decode(input)


class DecodedBags(DecodedTable):
    """Reduces bags of rows, as ``nn.EmbeddingBag`` does."""

    mode: str
    include_last_offset: bool

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Decode the rows ``input`` and reduce each bag."""
        reduced = self._fast.bags(self, input, offsets, per_sample_weights)
        if reduced is not None:
            return reduced
        if any_dtensor(input, offsets, per_sample_weights):
            return self._on_dtensors(self.forward, input, offsets, per_sample_weights)
        self._check_bags(input, offsets, per_sample_weights)
        return self._reduce(self._known(input), offsets, per_sample_weights)

    def _check_bags(self, input: Any, offsets: Any, per_sample_weights: Any) -> None:
        """TypeError for offsets and weights that are neither a tensor nor None."""
        for what, given in (("offsets", offsets), ("per_sample_weights", per_sample_weights)):
            if given is not None:
                self._check_tensor(what, given)

    def _reduce(
        self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Tensor:
        """Bags by the operators."""
        ops.reference.check_offsets(offsets, self.name)
        rows = self._decode(input.reshape(-1))
        return self._reduce_rows(rows, input, offsets, per_sample_weights)

    def _reduce_rows(
        self, rows: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Tensor:
        """Bags of the rows (ids, columns) of ``input``."""
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return ops.reference.reduce_rows(
            rows,
            input,
            offsets,
            per_sample_weights,
            padding_idx,
            self.mode,
            self.include_last_offset,
        )


class Compressed(DecodedTable):
    """What both modules share: the stores and the lookup."""

    output_dtype: Tensor

    def __init__(
        self,
        layout: CodeLayout,
        *,
        padding_idx: int | None = None,
        zero_padding: bool = True,
        sparse: bool = False,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = True,
        name: str = "embedding",
        code_table: CodeTable | None = None,
        codebook_set: CodebookSet | None = None,
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"table {name!r}: dtype must be floating, got {dtype}")
        self.layout = layout
        self.num_embeddings = layout.num_embeddings
        self.embedding_dim = layout.embedding_dim
        self.padding_idx = padding_row(padding_idx, layout.num_embeddings, name)
        self.zero_padding = zero_padding
        self.sparse = sparse
        #: Whether the table was trainable; int8 codebooks are not, but remember it.
        self.trainable = requires_grad
        self.name = name
        self.code_table = CodeTable(layout) if code_table is None else code_table
        self.code_table.holders.add(self)
        self.codebook_set = (
            CodebookSet(layout, requires_grad) if codebook_set is None else codebook_set
        )
        # Holds no bytes: it follows .half() and .to(dtype), and is so the dtype of the output.
        self.register_buffer("output_dtype", torch.empty(0, dtype=dtype), persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.code_table.holders.add(self)

    @property
    def codes(self) -> Tensor:
        """Packed codes, uint8 (bytes,)."""
        return self.code_table.codes

    @property
    def codebooks(self) -> Tensor:
        """Codebooks (num_subvectors, codebook_size, subvector_dim); a parameter if float."""
        return self.codebook_set.codebooks

    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.output_dtype.dtype, device=self.codes.device)

    def _tables(self) -> tuple[Compressed, ...]:
        return (self,)

    def _rows_on_gpu(self) -> Any:
        if self.layout.kind == "shared":
            return None
        return ops.fast.on_gpu.lookups_in(ops.fast.decoded_on_gpu(self))

    def _places(self) -> ops.fast.Places:
        return ops.fast.places_of(self)

    def _pack_plan(self) -> bytes | None:
        fields = ops.fast.fields_of(self)
        if fields is None:
            return None
        return ops.cpu.pack_plan(self.num_embeddings, self.embedding_dim, (fields,))

    def _decode(self, ids: Tensor) -> Tensor:
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        if self.layout.kind != "shared":
            return self._look_up(ids, padding_idx)
        # All have one row, so that it is only here that ids out of range are seen.
        first = torch.zeros(1, dtype=torch.int64, device=ids.device)
        none = torch.empty(0, dtype=torch.uint8, device=ids.device)
        _, ids = ops.tiers(ids, first, first, none, self.num_embeddings, self.name)
        rows = self._look_up(torch.zeros_like(ids), -1)
        if self.padding_idx is None:
            return rows
        padding = (ids == padding_idx)[..., None]
        return torch.where(padding, 0 if self.zero_padding else rows.detach(), rows)

    def _look_up(self, ids: Tensor, padding_idx: int) -> Tensor:
        """Rows by the operator."""
        layout, books = self.layout, self.codebook_set
        return ops.lookup(
            ids,
            self.code_table.codes,
            books.codebooks,
            books.scales,
            layout.num_embeddings,
            layout.embedding_dim,
            layout.bits,
            padding_idx,
            self.zero_padding,
            self.sparse,
            self.output_dtype.dtype,
            self.name,
        )

    def extra_repr(self) -> str:
        """Shape, layout and options, as ``repr`` shows them."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}", self.layout.describe()]
        parts.append(f"codebook_dtype={dtype_name(self.codebooks.dtype)}")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.sparse:
            parts.append("sparse=True")
        return ", ".join(parts)


def check_gathered(model: nn.Module) -> None:
    """ValueError where a model, or a table, holds the codes of this rank's rows only."""
    for module in model.modules():
        if isinstance(module, Compressed) and isinstance(module.code_table, CodePart):
            raise ValueError(
                f"table {module.name!r} holds the codes of this rank's rows only; call "
                "gather_codes(model) first, on all ranks"
            )


class CompressedEmbedding(DecodedRows, Compressed):
    """A drop-in for ``nn.Embedding`` that holds bit-packed codes and small codebooks.

    :func:`mec_embed.compress` makes these; by hand, a fresh one decodes to zeros.

    Args:
        layout: rows, dim and code shape, see :class:`mec_embed.layout.CodeLayout`.
        padding_idx: row that passes no gradient; negative ones count from the end.
        zero_padding: whether that row decodes to exact zeros.
        sparse: give the codebooks a sparse gradient.
        dtype: of the output; later ``.to(dtype)`` moves it as it moves any module.
        requires_grad: whether float codebooks are trainable.
        name: the table's name, for errors.
        code_table: codes to share with another module.
        codebook_set: codebooks to share with another module.

    Shape:
        - input: int32 or int64, any shape; also a DTensor that every rank holds as a whole.
        - output: ``(*input.shape, embedding_dim)`` of ``dtype``; of a DTensor, such a one.

    Raises:
        IndexError: an id outside ``0..num_embeddings - 1`` (checked on the CPU).
        TypeError: ids of another dtype.
        ValueError: a DTensor of which ranks hold parts; a ``padding_idx`` that is no row, a
            ``dtype`` that is not floating.

    Example:
        >>> layout = CodeLayout("additive", 1000, 8, num_subvectors=2, codebook_size=16)
        >>> CompressedEmbedding(layout)(torch.tensor([[1, 2, 999]])).shape
        torch.Size([1, 3, 8])
    """


class CompressedEmbeddingBag(DecodedBags, Compressed):
    """A drop-in for ``nn.EmbeddingBag``.

    Other arguments as :class:`CompressedEmbedding`.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether ``offsets`` ends with the number of ids.

    Shape:
        - input: int32 or int64, ``(bags, ids)``, or ``(ids,)`` with offsets ``(bags,)``.
        - per_sample_weights: as input (mode ``"sum"`` only).
        - output: ``(bags, embedding_dim)``.

    Raises:
        IndexError, TypeError: as :class:`CompressedEmbedding`.
        ValueError: offsets that do not fit, as ``nn.EmbeddingBag``; an unknown mode.

    Example:
        >>> layout = CodeLayout("additive", 1000, 8, num_subvectors=2, codebook_size=16)
        >>> CompressedEmbeddingBag(layout, mode="sum")(torch.tensor([[1, 2], [3, 4]])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        layout: CodeLayout,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(layout, **options)
        self.mode = known_mode(mode, self.name)
        self.include_last_offset = include_last_offset

    def _reduce(
        self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Tensor:
        if self.mode == "max" or self.layout.kind == "shared":
            return super()._reduce(input, offsets, per_sample_weights)
        layout, books = self.layout, self.codebook_set
        return ops.bag(
            input,
            offsets,
            per_sample_weights,
            self.code_table.codes,
            books.codebooks,
            books.scales,
            layout.num_embeddings,
            layout.embedding_dim,
            layout.bits,
            -1 if self.padding_idx is None else self.padding_idx,
            self.mode,
            self.include_last_offset,
            self.sparse,
            self.output_dtype.dtype,
            self.name,
        )

    def extra_repr(self) -> str:
        """Shape, layout and options, as ``repr`` shows them."""
        return f"{super().extra_repr()}, mode={self.mode}"
