"""Mixtures of docs/BITSTREAM.md, section 7, as specified: from parameters to integers, from integers to slots."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._rans_container import INDEX_OUTSIDE, Refused

MOST_COMPONENTS, MOST_RANGE, WEIGHTS, UNIT, MOST_MEAN = 16, 1023, 1 << 15, 1 << 10, 1 << 21
ENTRIES = 64
_HEAD = 8
_MOST_SHIFT = 15


def _parts(packed: Tensor) -> tuple[int, int, np.ndarray, np.ndarray]:
    words = packed.numpy()
    entries = words[_HEAD : _HEAD + ENTRIES // 2].view(np.uint32).astype(np.int64)
    reach = words[_HEAD + ENTRIES // 2 : _HEAD + ENTRIES // 2 + 9].view(np.uint32)[:17]
    return int(words[0]), int(words[3]), entries, reach


class Mixtures:
    """What Tables is to indexes, for elements of integers [n, 2 + 2 K]."""

    def __init__(self, packed: Tensor) -> None:
        self.precision, _, entries, _ = _parts(packed)
        self.half, self.slope = entries >> 16, entries & 0xFFFF

    def of(self, indexes: np.ndarray) -> np.ndarray:
        """Checked elements from planes [2 + 2 K, N]."""
        words = indexes.astype(np.int64)
        size, means, weights = words[1] & 0xFFF, words[2::2], words[3::2] >> 16 & 0xFFFF
        good = (size >= 1) & (size <= MOST_RANGE) & (weights.sum(0) == WEIGHTS) & (abs(means) <= MOST_MEAN).all(0)
        if not good.all():
            raise Refused(INDEX_OUTSIDE)
        return words.T

    def skipped(self, elements: np.ndarray, skip: int) -> np.ndarray:
        """None is left out."""
        return np.zeros(len(elements), bool)

    def cumulative(self, elements: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The slots before a number of each element; numbers broadcast against [n, 1]."""
        n, size = self.precision, elements[:, 1:2] & 0xFFF
        sums = np.full(np.broadcast_shapes(number.shape, size.shape), 1 << 31)
        for k in range(2, elements.shape[1], 2):
            y, form = number * UNIT - elements[:, k : k + 1], elements[:, k + 1 : k + 2]
            u = np.minimum(np.abs(y) * (256 + (form & 255)) >> (form >> 8 & 31), 64 * 256 - 1)
            half = self.half[u >> 8] + (self.slope[u >> 8] * (u & 255) >> 8)
            sums += np.sign(y) * (form >> 16 & 0xFFFF) * half
        slots = number + ((sums >> n) * ((1 << n) - 1 - size) >> 32 - n)
        return np.where(number == 0, 0, np.where(number == size + 2, 1 << n, slots))

    def coded(self, elements: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shift, value, plain bits, whether escaped, start and frequency of symbols."""
        first, word = elements[:, 0], elements[:, 1]
        shift, size, t = word >> 12 & 15, word & 0xFFF, (symbols - first).astype(np.int32).astype(np.int64)
        value = t >> shift
        number = np.clip(value, 0, size + 1)
        start, end = self.cumulative(elements, np.stack([number, number + 1], 1)).T
        return shift, value, t & (1 << shift) - 1, (number == 0) | (number > size), start, end - start

    def found(self, elements: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shift, value, whether escaped, start and frequency of the symbols that hold the slots."""
        size = elements[:, 1] & 0xFFF
        number, step = np.zeros(len(elements), np.int64), 1 << int(size.max() + 1).bit_length()
        while step := step >> 1:
            higher = np.minimum(number + step, size + 1)
            number = np.where(self.cumulative(elements, higher[:, None])[:, 0] <= slot, higher, number)
        start, end = self.cumulative(elements, np.stack([number, number + 1], 1)).T
        return elements[:, 1] >> 12 & 15, number, (number == 0) | (number > size), start, end - start

    def joined(self, elements: np.ndarray, value: np.ndarray, raw: np.ndarray) -> np.ndarray:
        """Symbols from values and plain bits, modulo 2**32."""
        return (elements[:, 0] + (value << (elements[:, 1] >> 12 & 15)) + raw).astype(np.uint32).view(np.int32)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def _power(exponent: Tensor) -> Tensor:
    return (exponent + 127 << 23).to(torch.int32).view(torch.float32)


def _clamped(values: Tensor, low: float, high: float) -> Tensor:  # NaN becomes low
    values = torch.where(values > low, values, low)
    return torch.where(values < high, values, high)


def _weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Integers that sum to WEIGHTS, and [B, 1, N] the first of the heaviest, which takes what rounding leaves."""
    least, most = 2.0**-100, 2.0**100
    weights = torch.where(weights >= least, torch.where(weights < most, weights, most), 0.0)
    total = torch.zeros_like(weights[:, 0])
    for k in range(weights.shape[1]):
        total = total + weights[:, k]
    shares = weights / torch.where(total > least, total, least)[:, None]
    integers = (shares * 32768.0 + 0.5).to(torch.int32)
    heaviest = integers.max(1, keepdim=True).values
    first = ((integers == heaviest).cumsum(1) == 1) & (integers == heaviest)
    rest = torch.where(first, WEIGHTS - integers.sum(1, keepdim=True), 0).to(torch.int32)
    return integers + rest, first.int().argmax(1, keepdim=True)


def rans_coder_mixture(scales: Tensor, means: Tensor, weights: Tensor, packed: Tensor) -> Tensor:
    """The integers of elements, int32 [B, 2 + 2 K, N], from fp32 scales, means and weights [B, K, N].

    Each operation is one of fp32, rounded by itself, so that every implementation finds the same.
    """
    _, steps, _, reach = _parts(packed)
    of_length = torch.from_numpy(reach.astype(np.float32)) * 0.0625
    integers, heaviest = _weights(weights)
    scales, means = _clamped(scales, 2.0**-7, 2.0**19), _clamped(means, -(2.0**30), 2.0**30)
    base = (means.gather(1, heaviest) + 0.5).floor()
    means = _clamped(means - base, -(2.0**20), 2.0**20)
    shares, there = integers.float(), integers > 0
    lengths = ((_bits(shares) >> 23) - 126).clamp(0, 16)
    reaches = scales * of_length[lengths.long()]
    low = torch.where(there, means - reaches, torch.inf).amin(1)
    high = torch.where(there, means + reaches, -torch.inf).amax(1)
    smallest = torch.where(there, scales, torch.inf).amin(1)
    mean, square = torch.zeros_like(low), torch.zeros_like(low)
    for k in range(means.shape[1]):
        share, own, scale = shares[:, k], means[:, k], scales[:, k]
        mean = mean + share * own
        square = square + share * (scale * scale + own * own)
    shift = ((_bits(smallest) >> 23) - 131).clamp(0, _MOST_SHIFT)
    mean, lowest, step, inverse = mean * 2.0**-15, (low + 0.5).floor(), _power(shift), _power(-shift)
    size = (((high + 0.5).floor() - lowest).to(torch.int32) >> shift) + 1
    lowest = torch.where(size > MOST_RANGE, (mean + 0.5).floor() - step * 511.0, lowest)
    size = size.clamp(max=MOST_RANGE)
    variance = _clamped(square * 2.0**-15 - mean * mean, 2.0**-14, torch.inf)
    spread = torch.from_numpy(np.sqrt(variance.numpy())) * inverse  # torch.sqrt may be 1 unit off
    code = ((_bits(spread) >> 19) - 1936).clamp(0, 255)
    centre = _clamped((mean - lowest + 0.5) * inverse / size.float() * 256.0, 0.0, 255.0).to(torch.int32)
    first = base[:, 0].to(torch.int32) + lowest.to(torch.int32) - (1 << shift)
    at = (means - lowest[:, None] + (step + 0.5)[:, None]) * _power(10 - shift)[:, None]
    at = (_clamped(at, -(2.0**21), 2.0**21) + 0.5).floor().to(torch.int32)
    rounded = _bits((steps * 0.25 * step)[:, None] / torch.maximum(scales, smallest[:, None])) + 0x4000 >> 15
    form = integers << 16 | 135 - (rounded >> 8) << 8 | rounded & 255
    planes = [first, centre << 24 | code << 16 | shift << 12 | size]
    return torch.stack([*planes, *torch.stack([at, form], 2).flatten(1, 2).unbind(1)], 1)
