"""Values summed over the places by the softmax of keys, and its gradients; k is [B, K, N], v [B, V, N]:

    context[v, k] = sum over n of v[v, n] p[k, n],  p[k, n] = exp(k[k, n] - most[k]) / total[k]
    d_v[v, n] = sum over k of grad[v, k] p[k, n];  d_k[k, n] = p[k, n] (sum over v of grad[v, k] v[v, n] - inner[k])

Forward: a program has a tile of the context in registers and walks a piece of one image's places; where a key exceeds
what it has seen, what is summed so far shrinks, so that exp never overflows and k is read once. Its maxima, sums and
products go to memory, where another launch puts the pieces together, always in the same order; a single piece ends with
the result itself. Backward: a program makes a tile of d_v or of d_k, in one launch; the tiles of the same places are
neighbours, so that k and v come from device memory once and from L2 after that. No atomics: the same bits in every run.
The pieces depend on the shapes alone. Products are fused and in PRECISION: those of fp32 as torch.matmul's, tf32 or
tf32x3; those of bf16 and fp16 in tf32, which takes v as it is and leaves p as many bits as fp16 has. Tensor cores
cut what they add, so their sums go over a few products only, and are added to the others outside. No fp64.

Channels lie dense where K_LAST and V_LAST (and for the gradients DK_LAST and DV_LAST) say so, else places do. A step is
the distance from one to the next along the other axis. Of a tile [channels, places] the places run along axis 1.
KV, VV, DKV, DVV: what sizes, steps and addresses are multiples of, in elements: 16 bytes along the dense axis, or 1; CV
is the same for the wide tensors, whose last axis is K.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, PLACES = 64, 32  # a tile of the context, CHANNELS squared, and the step of its sum
COLUMNS, DEPTH = 64, 32  # places of a gradient's tile, and the step of its sum over channels
PROGRAMS = 264  # two for each multiprocessor of an H100: more pieces are not made
PARTIAL_BYTES = 64 << 20  # of all pieces' sums
TOGETHER, BLOCK = 128, 32  # pieces that are put together at a time at the most, and their channels of k
CUT = tl.constexpr(1 << 20)  # nothing to these dtypes, but the compiler leaves a sum beside a product that has it
LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


@triton.jit
def _multiple(x, V: tl.constexpr):
    """x, a multiple of V, so that the compiler sees it: a hint on a function's argument would be lost."""
    return x // V * V


@triton.jit
def _places(c, n, C, N, step, INDEX: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr):
    """(of a tile the elements of an image, which of them there are)"""
    if LAST:
        mask = (c < _multiple(C, V))[:, None] & (n < N)[None, :]
        at = n.to(INDEX)[None, :] * _multiple(step, V) + c.to(INDEX)[:, None]
    else:
        mask = (c < C)[:, None] & (n < _multiple(N, V))[None, :]
        at = c.to(INDEX)[:, None] * _multiple(step, V) + n.to(INDEX)[None, :]
    return at, mask


