"""The container of docs/BITSTREAM.md, section 6, as specified: opened into state tensors, and written.

A state is int64 [32 + 24 W]. Words 0 to 31: status, bytes, L, W, profile, skip, steps (0: one-shot), elements, elements
done, steps done, table hash, dimensions (-1: stepwise), 8 sides. Then for each stream: byte of the next word, words
left, byte of the next escape value, escape values left, bytes of each, rows before the tail (-1 once in it), 2 unused,
and the 32 states in 16 words. Every implementation keeps this layout (csrc/common/rans_container.h).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

(
    DONE, TRUNCATED, FOREIGN, VERSION, PROFILE, FLAGS, NUMBER, IMPOSSIBLE, TRAILING, CHECK, PADDING, INDEX_OUTSIDE,
    RAN_OUT, LEFT_OVER, NOT_ZERO, NO_LADDER,
) = range(16)  # fmt: skip
MAGIC, VERSION_NUMBER = b"LFR", 1
MOST_STREAMS, MOST_ELEMENTS, MOST_DIMENSIONS, LADDER_LEVELS = 4096, 1 << 48, 8, 244
HEAD, STREAM = 32, 24  # words of a state
STATUS, BYTES, LANES, STREAMS, PROFILE_AT, SKIP, STEPS, ELEMENTS, ELEMENTS_DONE, STEPS_DONE, HASH, DIMENSIONS = range(
    12
)
WORD_AT, WORDS, ESCAPE_AT, ESCAPES, ESCAPE_WIDTH, ROWS = range(6)
_X = 8  # where a stream's states begin
_LEAST = 14


class Refused(Exception):
    """A status other than DONE."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C of data."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise Refused(TRUNCATED)
        self.at += 1
        return self.data[self.at - 1]

    def number(self, most: int) -> int:
        value = 0
        for shift in range(0, 56, 7):
            part = self.byte()
            value |= (part & 127) << shift
            if part < 128:
                if (shift and part == 0) or value > most:
                    raise Refused(NUMBER)
                return value
        raise Refused(NUMBER)


def _refuse_where(condition: bool, status: int) -> None:
    if condition:
        raise Refused(status)


def _read_head(reader: _Reader, head: np.ndarray) -> None:
    data = reader.data
    _refuse_where(len(data) >= 3 and data[:3] != MAGIC, FOREIGN)
    _refuse_where(len(data) < _LEAST, TRUNCATED)
    _refuse_where(data[3] != VERSION_NUMBER, VERSION)
    head[PROFILE_AT] = data[4]
    _refuse_where(data[4] > 1, PROFILE)
    flags = data[5]
    _refuse_where(bool(flags >> 5) or flags & 7 > 5 or (data[4] == 1 and bool(flags & 8)), FLAGS)
    head[LANES] = 1 << (flags & 7)
    head[HASH] = int.from_bytes(data[6:14], "little", signed=True)
    reader.at = _LEAST
    if flags & 8:
        head[SKIP] = reader.byte()
        _refuse_where(not 1 <= head[SKIP] <= LADDER_LEVELS, IMPOSSIBLE)
    head[STREAMS] = reader.number(MOST_STREAMS)
    _refuse_where(head[STREAMS] < 1, IMPOSSIBLE)
    if flags & 16:
        head[DIMENSIONS] = -1
        head[STEPS], head[ELEMENTS] = reader.number(MOST_ELEMENTS), reader.number(MOST_ELEMENTS)
        return
    head[DIMENSIONS] = reader.number(MOST_DIMENSIONS)
    elements = 1
    for i in range(int(head[DIMENSIONS])):
        side = reader.number(MOST_ELEMENTS)
        head[DIMENSIONS + 1 + i] = side
        elements *= side
        _refuse_where(elements > MOST_ELEMENTS, IMPOSSIBLE)
    head[ELEMENTS] = elements


def _read_directory(reader: _Reader, head: np.ndarray) -> np.ndarray:
    count, elements = int(head[STREAMS]), int(head[ELEMENTS])
    _refuse_where(reader.at + 3 * count > len(reader.data), TRUNCATED)
    streams = np.zeros((count, STREAM), np.int64)
    for stream in streams:
        stream[ROWS] = reader.number(elements)
        stream[WORDS] = reader.number(2 * elements)
        stream[ESCAPES] = reader.number(elements)
        stream[ESCAPE_WIDTH] = reader.byte() if stream[ESCAPES] else 1
        _refuse_where(stream[ESCAPE_WIDTH] not in (1, 2, 4), IMPOSSIBLE)
    return streams


