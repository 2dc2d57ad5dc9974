"""Ops on activations: divisive normalization, and normalization to mean and deviation, across channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops._library import FLOATS
from . import _check

_HALF = (torch.bfloat16, torch.float16)


def gdn(
    x: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    inverse: bool = False,
    simplified: bool = False,
    beta_min: float = 1e-6,
    reparam_offset: float = 2**-18,
    recompute: bool = False,
) -> Tensor:
    """x / sqrt(norm), or x * sqrt(norm) where inverse; norm[i] = beta'[i] + sum_j gamma'[i, j] x[j]^2 over channels.

    x [B, C, *] fp32, bf16, fp16 or fp64; beta [C] and gamma [C, C] as CompressAI's GDN stores them, fp32 (fp64 for
    fp64; x's dtype too where that is bf16 or fp16). They stand for beta' = max(beta, sqrt(beta_min + o))^2 - o and
    gamma' = max(gamma, sqrt(o))^2 - o with o = reparam_offset^2; the bounds are rounded to fp32, as CompressAI's are.
    simplified: x / norm, or x * norm, with |x[j]| in place of x[j]^2 (CompressAI's GDN1). Returns a new tensor
    [B, C, *] of x's dtype and memory format. Arithmetic in fp32 (fp64 for fp64); the sums over channels of fp32 on
    CUDA in TF32 where torch.backends.cudnn.allow_tf32, else in three TF32 products (fp32's accuracy).

    Gradients flow to x, beta and gamma; below a bound only those pass that lead towards it. Besides x, backward needs
    one tensor of x's size and dtype; recompute=True: it keeps none and computes the norm again. The sums over
    positions have a fixed order: the same in every run, and on the CPU for any number of threads. There are neither
    gradients of gradients nor forward-mode derivatives, nor those of torch.func (RuntimeError).

    Raises ValueError for shapes, beta_min and reparam_offset, TypeError for dtypes and devices, BackendError for a
    forced backend.

    Source: Ballé, Laparra and Simoncelli, "Density Modeling of Images using a Generalized Normalization
    Transformation" (ICLR 2016); simplified: Johnston et al., "Computationally Efficient Neural Image Compression"
    (2019); the parametrization is that of compressai.layers.GDN.
    """
    f = "gdn"
    for name, value in (("x", x), ("beta", beta), ("gamma", gamma)):
        _check.tensor(f, name, value)
    _check.no_forward_mode(f)
    _check_arguments(f, x, beta, gamma)
    for name, number in (("beta_min", beta_min), ("reparam_offset", reparam_offset)):
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
            raise ValueError(f"{f}: {name} must be a finite number >= 0, got {number!r}")
    if beta.dtype in _HALF:
        beta = beta.float()
    if gamma.dtype in _HALF:
        gamma = gamma.float()
    pedestal = _as_fp32(reparam_offset**2)
    bounds = _as_fp32((beta_min + reparam_offset**2) ** 0.5), _as_fp32(float(reparam_offset))
    recorded = torch.is_grad_enabled() and (x.requires_grad or beta.requires_grad or gamma.requires_grad)
    form = bool(inverse), bool(simplified), *bounds, pedestal
    return torch.ops.lic_fast.gdn(x, beta, gamma, *form, recorded and not recompute)[0]


def channel_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, shift: Tensor | None = None, relu: bool = False, eps: float = 1e-5
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, through a ReLU where relu, + shift; in one pass.

    Mean and variance are over the channels of each place. x [B, C, *] fp32, bf16, fp16 or fp64; weight, bias [C];
    shift [B, C], added to all places of a sample: the time bias of a diffusion model's block; fp32 (fp64 for fp64), or
    x's dtype where that is bf16 or fp16. C >= 1. Returns a new tensor [B, C, *] of x's dtype and memory format.
    Arithmetic in fp32 (fp64 for fp64), rounded once into x's dtype. Native kernels walk contiguous and channels_last
    tensors as they lie; contiguous ones of less than 16 places, and other layouts, are copied.

    Gradients flow to x, weight, bias and shift; besides x, backward keeps nothing. Sums over places have a fixed
    order: the same in every run, and on the CPU for any number of threads. There are neither gradients of gradients
    nor forward-mode derivatives (RuntimeError).

    Raises ValueError for shapes and eps, TypeError for dtypes and devices, BackendError for a forced backend.

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), over channels as in ConvNeXt (Liu et al., CVPR 2022)
    and the U-Net of CDC (Yang and Mandt, NeurIPS 2023).
    """
    f = "channel_norm"
    parameters = [("weight", weight), ("bias", bias), *([] if shift is None else [("shift", shift)])]
    for name, value in (("x", x), *parameters):
        _check.tensor(f, name, value)
    _check.no_forward_mode(f)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(
            f"{f}: x must be [B, C, *] with C >= 1, got {list(x.shape)}; add the dimensions that are missing"
        )
    _check.dtype_in(f, "x", x, FLOATS)
    allowed = (
        (torch.float64,) if x.dtype is torch.float64 else (torch.float32, *((x.dtype,) if x.dtype in _HALF else ()))
    )
    for name, value in parameters:
        wanted = list(x.shape[:2]) if name == "shift" else [x.shape[1]]
        if list(value.shape) != wanted:
            raise ValueError(f"{f}: {name} must be {wanted} for x {list(x.shape)}, got {list(value.shape)}")
        _check.dtype_in(f, name, value, allowed)
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{f}: eps must be a finite number >= 0, got {eps!r}")
    _check.same_device(f, ("x", x), *parameters)
    return torch.ops.lic_fast.channel_norm(x, weight, bias, shift, bool(relu), float(eps))


def _as_fp32(value: float) -> float:
    """The fp32 number next to a double; in plain arithmetic, which torch.compile folds."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(float(round(mantissa * 2.0**24)), exponent - 24)


def _check_arguments(f: str, x: Tensor, beta: Tensor, gamma: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"{f}: x must be [B, C, *], got {list(x.shape)}; add the dimensions that are missing")
    channels = x.shape[1]
    for name, value, shape in (("beta", beta, [channels]), ("gamma", gamma, [channels, channels])):
        if list(value.shape) != shape:
            raise ValueError(f"{f}: {name} must be {shape} for x with {channels} channels, got {list(value.shape)}")
    _check.dtype_in(f, "x", x, FLOATS)
    parameters = (torch.float64,) if x.dtype is torch.float64 else (torch.float32,)
    if x.dtype in _HALF:
        parameters = (torch.float32, x.dtype)
    for name, value in (("beta", beta), ("gamma", gamma)):
        _check.dtype_in(f, name, value, parameters)
    _check.same_device(f, ("x", x), ("beta", beta), ("gamma", gamma))
