"""What the optimizers' kernels share: loads and stores by a code for the dtype, and a tensor's scalars of one step.

The scalars are computed on the device, in fp64, from counts and hyper: no launch waits for the host. A row holds,
in fp32: whether the step is taken, beta1, 1 - beta1, beta2, 1 - beta2, eps, the step size, lr * weight_decay,
1 - shampoo_beta. beta^step is taken by repeated squaring: fp64 throughout, within step * 2^-53.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .access import pointer

SCALARS = tl.constexpr(16)  # floats in a row
TAKEN = tl.constexpr(0)
BETA1 = tl.constexpr(1)
REST1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
REST2 = tl.constexpr(4)
EPS = tl.constexpr(5)
STEP_SIZE = tl.constexpr(6)
DECAY = tl.constexpr(7)
GRAM_WEIGHT = tl.constexpr(8)
DIVISOR = tl.constexpr(9)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def load_float(address, code, offsets, mask, V: tl.constexpr):
    """The elements at `address` (an integer) of the dtype that `code` names, V at a time, in fp32."""
    if code == 0:
        value = tl.load(pointer(address, tl.float32, V) + offsets, mask=mask, other=0.0)
    elif code == 1:
        value = tl.load(pointer(address, tl.bfloat16, V) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(pointer(address, tl.float16, V) + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_float(address, code, offsets, value, mask, V: tl.constexpr):
    if code == 0:
        tl.store(pointer(address, tl.float32, V) + offsets, value, mask=mask)
    elif code == 1:
        tl.store(pointer(address, tl.bfloat16, V) + offsets, value.to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer(address, tl.float16, V) + offsets, value.to(tl.float16), mask=mask)


@triton.jit
def not_finite(value, mask):
    """1 where any element under the mask is not finite, else 0."""
    return tl.max((mask & ((tl.abs(value) < float("inf")) == 0)).to(tl.int32))


@triton.jit
def adam(g, m, v, row):
    """(exp_avg, exp_avg_sq, direction) after the step; row: the tensor's scalars."""
    m = m * tl.load(row + BETA1) + tl.load(row + REST1) * g
    v = v * tl.load(row + BETA2) + tl.load(row + REST2) * (g * g)
    return m, v, tl.div_rn(m, tl.sqrt_rn(v) + tl.load(row + EPS))


@triton.jit
def updated(value, update, row):
    """The parameter after the step, in fp32."""
    value = value - tl.load(row + STEP_SIZE) * update
    return value - tl.load(row + DECAY) * value


@triton.jit
def _power(base, exponent):
    result = tl.full([], 1.0, tl.float64)
    for _ in range(48):
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def count_step(scalars, counts, hyper, index, bad, CORRECT_BIAS: tl.constexpr):
    """Counts tensor `index`'s step as taken or skipped, and writes its row of scalars."""
    count = counts + 2 * index
    row = scalars + SCALARS * index
    if bad != 0:
        tl.store(count + 1, tl.load(count + 1) + 1)
        tl.store(row + TAKEN, 0.0)
    else:
        step = tl.load(count) + 1
        tl.store(count, step)
        lr = tl.load(hyper + 6 * index)
        beta1 = tl.load(hyper + 6 * index + 1)
        beta2 = tl.load(hyper + 6 * index + 2)
        step_size = lr
        if CORRECT_BIAS:
            step_size = lr * (tl.sqrt(1.0 - _power(beta2, step)) / (1.0 - _power(beta1, step)))
        tl.store(row + TAKEN, 1.0)
        tl.store(row + BETA1, beta1.to(tl.float32))
        tl.store(row + REST1, (1.0 - beta1).to(tl.float32))
        tl.store(row + BETA2, beta2.to(tl.float32))
        tl.store(row + REST2, (1.0 - beta2).to(tl.float32))
        tl.store(row + EPS, tl.load(hyper + 6 * index + 4).to(tl.float32))
        tl.store(row + STEP_SIZE, step_size.to(tl.float32))
        tl.store(row + DECAY, (lr * tl.load(hyper + 6 * index + 5)).to(tl.float32))
        tl.store(row + GRAM_WEIGHT, (1.0 - tl.load(hyper + 6 * index + 3)).to(tl.float32))


@triton.jit
def step_scalars_kernel(
    tensors, scratch, flags_at, scalars_at, counts, hyper,
    WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, CORRECT_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tensor: the flags of its gather programs, whose first and number lie at column PROGRAMS."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.load(tensors + index * WIDTH + PROGRAMS)
    end = first + tl.load(tensors + index * WIDTH + PROGRAMS + 1)
    bad = 0.0
    for start in range(first, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        bad += tl.sum(tl.load(scratch + flags_at.to(tl.int64) + offsets, mask=offsets < end, other=0.0), 0)
    count_step(scratch + scalars_at.to(tl.int64), counts, hyper, index, bad, CORRECT_BIAS)


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [
    (
        step_scalars_kernel,
        {"tensors": "*i64", "scratch": "*fp32", "flags_at": "i64", "scalars_at": "i64", "counts": "*i64",
         "hyper": "*fp64"},
        {"WIDTH": 32, "PROGRAMS": 24, "CORRECT_BIAS": correct, "BLOCK": 1024},
    )
    for correct in (True, False)
]  # fmt: skip
