"""The parameter networks of MSPEntropyModel: one for each grid, which works on its 2x2 blocks."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._schedule import Schedule

_SLOPE = 0.01
# What an untrained head says: gradients pass at once, which at the bound of 0.11 they do one way only. Its last layer's
# weights begin small: random parameters would first have to be unlearned.
_FIRST_SCALE, _FIRST_WEIGHTS = 1.0, 0.1


@dataclasses.dataclass(frozen=True)
class Profile:
    """The sizes of a model: grids, channel groups, width of the networks, residual blocks of a trunk."""

    scales: int
    groups: int
    width: int
    depth: int


PROFILES = {
    "fast": Profile(scales=3, groups=1, width=96, depth=1),
    "base": Profile(scales=3, groups=2, width=128, depth=2),
    "max": Profile(scales=3, groups=4, width=192, depth=3),
}


def with_magnitudes(values: Tensor) -> Tensor:
    """[B, 2 C, h, w] of values [B, C, h, w]: scales depend on how large the neighbours are, whatever their signs."""
    return torch.cat([values, values.abs()], 1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(F.leaky_relu(x, _SLOPE)), _SLOPE))


class _Head(nn.Module):
    """A step's own network from the state to its parameters, scales first."""

    def __init__(self, width: int, channels: int, mixture: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1)
        self.parameters_of = nn.Conv2d(width, (2 if mixture == 1 else 3) * mixture * channels, 1)
        with torch.no_grad():
            self.parameters_of.weight *= _FIRST_WEIGHTS
            self.parameters_of.bias[: mixture * channels] += _FIRST_SCALE

    def forward(self, state: Tensor) -> Tensor:
        x = F.leaky_relu(self.near(F.leaky_relu(state, _SLOPE)), _SLOPE)
        return self.parameters_of(F.leaky_relu(self.mix(x), _SLOPE))


class GridNetwork(nn.Module):
    """Parameters of the steps of one grid, at the resolution of its 2x2 blocks, which is that of the grid below.

    The four elements of a block are channels, so that no convolution is spent on masked places. `state` [B, width, h,
    w] is a sum: what open() makes of the coarser grid and its state, and a convolution of every part coded since. A
    part is added once it is known, and never before: causality is a matter of the order of calls, not of masks.
    """

    def __init__(self, schedule: Schedule, scale: int, width: int, depth: int, mixture: int) -> None:
        super().__init__()
        steps = schedule.at(scale)
        self.enter = nn.Conv2d(2 * schedule.channels, width, 3, padding=1)
        self.lift = nn.Conv2d(width, 4 * width, 1) if scale < schedule.scales - 1 else None
        self.trunk = nn.Sequential(*(_Residual(width) for _ in range(depth)))
        embedded = steps if scale > 0 else steps[:-1]  # nothing comes after the last step of the finest grid
        self.embed = nn.ModuleList(nn.Conv2d(2 * (s.last - s.first), width, 3, padding=1, bias=False) for s in embedded)
        self.heads = nn.ModuleList(_Head(width, s.last - s.first, mixture) for s in steps)

    def open(self, coarse: Tensor, below: Tensor | None) -> Tensor:
        """The state before the first step: coarse [B, C, h, w], the state of the grid below at its end, or None."""
        state = self.enter(with_magnitudes(coarse))
        if self.lift is not None:
            lifted = F.pixel_shuffle(self.lift(F.leaky_relu(below, _SLOPE)), 2)
            state = state + lifted[:, :, : state.shape[2], : state.shape[3]]
        return self.trunk(state)

    def add(self, state: Tensor, number: int, part: Tensor) -> Tensor:
        """The state once the values of the grid's step `number` are known; where it matters no more, as it was."""
        if number >= len(self.embed):
            return state
        beyond = (0, state.shape[3] - part.shape[3], 0, state.shape[2] - part.shape[2])
        return state + self.embed[number](with_magnitudes(F.pad(part, beyond) if any(beyond) else part))
