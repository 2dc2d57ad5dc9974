"""Assignment of every weight to the mode whose reference's trajectory it correlates with most, and its affine fit.

A program takes BLOCK elements through all T snapshots, fp64 sums of MODES modes at a time in registers; more modes
read the snapshots again. Bytes an element, up to MODES modes: those of T snapshots read, 13 written (fp64: 25). Sums
are in the order of t, products and sums unfused (FP fusion is off): the same bits as in every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
MODES = 16
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _moments(x_ptr, row, epochs, first, offsets, mask):
    total = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    for t in range(1, epochs):
        y = tl.load(x_ptr + t * row + offsets, mask=mask, other=0.0).to(tl.float64) - first
        total += y
        squares += y * y
    return total, squares


@triton.jit
def _correlate(
    x_ptr, directions_ptr, row, epochs, modes, begin, first, offsets, mask,
    BLOCK: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    """The sum of largest size among MODES modes from `begin` on, and the first mode that has it."""
    columns = begin + tl.arange(0, MODES)
    num = tl.zeros([BLOCK, MODES], dtype=tl.float64)
    for t in range(1, epochs):
        y = tl.load(x_ptr + t * row + offsets, mask=mask, other=0.0).to(tl.float64) - first
        r = tl.load(directions_ptr + columns * epochs + t, mask=columns < modes, other=0.0)
        num += y[:, None] * r[None, :]
    size = tl.abs(num)
    hit = size == tl.max(size, axis=1)[:, None]
    mode = tl.min(tl.where(hit, columns[None, :], modes), axis=1)
    return tl.sum(tl.where(columns[None, :] == mode[:, None], num, 0.0), axis=1), mode


@triton.jit
def cmd_assign_kernel(
    x_ptr, directions_ptr, mean_ptr, norm_ptr, mode_ptr, k_ptr, d_ptr, correlation_ptr, n, row, epochs, modes,
    BLOCK: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    OUT: tl.constexpr = k_ptr.dtype.element_ty
    row = tl.cast(row, tl.int64)  # t * row counts elements of all snapshots
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
    total, squares = _moments(x_ptr, row, epochs, first, offsets, mask)
    num, mode = _correlate(
        x_ptr, directions_ptr, row, epochs, modes, 0, first, offsets, mask, BLOCK, MODES
    )  # fmt: skip
    for begin in range(MODES, modes, MODES):
        other, other_mode = _correlate(
            x_ptr, directions_ptr, row, epochs, modes, begin, first, offsets, mask, BLOCK, MODES
        )  # fmt: skip
        larger = tl.abs(other) > tl.abs(num)
        num = tl.where(larger, other, num)
        mode = tl.where(larger, other_mode, mode)

    count = tl.cast(epochs, tl.float64)
    spread = squares - total * total / count
    finite = squares < float("inf")  # false for NaN too
    moves = finite & (spread > 0)
    num = tl.where(moves, num, 0.0)
    mode = tl.where(moves, mode, 0)
    norm = tl.load(norm_ptr + mode)
    slope = num / tl.where(norm > 0, norm, 1.0)  # a reference that does not move: num is 0
    level = first + total / count
    shift = level - slope * tl.load(mean_ptr + mode)
    last = tl.load(x_ptr + (epochs - 1) * row + offsets, mask=mask, other=0.0).to(tl.float64)
    correlation = tl.abs(num) / tl.sqrt(tl.where(moves, spread, 1.0))
    correlation = tl.where(correlation > 1.0, 1.0, correlation)
    tl.store(mode_ptr + offsets, mode.to(tl.uint8), mask=mask)
    tl.store(k_ptr + offsets, slope.to(OUT), mask=mask)
    tl.store(d_ptr + offsets, tl.where(finite, shift, last).to(OUT), mask=mask)
    tl.store(correlation_ptr + offsets, correlation.to(OUT), mask=mask)


def cmd_assign_out(
    snapshots: Tensor, directions: Tensor, mean: Tensor, norm: Tensor,
    mode: Tensor, k: Tensor, d: Tensor, correlation: Tensor,
) -> None:  # fmt: skip
    """Fills the outputs [n]; elements of a row of snapshots [T, n] are adjacent, the rest is contiguous."""
    epochs, n = snapshots.shape
    with torch.cuda.device_of(snapshots):
        cmd_assign_kernel[(triton.cdiv(n, BLOCK),)](
            snapshots, directions, mean, norm, mode, k, d, correlation, n, snapshots.stride(0), epochs,
            directions.shape[0], BLOCK, MODES, **LAUNCH,
        )  # fmt: skip


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [
    (
        cmd_assign_kernel,
        {
            "x_ptr": f"*{x}", "directions_ptr": "*fp64", "mean_ptr": "*fp64", "norm_ptr": "*fp64", "mode_ptr": "*u8",
            "k_ptr": f"*{out}", "d_ptr": f"*{out}", "correlation_ptr": f"*{out}",
            "n": "i64", "row": "i64", "epochs": "i32", "modes": "i32",
        },
        {"BLOCK": BLOCK, "MODES": MODES},
    )
    for x, out in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64"))
]  # fmt: skip
