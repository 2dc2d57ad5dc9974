"""Rate of a latent under one Gaussian, logistic or Laplace density or a mixture of them; and its gradients.

One launch each way. Forward, fp32, one component: reads y, scales, means (12 bytes an element), writes y_hat and the
rate (8); backward reads those and the rate's gradient (16), writes three gradients (12): all else, noise included, is
made again in registers. A sample of y is walked as rows x length: one row, or, where bits are summed for each channel,
a row a channel, of which a program adds all columns in fixed order, fp64 from tile to tile. Samples lie at any
distance, so that halves of the channels are read in place; a batch that is dense all through is one sample.

The families of up to UNROLLED components are known to the compiler, and each component's density is kept in
registers; more are walked in loops, twice on the way back, and their families are read from an argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rates
from .densities import LOG2_E, density
from .rates import BITS, BITS_PER_CHANNEL, DEQUANTIZE, FULL, NONE, from_returned, incoming, load, number, store

UNROLLED = 4
SINGLE, WEIGHTS, LOGITS = (tl.constexpr(i) for i in range(3))


@triton.jit
def _component(k, y, here, tensors, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr, VECTOR: tl.constexpr):
    """(distance, scale, weight) of component k of y, a tile; without weights the last has no meaning."""
    base, places, mask, size, batch = here
    scales, means, weights, bound = tensors
    WIDE: tl.constexpr = y.dtype
    place = base + tl.cast(k, tl.int64) * size
    s = load(scales, batch[1] + place, places, mask, WIDE, VECTOR)
    s = tl.where(s < bound, bound, s)
    s = tl.where(s > 0, s, float("nan"))
    d = y
    if HAS_MEANS:
        d = y - load(means, batch[2] + place, places, mask, WIDE, VECTOR)
    c = y
    if MIXED != SINGLE:
        c = load(weights, batch[3] + place, places, mask, WIDE, VECTOR)
    if MIXED == WEIGHTS:
        c = tl.where(c < 0, float("nan"), c)
    if MIXED == LOGITS:
        c = c * LOG2_E  # exponents are of 2
    return d, s, c


@triton.jit
def _part(k, family, y, here, tensors, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr, VECTOR: tl.constexpr):
    """(e, w, by_d, by_s, weight) of component k; e with the logit."""
    d, s, c = _component(k, y, here, tensors, HAS_MEANS, MIXED, VECTOR)
    e, w, by_d, by_s = density(d, s, family)
    if MIXED == LOGITS:
        e = e + c
    return e, w, by_d, by_s, c


@triton.jit
def _parts(
    y, here, tensors, K: tl.constexpr, FAMILIES: tl.constexpr, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    parts = ()
    for k in tl.static_range(K):
        parts += (_part(k, (FAMILIES >> (2 * k)) & 3, y, here, tensors, HAS_MEANS, MIXED, VECTOR),)
    return parts


@triton.jit
def _counted(e, w, c, MIXED: tl.constexpr):
    """A component's exponent, -inf where its weight is 0, and its factor."""
    if MIXED == WEIGHTS:
        e = tl.where(c > 0, e, float("-inf"))
        w = w * c
    return e, w


@triton.jit
def _base(most):
    """What is subtracted from exponents: 0 where all are -inf."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _total(parts, K: tl.constexpr, MIXED: tl.constexpr):
    """(most, sum, top, normaliser): the likelihood is sum 2^most, by logits divided by normaliser 2^top."""
    e, w, _, _, c = parts[0]
    most, sum = _counted(e, w, c, MIXED)
    top = c
    normaliser = c
    for k in tl.static_range(1, K):
        e, w, _, _, c = parts[k]
        e, w = _counted(e, w, c, MIXED)
        most = tl.maximum(most, e)
        top = tl.maximum(top, c)
    most = _base(most)
    top = _base(top)
    for k in tl.static_range(K):
        e, w, _, _, c = parts[k]
        e, w = _counted(e, w, c, MIXED)
        if K > 1 or MIXED != SINGLE:
            w = w * tl.exp2(e - most)
        share = tl.exp2(c - top)
        if k == 0:
            sum = w
            normaliser = share
        else:
            sum += w
            normaliser += share
    return most, sum, top, normaliser


@triton.jit
def _walk(
    count, families, y, here, tensors, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """_total of components that the compiler does not know."""
    most = tl.full(y.shape, float("-inf"), y.dtype)
    top = most
    sum = tl.zeros(y.shape, y.dtype)
    normaliser = sum
    for k in range(count):
        e, w, _, _, c = _part(k, (families >> (2 * k)) & 3, y, here, tensors, HAS_MEANS, MIXED, VECTOR)
        e, w = _counted(e, w, c, MIXED)
        higher = tl.maximum(most, e)
        sum = sum * tl.exp2(most - _base(higher)) + w * tl.exp2(e - _base(higher))
        most = higher
        higher = tl.maximum(top, c)
        normaliser = normaliser * tl.exp2(top - _base(higher)) + tl.exp2(c - _base(higher))
        top = higher
    return _base(most), sum, _base(top), normaliser


@triton.jit
def _likelihood(total, MIXED: tl.constexpr):
    """(e, w): it is w 2^e."""
    most, sum, top, normaliser = total
    if MIXED == LOGITS:
        sum = sum / normaliser
        most = most - top
    return most, sum


@triton.jit
def _tile(
    y, means, seed, batch, row, column, rows, length, WIDE: tl.constexpr, HAS_MEANS: tl.constexpr,
    MIXED: tl.constexpr, QUANTIZE: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y as the likelihood sees it, of the tile at a row and a column of a sample; and where that is.

    A mixture is rounded about zero. batch: where the sample begins in y, scales, means, weights, and in results.
    """
    mask = rates.inside(rows - row, length - column, ROWS, COLS)
    places = rates.places(length, ROWS, COLS)
    base = row * length + column
    value = load(y, batch[0] + base, places, mask, WIDE, VECTOR)
    centre = value
    CENTRED: tl.constexpr = HAS_MEANS and MIXED == SINGLE and QUANTIZE >= 2
    if CENTRED:
        centre = load(means, batch[2] + base, places, mask, WIDE, VECTOR)
    value = rates.quantized(value, centre, seed, batch[4] + base, length, QUANTIZE, CENTRED, ROWS, COLS, VECTOR)
    return value, (base, places, mask, rows * length, batch)


