"""The portable parameter network of MSPEntropyModel: ContextNetwork in integers (docs/MSP.md, "Portable").

Values are fixed point: a tensor holds round(value * 2**fraction) as int16, saturated at +-LIMIT; weights have a
fraction an output, as fine as 32-bit sums allow. There is one fraction for the latent, one for the states, one for the
tensor between two convolutions. Only the edges are floats, where every operation is exact: the latent times a power
of two, and parameters that are integers below 2**24 times a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import integer_conv2d, integer_conv2d_pack
from ._msp_network import ContextNetwork, Prepared, Profile, dropped, padded, waiting, with_magnitudes
from ._schedule import PHASES, Schedule, Step

LIMIT = 16383
_HEADROOM = 2  # an activation may be so many times what the calibration saw before it saturates
_SCALE_FRACTION, _MEAN_FRACTION = 12, 8  # bits of scales, of means; a head whose values are large has fewer
_EXACT = 7  # an int32 shifted by so many bits is exact in fp32
_MOST_FRACTION, _FINEST = 14, 24  # of activations, of weights
_LEAST_LATENT = 4.0  # what a latent reaches at least, whatever the calibration saw


class IntegerConv(nn.Module):
    """Weights of one convolution; called with int16 [B, C, h, w], gives int16, or int32 where `head`.

    biases: how many there are to choose from when it is called, for one weight.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor

    def __init__(
        self, inputs: int, outputs: int, side: int, *, leaky: bool, head: bool = False, biases: int = 1
    ) -> None:
        super().__init__()
        self.leaky, self.limit = leaky, None if head else LIMIT
        self.register_buffer("weight", torch.zeros(outputs, inputs, side, side, dtype=torch.int16))
        self.register_buffer("bias", torch.zeros(biases, outputs, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(outputs, dtype=torch.int32))
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None, *, bias: int = 0) -> Tensor:
        if self._packed is None:
            self._packed = integer_conv2d_pack(self.weight)
        return integer_conv2d(
            x, self.weight, self.bias[bias], self.shift, residual=residual, leaky=self.leaky, limit=self.limit,
            packed=self._packed,
        )  # fmt: skip

    def quantise(self, weight: Tensor, bias: Tensor | None, fraction_in: int, fraction_out: int | Tensor) -> Tensor:
        """Takes a convolution's weights, from and to values of so many fraction bits; returns those of the outputs.

        weight [O, C, k, k]; bias [O], or [biases, O].

        As many as asked for; where the sums cannot have them, a head gives fewer. Raises ValueError for another.
        """
        weight = weight.detach().cpu().double()
        bias = torch.zeros(len(weight)).double() if bias is None else bias.detach().cpu().double()
        bias = torch.atleast_2d(bias)
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
        constant = bias.abs().amax(0) * 2.0 ** (found + fraction_in)
        over = (scaled.amax(1) > 32767) | (scaled.sum(1) * LIMIT + constant + 2.0**29 >= 2.0**31)
        if not over.any():
            return found
        found = torch.where(over, found - 1, found)
        if int(found.min()) < -_FINEST:
            raise ValueError("MSPEntropyModel.make_portable: weights too large for fixed point; train longer")


