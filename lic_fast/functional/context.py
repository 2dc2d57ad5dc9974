"""The context convolution of autoregressive models, one pixel at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.context_conv import CHANNELS, OUTPUTS
from ..ops.context_conv import attempt as _attempt
from ..ops.context_conv import pack as _pack
from . import _check


def context_conv_pack(weight: Tensor) -> Tensor:
    """The taps of weight [O, C, k, k] before the middle in raster order, in the order context_conv reads them.

    weight fp32 on the CPU, k odd and 3 at least. Returns fp32 [ceil(O / 64), ceil(C / 16),
    (k * k - 1) / 2, 16, 64]; make it anew where the weight has changed. There are no gradients.

    Raises ValueError for shapes, TypeError for dtypes and devices.
    Source: the mask "A" of PixelCNN (van den Oord et al., 2016), CompressAI's MaskedConv2d.
    """
    f = "context_conv_pack"
    _fp32(f, "weight", weight)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[3] % 2 == 0 or weight.shape[3] < 3:
        raise ValueError(f"{f}: weight must be [O, C, k, k], k odd and at least 3, got {list(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"{f}: weight must have channels and outputs, got {list(weight.shape)}")
    return _pack(weight)


def context_conv(crop: Tensor, weight: Tensor, packed: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The convolution of crop with the taps before the middle of weight, plus bias: [1, O, 1, 1] fp32.

    crop [1, C, k, k] fp32 on the CPU, any strides; weight [O, C, k, k], and packed what context_conv_pack made of it;
    bias [O]. What crop holds at and after the middle is not read, so it may be what is yet to be decoded. The native
    kernel has one order of sums on every processor with AVX-512, that of oneDNN's direct convolution there. There are
    no gradients.

    Raises ValueError for shapes, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: as context_conv_pack.
    """
    f = "context_conv"
    _fp32(f, "crop", crop)
    if bias is not None:
        _fp32(f, "bias", bias)
    outputs, channels, side, _ = weight.shape
    sizes = (-(-outputs // OUTPUTS), -(-channels // CHANNELS), side * side // 2, CHANNELS, OUTPUTS)
    if crop.shape != (1, channels, side, side) or packed.shape != sizes:
        raise ValueError(
            f"{f}: crop must be {[1, channels, side, side]} and packed {list(sizes)}, got {list(crop.shape)} and "
            f"{list(packed.shape)}; pack the weight again"
        )
    if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
        raise ValueError(f"{f}: bias must be contiguous [{outputs}], got {list(bias.shape)}; reshape it")
    result = _attempt(crop, weight, bias, packed)
    return torch.ops.lic_fast.context_conv(crop, weight, bias, packed) if result is None else result


def _fp32(f: str, name: str, value: object) -> None:
    value = _check.tensor(f, name, value)
    _check.dtype_in(f, name, value, (torch.float32,))
    if value.device.type != "cpu":
        raise TypeError(f"{f}: {name} must be on the CPU, got {value.device}; move it with .cpu()")
