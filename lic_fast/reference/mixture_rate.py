"""Rate of a latent under a Gaussian, logistic or Laplace density convolved with a unit box, or a mixture of them.

Specification, in PyTorch. The quantised value and the noise are computed in the dtype of the arithmetic (fp32, or
fp64 for fp64), which all backends share to the bit; the likelihood in fp64 whatever that dtype is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._bound import arithmetic_dtype, by_element, passes, rate, rate_slope
from ._noise import DEQUANTIZE, NONE, quantize

GAUSSIAN, LOGISTIC, LAPLACE = range(3)


def gaussian(d: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(d - 1/2 < s n < d + 1/2), n standard normal, and its derivatives by d and s."""
    distance = d.abs()
    a, b = (distance - 0.5) / s, (distance + 0.5) / s
    drop = -distance / s / s  # (a^2 - b^2) / 2: log of the density at b over that at a
    scaled_a, scaled_b = torch.special.erfcx(a.abs() / math.sqrt(2)), torch.special.erfcx(b / math.sqrt(2))
    tail = 0.5 * (scaled_a - drop.exp() * scaled_b)  # times exp(-a^2 / 2), for a >= 0
    density_a = torch.exp(-0.5 * a * a)
    centre = 1 - 0.5 * density_a * (scaled_a + drop.exp() * scaled_b)
    outside = a >= 0
    log_p = torch.where(outside, -0.5 * a * a + tail.log(), centre.log())
    hazard = torch.where(outside, 1 / tail, density_a / centre) / math.sqrt(2 * math.pi)
    by_distance = hazard * torch.expm1(drop) / s
    by_scale = hazard * (-a * torch.expm1(drop) - drop.exp() / s) / s
    return log_p, by_distance * d.sign(), by_scale


