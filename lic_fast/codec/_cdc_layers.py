"""The layers of CDC's networks: normalization over channels, residual blocks with a time bias, linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import channel_norm, linear_attention_context

_EPS = 1e-5
_SLOPE = 0.2
LARGE = 7
"""Side of the first convolution of a network that sees pixels."""


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


def _plus(y: Tensor, x: Tensor) -> Tensor:
    """y + x; in y's memory, which is new and nobody else's, where the sum has its dtype."""
    return y.add_(x) if y.dtype == x.dtype else y + x


class ChannelNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias, mean and variance over the channels of one place.

    x [B, C, H, W]; weight, bias [C].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, shift: Tensor | None = None, relu: bool = False) -> Tensor:
        """shift [B, C] is added after the ReLU, if there is one."""
        return channel_norm(x, self.weight, self.bias, shift=shift, relu=relu, eps=_EPS)


class ResidualBlock(nn.Module):
    """x + norm(conv(norm(conv(x)) + time)), a ReLU after each norm; x through a 1x1 convolution where sizes differ.

    time_channels: size of a time embedding, of which a linear layer makes the bias that stands between the two
    halves; 0 without. large: the first convolution is 7x7, not 3x3.
    """

    def __init__(self, channels: int, out: int, time_channels: int = 0, large: bool = False) -> None:
        super().__init__()
        side = LARGE if large else 3
        self.conv1 = nn.Conv2d(channels, out, side, padding=side // 2)
        self.norm1 = ChannelNorm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.norm2 = ChannelNorm(out)
        self.time = nn.Linear(time_channels, out) if time_channels else None
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B, out, H, W] of x [B, channels, H, W] and time [B, time_channels]."""
        return self._rest(self.conv1(x), x if self.skip is None else self.skip(x), time)

    def _rest(self, h: Tensor, skipped: Tensor, time: Tensor | None) -> Tensor:
        shift = None if self.time is None else self.time(leaky(time)).to(h.dtype)
        h = self.norm1(h, shift, relu=True)
        return _plus(self.norm2(self.conv2(h), relu=True), skipped)

    def part(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """What the channels that stand last, condition [B, c, H, W], add to the first convolution and to the skip.

        Convolutions are linear: with these, forward_with() need not see the condition again.
        """
        c = condition.shape[1]
        first = F.conv2d(condition, self.conv1.weight[:, -c:], self.conv1.bias, padding=self.conv1.padding)
        if self.skip is None:  # the block keeps its input: the condition is its last channels
            return first, F.pad(condition, (0, 0, 0, 0, self.conv1.in_channels - c, 0))
        return first, F.conv2d(condition, self.skip.weight[:, -c:], self.skip.bias)

    def forward_with(self, x: Tensor, part: tuple[Tensor, Tensor], time: Tensor | None = None) -> Tensor:
        """forward(torch.cat([x, condition], 1), time), where part(condition) is known."""
        c = x.shape[1]
        h = F.conv2d(x, self.conv1.weight[:, :c], padding=self.conv1.padding).add_(part[0])
        if self.skip is None:
            skipped = F.pad(x, (0, 0, 0, 0, 0, part[1].shape[1] - c)).add_(part[1])
        else:
            skipped = F.conv2d(x, self.skip.weight[:, :c]).add_(part[1])
        return self._rest(h, skipped, time)


class LinearAttention(nn.Module):
    """x + out(softmax-over-places attention of norm(x)), with one head and a cost linear in the number of places.

    With k softmaxed over the places, attention is q -> (sum over places of v k^T) q: a matrix [C, C] for each sample.
    So are the maps to q before it and out of it after it; their product is one matrix, that x is multiplied by once.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        c, normed = x.shape[1], self.norm(x)
        keys, values = F.conv2d(normed, self.qkv.weight[c:]).split(c, 1)
        q = self.qkv.weight[:c].flatten(1) * c**-0.5
        mixed = self.out.weight.flatten(1) @ linear_attention_context(keys, values) @ q
        if len(x) == 1:
            return _plus(F.conv2d(normed, mixed[0, :, :, None, None], self.out.bias), x)
        if normed.is_contiguous():
            y = torch.matmul(mixed, normed.flatten(2)).add_(self.out.bias[:, None]).unflatten(2, x.shape[2:])
        else:  # channels-last: places are rows, and the result is so too
            places = normed.permute(0, 2, 3, 1).flatten(1, 2)
            y = torch.matmul(places, mixed.transpose(1, 2)).add_(self.out.bias)
            y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return _plus(y, x)
