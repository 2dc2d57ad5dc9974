"""Ops of diffusion models: the update of a sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._library import FLOATS
from . import _check


def ddim_update(
    x: Tensor,
    f: Tensor,
    *,
    a: float,
    b: float,
    clamp: float | None = 1.0,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """a x + b clamp(f) + noise n: one step of DDIM, or of DDPM, in one pass over memory.

    x [*], the sample, and f [*], what the network predicted for it: fp32, bf16, fp16 or fp64, of one dtype. f is the
    image or the noise, for either way of training: the step is linear in x and f, with coefficients that depend on
    the schedule alone (lic_fast.codec has them). clamp: f is held to [-clamp, clamp]; None does not. noise: how much
    standard normal noise is added; 0 reads no seed. seed: of that noise, an integer of 64 bits or a tensor [1] int64
    on x's device. Element i in row-major order gets the i-th number of a counter-based generator, of 2**24 values up
    to 5.42: the same bits on every backend and device. Returns a new tensor [*] of x's dtype and, where it is dense,
    x's layout. Arithmetic in fp32 (fp64 for fp64), every product and sum rounded by itself: all backends agree to the
    bit.

    Gradients flow to x and f (none to f where it was clamped). Raises ValueError for shapes and numbers, TypeError for
    dtypes and devices, BackendError for a forced backend.

    Source: Song, Meng and Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021); Philox4x32-10 (Salmon et al., SC
    2011); the inverse of the normal distribution is our own.
    """
    name = "ddim_update"
    _check.tensor(name, "x", x)
    _check.tensor(name, "f", f)
    _check.no_forward_mode(name)
    _check.dtype_in(name, "x", x, FLOATS)
    _check.dtype_in(name, "f", f, (x.dtype,))
    _check.same_shape(name, ("x", x), ("f", f))
    for key, value in (("a", a), ("b", b), ("noise", noise)):
        if not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{name}: {key} must be a finite number, got {value!r}")
    if clamp is not None and not (isinstance(clamp, (int, float)) and clamp >= 0):
        raise ValueError(f"{name}: clamp must be a number >= 0, or None for none, got {clamp!r}")
    _check.same_device(name, ("x", x), ("f", f))
    limit = math.inf if clamp is None else float(clamp)
    numbers = float(a), float(b), limit, float(noise)
    return torch.ops.lic_fast.ddim_update(x, f, _seed(name, x, seed) if noise else None, *numbers)


def _seed(function: str, x: Tensor, seed: int | Tensor | None) -> Tensor:
    """seed as a tensor [1] int64 on x's device."""
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.shape != (1,):
            raise ValueError(
                f"{function}: seed must be an integer or a tensor [1] int64, got {seed.dtype} {list(seed.shape)}"
            )
        _check.same_device(function, ("x", x), ("seed", seed))
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise ValueError(f"{function}: with noise, seed must be an integer in [0, 2**64), got {seed!r}; pass one")
    return torch.full((1,), seed - (1 << 64) if seed >> 63 else seed, dtype=torch.int64, device=x.device)
