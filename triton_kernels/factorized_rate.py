"""Rate of a latent under CompressAI's factorized density, hidden widths (3, 3, 3, 3); and its gradients.

A program takes a channel and every `splits`-th of its tiles, batch x inner elements, one a thread: the 58 parameters
of the channel stay in registers, transformed once. The logit of the cumulative is walked at the lower end of the box
together with its growth up to the upper end, by tanh(x + q) - tanh(x) = tanh(q) (1 - tanh(x + q) tanh(x)): the
likelihood of a flat density is the difference of near numbers otherwise. The way back carries, likewise, the sum of
the gradients at both ends and that at the upper one. A thread adds its gradients of the parameters, a program its
threads' in a fixed tree, torch the programs': no atomics, every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rates
from .densities import LOG2_E, one_minus_exp
from .rates import BITS, BITS_PER_CHANNEL, DEQUANTIZE, NONE, ONE, STE, from_returned, incoming, load, number, store

BLOCK = 128
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
PROGRAMS = 1024  # about as many as keep a large GPU busy
# layers of 3 x 1, three times 3 x 3, and 1 x 3; each its matrix, bias, and, but the last, factor
_MATRIX, _BIAS, _FACTOR = range(3)
_MIDDLE = (_MATRIX,) * 9 + (_BIAS,) * 3 + (_FACTOR,) * 3
_KINDS = (_MATRIX,) * 3 + (_BIAS,) * 3 + (_FACTOR,) * 3 + 3 * _MIDDLE + (_MATRIX,) * 3 + (_BIAS,)
KINDS = tl.constexpr(_KINDS)
PARAMETERS = tl.constexpr(len(_KINDS))


@triton.jit
def _softplus(x):
    z = tl.exp2(tl.abs(x) * -LOG2_E)
    u = 1 + z
    more = tl.where(u == 1, z, tl.log(u) * z / (u - 1))  # Kahan's log1p
    return tl.where(x > 0, x, 0.0) + tl.where(x != x, x, more)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2_E))


@triton.jit
def _tanh(x):
    """Right in its absolute error."""
    return 2 / (1 + tl.exp2(x * (-2 * LOG2_E))) - 1


@triton.jit
def _small_tanh(x):
    """Right in its relative error, for x >= 0."""
    rise, fall = one_minus_exp(2 * x)
    return rise / (1 + fall)


@triton.jit
def _parameters(row, TYPE: tl.constexpr):
    """A channel's parameters as they are used, a tuple of scalars."""
    result = ()
    for i in tl.static_range(PARAMETERS):
        x = tl.load(row + i).to(TYPE)
        if KINDS[i] == 0:
            x = _softplus(x)
        elif KINDS[i] == 2:
            x = _tanh(x)
        result += (x,)
    return result


@triton.jit
def _layer(x, q, p, FIRST: tl.constexpr):
    """(x, q, tanh at the lower end, its growth) after a hidden layer whose parameters start at FIRST, 3 x WIDTH."""
    WIDTH: tl.constexpr = 1 if FIRST == 0 else 3
    lower = ()
    growth = ()
    bends = ()
    rises = ()
    for o in tl.static_range(3):
        value = p[FIRST + 3 * WIDTH + o] + p[FIRST + o * WIDTH] * x[0]
        more = p[FIRST + o * WIDTH] * q[0]
        for j in tl.static_range(1, WIDTH):
            value += p[FIRST + o * WIDTH + j] * x[j]
            more += p[FIRST + o * WIDTH + j] * q[j]
        bend = _tanh(value)
        rise = _small_tanh(more) * (1 - bend * _tanh(value + more))
        factor = p[FIRST + 3 * WIDTH + 3 + o]
        lower += (value + factor * bend,)
        growth += (more + factor * rise,)
        bends += (bend,)
        rises += (rise,)
    return lower, growth, bends, rises


@triton.jit
def _walk(y, p):
    """(lower logit, its growth to the upper one, the hidden layers' results)."""
    first = _layer((y - 0.5,), (tl.full(y.shape, 1.0, y.dtype),), p, 0)
    second = _layer(first[0], first[1], p, 9)
    third = _layer(second[0], second[1], p, 24)
    fourth = _layer(third[0], third[1], p, 39)
    x = fourth[0]
    q = fourth[1]
    lower = p[57] + p[54] * x[0] + p[55] * x[1] + p[56] * x[2]
    return lower, p[54] * q[0] + p[55] * q[1] + p[56] * q[2], (first, second, third, fourth)


