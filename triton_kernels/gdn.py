"""Divisive normalization across channels, and its gradients; x is [B, C, S], or [B, S, C] where the channels are last:

    norm = beta + gamma v,  v = x^2 (|x| where SIMPLIFIED);  y = x factor(norm)
    d_norm = dy x factor'(norm);  d_x = dy factor + v'(x) gamma^T d_norm
    d_gamma = sum over positions of d_norm v^T;  d_beta = sum of d_norm

Positions (b, s) of all images are columns of one matrix product. Forward: a program takes a tile of channels by
columns, squares x on its way into tl.dot, bounds and squares gamma likewise, and ends with the factor: x is read once
from device memory (once more from L2 for every 64 channels), y and the factor are written once. Backward: d_norm is
never stored, each program makes it again from dy, x and the factor. d_gamma: a program sums a tile over a piece of the
columns, another launch adds the pieces in their order and goes back through the bounds: no atomics, the same bits in
every run. The pieces depend on the shape alone. Where the factor was not kept, forward's kernel makes it again into
memory that is freed at the end. fp32 sums are PRECISION's (tf32 or tf32x3); those of bf16 and fp16 are in TF32, which
rounds no coarser. Products may be fused. Does not take fp64.

V: what sizes and addresses are multiples of, in elements of 16-byte loads along the axis that lies dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, COLUMNS, DEPTH = 64, 64, 32  # a tile, and the piece of its sum over channels
PIECE = 32  # columns of one step of d_gamma's sum
SUM_COLUMNS, SUM_BYTES = 1024, 64 << 20  # a piece of that sum has so many columns at least; all partial sums' bytes
LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
BLOCK = 256
RSQRT, SQRT, RECIPROCAL, IDENTITY = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _places(columns, C, S, LAST: tl.constexpr, V: tl.constexpr):
    """(of each column its element in channel 0, elements from one channel to the next); columns: of the index type"""
    if LAST:
        at = columns * C
        step = 1
    else:
        step = S
        if V > 1:
            step = tl.multiple_of(S, V)
        at = (columns // step) * C * step + columns % step  # in this order, of the index type
        if V > 1:
            at = tl.max_contiguous(tl.multiple_of(at, V), V)
    return at, step


@triton.jit
def _inside(columns, end, V: tl.constexpr):
    if V > 1:
        end = tl.multiple_of(end, V)
    return columns < end


@triton.jit
def _channels(first, SIZE: tl.constexpr):
    return first + tl.arange(0, SIZE)


@triton.jit
def _load(ptr, at, mask, other):
    return tl.load(ptr + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _effective(stored, bound, pedestal):
    """NaN stays, as in torch.max."""
    bounded = tl.where(stored < bound, bound, stored)
    return bounded * bounded - pedestal


@triton.jit
def _magnitude(x, KIND: tl.constexpr):
    if KIND >= RECIPROCAL:
        v = tl.abs(x)
    else:
        v = x * x
    return v


@triton.jit
def _d_norm(g, x, f, KIND: tl.constexpr):
    if KIND == RSQRT:
        d = -0.5 * ((g * f) * (x * f) * f)
    elif KIND == SQRT:
        d = 0.5 * (g * x / f)
    elif KIND == RECIPROCAL:
        d = -((g * f) * (x * f))
    else:
        d = g * x
    return d


@triton.jit
def gdn_fwd_kernel(
    x_ptr, beta_ptr, gamma_ptr, y_ptr, factor_ptr, C, S, N, beta_bound, gamma_bound, pedestal,
    INDEX: tl.constexpr, KIND: tl.constexpr, LAST: tl.constexpr, WRITE: tl.constexpr, KEEP: tl.constexpr,
    V: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)).to(INDEX)
    i = _channels(tl.program_id(1) * BI, BI)
    at, step = _places(columns, C, S, LAST, V)
    inside = _inside(columns, N, V)
    acc = tl.zeros([BI, BN], dtype=tl.float32)
    for start in range(0, C, BK):
        k = _channels(start, BK)
        stored = tl.load(gamma_ptr + i[:, None] * C + k[None, :], mask=(i < C)[:, None] & (k < C)[None, :], other=0.0)
        left = tl.where((k < C)[None, :], _effective(stored, gamma_bound, pedestal), 0.0)
        x = _load(x_ptr, k.to(INDEX)[:, None] * step + at[None, :], (k < C)[:, None] & inside[None, :], 0.0)
        acc = tl.dot(left, _magnitude(x, KIND), acc, input_precision=PRECISION)
    shift = _effective(tl.load(beta_ptr + i, mask=i < C, other=1.0), beta_bound, pedestal)
    norm = acc + shift[:, None]
    if KIND == RSQRT:
        f = tl.rsqrt(norm)
    elif KIND == SQRT:
        f = tl.sqrt(norm)
    elif KIND == RECIPROCAL:
        f = 1.0 / norm
    else:
        f = norm
    mask = (i < C)[:, None] & inside[None, :]
    out = i.to(INDEX)[:, None] * step + at[None, :]
    if WRITE:
        y = _load(x_ptr, out, mask, 0.0) * f
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(factor_ptr + out, f.to(factor_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gdn_bwd_kernel(
    grad_ptr, x_ptr, factor_ptr, gamma_ptr, d_x_ptr, C, S, N, gamma_bound, pedestal,
    INDEX: tl.constexpr, KIND: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)).to(INDEX)
    i = _channels(tl.program_id(1) * BI, BI)
    at, step = _places(columns, C, S, LAST, V)
    inside = _inside(columns, N, V)
    acc = tl.zeros([BI, BN], dtype=tl.float32)
    for start in range(0, C, BK):
        k = _channels(start, BK)
        stored = tl.load(gamma_ptr + k[None, :] * C + i[:, None], mask=(i < C)[:, None] & (k < C)[None, :], other=0.0)
        left = tl.where((k < C)[None, :], _effective(stored, gamma_bound, pedestal), 0.0)
        place = k.to(INDEX)[:, None] * step + at[None, :]
        mask = (k < C)[:, None] & inside[None, :]
        g = _load(grad_ptr, place, mask, 0.0)
        x = _load(x_ptr, place, mask, 0.0)
        f = _load(factor_ptr, place, mask, 1.0)
        acc = tl.dot(left, _d_norm(g, x, f, KIND), acc, input_precision=PRECISION)
    mask = (i < C)[:, None] & inside[None, :]
    out = i.to(INDEX)[:, None] * step + at[None, :]
    x = _load(x_ptr, out, mask, 0.0)
    if KIND >= RECIPROCAL:
        slope = (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
    else:
        slope = 2.0 * x
    d_x = _load(grad_ptr, out, mask, 0.0) * _load(factor_ptr, out, mask, 0.0) + slope * acc
    tl.store(d_x_ptr + out, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gdn_bwd_sums_kernel(
    grad_ptr, x_ptr, factor_ptr, partial_ptr, C, S, N, each, row_step,
    INDEX: tl.constexpr, KIND: tl.constexpr, LAST: tl.constexpr, GAMMA: tl.constexpr, V: tl.constexpr,
    PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of d_gamma over one piece of the columns; the first programs along j sum d_beta as well."""
    piece = tl.program_id(2).to(tl.int64)
    i = _channels(tl.program_id(0) * BI, BI)
    j = _channels(tl.program_id(1) * BJ, BJ)
    acc = tl.zeros([BI, BJ], dtype=tl.float32)
    total = tl.zeros([BI], dtype=tl.float32)
    end = tl.minimum((piece + 1) * each, N)
    for first in range(piece * each, end, BN):
        columns = (first + tl.arange(0, BN)).to(INDEX)
        at, step = _places(columns, C, S, LAST, V)
        inside = _inside(columns, end, V)
        place = i.to(INDEX)[:, None] * step + at[None, :]
        mask = (i < C)[:, None] & inside[None, :]
        d = _d_norm(_load(grad_ptr, place, mask, 0.0), _load(x_ptr, place, mask, 0.0),
                    _load(factor_ptr, place, mask, 1.0), KIND)  # fmt: skip
        total += tl.sum(d, axis=1)
        if GAMMA:
            right_place = j.to(INDEX)[None, :] * step + at[:, None]
            x = _load(x_ptr, right_place, (j < C)[None, :] & inside[:, None], 0.0)
            acc = tl.dot(d, _magnitude(x, KIND), acc, input_precision=PRECISION)
    out = partial_ptr + piece * row_step
    if tl.program_id(1) == 0:
        tl.store(out + i, total, mask=i < C)
    if GAMMA:
        tl.store(out + C + i[:, None] * C + j[None, :], acc, mask=(i < C)[:, None] & (j < C)[None, :])


