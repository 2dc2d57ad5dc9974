"""The ends of SOAP's step: gradients gathered from any layout and mixed by the bases of the tap axes; back and into p.

gather:   raw[t, r, c] = g[t, r, c] in fp32;  mixed[s, r, c] = sum_t K[t, s] raw[t, r, c];  a flag where not finite;
          S[s, t] = sum over this program's (r, c) of raw[s] raw[t]
tap_gram: GG_a += weight (sum of the S over everything but axis a - GG_a), for each tap axis a
scatter:  u[t, r, c] = sum_s K[t, s] x[s, r, c];  p <- (p - step_size u / divisor) (1 - lr weight_decay)

K is the Kronecker product of the tap axes' bases (identity for a missing one): at most 64 x 64, made by each program
from its factors. A program takes some positions (r, c) with all their taps, in tiles of 2048 elements with the taps
padded to 16, 32 or 64: a conv weight [O, I, kh, kw] is read along its taps, one in channels_last along its channels,
and written along (r, c). S leaves once a program. Tensors without taps are copied in one flat loop, 16 bytes a load
where layouts allow; unmixed taps go 16 at a time, any number of them. S is summed without tensor cores ("ieee"):
through mma.sync every warp would hold all of it, 230 registers a thread.

Device memory: gather reads g and writes raw, and mixed where there are tap bases; scatter reads x and p and writes p.
Does not take fp64, more than 64 taps with a basis or factor, nor views that span 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import pointer
from .grouped_gemm import address_of, lerp
from .step_scalars import DIVISOR, GRAM_WEIGHT, SCALARS, TAKEN, load_float, not_finite, store_float, updated

TILE = 2048  # elements in a tile, padding included
ROUNDS = 4  # tiles a program
# 128 registers a thread: two blocks an SM keep loads in flight, for the price of a few spilled scalars in gather
LAUNCH = {"num_warps": 8, "num_stages": 1, "maxnreg": 128}
PAIRS, PARTIALS = 64, 64  # a program of tap_gram: entries of a factor, partial sums at a time
SUM_BLOCK = 1024
COLUMNS = tl.constexpr(8)  # of tiles: tensor, gather's body, scatter's body, first position, first tap, place of S
WIDTH = tl.constexpr(32)  # of tensors, see soap_plan.py
# bodies; MIXED takes 16 taps, the one after it MOST: 32, or 64 where the list needs it
FLAT, FLAT_VECTOR, TAPS, MIXED = 0, 1, 2, 3

SIZES = tl.constexpr(0)  # taps 1, 2, 3, then R, C
GRAD = tl.constexpr(5)  # code of the dtype, then five strides
PARAM = tl.constexpr(11)
RAW = tl.constexpr(17)  # places in scratch: the gathered gradient, the mixed one, what scatter reads
MIX = tl.constexpr(18)
FINAL = tl.constexpr(19)
BASES = tl.constexpr(20)  # of taps 1, 2, 3, or 0
GATHERS = tl.constexpr(24)  # first program of gather, number of them


@triton.jit
def _digits(row, t):
    """The places (a1, a2, a3) on the tap axes of the flat tap t."""
    n2 = tl.load(row + SIZES + 1).to(tl.int32)
    n3 = tl.load(row + SIZES + 2).to(tl.int32)
    return t // (n2 * n3), (t // n3) % n2, t % n3


@triton.jit
def _tap_at(row, layout, t):
    a1, a2, a3 = _digits(row, t)
    s1 = tl.load(layout + 1).to(tl.int32)
    s2 = tl.load(layout + 2).to(tl.int32)
    s3 = tl.load(layout + 3).to(tl.int32)
    return a1 * s1 + a2 * s2 + a3 * s3


@triton.jit
def _position_at(row, layout, position):
    c = tl.load(row + SIZES + 4).to(tl.int32)
    sr = tl.load(layout + 4).to(tl.int32)
    sc = tl.load(layout + 5).to(tl.int32)
    return (position // c) * sr + (position % c) * sc


@triton.jit
def _times_factor(product, basis, scratch, n, a, b, mask, RELATIVE: tl.constexpr):
    if basis != 0:
        q = pointer(address_of(basis, scratch, RELATIVE), tl.float32, 1)
        factor = tl.load(q + a * n + b, mask=mask, other=0.0)
        product = product * factor
    else:
        product = tl.where(a == b, product, 0.0)
    return product


@triton.jit
def _kron(row, scratch, taps, TP: tl.constexpr, BACK: tl.constexpr, RELATIVE: tl.constexpr):
    """K[in, out] [TP, TP] with zeros beyond the taps; its transpose where BACK."""
    t = tl.arange(0, TP)
    a1, a2, a3 = _digits(row, t)
    mask = (t < taps)[:, None] & (t < taps)[None, :]
    product = tl.where(mask, 1.0, 0.0)
    n1 = tl.load(row + SIZES).to(tl.int32)
    n2 = tl.load(row + SIZES + 1).to(tl.int32)
    n3 = tl.load(row + SIZES + 2).to(tl.int32)
    q1 = tl.load(row + BASES)
    q2 = tl.load(row + BASES + 1)
    q3 = tl.load(row + BASES + 2)
    if BACK:
        product = _times_factor(product, q1, scratch, n1, a1[None, :], a1[:, None], mask, RELATIVE)
        product = _times_factor(product, q2, scratch, n2, a2[None, :], a2[:, None], mask, RELATIVE)
        product = _times_factor(product, q3, scratch, n3, a3[None, :], a3[:, None], mask, RELATIVE)
    else:
        product = _times_factor(product, q1, scratch, n1, a1[:, None], a1[None, :], mask, RELATIVE)
        product = _times_factor(product, q2, scratch, n2, a2[:, None], a2[None, :], mask, RELATIVE)
        product = _times_factor(product, q3, scratch, n3, a3[:, None], a3[None, :], mask, RELATIVE)
    return product


@triton.jit
def _load_taps(address, layout, position_at, tap_at, positions, inside):
    """[BP, TP] of a strided tensor, read along the axis that lies closer in memory."""
    code = tl.load(layout)
    if tl.load(layout + 5) == 1:  # the last axis is dense: channels_last
        across = tap_at[:, None] + position_at[None, :]
        value = tl.trans(load_float(address, code, across, inside[:, None] & positions[None, :], 1))
    else:
        along = position_at[:, None] + tap_at[None, :]
        value = load_float(address, code, along, positions[:, None] & inside[None, :], 1)
    return value


@triton.jit
def _gather_flat(row, address, raw, first, V: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    n = tl.multiple_of((tl.load(row + SIZES + 3) * tl.load(row + SIZES + 4)).to(tl.int32), V)
    bad = 0
    for b in range(ROUNDS):
        at = first + b * TILE + tl.arange(0, TILE)
        mask = at < n
        place = at
        if V == 1:
            place = _position_at(row, row + GRAD, at)
        g = load_float(address, tl.load(row + GRAD), place, mask, V)
        tl.store(raw + at, g, mask=mask)
        bad += not_finite(g, mask)
    return bad


@triton.jit
def _gather_taps(
    row, address, scratch, partial, first, tap, WANT_RAW: tl.constexpr, WANT_S: tl.constexpr, IS_MIXED: tl.constexpr,
    TP: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    BP: tl.constexpr = TILE // TP
    taps = (tl.load(row + SIZES) * tl.load(row + SIZES + 1) * tl.load(row + SIZES + 2)).to(tl.int32)
    n = (tl.load(row + SIZES + 3) * tl.load(row + SIZES + 4)).to(tl.int32)
    raw = scratch + tl.load(row + RAW)
    t = tap + tl.arange(0, TP)
    inside = t < taps
    tap_at = _tap_at(row, row + GRAD, t)
    bad = 0
    if IS_MIXED:
        kron = _kron(row, scratch, taps, TP, False, not WANT_S)
        s = tl.zeros([TP, TP], dtype=tl.float32)
    for b in range(ROUNDS):
        position = first + b * BP + tl.arange(0, BP)
        positions = position < n
        g = _load_taps(address, row + GRAD, _position_at(row, row + GRAD, position), tap_at, positions, inside)
        mask = positions[:, None] & inside[None, :]
        at = position[:, None] + t[None, :] * n
        bad += not_finite(g, mask)
        if WANT_RAW or not IS_MIXED:
            tl.store(raw + at, g, mask=mask)
        if IS_MIXED:
            mixed = tl.dot(g, kron, input_precision=PRECISION)
            tl.store(scratch + tl.load(row + MIX) + at, mixed, mask=mask)
            if WANT_S:
                s = tl.dot(tl.trans(g), g, s, input_precision=GRAM)
    if IS_MIXED and WANT_S:
        tap_in = tl.arange(0, TP)
        tl.store(scratch + partial + tap_in[:, None] * TP + tap_in[None, :], s)
    return bad


@triton.jit
def gather_kernel(
    tiles, tensors, pointers, scratch, flags_at, partials_at,
    STEP: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """STEP: with the raw gradient, S and flags, as a step needs them; a rotation needs the mixed tensor alone."""
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program * COLUMNS
    index = tl.load(tile)
    body = tl.load(tile + 1)
    first = tl.load(tile + 3).to(tl.int32)
    tap = tl.load(tile + 4).to(tl.int32)
    partial = partials_at.to(tl.int64) + tl.load(tile + 5)
    row = tensors + index * WIDTH
    address = tl.load(pointers + 2 * index)
    raw = scratch + tl.multiple_of(tl.load(row + RAW), 64)
    if body == 1 and address % 16 == 0:
        bad = _gather_flat(row, address, raw, tl.multiple_of(first, TILE), 4, TILE, ROUNDS)
    elif body <= 1:
        bad = _gather_flat(row, address, raw, first, 1, TILE, ROUNDS)
    elif body == 2:
        bad = _gather_taps(
            row, address, scratch, partial, first, tap, STEP, STEP, False, 16, TILE, ROUNDS, PRECISION, GRAM
        )  # fmt: skip
    elif body == 3:
        bad = _gather_taps(
            row, address, scratch, partial, first, 0, STEP, STEP, True, 16, TILE, ROUNDS, PRECISION, GRAM
        )  # fmt: skip
    else:
        bad = _gather_taps(
            row, address, scratch, partial, first, 0, STEP, STEP, True, MOST, TILE, ROUNDS, PRECISION, GRAM
        )  # fmt: skip
    if STEP:
        tl.store(scratch + flags_at.to(tl.int64) + program, (bad != 0).to(tl.float32))


@triton.jit
def tap_gram_kernel(
    tiles, scratch, scalars_at, partials_at, PAIRS: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """tiles: tensor, first S, number of S, padded taps, size of the axis, step of the axis, taps, first entry, GG."""
    row = tiles + tl.program_id(0).to(tl.int64) * 16
    index = tl.load(row)
    scalars = scratch + scalars_at.to(tl.int64) + index * SCALARS
    if tl.load(scalars + TAKEN) != 0:
        first = scratch + partials_at.to(tl.int64) + tl.load(row + 1)
        count = tl.load(row + 2).to(tl.int32)
        tp = tl.load(row + 3).to(tl.int32)
        d = tl.load(row + 4).to(tl.int32)
        inner = tl.load(row + 5).to(tl.int32)
        taps = tl.load(row + 6).to(tl.int32)
        pair = tl.load(row + 7).to(tl.int32) + tl.arange(0, PAIRS)
        i = pair // d
        j = pair % d
        inside = pair < d * d
        low = tl.minimum(i, j) * inner  # both (i, j) and (j, i) read the same half of S
        high = tl.maximum(i, j) * inner
        acc = tl.zeros([PARTIALS, PAIRS], dtype=tl.float32)
        for other in range(taps // d):
            rest = (other // inner) * (d * inner) + other % inner
            at = (rest + high) * tp + rest + low
            for start in range(0, count, PARTIALS):
                p = start + tl.arange(0, PARTIALS)
                mask = (p < count)[:, None] & inside[None, :]
                acc += tl.load(first + p[:, None] * (tp * tp) + at[None, :], mask=mask, other=0.0)
        gg = tl.load(row + 8).to(tl.pointer_type(tl.float32)) + pair
        old = tl.load(gg, mask=inside, other=0.0)
        tl.store(gg, lerp(old, tl.sum(acc, 0), tl.load(scalars + GRAM_WEIGHT)), mask=inside)


@triton.jit
def _finish(address, code, at, u, mask, scalars, MODE: tl.constexpr, V: tl.constexpr):
    """Writes the parameter, or (MODE 1) returns the sum of squares of the update."""
    result = 0.0
    if MODE == 1:
        result = tl.sum(u * u)
    else:
        if MODE == 2:
            u = tl.div_rn(u, tl.zeros_like(u) + tl.load(scalars + DIVISOR))
        value = load_float(address, code, at, mask, V)
        store_float(address, code, at, updated(value, u, scalars), mask, V)
    return result


@triton.jit
def _scatter_flat(
    row, address, x, first, scalars, MODE: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr
):  # fmt: skip
    n = tl.multiple_of((tl.load(row + SIZES + 3) * tl.load(row + SIZES + 4)).to(tl.int32), V)
    total = 0.0
    for b in range(ROUNDS):
        at = first + b * TILE + tl.arange(0, TILE)
        mask = at < n
        u = tl.load(x + at, mask=mask, other=0.0)
        place = at
        if V == 1:
            place = _position_at(row, row + PARAM, at)
        total += _finish(address, tl.load(row + PARAM), place, u, mask, scalars, MODE, V)
    return total


@triton.jit
def _scatter_taps(
    row, address, x, first, tap, scalars, MODE: tl.constexpr, IS_MIXED: tl.constexpr, TP: tl.constexpr,
    TILE: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BP: tl.constexpr = TILE // TP
    taps = (tl.load(row + SIZES) * tl.load(row + SIZES + 1) * tl.load(row + SIZES + 2)).to(tl.int32)
    n = (tl.load(row + SIZES + 3) * tl.load(row + SIZES + 4)).to(tl.int32)
    t = tap + tl.arange(0, TP)
    inside = t < taps
    tap_at = _tap_at(row, row + PARAM, t)
    total = 0.0
    if IS_MIXED:
        kron = _kron(row, x, taps, TP, True, False)
    for b in range(ROUNDS):
        position = first + b * BP + tl.arange(0, BP)
        positions = position < n
        mask = positions[:, None] & inside[None, :]
        u = tl.load(x + position[:, None] + t[None, :] * n, mask=mask, other=0.0)
        if IS_MIXED:
            u = tl.dot(u, kron, input_precision=PRECISION)
        place = _position_at(row, row + PARAM, position)
        if tl.load(row + PARAM + 5) == 1:
            across = tap_at[:, None] + place[None, :]
            turned = inside[:, None] & positions[None, :]
            total += _finish(address, tl.load(row + PARAM), across, tl.trans(u), turned, scalars, MODE, 1)
        else:
            along = place[:, None] + tap_at[None, :]
            total += _finish(address, tl.load(row + PARAM), along, u, mask, scalars, MODE, 1)
    return total


@triton.jit
def scatter_kernel(
    tiles, tensors, pointers, scratch, scalars_at, sums_at,
    MODE: tl.constexpr, PRECISION: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """MODE 0: the step. 1: the sum of squares of each program's update. 2: the step, divided by the row's divisor."""
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program * COLUMNS
    index = tl.load(tile)
    scalars = scratch + scalars_at.to(tl.int64) + index * SCALARS
    if tl.load(scalars + TAKEN) != 0:
        body = tl.load(tile + 2)
        first = tl.load(tile + 3).to(tl.int32)
        tap = tl.load(tile + 4).to(tl.int32)
        row = tensors + index * WIDTH
        address = tl.load(pointers + 2 * index + 1)
        x = scratch + tl.multiple_of(tl.load(row + FINAL), 64)
        if body == 1 and address % 16 == 0:
            at = tl.multiple_of(first, TILE)
            total = _scatter_flat(row, address, x, at, scalars, MODE, 4, TILE, ROUNDS)
        elif body <= 1:
            total = _scatter_flat(row, address, x, first, scalars, MODE, 1, TILE, ROUNDS)
        elif body == 2:
            total = _scatter_taps(row, address, x, first, tap, scalars, MODE, False, 16, TILE, ROUNDS, PRECISION)
        elif body == 3:
            total = _scatter_taps(row, address, x, first, 0, scalars, MODE, True, 16, TILE, ROUNDS, PRECISION)
        else:
            total = _scatter_taps(row, address, x, first, 0, scalars, MODE, True, MOST, TILE, ROUNDS, PRECISION)
        if MODE == 1:
            tl.store(scratch + sums_at.to(tl.int64) + program, total)


@triton.jit
def divisor_kernel(tensors, scratch, scalars_at, sums_at, BLOCK: tl.constexpr):
    """One program a tensor: 1e-30 + the root mean square of its update, from the sums of scatter's MODE 1."""
    index = tl.program_id(0).to(tl.int64)
    row = tensors + index * WIDTH
    scalars = scratch + scalars_at.to(tl.int64) + index * SCALARS
    if tl.load(scalars + TAKEN) != 0:
        first = tl.load(row + GATHERS)
        end = first + tl.load(row + GATHERS + 1)
        total = tl.full([], 0.0, tl.float64)
        for start in range(first, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(scratch + sums_at.to(tl.int64) + at, mask=at < end, other=0.0)
            total += tl.sum(part.to(tl.float64), 0)
        n = tl.load(row + SIZES) * tl.load(row + SIZES + 1) * tl.load(row + SIZES + 2)
        n = n * tl.load(row + SIZES + 3) * tl.load(row + SIZES + 4)
        rms = tl.sqrt(total / tl.maximum(n, 1).to(tl.float64)).to(tl.float32)
        tl.store(scalars + DIVISOR, 1e-30 + rms)


def _aot() -> list[tuple]:
    names = ("tiles", "tensors", "pointers")
    types = {name: "*i64" for name in names} | {"scratch": "*fp32"}
    types |= {name: "i64" for name in ("flags_at", "scalars_at", "partials_at", "sums_at")}
    tile = {"TILE": TILE, "ROUNDS": ROUNDS}
    fused = {"enable_fp_fusion": True}
    cases = [
        (tap_gram_kernel, types, {"PAIRS": PAIRS, "PARTIALS": PARTIALS}, fused),
        (divisor_kernel, types, {"BLOCK": SUM_BLOCK}, fused),
    ]
    for precision, step, most in (("ieee", True, 32), ("tf32x3", True, 32), ("tf32", False, 32), ("tf32", True, 64)):
        cell = {**tile, "PRECISION": precision, "MOST": most}
        cases.append((gather_kernel, types, {**cell, "STEP": step, "GRAM": "ieee"}, fused | LAUNCH))
        cases.append((scatter_kernel, types, {**cell, "MODE": 0}, fused | LAUNCH))
    cell = {**tile, "PRECISION": "tf32x3", "MOST": 32}
    cases += [(scatter_kernel, types, {**cell, "MODE": mode}, fused | LAUNCH) for mode in (1, 2)]
    return cases


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = _aot()
