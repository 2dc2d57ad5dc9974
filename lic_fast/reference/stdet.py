"""A step of a partly embedded model, as specified: masked Adam, affine reconstruction, moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import OUTSIDE, STATELESS, TIED, flat, places, starts


class StepHyper(NamedTuple):
    """A row of the table of hyperparameters, fp64: one for every tensor."""

    step_size: float  # lr / (1 - beta1^step)
    beta1: float
    beta2: float
    scale: float  # 1 / sqrt(1 - beta2^step)
    eps: float
    l2: float  # weight decay as Adam has it: added to the gradient
    decay: float  # lr * weight decay as AdamW has it


def stdet_adam_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], slow: Sequence[Tensor], code: Tensor, base: Tensor,
    k: Tensor, d: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, refs: Tensor, hyper: Tensor, alpha: float, reset: bool,
) -> None:  # fmt: skip
    """Every element once, arithmetic in the dtype of exp_avg, each operation rounded by itself.

    Free elements (neither TIED nor STATELESS) of tensors that have a gradient take an Adam step; then, where `slow` is
    given, slow <- slow + alpha * (p - slow) for all that are not TIED (alpha = 1: slow <- p), and p <- slow where
    reset. TIED elements become k * r + d with r the new value of their mode's reference, in slow too with the new slow
    value; where reset, p is then that. Averages of elements that are TIED but not STATELESS stand still.
    """
    wide = exp_avg.dtype
    for i, place in enumerate(places([p.numel() for p in params], base, len(exp_avg), len(k))):
        c, p = code[place.code], flat(params[i])
        has, tied = c & STATELESS == 0, c & TIED != 0
        if grads[i].numel() == p.numel():
            free = has & ~tied
            m, v = exp_avg[place.state], exp_avg_sq[place.state]
            within = ~tied[has]
            value, m[within], v[within] = _adam(
                p[free].to(wide), flat(grads[i])[free].to(wide), m[within], v[within], StepHyper(*hyper[i].tolist())
            )
            p[free] = value.to(p.dtype)
        if slow:
            s = flat(slow[i])
            new = p.to(wide)
            new = torch.where(tied, s, new if alpha == 1.0 else s + alpha * (new - s))
            s.copy_(new)
            if reset:
                p.copy_(torch.where(tied, p, new.to(p.dtype)))
    stdet_reconstruct_(params, code, base, k, d, refs)
    if slow:
        stdet_reconstruct_(slow, code, base, k, d, refs)
        if reset:
            first = starts([p.numel() for p in params])
            for i, p in enumerate(params):
                tied = code[first[i] : first[i] + p.numel()] & TIED != 0
                flat(p).copy_(torch.where(tied, flat(slow[i]).to(p.dtype), flat(p)))


def _adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: StepHyper) -> tuple[Tensor, Tensor, Tensor]:
    """The new p, m and v."""
    if h.l2:
        g = g + h.l2 * p
    if h.decay:
        p = p - h.decay * p
    m = m + (1.0 - h.beta1) * (g - m)
    v = h.beta2 * v + (1.0 - h.beta2) * (g * g)
    # On the CPU torch's sqrt is its vector library's, often an ulp off; through fp64 a root of fp32 is rounded right.
    root = v.double().sqrt().to(v.dtype)
    return p - h.step_size * (m / (root * h.scale + h.eps)), m, v


def stdet_reconstruct_(
    params: Sequence[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor
) -> None:
    """TIED elements become k * r + d, r the value that their mode's reference has in `params`; others keep their bits.

    refs [M, 3] int64: each reference's tensor, its element there in the order of memory, and its place in exp_avg,
    which is not read here. Where a mode lies outside [0, M), NaN.
    """
    values = torch.full((OUTSIDE + 1,), float("nan"), dtype=k.dtype, device=k.device)
    for mode, (tensor, element, _) in enumerate(refs.tolist()):
        values[mode] = flat(params[tensor])[element].to(k.dtype)
    for p, place in zip(params, places([p.numel() for p in params], base, 0, len(k)), strict=True):
        c, p = code[place.code], flat(p)
        tied, embeddable = c & TIED != 0, c & OUTSIDE != OUTSIDE
        within, rebuilt = tied[embeddable], tied & embeddable
        r = values[(c[rebuilt] & OUTSIDE).long()]
        p[tied & ~embeddable] = float("nan")  # neither k nor d
        p[rebuilt] = (k[place.coefficients][within] * r + d[place.coefficients][within]).to(p.dtype)


def stdet_mask_(grads: Sequence[Tensor], code: Tensor, sizes: Sequence[int]) -> None:
    """The gradients of TIED elements become 0. A tensor without a gradient is an empty one; sizes: the parameters'."""
    for g, size, first in zip(grads, sizes, starts(sizes), strict=False):
        if g.numel() == size:
            flat(g).masked_fill_(code[first : first + size] & TIED != 0, 0.0)
