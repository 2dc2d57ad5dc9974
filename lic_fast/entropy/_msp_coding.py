"""What coding does at each step of MSPEntropyModel, for one sample: parameters to levels, symbols, values.

Decoding is work for a device alone: no step reads anything on the host, so that a CUDA graph can hold all of them.
Where a GPU has no coder, for want of the CUDA library, the CPU's does the symbols, and each step waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch
from ..coding import MixtureTables, Slots, Tables, mixture_parameters
from ..functional import schedule_levels, schedule_quantize_
from ._msp_stream import Writer
from ._schedule import Step

MOST_SYMBOL, SCALE_BOUND = 1 << 30, 0.11
Visit = Callable[[Step, "Tensor | None"], Tensor]


def rounded(values: Tensor, means: Tensor) -> Tensor:
    """The symbols of values, as floats: the one rule of forward() and compress()."""
    return (values - means).round().clamp_(-MOST_SYMBOL, MOST_SYMBOL)


def coder_device(device: torch.device) -> torch.device:
    """Where the symbols of a model on `device` are coded: there, or on the CPU, where the coder does not run there."""
    coder, forced = _dispatch.OPS["rans_coder_reconstruct_"], _dispatch.asked_for()
    names = coder.candidates(device.type) if forced is None else (forced,)
    usable = any(coder.why_not(name, device.type, torch.uint8) is None for name in names)
    return device if usable else torch.device("cpu")


def encoding(
    writer: Writer, y: Tensor, y_hat: Tensor, medians: Tensor, tables: Tables, mixtures: MixtureTables | None
) -> Visit:
    """Writes the steps of y [1, C, H, W] fp32, contiguous as y_hat is, which gets what a decoder will have.

    mixtures: where parameters are those of mixtures, which are rounded about 0.
    """

    def visit(step: Step, parameters: Tensor | None) -> Tensor:
        if parameters is None:
            means = medians.view(1, -1, 1, 1)
            symbols = rounded(step.of(y), means)
            writer.step(step.scale, symbols[0].to("cpu", torch.int32), _own_levels(tables, symbols).cpu())
            return _placed(step, y_hat, symbols + means)
        if mixtures is not None:
            values = step.of(y)
            symbols = rounded(values, torch.zeros_like(values))
            integers = _integers(parameters.to(coder_device(y.device)), symbols.shape[1], mixtures)
            writer.step(step.scale, symbols[0].to("cpu", torch.int32), integers.cpu())
            return _placed(step, y_hat, symbols)
        symbols, levels, values = schedule_quantize_(y_hat, y, parameters, **step.place)
        writer.step(step.scale, symbols[0].cpu(), levels[0].cpu())
        return values

    return visit


def decoding(
    slots: Slots, y_hat: Tensor, medians: Tensor, tables: Tables, mixtures: MixtureTables | None, levels: list[Tensor]
) -> Visit:
    """Decodes steps of the containers in `slots` into y_hat [1, C, H, W] fp32; mixtures: as in encoding.

    The levels, or integers of mixtures, of the steps with parameters are appended to `levels`, before these are used.
    A step is decoded into a tensor of its own, which the networks then take in, and copied to its places in y_hat.
    """
    coarsest, finer, there = slots.decoders[0], slots.decoders[-1], slots.device

    def visit(step: Step, parameters: Tensor | None) -> Tensor:
        values = torch.empty(step.of(y_hat).shape, device=there)
        if parameters is None:
            means = medians.to(there).view(1, -1, 1, 1).expand(values.shape).contiguous()
            coarsest.reconstruct_(_own_levels(tables, values), means, values)
        elif mixtures is not None:
            levels.append(_integers(parameters.to(there), values.shape[1], mixtures))
            values.copy_(finer.decode(levels[-1])[None])
        else:
            parameters = parameters.contiguous()
            levels.append(schedule_levels(parameters).to(there))
            finer.reconstruct_(levels[-1], parameters[:, values.shape[1] :].to(there), values)
        return _placed(step, y_hat, values.to(y_hat.device))

    return visit


def _integers(parameters: Tensor, channels: int, mixtures: MixtureTables) -> Tensor:
    """int32 [2 + 2 K, c, h, w] of a sample's scales, means and logits [1, 3 K c, h, w]."""
    _, _, *sides = parameters.shape
    scales, means, logits = parameters[0].float().reshape(3, -1, channels, *sides)
    return mixture_parameters(scales.clamp(min=SCALE_BOUND), means, torch.softmax(logits, 0), mixtures)


def _own_levels(tables: Tables, part: Tensor) -> Tensor:
    """The level of each channel of the coarsest grid, behind those of scales: int32 [C, h, w]."""
    _, channels, *sides = part.shape
    own = torch.arange(len(tables) - channels, len(tables), dtype=torch.int32, device=part.device)
    return own.view(-1, 1, 1).expand(-1, *sides)


def _placed(step: Step, y_hat: Tensor, values: Tensor) -> Tensor:
    step.of(y_hat).copy_(values)
    return values
