"""Small MSP models and latents for the tests of their decoding, on every device."""

from __future__ import annotations

import torch

from lic_fast.codec import MSPCodec
from lic_fast.entropy import MSPEntropyModel, Profile

SMALL = Profile(scales=2, groups=2, width=8, depth=1)
SHAPES = [(1, 1), (1, 2), (3, 3), (7, 5), (9, 16)]
KINDS = [{}, {"portable": True}, {"mixture": 3}]


def small(mixture: int = 1, portable: bool = False, seed: int = 0) -> MSPEntropyModel:
    torch.manual_seed(seed)
    model = MSPEntropyModel(5, SMALL, mixture=mixture).eval()
    with torch.no_grad():
        for head in model.network.heads:
            head.parameters_of.weight.mul_(6)
        model.bottleneck.quantiles[:, 0, 1] += torch.randn(5)
    model.update()
    if portable:
        model.make_portable(4 * torch.randn(2, 5, 16, 16))
    return model


def images(count: int, *sides: int) -> list[torch.Tensor]:
    return [4 * torch.randn(1, 5, *sides, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def kinds(codec: MSPCodec) -> list:
    return list(codec.entropy_model._graphs._kinds.values())