def _bits(data: bytes, bit: int, count: int) -> int:
    window = int.from_bytes(data[bit // 8 : (bit + count + 7) // 8], "little")
    return window >> bit % 8 & (1 << count) - 1


def _read_states(data: bytes, at: int, head: np.ndarray, streams: np.ndarray) -> None:
    lanes = int(head[STREAMS] * head[LANES])
    mantissas = at + (4 * lanes + 7) // 8
    _refuse_where(mantissas > len(data), TRUNCATED)
    widths = [16 + _bits(data, 8 * at + 4 * i, 4) for i in range(lanes)]
    bit = 8 * mantissas
    end = (bit + sum(widths) + 7) // 8
    _refuse_where(end > len(data), TRUNCATED)
    _refuse_where(bool(4 * lanes % 8 and data[mantissas - 1] >> 4), PADDING)
    _refuse_where(bool((bit + sum(widths)) % 8 and data[end - 1] >> sum(widths) % 8), PADDING)
    x = np.zeros((len(streams), 32), np.uint32)
    for i, width in enumerate(widths):
        x[divmod(i, int(head[LANES]))] = 1 << width | _bits(data, bit, width)
        bit += width
    streams[:, _X:] = x.view(np.int64)
    _refuse_where(end % 2 == 1 and end < len(data) and data[end] != 0, PADDING)
    at = end + end % 2
    for stream in streams:
        stream[WORD_AT] = at
        at += 2 * int(stream[WORDS])
    for stream in streams:
        stream[ESCAPE_AT] = at
        at += int(stream[ESCAPE_WIDTH] * stream[ESCAPES])
    head[BYTES] = at + 4
    _refuse_where(head[BYTES] > len(data), TRUNCATED)
    _refuse_where(head[BYTES] < len(data), TRAILING)


def rans_coder_open(stream: Tensor, check: bool) -> Tensor:
    """The state of a container, uint8 [bytes]; its status says what is wrong, and then no streams follow."""
    data = stream.numpy().tobytes()
    reader, head = _Reader(data), np.zeros(HEAD, np.int64)
    try:
        _read_head(reader, head)
        streams = _read_directory(reader, head)
        _read_states(data, reader.at, head, streams)
        _refuse_where(check and crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"), CHECK)
    except Refused as refused:
        head[STATUS] = refused.status
        return torch.from_numpy(head)
    return torch.from_numpy(np.concatenate([head, streams.flatten()]))


def states_of(state: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of a state tensor: the head, the streams [W, 24], and their lanes' states uint32 [W, 32]."""
    words = state.numpy()
    streams = words[HEAD:].reshape(-1, STREAM)
    return words[:HEAD], streams, words[HEAD:].view(np.uint32).reshape(-1, 2 * STREAM)[:, 2 * _X :]


def write(head: bytes, streams: list[tuple[int, np.ndarray, list[int], list[int]]]) -> bytes:
    """A container; each stream as rows before the tail, states, words and escape values in the order of taking."""
    out, widths = bytearray(head), []
    for rows, _, words, escapes in streams:
        out += varint(rows) + varint(len(words)) + varint(len(escapes))
        bits = max((value.bit_length() if value >= 0 else (~value).bit_length() for value in escapes), default=0)
        widths.append(1 if bits < 8 else 2 if bits < 16 else 4)
        out += bytes([widths[-1]] if escapes else [])
    states = [int(x) for _, lanes, _, _ in streams for x in lanes]
    exponents = [x.bit_length() - 1 for x in states]
    out += _packed([e - 16 for e in exponents], [4] * len(states))
    out += _packed([x - (1 << e) for x, e in zip(states, exponents, strict=True)], exponents)
    out += bytes(len(out) % 2)
    for _, _, words, _ in streams:
        out += np.array(words, np.dtype("<u2")).tobytes()
    for (_, _, _, escapes), width in zip(streams, widths, strict=True):
        out += b"".join(value.to_bytes(width, "little", signed=True) for value in escapes)
    return bytes(out + crc32c(bytes(out)).to_bytes(4, "little"))


def _packed(values: list[int], widths: list[int]) -> bytes:
    bits = "".join(f"{value:0{width}b}" for value, width in zip(values[::-1], widths[::-1], strict=True))
    return int(bits or "0", 2).to_bytes((len(bits) + 7) // 8, "little")
