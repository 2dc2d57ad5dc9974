"""Adam as SOAP runs it on tensors without a preconditioner, as specified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Hyper(NamedTuple):
    """A row of the table of hyperparameters, fp64: one for every tensor."""

    lr: float
    beta1: float
    beta2: float
    shampoo_beta: float
    eps: float
    weight_decay: float


def takes_step(grad: Tensor, counts: Tensor) -> bool:
    """Counts the step in counts [2] (taken, skipped); False where the gradient is not finite."""
    finite = bool(grad.isfinite().all())
    counts[0 if finite else 1] += 1
    return finite


def adam_direction(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Hyper) -> Tensor:
    """Moves both averages towards g and its square in place; returns exp_avg / (sqrt(exp_avg_sq) + eps)."""
    exp_avg.mul_(h.beta1).add_(g, alpha=1.0 - h.beta1)
    exp_avg_sq.mul_(h.beta2).add_(g.square(), alpha=1.0 - h.beta2)
    return exp_avg / exp_avg_sq.sqrt().add_(h.eps)


def apply_update_(
    param: Tensor, update: Tensor, step: int, h: Hyper, correct_bias: bool, normalize_grads: bool
) -> None:
    """param <- (param - step_size * update) * (1 - lr * weight_decay), rounded once into param's dtype.

    step_size is lr, times sqrt(1 - beta2^step) / (1 - beta1^step) where correct_bias. normalize_grads first divides
    update by its root mean square.
    """
    step_size = h.lr
    if correct_bias:
        step_size *= (1.0 - h.beta2**step) ** 0.5 / (1.0 - h.beta1**step)
    if normalize_grads:
        update = update / (1e-30 + update.square().mean().sqrt())
    value = param.to(update.dtype) - step_size * update
    param.copy_(value - (h.lr * h.weight_decay) * value)


def adam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    counts: Tensor,
    hyper: Tensor,
    correct_bias: bool,
    normalize_grads: bool,
) -> None:
    """Tensor by tensor: both averages, the update, weight decay. Arithmetic in the dtype of exp_avg.

    counts [n, 2] int64 (steps taken, skipped) and hyper [n, 6] fp64 (see Hyper; shampoo_beta is not read). A gradient
    that is not finite is a skipped step: nothing else of its tensor changes.
    """
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        if takes_step(grad, counts[i]):
            h = Hyper(*hyper[i].tolist())
            direction = adam_direction(grad.to(m.dtype), m, v, h)
            apply_update_(param, direction, int(counts[i, 0]), h, correct_bias, normalize_grads)
