"""Where the elements of a list of parameters lie in the flat tensors of a partly embedded model.

All parameters share one flat index space: tensor t begins at a multiple of BLOCK, its elements in the order in which
they lie in memory, padding behind them. A byte for each place, `code` [places] uint8, says what the element is:

    bit 7 (TIED)       a step rebuilds it: k * reference + d
    bit 6 (STATELESS)  it has no place in exp_avg and exp_avg_sq: embedded for good, or padding
    bits 0..5          its mode, 0 <= mode < 63; OUTSIDE where it is never embedded and has neither k nor d

k and d hold only elements that are not OUTSIDE, exp_avg and exp_avg_sq only those that are not STATELESS, both in flat
order. `base` [places / BLOCK, 2] int64 is where they begin: elements with a state, and embeddable ones, before a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
TIED, STATELESS, OUTSIDE = 0x80, 0x40, 0x3F
PADDING = STATELESS | OUTSIDE
MOST_MODES = OUTSIDE


class Place(NamedTuple):
    """A tensor's own part of the flat tensors, as slices."""

    code: slice
    state: slice
    coefficients: slice


def starts(sizes: Sequence[int]) -> list[int]:
    """The first place of each tensor of `sizes` elements, and behind them the number of all places."""
    result = [0]
    for size in sizes:
        result.append(result[-1] + -(-size // BLOCK) * BLOCK)
    return result


def base_of(code: Tensor) -> Tensor:
    """The table `base` [places / BLOCK, 2] int64 that belongs to `code`."""
    blocks = code.view(-1, BLOCK)
    counts = torch.empty(len(blocks), 2, dtype=torch.int64, device=code.device)
    for part, count in zip(blocks.split(1024), counts.split(1024), strict=True):  # a sum of bools makes them int64
        count[:, 0] = (part & STATELESS).eq(0).sum(1)
        count[:, 1] = (part & OUTSIDE).ne(OUTSIDE).sum(1)
    return counts.cumsum(0) - counts


def places(sizes: Sequence[int], base: Tensor, states: int, coefficients: int) -> Iterator[Place]:
    """Each tensor's Place. states, coefficients: elements of exp_avg and of k."""
    first = starts(sizes)
    table = [*base.tolist(), [states, coefficients]]
    for t, size in enumerate(sizes):
        begin, end = table[first[t] // BLOCK], table[first[t + 1] // BLOCK]
        yield Place(slice(first[t], first[t] + size), slice(begin[0], end[0]), slice(begin[1], end[1]))


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, [n], sharing it."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
