"""The noising of diffusion training and its weighted loss, with the gradient, as specified."""

from __future__ import annotations

import torch
from torch import Tensor

from ._noise import normal_noise


def _column(values: Tensor, like: Tensor) -> Tensor:
    """[B] broadcast against [B, *]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def q_sample(x: Tensor, signal: Tensor, spread: Tensor, seed: Tensor) -> Tensor:
    """signal[b] x[b] + spread[b] n, with n standard normal noise of seed [1] int64; x [B, *], signal, spread [B].

    In fp32, or in fp64 for fp64: every product and the sum are rounded by themselves, and the result once into x's
    dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    value = x.to(wide) * _column(signal.to(wide), x) + normal_noise(seed, x).to(wide) * _column(spread.to(wide), x)
    return torch.empty_like(x).copy_(value)


def _error(f: Tensor, x: Tensor | None, seed: Tensor | None) -> Tensor:
    """f less its target, in the dtype of the arithmetic: x, or without it the noise of seed."""
    wide = torch.promote_types(f.dtype, torch.float32)
    target = x if seed is None else normal_noise(seed, f)
    return f.to(wide) - target.to(wide)


def q_sample_loss(f: Tensor, x: Tensor | None, weight: Tensor, seed: Tensor | None, absolute: bool) -> Tensor:
    """The mean over all elements of weight[b] e^2, or weight[b] |e|, with e = f - x, or f - noise; f [B, *]."""
    error = _error(f, x, seed)
    terms = error.abs() if absolute else error.square()
    return (terms * _column(weight.to(error.dtype), f)).mean()


def gradient_scale(grad: Tensor, f: Tensor, weight: Tensor, absolute: bool) -> Tensor:
    """[B]: what e, or its sign where absolute, is multiplied by to be the loss's gradient times grad []."""
    wide = torch.promote_types(f.dtype, torch.float32)
    return weight.to(wide) * (grad.to(wide) * ((1.0 if absolute else 2.0) / max(1, f.numel())))


def q_sample_loss_bwd(
    grad: Tensor, f: Tensor, x: Tensor | None, weight: Tensor, seed: Tensor | None, absolute: bool
) -> Tensor:
    """The gradient of q_sample_loss by f, times grad []: e, or its sign (0 at 0), times gradient_scale's number.

    Rounded as q_sample's.
    """
    error = _error(f, x, seed)
    if absolute:
        error = torch.where(error > 0, 1.0, torch.where(error < 0, -1.0, error))  # NaN stays
    return torch.empty_like(f).copy_(error * _column(gradient_scale(grad, f, weight, absolute), f))