class _Head(nn.Module):
    units: Tensor

    def __init__(self, width: int, depth: int, channels: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(IntegerConv(width, width, 1, leaky=True) for _ in range(depth))
        self.parameters_of = IntegerConv(width, 2 * channels, 1, leaky=True, head=True)
        self.register_buffer("units", torch.zeros(2 * channels, 1, 1))

    def forward(self, state: Tensor) -> Tensor:
        for layer in self.hidden:
            state = layer(state)
        return self.parameters_of(state).float() * self.units


class IntegerContextNetwork(nn.Module):
    """ContextNetwork's part in a traversal: the same methods, the latent and the parameters in fp32, states int16."""

    unit: Tensor

    def __init__(self, schedule: Schedule, profile: Profile) -> None:
        super().__init__()
        self.width, self.groups = profile.width, schedule.groups
        self.register_buffer("unit", torch.ones(()))
        phases = len(PHASES)
        self.enter = IntegerConv(2 * schedule.channels, phases * self.width, 3, leaky=False, biases=schedule.scales)
        self.parts = nn.ModuleDict()  # by the phase and group of what they take in
        for step in schedule.at(0):
            outputs = (phases - waiting(step, self)) * self.width
            if outputs:
                self.parts[_name(step)] = IntegerConv(2 * (step.last - step.first), outputs, 3, leaky=False)
        bounds = map(schedule.bounds, range(schedule.groups))
        self.heads = nn.ModuleList(_Head(self.width, profile.depth, b - a) for a, b in bounds)
        self._steps = schedule.at(0)

    def prepared(self) -> IntegerContextNetwork:
        """The network for one traversal."""
        return self

    def open(self, scale: int, coarse: Tensor) -> Tensor:
        """As Prepared.open: coarse fp32, the states int16."""
        return self.enter(self._integers(coarse), bias=scale)

    def parameters(self, state: Tensor, step: Step) -> Tensor:
        """As Prepared.parameters, in fp32."""
        return self.heads[step.group](state[:, : self.width])

    def add(self, state: Tensor, step: Step, part: Tensor | None) -> Tensor:
        """As Prepared.add: part fp32."""
        state = dropped(state, step, self)
        if part is None or _name(step) not in self.parts:
            return state
        return self.parts[_name(step)](self._integers(padded(part, state)), state)

    def _integers(self, y: Tensor) -> Tensor:
        return with_magnitudes((y * self.unit).round_().clamp_(-LIMIT, LIMIT).to(torch.int16))

    def quantise(self, found: _Watched) -> None:
        """Takes the weights of the float network that was watched. Raises ValueError."""
        network, most = found.network, found.most
        if "state" not in most:
            raise ValueError("MSPEntropyModel.make_portable: no latents, got none to calibrate with; pass some")
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise ValueError("MSPEntropyModel.make_portable: the weights are not finite; use an earlier checkpoint")
        latent, state = (_fraction(most[name]) for name in ("latent", "state"))
        self.unit.fill_(2.0**latent)
        channels = network.kernel.shape[2]
        self.enter.quantise(network.weight((0, 0), 0, channels, 0), network.biases, latent, state)
        for step in self._steps:
            if _name(step) in self.parts:
                weight = network.weight(step.phase, step.first, step.last, waiting(step, network))
                self.parts[_name(step)].quantise(weight, None, latent, state)
        for i, (mine, head) in enumerate(zip(self.heads, network.heads, strict=True)):
            before = state
            for j, (layer, conv) in enumerate(zip(mine.hidden, head.hidden, strict=True)):
                after = _fraction(most.get(f"heads.{i}.hidden.{j}", 0.0))
                layer.quantise(conv.weight, conv.bias, before, after)
                before = after
            wanted = torch.tensor([_SCALE_FRACTION, _MEAN_FRACTION]).repeat_interleave(len(mine.units) // 2)
            last = head.parameters_of
            given = mine.parameters_of.quantise(last.weight, last.bias, before, wanted)
            mine.units.copy_((2.0**-given).view(-1, 1, 1))


def _name(step: Step) -> str:
    return f"{step.phase[0]}{step.phase[1]}_{step.group}"


def _fraction(most: float) -> int:
    """Fraction bits with which values up to _HEADROOM * most do not saturate."""
    return min(_MOST_FRACTION, math.floor(math.log2(LIMIT / max(_HEADROOM * most, 2.0**-12))))


class _Watched:
    """A ContextNetwork in a traversal, and in `most` the largest magnitudes of its values."""

    def __init__(self, network: ContextNetwork) -> None:
        self.network, self.most = network, {"latent": _LEAST_LATENT}
        self._prepared: Prepared | None = None

    def prepared(self) -> _Watched:
        self._prepared = self.network.prepared()
        return self

    def see(self, name: str, value: Tensor) -> None:
        if value.numel():
            self.most[name] = max(self.most.get(name, 0.0), float(value.detach().abs().amax()))

    def open(self, scale: int, coarse: Tensor) -> Tensor:
        self.see("latent", coarse)
        state = self._prepared.open(scale, coarse)
        self.see("state", state)
        return state

    def parameters(self, state: Tensor, step: Step) -> Tensor:
        return self._prepared.parameters(state, step)

    def add(self, state: Tensor, step: Step, part: Tensor | None) -> Tensor:
        if part is not None:
            self.see("latent", part)
        state = self._prepared.add(state, step, part)
        self.see("state", state)
        return state


@contextmanager
def watched(network: ContextNetwork) -> Iterator[_Watched]:
    """The network's stand-in for a traversal; what its values reach is in its `most`."""
    found, handles = _Watched(network), []

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.see(name, output)

    try:
        for name, module in network.named_modules():
            if name.rpartition(".")[0].endswith(".hidden"):
                handles.append(module.register_forward_hook(hook(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
