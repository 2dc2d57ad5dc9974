"""Recursive least squares of the affine embedding's coefficients, as specified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import OUTSIDE, STATELESS, TIED, flat, places


def rls_update_(
    params: Sequence[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, gains: Tensor, change: Tensor | None
) -> None:
    """Free embeddable elements: e = (w - k r) - d, k <- k + e g0, d <- d + e g1, change = |e| norm.

    gains [M, 4] fp64: r, g0, g1 and norm of each mode. Arithmetic in fp64, each operation rounded by itself, rounded
    once into k, d and change. TIED elements that are not STATELESS keep k and d, their change is inf; OUTSIDE and
    STATELESS ones too, their change is NaN. A mode outside [0, M) gives NaN in all three.
    """
    nan, inf = float("nan"), float("inf")
    table = torch.full((OUTSIDE + 1, 4), nan, dtype=torch.float64, device=gains.device)
    table[: len(gains)] = gains
    if change is not None:
        change.fill_(nan)
    for p, place in zip(params, places([p.numel() for p in params], base, 0, len(k)), strict=True):
        c = code[place.code]
        embeddable, kept = c & OUTSIDE != OUTSIDE, c & STATELESS == 0
        free = embeddable & kept & (c & TIED == 0)
        within = free[embeddable]
        own_k, own_d = k[place.coefficients], d[place.coefficients]
        old_k, old_d = own_k[within].double(), own_d[within].double()
        r, g0, g1, norm = table[(c[free] & OUTSIDE).long()].unbind(1)
        e = (flat(p)[free].double() - old_k * r) - old_d
        own_k[within] = (old_k + e * g0).to(k.dtype)
        own_d[within] = (old_d + e * g1).to(d.dtype)
        if change is not None:
            part = change[place.code]
            part[embeddable & kept & ~free] = inf
            part[free] = (e.abs() * norm).to(change.dtype)
