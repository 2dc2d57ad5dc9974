"""Normalization over channels with a ReLU and a shift, and its gradients; x is [B, C, S], or [B, S, C] for LAST:

    n = (x - mean) / sqrt(variance + eps);  y = relu(n weight + bias) + shift
    d_x = (d_n - mean(d_n) - n mean(d_n n)) / sqrt(variance + eps),  d_n = weight d_y where the ReLU lets it pass

Mean and variance are over the channels of one place. A program has all channels of a few places in registers: x is
read once and y written once; backward makes n again from x. Of the gradients that are sums over places a program adds a
stretch of one image, and PyTorch adds the stretches: no atomics, the same bits in every run. FP fusion is off.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a tile
STRETCH = 512  # places of a program backward
WIDE = {torch.float32: tl.float32, torch.bfloat16: tl.float32, torch.float16: tl.float32, torch.float64: tl.float64}


@triton.jit
def _places(first, S, C, channels, LAST: tl.constexpr, BN: tl.constexpr):
    """(offsets [BC, BN] of a tile within an image, its mask)."""
    places = first + tl.arange(0, BN)
    mask = (channels < C)[:, None] & (places < S)[None, :]
    if LAST:
        offsets = channels[:, None] + places[None, :].to(tl.int64) * C
    else:
        offsets = channels[:, None].to(tl.int64) * S + places[None, :]
    return offsets, mask


@triton.jit
def _normalized(x, inside, C, eps):
    """(x less its mean, over its deviation; one over the latter); x is 0 outside."""
    count = tl.cast(C, x.dtype)
    centred = tl.where(inside[:, None], x - (tl.sum(x, 0) / count)[None, :], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / count + eps)
    return centred * inverse[None, :], inverse


@triton.jit
def _vector(ptr, channels, C):
    return tl.load(ptr + channels, mask=channels < C, other=0.0)


@triton.jit
def channel_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, C, S, eps_bits,
    WIDE: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr, SHIFT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BC)
    offsets, mask = _places(tl.program_id(0) * BN, S, C, channels, LAST, BN)
    at = image * C * S
    eps = tl.cast(eps_bits.to(tl.int64), tl.float64, bitcast=True).to(WIDE)
    x = tl.load(x_ptr + at + offsets, mask=mask, other=0.0).to(WIDE)
    normalized, _ = _normalized(x, channels < C, C, eps)
    y = normalized * _vector(weight_ptr, channels, C)[:, None] + _vector(bias_ptr, channels, C)[:, None]
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if SHIFT:
        y = y + _vector(shift_ptr + image * C, channels, C)[:, None]
    tl.store(y_ptr + at + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def channel_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, d_x_ptr, sums_ptr, C, S, eps_bits,
    WIDE: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BC)
    at = image * C * S
    eps = tl.cast(eps_bits.to(tl.int64), tl.float64, bitcast=True).to(WIDE)
    weight, bias = _vector(weight_ptr, channels, C)[:, None], _vector(bias_ptr, channels, C)[:, None]
    count = tl.cast(C, WIDE)
    d_weight = tl.zeros([BC], WIDE)
    d_bias = tl.zeros([BC], WIDE)
    d_shift = tl.zeros([BC], WIDE)
    for step in range(0, STRETCH, BN):
        offsets, mask = _places(tl.program_id(0) * STRETCH + step, S, C, channels, LAST, BN)
        x = tl.load(x_ptr + at + offsets, mask=mask, other=0.0).to(WIDE)
        grad = tl.load(grad_ptr + at + offsets, mask=mask, other=0.0).to(WIDE)
        normalized, inverse = _normalized(x, channels < C, C, eps)
        d_shift += tl.sum(grad, 1)
        if RELU:
            grad = tl.where(normalized * weight + bias > 0, grad, 0.0)
        d_bias += tl.sum(grad, 1)
        d_weight += tl.sum(tl.where(mask, grad * normalized, 0.0), 1)
        scaled = grad * weight
        mean = tl.sum(scaled, 0) / count
        along = tl.sum(scaled * normalized, 0) / count
        d_x = (scaled - mean[None, :] - normalized * along[None, :]) * inverse[None, :]
        tl.store(d_x_ptr + at + offsets, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    row = sums_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * 3 * C
    tl.store(row + channels, d_weight, mask=channels < C)
    tl.store(row + C + channels, d_bias, mask=channels < C)
    tl.store(row + 2 * C + channels, d_shift, mask=channels < C)


def _last(x: Tensor) -> bool:
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous() if last else x.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """(images, channels, places, channels and places of a tile)."""
    B, C = x.shape[:2]
    block = triton.next_power_of_2(max(C, 1))
    return B, C, x.numel() // (B * C) if B and C else 0, block, max(1, TILE // block)


def _wide(x: Tensor, *values: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [value.to(dtype).contiguous() for value in values]


def _bits(value: float) -> int:
    return torch.tensor(value, dtype=torch.float64).view(torch.int64).item()


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, relu: bool, eps: float) -> Tensor:
    """The forward pass, validated by the caller; the result has x's memory format."""
    last = _last(x)
    y = torch.empty_like(x, memory_format=torch.preserve_format if last else torch.contiguous_format)
    B, C, S, BC, BN = _sizes(x)
    if not y.numel():
        return y
    weight, bias, *rest = _wide(x, weight, bias, *([] if shift is None else [shift]))
    with torch.cuda.device_of(x):
        channel_norm_fwd_kernel[(triton.cdiv(S, BN), B)](
            _laid_out(x, last), weight, bias, rest[0] if rest else weight, y, C, S, _bits(eps),
            WIDE[x.dtype], last, relu, bool(rest), BC, BN, **_LAUNCH,
        )  # fmt: skip
    return y