def logistic(d: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for s times a standard logistic variable."""
    distance = d.abs()
    a, b = (distance - 0.5) / s, (distance + 0.5) / s
    log_p = torch.nn.functional.logsigmoid(-a) + torch.nn.functional.logsigmoid(b) + (-torch.expm1(-1 / s)).log()
    by_distance = (torch.sigmoid(-b) - torch.sigmoid(a)) / s
    by_scale = (a * torch.sigmoid(a) - b * torch.sigmoid(-b) - 1 / (s * torch.expm1(1 / s))) / s
    return log_p, by_distance * d.sign(), by_scale


def laplace(d: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for s times a standard Laplace variable (density exp(-|x|) / 2)."""
    distance = d.abs()
    a, b = (distance - 0.5) / s, (distance + 0.5) / s
    outside = a >= 0
    rise, fall = torch.exp(-a.abs()), torch.exp(-b)
    centre = -0.5 * (torch.expm1(-a.abs()) + torch.expm1(-b))
    log_p = torch.where(outside, -a - math.log(2) + (-torch.expm1(-1 / s)).log(), centre.log())
    by_distance = torch.where(outside, -1.0, 0.5 * (fall - rise) / centre) / s
    by_scale = torch.where(outside, a - 1 / (s * torch.expm1(1 / s)), 0.5 * (a * rise - b * fall) / centre) / s
    return log_p, by_distance * d.sign(), by_scale


_FAMILIES = (gaussian, logistic, laplace)


def _by_component(parameter: Tensor | None, k: int) -> Tensor | None:
    """[B, K * C, *] in fp64 as [B, K, C, *]; component after component, as in CompressAI."""
    if parameter is None:
        return None
    return parameter.double().reshape(parameter.shape[0], k, parameter.shape[1] // k, *parameter.shape[2:])


def _terms(
    y: Tensor, scales: Tensor, means: Tensor | None, weights: Tensor | None, seed: Tensor | None,
    families: Sequence[int], quantize_mode: int, scale_bound: float, logits: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The quantised y, and by component: log weight, log-likelihood, its derivatives; and log p of the mixture."""
    dtype, k = arithmetic_dtype(y), len(families)
    y_hat = quantize(y, means if weights is None else None, seed, quantize_mode, dtype)
    scales, means, weights = (_by_component(parameter, k) for parameter in (scales, means, weights))
    # the difference is that of the arithmetic's dtype, as the symbol coder sees it
    d = y_hat.unsqueeze(1) if means is None else y_hat.unsqueeze(1) - means.to(dtype)
    d = d.double().expand_as(scales)
    s = scales.to(dtype).clamp_min(scale_bound).double()  # a bound of the arithmetic's dtype, like CompressAI's
    s = torch.where(s > 0, s, math.nan)
    parts = [_FAMILIES[family](d[:, i], s[:, i]) for i, family in enumerate(families)]
    log_p, by_d, by_s = (torch.stack(part, 1) for part in zip(*parts, strict=True))
    if weights is None:
        log_w = torch.zeros_like(log_p)
    else:
        log_w = torch.log_softmax(weights, 1) if logits else weights.log()
    return y_hat, log_w, log_p, by_d, by_s, torch.logsumexp(log_w + log_p, 1)


def mixture_rate(
    y: Tensor, scales: Tensor, means: Tensor | None, weights: Tensor | None, seed: Tensor | None,
    families: Sequence[int], quantize_mode: int, scale_bound: float, likelihood_bound: float, logits: bool, output: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_hat of y's dtype, without elements where nothing is quantised; the rate as _bound.rate gives it)."""
    y_hat, *_, log_p = _terms(y, scales, means, weights, seed, families, quantize_mode, scale_bound, logits)
    result = rate(log_p, likelihood_bound, output, arithmetic_dtype(y)).contiguous()
    return y.new_empty(0) if quantize_mode == NONE else y_hat.to(y.dtype).contiguous(), result


def planes(components: int, single: bool) -> int:
    """How many tensors of y's shape mixture_rate_slopes stacks."""
    return (2 if single else 3) * components


def _bits(slopes: Tensor) -> Tensor:
    return slopes.view(torch.int64 if slopes.dtype is torch.float64 else torch.int32)


def _noted(slopes: Tensor, mask: Tensor) -> Tensor:
    """The slopes with their last bits taken for a note."""
    return (_bits(slopes) & -2 | mask).view(slopes.dtype)


def mixture_rate_slopes(
    y: Tensor, scales: Tensor, means: Tensor | None, weights: Tensor | None, seed: Tensor | None,
    families: Sequence[int], quantize_mode: int, scale_bound: float, likelihood_bound: float, logits: bool, output: int,
) -> Tensor:  # fmt: skip
    """The derivatives of each element's rate (of its bits, where these are summed), [planes, B, C, *].

    In this order: by y_hat - mean of each component, by the scale of each, and in a mixture by the weight of each. The
    bounds are noted in last bits: whether a scale lay below its own, in the derivative by it; whether the likelihood
    did, in that by the first component's distance. Of y's dtype of arithmetic.
    """
    _, log_w, log_pk, by_d, by_s, log_p = _terms(
        y, scales, means, weights, seed, families, quantize_mode, scale_bound, logits
    )
    dtype, k = arithmetic_dtype(y), len(families)
    share = torch.exp(log_w + log_pk - log_p.unsqueeze(1))  # of each component in the likelihood
    parts = [share * by_d, share * by_s]
    if weights is not None:
        parts.append(share - log_w.exp() if logits else torch.exp(log_pk - log_p.unsqueeze(1)))
    slope = rate_slope(log_p, likelihood_bound, output, dtype).unsqueeze(1)
    # a likelihood of 0 far below its bound takes all with it, even what is infinite
    slopes = torch.cat([torch.where(slope == 0, 0.0, slope * part) for part in parts], 1).to(dtype)
    slopes = slopes.transpose(0, 1).contiguous()
    scales = _by_component(scales, k).to(dtype).transpose(0, 1)
    slopes[k : 2 * k] = _noted(slopes[k : 2 * k], scales < torch.tensor(scale_bound, dtype=dtype, device=y.device))
    slopes[0] = _noted(slopes[0], (log_p.exp() < likelihood_bound) & (slope[:, 0] != 0))
    return slopes


def mixture_rate_bwd(
    grad_y_hat: Tensor | None, grad_rate: Tensor | None, slopes: Tensor, y: Tensor, components: int, quantize_mode: int,
    likelihood_bound: float, output: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of y, scales, means and weights from mixture_rate_slopes; of y's dtype.

    Rounding has the derivative 1 with quantize "ste" and 0 with "dequantize". There y_hat = round(y - mean) + mean
    follows the mean, so that y_hat - mean, and with it the rate, does not depend on the mean; a mixture rounds about
    zero. A scale below its bound has a gradient only where that would raise it.
    """
    k, like, single = components, slopes[0], len(slopes) == 2 * components
    g = torch.zeros_like(like)
    if grad_rate is not None:
        g = by_element(grad_rate, output, like.dim()).to(like.dtype).expand_as(like)
    if likelihood_bound > 0:
        g = torch.where(passes(g, (_bits(like) & 1).bool(), output), g, 0.0)
    grad_d, grad_s = (g * slopes[i * k : (i + 1) * k] for i in range(2))  # [K, B, C, *]
    below = (_bits(slopes[k : 2 * k]) & 1).bool()
    grad_s = torch.where(below & ~(grad_s < 0), 0.0, grad_s)
    through = torch.zeros_like(like)
    if grad_y_hat is not None and quantize_mode != NONE:
        through = grad_y_hat.to(like.dtype)
    if quantize_mode == DEQUANTIZE:
        grad_y = torch.zeros_like(like)
        grad_m = through.unsqueeze(0) if single else -grad_d
    else:
        grad_y, grad_m = grad_d.sum(0) + through, -grad_d
    grad_w = None if single else g * slopes[2 * k :]
    laid = [None if t is None else t.transpose(0, 1).flatten(1, 2).to(y.dtype) for t in (grad_s, grad_m, grad_w)]
    return grad_y.to(y.dtype), *laid
