"""One ordinary step of SOAP, as specified: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._precision import full_precision
from .adam_update import Hyper, adam_direction, apply_update_, takes_step


def project(x: Tensor, bases: Sequence[Tensor], *, back: bool = False) -> Tensor:
    """x [d_1, ..., d_k] with every axis a multiplied by bases[a]^T (by bases[a] where back); an empty one is identity.

    bases: k matrices [d_a, d_a] whose columns are the basis, or [0, 0].
    """
    for axis, basis in enumerate(bases):
        if basis.numel():
            x = torch.tensordot(x, basis, dims=([axis], [1 if back else 0])).movedim(-1, axis)
    return x


def gram(x: Tensor, axis: int) -> Tensor:
    """The sum of x[..., i, ...] * x[..., j, ...] over all other axes, [d, d]."""
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows @ rows.T


def soap_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    GG: Sequence[Tensor],
    Q: Sequence[Tensor],
    counts: Tensor,
    hyper: Tensor,
    correct_bias: bool,
    normalize_grads: bool,
    precision: str,
) -> None:
    """Tensor by tensor: Adam on the projected gradient, its direction projected back, weight decay, then GG.

    Tensor i has k_i axes and owns the next k_i entries of GG and Q: [d, d] for an axis that is preconditioned, [0, 0]
    for one that is not. counts [n, 2] int64: steps taken, steps skipped. hyper [n, 6] fp64: see Hyper. A gradient that
    is not finite is a skipped step: nothing else of its tensor changes. The arithmetic is in the dtype of exp_avg;
    precision, which allows a GPU's kernels less in the projections, changes nothing here.
    """
    with full_precision(counts.device):
        _update_all_(params, grads, exp_avg, exp_avg_sq, GG, Q, counts, hyper, correct_bias, normalize_grads)


def _update_all_(params, grads, exp_avg, exp_avg_sq, GG, Q, counts, hyper, correct_bias, normalize_grads) -> None:
    first = 0
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        axes = slice(first, first + param.dim())
        first = axes.stop
        if not takes_step(grad, counts[i]):
            continue
        h = Hyper(*hyper[i].tolist())
        g = grad.to(m.dtype)
        direction = adam_direction(project(g, Q[axes]), m, v, h)
        update = project(direction, Q[axes], back=True)
        apply_update_(param, update, int(counts[i, 0]), h, correct_bias, normalize_grads)
        for axis, factor in enumerate(GG[axes]):
            if factor.numel():
                factor.lerp_(gram(g, axis), 1.0 - h.shampoo_beta)
