"""CDC's sampler as a textbook writes it, in PyTorch's own operations, on a lic_fast codec's weights: to compare."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def _block(layer: nn.Module, x: Tensor, time: Tensor | None) -> Tensor:
    h = F.relu(_norm(layer.norm1, layer.conv1(x)))
    if layer.time is not None:
        h = h + layer.time(F.leaky_relu(time, 0.2))[:, :, None, None]
    h = F.relu(_norm(layer.norm2, layer.conv2(h)))
    return h + (x if layer.skip is None else layer.skip(x))


def _attention(layer: nn.Module, x: Tensor) -> Tensor:
    c = x.shape[1]
    q, k, v = layer.qkv(_norm(layer.norm, x)).flatten(2).chunk(3, 1)
    context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
    found = torch.einsum("bde,bdn->ben", context, q * c**-0.5)
    return layer.out(found.unflatten(2, x.shape[2:])) + x


class TextbookUNet(nn.Module):
    """The U-Net of `denoiser` (a codec's), fed all maps at every step."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.layers = denoiser

    def forward(self, x: Tensor, time: Tensor, maps: list[Tensor]) -> Tensor:
        layers = self.layers
        t = layers.embed2(F.gelu(layers.embed1(time)))
        kept = []
        for i, level in enumerate(layers.down):
            x = torch.cat([x, maps[i]], 1) if i < len(maps) else x
            x = _attention(level["attention"], _block(level["block2"], _block(level["block1"], x, t), t))
            kept.append(x)
            x = level["resample"](x) if "resample" in level else x
        x = _block(layers.middle1, x, t)
        x = _block(layers.middle2, _attention(layers.middle_attention, x), t)
        for level in layers.up:
            x = _block(level["block1"], torch.cat([x, kept.pop()], 1), t)
            x = level["resample"](_attention(level["attention"], _block(level["block2"], x, t)))
        return layers.out(_norm(layers.norm, x))


@torch.no_grad()
def textbook_sample(codec: nn.Module, unet: nn.Module, y_hat: Tensor, start: Tensor, steps: int) -> Tensor:
    """codec.sample(y_hat, steps=steps, eta=0) from the noise `start`: x_0, the noise in x, and the next x, in turn."""
    maps, total = codec.content.maps(y_hat), len(codec.abar)
    abar = codec.abar.float().to(start)  # a table of fp32 in the published models
    places = torch.linspace(0, total - 1, steps).long() if steps > 1 else torch.tensor([total - 1])
    x = start
    for i in reversed(range(steps)):
        now = abar[places[i]]
        after = abar[places[i - 1]] if i else torch.ones_like(now)
        time = places[i] / total if codec.predicts == "x" else torch.tensor(i / steps)
        f = unet(x, time.to(x).expand(len(x), 1), maps)
        if codec.predicts == "x":
            x0 = f.clamp(-1, 1)
            noise = (x - now.sqrt() * x0) / (1 - now).sqrt()
        else:
            x0, noise = (x - (1 - now).sqrt() * f) / now.sqrt(), f
        x = after.sqrt() * x0 + (1 - after).sqrt() * noise
    return x
