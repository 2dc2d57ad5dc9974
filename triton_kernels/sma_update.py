"""Sampling-then-moving average over a list of tensors, one launch:

    slow <- slow + alpha * (fast - slow);  fast <- slow where reset

Reads slow and fast once, writes slow once and fast once where reset: 16 bytes an element in fp32. A program takes one
block of one tensor, named by its row of a table of pointers; the dtypes are a code in that row, a branch that is
uniform in a program, so that mixed lists are still one launch. Takes slow fp32 with fast fp32, bf16, fp16 or fp64,
and slow fp64 with fast fp64; dense tensors, a pair laid out alike. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import inside, pointer
from .tables import pointer_table

BLOCK = 2048
COLUMNS = tl.constexpr(5)  # first element, elements, slow, fast, code
CODES = {
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.float32, torch.float16): 2,
    (torch.float32, torch.float64): 3,
    (torch.float64, torch.float64): 4,
}


@triton.jit
def _average(
    slow, fast, first, n, alpha, SLOW: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    RESET: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slow_ptr = pointer(slow, SLOW, V)
    fast_ptr = pointer(fast, FAST, V)
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    old = tl.load(slow_ptr + offsets, mask=mask, other=0.0).to(WIDE)
    new = tl.load(fast_ptr + offsets, mask=mask, other=0.0).to(WIDE)
    value = (old + alpha.to(WIDE) * (new - old)).to(SLOW)
    tl.store(slow_ptr + offsets, value, mask=mask)
    if RESET:
        tl.store(fast_ptr + offsets, value.to(FAST), mask=mask)


@triton.jit
def _block(slow, fast, first, n, alpha, code, RESET: tl.constexpr, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    V: tl.constexpr = 4 if VECTORS else 1
    V64: tl.constexpr = 2 if VECTORS else 1
    if code == 0:
        _average(slow, fast, first, n, alpha, tl.float32, tl.float32, tl.float32, RESET, V, BLOCK)
    elif code == 1:
        _average(slow, fast, first, n, alpha, tl.float32, tl.bfloat16, tl.float32, RESET, V, BLOCK)
    elif code == 2:
        _average(slow, fast, first, n, alpha, tl.float32, tl.float16, tl.float32, RESET, V, BLOCK)
    elif code == 3:
        _average(slow, fast, first, n, alpha, tl.float32, tl.float64, tl.float64, RESET, V64, BLOCK)
    else:
        _average(slow, fast, first, n, alpha, tl.float64, tl.float64, tl.float64, RESET, V64, BLOCK)


@triton.jit
def sma_update_kernel(table_ptr, alpha_bits: tl.int64, RESET: tl.constexpr, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.multiple_of(tl.load(row), BLOCK)
    n = tl.load(row + 1)
    slow = tl.load(row + 2)
    fast = tl.load(row + 3)
    code = tl.load(row + 4)
    alpha = tl.cast(alpha_bits.to(tl.int64), tl.float64, bitcast=True)  # a float argument would arrive in fp32
    if (first + BLOCK <= n) & ((slow | fast) % 16 == 0):
        _block(slow, fast, first, n, alpha, code, RESET, True, BLOCK)
    else:
        _block(slow, fast, first, n, alpha, code, RESET, False, BLOCK)


def sma_update_(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> bool:
    """Averages every pair in place. The lists are validated by the caller. Always True."""
    rows = [(s.data_ptr(), f.data_ptr(), CODES[s.dtype, f.dtype]) for s, f in zip(slow, fast, strict=True)]
    sizes = [s.numel() for s in slow]
    if not sum(sizes):
        return True
    table = pointer_table(rows, sizes, BLOCK, slow[0].device)
    bits = struct.unpack("<q", struct.pack("<d", alpha))[0]
    with torch.cuda.device_of(slow[0]):
        sma_update_kernel[(table.shape[0],)](table, bits, reset, BLOCK, num_warps=4, enable_fp_fusion=False)
    return True


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [
    (
        sma_update_kernel,
        {"table_ptr": "*i64", "alpha_bits": "i64"},
        {"RESET": reset, "BLOCK": BLOCK},
    )
    for reset in (True, False)
]
