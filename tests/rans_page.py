"""A decoder written from docs/BITSTREAM.md alone, in plain integers."""

from __future__ import annotations

import struct


class Bits:
    def __init__(self, data, at):
        self.value, self.at = int.from_bytes(data[at:], "little"), 0

    def take(self, count):
        self.at += count
        return self.value >> (self.at - count) & (1 << count) - 1


def parse_tables(data):
    magic, n, _, _, rows, levels, ladder = struct.unpack_from("<4sBBHIIi", data)
    assert magic == b"LFTB"
    sizes = [struct.unpack_from("<hH", data, 20 + 4 * r) for r in range(rows)]
    at, made_rows = 20 + 4 * rows, []
    for offset, size in sizes:
        made_rows.append((offset, size, struct.unpack_from(f"<{size + 1}H", data, at)))
        at += 2 * (size + 1)
    return n, ladder, made_rows, [struct.unpack_from("<HBB", data, at + 4 * v)[:2] for v in range(levels)]


def signed(value, bits=32):
    value &= (1 << bits) - 1
    return value - (value >> (bits - 1) << bits)


class Rows:
    """Section 2: elements by their indexes."""

    profile = 0

    def __init__(self, tables, indexes, skip):
        self.precision, self.ladder, self.rows, self.levels = parse_tables(tables)
        self.indexes, self.skip = indexes, skip

    def coded(self, i):
        return not self.ladder <= self.indexes[i] < self.ladder + self.skip

    def shift(self, i):
        return self.levels[self.indexes[i]][1]

    def find(self, i, slot):
        """(start, frequency, value or None for an escape)"""
        offset, size, frequencies = self.rows[self.levels[self.indexes[i]][0]]
        j = start = 0
        while slot >= start + frequencies[j]:
            start, j = start + frequencies[j], j + 1
        return start, frequencies[j], None if j == size else offset + j

    def symbol(self, i, value, raw):
        k = self.shift(i)
        return signed((value << k) + raw - (1 << k >> 1))


class Mixtures:
    """Section 7: elements by their integers, a list for each."""

    profile, skip = 1, 0

    def __init__(self, table, elements):
        magic, self.precision, _, _ = struct.unpack_from("<4sBBH", table)
        assert magic == b"LFMX"
        self.table = [struct.unpack_from("<HH", table, 8 + 4 * i) for i in range(64)]
        self.elements = elements

    def coded(self, i):
        return True

    def shift(self, i):
        return self.elements[i][1] >> 12 & 15

    def start(self, i, j):
        n, size, parts = self.precision, self.elements[i][1] & 0xFFF, self.elements[i][2:]
        if j in (0, size + 2):
            return 1 << n if j else 0
        total = 1 << 31
        for mean, form in zip(parts[::2], parts[1::2], strict=True):
            y = 1024 * j - mean
            u = min(abs(y) * (256 + (form & 255)) >> (form >> 8 & 31), (1 << 14) - 1)
            half, slope = self.table[u >> 8]
            total += ((y > 0) - (y < 0)) * (form >> 16 & 0xFFFF) * (half + (slope * (u % 256) >> 8))
        return j + ((total >> n) * ((1 << n) - 1 - size) >> (32 - n))

    def find(self, i, slot):
        last, j = (self.elements[i][1] & 0xFFF) + 1, 0
        while j < last and self.start(i, j + 1) <= slot:
            j += 1
        return self.start(i, j), self.start(i, j + 1) - self.start(i, j), j if 0 < j < last else None

    def symbol(self, i, value, raw):
        return signed(self.elements[i][0] + (value << self.shift(i)) + raw)


def plain_decode(data, elements, steps):
    """Sections 3 to 6, one lane after the other: (the dimensions, the symbols)."""
    n = elements.precision
    assert data[:5] == b"LFR\1" + bytes([elements.profile])
    lanes, at = 1 << (data[5] & 7), 14
    assert bool(data[5] & 8) == bool(elements.skip)
    if elements.skip:
        assert data[at] == elements.skip
        at += 1

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value

    streams = varint()
    head = [varint() for _ in range(2)] if data[5] & 16 else [varint() for _ in range(varint())]
    directory = []
    for _ in range(streams):
        entry = [varint() for _ in range(3)]
        if entry[2]:
            entry.append(data[at])
            at += 1
        directory.append(entry)
    exponents = Bits(data, at)
    widths = [16 + exponents.take(4) for _ in range(streams * lanes)]
    at += (4 * streams * lanes + 7) // 8
    mantissas = Bits(data, at)
    states = [(1 << width) + mantissas.take(width) for width in widths]
    at += (sum(widths) + 7) // 8
    at += at % 2
    words, escapes = [], []
    for _, count, *_ in directory:
        words.append(list(struct.unpack_from(f"<{count}H", data, at)))
        at += 2 * count
    for _, _, count, *width in directory:
        width = width[0] if width else 1
        escapes.append([int.from_bytes(data[at + i * width :][:width], "little", signed=True) for i in range(count)])
        at += count * width
    assert at == len(data) - 4
    symbols, first = [], 0
    done = [0] * streams
    for step in steps:
        lines = (step + lanes - 1) // lanes
        each = (lines + streams - 1) // streams * lanes
        for w in range(streams):
            part = range(first + min(step, w * each), first + min(step, (w + 1) * each))
            coded = [i for i in part if elements.coded(i)]
            values = dict.fromkeys(part, 0)
            x = states[w * lanes : (w + 1) * lanes]

            def refill(lane, x=x, w=w):
                if done[w] < directory[w][0] and x[lane] < 1 << 16:
                    x[lane] = x[lane] << 16 | words[w].pop(0)

            for begin in range(0, len(coded), lanes):
                active = coded[begin : begin + lanes]
                if done[w] == directory[w][0]:
                    x[:] = [value - (1 << 16) for value in x]
                picked = []
                for lane, i in enumerate(active):
                    slot = x[lane] % (1 << n)
                    start, frequency, value = elements.find(i, slot)
                    x[lane] = frequency * (x[lane] >> n) + slot - start
                    refill(lane)
                    picked.append(value)
                raws = []
                for lane, i in enumerate(active):
                    k = elements.shift(i)
                    raws.append(x[lane] % (1 << k))
                    x[lane] >>= k
                    if k:
                        refill(lane)
                for i, value, raw in zip(active, picked, raws, strict=True):
                    values[i] = elements.symbol(i, escapes[w].pop(0) if value is None else value, raw)
                done[w] += 1
            states[w * lanes : (w + 1) * lanes] = x
            symbols += values.values()
        first += step
    for w in range(streams):
        left = 1 << 16 if done[w] == directory[w][0] else 0
        assert all(x == left for x in states[w * lanes : (w + 1) * lanes]) and not words[w] and not escapes[w]
    return head, symbols
