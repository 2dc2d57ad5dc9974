"""CDC's two networks: the content latent with its hyperprior and its maps, and the U-Net that they condition.

Source: Yang and Mandt, "Lossy Image Compression with Conditional Diffusion Models" (NeurIPS 2023, arXiv 2209.06950);
sizes that the paper does not give are those of the authors' published models (docs/CDC.md).
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from torch import Tensor, nn

from ._cdc_layers import LARGE, ChannelNorm, LinearAttention, ResidualBlock, leaky

_HYPER_STRIDE = 4  # two strided convolutions
_LATENT_GAIN, _FIRST_SCALE = 8.0, 2.0  # of a new codec


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model, in multiples of its width where they are channels.

    width: channels of a multiple of 1. latent: of the analysis, whose last is the latent's. synthesis: of the maps'
    network, from the latent on; its last one is map_channels, not a multiple. hyper: of the hyperprior's three
    convolutions. levels: of the U-Net, each at half the resolution of the one before.
    """

    width: int = 64
    latent: tuple[int, ...] = (1, 2, 3, 4)
    synthesis: tuple[int, ...] = (4, 3, 2, 1)
    hyper: tuple[int, int, int] = (4, 4, 4)
    levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    map_channels: int = 64

    def channels(self, name: str) -> list[int]:
        return [self.width * multiple for multiple in getattr(self, name)]

    @property
    def downsampling(self) -> int:
        """Pixels a side that one place of the latent stands for."""
        return 1 << len(self.latent)

    @property
    def multiple(self) -> int:
        """What both sides of an image must be multiples of."""
        return max(self.downsampling * _HYPER_STRIDE, 1 << (len(self.levels) - 1))


