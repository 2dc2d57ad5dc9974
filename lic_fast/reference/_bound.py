"""From a log-likelihood to what a rate op returns, and the gradient back to it; shared by the likelihoods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS, LIKELIHOOD, BITS_PER_CHANNEL = range(3)


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: of noise, rounding and results."""
    return torch.promote_types(tensor.dtype, torch.float32)


def rate(log_p: Tensor, likelihood_bound: float, output: int, dtype: torch.dtype) -> Tensor:
    """log_p [B, C, *] in nats as bits, as bits summed over all but the first two dimensions, or as a likelihood.

    A positive likelihood_bound is CompressAI's floor. Without one bits have no floor, and a likelihood, which would
    underflow, is no smaller than the smallest normal number of `dtype`.
    """
    if output == LIKELIHOOD:
        floor = likelihood_bound if likelihood_bound > 0 else torch.finfo(dtype).tiny
        return log_p.exp().to(dtype).clamp_min(floor)
    if likelihood_bound > 0:
        log_p = log_p.clamp_min(math.log(likelihood_bound))
    bits = log_p / -math.log(2.0)
    return (bits.unsqueeze(-1).flatten(2).sum(2) if output == BITS_PER_CHANNEL else bits).to(dtype)


def rate_slope(log_p: Tensor, likelihood_bound: float, output: int, dtype: torch.dtype) -> Tensor:
    """The derivative of rate()'s elements by log_p, where `passes` lets it through.

    Below a positive bound it is that at the bound times the small likelihood: CompressAI's rule. Without a bound it is
    that of the true log-likelihood, also where the result was floored.
    """
    p = log_p.exp()
    if output == LIKELIHOOD:
        return p if likelihood_bound > 0 else p.clamp_min(torch.finfo(dtype).tiny)
    slope = torch.full_like(log_p, -1 / math.log(2.0))
    return slope * (p / likelihood_bound).clamp_max(1) if likelihood_bound > 0 else slope


def passes(grad: Tensor, below: Tensor, output: int) -> Tensor:
    """Whether a gradient of the rate goes on: below the likelihood's bound only where it would raise the likelihood."""
    return ~below | ((grad < 0) if output == LIKELIHOOD else (grad > 0))


def by_element(grad: Tensor, output: int, dim: int) -> Tensor:
    """A gradient of sums [B, C] shaped so that it meets elements of `dim` dimensions."""
    return grad.reshape(*grad.shape, *([1] * (dim - 2))) if output == BITS_PER_CHANNEL else grad


def rate_bwd(grad: Tensor, log_p: Tensor, likelihood_bound: float, output: int, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to log_p; `grad` is that of rate()'s result."""
    grad = by_element(grad, output, log_p.dim()).to(log_p.dtype)
    result = grad * rate_slope(log_p, likelihood_bound, output, dtype)
    if likelihood_bound > 0:
        result = torch.where(passes(grad, log_p.exp() < likelihood_bound, output), result, 0.0)
    return result
