"""Products of many matrices of many sizes in one launch: a basis along one axis of [T, R, C] tensors, and Grams.

project_rows:     Y[t, i, c] = sum_k Q[k, i] X[t, k, c]      (Q[i, k] where BACK)
project_columns:  Y[t, r, j] = sum_k X[t, r, k] Q[k, j]      (Q[j, k] where BACK); ADAM: Y is Adam's direction for it
gram:             GG[i, j] += weight (sum_k G[k, i] G[k, j] - GG[i, j]) over all (t, c), or all (t, r)

A program takes one tile of one tensor, named by its row of a table, longest sums first. T folds into the free axis of
a projection (the columns (t, c) or the rows (t, r)), so that 3 x 3 kernels of few channels still fill tiles. A code in
the row picks one of two bodies, a branch that is uniform in a program: big tiles with 16-byte loads where sizes and
addresses allow, and 32 x 32 ones with single loads for everything else. A Gram takes the tiles of its lower triangle
and mirrors them: the result is symmetric bit for bit. A long sum is cut into pieces that another launch adds in their
order: no atomics, the same bits in every run. A tensor whose step is skipped costs its programs two loads.
A rotation of moments is not GUARDED by scalars, and its bases lie in scratch.

A projection of a [T, R, C] tensor reads X and writes Y once from device memory (8 bytes an element, ADAM 16 more) and
reads X again from L2 for every 64 of the basis; it does 2 d operations an element, a Gram d. Tiles of 64 x 64 with 4
warps hold 32 accumulators a thread: on sm_90 in tf32x3, 120 registers (ADAM 167, its averages lie beside them; a Gram
162) and 24 to 48 KiB of shared memory, so 3 or 4 blocks an SM, nothing spilled. 64 x 128 would read a quarter less from
L2 but leaves one block of 8 warps an SM. Products may be fused; PRECISION is tl.dot's. Does not take fp64, nor tensors
of 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import pointer
from .step_scalars import GRAM_WEIGHT, SCALARS, TAKEN, adam

LONG, WIDE, BK = 64, 64, 16  # a big tile: the free axis, the basis' axis, the piece of the sum
LAUNCH = {"num_warps": 4, "num_stages": 3}
SMALL = 32
GRAM_TILE, GRAM_BK = 64, 32
COLUMNS = tl.constexpr(16)
GENERAL, VECTOR, ELEMENTWISE = 0, 1, 2  # bodies of a projection
ALONG_SUM, ALONG_BASIS = 1, 2  # bodies of a Gram: what its 16-byte loads run along
ELEMENTS = 2048


@triton.jit
def _taken(scratch, scalars_at, index, GUARDED: tl.constexpr):
    taken = 1.0
    if GUARDED:
        taken = tl.load(scratch + scalars_at.to(tl.int64) + index * SCALARS + TAKEN)
    return taken


@triton.jit
def address_of(basis, scratch, RELATIVE: tl.constexpr):
    """A basis' address; RELATIVE: the basis lies in scratch, so many bytes from its beginning."""
    if RELATIVE:
        basis += scratch.to(tl.int64)
    return basis


@triton.jit
def _basis(q, k, i, d, BACK: tl.constexpr):
    """Q[k, i], or Q[i, k] where BACK, with zeros outside; k and i are broadcast by the caller."""
    if BACK:
        at = i * d + k
    else:
        at = k * d + i
    return tl.load(q + at, mask=(k < d) & (i < d), other=0.0)


