"""The context convolution of an autoregressive model at one pixel, as specified."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal(weight: Tensor) -> Tensor:
    """Which taps of weight [O, C, k, k] come before the middle one in raster order: bool [k, k]."""
    side = weight.shape[-1]
    return (torch.arange(side * side, device=weight.device) < side * side // 2).view(side, side)


def context_conv(crop: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of crop [1, C, k, k] with the taps of weight [O, C, k, k] before the middle: [1, O, 1, 1].

    What crop holds at and after the middle is not read, whatever it is.
    """
    before = causal(weight)
    zero = weight.new_zeros(())
    return F.conv2d(torch.where(before, crop, zero), torch.where(before, weight, zero), bias)