@triton.jit
def _likelihood(lower, growth):
    """(e, w) of the likelihood w 2^e, sigmoid(lower + growth) - sigmoid(lower)."""
    upper = lower + growth
    rise, _ = one_minus_exp(growth)
    low = 1 + tl.exp2(tl.abs(lower) * -LOG2_E)
    high = 1 + tl.exp2(tl.abs(upper) * -LOG2_E)
    return (tl.minimum(upper, 0.0) - tl.maximum(lower, 0.0)) * LOG2_E, rise / (low * high)


@triton.jit
def _back(sums, total, high, x, q, bends, rises, p, FIRST: tl.constexpr):
    """(sums with a hidden layer's gradients, total, high) before the layer, of input x, whose growth is q.

    total: the gradients at the lower and the upper end added, by output; high: that at the upper end.
    """
    WIDTH: tl.constexpr = 1 if FIRST == 0 else 3
    inner = ()
    inner_high = ()
    by_matrix = ()
    by_bias = ()
    by_factor = ()
    for o in tl.static_range(3):
        factor = p[FIRST + 3 * WIDTH + 3 + o]
        bend = bends[o]
        rise = rises[o]
        by_factor += (total[o] * bend + high[o] * rise,)
        upper = bend + rise
        at = total[o] * (1 + factor * (1 - bend * bend)) - high[o] * (factor * rise * (bend + upper))
        above = high[o] * (1 + factor * (1 - upper * upper))
        by_bias += (at,)
        inner += (at,)
        inner_high += (above,)
        for j in tl.static_range(WIDTH):
            by_matrix += (at * x[j] + above * q[j],)
    added = by_matrix + by_bias + by_factor
    new = ()
    for i in tl.static_range(PARAMETERS):
        if i >= FIRST and i < FIRST + 3 * WIDTH + 6:
            new += (sums[i] + added[i - FIRST],)
        else:
            new += (sums[i],)
    below = ()
    below_high = ()
    for j in tl.static_range(WIDTH):
        below += (p[FIRST + j] * inner[0] + p[FIRST + WIDTH + j] * inner[1] + p[FIRST + 2 * WIDTH + j] * inner[2],)
        below_high += (
            p[FIRST + j] * inner_high[0]
            + p[FIRST + WIDTH + j] * inner_high[1]
            + p[FIRST + 2 * WIDTH + j] * inner_high[2],
        )
    return new, below, below_high


@triton.jit
def _walk_back(y, g, lower, growth, trail, p, sums):
    """(sums with the gradients of the parameters, the gradient of y) from that of the log-likelihood."""
    first, second, third, fourth = trail
    rise, fall = one_minus_exp(growth)
    above = _sigmoid(-(lower + growth))
    high = g * (above + fall / rise)
    total = g * (above - _sigmoid(lower))
    x = fourth[0]
    q = fourth[1]
    new = ()
    for i in tl.static_range(PARAMETERS):
        if i < 54:
            new += (sums[i],)
        elif i < 57:
            new += (sums[i] + total * x[i - 54] + high * q[i - 54],)
        else:
            new += (sums[i] + total,)
    totals = (p[54] * total, p[55] * total, p[56] * total)
    highs = (p[54] * high, p[55] * high, p[56] * high)
    new, totals, highs = _back(new, totals, highs, third[0], third[1], fourth[2], fourth[3], p, 39)
    new, totals, highs = _back(new, totals, highs, second[0], second[1], third[2], third[3], p, 24)
    new, totals, highs = _back(new, totals, highs, first[0], first[1], second[2], second[3], p, 9)
    one = tl.full(y.shape, 1.0, y.dtype)
    new, totals, highs = _back(new, totals, highs, (y - 0.5,), (one,), first[2], first[3], p, 0)
    return new, totals[0]


@triton.jit
def _program(inner, splits, channels):
    """(channel, first of its tiles, inner, elements of a sample) of this program, in 64 bits but the tile."""
    channel = tl.program_id(0) // splits
    inner = tl.cast(inner, tl.int64)
    return channel.to(tl.int64), tl.program_id(0) - channel * splits, inner, inner * channels


