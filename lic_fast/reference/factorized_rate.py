"""Rate of a latent under a factorized density with a learned cumulative, as CompressAI's EntropyBottleneck has it.

Specification, in PyTorch: the quantised value in the dtype of the arithmetic (fp32, or fp64 for fp64), which all
backends share to the bit; the likelihood in fp64 whatever that dtype is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._bound import arithmetic_dtype, rate, rate_bwd
from ._noise import DEQUANTIZE, NOISE, NONE, STE, quantize


def layers(weights: Tensor, filters: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(matrix [C, out, in], bias [C, out, 1], factor [C, out, 1]; None in the last layer) of each layer.

    weights [C, P]: for each layer in turn the matrix row by row, the bias, and the factor, untransformed.
    """
    widths, place = [1, *filters, 1], 0
    for i, (inner, outer) in enumerate(pairwise(widths)):
        sizes = [outer * inner, outer, outer if i < len(filters) else 0]
        matrix, bias, factor = weights[:, place : place + sum(sizes)].split(sizes, 1)
        place += sum(sizes)
        yield (
            matrix.reshape(-1, outer, inner),
            bias.unsqueeze(2),
            factor.unsqueeze(2) if i < len(filters) else None,
        )


def logits_cumulative(values: Tensor, weights: Tensor, filters: Sequence[int]) -> Tensor:
    """The logit of the cumulative at `values` [C, 1, N], which grows with them."""
    return _walk(values, weights, filters)[0]


def _walk(values: Tensor, weights: Tensor, filters: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The logits, and for each layer its input and the tanh in it."""
    logits, trail = values, []
    for matrix, bias, factor in layers(weights, filters):
        before = logits
        logits = softplus(matrix) @ before + bias
        bend = torch.tanh(logits)
        trail.append((before, bend))
        if factor is not None:
            logits = logits + torch.tanh(factor) * bend
    return logits, trail


def _walk_back(
    grad: Tensor, trail: list[tuple[Tensor, Tensor]], weights: Tensor, filters: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of `values` and of `weights` [C, P] from that of the logits."""
    rows: list[Tensor] = []
    for (matrix, _, factor), (before, bend) in reversed(list(zip(layers(weights, filters), trail, strict=True))):
        row = []
        if factor is not None:
            strength = torch.tanh(factor)
            row = [(grad * bend).sum(2) * (1 - strength * strength).squeeze(2)]
            grad = grad * (1 + strength * (1 - bend * bend))
        by_matrix = (grad @ before.mT) * torch.sigmoid(matrix)
        rows = [by_matrix.flatten(1), grad.sum(2), *row, *rows]
        grad = softplus(matrix).mT @ grad
    return grad, torch.cat(rows, 1)


def _log_likelihood(lower: Tensor, upper: Tensor) -> Tensor:
    """log(sigmoid(upper) - sigmoid(lower)), without the difference of near numbers."""
    return (-torch.expm1(lower - upper)).log() + logsigmoid(upper) + logsigmoid(-lower)


def _centre(medians: Tensor | None, y: Tensor) -> Tensor | None:
    return None if medians is None else medians.reshape(1, -1, *([1] * (y.dim() - 2)))


def _by_channel(values: Tensor) -> Tensor:
    channels = values.shape[1]
    return values.double().transpose(0, 1).reshape(channels, 1, values.numel() // max(channels, 1))


def _as(y: Tensor, by_channel: Tensor) -> Tensor:
    return by_channel.reshape(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1)


def factorized_rate(
    y: Tensor, weights: Tensor, medians: Tensor | None, seed: Tensor | None,
    filters: Sequence[int], quantize_mode: int, likelihood_bound: float, output: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_hat of y's dtype, without elements where nothing is quantised; the rate as _bound.rate gives it)."""
    y_hat = quantize(y, _centre(medians, y), seed, quantize_mode, arithmetic_dtype(y))
    values, wide = _by_channel(y_hat), weights.double()
    lower, upper = (logits_cumulative(values + side, wide, filters) for side in (-0.5, 0.5))
    log_p = _as(y, _log_likelihood(lower, upper))
    result = rate(log_p, likelihood_bound, output, arithmetic_dtype(y)).contiguous()
    return y.new_empty(0) if quantize_mode == NONE else y_hat.to(y.dtype).contiguous(), result


def factorized_rate_bwd(
    grad_y_hat: Tensor | None, grad_rate: Tensor | None, y: Tensor, weights: Tensor, medians: Tensor | None,
    seed: Tensor | None, filters: Sequence[int], quantize_mode: int, likelihood_bound: float, output: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of y, weights and medians.

    Rounding has the derivative 1 with quantize "ste" and 0 with "dequantize", where y_hat = round(y - median) + median
    follows the median. Noise knows no median.
    """
    y_hat = quantize(y, _centre(medians, y), seed, quantize_mode, arithmetic_dtype(y))
    values, wide = _by_channel(y_hat), weights.double()
    (lower, low_trail), (upper, high_trail) = (_walk(values + side, wide, filters) for side in (-0.5, 0.5))
    log_p = _log_likelihood(lower, upper)
    g = torch.zeros_like(log_p)
    if grad_rate is not None:
        g = _by_channel(rate_bwd(grad_rate, _as(y, log_p), likelihood_bound, output, arithmetic_dtype(y)))
    between = 1 / torch.expm1(upper - lower)
    by_lower = _walk_back(-g * (torch.sigmoid(lower) + between), low_trail, wide, filters)
    by_upper = _walk_back(g * (torch.sigmoid(-upper) + between), high_trail, wide, filters)
    grad_values, grad_weights = (low + high for low, high in zip(by_lower, by_upper, strict=True))
    total = _as(y, grad_values)
    if grad_y_hat is not None and quantize_mode != NONE:
        total = total + grad_y_hat
    grad_medians = None
    if medians is not None:
        sums = total.transpose(0, 1).flatten(1).sum(1)
        grad_medians = (sums if quantize_mode == DEQUANTIZE else torch.zeros_like(sums)).to(medians.dtype)
    grad_y = total if quantize_mode in (NONE, NOISE, STE) else torch.zeros_like(total)
    return grad_y.to(y.dtype).contiguous(), grad_weights.to(weights.dtype), grad_medians
