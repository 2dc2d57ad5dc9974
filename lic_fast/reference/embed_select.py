"""Which elements are the smallest, as specified: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def embed_select(values: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """True [n] for the `count` smallest of values [n] where mask; of equal ones the first. NaN is never selected."""
    candidates = ~values.isnan() if mask is None else mask & ~values.isnan()
    places = candidates.nonzero().flatten()
    order = (values[places] + 0.0).sort(stable=True).indices  # + 0.0: -0.0 is 0.0
    selected = torch.zeros_like(values, dtype=torch.bool)
    selected[places[order[:count]]] = True
    return selected
