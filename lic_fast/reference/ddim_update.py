"""An update of a diffusion sampler, as specified."""

from __future__ import annotations

import torch
from torch import Tensor

from ._noise import normal_noise


def ddim_update(x: Tensor, f: Tensor, seed: Tensor | None, a: float, b: float, clamp: float, noise: float) -> Tensor:
    """a x + b clamp(f) + noise n, with n standard normal noise of seed [1] int64; without seed, no noise.

    clamp is to [-clamp, clamp], infinity for none. In fp32, or in fp64 for fp64: every product and sum is rounded by
    itself, from the left, and the result once into x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    numbers = torch.tensor([a, b, clamp, noise], dtype=wide, device=x.device)
    bounded = torch.maximum(torch.minimum(f.to(wide), numbers[2]), -numbers[2])
    value = x.to(wide) * numbers[0] + bounded * numbers[1]
    if seed is not None:
        value = value + normal_noise(seed, x).to(wide) * numbers[3]
    return torch.empty_like(x).copy_(value)