@triton.jit
def _load(ptr, c, n, C, N, step, other, INDEX: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr):
    at, mask = _places(c, n, C, N, step, INDEX, LAST, V)
    return tl.load(ptr + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _store(ptr, value, c, n, C, N, step, INDEX: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr):
    at, mask = _places(c, n, C, N, step, INDEX, LAST, V)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shift(most):
    """What is taken from exponents: nothing where all are -inf, since the difference of infinities is NaN."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def _shares(k, statistics, c, K):
    """Of keys [channels, places], of which those beyond the last channel are -inf, their shares of the sum."""
    most = tl.load(statistics + c, mask=c < K, other=0.0)
    total = tl.load(statistics + K + c, mask=c < K, other=1.0)
    return tl.exp(k - most[:, None]) / total[:, None]


@triton.jit
def linear_attention_context_kernel(
    k_ptr, v_ptr, context_ptr, statistics_ptr, partial_ptr, K, V, N, k_batch, k_step, v_batch, v_step, pieces, steps,
    WHOLE: tl.constexpr, INDEX: tl.constexpr, K_LAST: tl.constexpr, V_LAST: tl.constexpr,
    KV: tl.constexpr, VV: tl.constexpr, CV: tl.constexpr, PRECISION: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of an image's context over one piece of the places, or WHOLE; partial [B, pieces, V + 2, K]."""
    K = _multiple(K, CV)
    tiles_v, tiles_k = tl.cdiv(V, BC), tl.cdiv(K, BC)
    program = tl.program_id(0)
    tile_v = program % tiles_v
    tile_k = program // tiles_v % tiles_k
    part = (program // tiles_v // tiles_k).to(tl.int64)  # of all images' pieces
    image = part // pieces
    i = tile_k * BC + tl.arange(0, BC)
    j = tile_v * BC + tl.arange(0, BC)
    keys = k_ptr + image * _multiple(k_batch, KV)
    values = v_ptr + image * _multiple(v_batch, VV)
    first = (part % pieces).to(INDEX) * steps * BN
    end = tl.minimum(first + steps * BN, N)
    most = tl.full([BC], float("-inf"), tl.float32)
    total = tl.zeros([BC], tl.float32)
    acc = tl.zeros([BC, BC], tl.float32)
    for start in range(first, end, BN):
        n = start + tl.arange(0, BN)
        k = _load(keys, i, n, K, end, k_step, float("-inf"), INDEX, K_LAST, KV)
        v = _load(values, j, n, V, end, v_step, 0.0, INDEX, V_LAST, VV)
        before = most
        most = tl.maximum(most, tl.max(k, 1))  # NaN or not where there is one: p is NaN there in any case
        shift = _shift(most)
        shrink = tl.exp(before - shift)
        p = tl.exp(k - shift[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p, tl.trans(v), input_precision=PRECISION, max_num_imprecise_acc=CUT)
    at = j.to(tl.int64)[None, :] * K + i[:, None]
    mask = (i < K)[:, None] & (j < V)[None, :]
    if WHOLE:
        tl.store(context_ptr + image * V * K + at, acc / total[:, None], mask=mask)
        if tile_v == 0:
            statistics = statistics_ptr + image * 2 * K + i
            tl.store(statistics, _shift(most), mask=i < K)
            tl.store(statistics + K, total, mask=i < K)
    else:
        partial = partial_ptr + part * (V + 2) * K
        tl.store(partial + at, acc, mask=mask)
        if tile_v == 0:
            ends = partial + tl.cast(V, tl.int64) * K + i
            tl.store(ends, most, mask=i < K)
            tl.store(ends + K, total, mask=i < K)


@triton.jit
def linear_attention_context_finish_kernel(
    partial_ptr, context_ptr, statistics_ptr, K, V, pieces,
    CV: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces of BLOCK elements of a row of an image's context, put together."""
    K = _multiple(K, CV)
    blocks = tl.cdiv(K, BLOCK)
    program = tl.program_id(0)
    k = program % blocks * BLOCK + tl.arange(0, BLOCK)
    row = (program // blocks).to(tl.int64)  # of all images' rows
    image = row // V
    size = (tl.cast(V, tl.int64) + 2) * K
    partial = partial_ptr + image * pieces * size + k[None, :]
    ends = partial + tl.cast(V, tl.int64) * K
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, pieces, TOGETHER):
        piece = first + tl.arange(0, TOGETHER)
        mask = (piece < pieces)[:, None] & (k < K)[None, :]
        each = tl.load(ends + piece.to(tl.int64)[:, None] * size, mask=mask, other=float("-inf"))
        most = tl.maximum(most, tl.max(each, 0))
    shift = _shift(most)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, pieces, TOGETHER):
        piece = first + tl.arange(0, TOGETHER)
        mask = (piece < pieces)[:, None] & (k < K)[None, :]
        at = piece.to(tl.int64)[:, None] * size
        share = tl.exp(tl.load(ends + at, mask=mask, other=float("-inf")) - shift[None, :])
        total += tl.sum(share * tl.load(ends + at + K, mask=mask, other=0.0), 0)
        acc += tl.sum(share * tl.load(partial + at + row % V * K, mask=mask, other=0.0), 0)
    tl.store(context_ptr + row * K + k, acc / total, mask=k < K)
    if row % V == 0:
        statistics = statistics_ptr + image * 2 * K + k
        tl.store(statistics, shift, mask=k < K)
        tl.store(statistics + K, total, mask=k < K)


@triton.jit
def linear_attention_context_bwd_kernel(
    grad_ptr, k_ptr, v_ptr, inner_ptr, statistics_ptr, d_k_ptr, d_v_ptr, K, V, N, k_batch, k_step, v_batch, v_step,
    INDEX: tl.constexpr, K_LAST: tl.constexpr, V_LAST: tl.constexpr, DK_LAST: tl.constexpr, DV_LAST: tl.constexpr,
    KV: tl.constexpr, VV: tl.constexpr, DKV: tl.constexpr, DVV: tl.constexpr, CV: tl.constexpr,
    PRECISION: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of d_v or of d_k; of each stretch of places first all of d_v, then all of d_k."""
    K = _multiple(K, CV)
    tiles_v, tiles_k, stretches = tl.cdiv(V, BC), tl.cdiv(K, BC), tl.cdiv(N, BN)
    program = tl.program_id(0)
    tile = program % (tiles_v + tiles_k)
    part = program // (tiles_v + tiles_k)
    image = (part // stretches).to(tl.int64)
    n = (part % stretches).to(INDEX) * BN + tl.arange(0, BN)
    grad = grad_ptr + image * V * K
    keys = k_ptr + image * _multiple(k_batch, KV)
    values = v_ptr + image * _multiple(v_batch, VV)
    statistics = statistics_ptr + image * 2 * K
    acc = tl.zeros([BC, BN], tl.float32)
    if tile < tiles_v:
        i = tile * BC + tl.arange(0, BC)
        for start in range(0, K, BD):
            j = start + tl.arange(0, BD)
            left = tl.load(
                grad + i.to(tl.int64)[:, None] * K + j[None, :], mask=(i < V)[:, None] & (j < K)[None, :], other=0.0
            )
            k = _load(keys, j, n, K, N, k_step, float("-inf"), INDEX, K_LAST, KV)
            p = _shares(k, statistics, j, K)
            acc += tl.dot(left, p, input_precision=PRECISION, max_num_imprecise_acc=CUT)
        step = V if DV_LAST else N
        _store(d_v_ptr + _multiple(image * V * N, DVV), acc, i, n, V, N, step, INDEX, DV_LAST, DVV)
    else:
        i = (tile - tiles_v) * BC + tl.arange(0, BC)
        for start in range(0, V, BD):
            j = start + tl.arange(0, BD)
            left = tl.load(
                grad + j.to(tl.int64)[None, :] * K + i[:, None], mask=(i < K)[:, None] & (j < V)[None, :], other=0.0
            )
            v = _load(values, j, n, V, N, v_step, 0.0, INDEX, V_LAST, VV)
            acc += tl.dot(left, v, input_precision=PRECISION, max_num_imprecise_acc=CUT)
        k = _load(keys, i, n, K, N, k_step, 0.0, INDEX, K_LAST, KV)
        d_k = _shares(k, statistics, i, K) * (acc - tl.load(inner_ptr + image * K + i, mask=i < K, other=0.0)[:, None])
        step = K if DK_LAST else N
        _store(d_k_ptr + _multiple(image * K * N, DKV), d_k, i, n, K, N, step, INDEX, DK_LAST, DKV)


def _layout(x: Tensor) -> tuple[int, int, bool, int]:
    """(from image to image, from one to the next along the axis that is not dense, channels dense, V) of [B, C, N]."""
    last = x.stride(2) != 1
    dense, other = (1, 2) if last else (2, 1)
    batch, step = (x.stride(axis) if x.shape[axis] > 1 else 0 for axis in (0, other))  # of one: any, and not used
    wide, dense = 16 // x.element_size(), x.shape[dense]
    return batch, step, last, wide if batch % wide == step % wide == dense % wide == 0 else 1


def _width(K: int) -> int:
    """CV, of the wide tensors, whose last axis is K."""
    return 4 if K % 4 == 0 else 1


def _index(*tensors: Tensor) -> tl.dtype:
    """The type of offsets in an image, tiles' ends beyond it included: 64 bits take twice the registers."""
    reach = max((x.shape[1] + CHANNELS) * x.stride(1) + (x.shape[2] + COLUMNS) * x.stride(2) for x in tensors)
    return tl.int32 if reach < 2**30 else tl.int64


def _precision(x: Tensor) -> str:
    """That of torch.matmul."""
    return "tf32" if x.dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _pieces(B: int, K: int, V: int, N: int) -> tuple[int, int]:
    """(pieces of an image's places, steps of each); their sums are at most a quarter of what is read, or one piece."""
    fit = PARTIAL_BYTES // (4 * B * (V + 2) * K)
    least = triton.cdiv(4 * K * V, K + V)
    enough = triton.cdiv(PROGRAMS, B * triton.cdiv(K, CHANNELS) * triton.cdiv(V, CHANNELS))
    pieces = max(1, min(fit, enough, triton.cdiv(N, least)))
    steps = triton.cdiv(triton.cdiv(N, pieces), PLACES)
    return triton.cdiv(N, steps * PLACES), steps


def linear_attention_context_out(k: Tensor, v: Tensor, context: Tensor, statistics: Tensor) -> None:
    """Fills context [B, V, K] and statistics [B, 2, K]; k [B, K, N], v [B, V, N], each with an axis dense."""
    B, K, N = k.shape
    V = v.shape[1]
    if N == 0:
        context.zero_()
        statistics.zero_()
    if k.numel() == 0:
        return
    (k_batch, k_step, k_last, kv), (v_batch, v_step, v_last, vv) = _layout(k), _layout(v)
    pieces, steps = _pieces(B, K, V, N)
    partial = context if pieces == 1 else torch.empty((B, pieces, V + 2, K), dtype=torch.float32, device=k.device)
    tiles = triton.cdiv(K, CHANNELS) * triton.cdiv(V, CHANNELS)
    with torch.cuda.device_of(k):
        linear_attention_context_kernel[(B * pieces * tiles,)](
            k, v, context, statistics, partial, K, V, N, k_batch, k_step, v_batch, v_step, pieces, steps,
            pieces == 1, _index(k, v), k_last, v_last, kv, vv, _width(K), _precision(k), CHANNELS, PLACES, **LAUNCH,
        )  # fmt: skip
        if pieces > 1:
            linear_attention_context_finish_kernel[(triton.cdiv(K, BLOCK) * V * B,)](
                partial,
                context,
                statistics,
                K,
                V,
                pieces,
                _width(K),
                min(TOGETHER, triton.next_power_of_2(pieces)),
                BLOCK,
                **LAUNCH,
            )


def linear_attention_context_bwd_out(
    grad: Tensor, k: Tensor, v: Tensor, inner: Tensor, statistics: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Fills d_k and d_v, dense with places or channels inside; grad [B, V, K], inner [B, K], statistics [B, 2, K]."""
    B, K, N = k.shape
    V = v.shape[1]
    if k.numel() == 0:
        return
    (k_batch, k_step, k_last, kv), (v_batch, v_step, v_last, vv) = _layout(k), _layout(v)
    (_, _, dk_last, dkv), (_, _, dv_last, dvv) = _layout(d_k), _layout(d_v)
    tiles = triton.cdiv(K, CHANNELS) + triton.cdiv(V, CHANNELS)
    with torch.cuda.device_of(k):
        linear_attention_context_bwd_kernel[(B * triton.cdiv(N, COLUMNS) * tiles,)](
            grad, k, v, inner, statistics, d_k, d_v, K, V, N, k_batch, k_step, v_batch, v_step,
            _index(k, v, d_k, d_v), k_last, v_last, dk_last, dv_last, kv, vv, dkv, dvv,
            _width(K), _precision(k), CHANNELS, COLUMNS, DEPTH, **LAUNCH,
        )  # fmt: skip


def _aot() -> list[tuple]:
    wide = {**dict.fromkeys(("context_ptr", "statistics_ptr", "partial_ptr", "grad_ptr", "inner_ptr"), "*fp32")}
    sizes = {**dict.fromkeys(("K", "V", "N", "k_step", "v_step", "pieces", "steps"), "i32")}
    sizes |= {"k_batch": "i64", "v_batch": "i64"}
    finish = {"CV": 4, "TOGETHER": TOGETHER, "BLOCK": BLOCK}
    cases = [(linear_attention_context_finish_kernel, wide | sizes, finish, LAUNCH)]
    for x, precision, index, k_last, v_last, vector in (
        ("fp32", "tf32x3", tl.int32, False, False, 4),
        ("fp32", "tf32", tl.int32, True, True, 4),
        ("fp32", "tf32x3", tl.int64, False, True, 1),
        ("bf16", "tf32", tl.int32, True, True, 8),
        ("fp16", "tf32", tl.int32, True, False, 1),
    ):
        types = wide | sizes | dict.fromkeys(("k_ptr", "v_ptr", "d_k_ptr", "d_v_ptr"), f"*{x}")
        same = {"INDEX": index, "K_LAST": k_last, "V_LAST": v_last, "KV": vector, "VV": vector}
        same |= {"CV": min(vector, 4), "PRECISION": precision, "BC": CHANNELS}
        for whole in (False, True):
            cases.append((linear_attention_context_kernel, types, {**same, "WHOLE": whole, "BN": PLACES}, LAUNCH))
        gradients = {"DK_LAST": k_last, "DV_LAST": v_last, "DKV": vector, "DVV": vector, "BN": COLUMNS, "BD": DEPTH}
        cases.append((linear_attention_context_bwd_kernel, types, same | gradients, LAUNCH))
    ones = dict.fromkeys(sizes, 1)  # of the last one: a launch tells the compiler which of its arguments are 1
    types = {name: kind for name, kind in types.items() if name not in ones}
    names = {kernel: kernel.arg_names for kernel, *_ in cases}
    for kernel, _, values, options in (cases[0], *cases[-3:]):
        given = {name: value for name, value in ones.items() if name in names[kernel]}
        cases.append((kernel, types, values | given, options))
    return cases


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = _aot()
