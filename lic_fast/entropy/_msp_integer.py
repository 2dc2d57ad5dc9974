"""The portable parameter networks of MSPEntropyModel: GridNetwork in integers (docs/MSP.md, "Portable").

Values are fixed point: a tensor holds round(value * 2**fraction) as int16, saturated at +-LIMIT; weights have a
fraction an output, as fine as 32-bit sums allow. A network has one fraction for the latent, one for its state, one for
the tensor between two convolutions. Only the edges are floats, where every operation is exact: the latent times a power
of two, and parameters that are integers below 2**24 times a power of two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import integer_conv2d, integer_conv2d_pack
from ._msp_network import GridNetwork, with_magnitudes
from ._schedule import Schedule

LIMIT = 16383
_HEADROOM = 2  # an activation may be so many times what the calibration saw before it saturates
_SCALE_FRACTION, _MEAN_FRACTION = 12, 8  # bits of scales, of means; a head whose values are large has fewer
_EXACT = 7  # an int32 shifted by so many bits is exact in fp32
_MOST_FRACTION, _FINEST = 14, 24  # of activations, of weights
_LEAST_LATENT = 4.0  # what a latent reaches at least, whatever the calibration saw


class IntegerConv(nn.Module):
    """Weights of one convolution; called with int16 [B, C, h, w], gives int16, or int32 where `head`."""

    weight: Tensor
    bias: Tensor
    shift: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, *, leaky: bool, head: bool = False) -> None:
        super().__init__()
        self.leaky, self.limit = leaky, None if head else LIMIT
        self.register_buffer("weight", torch.zeros(outputs, inputs, side, side, dtype=torch.int16))
        self.register_buffer("bias", torch.zeros(outputs, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(outputs, dtype=torch.int32))
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._packed is None:
            self._packed = integer_conv2d_pack(self.weight)
        return integer_conv2d(
            x, self.weight, self.bias, self.shift, residual=residual, leaky=self.leaky, limit=self.limit,
            packed=self._packed,
        )  # fmt: skip

    def quantise(self, conv: nn.Conv2d, fraction_in: int, fraction_out: int | Tensor) -> Tensor:
        """Takes the weights of conv, from and to values of so many fraction bits; returns those of each output.

        As many as asked for; where the sums cannot have them, a head gives fewer. Raises ValueError for another.
        """
        weight = conv.weight.detach().cpu().double()
        bias = torch.zeros(len(weight)).double() if conv.bias is None else conv.bias.detach().cpu().double()
        finest = _finest(weight, bias, fraction_in)
        spare = _EXACT if self.limit is None else 0
        asked = torch.as_tensor(fraction_out).expand(len(weight))
        given = torch.minimum(asked, finest + fraction_in - spare)
        if self.limit is not None and bool((given < asked).any()):
            raise ValueError(
                "MSPEntropyModel.make_portable: weights too large for the values that the latents gave; calibrate with "
                "latents of photographs"
            )
        fraction = torch.minimum(finest, given - fraction_in + 30)
        shift = fraction + fraction_in - given
        half = torch.where(shift > 0, 2.0 ** (shift - 1), 0)
        self.weight.copy_((weight * 2.0 ** fraction.view(-1, 1, 1, 1)).round())
        self.bias.copy_((bias * 2.0 ** (fraction + fraction_in)).round() + half)
        self.shift.copy_(shift)
        self._packed = None
        return given

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._packed = None
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args)


def _finest(weight: Tensor, bias: Tensor, fraction_in: int) -> Tensor:
    """For each output, the most fraction bits of its weights with which no sum leaves 32 bits, nor a weight 16."""
    found = torch.full((len(weight),), _FINEST)
    while True:
        scaled = (weight * 2.0 ** found.view(-1, 1, 1, 1)).round().abs().flatten(1)
        constant = (bias * 2.0 ** (found + fraction_in)).abs()
        over = (scaled.amax(1) > 32767) | (scaled.sum(1) * LIMIT + constant + 2.0**29 >= 2.0**31)
        if not over.any():
            return found
        found = torch.where(over, found - 1, found)
        if int(found.min()) < -_FINEST:
            raise ValueError("MSPEntropyModel.make_portable: weights too large for fixed point; train longer")


class _Head(nn.Module):
    units: Tensor

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.near = IntegerConv(width, width, 3, leaky=True)
        self.mix = IntegerConv(width, width, 1, leaky=True)
        self.parameters_of = IntegerConv(width, 2 * channels, 1, leaky=True, head=True)
        self.register_buffer("units", torch.zeros(2 * channels, 1, 1))

    def forward(self, state: Tensor) -> Tensor:
        return self.parameters_of(self.mix(self.near(state))).float() * self.units


class IntegerGridNetwork(nn.Module):
    """GridNetwork's part in a traversal: the same methods, the latent and the parameters in fp32, the state int16."""

    unit: Tensor

    def __init__(self, schedule: Schedule, scale: int, width: int, depth: int) -> None:
        super().__init__()
        twin = functools.partial(IntegerConv, leaky=False)
        steps = schedule.at(scale)
        self.register_buffer("unit", torch.ones(()))
        self.enter = twin(2 * schedule.channels, width, 3)
        self.lift = IntegerConv(width, 4 * width, 1, leaky=True) if scale < schedule.scales - 1 else None
        self.trunk = nn.ModuleList(IntegerConv(width, width, 3, leaky=True) for _ in range(2 * depth))
        embedded = steps if scale > 0 else steps[:-1]
        self.embed = nn.ModuleList(twin(2 * (s.last - s.first), width, 3) for s in embedded)
        self.heads = nn.ModuleList(_Head(width, s.last - s.first) for s in steps)

    def open(self, coarse: Tensor, below: Tensor | None) -> Tensor:
        """As GridNetwork.open: coarse fp32, below and the result int16."""
        x, lifted = self._integers(coarse), None
        if self.lift is not None:
            lifted = F.pixel_shuffle(self.lift(below), 2)[:, :, : x.shape[2], : x.shape[3]]
        state = self.enter(x, lifted)
        for first, second in zip(self.trunk[::2], self.trunk[1::2], strict=True):
            state = second(first(state), state)
        return state

    def add(self, state: Tensor, number: int, part: Tensor) -> Tensor:
        """As GridNetwork.add: part fp32."""
        if number >= len(self.embed):
            return state
        beyond = (0, state.shape[3] - part.shape[3], 0, state.shape[2] - part.shape[2])
        return self.embed[number](self._integers(F.pad(part, beyond) if any(beyond) else part), state)

    def _integers(self, y: Tensor) -> Tensor:
        return with_magnitudes((y * self.unit).round_().clamp_(-LIMIT, LIMIT).to(torch.int16))

    def quantise(self, network: GridNetwork, most: dict[str, float], below: int) -> int:
        """Takes the weights of a float network whose values reach `most`; below: the fraction of the state of the
        grid below. Returns that of the state."""
        latent, state = (_fraction(most[name]) for name in ("latent", "state"))
        self.unit.fill_(2.0**latent)
        self.enter.quantise(network.enter, latent, state)
        if self.lift is not None:
            self.lift.quantise(network.lift, below, state)
        for i, block in enumerate(network.trunk):
            between = _fraction(most.get(f"trunk.{i}.first", 0.0))
            self.trunk[2 * i].quantise(block.first, state, between)
            self.trunk[2 * i + 1].quantise(block.second, between, state)
        for mine, conv in zip(self.embed, network.embed, strict=True):
            mine.quantise(conv, latent, state)
        for i, (mine, head) in enumerate(zip(self.heads, network.heads, strict=True)):
            near, mix = (_fraction(most.get(f"heads.{i}.{name}", 0.0)) for name in ("near", "mix"))
            mine.near.quantise(head.near, state, near)
            mine.mix.quantise(head.mix, near, mix)
            wanted = torch.tensor([_SCALE_FRACTION, _MEAN_FRACTION]).repeat_interleave(len(mine.units) // 2)
            given = mine.parameters_of.quantise(head.parameters_of, mix, wanted)
            mine.units.copy_((2.0**-given).view(-1, 1, 1))
        return state


def integer_networks(schedule: Schedule, width: int, depth: int) -> nn.ModuleList:
    """One for each grid, as MSPEntropyModel has them, without weights."""
    scales = reversed(range(schedule.scales))
    return nn.ModuleList(IntegerGridNetwork(schedule, scale, width, depth) for scale in scales)


def quantise_networks(integers: nn.ModuleList, found: list[_Watched]) -> None:
    """Gives integer networks the weights of the float ones that were watched. Raises ValueError."""
    below = 0
    for integer, stand_in in zip(integers, found, strict=True):
        if "state" not in stand_in.most:
            raise ValueError("MSPEntropyModel.make_portable: no latents, got none to calibrate with; pass some")
        if not all(parameter.isfinite().all() for parameter in stand_in.network.parameters()):
            raise ValueError("MSPEntropyModel.make_portable: the weights are not finite; use an earlier checkpoint")
        below = integer.quantise(stand_in.network, stand_in.most, below)


def _fraction(most: float) -> int:
    """Fraction bits with which values up to _HEADROOM * most do not saturate."""
    return min(_MOST_FRACTION, math.floor(math.log2(LIMIT / max(_HEADROOM * most, 2.0**-12))))


class _Watched:
    """A GridNetwork in a traversal, and in `most` the largest magnitudes of its values."""

    def __init__(self, network: GridNetwork) -> None:
        self.network, self.heads, self.most = network, network.heads, {"latent": _LEAST_LATENT}

    def see(self, name: str, *values: Tensor) -> None:
        for value in values:
            self.most[name] = max(self.most.get(name, 0.0), float(value.detach().abs().amax()))

    def open(self, coarse: Tensor, below: Tensor | None) -> Tensor:
        self.see("latent", coarse)
        state = self.network.open(coarse, below)
        self.see("state", state)
        return state

    def add(self, state: Tensor, number: int, part: Tensor) -> Tensor:
        self.see("latent", part)
        state = self.network.add(state, number, part)
        self.see("state", state)
        return state


@contextmanager
def watched(grids: nn.ModuleList) -> Iterator[list[_Watched]]:
    """The grids' stand-ins for a traversal; what their values reach is in their `most`."""
    found, handles = [_Watched(grid) for grid in grids], []

    def hook(stand_in: _Watched, name: str, *, inputs: bool) -> Callable[..., None]:
        return lambda module, args, output: stand_in.see(name, output, *(args if inputs else ()))

    try:
        for stand_in in found:
            for name, module in stand_in.network.named_modules():
                last = name.rpartition(".")[2]
                if last in ("first", "near", "mix"):
                    handles.append(module.register_forward_hook(hook(stand_in, name, inputs=False)))
                elif name.startswith("trunk.") and last.isdigit():
                    handles.append(module.register_forward_hook(hook(stand_in, "state", inputs=True)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