@triton.jit
def gdn_finish_kernel(
    partial_ptr, stored_ptr, out_ptr, first, n, step, pieces, bound, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces' sums from `first` on, and back through the bound of the stored parameter."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    total = tl.zeros([BLOCK], dtype=tl.float32)
    row = partial_ptr + first + at
    for _ in range(pieces):
        total += tl.load(row, mask=mask, other=0.0)
        row += step
    stored = tl.load(stored_ptr + at, mask=mask, other=0.0)
    grad = total * (2.0 * tl.where(stored < bound, bound, stored))
    tl.store(out_ptr + at, ((stored >= bound) | (grad < 0)).to(tl.float32) * grad, mask=mask)


def _kind(inverse: bool, simplified: bool) -> int:
    if simplified:
        return IDENTITY.value if inverse else RECIPROCAL.value
    return SQRT.value if inverse else RSQRT.value


def _index(x: Tensor) -> tl.dtype:
    """The type of offsets: 64 bits take twice the registers."""
    return tl.int32 if x.numel() + COLUMNS * x.shape[1] < 2**31 else tl.int64


def _precision(x: Tensor) -> str:
    """That of CompressAI's convolution."""
    return "tf32" if x.dtype is not torch.float32 or torch.backends.cudnn.allow_tf32 else "tf32x3"


def _sizes(x: Tensor, beta: Tensor, last: bool) -> tuple[int, int, int, int]:
    """(channels, positions of an image, columns, V)"""
    C, B = beta.numel(), x.shape[0]
    S = x.numel() // max(B * C, 1)
    return C, S, B * S, 4 if not last and S % 4 == 0 else 1


def _run_forward(
    x: Tensor, beta: Tensor, gamma: Tensor, kind: int, beta_bound: float, gamma_bound: float, pedestal: float,
    last: bool, y: Tensor | None, factor: Tensor | None,
) -> None:  # fmt: skip
    C, S, N, v = _sizes(x, beta, last)
    gdn_fwd_kernel[(triton.cdiv(N, COLUMNS), triton.cdiv(C, CHANNELS))](
        x, beta, gamma, x if y is None else y, x if factor is None else factor, C, S, N,
        beta_bound, gamma_bound, pedestal,
        _index(x), kind, last, y is not None, factor is not None, v, _precision(x), CHANNELS, COLUMNS, DEPTH, **LAUNCH,
    )  # fmt: skip


def gdn_out(
    x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool,
    beta_bound: float, gamma_bound: float, pedestal: float, last: bool, y: Tensor, factor: Tensor,
) -> None:  # fmt: skip
    """Fills y and, where it has elements, factor; all contiguous [B, C, S], or [B, S, C] where last."""
    if x.numel():
        kept = factor if factor.numel() else None
        with torch.cuda.device_of(x):
            _run_forward(
                x, beta, gamma, _kind(inverse, simplified), beta_bound, gamma_bound, pedestal, last, y, kept
            )  # fmt: skip


def _pieces(channels: int, columns: int) -> tuple[int, int]:
    """(pieces of the sum over columns, columns of each)"""
    fit = max(1, SUM_BYTES // (4 * (channels * channels + channels)))
    each = triton.cdiv(max(triton.cdiv(columns, fit), SUM_COLUMNS), PIECE) * PIECE
    return triton.cdiv(columns, each), each


def gdn_bwd_out(
    grad: Tensor, x: Tensor, factor: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, simplified: bool,
    beta_bound: float, gamma_bound: float, pedestal: float, last: bool, d_x: Tensor, d_beta: Tensor, d_gamma: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients that have elements; factor: without elements where it was not kept."""
    if x.numel() == 0:
        d_beta.zero_()
        d_gamma.zero_()
        return
    kind, precision = _kind(inverse, simplified), _precision(x)
    C, S, N, v = _sizes(x, beta, last)
    with torch.cuda.device_of(x):
        if factor.numel() == 0:
            factor = torch.empty_like(x)
            _run_forward(x, beta, gamma, kind, beta_bound, gamma_bound, pedestal, last, None, factor)
        if d_x.numel():
            gdn_bwd_kernel[(triton.cdiv(N, COLUMNS), triton.cdiv(C, CHANNELS))](
                grad, x, factor, gamma, d_x, C, S, N, gamma_bound, pedestal,
                _index(x), kind, last, v, precision, CHANNELS, COLUMNS, DEPTH, **LAUNCH,
            )  # fmt: skip
        if d_beta.numel() or d_gamma.numel():
            pieces, each = _pieces(C, N)
            partial = torch.empty((pieces, C * C + C), dtype=torch.float32, device=x.device)
            tiles = triton.cdiv(C, CHANNELS)
            wanted = d_gamma.numel() > 0
            gdn_bwd_sums_kernel[(tiles, tiles if wanted else 1, pieces)](
                grad, x, factor, partial, C, S, N, each, partial.shape[1],
                _index(x), kind, last, wanted, v, precision, CHANNELS, CHANNELS, PIECE, **LAUNCH,
            )  # fmt: skip
            for out, stored, first, bound in ((d_beta, beta, 0, beta_bound), (d_gamma, gamma, C, gamma_bound)):
                if out.numel():
                    gdn_finish_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                        partial, stored, out, first, out.numel(), C * C + C, pieces, bound, BLOCK
                    )


def _aot() -> list[tuple]:
    sizes = {"C": "i32", "S": "i32", "N": "i64", "each": "i64", "row_step": "i64"}
    bounds = {"beta_bound": "fp32", "gamma_bound": "fp32", "pedestal": "fp32"}
    finish = {"partial_ptr": "*fp32", "stored_ptr": "*fp32", "out_ptr": "*fp32", "first": "i32", "n": "i32"}
    finish |= {"step": "i64", "pieces": "i32", "bound": "fp32"}
    cases = [(gdn_finish_kernel, finish, {"BLOCK": BLOCK}, {"enable_fp_fusion": True})]
    for x, precision, kind, last, index in (
        ("fp32", "tf32", RSQRT, False, tl.int32),
        ("fp32", "tf32x3", SQRT, False, tl.int64),
        ("fp32", "tf32", RECIPROCAL, True, tl.int32),
        ("bf16", "tf32", RSQRT, False, tl.int32),
        ("fp16", "tf32", IDENTITY, True, tl.int32),
    ):
        names = ("x_ptr", "y_ptr", "factor_ptr", "grad_ptr", "d_x_ptr")
        parameters = {"beta_ptr": "*fp32", "gamma_ptr": "*fp32", "partial_ptr": "*fp32"}
        types = {**dict.fromkeys(names, f"*{x}"), **parameters, **sizes, **bounds}
        same = {
            "INDEX": index,
            "KIND": kind.value,
            "LAST": last,
            "V": 1 if last else 4,
            "PRECISION": precision,
            "BI": CHANNELS,
        }
        tile = {**same, "BN": COLUMNS, "BK": DEPTH}
        cases.append((gdn_fwd_kernel, types, {**tile, "WRITE": True, "KEEP": True}, LAUNCH))
        cases.append((gdn_bwd_kernel, types, tile, LAUNCH))
        sums = {**same, "BJ": CHANNELS, "BN": PIECE}
        cases.append((gdn_bwd_sums_kernel, types, {**sums, "GAMMA": True}, LAUNCH))
    for write, keep in ((True, False), (False, True)):  # of the last one: no gradient wanted, the factor made again
        cases.append((gdn_fwd_kernel, types, {**tile, "WRITE": write, "KEEP": keep}, LAUNCH))
    cases.append((gdn_bwd_sums_kernel, types, {**sums, "GAMMA": False}, LAUNCH))
    return cases


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = _aot()
