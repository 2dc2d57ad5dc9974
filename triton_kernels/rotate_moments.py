"""Adam's moments into a new eigenbasis, a whole list in two copies and five launches, without a wait:

    exp_avg[t, r, c] <- sum of rotation_1[t', t] rotation_2[r', r] rotation_3[c', c] exp_avg[t', r', c']
    exp_avg_sq[t, r, c] <- exp_avg_sq[order_1[t], order_2[r], order_3[c]]

gather (with the tap axes' rotations), rows, columns: soap_update.py's kernels. permute then picks exp_avg_sq into the
half of scratch that exp_avg has left, and copies both back: 48 bytes an element with the projections' 16 each. Tensors
without a rotation and an order are left alone. The averages fp32 and contiguous; at most 64 taps with a rotation.

A refresh gives its rotations and orders wherever the allocator has room, inside a CUDA graph's pool too, where no table
of addresses can be made. So they are first copied together, the rotations into scratch, and the tables name places
there: a plan depends on the averages' addresses and on shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plans, soap_plan
from . import soap_taps as taps
from .soap_update import project

BLOCK = 1024
COLUMNS = tl.constexpr(16)  # sizes [5], order [5]: 1 + its place, or 0; exp_avg, exp_avg_sq, both in scratch, elements


@triton.jit
def _step_of(row, orders, axis: tl.constexpr, place, mask):
    """The place on an axis that its order names."""
    order = tl.load(row + 5 + axis)
    if order != 0:
        place = tl.load(orders + (order - 1) + place, mask=mask, other=0).to(tl.int32)
    return place


@triton.jit
def permute_moments_kernel(tiles, tensors, orders, scratch, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """exp_avg_sq in its new order into scratch; BACK: both moments from scratch."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    row = tensors + tl.load(tile) * COLUMNS
    at = tl.load(tile + 1).to(tl.int32) + tl.arange(0, BLOCK)
    mask = at < tl.load(row + 14).to(tl.int32)
    v = tl.load(row + 11).to(tl.pointer_type(tl.float32))
    v_new = scratch + tl.load(row + 13)
    if BACK:
        m = tl.load(row + 10).to(tl.pointer_type(tl.float32))
        tl.store(m + at, tl.load(scratch + tl.load(row + 12) + at, mask=mask, other=0.0), mask=mask)
        tl.store(v + at, tl.load(v_new + at, mask=mask, other=0.0), mask=mask)
    else:
        n2 = tl.load(row + 1).to(tl.int32)
        n3 = tl.load(row + 2).to(tl.int32)
        n4 = tl.load(row + 3).to(tl.int32)
        n5 = tl.load(row + 4).to(tl.int32)
        rest = at // n5
        source = _step_of(row, orders, 4, at % n5, mask)
        source += _step_of(row, orders, 3, rest % n4, mask) * n5
        rest = rest // n4
        source += _step_of(row, orders, 2, rest % n3, mask) * (n4 * n5)
        rest = rest // n3
        source += _step_of(row, orders, 1, rest % n2, mask) * (n3 * n4 * n5)
        source += _step_of(row, orders, 0, rest // n2, mask) * (n2 * n3 * n4 * n5)
        tl.store(v_new + at, tl.load(v + source, mask=mask, other=0.0), mask=mask)


def _packed(tensors: Sequence[Tensor], first: int) -> tuple[list[int], list[int], int]:
    """(which are not empty, where each lies from `first` on, where the last ends); multiples of 4 stay aligned."""
    kept = sorted((i for i, t in enumerate(tensors) if t.numel()), key=lambda i: tensors[i].numel() % 4 != 0)
    places = [0] * len(tensors)
    for i in kept:
        places[i], first = first, first + tensors[i].numel()
    return kept, places, first


def _build(exp_avg, exp_avg_sq, rotation, order, device) -> tuple | bool:
    entries, orders, first = [], [], 0
    turns, turn_at, used = _packed(rotation, BLOCK)  # never at 0, which stands for none
    sorts, sort_at, _ = _packed(order, 1)
    if any(t.device != device or t.dtype is not torch.int64 for t in order):
        return False
    for m, v in zip(exp_avg, exp_avg_sq, strict=True):
        axes = slice(first, first + m.dim())
        first = axes.stop
        none = [m.new_empty((0, 0))] * m.dim()
        entry = soap_plan.entry(m, m, m, v, none, rotation[axes])
        if entry is None or any(t.numel() and t.shape != (d,) for t, d in zip(order[axes], m.shape, strict=True)):
            return False
        missing = (0,) * (5 - m.dim())
        entry.bases = (*missing, *(4 * place for place in turn_at[axes]))
        places = (*missing, *sort_at[axes])
        if m.numel() and (any(entry.bases) or any(places)):
            entries.append(entry)
            orders.append(places)
    plan = soap_plan.build(entries, device, step=False, used=used)
    rows, tiles = [], []
    for index, (e, places) in enumerate(zip(entries, orders, strict=True)):
        n = prod(e.sizes)
        rows.append((*e.sizes, *places, e.m, e.v, e.final, e.raw + e.spare - e.final, n))
        tiles += [(index, at) for at in range(0, n, BLOCK)]
    pointers = plans.table([(address, 0) for address in (e.m for e in entries)], 2, device)
    tables = plans.table(tiles, 2, device), plans.table(rows, COLUMNS.value, device), pointers
    return plan, *tables, turns, slice(BLOCK, used), sorts


def rotate_moments_(
    exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], rotation: Sequence[Tensor], order: Sequence[Tensor],
    precision: str = "tf32x3",
) -> bool:  # fmt: skip
    """Rotates the whole list, without a wait; False, having launched nothing, where it is not taken."""
    if not exp_avg:
        return True
    device = exp_avg[0].device
    lists = (exp_avg, exp_avg_sq, rotation, order)
    key = (
        "rotate", *(tuple(map(Tensor.data_ptr, t)) for t in lists[:2]), *(tuple([t.shape for t in x]) for x in lists),
        *(tuple([(t.dtype, t.is_contiguous()) for t in x]) for x in lists),
    )  # fmt: skip
    built = plans.plan(key, device, lambda: _build(*lists, device))
    if not built:
        return False
    plan, tiles, rows, pointers, turns, place, sorts = built
    if not len(tiles):
        return True
    ends = plan.tiles["ends"]
    with torch.no_grad(), torch.cuda.device_of(exp_avg[0]):
        scratch = torch.empty(plan.floats, device=device)
        if turns:
            torch.cat([rotation[i].view(-1) for i in turns], out=scratch[place])
        orders = torch.cat([order[i] for i in sorts]) if sorts else rows
        taps.gather_kernel[(len(ends),)](
            ends, plan.tensors, pointers, scratch, plan.flags, plan.tap_sums, False, precision, "ieee",
            plan.most_taps, taps.TILE, taps.ROUNDS, **taps.LAUNCH,
        )  # fmt: skip
        project(plan, "rows", scratch, precision, step=False)
        project(plan, "columns", scratch, precision, step=False)
        for back in (False, True):
            permute_moments_kernel[(len(tiles),)](tiles, rows, orders, scratch, back, BLOCK, num_warps=4)
    return True


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [
    (
        permute_moments_kernel,
        {"tiles": "*i64", "tensors": "*i64", "orders": "*i64", "scratch": "*fp32"},
        {"BACK": back, "BLOCK": BLOCK},
    )
    for back in (False, True)
]
