"""integer_conv2d: the convolutions of the portable MSP networks, beside PyTorch's in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..functional import integer_conv2d, integer_conv2d_pack
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

_SEED = 23
_MOST = 3  # of values and weights: sums are small enough for fp32 to have them exactly, and for int16
# name, channels, outputs, side, height, width: profile base, latents of 192 channels
_LAYERS = (
    ("trunk and heads, 512 x 768 pixels", 128, 128, 3, 16, 24),
    ("the same, a grid coarser", 128, 128, 3, 8, 12),
    ("entry, 512 x 768 pixels", 192, 128, 3, 16, 24),
    ("parameters, 512 x 768 pixels", 128, 192, 1, 16, 24),
    ("trunk and heads, 2160 x 3840 pixels", 128, 128, 3, 68, 120),
)
_QUICK = (("a small layer", 16, 16, 3, 4, 6),)


def groups(settings: Settings) -> Iterator[Group]:
    """One group a layer; int16 whatever the dtype."""
    device = settings.device
    for name, channels, outputs, side, height, width in _QUICK if settings.quick else _LAYERS:
        generator = torch.Generator().manual_seed(_SEED)
        sizes = (1, channels, height, width), (outputs, channels, side, side)
        x, weight = (torch.randint(-_MOST, _MOST + 1, size, generator=generator).to(device) for size in sizes)
        integers = x.to(torch.int16).contiguous(memory_format=torch.channels_last), weight.to(torch.int16)
        packed = integer_conv2d_pack(integers[1])
        zero = torch.zeros(outputs, dtype=torch.int32, device=device)
        floats = x.float(), weight.float(), zero.float()

        def ours(x=integers[0], weight=integers[1], zero=zero, packed=packed):
            return integer_conv2d(x, weight, zero, zero, limit=32767, packed=packed)

        def theirs(x=floats[0], weight=floats[1], bias=floats[2], pad=side // 2):
            return F.conv2d(x, weight, bias, padding=pad)

        moved = 2 * (x.numel() + weight.numel() + outputs * height * width) + 8 * outputs
        flops = 2 * height * width * weight.numel()
        usable, left_out = backends("integer_conv2d", device, torch.int16)
        cases = [Case(OURS + b, forced(b, ours), lambda out: [out.float()], moved, flops) for b in usable]
        cases.append(Case("F.conv2d in fp32", theirs, lambda out: [out], 2 * moved, flops))
        exact = F.conv2d(x.double(), weight.double(), padding=side // 2)
        yield Group(
            op="integer_conv2d",
            case=name,
            inputs=f"{outputs} x {channels} x {side} x {side} on {height} x {width}",
            dtype="int16",
            device=device,
            cases=cases,
            expected=Expected.of([exact], [exact.float()], [magnitude(exact)]),
            left_out=left_out,
        )
