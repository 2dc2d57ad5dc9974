"""The bitstream of CompressAI's entropy coder, as specified: plain Python integers, one symbol after the other."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

LOW = 1 << 31  # the state is in [2**31, 2**63) between symbols; words have 32 bits
PROBABILITY_BITS = 16
NIBBLE_BITS = 4
MOST_NIBBLES = 8  # of a 32-bit value
DONE, INDEX_OUTSIDE, RAN_OUT, MALFORMED = range(4)
_MASK = (1 << 32) - 1


def _signed(value: int) -> int:
    return (value + LOW & _MASK) - LOW


def _pieces(value: int, cdf: list[int], escape: int) -> list[tuple[int, int, int]]:
    """What codes value, the symbol less the row's offset modulo 2**32, as (start, frequency, bits of the total)."""
    raw = None
    if value >> 31:
        raw = ~(value << 1) & _MASK
    elif value >= escape:
        raw = (value - escape) << 1
    symbol = escape if raw is not None else value
    pieces = [(cdf[symbol], cdf[symbol + 1] - cdf[symbol], PROBABILITY_BITS)]
    if raw is not None:
        nibbles = [raw >> shift & 15 for shift in range(0, raw.bit_length(), NIBBLE_BITS)]
        pieces += [(nibble, 1, NIBBLE_BITS) for nibble in (len(nibbles), *nibbles)]
    return pieces


def ans_coder_encode(symbols: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tensor:
    """The stream as uint8 [bytes], no bytes where an index lies outside the tables.

    Symbols are coded from the last to the first, each step the inverse of the decoder's: a state that would leave
    [2**31, 2**63) gives its low word away first. In the end the state's low and high word come before all others.
    """
    rows, sizes, bases = cdfs.tolist(), lengths.tolist(), offsets.tolist()
    if any(not 0 <= index < len(rows) for index in indexes.flatten().tolist()):
        return symbols.new_empty(0, dtype=torch.uint8)
    state, words = LOW, []
    for symbol, index in zip(symbols.flatten().tolist()[::-1], indexes.flatten().tolist()[::-1], strict=True):
        for start, frequency, bits in reversed(_pieces(symbol - bases[index] & _MASK, rows[index], sizes[index] - 2)):
            if state >= (LOW >> bits << 32) * frequency:
                words.append(state & _MASK)
                state >>= 32
            state = (state // frequency << bits) + state % frequency + start
    words += [state >> 32, state & _MASK]
    data = struct.pack(f"<{len(words)}I", *reversed(words))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class _State:
    def __init__(self, stream: bytes, state: int, at: int) -> None:
        self.stream, self.state, self.at = stream, state, at

    def refill(self) -> None:
        if self.state < LOW:
            if 4 * self.at + 4 > len(self.stream):
                raise EOFError
            self.state = self.state << 32 | int.from_bytes(self.stream[4 * self.at : 4 * self.at + 4], "little")
            self.at += 1

    def nibble(self) -> int:
        value = self.state & 15
        self.state >>= NIBBLE_BITS
        self.refill()
        return value

    def symbol(self, cdf: list[int], escape: int) -> int | None:
        """The next symbol less its row's offset, modulo 2**32; None where a value is longer than 32 bits."""
        slot = self.state & (1 << PROBABILITY_BITS) - 1
        symbol = next(s for s in range(escape + 1) if cdf[s + 1] > slot)
        self.state = (self.state >> PROBABILITY_BITS) * (cdf[symbol + 1] - cdf[symbol]) + slot - cdf[symbol]
        self.refill()
        if symbol < escape:
            return symbol
        count = self.nibble()
        if count > MOST_NIBBLES:
            return None
        raw = sum(self.nibble() << NIBBLE_BITS * j for j in range(count))
        return ~(raw >> 1) & _MASK if raw & 1 else (raw >> 1) + escape


def ans_coder_decode_(
    stream: Tensor, state: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor
) -> Tensor:
    """The symbols [N] int32; state int64 [3] holds the coder's state, the words read so far, and the outcome.

    Where the outcome is not DONE the symbols mean nothing and the other two keep their values.
    """
    rows, sizes, bases = cdfs.tolist(), lengths.tolist(), offsets.tolist()
    coder = _State(bytes(stream.tolist()), state[0].item() & (1 << 64) - 1, state[1].item())
    symbols, flat, outcome = torch.zeros(indexes.shape, dtype=torch.int32), [], DONE
    try:
        for index in indexes.flatten().tolist():
            if not 0 <= index < len(rows):
                outcome = INDEX_OUTSIDE
                break
            value = coder.symbol(rows[index], sizes[index] - 2)
            if value is None:
                outcome = MALFORMED
                break
            flat.append(_signed(value + bases[index]))
    except EOFError:
        outcome = RAN_OUT
    if outcome == DONE:
        symbols = torch.tensor(flat, dtype=torch.int32).view(indexes.shape)
        state[0], state[1] = coder.state - (coder.state >> 63 << 64), coder.at
    state[2] = outcome
    return symbols
