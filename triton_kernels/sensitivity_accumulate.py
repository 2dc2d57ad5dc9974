"""Sums of the weights' sensitivities over a list of tensors, one launch:

    s <- s + |w * g|  (taylor),  g * g  (fisher)  or  |g|  (magnitude);  a term that is not finite counts as 0

Reads s, w and g once and writes s once: 16 bytes an element in fp32; fisher and magnitude do not read w. A program
takes one block of one tensor, named by its row of a table of pointers; the dtype is a code in that row, a branch that
is uniform in a program. Takes w and g fp32, bf16 or fp16 with s fp32, and all three fp64; s has one dimension, w and g
are dense and laid out alike. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import inside, pointer
from .tables import pointer_table

BLOCK = 2048
COLUMNS = tl.constexpr(6)  # first element, elements, s, w, g, code
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
TAYLOR, FISHER = tl.constexpr(0), tl.constexpr(1)  # of the kinds; magnitude is neither
KINDS = 3


@triton.jit
def _accumulate(
    s, w, g, first, n, TYPE: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sum_ptr = pointer(s, WIDE, V)
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    old = tl.load(sum_ptr + offsets, mask=mask, other=0.0)
    slope = tl.load(pointer(g, TYPE, V) + offsets, mask=mask, other=0.0).to(WIDE)
    if KIND == TAYLOR:
        term = tl.abs(tl.load(pointer(w, TYPE, V) + offsets, mask=mask, other=0.0).to(WIDE) * slope)
    elif KIND == FISHER:
        term = slope * slope
    else:
        term = tl.abs(slope)
    tl.store(sum_ptr + offsets, old + tl.where(term < float("inf"), term, 0.0), mask=mask)  # false for NaN


@triton.jit
def _block(s, w, g, first, n, code, KIND: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    V: tl.constexpr = 4 if VECTORS else 1
    V64: tl.constexpr = 2 if VECTORS else 1
    if code == 0:
        _accumulate(s, w, g, first, n, tl.float32, tl.float32, KIND, V, BLOCK)
    elif code == 1:
        _accumulate(s, w, g, first, n, tl.bfloat16, tl.float32, KIND, V, BLOCK)
    elif code == 2:
        _accumulate(s, w, g, first, n, tl.float16, tl.float32, KIND, V, BLOCK)
    else:
        _accumulate(s, w, g, first, n, tl.float64, tl.float64, KIND, V64, BLOCK)


@triton.jit
def sensitivity_accumulate_kernel(table_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.multiple_of(tl.load(row), BLOCK)
    n = tl.load(row + 1)
    s = tl.load(row + 2)
    w = tl.load(row + 3)
    g = tl.load(row + 4)
    code = tl.load(row + 5)
    if (first + BLOCK <= n) & ((s | w | g) % 16 == 0):
        _block(s, w, g, first, n, code, KIND, True, BLOCK)
    else:
        _block(s, w, g, first, n, code, KIND, False, BLOCK)


def sensitivity_accumulate_(s: list[Tensor], params: list[Tensor], grads: list[Tensor], kind: int) -> bool:
    """Adds to every s whose tensor has a gradient. The lists are validated by the caller. Always True."""
    triples = [x for x in zip(s, params, grads, strict=True) if x[2].numel()]
    if not triples:
        return True
    rows = [(total.data_ptr(), p.data_ptr(), g.data_ptr(), CODES[p.dtype]) for total, p, g in triples]
    table = pointer_table(rows, [p.numel() for _, p, _ in triples], BLOCK, params[0].device)
    with torch.cuda.device_of(params[0]):
        sensitivity_accumulate_kernel[(table.shape[0],)](table, kind, BLOCK, num_warps=4, enable_fp_fusion=False)
    return True


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [(sensitivity_accumulate_kernel, {"table_ptr": "*i64"}, {"KIND": kind, "BLOCK": BLOCK}) for kind in range(KINDS)]
