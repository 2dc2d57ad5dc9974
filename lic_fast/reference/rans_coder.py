"""The bitstream of docs/BITSTREAM.md, as specified: one row of lanes after the other, in NumPy's 64-bit integers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._rans_container import (
    ELEMENTS,
    ELEMENTS_DONE,
    ESCAPE_AT,
    ESCAPE_WIDTH,
    ESCAPES,
    INDEX_OUTSIDE,
    LANES,
    LEFT_OVER,
    NOT_ZERO,
    RAN_OUT,
    ROWS,
    SKIP,
    STATUS,
    STEPS,
    STEPS_DONE,
    STREAMS,
    WORD_AT,
    WORDS,
    Refused,
    rans_coder_open,
    states_of,
    write,
)
from ._rans_mixture import Mixtures, rans_coder_mixture

__all__ = [
    "Tables",
    "rans_coder_decode_",
    "rans_coder_encode",
    "rans_coder_mixture",
    "rans_coder_open",
    "rans_coder_reconstruct_",
]

LOW = 1 << 16
TAIL_LIMIT = (1 << 32) - LOW
MOST_TAIL_ROWS = 256
LADDER_FIRST, LADDER_LEVELS = 1980, 244
_TABLES_HEAD = 8


class Tables:
    """Views of packed tables (lic_fast/ops/rans_coder.py): rows and levels."""

    def __init__(self, packed: Tensor) -> None:
        words = packed.numpy()
        self.precision, rows, self.levels, stride, self.ladder = (int(word) for word in words[:5])
        at = _TABLES_HEAD + (self.levels + 255) // 256 * 256
        key, size = words[_TABLES_HEAD:at].view(np.uint32).reshape(-1, 2)[: self.levels].T.astype(np.int64)
        self.row, self.shift, self.size = key & 0xFFF, key >> 12 & 15, size
        self.offset = (key >> 16) - (key >> 31 << 16)
        self.starts = words[at : at + rows * stride // 4].view(np.uint16).reshape(rows, stride).astype(np.int64)

    def of(self, indexes: np.ndarray) -> np.ndarray:
        """Levels from indexes, or from scales by their bits."""
        if indexes.dtype == np.float32:
            return self.ladder + np.clip((indexes.view(np.int32) >> 19) - LADDER_FIRST, 0, LADDER_LEVELS - 1).astype(
                np.int64
            )
        levels = indexes.astype(np.int64)
        if levels.size and not 0 <= levels.min() <= levels.max() < self.levels:
            raise Refused(INDEX_OUTSIDE)
        return levels

    def skipped(self, levels: np.ndarray, skip: int) -> np.ndarray:
        """Which elements are left out."""
        return (levels >= self.ladder) & (levels < self.ladder + skip)

    def coded(self, levels: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shift, value, plain bits, whether escaped, start and frequency of symbols."""
        shift, row, size = self.shift[levels], self.row[levels], self.size[levels]
        shifted = _int32(symbols + (1 << shift >> 1))
        value, raw = shifted >> shift, shifted & (1 << shift) - 1
        number = value - self.offset[levels]
        escaped = (number < 0) | (number >= size)
        number = np.where(escaped, size, number)
        start = self.starts[row, number]
        return shift, value, raw, escaped, start, self.starts[row, number + 1] - start

    def found(self, levels: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shift, value, whether escaped, start and frequency of the symbols that hold the slots."""
        row = self.row[levels]
        number = (self.starts[row] <= slot[:, None]).sum(1) - 1
        start = self.starts[row, number]
        escaped = number == self.size[levels]
        return self.shift[levels], number + self.offset[levels], escaped, start, self.starts[row, number + 1] - start

    def joined(self, levels: np.ndarray, value: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """Symbols from values and plain bits, modulo 2**32."""
        shift = self.shift[levels]
        return _int32((value << shift) + raw - (1 << shift >> 1))


def _tables(packed: Tensor) -> Tables | Mixtures:
    return Tables(packed) if packed[1] else Mixtures(packed)


def _int32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32).view(np.int32).astype(np.int64)


def shares(elements: int, lanes: int, streams: int) -> list[slice]:
    """The elements of a step that each stream takes."""
    rows = -(-elements // lanes)
    each = -(-rows // streams) * lanes
    return [slice(min(elements, w * each), min(elements, (w + 1) * each)) for w in range(streams)]


class _Encoder:
    """One stream; rows come from the last to the first."""

    def __init__(self, tables: Tables | Mixtures, lanes: int) -> None:
        self.tables, self.x = tables, np.zeros(lanes, np.int64)
        self.in_tail, self.tail_rows, self.rows = True, 0, 0
        self.words: list[int] = []  # the first one last
        self.escapes: list[int] = []  # the first one last

    def row(self, levels: np.ndarray, symbols: np.ndarray) -> None:
        n, active = self.tables.precision, len(levels)
        shift, value, raw, escaped, start, frequency = self.tables.coded(levels, symbols)
        if self.in_tail:
            bits = self.x[:active] << shift | raw
            x = (bits // frequency << n) + bits % frequency + start
            if self.tail_rows < MOST_TAIL_ROWS and x.max() < TAIL_LIMIT:
                self.x[:active], self.tail_rows = x, self.tail_rows + 1
                self.escapes += value[escaped][::-1].tolist()
                return
            self.lift()
        x = self.emit(self.x[:active], (shift > 0) & (self.x[:active] >> (32 - shift) > 0)) << shift | raw
        x = self.emit(x, x >> (32 - n) >= frequency)
        self.x[:active] = (x // frequency << n) + x % frequency + start
        self.rows += 1
        self.escapes += value[escaped][::-1].tolist()

    def emit(self, x: np.ndarray, too_large: np.ndarray) -> np.ndarray:
        self.words += (x[too_large] & 0xFFFF)[::-1].tolist()
        return np.where(too_large, x >> 16, x)

    def lift(self) -> None:
        self.x += LOW
        self.in_tail = False


def rans_coder_encode(
    symbols: Tensor, indexes: Tensor, packed: Tensor, head: Tensor, steps: Tensor, lanes: int, streams: int, skip: int
) -> tuple[Tensor, Tensor]:
    """Containers of symbols [B, N], one after the other as uint8 [bytes], and their sizes, int64 [B].

    indexes: int32 or uint8 levels or fp32 scales [B, N], or mixtures' integers int32 [B, 2 + 2 K, N]; steps int64 [S]:
    elements of each step, N in all. A negative first size is a status.
    """
    tables, first = _tables(packed), head.numpy().tobytes()
    try:
        containers = [
            write(first, _encode_one(tables, row, index, steps.tolist(), lanes, streams, skip))
            for row, index in zip(symbols.numpy().astype(np.int64), indexes.numpy(), strict=True)
        ]
    except Refused as refused:
        return torch.empty(0, dtype=torch.uint8), torch.tensor([-refused.status])
    data = torch.frombuffer(bytearray(b"".join(containers)), dtype=torch.uint8) if containers else head[:0]
    return data, torch.tensor([*map(len, containers)] or [0], dtype=torch.int64)


def _encode_one(
    tables: Tables | Mixtures,
    symbols: np.ndarray,
    indexes: np.ndarray,
    steps: list[int],
    lanes: int,
    streams: int,
    skip: int,
) -> list[tuple[int, np.ndarray, list[int], list[int]]]:
    levels, coders, end = tables.of(indexes), [_Encoder(tables, lanes) for _ in range(streams)], len(symbols)
    for step in reversed(steps):
        for coder, share in zip(coders, shares(step, lanes, streams), strict=True):
            own, values = levels[end - step : end][share], symbols[end - step : end][share]
            coded = ~tables.skipped(own, skip)
            if values[~coded].any():
                raise Refused(NOT_ZERO)
            own, values = own[coded], values[coded]
            for i in range((len(own) - 1) // lanes * lanes, -1, -lanes):
                coder.row(own[i : i + lanes], values[i : i + lanes])
        end -= step
    for coder in coders:
        if coder.in_tail:
            coder.lift()
    return [(coder.rows, coder.x, coder.words[::-1], coder.escapes[::-1]) for coder in coders]


class _Decoder:
    """One stream, from its state on."""

    def __init__(self, tables: Tables | Mixtures, data: bytes, stream: np.ndarray, x: np.ndarray, lanes: int) -> None:
        self.tables, self.data, self.stream, self.x = tables, data, stream, x[:lanes]

    def take(self, at: int, left: int, width: int, signed: bool) -> int:
        if self.stream[left] == 0:
            raise Refused(RAN_OUT)
        first = int(self.stream[at])
        self.stream[at] += width
        self.stream[left] -= 1
        return int.from_bytes(self.data[first : first + width], "little", signed=signed)

    def refill(self, x: np.ndarray, allowed: np.ndarray) -> None:
        if self.stream[ROWS] >= 0:
            for i in np.flatnonzero((x < LOW) & allowed):
                x[i] = x[i] << 16 | self.take(WORD_AT, WORDS, 2, False)

    def enter_tail(self) -> None:
        if self.stream[ROWS] == 0:
            self.x -= np.uint32(LOW)
            self.stream[ROWS] = -1

    def row(self, levels: np.ndarray) -> np.ndarray:
        self.enter_tail()
        n, active = self.tables.precision, len(levels)
        x = self.x[:active].astype(np.int64)
        slot = x & (1 << n) - 1
        shift, value, escaped, start, frequency = self.tables.found(levels, slot)
        x = frequency * (x >> n) + slot - start
        self.refill(x, np.ones(active, bool))
        raw = x & (1 << shift) - 1
        x = x >> shift
        self.refill(x, shift > 0)
        for i in np.flatnonzero(escaped):
            value[i] = self.take(ESCAPE_AT, ESCAPES, int(self.stream[ESCAPE_WIDTH]), True)
        self.x[:active] = x.astype(np.uint32)
        if self.stream[ROWS] > 0:
            self.stream[ROWS] -= 1
        return self.tables.joined(levels, value, raw)


def rans_coder_decode_(
    streams: list[Tensor], states: list[Tensor], indexes: Tensor, packed: Tensor, symbols: Tensor, last: bool
) -> None:
    """Decodes the next step of B containers into symbols [B, n]; states move on.

    indexes [B, n] as in rans_coder_encode. Where `last`, nothing may be left over. The first state's status says how it
    went.
    """
    tables, (batch, n) = _tables(packed), symbols.shape
    out = symbols.numpy()
    try:
        for b in range(batch):
            head = states_of(states[b])[0]
            if head[ELEMENTS] - head[ELEMENTS_DONE] < n:
                raise Refused(LEFT_OVER)
            out[b] = _decode_one(tables, streams[b].numpy().tobytes(), states[b], indexes[b].numpy())
            head[ELEMENTS_DONE] += n
            head[STEPS_DONE] += not last or n > 0
            if last:
                _finish(states[b])
    except Refused as refused:
        states[0][STATUS] = refused.status


def rans_coder_reconstruct_(
    streams: list[Tensor],
    states: list[Tensor],
    indexes: Tensor,
    packed: Tensor,
    means: Tensor | None,
    places: Tensor | None,
    values: Tensor,
    last: bool,
) -> None:
    """Decodes the next step of B containers into values fp32 [B, M]: symbols plus means, at places int32 [n] or all.

    indexes, means fp32 [B, M]: those of element i lie at places[i] too. The rest as in rans_coder_decode_.
    """
    room = values.shape[1]
    where = torch.arange(room) if places is None else places.long()
    if where.numel() and not 0 <= int(where.min()) <= int(where.max()) < room:
        states[0][STATUS] = INDEX_OUTSIDE
        return
    symbols = torch.zeros((len(values), len(where)), dtype=torch.int32)
    rans_coder_decode_(streams, states, indexes[:, where], packed, symbols, last)
    if states[0][STATUS] == 0:
        values[:, where] = symbols.float() + (0.0 if means is None else means[:, where])


def _decode_one(tables: Tables | Mixtures, data: bytes, state: Tensor, indexes: np.ndarray) -> np.ndarray:
    head, streams, states = states_of(state)
    levels = tables.of(indexes)
    symbols = np.zeros(len(levels), np.int32)
    lanes = int(head[LANES])
    for stream, x, share in zip(streams, states, shares(len(levels), lanes, int(head[STREAMS])), strict=True):
        coder = _Decoder(tables, data, stream, x, lanes)
        coded = ~tables.skipped(levels[share], int(head[SKIP]))
        own = levels[share][coded]
        values = [coder.row(own[i : i + lanes]) for i in range(0, len(own), lanes)]
        if values:
            symbols[np.flatnonzero(coded) + share.start] = np.concatenate(values)
        coder.enter_tail()
    return symbols


def _finish(state: Tensor) -> None:
    head, streams, states = states_of(state)
    clean = head[ELEMENTS_DONE] == head[ELEMENTS] and (head[STEPS] == 0 or head[STEPS] == head[STEPS_DONE])
    for stream, x in zip(streams, states, strict=True):
        x = x[: head[LANES]] - np.uint32(LOW if stream[ROWS] == 0 else 0)
        clean = clean and not x.any() and stream[WORDS] == 0 and stream[ESCAPES] == 0 and stream[ROWS] <= 0
    if not clean:
        raise Refused(LEFT_OVER)
