"""Codes to bytes and back.

Row ``r`` of a table with M codes of ``bits`` bits starts at bit ``r * M * bits`` of one
little-endian bit stream; its codes follow each other, lowest bit first. No bit is lost between
rows, and :data:`~mec_embed.layout.PACKED_PADDING` zero bytes end the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import packed_bytes

#: Rows of codes made at once; a multiple of 8, so that every chunk starts on a whole byte.
CHUNK_ROWS = 1 << 15
#: The same on other devices than the CPU, at most.
DEVICE_CHUNK_ROWS = 1 << 20
#: Rows packed at once: each of their bits is a word of its own on the way.
PACK_ROWS = 1 << 12
#: Bytes of these words on other devices than the CPU.
DEVICE_PACK_BYTES = 64 << 20


def empty_packed(rows: int, num_subvectors: int, bits: int) -> Tensor:
    """A zeroed uint8 buffer (bytes,) for ``rows`` rows of codes."""
    return torch.zeros(packed_bytes(rows, num_subvectors * bits), dtype=torch.uint8)


def pack_into(packed: Tensor, first_row: int, codes: Tensor, bits: int) -> None:
    """Write ``codes`` (n, M), integers below ``2**bits``, as rows ``first_row`` and on.

    ``first_row`` is a multiple of 8, so that no byte is shared with the rows before.
    """
    if first_row % 8:
        raise ValueError(f"first_row must be a multiple of 8, got {first_row}")
    row_bits = codes.shape[1] * bits
    shifts = torch.arange(bits, dtype=torch.int32, device=codes.device)
    powers = 1 << torch.arange(8, dtype=torch.int32, device=codes.device)
    step = PACK_ROWS if codes.is_cpu else max(8, DEVICE_PACK_BYTES // (4 * row_bits) // 8 * 8)
    for start in range(0, codes.shape[0], step):
        chunk = codes[start : start + step].int()
        stream = ((chunk[:, :, None] >> shifts) & 1).reshape(-1)
        stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8))
        data = (stream.view(-1, 8) * powers).sum(1).to(torch.uint8)
        offset = (first_row + start) * row_bits // 8
        packed[offset : offset + data.numel()] = data.to(packed.device)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` (rows, M), integers in ``[0, 2**bits)``, into a uint8 tensor (bytes,).

    Raises:
        ValueError: ``bits`` outside 1..16, or a code that does not fit.

    Example:
        >>> unpack(pack(torch.tensor([[3, 0], [1, 2]]), bits=2), 2, 2, torch.tensor([1]))
        tensor([[1, 2]])
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be in 1..16, got {bits}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(
            f"codes must be in [0, {1 << bits}) for {bits} bits, got "
            f"{int(codes.min())}..{int(codes.max())}"
        )
    packed = empty_packed(codes.shape[0], codes.shape[1], bits).to(codes.device)
    pack_into(packed, 0, codes, bits)
    return packed


def unpack(packed: Tensor, num_subvectors: int, bits: int, ids: Tensor) -> Tensor:
    """Codes (n, num_subvectors) int64 of the rows ``ids`` (n,) int64."""
    offsets = torch.arange(num_subvectors, device=ids.device) * bits
    position = ids[:, None] * (num_subvectors * bits) + offsets
    byte, shift = position >> 3, position & 7
    # A code of up to 16 bits that starts at bit 7 of a byte ends in the third byte.
    word = packed[byte].long()
    word |= packed[byte + 1].long() << 8
    if bits > 9:
        word |= packed[byte + 2].long() << 16
    return (word >> shift) & ((1 << bits) - 1)