class _Analysis(nn.ModuleList):
    """Residual blocks, each followed by a convolution that halves the sides; it sees neighbours only."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self:
            x = stage["down"](stage["block"](x))
        return x


class ContentCodec(nn.Module):
    """The transforms around the entropy models: image to latent, latent to hyperlatent and back, latent to maps."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        down, up = [3, *sizes.channels("latent")], [*sizes.channels("synthesis"), sizes.map_channels]
        if down[-1] != up[0] or len(down) != len(up):
            raise ValueError(
                f"CDC: latent and synthesis must meet and be as many, got {sizes.latent} and {sizes.synthesis}"
            )
        self.analysis = _Analysis(
            nn.ModuleDict({"block": ResidualBlock(a, b, large=i == 0), "down": nn.Conv2d(b, b, 3, 2, 1)})
            for i, (a, b) in enumerate(pairwise(down))
        )
        inner = [*up[1:-1], up[-2]]  # the last block keeps its channels; the convolution after it gives the map's
        self.synthesis = nn.ModuleList(
            nn.ModuleDict({"block": ResidualBlock(a, m), "up": nn.ConvTranspose2d(m, b, 4, 2, 1)})
            for (a, b), m in zip(pairwise(up), inner, strict=True)
        )
        y, (first, second, z) = down[-1], sizes.channels("hyper")
        self.hyper_analysis = nn.ModuleList(
            [nn.Conv2d(y, first, 3, 1, 1), nn.Conv2d(first, second, 5, 2, 2), nn.Conv2d(second, z, 5, 2, 2)]
        )
        self.hyper_synthesis = nn.ModuleList(
            [
                nn.ConvTranspose2d(z, second, 5, 2, 2, 1),
                nn.ConvTranspose2d(second, first, 5, 2, 2, 1),
                nn.Conv2d(first, 2 * y, 3, 1, 1),
            ]
        )
        self.latent_channels, self.hyper_channels = y, z
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """A new codec's latent spreads over several symbols, and its density is as wide.

        Otherwise it is rounded to zeros, the U-Net learns to do without maps that never change, and the rate then
        keeps the latent at zero.
        """
        self.analysis[-1]["down"].weight.mul_(_LATENT_GAIN)
        self.hyper_synthesis[-1].bias[self.latent_channels :] += _FIRST_SCALE

    def analyse(self, x: Tensor) -> Tensor:
        """The latent [B, M, H / 16, W / 16] of x [B, 3, H, W] in [-1, 1]."""
        return self.analysis(x)

    def hyper_analyse(self, y: Tensor) -> Tensor:
        """The hyperlatent [B, Z, h / 4, w / 4] of y [B, M, h, w]."""
        return _chain(self.hyper_analysis, y)

    def parameters_of(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """(means, scales) of the latent, [B, M, h, w] each; the scales are not bounded yet."""
        means, scales = _chain(self.hyper_synthesis, z_hat).chunk(2, 1)
        return means.contiguous(), scales.contiguous()

    def maps(self, y_hat: Tensor) -> list[Tensor]:
        """What conditions the U-Net: a map for each level, the finest first."""
        found, h = [], y_hat
        for stage in self.synthesis:
            h = stage["up"](stage["block"](h))
            found.append(h)
        return found[::-1]


def _chain(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(leaky(x) if i else x)
    return x


class Denoiser(nn.Module):
    """The conditional U-Net: f(x_t, t, maps), all of one image size; f is x_0 or the noise, as it was trained."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, levels = sizes.width, sizes.channels("levels")
        maps = [sizes.map_channels, *reversed(sizes.channels("synthesis")[1:])]
        if len(maps) >= len(levels):
            raise ValueError(f"CDC: the U-Net needs more levels than there are maps, got {len(levels)} and {len(maps)}")
        self.embed1, self.embed2 = nn.Linear(1, 4 * width), nn.Linear(4 * width, width)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise([3, *levels])):
            conditioned = a + (maps[i] if i < len(maps) else 0)
            self.down.append(self._level(conditioned, b, width, large=i == 0))
            if i < len(levels) - 1:
                self.down[-1]["resample"] = nn.Conv2d(b, b, 3, 2, 1)
        deepest = levels[-1]
        self.middle1 = ResidualBlock(deepest, deepest, width)
        self.middle_attention = LinearAttention(deepest)
        self.middle2 = ResidualBlock(deepest, deepest, width)
        self.up = nn.ModuleList()
        for a, b in pairwise(reversed(levels)):
            self.up.append(self._level(2 * a, b, width))
            self.up[-1]["resample"] = nn.ConvTranspose2d(b, b, 4, 2, 1)
        self.norm = ChannelNorm(levels[0])
        self.out = nn.Conv2d(levels[0], 3, LARGE, padding=LARGE // 2)
        self.to(memory_format=torch.channels_last)  # as convolutions want them, which copy them otherwise each time

    @staticmethod
    def _level(channels: int, out: int, time: int, large: bool = False) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "block1": ResidualBlock(channels, out, time, large),
                "block2": ResidualBlock(out, out, time),
                "attention": LinearAttention(out),
            }
        )

    def condition(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What the maps give to each level, to be made once for all steps of a sampler."""
        return [level["block1"].part(each) for level, each in zip(self.down, maps, strict=False)]

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        maps: list[Tensor] | None = None,
        *,
        parts: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """f [B, 3, H, W] of x [B, 3, H, W] at time [B, 1] in [0, 1), given maps, or parts = condition(maps)."""
        t = self.embed2(nn.functional.gelu(self.embed1(time)))
        kept = []
        given = maps if parts is None else parts
        for i, level in enumerate(self.down):
            block = level["block1"]
            if i >= len(given):
                x = block(x, t)
            elif parts is None:
                x = block(torch.cat([x, given[i]], 1), t)
            else:
                x = block.forward_with(x, given[i], t)
            x = level["attention"](level["block2"](x, t))
            kept.append(x)
            if "resample" in level:
                x = level["resample"](x)
        x = self.middle2(self.middle_attention(self.middle1(x, t)), t)
        for level in self.up:
            x = level["block1"](torch.cat([x, kept.pop()], 1), t)
            x = level["resample"](level["attention"](level["block2"](x, t)))
        return self.out(self.norm(x))
