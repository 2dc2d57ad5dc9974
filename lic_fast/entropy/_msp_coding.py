"""What coding does at each step of MSPEntropyModel, for one sample: parameters to levels, symbols, values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..coding import MixtureTables, Tables, mixture_parameters
from ..functional import schedule_dequantize_, schedule_levels, schedule_quantize_
from ._msp_stream import Reader, Writer
from ._schedule import Step

MOST_SYMBOL, SCALE_BOUND = 1 << 30, 0.11
Visit = Callable[[Step, "Tensor | None"], Tensor]


def rounded(values: Tensor, means: Tensor) -> Tensor:
    """The symbols of values, as floats: the one rule of forward() and compress()."""
    return (values - means).round().clamp_(-MOST_SYMBOL, MOST_SYMBOL)


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
            writer.step(step.scale, symbols[0].to("cpu", torch.int32), _own_levels(tables, symbols))
            return _placed(step, y_hat, symbols + means)
        if mixtures is not None:
            values = step.of(y)
            symbols = rounded(values, torch.zeros_like(values))
            integers = _integers(parameters, symbols.shape[1], mixtures)
            writer.step(step.scale, symbols[0].to("cpu", torch.int32), integers)
            return _placed(step, y_hat, symbols)
        symbols, levels, values = schedule_quantize_(y_hat, y, parameters, **step.place)
        writer.step(step.scale, symbols[0].cpu(), levels[0].cpu())
        return values

    return visit


def decoding(reader: Reader, y_hat: Tensor, medians: Tensor, tables: Tables, mixtures: MixtureTables | None) -> Visit:
    """Reads steps into y_hat [1, C, H, W] fp32, contiguous; mixtures: as in encoding."""

    def visit(step: Step, parameters: Tensor | None) -> Tensor:
        if parameters is None:
            means = medians.view(1, -1, 1, 1)
            symbols = reader.step(step.scale, _own_levels(tables, step.of(y_hat)))[None]
            return _placed(step, y_hat, symbols.to(y_hat.device, torch.float32) + means)
        if mixtures is not None:
            symbols = reader.step(step.scale, _integers(parameters, step.last - step.first, mixtures))[None]
            return _placed(step, y_hat, symbols.to(y_hat.device, torch.float32))
        symbols = reader.step(step.scale, schedule_levels(parameters)[0].cpu())[None]
        return schedule_dequantize_(y_hat, symbols.to(y_hat.device), parameters, **step.place)

    return visit


def _integers(parameters: Tensor, channels: int, mixtures: MixtureTables) -> Tensor:
    """int32 [2 + 2 K, c, h, w] on the CPU, of a sample's scales, means and logits [1, 3 K c, h, w]."""
    _, _, *sides = parameters.shape
    scales, means, logits = parameters[0].float().cpu().reshape(3, -1, channels, *sides)
    return mixture_parameters(scales.clamp(min=SCALE_BOUND), means, torch.softmax(logits, 0), mixtures)


def _own_levels(tables: Tables, part: Tensor) -> Tensor:
    """The level of each channel of the coarsest grid, behind those of scales: int32 [C, h, w] on the CPU."""
    _, channels, *sides = part.shape
    own = torch.arange(len(tables) - channels, len(tables), dtype=torch.int32)
    return own.view(-1, 1, 1).expand(-1, *sides)


def _placed(step: Step, y_hat: Tensor, values: Tensor) -> Tensor:
    step.of(y_hat).copy_(values)
    return values
