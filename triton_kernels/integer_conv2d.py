"""Convolution of int16 by int16 into int32, requantised by shifts; bit for bit what every other backend gives:

    out = ((bias + sum_k w_k f(x_k)) >> shift) + residual, modulo 2**32;  clamped to +-limit as int16 where NARROW

A program takes a tile of pixels by outputs. Tensor cores multiply int8, so each int16 is split as 256 high + low + 128,
high and low in int8. With x_k and w_k so split,

    sum x w = 65536 sum xh wh + 256 sum (xh wl + xl wh) + sum xl wl + 128 sum x + 128 sum w - 16384 terms

where every sum may wrap, for all is modulo 2**32, and places outside the image or behind the last channel, zeros, are
terms like any other. x lies channels last; weights are packed as the other kernels read them, by groups of 16 outputs
and pairs of channels. Reads x once a tap (from L2), the weights once for BLOCK_P pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_O, BLOCK_C = 64, 32, 32
LAUNCH = {"num_warps": 4, "num_stages": 2}
SLOPE, SLOPE_HALF, SLOPE_SHIFT = tl.constexpr(328), tl.constexpr(1 << 14), tl.constexpr(15)
GROUP = tl.constexpr(16)


@triton.jit
def _high(v):
    return (v >> 8).to(tl.int8)


@triton.jit
def _low(v):
    return ((v & 255) - 128).to(tl.int8)


@triton.jit
def _products(
    x_ptr, w_ptr, p, o, pixels, height, width, channels, pairs, groups,
    LEAKY: tl.constexpr, SIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum x w [BLOCK_P, BLOCK_O] of pixels p and outputs o."""
    row = p // width
    column = (p % width).to(tl.int32)
    line = (row % height).to(tl.int32)
    w_at = (o // GROUP).to(tl.int64) * (SIDE * SIDE) * pairs * (2 * GROUP) + o % GROUP * 2
    high = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.int32)
    middle = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.int32)
    low = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.int32)
    x_sum = tl.zeros([BLOCK_P], dtype=tl.int32)
    w_sum = tl.zeros([BLOCK_O], dtype=tl.int32)
    terms = 0
    for tap in range(SIDE * SIDE):
        down = tap // SIDE - SIDE // 2
        across = tap % SIDE - SIDE // 2
        inside = (p < pixels) & (line + down >= 0) & (line + down < height)
        inside = inside & (column + across >= 0) & (column + across < width)
        x_at = (p + down * width + across) * channels
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            x = tl.load(x_ptr + x_at[:, None] + c[None, :], mask=inside[:, None] & (c < channels)[None, :], other=0)
            x = x.to(tl.int32)
            if LEAKY:
                x = tl.maximum(x, (x * SLOPE + SLOPE_HALF) >> SLOPE_SHIFT)
            at = w_at[None, :] + ((tap * pairs + c // 2) * (2 * GROUP) + c % 2)[:, None]
            known = (c < 2 * pairs)[:, None] & (o < groups * GROUP)[None, :]
            w = tl.load(w_ptr + at, mask=known, other=0).to(tl.int32)
            high = tl.dot(_high(x), _high(w), high, out_dtype=tl.int32)
            middle = tl.dot(_high(x), _low(w), middle, out_dtype=tl.int32)
            middle = tl.dot(_low(x), _high(w), middle, out_dtype=tl.int32)
            low = tl.dot(_low(x), _low(w), low, out_dtype=tl.int32)
            x_sum += tl.sum(x, axis=1)
            w_sum += tl.sum(w, axis=0)
            terms += BLOCK_C
    return (high << 16) + (middle << 8) + low + ((x_sum << 7)[:, None] + (w_sum << 7)[None, :]) - (terms << 14)


@triton.jit
def integer_conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, shift_ptr, residual_ptr, out_ptr, batch, height, width, channels, outputs, limit,
    RESIDUAL: tl.constexpr, LEAKY: tl.constexpr, NARROW: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    plane = tl.cast(height, tl.int64) * width
    pixels = plane * batch
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    pairs = (channels + 1) // 2
    groups = (outputs + GROUP - 1) // GROUP
    out = _products(
        x_ptr, w_ptr, p, o, pixels, height, width, channels, pairs, groups, LEAKY, SIDE, BLOCK_P, BLOCK_O, BLOCK_C
    )
    known = o < outputs
    out += tl.load(bias_ptr + o, mask=known, other=0)[None, :]
    out = out >> (tl.load(shift_ptr + o, mask=known, other=0) & 31)[None, :]
    mask = (p < pixels)[:, None] & known[None, :]
    at = p[:, None] * outputs + o[None, :]
    if RESIDUAL:
        out += tl.load(residual_ptr + at, mask=mask, other=0).to(tl.int32)
    if NARROW:
        tl.store(out_ptr + at, tl.minimum(tl.maximum(out, -limit), limit).to(tl.int16), mask=mask)
    else:
        at = (p // plane * outputs * plane + p % plane)[:, None] + o.to(tl.int64)[None, :] * plane
        tl.store(out_ptr + at, out, mask=mask)


def integer_conv2d_out(
    x: Tensor, packed: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, leaky: bool, limit: int,
    side: int, out: Tensor,
) -> None:  # fmt: skip
    """Fills out. x, residual and an int16 out are dense, channels last; the arguments are validated by the caller."""
    batch, channels, height, width = x.shape
    outputs = out.shape[1]
    grid = (triton.cdiv(batch * height * width, BLOCK_P), triton.cdiv(outputs, BLOCK_O))
    with torch.cuda.device_of(x):
        integer_conv2d_kernel[grid](
            x, packed, bias, shift, x if residual is None else residual, out, batch, height, width, channels, outputs,
            limit, residual is not None, leaky, limit > 0, side, BLOCK_P, BLOCK_O, BLOCK_C, **LAUNCH,
        )  # fmt: skip


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = [
    (
        integer_conv2d_kernel,
        {
            "x_ptr": "*i16", "w_ptr": "*i16", "bias_ptr": "*i32", "shift_ptr": "*i32", "residual_ptr": "*i16",
            "out_ptr": "*i16" if narrow else "*i32", "batch": "i32", "height": "i32", "width": "i32",
            "channels": "i32", "outputs": "i32", "limit": "i32",
        },
        {
            "RESIDUAL": residual, "LEAKY": leaky, "NARROW": narrow, "SIDE": side,
            "BLOCK_P": BLOCK_P, "BLOCK_O": BLOCK_O, "BLOCK_C": BLOCK_C,
        },
        LAUNCH,
    )
    # as the networks of lic_fast.entropy.MSPEntropyModel call it
    for residual, leaky, narrow, side in (
        (False, True, True, 3), (True, True, True, 3), (True, False, True, 3), (False, True, True, 1),
        (False, True, False, 1),
    )
]  # fmt: skip
