"""How CDC's sampler cuts a large image into overlapping tiles of one size, and how it puts them together again.

Unlike those of _tiles.py these tiles are another function than the whole image, since the U-Net's attention sees all
places: so where they lie is part of the format (docs/CDC.md, "Large images").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Span = tuple[int, int]


def cut(side: int, tile: int, overlap: int, grid: int) -> list[Span]:
    """[first, end) of each tile along an axis of `side` pixels: as few as may be, all of one length, at most `tile`.

    Neighbours share at least `overlap` pixels. All numbers are multiples of grid, and tile is 0 (no limit) or more than
    overlap.
    """
    if not tile or side <= tile:
        return [(0, side)]
    count = -(-(side - overlap) // (tile - overlap))
    length = -(-(side + (count - 1) * overlap) // (count * grid)) * grid
    room = (side - length) // grid
    return [(first, first + length) for first in (i * room // (count - 1) * grid for i in range(count))]


def windows(spans: Sequence[Span]) -> list[Tensor]:
    """The weight [length] fp32 of each tile along an axis, at every place of it; those of one place sum to 1.

    Where two tiles overlap, weight passes from one to the other in the middle half of the overlap, linearly: the
    outermost quarter, which knows least of its surroundings, is not looked at.
    """
    found = []
    for i, (first, end) in enumerate(spans):
        weight = torch.ones(end - first, dtype=torch.float64)
        if i:
            weight *= _ramp(end - first, spans[i - 1][1] - first)
        if i < len(spans) - 1:
            weight *= _ramp(end - first, end - spans[i + 1][0]).flip(0)
        found.append(weight)
    total = torch.zeros(spans[-1][1], dtype=torch.float64)
    for (first, end), weight in zip(spans, found, strict=True):
        total[first:end] += weight
    return [(weight / total[first:end]).float() for (first, end), weight in zip(spans, found, strict=True)]


def _ramp(length: int, overlap: int) -> Tensor:
    """0 in the first quarter of the overlap, 1 from its third quarter's end on."""
    return ((torch.arange(length, dtype=torch.float64) + 0.5) * (2 / overlap) - 0.5).clamp(0, 1)


def outer(span: Span, side: int, halo: int) -> Span:
    """span with `halo` more places at both ends, within [0, side)."""
    return max(0, span[0] - halo), min(side, span[1] + halo)
