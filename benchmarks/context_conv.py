"""context_conv: the context of one pixel of mbt2018 and cheng2020-anchor, beside the convolution CompressAI calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..functional import context_conv, context_conv_pack
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

_SEED = 21
_SIDE = 5
_MODELS = (("mbt2018, quality 1-4", 192), ("cheng2020-anchor, quality 1-3", 128))
_QUICK = (("a small model", 32),)


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model, on the CPU only, in fp32 whatever the dtype."""
    if settings.device.type != "cpu":
        return
    for name, channels in _QUICK if settings.quick else _MODELS:
        generator = torch.Generator().manual_seed(_SEED)
        outputs, taps = 2 * channels, _SIDE * _SIDE // 2
        weight = torch.randn(outputs, channels, _SIDE, _SIDE, generator=generator) / channels
        weight *= (torch.arange(_SIDE**2) < taps).view(_SIDE, _SIDE)
        bias = torch.randn(outputs, generator=generator)
        crop = torch.randn(1, channels, 36, 52, generator=generator).round()[:, :, 3 : 3 + _SIDE, 4 : 4 + _SIDE]
        packed = context_conv_pack(weight)
        moved, flops = 4 * taps * channels * (outputs + 1), 2 * taps * channels * outputs

        def ours(crop=crop, weight=weight, packed=packed, bias=bias):
            return context_conv(crop, weight, packed, bias=bias)

        def theirs(crop=crop, weight=weight, bias=bias):
            return F.conv2d(crop, weight, bias)

        usable, left_out = backends("context_conv", settings.device, torch.float32)
        cases = [Case(OURS + b, forced(b, ours), lambda out: [out], moved, flops) for b in usable]
        cases.append(Case("F.conv2d of the masked weight", theirs, lambda out: [out], moved, flops))
        exact = F.conv2d(crop.double(), weight.double(), bias.double())
        yield Group(
            op="context_conv",
            case="one pixel",
            inputs=f"{name} ({outputs} x {channels} x {_SIDE} x {_SIDE})",
            dtype="fp32",
            device=settings.device,
            cases=cases,
            expected=Expected.of([exact], [theirs()], [magnitude(exact)]),
            left_out=left_out,
        )
