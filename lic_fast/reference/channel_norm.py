"""Normalization over channels with a ReLU and a bias of each sample, and its gradients, as specified."""

from __future__ import annotations

import torch
from torch import Tensor


def _row(values: Tensor, dims: int) -> Tensor:
    """[C] or [B, C] broadcast against [B, C, *]."""
    return values.reshape(-1 if values.dim() == 2 else 1, values.shape[-1], *[1] * (dims - 2))


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x less its mean over channels, over its standard deviation; one over the latter), in the wide dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    return centred * inverse, inverse


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, relu: bool, eps: float) -> Tensor:
    """norm(x) weight + bias, its negative values zero where relu; then + shift. In fp32 (fp64 for fp64), rounded once.

    x [B, C, *]; weight, bias [C]; shift [B, C].
    """
    normalized, _ = _normalized(x, eps)
    y = normalized * _row(weight, x.dim()) + _row(bias, x.dim())
    if relu:
        y = torch.relu(y)
    if shift is not None:
        y = y + _row(shift, x.dim())
    return y.to(x.dtype)


def channel_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d x, d weight [C], d bias [C], d shift [B, C]) for the gradient [B, C, *] of channel_norm's result."""
    normalized, inverse = _normalized(x, eps)
    grad = grad.to(normalized.dtype)
    places = tuple(range(2, x.dim()))
    d_shift = grad.sum(places) if places else grad
    if relu:
        kept = normalized * _row(weight, x.dim()) + _row(bias, x.dim()) > 0
        grad = torch.where(kept, grad, 0)
    d_weight, d_bias = ((each.sum((0, *places))) for each in (grad * normalized, grad))
    scaled = grad * _row(weight, x.dim())
    along = (scaled * normalized).mean(1, keepdim=True)
    d_x = (scaled - scaled.mean(1, keepdim=True) - normalized * along) * inverse
    return d_x.to(x.dtype), d_weight, d_bias, d_shift
