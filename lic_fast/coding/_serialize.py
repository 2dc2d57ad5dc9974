"""Table sets as bytes (docs/BITSTREAM.md, section 2): what is stored, shipped and hashed."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAGIC = b"LFTB"
LADDER_LEVELS = 244
HEAD = struct.Struct("<4sBBHIIi")
ROW = struct.Struct("<hH")
LEVEL = struct.Struct("<HBB")
MIXTURE_MAGIC = b"LFMX"
MIXTURE_HEAD = struct.Struct("<4sBBH")


class Serialized:
    """What is its bytes: compared, hashed, copied and pickled as them.

    `hash`: what streams name it by. `packed`: what coding looks up, on the CPU.
    """

    def __init__(self, serialized: bytes, packed: Tensor) -> None:
        self.serialized, self.packed = serialized, packed
        self._packed_on: dict[torch.device, Tensor] = {packed.device: packed}
        self.hash = hashlib.sha256(serialized).hexdigest()[:16]

    def packed_on(self, device: torch.device) -> Tensor:
        """`packed` on a device; copied there once."""
        if device not in self._packed_on:
            self._packed_on[device] = self.packed.to(device)
        return self._packed_on[device]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.serialized,)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.serialized == other.serialized

    def __hash__(self) -> int:
        return hash(self.serialized)


def serialize(
    precision: int, ladder: int, rows: Sequence[tuple[int, Sequence[int]]], levels: Sequence[tuple[int, int]]
) -> bytes:
    """rows: (offset, frequencies with the escape's last); levels: (row, shift)."""
    head = HEAD.pack(MAGIC, precision, 0, 0, len(rows), len(levels), ladder)
    sizes = b"".join(ROW.pack(offset, len(frequencies) - 1) for offset, frequencies in rows)
    counts = b"".join(struct.pack(f"<{len(frequencies)}H", *frequencies) for _, frequencies in rows)
    return head + sizes + counts + b"".join(LEVEL.pack(row, shift, 0) for row, shift in levels)


def deserialize(data: bytes) -> tuple[int, int, list[tuple[int, Sequence[int]]], list[tuple[int, int]]]:
    """(precision, ladder, rows, levels) of what serialize made."""
    _, precision, _, _, rows, levels, ladder = HEAD.unpack_from(data)
    sizes = list(ROW.iter_unpack(data[HEAD.size : HEAD.size + ROW.size * rows]))
    at, made = HEAD.size + ROW.size * rows, []
    for offset, size in sizes:
        made.append((offset, struct.unpack_from(f"<{size + 1}H", data, at)))
        at += 2 * (size + 1)
    pairs = [(row, shift) for row, shift, _ in LEVEL.iter_unpack(data[at : at + LEVEL.size * levels])]
    return precision, ladder, made, pairs
