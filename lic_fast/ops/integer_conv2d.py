"""lic_fast::integer_conv2d: a convolution of 16-bit integers with 32-bit sums, requantised by shifts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.integer_conv2d import integer_conv2d as reference
from ._library import define

OUTPUTS, PAIR = 16, 2  # of a group of outputs, and of channels that one multiply-add takes; as the kernels read them
_DTYPES = (torch.int16,)


def pack(weight: Tensor) -> Tensor:
    """weight [O, C, k, k] as [groups, k * k, pairs, 16, 2], padded with zeros."""
    outputs, channels, side = weight.shape[:3]
    padded = F.pad(weight.flatten(2), (0, 0, 0, -channels % PAIR, 0, -outputs % OUTPUTS))
    pairs = padded.view(-1, OUTPUTS, padded.shape[1] // PAIR, PAIR, side * side)
    return pairs.permute(0, 4, 2, 1, 3).contiguous()


def packed_shape(weight: Tensor) -> tuple[int, ...]:
    """That of pack(weight)."""
    outputs, channels, side = weight.shape[:3]
    return (-(-outputs // OUTPUTS), side * side, -(-channels // PAIR), OUTPUTS, PAIR)


def _result(x: Tensor, weight: Tensor, limit: int) -> Tensor:
    sizes = (x.shape[0], weight.shape[0], *x.shape[2:])
    if limit > 0:
        return torch.empty(sizes, dtype=torch.int16, device=x.device, memory_format=torch.channels_last)
    return torch.empty(sizes, dtype=torch.int32, device=x.device)


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, packed: Tensor | None,
    leaky: bool, limit: int, launch,
) -> Tensor:  # fmt: skip
    out = _result(x, weight, limit)
    if out.numel():
        last = torch.channels_last
        rest = None if residual is None else residual.contiguous(memory_format=last)
        packed = pack(weight) if packed is None else packed
        launch(x.contiguous(memory_format=last), packed, bias, shift, rest, leaky, limit, weight.shape[2], out)
    return out


def _cpp(*args: object) -> Tensor:
    return _kernel(*args, launch=_native.op("cpp", "integer_conv2d_out"))


def _triton_kernel(*args: object) -> Tensor:
    return _kernel(*args, launch=_triton.kernels("integer_conv2d").integer_conv2d_out)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, packed: Tensor | None,
    leaky: bool, limit: int,
) -> Tensor:  # fmt: skip
    return reference(x, weight, bias, shift, residual, leaky, limit)


SPEC = register(
    OpSpec(
        "integer_conv2d",
        {
            "triton": Impl(_triton_kernel, ("cuda", "cpu"), _DTYPES, _triton.why_not),
            "cpp": Impl(_cpp, ("cpu",), _DTYPES, lambda device: _native.why_not("cpp", device)),
            "reference": Impl(_reference, None, _DTYPES),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, packed: Tensor | None,
    leaky: bool, limit: int,
) -> Tensor:  # fmt: skip
    return _result(x, weight, limit)


define(
    "integer_conv2d(Tensor x, Tensor weight, Tensor bias, Tensor shift, Tensor? residual, Tensor? packed, bool leaky, "
    "int limit) -> Tensor",
    lambda x, *args: SPEC(x, x, *args),
    _fake,
)
