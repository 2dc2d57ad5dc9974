"""Ops of diffusion models: the update of a sampler; the noising and the loss of training."""

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


def q_sample(x: Tensor, signal: Tensor, spread: Tensor, *, seed: int | Tensor) -> Tensor:
    """signal[b] x[b] + spread[b] n: samples noised to where the schedule has them at their times, in one pass.

    x [B, *] fp32, bf16, fp16 or fp64; signal and spread [B], sqrt(abar) and sqrt(1 - abar) of each sample's time,
    fp32 (fp64 for fp64), or x's dtype where that is bf16 or fp16. n: standard normal noise of `seed`, ddim_update's,
    counted over the whole of x in row-major order; it is never stored, and q_sample_loss makes it again. Returns a new
    tensor [B, *] of x's dtype and, where it is dense, x's layout; noise is made for contiguous tensors, others are
    copied. Arithmetic in fp32 (fp64 for fp64), every product and sum rounded by itself: all backends agree to the bit.

    Gradients flow to x; signal or spread that require one are refused (RuntimeError). Raises ValueError for shapes and
    seeds, TypeError for dtypes and devices, BackendError for a forced backend.

    Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020).
    """
    name = "q_sample"
    _check.tensor(name, "x", x)
    _check.no_forward_mode(name)
    _check.dtype_in(name, "x", x, FLOATS)
    _check_columns(name, ("x", x), ("signal", signal), ("spread", spread))
    return torch.ops.lic_fast.q_sample(x, signal, spread, _seed(name, x, seed))


def q_sample_loss(
    f: Tensor, x: Tensor | None, weight: Tensor, *, seed: int | Tensor | None = None, absolute: bool = False
) -> Tensor:
    """The weighted loss of a network's prediction for q_sample's result: the mean over all of weight[b] (f - target)^2.

    f [B, *], the prediction: fp32, bf16, fp16 or fp64. The target is x [B, *] of f's dtype, the image, or, where x is
    None, the noise that q_sample(..., seed=seed) added, which is made again in registers: nothing but f is read.
    weight [B], of each sample's time, fp32 (fp64 for fp64), or f's dtype where that is bf16 or fp16. absolute: |f -
    target| in place of the square. Returns a tensor [] fp32 (fp64 for fp64); NaN where f is empty. Arithmetic in that
    dtype, sums over blocks of a fixed order: the same in every run, and on the CPU for any number of threads.

    Gradients flow to f and x, in one pass more, which reads f and the target again, and scales in fp32 before it rounds
    into f's dtype: all backends agree on them to the bit. A weight that requires one is refused, and so are gradients
    of gradients and forward-mode derivatives (RuntimeError). Raises ValueError for shapes and seeds, TypeError for
    dtypes and devices, BackendError for a forced backend.

    Source: Ho, Jain and Abbeel (NeurIPS 2020); weights by time: Salimans and Ho, "Progressive Distillation for Fast
    Sampling of Diffusion Models" (ICLR 2022), Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
    Strategy" (ICCV 2023).
    """
    name = "q_sample_loss"
    _check.tensor(name, "f", f)
    _check.no_forward_mode(name)
    _check.dtype_in(name, "f", f, FLOATS)
    if (x is None) == (seed is None):
        given = "neither" if x is None else "both"
        raise ValueError(
            f"{name}: the target is x, or where x is None the noise of seed, got {given}; pass one of them"
        )
    if x is not None:
        _check.tensor(name, "x", x)
        _check.dtype_in(name, "x", x, (f.dtype,))
        _check.same_shape(name, ("f", f), ("x", x))
        _check.same_device(name, ("f", f), ("x", x))
    _check_columns(name, ("f", f), ("weight", weight))
    seed = None if seed is None else _seed(name, f, seed)
    return torch.ops.lic_fast.q_sample_loss(f, x, weight, seed, bool(absolute))


def _check_columns(function: str, first: tuple[str, Tensor], *columns: tuple[str, Tensor]) -> None:
    """That the named tensors have one number for each sample of the first, [B, *], and ask for no gradient."""
    name, x = first
    if x.dim() < 1:
        raise ValueError(f"{function}: {name} must be [B, *], got {list(x.shape)}; add the dimension of samples")
    half = (x.dtype,) if x.dtype in (torch.bfloat16, torch.float16) else ()
    allowed = (torch.float64,) if x.dtype is torch.float64 else (torch.float32, *half)
    for key, value in columns:
        _check.tensor(function, key, value)
        if list(value.shape) != [len(x)]:
            raise ValueError(
                f"{function}: {key} must be [{len(x)}] for {name} {list(x.shape)}, got {list(value.shape)}"
            )
        _check.dtype_in(function, key, value, allowed)
        if torch.is_grad_enabled() and value.requires_grad:
            raise RuntimeError(f"{function}: {key} requires grad, and none is computed; pass {key}.detach()")
    _check.same_device(function, first, *columns)


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