@triton.jit
def _forward(
    y, seed, y_hat, tensors, batch, row, column, rows, length, count, families, limit,
    WIDE: tl.constexpr, K: tl.constexpr, FAMILIES: tl.constexpr, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr,
    QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The rate of a tile, where it is, and its mask; y_hat is written."""
    value, here = _tile(
        y, tensors[1], seed, batch, row, column, rows, length,
        WIDE, HAS_MEANS, MIXED, QUANTIZE, VECTOR, ROWS, COLS,
    )  # fmt: skip
    base, places, mask, _, _ = here
    if QUANTIZE != NONE:
        store(y_hat, batch[4] + base, places, value, mask, VECTOR)
    if K > 0:
        total = _total(_parts(value, here, tensors, K, FAMILIES, HAS_MEANS, MIXED, VECTOR), K, MIXED)
    else:
        total = _walk(count, families, value, here, tensors, HAS_MEANS, MIXED, VECTOR)
    e, w = _likelihood(total, MIXED)
    return rates.as_returned(e, w, limit, OUTPUT), batch[4] + base, places, mask


@triton.jit
def _batch(b, steps, size):
    return b * steps[0], b * steps[1], b * steps[2], b * steps[3], b * size


@triton.jit
def mixture_rate_fwd_kernel(
    y, scales, means, weights, seed, y_hat, rate, step_y, step_scales, step_means, step_weights, rows, length, tiles,
    count, families, scale_bits, limit_bits,
    WIDE: tl.constexpr, K: tl.constexpr, FAMILIES: tl.constexpr, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr,
    QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, length, b, tile = rates.program(rows, length, tiles, VECTOR)
    batch = _batch(b, (step_y, step_scales, step_means, step_weights), rows * length)
    tensors = (scales, means, weights, number(scale_bits, WIDE))
    limit = number(limit_bits, WIDE)
    if OUTPUT == BITS_PER_CHANNEL:
        row = tile * ROWS
        sums = tl.zeros([ROWS], tl.float64)
        for column in range(0, length, COLS):
            bits, _, _, mask = _forward(
                y, seed, y_hat, tensors, batch, row, column, rows, length, count, families, limit,
                WIDE, K, FAMILIES, HAS_MEANS, MIXED, QUANTIZE, OUTPUT, VECTOR, ROWS, COLS,
            )  # fmt: skip
            sums += tl.sum(tl.where(mask, bits, 0.0), axis=1).to(tl.float64)
        place = row + tl.arange(0, ROWS)
        tl.store(rate + b * rows + place, sums.to(rate.dtype.element_ty), mask=place < rows)
    else:
        bits, out, places, mask = _forward(
            y, seed, y_hat, tensors, batch, tile * 0, tile * COLS, rows, length, count, families, limit,
            WIDE, K, FAMILIES, HAS_MEANS, MIXED, QUANTIZE, OUTPUT, VECTOR, ROWS, COLS,
        )  # fmt: skip
        store(rate, out, places, bits, mask, VECTOR)


@triton.jit
def _spread(
    k, part, total, g, here, raw_scales, bound, out, outputs, NEED: tl.constexpr, MIXED: tl.constexpr,
    QUANTIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a component's scales, means and weights; what it adds to that of y."""
    e, w, by_d, by_s, c = part
    most, sum, top, normaliser = total
    base, places, mask, size, batch = here
    share = g
    if MIXED != SINGLE:
        counted, factor = _counted(e, w, c, MIXED)
        share = g * (factor * tl.exp2(counted - most) / sum)
    place = base + tl.cast(k, tl.int64) * size
    if NEED & 2:
        grad = share * by_s
        s = load(raw_scales, batch[1] + place, places, mask, grad.dtype, VECTOR)
        grad = tl.where((s < bound) & ((grad >= 0) | (grad != grad)), 0.0, grad)
        store(outputs[1], out + place, places, grad, mask, VECTOR)
    by_y = share * by_d
    if (NEED & 4) and (MIXED != SINGLE or QUANTIZE != DEQUANTIZE):
        store(outputs[2], out + place, places, -by_y, mask, VECTOR)
    if NEED & 8:
        if MIXED == LOGITS:
            grad = share - g * (tl.exp2(c - top) / normaliser)
        else:
            grad = g * (w * tl.exp2(e - most) / sum)
        store(outputs[3], out + place, places, grad, mask, VECTOR)
    return by_y


@triton.jit
def mixture_rate_bwd_kernel(
    grad_y_hat, grad_rate, y, scales, means, weights, seed, grad_y, grad_scales, grad_means, grad_weights,
    step_y, step_scales, step_means, step_weights, rows, length, tiles, count, families, scale_bits, bound_bits,
    WIDE: tl.constexpr, K: tl.constexpr, FAMILIES: tl.constexpr, HAS_MEANS: tl.constexpr, MIXED: tl.constexpr,
    QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr, GRAD_Y_HAT: tl.constexpr, GRAD_RATE: tl.constexpr,
    NEED: tl.constexpr, BOUNDED: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, length, b, tile = rates.program(rows, length, tiles, VECTOR)
    size = rows * length
    batch = _batch(b, (step_y, step_scales, step_means, step_weights), size)
    across = tl.cdiv(length, COLS).to(tl.int32)
    row = tile.to(tl.int32) // across
    column = tile - row * across
    row = row.to(tl.int64) * ROWS
    tensors = (scales, means, weights, number(scale_bits, WIDE))
    outputs = (grad_y, grad_scales, grad_means, grad_weights)
    value, here = _tile(
        y, means, seed, batch, row, column * COLS, rows, length,
        WIDE, HAS_MEANS, MIXED, QUANTIZE, VECTOR, ROWS, COLS,
    )  # fmt: skip
    base, places, mask, _, _ = here
    out = batch[4]
    if K > 0:
        parts = _parts(value, here, tensors, K, FAMILIES, HAS_MEANS, MIXED, VECTOR)
        total = _total(parts, K, MIXED)
    else:
        total = _walk(count, families, value, here, tensors, HAS_MEANS, MIXED, VECTOR)
    e, w = _likelihood(total, MIXED)
    if OUTPUT == BITS_PER_CHANNEL:
        place = row + tl.arange(0, ROWS)
        g = tl.load(grad_rate + b * rows + place, mask=place < rows, other=0.0)[:, None] + tl.zeros_like(value)
    else:
        g = incoming(grad_rate, out + base, places, mask, WIDE, GRAD_RATE, VECTOR)
    g = from_returned(g, e, w, number(bound_bits, WIDE), OUTPUT, BOUNDED)
    through = tl.zeros_like(value)
    if QUANTIZE != NONE:
        through = incoming(grad_y_hat, out + base, places, mask, WIDE, GRAD_Y_HAT, VECTOR)
    by_y = through
    bound = tensors[3]
    first = out * (count if K == 0 else K)
    if K > 0:
        for k in tl.static_range(K):
            by_y += _spread(k, parts[k], total, g, here, scales, bound, first, outputs, NEED, MIXED, QUANTIZE, VECTOR)
    else:
        for k in range(count):
            part = _part(k, (families >> (2 * k)) & 3, value, here, tensors, HAS_MEANS, MIXED, VECTOR)
            by_y += _spread(k, part, total, g, here, scales, bound, first, outputs, NEED, MIXED, QUANTIZE, VECTOR)
    if QUANTIZE == DEQUANTIZE:
        by_y = tl.zeros_like(value)
    if NEED & 1:
        store(grad_y, out + base, places, by_y, mask, VECTOR)
    if (NEED & 4) and (MIXED == SINGLE and QUANTIZE == DEQUANTIZE):
        store(grad_means, out + base, places, through, mask, VECTOR)


Optional = Tensor | None


def _setting(
    y: Tensor, scales: Tensor, means: Optional, weights: Optional, families: Sequence[int], quantize: int,
    logits: bool, by_row: bool, walks: bool, results: list[Tensor],
) -> tuple[int, tuple, dict]:  # fmt: skip
    """(programs, the integers that both kernels take before the bounds, the values that the compiler knows).

    by_row: a row a channel; walks: a program takes all columns of its rows. results: what is written or read besides.
    """
    k, size = len(families), y[0].numel()
    rows = y.shape[1] if by_row else 1
    given = [y, scales] + [t for t in (means, weights) if t is not None]
    batches, steps = y.shape[0], [t.stride(0) if t is not None else 0 for t in (y, scales, means, weights)]
    if k == 1 and all(t.stride(0) == size for t in given):  # one sample, dense all through
        batches, rows, size = 1, rows * batches if by_row else 1, size * batches
    length = size // rows
    height, width = rates.tile(length, rates.block(k, y.dtype))
    used = steps[: len(given)] if weights is None else steps
    vector = rates.in_fours([length, *(used if batches > 1 else [])], given + results)
    tiles = triton.cdiv(rows, height) * (1 if walks else triton.cdiv(length, width))
    packed = sum(family << (2 * i) for i, family in enumerate(families))
    known = k <= UNROLLED
    constants = {
        "WIDE": rates.arithmetic(y), "K": k if known else 0, "FAMILIES": packed if known else 0,
        "HAS_MEANS": means is not None, "MIXED": 0 if weights is None else 2 if logits else 1, "QUANTIZE": quantize,
        "VECTOR": vector, "ROWS": height, "COLS": width,
    }  # fmt: skip
    return batches * tiles, (*steps, rows, length // rates.GROUP if vector else length, tiles, k, packed), constants


def mixture_rate_out(
    y: Tensor, scales: Tensor, means: Optional, weights: Optional, seed: Optional, families: Sequence[int],
    quantize: int, scale_bound: float, likelihood_bound: float, logits: bool, output: int, y_hat: Tensor, rate: Tensor,
    slopes: Tensor,
) -> None:  # fmt: skip
    """Fills y_hat, where anything is quantised, and rate. Samples are dense, at any distance; results contiguous.

    slopes, which the CPU's kernels leave for their gradients, has elements under the interpreter only: zeros.
    """
    slopes.zero_()
    by_row = output == BITS_PER_CHANNEL.value
    results = [y_hat] if by_row else [y_hat, rate]
    programs, sizes, constants = _setting(
        y, scales, means, weights, families, quantize, logits, by_row, by_row, results
    )
    bits = (
        rates.bits(rates.rounded_up(scale_bound, y.dtype)),
        rates.bits(rates.limit(likelihood_bound, output, y.dtype)),
    )
    with torch.cuda.device_of(y):
        mixture_rate_fwd_kernel[(programs,)](
            y, scales, *(y if t is None else t for t in (means, weights, seed)), y_hat, rate, *sizes, *bits,
            OUTPUT=output, **constants, **rates.LAUNCH,
        )  # fmt: skip


def mixture_rate_bwd_out(
    grad_y_hat: Optional, grad_rate: Optional, slopes: Tensor, y: Tensor, scales: Tensor, means: Optional,
    weights: Optional, seed: Optional, families: Sequence[int], quantize: int, scale_bound: float,
    likelihood_bound: float, logits: bool, output: int, grad_y: Tensor, grad_scales: Tensor, grad_means: Tensor,
    grad_weights: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients that have elements, contiguous. One element of a gradient from above may stand for all."""
    outputs = (grad_y, grad_scales, grad_means, grad_weights)
    need = sum(1 << i for i, t in enumerate(outputs) if t.numel())
    if not need:
        return
    by_row = output == BITS_PER_CHANNEL.value and grad_rate is not None and grad_rate.numel() > 1
    kinds = rates.kind(grad_y_hat, y.numel()), rates.kind(grad_rate, y.numel())
    aligned = [t for t, kind in zip((grad_y_hat, grad_rate), kinds, strict=True) if kind == FULL.value]
    programs, sizes, constants = _setting(
        y, scales, means, weights, families, quantize, logits, by_row, False, [*aligned, *outputs]
    )
    if output == BITS_PER_CHANNEL.value and not by_row:
        output = BITS.value
    bits = rates.bits(rates.rounded_up(scale_bound, y.dtype)), rates.bits(likelihood_bound)
    with torch.cuda.device_of(y):
        mixture_rate_bwd_kernel[(programs,)](
            *(y if t is None else t for t in (grad_y_hat, grad_rate)), y, scales,
            *(y if t is None else t for t in (means, weights, seed)), *outputs, *sizes, *bits,
            OUTPUT=output, GRAD_Y_HAT=kinds[0], GRAD_RATE=kinds[1], NEED=need, BOUNDED=likelihood_bound > 0,
            **constants, **rates.LAUNCH,
        )  # fmt: skip
