"""Sampling-then-moving average of weights, as specified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sma_update_(slow: Sequence[Tensor], fast: Sequence[Tensor], alpha: float, reset: bool) -> None:
    """slow <- slow + alpha * (fast - slow), then fast <- slow where reset, tensor by tensor.

    The sum is taken in the wider of the two dtypes and at least in fp32, and rounded once into slow.
    """
    for s, f in zip(slow, fast, strict=True):
        wide = torch.promote_types(torch.promote_types(s.dtype, f.dtype), torch.float32)
        old = s.to(wide)
        s.copy_(old + alpha * (f.to(wide) - old))
        if reset:
            f.copy_(s)
