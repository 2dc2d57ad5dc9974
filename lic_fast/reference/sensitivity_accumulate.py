"""Sums of the weights' sensitivities, as specified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import flat

KINDS = ("taylor", "fisher", "magnitude")


def sensitivity_accumulate_(s: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], kind: int) -> None:
    """s <- s + |w g| (taylor), g g (fisher) or |g| (magnitude), in s's dtype; what is not finite counts as 0.

    kind: a place in KINDS. s [n], the elements in the order in which the dense parameter's lie in memory. Tensors
    without a gradient, an empty one, are left alone.
    """
    for total, p, g in zip(s, params, grads, strict=True):
        if g.numel() != p.numel():
            continue
        wide = flat(g).to(total.dtype)
        if KINDS[kind] == "taylor":
            term = (flat(p).to(total.dtype) * wide).abs()
        elif KINDS[kind] == "fisher":
            term = wide * wide
        else:
            term = wide.abs()
        total.add_(torch.where(term.isfinite(), term, 0.0))
