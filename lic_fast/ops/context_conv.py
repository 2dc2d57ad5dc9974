"""lic_fast::context_conv: the context convolution of an autoregressive model at one pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._dispatch import Impl, OpSpec, register
from ..reference.context_conv import context_conv as reference
from ._library import define, plain

CHANNELS, OUTPUTS = 16, 64  # of a block and of a group, as csrc/cpu/context_conv.cpp reads them


def pack(weight: Tensor) -> Tensor:
    """The taps before the middle of weight [O, C, k, k], as [groups, blocks, taps, 16, 64], padded with zeros."""
    outputs, channels, side = weight.shape[:3]
    taps = weight.detach().flatten(2)[:, :, : side * side // 2]
    padded = F.pad(taps, (0, 0, 0, -channels % CHANNELS, 0, -outputs % OUTPUTS))
    blocks = padded.view(-1, OUTPUTS, padded.shape[1] // CHANNELS, CHANNELS, side * side // 2)
    return blocks.permute(0, 2, 4, 3, 1).contiguous()


def _native_op(crop: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
    out = torch.empty((1, weight.shape[0], 1, 1), dtype=torch.float32)
    _native.op("cpp", "context_conv_out")(crop, packed, bias, out)
    return out


SPEC = register(
    OpSpec(
        "context_conv",
        {
            "cpp": Impl(_native_op, ("cpu",), (torch.float32,), lambda device: _native.why_not("cpp", device)),
            "reference": Impl(lambda crop, weight, bias, packed: reference(crop, weight, bias), None, (torch.float32,)),
        },
        {"cpu": ("cpp", "reference")},
    )
)


def attempt(crop: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor | None:
    """The result by the shortest way, where the native kernel is the choice; else None."""
    if plain(crop) and SPEC.choose("cpu", torch.float32) == "cpp":
        return _native_op(crop, weight, bias, packed)
    return None


def _op(crop: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
    return SPEC(crop, crop, weight, bias, packed)


def _fake(crop: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor) -> Tensor:
    return crop.new_empty((1, weight.shape[0], 1, 1))


define("context_conv(Tensor crop, Tensor weight, Tensor? bias, Tensor packed) -> Tensor", _op, _fake)
