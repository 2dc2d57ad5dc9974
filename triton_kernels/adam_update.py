"""Adam over a list of tensors, two launches:

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- (p - step_size m / (sqrt(v) + eps)) (1 - lr weight_decay)

First a program a tensor reads the gradient (4 bytes an element), counts the step as taken, or as skipped where the
gradient is not finite, and computes the step's scalars in fp64 on the device. Then a program a block reads p, g, m, v
and writes p, m, v: 28 bytes an element in fp32. Meant for biases and other small tensors: the first launch reads a
tensor with one program. Takes fp32, bf16 and fp16 parameters and gradients with fp32 averages, dense, the four laid
out alike; not normalize_grads, nor fp64. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plans
from .access import inside, pointer
from .step_scalars import DTYPES, SCALARS, TAKEN, adam, count_step, load_float, not_finite, store_float, updated

BLOCK = 1024
FLAG_BLOCK = 4096
COLUMNS = tl.constexpr(8)  # grad's code, param's code, exp_avg, exp_avg_sq, elements


@triton.jit
def _block_is_bad(grad, code, first, n, V: tl.constexpr, BLOCK: tl.constexpr):
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    return not_finite(load_float(grad, code, offsets, mask, V), mask)


@triton.jit
def adam_flags_kernel(
    tensors, pointers, scalars, counts, hyper, CORRECT_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    code = tl.load(tensors + index * COLUMNS)
    n = tl.load(tensors + index * COLUMNS + 4)
    grad = tl.load(pointers + 2 * index)
    full = tl.where(grad % 16 == 0, n // BLOCK * BLOCK, 0)
    bad = 0
    for first in range(0, full, BLOCK):
        bad += _block_is_bad(grad, code, tl.multiple_of(first, BLOCK), n, 4, BLOCK)
    for first in range(full, n, BLOCK):
        bad += _block_is_bad(grad, code, first, n, 1, BLOCK)
    count_step(scalars, counts, hyper, index, bad, CORRECT_BIAS)


@triton.jit
def _update_block(row, param, grad, scalar, first, V: tl.constexpr, BLOCK: tl.constexpr):
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, tl.load(row + 4), V)
    code = tl.load(row + 1)
    m_ptr = pointer(tl.load(row + 2), tl.float32, V)
    v_ptr = pointer(tl.load(row + 3), tl.float32, V)
    g = load_float(grad, tl.load(row), offsets, mask, V)
    value = load_float(param, code, offsets, mask, V)
    m = tl.load(m_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
    m, v, direction = adam(g, m, v, scalar)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    store_float(param, code, offsets, updated(value, direction, scalar), mask, V)


@triton.jit
def adam_update_kernel(tiles, tensors, pointers, scalars, BLOCK: tl.constexpr):
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    index = tl.load(tile)
    scalar = scalars + index * SCALARS
    if tl.load(scalar + TAKEN) != 0:
        row = tensors + index * COLUMNS
        first = tl.multiple_of(tl.load(tile + 1), BLOCK)
        grad = tl.load(pointers + 2 * index)
        param = tl.load(pointers + 2 * index + 1)
        addresses = grad | param | tl.load(row + 2) | tl.load(row + 3)
        if (first + BLOCK <= tl.load(row + 4)) & (addresses % 16 == 0):
            _update_block(row, param, grad, scalar, first, 4, BLOCK)
        else:
            _update_block(row, param, grad, scalar, first, 1, BLOCK)


def _dense(t: Tensor) -> bool:
    steps = sorted((step, size) for step, size in zip(t.stride(), t.shape, strict=True) if size != 1)
    expected = 1
    for step, size in steps:
        if step != expected:
            return False
        expected *= size
    return True


def _build(params, grads, exp_avg, exp_avg_sq, device) -> tuple | None:
    rows, tiles = [], []
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        if p.dtype not in DTYPES or g.dtype not in DTYPES or m.dtype is not torch.float32 or v.dtype is not m.dtype:
            return None
        if any(t.shape != p.shape or t.device != device for t in (p, g, m, v)):
            return None
        same = all(t.is_contiguous() for t in (p, g, m, v)) or all(t.stride() == p.stride() for t in (g, m, v))
        if p.numel() and not (same and _dense(p)):
            return None
        rows.append((DTYPES[g.dtype], DTYPES[p.dtype], m.data_ptr(), v.data_ptr(), p.numel()))
        tiles += [(i, first) for first in range(0, p.numel(), BLOCK)]
    return plans.table(tiles, 2, device), plans.table(rows, COLUMNS.value, device)


def adam_update_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    counts: Tensor, hyper: Tensor, correct_bias: bool, normalize_grads: bool,
) -> bool:  # fmt: skip
    """One step of the whole list, without a wait; False, having launched nothing, where it is not taken."""
    if normalize_grads or not counts.is_contiguous() or not hyper.is_contiguous():
        return False
    if not params:
        return True
    device, pointer = exp_avg[0].device, Tensor.data_ptr
    key = (
        "adam", *(tuple(map(pointer, t)) for t in (exp_avg, exp_avg_sq)), tuple([p.shape for p in params]),
        *(tuple(map(Tensor.stride, t)) for t in (params, grads, exp_avg, exp_avg_sq)),
        tuple([t.dtype for t in (*params, *grads)]),
    )  # fmt: skip
    plan = plans.plan(key, device, lambda: _build(params, grads, exp_avg, exp_avg_sq, device) or ())
    if not plan:
        return False
    tiles, rows = plan
    pointers = plans.numbers(device, tuple(map(pointer, grads)), tuple(map(pointer, params)))
    scalars = torch.empty((len(params), SCALARS.value), device=device)
    with torch.cuda.device_of(exp_avg[0]):
        adam_flags_kernel[(len(params),)](
            rows, pointers, scalars, counts, hyper, correct_bias, FLAG_BLOCK, num_warps=8, enable_fp_fusion=False
        )  # fmt: skip
        if len(tiles):
            adam_update_kernel[(len(tiles),)](
                tiles, rows, pointers, scalars, BLOCK, num_warps=4, enable_fp_fusion=False
            )  # fmt: skip
    return True


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
_TYPES = {"tiles": "*i64", "tensors": "*i64", "pointers": "*i64", "scalars": "*fp32"}
AOT = [
    (adam_flags_kernel, _TYPES | {"counts": "*i64", "hyper": "*fp64"}, {"CORRECT_BIAS": c, "BLOCK": FLAG_BLOCK})
    for c in (True, False)
] + [(adam_update_kernel, _TYPES, {"BLOCK": BLOCK})]
