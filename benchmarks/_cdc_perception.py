"""Perceptual measures of a decoded picture: without weights, and LPIPS where it and its weights are at hand."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..training.data import to_tensor

_LEVELS, _SIDE, _PATCHES, _DIRECTIONS = 3, 7, 4096, 128
_BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def _image(pixels: Any) -> Tensor:
    return to_tensor(pixels)[None].float() / 255


def detail(pixels: Any, decoded: Any) -> float:
    """How much fine structure `decoded` has beside `pixels`, numpy [H, W, 3] uint8: 1 as much, less: blur, more: noise.

    The ratio of the root mean squares of the Laplacian of luma.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    power = [
        F.conv2d((_image(side) * _LUMA[:, None, None]).sum(1, keepdim=True), kernel).square().mean()
        for side in (decoded, pixels)
    ]
    return float((power[0] / power[1].clamp(min=1e-12)).sqrt())


def _pyramid(x: Tensor) -> list[Tensor]:
    """The Laplacian pyramid of x [1, 3, H, W]: differences of each level from the next, and last the coarsest."""
    kernel = torch.outer(_BINOMIAL, _BINOMIAL).expand(3, 1, 5, 5)
    found = []
    for _ in range(_LEVELS - 1):
        low = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=3)
        up = F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
        found.append(x - up)
        x = low
    return [*found, x]


def sliced_wasserstein(pixels: Any, decoded: Any) -> tuple[float, float, float]:
    """How far the textures of `decoded` are from those of `pixels`, numpy [H, W, 3] uint8; 0 for the same picture.

    Three numbers, of the finest details, of those twice as large, and of the rest: light, colour and large shapes.

    Patches of 7x7 of each level of a Laplacian pyramid, as many as 4096, in units of the original's deviation, are
    projected on 128 random directions; the distance of the two sorted lists, averaged, times 1000. No network has a
    part in it. The same patches and directions each time, so that codecs can be compared. Source: Karras et al.,
    "Progressive Growing of GANs" (ICLR 2018); there between sets of images, here between two.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for ours, theirs in zip(*(_pyramid(_image(side)) for side in (decoded, pixels)), strict=True):
        patches = [F.unfold(level, _SIDE)[0].T for level in (ours, theirs)]
        chosen = torch.randperm(len(patches[0]), generator=generator)[:_PATCHES]
        directions = F.normalize(torch.randn(patches[0].shape[1], _DIRECTIONS, generator=generator), dim=0)
        deviation = theirs.std().clamp(min=1e-6)
        lists = [(each[chosen] @ directions / deviation).sort(0).values for each in patches]
        distances.append(1000 * float((lists[0] - lists[1]).abs().mean()))
    fine, middle, coarse = distances
    return fine, middle, coarse


@functools.cache
def _network() -> Any:
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False).eval()
    except (ImportError, OSError) as error:  # URLError, of a download that fails, is an OSError
        return f"{type(error).__name__}: {error}"


def why_no_lpips() -> str | None:
    """Why LPIPS cannot be measured here, or None."""
    found = _network()
    return found if isinstance(found, str) else None


@torch.no_grad()
def lpips_of(pixels: Any, decoded: Any) -> float | None:
    """LPIPS (AlexNet) of numpy [H, W, 3] uint8, or None where the package or its weights are missing."""
    if why_no_lpips() is not None:
        return None
    return float(_network()(2 * _image(decoded) - 1, 2 * _image(pixels) - 1))
