"""Generalized divisive normalization on its stored (reparametrized) parameters, as specified, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the parameters: that of x, at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def effective(stored: Tensor, bound: float, pedestal: float) -> Tensor:
    """The non-negative value that a stored parameter stands for."""
    return stored.clamp(min=bound) ** 2 - pedestal


def effective_bwd(grad: Tensor, stored: Tensor, bound: float) -> Tensor:
    """The gradient of `stored`: below its bound only what moves it towards the bound passes."""
    grad = grad * (2 * stored.clamp(min=bound))
    return ((stored >= bound) | (grad < 0)) * grad


def _mix(gamma: Tensor, v: Tensor) -> Tensor:
    """sum_j gamma[i, j] v[b, j, ...] -> [b, i, ...]."""
    return torch.einsum("ij,bj...->bi...", gamma, v)


def _channels_first(v: Tensor) -> Tensor:
    """[B, C, *] -> [C, B * prod(*)]."""
    C = v.shape[1]
    return v.movedim(1, 0).reshape(C, v.numel() // max(C, 1))


def _factor(
    v: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool, bounds: tuple[float, float, float]
) -> Tensor:
    """What x is multiplied by, in the wide dtype."""
    beta_bound, gamma_bound, pedestal = bounds
    shift = effective(beta, beta_bound, pedestal).view(-1, *[1] * (v.dim() - 2))
    norm = _mix(effective(gamma, gamma_bound, pedestal), v.abs() if simplified else v * v) + shift
    if simplified:
        return norm if inverse else norm.reciprocal()
    return norm.sqrt() if inverse else norm.rsqrt()


def gdn(
    x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool,
    beta_bound: float, gamma_bound: float, pedestal: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x * factor, factor) in x's dtype; the factor is empty unless kept."""
    v = x.to(wide_dtype(x))
    f = _factor(v, beta, gamma, inverse, simplified, (beta_bound, gamma_bound, pedestal))
    return (v * f).to(x.dtype), f.to(x.dtype) if keep else x.new_empty(0)


def gdn_bwd(
    grad: Tensor, x: Tensor, factor: Tensor | None, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool,
    beta_bound: float, gamma_bound: float, pedestal: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, beta and gamma; the factor is computed again where it was not kept (None)."""
    g, v = grad.to(wide_dtype(x)), x.to(wide_dtype(x))
    if factor is None:
        f = _factor(v, beta, gamma, inverse, simplified, (beta_bound, gamma_bound, pedestal))
    else:
        f = factor.to(v.dtype)
    if simplified:
        d_norm = g * v if inverse else -((g * f) * (v * f))
    else:  # (g f)(x f) f and not g x f^3: f^3 overflows first
        d_norm = 0.5 * (g * v / f) if inverse else -0.5 * ((g * f) * (v * f) * f)
    through = _mix(effective(gamma, gamma_bound, pedestal).mT, d_norm)
    d_x = g * f + (v.sign() if simplified else 2 * v) * through
    terms, values = _channels_first(d_norm), _channels_first(v.abs() if simplified else v * v)
    d_beta, d_gamma = terms.sum(1), terms @ values.mT
    return d_x.to(x.dtype), effective_bwd(d_beta, beta, beta_bound), effective_bwd(d_gamma, gamma, gamma_bound)
