"""Convolution of 16-bit integers, requantised by shifts, as specified."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE, SLOPE_SHIFT = 328, 15  # of the leaky ReLU: 328 / 2**15 = 0.01001


def leaky_relu(x: Tensor) -> Tensor:
    """max(x, (328 x + 2**14) >> 15) of int16 x: a slope of 0.01001 below zero, rounded half up."""
    wide = x.to(torch.int32)
    return torch.maximum(wide, (wide * SLOPE + (1 << (SLOPE_SHIFT - 1))) >> SLOPE_SHIFT).to(torch.int16)


def wrapped(x: Tensor) -> Tensor:
    """int64 x modulo 2**32, as int32."""
    return ((x + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


def integer_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, leaky: bool, limit: int
) -> Tensor:
    """out = (bias + sum weight * f(x)) >> shift [+ residual], clamped to +-limit as int16 where limit > 0, else int32.

    f is leaky_relu where leaky. All sums are modulo 2**32; of shift the low five bits count. A product of two int16 is
    at most 2**30, so that fp64 holds any sum of up to 2**22 of them exactly, in whatever order a matrix product adds.
    """
    if leaky:
        x = leaky_relu(x)
    outputs, channels, side, _ = weight.shape
    batch, _, height, width = x.shape
    columns = F.unfold(x.double(), side, padding=side // 2) if x.numel() else x.new_zeros(batch, channels * side**2, 0)
    sums = torch.matmul(weight.double().flatten(1), columns.double()).to(torch.int64)
    out = wrapped(sums + bias.to(torch.int64)[:, None]) >> (shift[:, None] & 31)
    out = out.view(batch, outputs, height, width)
    if residual is not None:
        out = wrapped(out.to(torch.int64) + residual.to(torch.int64))
    if limit > 0:
        return out.clamp(-limit, limit).to(torch.int16).contiguous(memory_format=torch.channels_last)
    return out
