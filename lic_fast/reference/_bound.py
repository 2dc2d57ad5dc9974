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


def rate_bwd(grad: Tensor, log_p: Tensor, likelihood_bound: float, output: int, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to log_p; `grad` is that of rate()'s result.

    Below a positive bound the gradient passes, times the small likelihood, only where it would raise the likelihood:
    CompressAI's rule. Without a bound it is that of the true log-likelihood, also where the result was floored.
    """
    if output == BITS_PER_CHANNEL:
        grad = grad.reshape(*grad.shape, *([1] * (log_p.dim() - 2)))
    grad = grad.to(log_p.dtype)
    p = log_p.exp()
    below = p < likelihood_bound
    if output == LIKELIHOOD:
        floored = p if likelihood_bound > 0 else p.clamp_min(torch.finfo(dtype).tiny)
        return torch.where(below & (grad >= 0), 0.0, grad * floored)
    result = (grad / -math.log(2.0)).expand_as(log_p)
    if likelihood_bound > 0:
        result = torch.where(below, torch.where(grad > 0, result * (p / likelihood_bound), 0.0), result)
    return result
