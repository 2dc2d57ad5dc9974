"""The parameter network of MSPEntropyModel: one for all its grids, each of which it sees as 2x2 blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._schedule import PHASES, Schedule, Step

_SLOPE = 0.01
_REACH = 2  # elements of the grid, to each side
# What an untrained head says: gradients pass at once, which at the bound of 0.11 they do one way only. Its last layer's
# weights begin small: random parameters would first have to be unlearned.
_FIRST_SCALE, _FIRST_WEIGHTS = 1.0, 0.1


@dataclasses.dataclass(frozen=True)
class Profile:
    """The sizes of a model: grids, channel groups, width of the network, hidden layers of a head."""

    scales: int
    groups: int
    width: int
    depth: int


PROFILES = {
    "fast": Profile(scales=3, groups=1, width=128, depth=1),
    "base": Profile(scales=3, groups=2, width=192, depth=2),
    "max": Profile(scales=3, groups=4, width=256, depth=3),
}


def with_magnitudes(values: Tensor) -> Tensor:
    """[B, 2 C, h, w] of values [B, C, h, w]: scales depend on how large the neighbours are, whatever their signs."""
    return torch.cat([values, values.abs()], 1)


class _Head(nn.Module):
    """From the state of a place to the parameters of a group's channels there, scales first."""

    def __init__(self, width: int, depth: int, channels: int, mixture: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.parameters_of = nn.Conv2d(width, (2 if mixture == 1 else 3) * mixture * channels, 1)
        with torch.no_grad():
            self.parameters_of.weight *= _FIRST_WEIGHTS
            self.parameters_of.bias[: mixture * channels] += _FIRST_SCALE

    def forward(self, state: Tensor) -> Tensor:
        x = F.leaky_relu(state, _SLOPE)
        for layer in self.hidden:
            x = F.leaky_relu(layer(x), _SLOPE)
        return self.parameters_of(x)


class ContextNetwork(nn.Module):
    """Parameters of the steps of any grid, from the elements of that grid that are known.

    What a place's parameters are made of, its state, is one 5x5 convolution over the known elements of its grid and
    their magnitudes, with one kernel for every place, phase and grid, and a bias for each phase of each grid. It is
    computed at the resolution of 2x2 blocks, where the elements of a phase are a plane: a part, once known, adds its
    products to the states of the phases that wait, [B, width a phase, h, w], and nothing is spent on places that are
    masked. Causality is a matter of the order of calls. A head a group, alike for all phases and grids, makes the
    parameters of the state.
    """

    def __init__(self, schedule: Schedule, profile: Profile, mixture: int) -> None:
        super().__init__()
        self.width, self.groups = profile.width, schedule.groups
        side = 2 * _REACH + 1
        like = nn.Conv2d(2 * schedule.channels, profile.width, side)
        self.kernel = nn.Parameter(like.weight.detach().view(profile.width, 2, schedule.channels, side, side))
        self.biases = nn.Parameter(torch.zeros(schedule.scales, len(PHASES) * profile.width))
        bounds = map(schedule.bounds, range(schedule.groups))
        self.heads = nn.ModuleList(_Head(profile.width, profile.depth, b - a, mixture) for a, b in bounds)

    def weight(self, phase: tuple[int, int], first: int, last: int, waiting: int) -> Tensor:
        """[width for each of PHASES from `waiting` on, 2 (last - first), 3, 3]: of what channels of `phase` add."""
        kernel = self.kernel[:, :, first:last].flatten(1, 2)
        return torch.cat([_between(_between(kernel, phase, to, 0), phase, to, 1) for to in PHASES[waiting:]])

    def prepared(self) -> Prepared:
        """The network for one traversal."""
        return Prepared(self)


class Prepared:
    """ContextNetwork in a traversal: its convolutions at the resolution of blocks are made once for all grids."""

    def __init__(self, network: ContextNetwork) -> None:
        self.network, self._made = network, {}

    def _of(self, phase: tuple[int, int], first: int, last: int, waiting: int) -> Tensor:
        key = (phase, first)
        if key not in self._made:
            self._made[key] = self.network.weight(phase, first, last, waiting)
        return self._made[key]

    def open(self, scale: int, coarse: Tensor) -> Tensor:
        """The states before the first step of grid `scale`: coarse [B, C, h, w], the grid below it."""
        weight = self._of((0, 0), 0, coarse.shape[1], 0)
        return F.conv2d(with_magnitudes(coarse), weight, self.network.biases[scale], padding=1)

    def parameters(self, state: Tensor, step: Step) -> Tensor:
        """Of the elements of the step, scales first."""
        return self.network.heads[step.group](state[:, : self.network.width])

    def add(self, state: Tensor, step: Step, part: Tensor | None) -> Tensor:
        """The states that still wait once the step's values are known; part: these, or None where there are none."""
        state, first = dropped(state, step, self.network), waiting(step, self.network)
        if part is None or first == len(PHASES):
            return state
        weight = self._of(step.phase, step.first, step.last, first)
        return state + F.conv2d(with_magnitudes(padded(part, state)), weight, padding=1)


def waiting(step: Step, network: Any) -> int:
    """The first of PHASES whose states wait for the elements of a step; network: this one, or its twin in integers."""
    return PHASES.index(step.phase) + (step.group == network.groups - 1)


def dropped(state: Tensor, step: Step, network: Any) -> Tensor:
    """state without what nobody waits for behind the step: its phase, where it has the last group."""
    return state[:, network.width :] if step.group == network.groups - 1 else state


def padded(part: Tensor, state: Tensor) -> Tensor:
    """part with zeros where blocks at the lower and right border have none of its elements."""
    beyond = (0, state.shape[3] - part.shape[3], 0, state.shape[2] - part.shape[2])
    return F.pad(part, beyond) if any(beyond) else part


def _between(kernel: Tensor, source: tuple[int, int], to: tuple[int, int], axis: int) -> Tensor:
    """Along one axis of places, the taps of a 5-tap kernel that lead from a phase to another: three, by blocks."""
    ahead = source[axis] - to[axis]
    if ahead == 0:
        taps = slice(0, None, 2)  # distances -2, 0, 2
        return kernel[..., taps, :] if axis == 0 else kernel[..., taps]
    taps = slice(1, None, 2)  # distances -1 and 1; the block on the other side is out of reach
    beyond = (int(ahead < 0), int(ahead > 0))
    return F.pad(kernel[..., taps, :], (0, 0, *beyond)) if axis == 0 else F.pad(kernel[..., taps], beyond)
