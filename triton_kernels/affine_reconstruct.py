"""Element-wise affine reconstruction: out_i = k_i * refs[mode_i] + d_i where tied_i, else w_i; and its gradients.

Forward, fp32, tied mask given: reads w, k, d (4 bytes each), mode and tied (1 each), writes out (4): 18 bytes an
element, every byte once; refs (M values) stay in the first-level cache. A list is one launch over a table of pointers
(one for each dtype of mode). Backward: one launch for the gradients of w, k, d; one for refs: a program adds its
elements mode by mode in fp64 with a reduction of fixed shape, the programs' sums are added by torch, so that every run
gives the same bits. More than MODES modes are taken MODES at a time by the first dimension of the grid. A mode
outside [0, M) gives NaN and never reads outside refs. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .access import inside, pointer
from .tables import pointer_table

BLOCK = 1024
# four elements a thread: with more, the vectors of mode and tied are wider than those of out, and go by shared memory
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
SUM_BLOCK = 256
SUM_PROGRAMS = 1024
SUM_PARTIALS = 1 << 22  # 32 MiB of partial sums at the most
MODES = 16
COLUMNS = tl.constexpr(7)  # first element, elements, w, k, d, mode, tied
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
}


@triton.jit
def _look_up(refs_ptr, mode, modes, mask, WIDE: tl.constexpr):
    index = mode.to(tl.int32)
    inside = (index >= 0) & (index < modes)
    r = tl.load(refs_ptr + index, mask=mask & inside, other=0.0).to(WIDE)
    return tl.where(inside, r, float("nan"))


@triton.jit
def _forward_block(
    w, out, k, d, mode, tied, refs_ptr, first, n, modes, W: tl.constexpr, P: tl.constexpr, MODE: tl.constexpr,
    HAS_TIED: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    factor = tl.load(pointer(k, P, V) + offsets, mask=mask, other=0.0).to(WIDE)
    shift = tl.load(pointer(d, P, V) + offsets, mask=mask, other=0.0).to(WIDE)
    which = tl.load(pointer(mode, MODE, V) + offsets, mask=mask, other=0)
    value = (factor * _look_up(refs_ptr, which, modes, mask, WIDE) + shift).to(W)
    if HAS_TIED:
        picked = tl.load(pointer(tied, tl.uint8, V) + offsets, mask=mask, other=0)
        value = tl.where(picked != 0, value, tl.load(pointer(w, W, V) + offsets, mask=mask, other=0.0))
    tl.store(pointer(out, W, V) + offsets, value, mask=mask)


@triton.jit
def _forward(
    w, out, k, d, mode, tied, refs_ptr, first, n, modes, W: tl.constexpr, P: tl.constexpr, MODE: tl.constexpr,
    HAS_TIED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block; the tensors are addresses."""
    V: tl.constexpr = 16 // (WIDE.primitive_bitwidth // 8)
    if (first + BLOCK <= n) & ((w | out | k | d | mode | tied) % 16 == 0):
        _forward_block(w, out, k, d, mode, tied, refs_ptr, first, n, modes, W, P, MODE, HAS_TIED, WIDE, V, BLOCK)
    else:
        _forward_block(w, out, k, d, mode, tied, refs_ptr, first, n, modes, W, P, MODE, HAS_TIED, WIDE, 1, BLOCK)