@triton.jit
def _rows_tile(
    row, scratch, V: tl.constexpr, BACK: tl.constexpr, RELATIVE: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x = scratch + tl.multiple_of(tl.load(row + 2), 64)
    y = scratch + tl.multiple_of(tl.load(row + 3), 64)
    d = tl.multiple_of(tl.load(row + 5).to(tl.int32), V)
    c = tl.multiple_of(tl.load(row + 6).to(tl.int32), V)
    columns = tl.multiple_of(tl.load(row + 7).to(tl.int32), V)
    i = tl.multiple_of(tl.load(row + 8).to(tl.int32), SMALL_) + tl.arange(0, BI)
    j = tl.multiple_of(tl.load(row + 9).to(tl.int32), SMALL_) + tl.arange(0, BJ)
    q = pointer(address_of(tl.load(row + 4), scratch, RELATIVE), tl.float32, V)
    at = (j // c) * (d * c) + j % c
    if V > 1:
        at = tl.max_contiguous(tl.multiple_of(at, V), V)
    inside = j < columns
    acc = tl.zeros([BI, BJ], dtype=tl.float32)
    for start in range(0, d, BK):
        k = start + tl.arange(0, BK)
        left = _basis(q, k[None, :], i[:, None], d, BACK)
        right = tl.load(x + k[:, None] * c + at[None, :], mask=(k < d)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(y + i[:, None] * c + at[None, :], acc, mask=(i < d)[:, None] & inside[None, :])


@triton.jit
def project_rows_kernel(
    tiles, scratch, scalars_at, BACK: tl.constexpr, GUARDED: tl.constexpr, PRECISION: tl.constexpr,
    LONG: tl.constexpr, WIDE: tl.constexpr, SMALL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    if _taken(scratch, scalars_at, tl.load(row), GUARDED) != 0:
        if tl.load(row + 1) == 1:
            _rows_tile(row, scratch, 4, BACK, not GUARDED, WIDE, LONG, BK, PRECISION)
        else:
            _rows_tile(row, scratch, 1, BACK, not GUARDED, SMALL, SMALL, BK, PRECISION)


@triton.jit
def _columns_tile(
    row, scratch, scalars, V: tl.constexpr, BACK: tl.constexpr, ADAM: tl.constexpr, RELATIVE: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x = scratch + tl.multiple_of(tl.load(row + 2), 64)
    y = scratch + tl.multiple_of(tl.load(row + 3), 64)
    d = tl.multiple_of(tl.load(row + 5).to(tl.int32), V)
    rows = tl.load(row + 6).to(tl.int32)
    i = tl.load(row + 7).to(tl.int32) + tl.arange(0, BI)
    j = tl.multiple_of(tl.load(row + 8).to(tl.int32), SMALL_) + tl.arange(0, BJ)
    q = pointer(address_of(tl.load(row + 4), scratch, RELATIVE), tl.float32, V)
    inside = i < rows
    acc = tl.zeros([BI, BJ], dtype=tl.float32)
    for start in range(0, d, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + i[:, None] * d + k[None, :], mask=inside[:, None] & (k < d)[None, :], other=0.0)
        right = _basis(q, k[:, None], j[None, :], d, BACK)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    at = i[:, None] * d + j[None, :]
    mask = inside[:, None] & (j < d)[None, :]
    if ADAM:
        acc = _adam_at(row, acc, at, mask, scalars, V)
    tl.store(y + at, acc, mask=mask)


@triton.jit
def _adam_at(row, g, at, mask, scalars, V: tl.constexpr):
    m_ptr = pointer(tl.load(row + 9), tl.float32, V) + at
    v_ptr = pointer(tl.load(row + 10), tl.float32, V) + at
    m = tl.load(m_ptr, mask=mask, other=0.0)
    v = tl.load(v_ptr, mask=mask, other=0.0)
    m, v, direction = adam(g, m, v, scalars)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    return direction


@triton.jit
def _elementwise_tile(row, scratch, scalars, BLOCK: tl.constexpr):
    """Adam in place on a piece of a tensor whose last axis has no basis."""
    x = scratch + tl.multiple_of(tl.load(row + 2), 64)
    at = tl.multiple_of(tl.load(row + 7).to(tl.int32), BLOCK) + tl.arange(0, BLOCK)
    mask = at < tl.load(row + 6).to(tl.int32)
    g = tl.load(x + at, mask=mask, other=0.0)
    tl.store(x + at, _adam_at(row, g, at, mask, scalars, 1), mask=mask)


@triton.jit
def project_columns_kernel(
    tiles, scratch, scalars_at, BACK: tl.constexpr, ADAM: tl.constexpr, GUARDED: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr, WIDE: tl.constexpr, SMALL: tl.constexpr, BK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    row = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    index = tl.load(row)
    scalars = scratch + scalars_at.to(tl.int64) + index * SCALARS
    if _taken(scratch, scalars_at, index, GUARDED) != 0:
        code = tl.load(row + 1)
        if code == 1:
            _columns_tile(row, scratch, scalars, 4, BACK, ADAM, not GUARDED, LONG, WIDE, BK, PRECISION)
        elif code == 0:
            _columns_tile(row, scratch, scalars, 1, BACK, ADAM, not GUARDED, SMALL, SMALL, BK, PRECISION)
        else:
            if ADAM:
                _elementwise_tile(row, scratch, scalars, ELEMENTS)


@triton.jit
def lerp(old, new, weight):
    """torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _store_gram(gg, d, i, j, new, weight):
    """The tile (i, j) of the lower triangle and its mirror image; on the diagonal each place is written once."""
    mask = (i < d)[:, None] & (j < d)[None, :] & (i[:, None] >= j[None, :])
    at = i[:, None] * d + j[None, :]
    value = lerp(tl.load(gg + at, mask=mask, other=0.0), new, weight)
    tl.store(gg + at, value, mask=mask)
    tl.store(gg + j[None, :] * d + i[:, None], value, mask=mask & (i[:, None] > j[None, :]))


@triton.jit
def _gram_sum(row, scratch, BODY: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    g = scratch + tl.multiple_of(tl.load(row + 2), 64)
    d = tl.load(row + 4).to(tl.int32)
    inner = tl.load(row + 10).to(tl.int32)
    pieces = tl.load(row + 11).to(tl.int32)
    outer_step = tl.load(row + 12).to(tl.int32)
    k_step = tl.load(row + 13).to(tl.int32)
    i_step = tl.load(row + 14).to(tl.int32)
    if BODY == 1:
        inner = tl.multiple_of(inner, 4)
        outer_step = tl.multiple_of(outer_step, 4)
        i_step = tl.multiple_of(i_step, 4)
    if BODY == 2:
        d = tl.multiple_of(d, 4)
        outer_step = tl.multiple_of(outer_step, 4)
        k_step = tl.multiple_of(k_step, 4)
    i = tl.multiple_of(tl.load(row + 5).to(tl.int32), TILE) + tl.arange(0, TILE)
    j = tl.multiple_of(tl.load(row + 6).to(tl.int32), TILE) + tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], dtype=tl.float32)
    for piece in range(tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)):
        outer = piece // pieces
        k = (piece - outer * pieces) * BK + tl.arange(0, BK)
        base = g + outer * outer_step
        if BODY == 1:
            left_at = i[:, None] * i_step + k[None, :]
            right_at = j[None, :] * i_step + k[:, None]
        elif BODY == 2:
            left_at = k[None, :] * k_step + i[:, None]
            right_at = k[:, None] * k_step + j[None, :]
        else:
            left_at = k[None, :] * k_step + i[:, None] * i_step
            right_at = k[:, None] * k_step + j[None, :] * i_step
        left = tl.load(base + left_at, mask=(i < d)[:, None] & (k < inner)[None, :], other=0.0)
        right = tl.load(base + right_at, mask=(k < inner)[:, None] & (j < d)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gram_kernel(
    tiles, scratch, scalars_at, partials_at,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    index = tl.load(row)
    if _taken(scratch, scalars_at, index, True) != 0:
        body = tl.load(row + 1)
        if body == 1:
            acc = _gram_sum(row, scratch, 1, TILE, BK, PRECISION)
        elif body == 2:
            acc = _gram_sum(row, scratch, 2, TILE, BK, PRECISION)
        else:
            acc = _gram_sum(row, scratch, 0, TILE, BK, PRECISION)
        partial = tl.load(row + 9)
        a = tl.arange(0, TILE)
        if partial < 0:
            weight = tl.load(scratch + scalars_at.to(tl.int64) + index * SCALARS + GRAM_WEIGHT)
            i = tl.load(row + 5).to(tl.int32) + a
            j = tl.load(row + 6).to(tl.int32) + a
            gg = tl.load(row + 3).to(tl.pointer_type(tl.float32))
            _store_gram(gg, tl.load(row + 4).to(tl.int32), i, j, acc, weight)
        else:
            at = scratch + partials_at.to(tl.int64) + partial * (TILE * TILE)
            tl.store(at + a[:, None] * TILE + a[None, :], acc)


@triton.jit
def gram_sum_kernel(tiles, scratch, scalars_at, partials_at, TILE: tl.constexpr):
    """A tile whose sum was cut: columns as gram_kernel's, with the first partial and their number at 7 and 8."""
    row = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    index = tl.load(row)
    if _taken(scratch, scalars_at, index, True) != 0:
        a = tl.arange(0, TILE)
        inside = a[:, None] * TILE + a[None, :]
        first = scratch + partials_at.to(tl.int64) + tl.load(row + 7) * (TILE * TILE)
        acc = tl.zeros([TILE, TILE], dtype=tl.float32)
        for piece in range(tl.load(row + 8).to(tl.int32)):
            acc += tl.load(first + piece * (TILE * TILE) + inside)
        weight = tl.load(scratch + scalars_at.to(tl.int64) + index * SCALARS + GRAM_WEIGHT)
        i = tl.load(row + 5).to(tl.int32) + a
        j = tl.load(row + 6).to(tl.int32) + a
        gg = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        _store_gram(gg, tl.load(row + 4).to(tl.int32), i, j, acc, weight)


SMALL_ = tl.constexpr(SMALL)


def _aot() -> list[tuple]:
    types = {"tiles": "*i64", "scratch": "*fp32", "scalars_at": "i64", "partials_at": "i64"}
    tile = {"LONG": LONG, "WIDE": WIDE, "SMALL": SMALL, "BK": BK}
    options = {"enable_fp_fusion": True, **LAUNCH}
    cases = [(gram_sum_kernel, types, {"TILE": GRAM_TILE}, {"enable_fp_fusion": True})]
    for precision in ("ieee", "tf32x3", "tf32"):
        cell = {**tile, "PRECISION": precision, "GUARDED": True}
        for back in (False, True):
            cases.append((project_rows_kernel, types, {**cell, "BACK": back}, options))
            values = {**cell, "BACK": back, "ADAM": not back, "ELEMENTS": ELEMENTS}
            cases.append((project_columns_kernel, types, values, options))
        if precision == "tf32x3":  # a rotation
            values = {**cell, "BACK": False, "GUARDED": False}
            cases.append((project_rows_kernel, types, values, options))
            cases.append((project_columns_kernel, types, {**values, "ADAM": False, "ELEMENTS": ELEMENTS}, options))
        if precision != "tf32":
            gram = {"PRECISION": precision, "TILE": GRAM_TILE, "BK": GRAM_BK}
            cases.append((gram_kernel, types, gram, options))
    return cases


# What a compilation ahead of time needs: kernel, argument types, compile-time values, options.
AOT = _aot()
