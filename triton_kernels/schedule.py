"""Steps of a latent's schedule: elements of a strided slice of y [B, C, H, W] to symbols and levels, and back.

A program takes a block of the step's elements in the order of its parameters; neighbours in a row are neighbours in all
tensors but y and y_hat, which lie a stride apart. 25 bytes an element to quantise, 16 to dequantise, 5 for levels, and
the sectors of y and y_hat. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rates import round_half_even

BLOCK = 1024
MOST = tl.constexpr(1073741824.0)
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _places(i, channels, h, w, all_channels, height, width, first, row, column, stride):
    """(where element i lies in the latent, where its scale lies in the parameters)"""
    r = i // w
    plane = r // h
    sample = plane // channels
    line = (sample * all_channels + first + plane % channels) * height + row + r % h * stride
    return line * width + column + i % w * stride, i + sample * channels * h * w


@triton.jit
def _level(scale):
    key = (scale.to(tl.int32, bitcast=True) >> 19) - 1980
    return tl.minimum(tl.maximum(key, 0), 243).to(tl.uint8)


@triton.jit
def schedule_quantize_kernel(
    y_hat, y, parameters, symbols, levels, values, n, channels, h, w, all_channels, height, width,
    first, row, column, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    at, scale_at = _places(i, channels, h, w, all_channels, height, width, first, row, column, stride)
    scale = tl.load(parameters + scale_at, mask=mask, other=0.0)
    mean = tl.load(parameters + scale_at + channels.to(tl.int64) * h * w, mask=mask, other=0.0)
    rounded = round_half_even(tl.load(y + at, mask=mask, other=0.0) - mean)
    rounded = tl.where(rounded > -MOST, rounded, -MOST)
    rounded = tl.where(rounded < MOST, rounded, MOST)
    value = rounded + mean
    tl.store(symbols + i, rounded.to(tl.int32), mask=mask)
    tl.store(levels + i, _level(scale), mask=mask)
    tl.store(values + i, value, mask=mask)
    tl.store(y_hat + at, value, mask=mask)


@triton.jit
def schedule_dequantize_kernel(
    y_hat, symbols, parameters, values, n, channels, h, w, all_channels, height, width,
    first, row, column, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    at, scale_at = _places(i, channels, h, w, all_channels, height, width, first, row, column, stride)
    mean = tl.load(parameters + scale_at + channels.to(tl.int64) * h * w, mask=mask, other=0.0)
    value = tl.load(symbols + i, mask=mask, other=0).to(tl.float32) + mean
    tl.store(values + i, value, mask=mask)
    tl.store(y_hat + at, value, mask=mask)


@triton.jit
def schedule_levels_kernel(parameters, levels, n, of_sample, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    scale = tl.load(parameters + i + i // of_sample * of_sample, mask=mask, other=0.0)
    tl.store(levels + i, _level(scale), mask=mask)


def _sides(y_hat: Tensor, part: Tensor) -> tuple[int, ...]:
    return (part.numel(), *part.shape[1:], *y_hat.shape[1:])


def schedule_quantize_(
    y_hat: Tensor, y: Tensor, parameters: Tensor, symbols: Tensor, levels: Tensor, values: Tensor, *place: int
) -> None:
    """One launch; all contiguous: y_hat, y [B, C, H, W], parameters [B, 2 c, h, w], the others [B, c, h, w]."""
    if symbols.numel():
        schedule_quantize_kernel[(triton.cdiv(symbols.numel(), BLOCK),)](
            y_hat, y, parameters, symbols, levels, values, *_sides(y_hat, symbols), *place, BLOCK=BLOCK, **LAUNCH
        )


def schedule_dequantize_(y_hat: Tensor, symbols: Tensor, parameters: Tensor, values: Tensor, *place: int) -> None:
    """One launch; all contiguous, as in schedule_quantize_."""
    if symbols.numel():
        schedule_dequantize_kernel[(triton.cdiv(symbols.numel(), BLOCK),)](
            y_hat, symbols, parameters, values, *_sides(y_hat, symbols), *place, BLOCK=BLOCK, **LAUNCH
        )


def schedule_levels_out(parameters: Tensor, levels: Tensor) -> None:
    """One launch; parameters [B, 2 c, h, w] and levels [B, c, h, w] contiguous."""
    n = levels.numel()
    if n:
        schedule_levels_kernel[(triton.cdiv(n, BLOCK),)](parameters, levels, n, n // len(levels), BLOCK=BLOCK, **LAUNCH)


_INTEGERS = ("n", "channels", "h", "w", "all_channels", "height", "width", "first", "row", "column", "stride")
_SIZES = dict.fromkeys(_INTEGERS, "i64")
AOT = [
    (
        schedule_quantize_kernel,
        {
            **dict.fromkeys(("y_hat", "y", "parameters", "values"), "*fp32"),
            "symbols": "*i32",
            "levels": "*u8",
            **_SIZES,
        },
        {"BLOCK": BLOCK},
        LAUNCH,
    ),
    (
        schedule_dequantize_kernel,
        {**dict.fromkeys(("y_hat", "parameters", "values"), "*fp32"), "symbols": "*i32", **_SIZES},
        {"BLOCK": BLOCK},
        LAUNCH,
    ),
    (
        schedule_levels_kernel,
        {"parameters": "*fp32", "levels": "*u8", "n": "i64", "of_sample": "i64"},
        {"BLOCK": BLOCK},
        LAUNCH,
    ),
]