@triton.jit
def affine_reconstruct_fwd_kernel(
    w_ptr, out_ptr, k_ptr, d_ptr, mode_ptr, tied_ptr, refs_ptr, n, modes,
    HAS_TIED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    _forward(
        w_ptr.to(tl.int64), out_ptr.to(tl.int64), k_ptr.to(tl.int64), d_ptr.to(tl.int64), mode_ptr.to(tl.int64),
        tied_ptr.to(tl.int64), refs_ptr, first, n, modes, out_ptr.dtype.element_ty, k_ptr.dtype.element_ty,
        mode_ptr.dtype.element_ty, HAS_TIED, WIDE, BLOCK,
    )  # fmt: skip


@triton.jit
def affine_reconstruct_list_kernel(
    table_ptr, refs_ptr, modes,
    W: tl.constexpr, P: tl.constexpr, MODE: tl.constexpr,
    HAS_TIED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    first = tl.multiple_of(tl.load(row), BLOCK)
    n = tl.load(row + 1)
    w = tl.load(row + 2)
    k = tl.load(row + 3)
    d = tl.load(row + 4)
    mode = tl.load(row + 5)
    tied = tl.load(row + 6)
    _forward(w, w, k, d, mode, tied, refs_ptr, first, n, modes, W, P, MODE, HAS_TIED, WIDE, BLOCK)


@triton.jit
def _backward_block(
    grad, mode, tied, refs_ptr, grad_w, grad_k, grad_d, first, n, modes,
    W: tl.constexpr, P: tl.constexpr, MODE: tl.constexpr,
    HAS_TIED: tl.constexpr, WANT_W: tl.constexpr, WANT_K: tl.constexpr, WANT_D: tl.constexpr,
    WIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = first + tl.arange(0, BLOCK)
    mask = inside(offsets, n, V)
    g = tl.load(pointer(grad, W, V) + offsets, mask=mask, other=0.0)
    picked = mask
    if HAS_TIED:
        picked = tl.load(pointer(tied, tl.uint8, V) + offsets, mask=mask, other=0) != 0
    if WANT_W:
        tl.store(pointer(grad_w, W, V) + offsets, tl.where(picked, 0.0, g).to(W), mask=mask)
    if WANT_K:
        which = tl.load(pointer(mode, MODE, V) + offsets, mask=mask, other=0)
        value = tl.where(picked, g.to(WIDE) * _look_up(refs_ptr, which, modes, mask, WIDE), 0.0)
        tl.store(pointer(grad_k, P, V) + offsets, value.to(P), mask=mask)
    if WANT_D:
        value = tl.where(picked, g.to(WIDE), 0.0)
        tl.store(pointer(grad_d, P, V) + offsets, value.to(P), mask=mask)


@triton.jit
def affine_reconstruct_bwd_kernel(
    grad_ptr, mode_ptr, tied_ptr, refs_ptr, grad_w_ptr, grad_k_ptr, grad_d_ptr, n, modes,
    HAS_TIED: tl.constexpr, WANT_W: tl.constexpr, WANT_K: tl.constexpr, WANT_D: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = grad_ptr.dtype.element_ty
    P: tl.constexpr = grad_k_ptr.dtype.element_ty
    MODE: tl.constexpr = mode_ptr.dtype.element_ty
    V: tl.constexpr = 16 // (WIDE.primitive_bitwidth // 8)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    grad = grad_ptr.to(tl.int64)
    mode = mode_ptr.to(tl.int64)
    tied = tied_ptr.to(tl.int64)
    w = grad_w_ptr.to(tl.int64)
    k = grad_k_ptr.to(tl.int64)
    d = grad_d_ptr.to(tl.int64)
    if (first + BLOCK <= n) & ((grad | mode | tied | w | k | d) % 16 == 0):
        _backward_block(
            grad, mode, tied, refs_ptr, w, k, d, first, n, modes, W, P, MODE, HAS_TIED, WANT_W, WANT_K, WANT_D,
            WIDE, V, BLOCK,
        )  # fmt: skip
    else:
        _backward_block(
            grad, mode, tied, refs_ptr, w, k, d, first, n, modes, W, P, MODE, HAS_TIED, WANT_W, WANT_K, WANT_D,
            WIDE, 1, BLOCK,
        )  # fmt: skip


@triton.jit
def affine_reconstruct_refs_kernel(
    grad_ptr, k_ptr, mode_ptr, tied_ptr, partial_ptr, n, modes,
    HAS_TIED: tl.constexpr, WIDE: tl.constexpr, MODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * MODES + tl.arange(0, MODES)
    sums = tl.zeros([MODES], dtype=tl.float64)
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    for first in range(tl.program_id(1).to(tl.int64) * BLOCK, n, step):
        offsets = first + tl.arange(0, BLOCK)
        mask = offsets < n
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(WIDE)
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(WIDE)
        mode = tl.load(mode_ptr + offsets, mask=mask, other=0).to(tl.int32)
        picked = mask
        if HAS_TIED:
            picked = mask & (tl.load(tied_ptr + offsets, mask=mask, other=0) != 0)
        term = (k * grad).to(tl.float64)
        hit = picked[:, None] & (mode[:, None] == columns[None, :])
        sums += tl.sum(tl.where(hit, term[:, None], 0.0), axis=0)
    row = partial_ptr + tl.program_id(1).to(tl.int64) * modes
    tl.store(row + columns, sums, mask=columns < modes)


def _wide(k: Tensor) -> tl.dtype:
    return tl.float64 if k.dtype is torch.float64 else tl.float32


def _bytes(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if mask is None else mask.view(torch.uint8)


def affine_reconstruct_out(
    w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None, out: Tensor
) -> bool:
    """Fills `out` [*]; all tensors dense and laid out alike. Always True (a bad mode gives NaN)."""
    n = w.numel()
    if n:
        with torch.cuda.device_of(w):
            affine_reconstruct_fwd_kernel[(triton.cdiv(n, BLOCK),)](
                w, out, k, d, mode, _bytes(tied, mode), refs, n, refs.numel(),
                tied is not None, _wide(k), BLOCK, **LAUNCH,
            )  # fmt: skip
    return True


def affine_reconstruct_(
    w: list[Tensor], k: list[Tensor], d: list[Tensor], mode: list[Tensor], refs: Tensor, tied: list[Tensor]
) -> int:
    """Fills every w in place, one launch for each dtype of mode. Always 0 (a bad mode gives NaN)."""
    masks = tied or mode  # never read without masks
    for mode_dtype in dict.fromkeys(m.dtype for m in mode):
        picked = [i for i, m in enumerate(mode) if m.dtype is mode_dtype]
        rows = [tuple(t[i].data_ptr() for t in (w, k, d, mode, masks)) for i in picked]
        sizes = [w[i].numel() for i in picked]
        if not sum(sizes):
            continue
        table = pointer_table(rows, sizes, BLOCK, refs.device)
        with torch.cuda.device_of(refs):
            affine_reconstruct_list_kernel[(table.shape[0],)](
                table, refs, refs.numel(), TYPES[w[0].dtype], TYPES[refs.dtype], TYPES[mode_dtype],
                bool(tied), _wide(refs), BLOCK, **LAUNCH,
            )  # fmt: skip
    return 0


def affine_reconstruct_bwd_out(
    grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None,
    grad_w: Tensor, grad_k: Tensor, grad_d: Tensor, grad_refs: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients that have elements; grad_refs [M] is fp64."""
    n, modes = grad.numel(), refs.numel()
    mask = _bytes(tied, mode)
    want = [t.numel() > 0 for t in (grad_w, grad_k, grad_d)]
    with torch.cuda.device_of(grad):
        if any(want):
            affine_reconstruct_bwd_kernel[(triton.cdiv(n, BLOCK),)](
                grad, mode, mask, refs, grad_w, grad_k, grad_d, n, modes,
                tied is not None, *want, _wide(k), BLOCK, **LAUNCH,
            )  # fmt: skip
        if grad_refs.numel():
            programs = max(1, min(SUM_PROGRAMS, SUM_PARTIALS // modes, triton.cdiv(n, SUM_BLOCK)))
            partial = torch.empty((programs, modes), dtype=torch.float64, device=grad.device)
            affine_reconstruct_refs_kernel[(triton.cdiv(modes, MODES), programs)](
                grad, k, mode, mask, partial, n, modes,
                tied is not None, _wide(k), MODES, SUM_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
            torch.sum(partial, 0, out=grad_refs)


def _aot() -> list[tuple]:
    cases = []
    for w, k, wide in (
        ("fp32", "fp32", tl.float32),
        ("bf16", "fp32", tl.float32),
        ("fp64", "fp64", tl.float64),
    ):
        pointers = {"mode_ptr": "*u8", "tied_ptr": "*u8", "refs_ptr": f"*{k}", "n": "i64", "modes": "i32"}
        forward = {"w_ptr": f"*{w}", "out_ptr": f"*{w}", "k_ptr": f"*{k}", "d_ptr": f"*{k}"}
        values = {"HAS_TIED": True, "WIDE": wide, "BLOCK": BLOCK}
        cases.append((affine_reconstruct_fwd_kernel, forward | pointers, values, LAUNCH))
        types = {"W": getattr(tl, _NAMES[w]), "P": getattr(tl, _NAMES[k]), "MODE": tl.uint8}
        table = {"table_ptr": "*i64", "refs_ptr": f"*{k}", "modes": "i32"}
        cases.append((affine_reconstruct_list_kernel, table, types | values, LAUNCH))
        grads = {"grad_ptr": f"*{w}", "grad_w_ptr": f"*{w}", "grad_k_ptr": f"*{k}", "grad_d_ptr": f"*{k}"}
        wants = {"WANT_W": True, "WANT_K": True, "WANT_D": True}
        cases.append((affine_reconstruct_bwd_kernel, grads | pointers, wants | values, LAUNCH))
        sums = {"grad_ptr": f"*{w}", "k_ptr": f"*{k}", "partial_ptr": "*fp64"} | pointers
        del sums["refs_ptr"]
        cases.append((affine_reconstruct_refs_kernel, sums, {**values, "MODES": MODES, "BLOCK": SUM_BLOCK}))
    return cases


_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = _aot()
