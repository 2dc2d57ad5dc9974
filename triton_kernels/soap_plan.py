"""The tables of SOAP's launches: which tile of which tensor each program takes, and where everything lies in scratch.

Built once for a list (plans.py keeps them): only counts, hyper and the pointers in the table of numbers change between
steps. Every tensor is [t1, t2, t3, R, C], missing axes in front having size 1. Scratch is one buffer of floats: two
regions as large as the list, which the projections go to and fro between, partial sums, flags, scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from . import grouped_gemm as gemm
from . import plans
from . import soap_taps as taps
from .step_scalars import DTYPES, SCALARS

MAX_TAPS = 64
MAX_STEPS = 48  # pieces of a Gram's sum that one program adds
_LIMIT = 2**31


@dataclass
class Tensor5:
    """One tensor of the list: sizes [5], bases and factors [5] (an address or 0), addresses of the averages."""

    sizes: tuple[int, ...]
    grad: tuple[int, ...]  # code of the dtype, five strides
    param: tuple[int, ...]
    bases: tuple[int, ...]
    factors: tuple[int, ...]
    m: int
    v: int
    mixed: bool = False
    raw: int = 0  # places in scratch
    spare: int = 0
    final: int = 0
    gathers: tuple[int, int] = (0, 0)
    s_first: int = 0
    padded_taps: int = 16

    @property
    def taps(self) -> int:
        return prod(self.sizes[:3])


@dataclass
class Plan:
    """Tables on the device, and where the parts of scratch begin (in floats)."""

    tensors: Tensor
    tiles: dict[str, Tensor]
    floats: int
    flags: int
    scalars: int
    tap_sums: int
    gram_sums: int
    sums: int
    most_taps: int  # the widest body that gather and scatter need; a wider one costs registers


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """(code of the dtype, five strides) where the kernels can read it."""
    if tensor.dtype not in DTYPES or not 1 <= tensor.dim() <= 5:
        return None
    strides = [s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    if sum(s * (n - 1) for s, n in zip(strides, tensor.shape, strict=True)) >= _LIMIT - taps.TILE * taps.ROUNDS:
        return None
    return (DTYPES[tensor.dtype], *(0,) * (5 - tensor.dim()), *strides)


def matrices(tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...] | None:
    """Five addresses, 0 where an axis has no matrix; None where one is not [d, d], contiguous, of this dtype."""
    for matrix, d in zip(tensors, shape, strict=True):
        if matrix.numel() and (tuple(matrix.shape) != (d, d) or matrix.dtype is not dtype):
            return None
        if not matrix.is_contiguous():
            return None
    return (0,) * (5 - len(shape)) + tuple(t.data_ptr() if t.numel() else 0 for t in tensors)


def entry(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, GG: Sequence[Tensor], Q: Sequence[Tensor]):
    """A Tensor5, or None where the kernels do not take it."""
    if any(t.device != m.device for t in (param, grad, v, *GG, *Q)) or len(GG) != m.dim() or len(Q) != m.dim():
        return None
    if any(t.shape != m.shape for t in (param, grad, v)) or m.numel() >= _LIMIT - taps.TILE * taps.ROUNDS:
        return None
    if any(t.dtype is not torch.float32 or not t.is_contiguous() for t in (m, v)):
        return None
    layouts = layout(param), layout(grad)
    bases, factors = matrices(Q, m.shape, m.dtype), matrices(GG, m.shape, m.dtype)
    if None in (*layouts, bases, factors):
        return None
    sizes = (1,) * (5 - m.dim()) + tuple(m.shape)
    mixed = any(bases[:3]) or any(factors[:3])
    if mixed and prod(sizes[:3]) > MAX_TAPS:
        return None
    return Tensor5(sizes, layouts[1], layouts[0], bases, factors, m.data_ptr(), v.data_ptr(), mixed)


def _round(n: int) -> int:
    return -(-n // 64) * 64


def _flat(e: Tensor5, strides: tuple[int, ...]) -> int:
    _, _, _, R, C = e.sizes
    dense = (C == 1 or strides[5] == 1) and (R == 1 or strides[4] == C)
    return taps.FLAT_VECTOR if dense and R * C % 4 == 0 else taps.FLAT


def _end_tiles(entries: Sequence[Tensor5]) -> tuple[list[tuple], int]:
    """The tiles of gather and scatter, tensor by tensor, and the floats that the S take."""
    rows: list[tuple] = []
    used = 0
    for index, e in enumerate(entries):
        n, first, e.s_first = e.sizes[3] * e.sizes[4], len(rows), used
        if e.mixed:
            tp = e.padded_taps
            body = taps.MIXED + (tp > 16)
            if e.taps:
                for at in range(0, n, taps.TILE // tp * taps.ROUNDS):
                    rows.append((index, body, body, at, 0, used))
                    used += tp * tp
        elif e.taps == 1:
            bodies = _flat(e, e.grad), _flat(e, e.param)
            rows += [(index, *bodies, at, 0) for at in range(0, n, taps.TILE * taps.ROUNDS)]
        else:
            step = taps.TILE // 16 * taps.ROUNDS
            rows += [(index, taps.TAPS, taps.TAPS, at, tap) for tap in range(0, e.taps, 16) for at in range(0, n, step)]
        e.gathers = first, len(rows) - first
    return rows, used


def _projections(entries: Sequence[Tensor5], axis: int, back: bool, at: list[int], adam: bool) -> list[tuple]:
    """The tiles of one projection; at: where each tensor lies, which changes for those that are projected."""
    rows: list[tuple] = []
    for index, e in enumerate(entries):
        R, C = e.sizes[3:]
        d, q, source = e.sizes[axis], e.bases[axis], at[index]
        free = e.taps * (C if axis == 3 else R)
        if not d * free:
            continue
        if not q:
            if adam:
                pieces = range(0, d * free, gemm.ELEMENTS)
                rows += [(index, gemm.ELEMENTWISE, source, 0, 0, d, d * free, p, 0, e.m, e.v) for p in pieces]
            continue
        at[index] = target = e.raw + e.spare - source
        moments = (e.m, e.v) if adam else (0, 0)
        vector = C % 4 == 0 and d % 4 == 0 and all(address % 16 == 0 for address in (q, *moments))
        wide, long = (gemm.WIDE, gemm.LONG) if vector else (gemm.SMALL, gemm.SMALL)
        places = [(b, f) for f in range(0, free, long) for b in range(0, d, wide)]
        if axis == 3:
            rows += [(index, int(vector), source, target, q, d, C, free, b, f) for b, f in places]
        else:
            rows += [(index, int(vector), source, target, q, d, free, f, b, *moments) for b, f in places]
    return sorted(rows, key=lambda row: -row[5] if row[1] < gemm.ELEMENTWISE else 0)


def _grams(entries: Sequence[Tensor5]) -> tuple[list[tuple], list[tuple], int]:
    """gram_kernel's tiles, gram_sum_kernel's, and the number of partial sums."""
    rows, cut, partials = [], [], 0
    for index, e in enumerate(entries):
        R, C = e.sizes[3:]
        for axis in (3, 4):
            if not e.factors[axis]:
                continue
            d = e.sizes[axis]
            outer, inner, steps = (e.taps, C, (R * C, 1, C)) if axis == 3 else (1, e.taps * R, (0, C, 1))
            body = (gemm.ALONG_SUM if axis == 3 else gemm.ALONG_BASIS) if C % 4 == 0 else 0
            pieces = -(-inner // gemm.GRAM_BK)
            total = outer * pieces
            splits = max(1, -(-total // MAX_STEPS))
            for i in range(0, d, gemm.GRAM_TILE):
                for j in range(0, i + 1, gemm.GRAM_TILE):
                    head = (index, body, e.raw, e.factors[axis], d, i, j)
                    if splits > 1:
                        cut.append((*head, partials, splits))
                    for s in range(splits):
                        place = partials + s if splits > 1 else -1
                        span = total * s // splits, total * (s + 1) // splits
                        rows.append((*head, *span, place, inner, pieces, *steps))
                    partials += splits if splits > 1 else 0
    return sorted(rows, key=lambda row: row[7] - row[8]), cut, partials


def _tap_grams(entries: Sequence[Tensor5]) -> Iterable[tuple]:
    for index, e in enumerate(entries):
        for axis in range(3):
            if e.factors[axis]:
                d = e.sizes[axis]
                inner = prod(e.sizes[axis + 1 : 3])
                head = (index, e.s_first, e.gathers[1], e.padded_taps, d, inner, e.taps)
                yield from ((*head, pair, e.factors[axis]) for pair in range(0, d * d, taps.PAIRS))


def build(entries: Sequence[Tensor5], device: torch.device, step: bool, used: int = 0) -> Plan:
    """The plan of a step, or (step False) of projecting every m by its bases, without Adam and without going back.

    The caller has used the first floats of scratch. Bases are addresses; without step bytes from scratch's beginning.
    """
    most = 64 if any(e.mixed and e.taps > 32 for e in entries) else 32
    used = _round(used)
    for e in entries:
        e.padded_taps = 16 if e.taps <= 16 else most
        e.raw, used = used, used + _round(prod(e.sizes))
    for e in entries:
        e.spare, used = used, used + _round(prod(e.sizes))
    ends, s_floats = _end_tiles(entries)
    at = [e.spare if e.mixed else e.raw for e in entries]
    mixed_at = list(at)
    rows = {"ends": ends, "rows": _projections(entries, 3, False, at, False)}
    rows["columns"] = _projections(entries, 4, False, at, step)
    partials = 0
    if step:
        rows["gram"], rows["gram_sum"], partials = _grams(entries)
        rows["tap_gram"] = list(_tap_grams(entries))
        rows["columns_back"] = _projections(entries, 4, True, at, False)
        rows["rows_back"] = _projections(entries, 3, True, at, False)
    table = []
    for e, mix, final in zip(entries, mixed_at, at, strict=True):
        e.final = final
        table.append((*e.sizes, *e.grad, *e.param, e.raw, mix, final, *e.bases[:3], 0, *e.gathers))
    widths = {"ends": taps.COLUMNS.value}
    tiles = {name: plans.table(r, widths.get(name, gemm.COLUMNS.value), device) for name, r in rows.items()}
    places = []
    for size in (len(ends), len(entries) * SCALARS.value, s_floats, partials * gemm.GRAM_TILE**2, len(ends)):
        places.append(used)
        used += _round(size)
    return Plan(plans.table(table, taps.WIDTH.value, device), tiles, used, *places, most)