def channel_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and shift; the first in x's memory format, the others of the arithmetic's."""
    last = _last(x)
    d_x = torch.empty_like(x, memory_format=torch.preserve_format if last else torch.contiguous_format)
    B, C, S, BC, BN = _sizes(x)
    weight, bias = _wide(x, weight, bias)
    stretches = triton.cdiv(S, STRETCH)
    sums = weight.new_zeros(B, stretches, 3, C)
    if d_x.numel():
        with torch.cuda.device_of(x):
            channel_norm_bwd_kernel[(stretches, B)](
                _laid_out(grad, last), _laid_out(x, last), weight, bias, d_x, sums, C, S, _bits(eps),
                WIDE[x.dtype], last, relu, BC, min(BN, STRETCH), STRETCH, **_LAUNCH,
            )  # fmt: skip
    of_weight, of_bias, of_shift = sums.unbind(2)
    return d_x, of_weight.sum((0, 1)), of_bias.sum((0, 1)), of_shift.sum(1)


_LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
_OPTIONS = {"num_warps": 8}
# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = [
    (
        channel_norm_fwd_kernel,
        {
            "x_ptr": pointer, "y_ptr": pointer, **dict.fromkeys(("weight_ptr", "bias_ptr", "shift_ptr"), wide_pointer),
            **dict.fromkeys(("C", "S"), "i32"), "eps_bits": "i64",
        },
        {"WIDE": wide, "LAST": last, "RELU": True, "SHIFT": last, "BC": block, "BN": TILE // block},
        _OPTIONS,
    )
    for pointer, wide, wide_pointer in (
        ("*fp32", tl.float32, "*fp32"), ("*bf16", tl.float32, "*fp32"), ("*fp64", tl.float64, "*fp64"),
    )
    for last, block in ((False, 64), (True, 512))
] + [
    (
        channel_norm_bwd_kernel,
        {
            **dict.fromkeys(("grad_ptr", "x_ptr", "d_x_ptr"), pointer),
            **dict.fromkeys(("weight_ptr", "bias_ptr", "sums_ptr"), wide_pointer),
            **dict.fromkeys(("C", "S"), "i32"), "eps_bits": "i64",
        },
        {"WIDE": wide, "LAST": last, "RELU": True, "BC": block, "BN": TILE // block, "STRETCH": STRETCH},
        _OPTIONS,
    )
    for pointer, wide, wide_pointer in (("*fp32", tl.float32, "*fp32"), ("*bf16", tl.float32, "*fp32"))
    for last, block in ((False, 64), (True, 512))
]  # fmt: skip
