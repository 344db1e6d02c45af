"""Packing codes into bits: round trips, chunks, bytes, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mec_embed import packing
from mec_embed.layout import packed_bytes
from mec_embed.packing import empty_packed, pack, pack_into, unpack

#: dtype -> bits that fit its positive values
DTYPES = {torch.uint8: 8, torch.int16: 15, torch.int32: 16, torch.int64: 16}


@st.composite
def code_arrays(draw, most_rows=70):
    """(codes, bits): integer codes (rows, M) with the extremes well represented."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    bits = draw(st.integers(1, DTYPES[dtype]))
    rows, count = draw(st.integers(0, most_rows)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 1 << bits, (rows, count), generator=generator)
    if draw(st.booleans()):
        codes.fill_((1 << bits) - 1)
    return codes.to(dtype), bits


def naive_pack(codes, bits):
    """The documented bit stream, one bit at a time."""
    stream = [(code >> bit) & 1 for row in codes.tolist() for code in row for bit in range(bits)]
    data = bytearray(packed_bytes(len(codes), codes.shape[1] * bits))
    for place, bit in enumerate(stream):
        data[place >> 3] |= bit << (place & 7)
    return torch.frombuffer(data, dtype=torch.uint8)


@given(code_arrays())
@settings(deadline=None, max_examples=80)
def test_round_trip_and_documented_format(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_bytes(len(codes), codes.shape[1] * bits)
    assert torch.equal(packed, naive_pack(codes, bits))
    read = unpack(packed, codes.shape[1], bits, torch.arange(len(codes)))
    assert read.dtype is torch.int64
    assert torch.equal(read, codes.long())


@given(code_arrays(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_any_rows_in_any_order(case, seed):
    codes, bits = case
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(1, len(codes)), (min(9, len(codes) * 9),), generator=generator)
    assert torch.equal(unpack(pack(codes, bits), codes.shape[1], bits, ids), codes[ids].long())


@given(code_arrays(most_rows=200), st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_chunks_give_the_same_bytes(case, steps):
    """Chunks that start at multiples of 8 rows, written last to first."""
    codes, bits = case
    packed = empty_packed(len(codes), codes.shape[1], bits)
    bounds, step = [0], 0
    while bounds[-1] < len(codes):
        bounds.append(bounds[-1] + 8 * steps[step % len(steps)])
        step += 1
    for start, end in reversed(list(zip(bounds, bounds[1:], strict=False))):
        pack_into(packed, start, codes[start:end], bits)
    assert torch.equal(packed, pack(codes, bits))


@pytest.mark.parametrize("bits", [1, 7, 13])
def test_internal_chunks_do_not_show(monkeypatch, bits):
    codes = torch.randint(0, 1 << bits, (77, 3), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "PACK_ROWS", 8)
    assert torch.equal(pack(codes, bits), whole)


def test_chunk_at_another_row_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_into(empty_packed(20, 1, 3), 4, torch.zeros(4, 1, dtype=torch.long), 3)


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits"):
        pack(torch.zeros(1, 1, dtype=torch.long), bits)


@pytest.mark.parametrize(("code", "bits"), [(4, 2), (-1, 2), (1 << 16, 16), (2, 1)])
def test_codes_out_of_range(code, bits):
    codes = torch.zeros(5, 2, dtype=torch.long)
    codes[3, 1] = code
    with pytest.raises(ValueError, match="codes must be in"):
        pack(codes, bits)


def test_last_row_can_be_read_as_64_bits():
    """Padding: 8 zero bytes lie after the last code."""
    packed = pack(torch.full((3, 5), (1 << 16) - 1), 16)
    assert packed[:-8].eq(255).all() and packed[-8:].eq(0).all()
