"""What the rate kernels share: tiles, noise, rounding, and what lies between a likelihood and what is returned.

A tile is ROWS x COLS elements; row r of it starts `stride` elements after row r - 1. With VECTOR (decided by the
launcher: four divides every length and every address) threads hold four neighbours, and a Philox block, which is four
words, is made once for each four; otherwise it is made for each element.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import pointer
from .densities import LOG2_E

LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}  # noise and rounding have no product that a sum could swallow
NONE, NOISE, STE, DEQUANTIZE = (tl.constexpr(i) for i in range(4))
BITS, LIKELIHOOD, BITS_PER_CHANNEL = (tl.constexpr(i) for i in range(3))
ABSENT, FULL, ONE = (tl.constexpr(i) for i in range(3))  # a gradient that comes in: none, each its own, one for all
GROUP = 4


@triton.jit
def round_half_even(x):
    """Exact for every x; NaN, infinity and the sign of zero stay."""
    if x.dtype == tl.float64:
        LIMIT: tl.constexpr = 2.0**52
        BITS_OF: tl.constexpr = tl.int64
        SIGN: tl.constexpr = -(2**63)
    else:
        LIMIT: tl.constexpr = 2.0**23
        BITS_OF: tl.constexpr = tl.int32
        SIGN: tl.constexpr = -(2**31)
    size = tl.abs(x)
    whole = (size + LIMIT) - LIMIT  # beyond LIMIT neighbours are 1 apart, so that the sum is rounded to an integer
    signed = whole.to(BITS_OF, bitcast=True) | (x.to(BITS_OF, bitcast=True) & SIGN)
    return tl.where(size < LIMIT, signed.to(x.dtype, bitcast=True), x)


@triton.jit
def _philox(seed, counter):
    low = counter.to(tl.uint32)
    return tl.philox(seed, low, (counter >> 32).to(tl.uint32), low * 0, low * 0)


@triton.jit
def noise(seed_ptr, first, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr):
    """[ROWS, COLS] in (-0.5, 0.5); `first` is the index, among all elements, of the tile's first one."""
    seed = tl.load(seed_ptr)
    rows = first + tl.arange(0, ROWS).to(tl.int64) * stride
    if VECTOR:
        w0, w1, w2, w3 = _philox(seed, (rows // 4)[:, None] + tl.arange(0, COLS // 4)[None, :])
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLS])
    else:
        index = rows[:, None] + tl.arange(0, COLS)[None, :]
        w0, w1, w2, w3 = _philox(seed, index // 4)
        place = (index % 4).to(tl.int32)
        word = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    odd = ((word >> 8) << 1).to(tl.int32) + (1 - 2**24)
    return odd.to(TYPE) * 2.0**-25


@triton.jit
def quantized(
    y, centre, seed_ptr, first, stride, QUANTIZE: tl.constexpr, CENTRED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if QUANTIZE == NOISE:
        y = y + noise(seed_ptr, first, stride, y.dtype, ROWS, COLS, VECTOR)
    elif QUANTIZE != NONE:
        if CENTRED:
            y = round_half_even(y - centre) + centre
        else:
            y = round_half_even(y)
    return y


@triton.jit
def program(rows, length, tiles, VECTOR: tl.constexpr):
    """(rows, length, sample, tile of the sample) of this program, in 64 bits; with VECTOR length came in fours."""
    length = tl.cast(length, tl.int64)
    if VECTOR:
        length = length * 4  # a hint that four divides it would be lost where the function is inlined
    sample = tl.program_id(0) // tiles  # in 32 bits: a division in 64 is a call
    return tl.cast(rows, tl.int64), length, sample.to(tl.int64), (tl.program_id(0) - sample * tiles).to(tl.int64)


@triton.jit
def inside(rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The mask of a tile of which only the first rows and columns exist."""
    column = tl.arange(0, COLS)[None, :] < tl.minimum(columns, COLS).to(tl.int32)
    return column & (tl.arange(0, ROWS)[:, None] < tl.minimum(rows, ROWS).to(tl.int32))


@triton.jit
def places(stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The elements of a tile, counted from its first; 64 bits only where a stride may need them."""
    columns = tl.arange(0, COLS)[None, :]
    if ROWS > 1:
        columns = tl.arange(0, ROWS)[:, None] * stride + columns
    return columns


@triton.jit
def _at(ptr, base, VECTOR: tl.constexpr):
    TYPE: tl.constexpr = ptr.dtype.element_ty
    V: tl.constexpr = 4 if VECTOR else 1
    return pointer(ptr.to(tl.int64) + base * (TYPE.primitive_bitwidth // 8), TYPE, V)


@triton.jit
def load(ptr, base, places, mask, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Elements base + places in the type of the arithmetic."""
    return tl.load(_at(ptr, base, VECTOR) + places, mask=mask, other=0.0).to(TYPE)


@triton.jit
def store(ptr, base, places, values, mask, VECTOR: tl.constexpr):
    tl.store(_at(ptr, base, VECTOR) + places, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def number(bits, TYPE: tl.constexpr):
    """A number of the host: a float argument would arrive in fp32."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True).to(TYPE)


@triton.jit
def as_returned(e, w, limit, OUTPUT: tl.constexpr):
    """The likelihood w 2^e as output says; `limit`: the most bits, or the least likelihood. NaN stays."""
    if OUTPUT == LIKELIHOOD:
        p = w * tl.exp2(e)
        result = tl.where(p < limit, limit, p)
    else:
        bits = -(e + tl.log2(w))
        result = tl.where(bits > limit, limit, bits)
    return result


@triton.jit
def from_returned(g, e, w, bound, OUTPUT: tl.constexpr, BOUNDED: tl.constexpr):
    """The gradient by the log-likelihood from that by what as_returned gives; bound: 0 where not BOUNDED."""
    p = w * tl.exp2(e)
    below = p < bound
    if OUTPUT == LIKELIHOOD:
        if g.dtype == tl.float64:
            TINY: tl.constexpr = 2.2250738585072014e-308
        else:
            TINY: tl.constexpr = 1.1754943508222875e-38
        least = tl.where(bound > 0, 0.0, TINY)
        floored = tl.where(p < least, least, p)
        result = tl.where(below & (g >= 0), 0.0, g * floored)
    else:
        result = -g * LOG2_E
        if BOUNDED:
            result = tl.where(below, tl.where(result < 0, result * (p * (1 / bound)), 0.0), result)
    return result


@triton.jit
def incoming(ptr, base, places, mask, TYPE: tl.constexpr, KIND: tl.constexpr, VECTOR: tl.constexpr):
    """A gradient from above, of the places' shape."""
    if KIND == FULL:
        g = load(ptr, base, places, mask, TYPE, VECTOR)
    else:
        one = tl.load(ptr).to(TYPE) if KIND == ONE else 0.0
        g = tl.zeros(mask.shape, TYPE) + one
    return g


def arithmetic(y: Tensor) -> tl.dtype:
    return tl.float64 if y.dtype is torch.float64 else tl.float32


def kind(grad: Tensor | None, full: int) -> int:
    if grad is None:
        return 0
    return 1 if grad.numel() == full else 2


def bits(value: float) -> int:
    """For `number`."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def rounded_up(bound: float, dtype: torch.dtype) -> float:
    """The least number of the arithmetic that is no less: what is below it is what is below the bound."""
    if dtype is torch.float64:
        return bound
    near = torch.tensor(bound, dtype=torch.float32)
    return float(near if near.item() >= bound else torch.nextafter(near, torch.tensor(math.inf)))


def limit(likelihood_bound: float, output: int, dtype: torch.dtype) -> float:
    """The argument of as_returned."""
    if output == 1:
        return likelihood_bound if likelihood_bound > 0 else torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    return -math.log2(likelihood_bound) if likelihood_bound > 0 else math.inf


def in_fours(lengths: list[int], tensors: list[Tensor]) -> bool:
    """Whether every row starts at a multiple of four elements, by its address and by its index."""
    return all(n % GROUP == 0 for n in lengths) and all(t.data_ptr() % (GROUP * t.element_size()) == 0 for t in tensors)


def block(components: int, dtype: torch.dtype) -> int:
    """The elements of a tile: eight a thread, so that its start costs little; four where registers would run short."""
    return 1024 if components == 1 and dtype is not torch.float64 else 512


def tile(length: int, block: int) -> tuple[int, int]:
    """(ROWS, COLS) for rows of a length."""
    columns = min(block, triton.next_power_of_2(length))
    return block // columns, columns
