"""A step of a partly embedded model over a list of tensors (reference/stdet.py), two launches:

    free elements   m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2
                    p <- p - step_size m / (scale sqrt(v) + eps);  slow <- slow + alpha (p - slow);  p <- slow
    tied elements   k r + d, r the new value of their mode's reference

First one program computes the references' new values from the old state, with the same function, into 128 floats. Then
a program takes a block of places; an element's slot in the compact tensors is its block's `base` plus how many such
elements precede it: a scan of both counts packed in one word. Bytes an element, fp32: free 29 (code 1, g 4, p, m, v 8
each), with slow 37 (33 where alpha is 1); tied 13, with slow 17; neither, 1. What an element does not need is not read,
so every access is under a mask and of one element, neighbouring lanes on neighbouring elements: full sectors whatever
the alignment, which compact slots do not have. With 98 registers two programs fit a multiprocessor: 65 to 75 % of copy
bandwidth are expected, not measured.

Hyperparameters change at every step: they are a table of their own, the only copy that a step sends where gradients
stay in place. A CUDA graph repeats those it was captured with. Parameters and gradients of one dtype, fp32, bf16
or fp16, all else fp32, dense, laid out alike. A reference outside its list, and a mode outside [0, M), gives NaN and
reads nothing. FP fusion is off: rounds like eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plans

BLOCK = 1024
TIED = tl.constexpr(0x80)
STATELESS = tl.constexpr(0x40)
OUTSIDE = tl.constexpr(0x3F)
PADDING = tl.constexpr(0x7F)
MODES = 64  # with OUTSIDE, which has no value
TILE = tl.constexpr(3)  # columns: tensor, first element, elements
TENSOR = tl.constexpr(2)  # columns: elements, first block
POINTERS = tl.constexpr(3)  # columns: parameter, gradient, slow; 0 where there is none
HYPER = tl.constexpr(7)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _adam(p, g, m, v, row):
    """(p, m, v) after the step; row: where the tensor's hyperparameters are, or each element's own."""
    l2 = tl.load(row + 5)
    decay = tl.load(row + 6)
    beta1 = tl.load(row + 1)
    beta2 = tl.load(row + 2)
    g = tl.where(l2 != 0, g + l2.to(tl.float32) * p, g)  # compared in fp64, as the specification does
    p = tl.where(decay != 0, p - decay.to(tl.float32) * p, p)
    m = m + (1.0 - beta1).to(tl.float32) * (g - m)
    v = beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * (g * g)
    scale = tl.load(row + 3).to(tl.float32)
    eps = tl.load(row + 4).to(tl.float32)
    return p - tl.load(row).to(tl.float32) * tl.div_rn(m, tl.sqrt_rn(v) * scale + eps), m, v


@triton.jit
def _averaged(s, p, alpha):
    return s + alpha * (p - s)


@triton.jit
def stdet_references_kernel(
    tensors, pointers, hyper, code, exp_avg, exp_avg_sq, refs, values, count, states, modes, alpha,
    TYPE: tl.constexpr, STEP: tl.constexpr, SLOW: tl.constexpr, MOVES: tl.constexpr, RESET: tl.constexpr,
    BLOCK: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    """values [2, MODES]: r for the parameters (slow's where they are reset to it), r for slow; NaN for no reference."""
    mode = tl.arange(0, MODES)
    listed = mode < modes
    index = tl.load(refs + 3 * mode, mask=listed, other=-1)
    i = tl.load(refs + 3 * mode + 1, mask=listed, other=-1)
    known = (index >= 0) & (index < count)
    index = tl.where(known, index, 0)
    known &= (i >= 0) & (i < tl.load(tensors + TENSOR * index, mask=known, other=0))
    first = tl.load(tensors + TENSOR * index + 1, mask=known, other=0) * BLOCK
    c = tl.load(code + first + i, mask=known, other=PADDING).to(tl.int32)
    p_at = tl.load(pointers + POINTERS * index, mask=known, other=0).to(tl.pointer_type(TYPE)) + i
    raw = tl.load(p_at, mask=known, other=0.0)
    if STEP:
        grad = tl.load(pointers + POINTERS * index + 1, mask=known, other=0)
        steps = known & (grad != 0) & ((c & (TIED | STATELESS)) == 0)
        slot = tl.load(refs + 3 * mode + 2, mask=listed, other=-1)
        known &= (steps == 0) | ((slot >= 0) & (slot < states))
        steps &= known
        g = tl.load(grad.to(tl.pointer_type(TYPE)) + i, mask=steps, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + slot, mask=steps, other=0.0)
        v = tl.load(exp_avg_sq + slot, mask=steps, other=0.0)
        new, m, v = _adam(raw.to(tl.float32), g, m, v, hyper + HYPER * index)
        raw = tl.where(steps, new.to(TYPE), raw)
    r = raw.to(tl.float32)
    if SLOW:
        slow = tl.load(pointers + POINTERS * index + 2, mask=known, other=0).to(tl.pointer_type(tl.float32))
        s = tl.load(slow + i, mask=known, other=0.0)
        s = tl.where((c & TIED) != 0, s, _averaged(s, r, alpha) if MOVES else r)
        tl.store(values + MODES + mode, tl.where(known, s, float("nan")))
        if RESET:
            r = s
    tl.store(values + mode, tl.where(known, r, float("nan")))


@triton.jit
def _left(tile, BLOCK: tl.constexpr):
    """The elements that the block has."""
    return tl.minimum(tl.load(tile + 2) - tl.load(tile + 1), BLOCK).to(tl.int32)


# An aligned `code` would be read four bytes a thread, and all tensors with it: each through shared memory, to lie one
# after the other again when it is stored.
@triton.jit(do_not_specialize_on_alignment=["code"])
def stdet_step_kernel(
    tiles, pointers, hyper, code, base, k, d, exp_avg, exp_avg_sq, values, alpha,
    TYPE: tl.constexpr, STEP: tl.constexpr, SLOW: tl.constexpr, MOVES: tl.constexpr, RESET: tl.constexpr,
    BLOCK: tl.constexpr, MODES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    index = tl.load(tiles + block * TILE)
    first = tl.load(tiles + block * TILE + 1)
    left = _left(tiles + block * TILE, BLOCK)
    at = tl.arange(0, BLOCK)
    inside = at < left
    c = tl.load(code + block * BLOCK + at, mask=inside, other=PADDING).to(tl.int32)
    tied = (c & TIED) != 0
    embeddable = (c & OUTSIDE) != OUTSIDE
    own = ((c & STATELESS) == 0).to(tl.int32) + (embeddable.to(tl.int32) << 16)
    before = tl.cumsum(own, 0) - own
    param = tl.load(pointers + POINTERS * index).to(tl.pointer_type(TYPE)) + first
    touched = tied

    coefficient = before >> 16
    coefficients = tied & embeddable
    embedding = tl.load(base + 2 * block + 1)
    factor = tl.load(k + embedding + coefficient, mask=coefficients, other=0.0)
    shift = tl.load(d + embedding + coefficient, mask=coefficients, other=0.0)
    value = (factor * tl.load(values + (c & OUTSIDE), mask=tied, other=0.0) + shift).to(TYPE)
    if STEP:
        grad = tl.load(pointers + POINTERS * index + 1)
        state = tl.load(base + 2 * block)
        slot = before & 0xFFFF
        averages = inside & (tied == 0)
        steps = (at < tl.where(grad != 0, left, 0)) & ((c & (TIED | STATELESS)) == 0)
        touched |= steps
        p = tl.load(param + at, mask=averages if SLOW else steps, other=0.0)
        g = tl.load(grad.to(tl.pointer_type(TYPE)) + first + at, mask=steps, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + state + slot, mask=steps, other=0.0)
        v = tl.load(exp_avg_sq + state + slot, mask=steps, other=0.0)
        new, m, v = _adam(p.to(tl.float32), g, m, v, hyper + HYPER * index)
        tl.store(exp_avg + state + slot, m, mask=steps)
        tl.store(exp_avg_sq + state + slot, v, mask=steps)
        p = tl.where(steps, new.to(TYPE), p)
        if SLOW:
            slow = tl.load(pointers + POINTERS * index + 2).to(tl.pointer_type(tl.float32)) + first
            s = p.to(tl.float32)
            if MOVES:
                s = _averaged(tl.load(slow + at, mask=averages, other=0.0), s, alpha)
            again = factor * tl.load(values + MODES + (c & OUTSIDE), mask=tied, other=0.0) + shift
            tl.store(slow + at, tl.where(tied, again, s), mask=inside)
            if RESET and MOVES:
                p = s.to(TYPE)
                touched |= averages
        value = tl.where(tied, value, p)
    tl.store(param + at, value, mask=touched)


@triton.jit(do_not_specialize_on_alignment=["code"])
def stdet_mask_kernel(tiles, pointers, code, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A byte an element, and a zero where it is tied."""
    block = tl.program_id(0).to(tl.int64)
    tile = tiles + block * TILE
    grad = tl.load(pointers + tl.load(tile))
    if grad != 0:
        at = tl.arange(0, BLOCK)
        c = tl.load(code + block * BLOCK + at, mask=at < _left(tile, BLOCK), other=PADDING).to(tl.int32)
        zero = tl.zeros([BLOCK], dtype=tl.float32).to(TYPE)
        tl.store(grad.to(tl.pointer_type(TYPE)) + tl.load(tile + 1) + at, zero, mask=(c & TIED) != 0)


def _plan(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(a row for each block of flat places, a row for each tensor)."""

    def build() -> tuple[Tensor, Tensor]:
        tiles, rows = [], []
        for t, n in enumerate(sizes):
            rows.append((n, len(tiles)))
            tiles += [(t, first, n) for first in range(0, n, BLOCK)]
        return plans.table(tiles, TILE.value, device), plans.table(rows, TENSOR.value, device)

    return plans.plan(("stdet", sizes), device, build)


def _addresses(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, ...]:
    """Those of tensors without their elements are 0."""
    return tuple([t.data_ptr() if t.numel() == n else 0 for t, n in zip(tensors, sizes, strict=True)])


def _launch(
    params: Sequence[Tensor], grads: Sequence[Tensor], slow: Sequence[Tensor], code: Tensor, base: Tensor,
    k: Tensor, d: Tensor, moments: tuple[Tensor, Tensor] | None, refs: Tensor, hyper: Tensor | None,
    alpha: float, reset: bool,
) -> None:  # fmt: skip
    device, sizes = code.device, tuple([p.numel() for p in params])
    tiles, tensors = _plan(sizes, device)
    if not len(tiles):
        return
    none = (0,) * len(sizes)
    pointers = plans.numbers(
        device, _addresses(params, sizes), _addresses(grads, sizes) if grads else none,
        _addresses(slow, sizes) if slow else none,
    )  # fmt: skip
    exp_avg, exp_avg_sq = moments or (k, d)  # never read without a step
    table = k if hyper is None else _sent(hyper, device)
    values = torch.empty(2 * MODES, dtype=torch.float32, device=device)
    how = (TYPES[params[0].dtype], hyper is not None, bool(slow), alpha != 1.0, reset, BLOCK, MODES)
    with torch.cuda.device_of(code):
        stdet_references_kernel[(1,)](
            tensors, pointers, table, code, exp_avg, exp_avg_sq, refs, values, len(sizes), len(exp_avg), len(refs),
            alpha, *how, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
        stdet_step_kernel[(len(tiles),)](
            tiles, pointers, table, code, base, k, d, exp_avg, exp_avg_sq, values, alpha, *how, **LAUNCH
        )  # fmt: skip


def _sent(hyper: Tensor, device: torch.device) -> Tensor:
    """The table of hyperparameters [n, 7] fp64 on the device: its bits are sent like a list of pointers."""
    columns = hyper.view(torch.int64).t().tolist()
    return plans.numbers(device, *map(tuple, columns)).view(torch.float64)


def stdet_adam_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], slow: Sequence[Tensor], code: Tensor, base: Tensor,
    k: Tensor, d: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, refs: Tensor, hyper: Tensor, alpha: float, reset: bool,
) -> None:  # fmt: skip
    """One step of the whole list, without a wait. The arguments are validated by the caller."""
    _launch(params, grads, slow, code, base, k, d, (exp_avg, exp_avg_sq), refs, hyper, alpha, reset)


def stdet_reconstruct_(
    params: Sequence[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor
) -> None:
    """Tied elements become k * r + d; all others keep their bits."""
    _launch(params, (), (), code, base, k, d, None, refs, None, 1.0, False)


def stdet_mask_(grads: Sequence[Tensor], code: Tensor, sizes: Sequence[int]) -> None:
    """The gradients of tied elements become 0."""
    tiles, _ = _plan(tuple(sizes), code.device)
    if len(tiles):
        pointers = plans.numbers(code.device, _addresses(grads, sizes))
        with torch.cuda.device_of(code):
            stdet_mask_kernel[(len(tiles),)](tiles, pointers, code, TYPES[grads[0].dtype], BLOCK, **LAUNCH)


def _aot() -> list[tuple]:
    types = {name: "*i64" for name in ("tiles", "tensors", "pointers", "base", "refs")} | {"code": "*u8"}
    types |= {name: "*fp32" for name in ("k", "d", "exp_avg", "exp_avg_sq", "values")}
    types |= {"hyper": "*fp64", "alpha": "fp32", "count": "i32", "states": "i64", "modes": "i32"}
    cases = [(stdet_mask_kernel, types, {"TYPE": TYPES[dtype], "BLOCK": BLOCK}, LAUNCH) for dtype in TYPES]
    for kernel, options in ((stdet_references_kernel, {"num_warps": 2}), (stdet_step_kernel, LAUNCH)):
        for dtype, step, slow, moves, reset in (
            (torch.float32, True, True, True, True),
            (torch.float32, True, True, True, False),
            (torch.float32, True, True, False, True),
            (torch.float32, True, False, False, False),
            (torch.float32, False, False, False, False),
            (torch.bfloat16, True, True, True, True),
            (torch.bfloat16, False, False, False, False),
            (torch.float16, True, True, True, True),
        ):
            how = {"TYPE": TYPES[dtype], "STEP": step, "SLOW": slow, "MOVES": moves, "RESET": reset}
            cases.append((kernel, types, {**how, "BLOCK": BLOCK, "MODES": MODES}, options))
    return cases


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = _aot()
