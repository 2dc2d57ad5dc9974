"""More than 2**31 elements and 2**33 bytes, on request: LIC_FAST_LARGE=1, 16 GiB of memory, a minute or two."""

from __future__ import annotations

import os

import pytest
import torch
from rans_streams import INT_MAX, INT_MIN, NATIVE

from lic_fast.coding import constant_tables, decode, encode

pytestmark = [
    pytest.mark.skipif(os.environ.get("LIC_FAST_LARGE") != "1", reason="takes 16 GiB; set LIC_FAST_LARGE=1"),
    pytest.mark.skipif(not NATIVE, reason="the C++ library is not built"),
]
_ELEMENTS, _PERIOD = (1 << 31) + 45, 1 << 27


def period():
    """(symbols int32, levels uint8) of a period, of which the whole is made."""
    g = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 60, (_PERIOD,), generator=g, dtype=torch.uint8)
    return torch.randint(-1, 2, (_PERIOD,), generator=g, dtype=torch.int32), levels


def repeated(part):
    whole = part.new_empty(_ELEMENTS)
    for begin in range(0, _ELEMENTS, _PERIOD):
        whole[begin : begin + _PERIOD] = part[: _ELEMENTS - begin]
    return whole


@pytest.mark.parametrize("lanes", [32, "auto"])
def test_more_than_2_to_the_31_symbols(lanes):
    symbols, levels = period()
    whole, levels = repeated(symbols), repeated(levels)
    whole[-1], whole[_ELEMENTS // 2] = INT_MAX, INT_MIN
    stream = encode(whole, levels, constant_tables(), lanes=lanes)
    del whole
    found = decode(stream, levels, constant_tables())
    assert (int(found[-1]), int(found[_ELEMENTS // 2])) == (INT_MAX, INT_MIN)
    found[-1], found[_ELEMENTS // 2] = symbols[(_ELEMENTS - 1) % _PERIOD], symbols[_ELEMENTS // 2 % _PERIOD]
    for begin in range(0, _ELEMENTS, _PERIOD):
        part = found[begin : begin + _PERIOD]
        assert torch.equal(part, symbols[: len(part)]), begin
