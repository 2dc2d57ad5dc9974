"""A step of recursive least squares of w ~ k r + d for the free embeddable elements of a partly embedded model:

    e = (w - k r) - d;  k <- k + e g0;  d <- d + e g1;  change = |e| norm

with r, g0, g1 and norm of the element's mode; one launch for the whole list. Reads w (4 bytes) and code (1), k and d
(8) of embeddable elements, writes k and d back (8) where they move, and change (4): 25 bytes an element in fp32. A
program takes a block of 1024 places: k and d hold only embeddable elements, so it ranks its own by a scan and finds
their first in `base`. The gains stay in the first-level cache. Takes w fp32, bf16 or fp16 with k, d, change fp32, and
fp64 throughout. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import inside, pointer
from .tables import pointer_table

BLOCK = 1024  # places that share a row of base
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
COLUMNS = tl.constexpr(4)  # first element, elements, w, first place
TIED, STATELESS, OUTSIDE = tl.constexpr(0x80), tl.constexpr(0x40), tl.constexpr(0x3F)
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _wide(x):
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _update(
    w, code, base_ptr, k_ptr, d_ptr, gains_ptr, change, first, n, start, modes,
    W: tl.constexpr, K: tl.constexpr, HAS_CHANGE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    places = start + offsets
    c = tl.load(pointer(code, tl.uint8, V) + places, mask=mask, other=STATELESS | OUTSIDE).to(tl.int32)
    mode = c & OUTSIDE
    embeddable = mode != OUTSIDE
    state = c & (TIED | STATELESS)
    moves = embeddable & (state == 0)
    count = embeddable.to(tl.int32)
    slots = tl.load(base_ptr + 2 * ((start + first) // BLOCK) + 1) + tl.cumsum(count, 0) - count
    row = gains_ptr + 4 * mode
    known = moves & (mode < modes)
    nan = float("nan")
    r = tl.load(row, mask=known, other=nan)
    old_k = tl.load(k_ptr + slots, mask=moves, other=0.0).to(tl.float64)
    old_d = tl.load(d_ptr + slots, mask=moves, other=0.0).to(tl.float64)
    e = (_wide(tl.load(pointer(w, W, V) + offsets, mask=mask, other=0.0)) - old_k * r) - old_d
    tl.store(k_ptr + slots, (old_k + e * tl.load(row + 1, mask=known, other=nan)).to(K), mask=moves)
    tl.store(d_ptr + slots, (old_d + e * tl.load(row + 2, mask=known, other=nan)).to(K), mask=moves)
    if HAS_CHANGE:
        distance = (tl.abs(e) * tl.load(row + 3, mask=known, other=nan)).to(K)
        kept = tl.where(embeddable & (state == TIED), float("inf"), nan).to(K)
        tl.store(pointer(change, K, V) + places, tl.where(moves, distance, kept))  # padding too


@triton.jit
def rls_update_kernel(
    table_ptr, code_ptr, base_ptr, k_ptr, d_ptr, gains_ptr, change_ptr, modes,
    W: tl.constexpr, HAS_CHANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = k_ptr.dtype.element_ty
    V: tl.constexpr = 16 // (K.primitive_bitwidth // 8)
    row = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.multiple_of(tl.load(row), BLOCK)
    n = tl.load(row + 1)
    w = tl.load(row + 2)
    start = tl.multiple_of(tl.load(row + 3), BLOCK)
    code = code_ptr.to(tl.int64)
    change = change_ptr.to(tl.int64)
    if (first + BLOCK <= n) & ((w | code | change) % 16 == 0):
        _update(w, code, base_ptr, k_ptr, d_ptr, gains_ptr, change, first, n, start, modes, W, K, HAS_CHANGE, V, BLOCK)
    else:
        _update(w, code, base_ptr, k_ptr, d_ptr, gains_ptr, change, first, n, start, modes, W, K, HAS_CHANGE, 1, BLOCK)


def rls_update_(
    params: list[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, gains: Tensor, change: Tensor | None
) -> None:
    """Updates k and d, and fills change. The tensors are validated by the caller."""
    rows, place = [], 0
    for p in params:
        rows.append((p.data_ptr(), place))
        place += triton.cdiv(p.numel(), BLOCK) * BLOCK
    if not place:
        return
    table = pointer_table(rows, [p.numel() for p in params], BLOCK, params[0].device)
    with torch.cuda.device_of(params[0]):
        rls_update_kernel[(table.shape[0],)](
            table, code, base, k, d, gains, k if change is None else change, len(gains),
            TYPES[params[0].dtype], change is not None, BLOCK, **LAUNCH,
        )  # fmt: skip


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = [
    (
        rls_update_kernel,
        {
            "table_ptr": "*i64", "code_ptr": "*u8", "base_ptr": "*i64", "k_ptr": f"*{k}", "d_ptr": f"*{k}",
            "gains_ptr": "*fp64", "change_ptr": f"*{k}", "modes": "i32",
        },
        {"W": w, "HAS_CHANGE": has_change, "BLOCK": BLOCK},
        LAUNCH,
    )
    for w, k in ((tl.float32, "fp32"), (tl.bfloat16, "fp32"), (tl.float16, "fp32"), (tl.float64, "fp64"))
    for has_change in (True, False)
]  # fmt: skip
