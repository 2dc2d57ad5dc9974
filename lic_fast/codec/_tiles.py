"""Transforms of large images, a tile at a time: memory is that of a tile, the result that of the whole."""

from __future__ import annotations

from torch import Tensor, nn

TILE = 96
"""Side of a tile in latents: 1536 pixels of a codec that takes 16 pixels to a latent."""


def halo_of(transform: nn.Module, factor: int) -> int:
    """How many latents beyond a tile `transform` may look at, `factor` pixels to a latent; an upper bound.

    All convolutions count as if they followed one another. transform: of convolutions, strided or transposed, and
    layers that look at one place only.
    """
    convolutions = [m for m in transform.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    up = any(isinstance(m, nn.ConvTranspose2d) for m in convolutions)
    pixels, radius = (factor if up else 1), 0.0  # to a place of the layer's input
    for layer in convolutions:
        reach = max(k // 2 * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
        radius += reach * pixels
        stride = max(layer.stride)
        pixels = pixels / stride if isinstance(layer, nn.ConvTranspose2d) else pixels * stride
    return int(-(-radius // factor))


def analyse(transform: nn.Module, x: Tensor, factor: int, tile: int = TILE) -> Tensor:
    """transform(x) of x [B, C, factor * h, factor * w], as [B, M, h, w]."""
    h, w = (side // factor for side in x.shape[2:])
    return _by_tiles(transform, x, (h, w), tile, factor, 1)


def synthesise(transform: nn.Module, y: Tensor, factor: int, tile: int = TILE) -> Tensor:
    """transform(y) of y [B, M, h, w], as [B, C, factor * h, factor * w]."""
    return _by_tiles(transform, y, tuple(y.shape[2:]), tile, 1, factor)


def _by_tiles(transform: nn.Module, x: Tensor, sides: tuple[int, int], tile: int, before: int, after: int) -> Tensor:
    """before, after: places to a latent, of what transform takes and of what it gives."""
    if max(sides) <= tile:
        return transform(x)
    halo, whole = halo_of(transform, max(before, after)), None
    for top in range(0, sides[0], tile):
        for left in range(0, sides[1], tile):
            inner = [(at, min(at + tile, side)) for at, side in zip((top, left), sides, strict=True)]
            outer = [(max(0, a - halo), min(b + halo, side)) for (a, b), side in zip(inner, sides, strict=True)]
            rows, columns = (slice(a * before, b * before) for a, b in outer)
            part = transform(x[:, :, rows, columns])
            if whole is None:
                whole = part.new_empty(len(x), part.shape[1], *(side * after for side in sides))
            own = [slice((a - o) * after, (b - o) * after) for (a, b), (o, _) in zip(inner, outer, strict=True)]
            rows, columns = (slice(a * after, b * after) for a, b in inner)
            whole[:, :, rows, columns] = part[:, :, own[0], own[1]]
    return whole
