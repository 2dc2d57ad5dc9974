"""What a step of a latent's schedule does to its elements, as specified."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_SYMBOL = 1 << 30
_FIRST_KEY, _KEY_SHIFT, _LAST = 1980, 19, 243  # docs/BITSTREAM.md, section 2


def of_step(y: Tensor, channels: int, first: int, row: int, column: int, stride: int) -> Tensor:
    """The step's elements of y [B, C, H, W], a view [B, channels, h, w]."""
    return y[:, first : first + channels, row::stride, column::stride]


def schedule_levels(parameters: Tensor) -> Tensor:
    """The levels [B, c, h, w] uint8 of scales, the first half of parameters [B, 2 c, h, w]."""
    bits = parameters[:, : parameters.shape[1] // 2].contiguous().view(torch.int32)
    return ((bits >> _KEY_SHIFT) - _FIRST_KEY).clamp_(0, _LAST).to(torch.uint8)


def schedule_quantize_(
    y_hat: Tensor, y: Tensor, parameters: Tensor, first: int, row: int, column: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(symbols, levels, values) [B, c, h, w] of y's elements, rounded about their means; values go to y_hat too."""
    means = parameters[:, parameters.shape[1] // 2 :]
    place = (means.shape[1], first, row, column, stride)
    rounded = (of_step(y, *place) - means).round()
    rounded = torch.where(rounded > -MOST_SYMBOL, rounded, -MOST_SYMBOL).clamp_(max=MOST_SYMBOL)  # NaN: the least
    values = rounded + means
    of_step(y_hat, *place).copy_(values)
    return rounded.to(torch.int32), schedule_levels(parameters), values


def schedule_dequantize_(
    y_hat: Tensor, symbols: Tensor, parameters: Tensor, first: int, row: int, column: int, stride: int
) -> Tensor:
    """symbols [B, c, h, w] with their means added, which go to y_hat too."""
    values = symbols.to(torch.float32) + parameters[:, parameters.shape[1] // 2 :]
    of_step(y_hat, symbols.shape[1], first, row, column, stride).copy_(values)
    return values