@triton.jit
def _tile(
    y, medians, seed, step, channel, row, column, batches, inner, size, WIDE: tl.constexpr, CENTRED: tl.constexpr,
    QUANTIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y as the likelihood sees it, its first element's index, its places in dense tensors, and its mask."""
    mask = rates.inside(batches - row, inner - column, ROWS, COLS)
    inside = channel * inner + column
    value = load(y, row * step + inside, rates.places(step, ROWS, COLS), mask, WIDE, False)
    centre = value
    if CENTRED:
        centre = tl.load(medians + channel).to(WIDE)
    first = row * size + inside
    value = rates.quantized(value, centre, seed, first, size, QUANTIZE, CENTRED, ROWS, COLS, False)
    return value, first, rates.places(size, ROWS, COLS), mask


@triton.jit
def _forward(
    y, medians, seed, y_hat, step, channel, row, column, batches, inner, size, p, limit, WIDE: tl.constexpr,
    CENTRED: tl.constexpr, QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    value, first, places, mask = _tile(
        y, medians, seed, step, channel, row, column, batches, inner, size, WIDE, CENTRED, QUANTIZE, ROWS, COLS
    )
    if QUANTIZE != NONE:
        store(y_hat, first, places, value, mask, False)
    lower, growth, _ = _walk(value, p)
    e, w = _likelihood(lower, growth)
    return rates.as_returned(e, w, limit, OUTPUT), first, places, mask


@triton.jit
def factorized_rate_fwd_kernel(
    y, weights, medians, seed, y_hat, rate, step, batches, channels, inner, splits, limit_bits,
    WIDE: tl.constexpr, CENTRED: tl.constexpr, QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    channel, tile, inner, size = _program(inner, splits, channels)
    step = tl.cast(step, tl.int64)
    p = _parameters(weights + channel * PARAMETERS, WIDE)
    limit = number(limit_bits, WIDE)
    down = tl.cdiv(batches, ROWS)
    if OUTPUT == BITS_PER_CHANNEL:
        for block in range(tile, down, splits):
            row = tl.cast(block, tl.int64) * ROWS
            sums = tl.zeros([ROWS], tl.float64)
            for column in range(0, inner, COLS):
                bits, _, _, mask = _forward(
                    y, medians, seed, y_hat, step, channel, row, column, batches, inner, size, p, limit,
                    WIDE, CENTRED, QUANTIZE, OUTPUT, ROWS, COLS,
                )  # fmt: skip
                sums += tl.sum(tl.where(mask, bits, 0.0), axis=1).to(tl.float64)
            rows = row + tl.arange(0, ROWS)
            tl.store(rate + rows * channels + channel, sums.to(rate.dtype.element_ty), mask=rows < batches)
    else:
        across = tl.cdiv(inner, COLS)
        for block in range(tl.cast(tile, tl.int64), down * across, splits):
            row = block // across
            column = (block - row * across) * COLS
            bits, first, places, mask = _forward(
                y, medians, seed, y_hat, step, channel, row * ROWS, column, batches, inner, size, p, limit,
                WIDE, CENTRED, QUANTIZE, OUTPUT, ROWS, COLS,
            )  # fmt: skip
            store(rate, first, places, bits, mask, False)


@triton.jit
def _upstream(grad_rate, first, places, mask, row, channel, batches, channels, WIDE, GRAD_RATE, OUTPUT, ROWS):
    if OUTPUT == BITS_PER_CHANNEL:
        rows = row + tl.arange(0, ROWS)
        g = tl.load(grad_rate + rows * channels + channel, mask=rows < batches, other=0.0)
        g = g[:, None] + tl.zeros(mask.shape, WIDE)
    else:
        g = incoming(grad_rate, first, places, mask, WIDE, GRAD_RATE, False)
    return g


@triton.jit
def _store_sums(sums, row, out):
    """A channel's gradients of the parameters before softplus and tanh."""
    for i in tl.static_range(PARAMETERS):
        total = tl.sum(tl.sum(sums[i], axis=1), axis=0)
        x = tl.load(row + i).to(total.dtype)
        if KINDS[i] == 0:
            total = total * _sigmoid(x)
        elif KINDS[i] == 2:
            bend = _tanh(x)
            total = total * (1 - bend * bend)
        tl.store(out + i, total)


@triton.jit
def factorized_rate_bwd_kernel(
    grad_y_hat, grad_rate, y, weights, medians, seed, grad_y, grad_weights, grad_medians,
    step, batches, channels, inner, splits, bound_bits,
    WIDE: tl.constexpr, CENTRED: tl.constexpr, QUANTIZE: tl.constexpr, OUTPUT: tl.constexpr,
    GRAD_Y_HAT: tl.constexpr, GRAD_RATE: tl.constexpr, NEED: tl.constexpr, BOUNDED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    channel, tile, inner, size = _program(inner, splits, channels)
    step = tl.cast(step, tl.int64)
    p = _parameters(weights + channel * PARAMETERS, WIDE)
    bound = number(bound_bits, WIDE)
    across = tl.cdiv(inner, COLS)
    sums = ()
    for _ in tl.static_range(PARAMETERS):
        sums += (tl.zeros([ROWS, COLS], WIDE),)
    by_median = tl.zeros([ROWS, COLS], WIDE)
    for block in range(tl.cast(tile, tl.int64), tl.cdiv(batches, ROWS) * across, splits):
        row = block // across
        column = (block - row * across) * COLS
        row = row * ROWS
        value, first, places, mask = _tile(
            y, medians, seed, step, channel, row, column, batches, inner, size, WIDE, CENTRED, QUANTIZE, ROWS, COLS
        )
        lower, growth, trail = _walk(value, p)
        e, w = _likelihood(lower, growth)
        g = _upstream(grad_rate, first, places, mask, row, channel, batches, channels, WIDE, GRAD_RATE, OUTPUT, ROWS)
        g = tl.where(mask, from_returned(g, e, w, bound, OUTPUT, BOUNDED), 0.0)
        sums, by_y = _walk_back(value, g, lower, growth, trail, p, sums)
        if QUANTIZE != NONE:
            by_y += incoming(grad_y_hat, first, places, mask, WIDE, GRAD_Y_HAT, False)
        if QUANTIZE == DEQUANTIZE:
            by_median += tl.where(mask, by_y, 0.0)
            by_y = tl.zeros_like(by_y)
        if NEED & 1:
            store(grad_y, first, places, by_y, mask, False)
    split = tl.program_id(0) % splits
    place = split.to(tl.int64) * channels + channel
    if NEED & 2:
        _store_sums(sums, weights + channel * PARAMETERS, grad_weights + place * PARAMETERS)
    if NEED & 4:
        tl.store(grad_medians + place, tl.sum(tl.sum(by_median, axis=1), axis=0))


def _setting(y: Tensor, medians: Tensor | None, quantize: int) -> tuple[int, tuple, dict]:
    """(programs, the integers that both kernels take, the values that the compiler knows)."""
    batches, channels = y.shape[:2]
    inner = y[0, 0].numel()
    columns = min(BLOCK, triton.next_power_of_2(inner))
    rows = BLOCK // columns
    tiles = triton.cdiv(batches, rows) * triton.cdiv(inner, columns)
    splits = max(1, min(tiles // 2, PROGRAMS // channels))  # of the shape alone, and with it the order of sums
    constants = {
        "WIDE": rates.arithmetic(y), "CENTRED": medians is not None and quantize >= STE.value, "QUANTIZE": quantize,
        "ROWS": rows, "COLS": columns,
    }  # fmt: skip
    return channels * splits, (y.stride(0), batches, channels, inner, splits), constants


def factorized_rate_out(
    y: Tensor, weights: Tensor, medians: Tensor | None, seed: Tensor | None, quantize: int, likelihood_bound: float,
    output: int, y_hat: Tensor, rate: Tensor,
) -> None:  # fmt: skip
    """Fills y_hat, where anything is quantised, and rate. Samples of y are dense, at any distance; all else is."""
    programs, sizes, constants = _setting(y, medians, quantize)
    with torch.cuda.device_of(y):
        factorized_rate_fwd_kernel[(programs,)](
            y, weights, *(weights if t is None else t for t in (medians, seed)), y_hat, rate, *sizes,
            rates.bits(rates.limit(likelihood_bound, output, y.dtype)), OUTPUT=output, **constants, **LAUNCH,
        )  # fmt: skip


def factorized_rate_bwd_out(
    grad_y_hat: Tensor | None, grad_rate: Tensor | None, y: Tensor, weights: Tensor, medians: Tensor | None,
    seed: Tensor | None, quantize: int, likelihood_bound: float, output: int,
    grad_y: Tensor, grad_weights: Tensor, grad_medians: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients that have elements, contiguous. One element of a gradient from above may stand for all."""
    outputs = (grad_y, grad_weights, grad_medians)
    need = sum(1 << i for i, t in enumerate(outputs) if t.numel())
    if not need:
        return
    kinds = rates.kind(grad_y_hat, y.numel()), rates.kind(grad_rate, y.numel())
    if output == BITS_PER_CHANNEL.value and (grad_rate is None or grad_rate.numel() == 1):
        output = BITS.value
        kinds = kinds[0], kinds[1] and ONE.value
    programs, sizes, constants = _setting(y, medians, quantize)
    splits = sizes[-1]
    parts = [t if splits == 1 or not t.numel() else torch.empty((splits, *t.shape), dtype=t.dtype, device=t.device)
             for t in outputs[1:]]  # fmt: skip
    with torch.cuda.device_of(y):
        factorized_rate_bwd_kernel[(programs,)](
            *(weights if t is None else t for t in (grad_y_hat, grad_rate)), y, weights,
            *(weights if t is None else t for t in (medians, seed)), grad_y, *parts, *sizes,
            rates.bits(likelihood_bound), OUTPUT=output, GRAD_Y_HAT=kinds[0], GRAD_RATE=kinds[1], NEED=need,
            BOUNDED=likelihood_bound > 0, **constants, **LAUNCH,
        )  # fmt: skip
        for part, result in zip(parts, outputs[1:], strict=True):
            if part is not result:
                torch.sum(part, 0, out=result)
