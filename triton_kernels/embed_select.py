"""The `count` smallest of values [n] where mask, ties by index: radix selection, all of it on the device.

Bits of a value become a key of the same order; what is not a candidate (NaN, mask False) gets the largest. For each
digit (fp32: 11 + 11 + 10 bits, fp64 in six) the keys that share the digits found so far are counted in a table of
integers (atomic sums: any order gives the same), and a program of its own finds the next digit of the threshold. Then a
pass marks what lies below and counts each block's ties, one program adds the counts up, and blocks with ties to take
mark the first of them in their order. fp32 reads values 4 times, and once more where only some ties are taken. Memory:
16 KiB for each digit and 8 bytes for each BLOCK of elements. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
BUCKETS = 2048
PROGRAMS = 1024  # of a count: each adds its table to the total once
DIGITS = {4: ((21, 11), (10, 11), (0, 10)), 8: ((53, 11), (42, 11), (31, 11), (20, 11), (10, 10), (0, 10))}
# what `state` [2] holds: the digits of the threshold found so far, its rank among the keys that share them


@triton.jit
def _keys(values_ptr, mask_ptr, offsets, inside, HAS_MASK: tl.constexpr, KEY: tl.constexpr):
    """Keys of the order of the values; the largest for NaN and where the mask is False."""
    if KEY == tl.uint32:
        SIGN: tl.constexpr = 0x80000000
        INFINITY: tl.constexpr = 0x7F800000
        NONE: tl.constexpr = 0xFFFFFFFF
    else:
        SIGN: tl.constexpr = 0x8000000000000000
        INFINITY: tl.constexpr = 0x7FF0000000000000
        NONE: tl.constexpr = 0xFFFFFFFFFFFFFFFF
    bits = tl.load(values_ptr + offsets, mask=inside, other=0.0).to(KEY, bitcast=True)
    sign = tl.full(bits.shape, SIGN, KEY)
    none = tl.full(bits.shape, NONE, KEY)
    magnitude = bits & (none ^ sign)
    key = tl.where((bits & sign) != 0, bits ^ none, bits | sign)
    key = tl.where(magnitude == 0, sign, key)  # -0.0 is 0.0
    candidate = inside & (magnitude <= tl.full(bits.shape, INFINITY, KEY))
    if HAS_MASK:
        candidate = candidate & (tl.load(mask_ptr + offsets, mask=inside, other=0) != 0)
    return tl.where(candidate, key, none)


@triton.jit
def embed_select_count_kernel(
    values_ptr, mask_ptr, state_ptr, counts_ptr, n,
    SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, HAS_MASK: tl.constexpr, KEY: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    counts = tl.zeros([BUCKETS], dtype=tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        offsets = begin + tl.arange(0, BLOCK)
        matching = offsets < n
        keys = _keys(values_ptr, mask_ptr, offsets, matching, HAS_MASK, KEY)
        if not FIRST:
            matching = matching & ((keys >> (SHIFT + BITS)) == tl.load(state_ptr).to(KEY))
        digits = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digits, BUCKETS, mask=matching)
    tl.atomic_add(counts_ptr + tl.arange(0, BUCKETS), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def embed_select_search_kernel(
    state_ptr, counts_ptr, BITS: tl.constexpr, LAST: tl.constexpr, KEY: tl.constexpr, BUCKETS: tl.constexpr
):
    """One program: the bucket that holds the rank-th key becomes the next digit."""
    buckets = tl.arange(0, BUCKETS)
    counts = tl.load(counts_ptr + buckets)
    prefix = tl.load(state_ptr)
    rank = tl.load(state_ptr + 1)
    below = tl.cumsum(counts, 0) < rank
    digit = tl.sum(below.to(tl.int64), 0)
    rank -= tl.sum(tl.where(below, counts, 0), 0)
    prefix = (prefix << BITS) | digit
    if LAST:
        NONE: tl.constexpr = 0xFFFFFFFF if KEY == tl.uint32 else -1
        equal = tl.sum(tl.where(buckets == digit, counts, 0), 0)
        fewer = prefix == NONE  # fewer candidates than count: all of them lie below
        every = (prefix != NONE) & (rank == equal)  # every tie is taken: all lie below the next key
        prefix = tl.where(every, prefix + 1, prefix)
        rank = tl.where(fewer | every, 0, rank)
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, rank)


@triton.jit
def embed_select_mark_kernel(
    values_ptr, mask_ptr, state_ptr, selected_ptr, ties_ptr, n,
    HAS_MASK: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    keys = _keys(values_ptr, mask_ptr, offsets, inside, HAS_MASK, KEY)
    threshold = tl.load(state_ptr).to(KEY)
    tl.store(selected_ptr + offsets, (keys < threshold).to(tl.uint8), mask=inside)
    ties = tl.sum((inside & (keys == threshold)).to(tl.int32), 0)
    tl.store(ties_ptr + tl.program_id(0), ties.to(tl.int64))


@triton.jit
def embed_select_scan_kernel(state_ptr, ties_ptr, blocks, BLOCK: tl.constexpr):
    """One program: each block's ties become the ties before it."""
    carry = tl.zeros([], dtype=tl.int64)
    if tl.load(state_ptr + 1) > 0:
        for begin in range(0, blocks, BLOCK):
            places = begin + tl.arange(0, BLOCK)
            ties = tl.load(ties_ptr + places, mask=places < blocks, other=0)
            tl.store(ties_ptr + places, carry + tl.cumsum(ties, 0) - ties, mask=places < blocks)
            carry += tl.sum(ties, 0)


@triton.jit
def embed_select_ties_kernel(
    values_ptr, mask_ptr, state_ptr, selected_ptr, ties_ptr, n,
    HAS_MASK: tl.constexpr, KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    taken = tl.load(state_ptr + 1)
    if taken > 0:
        before = tl.load(ties_ptr + tl.program_id(0))
        if before < taken:
            offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = offsets < n
            keys = _keys(values_ptr, mask_ptr, offsets, inside, HAS_MASK, KEY)
            tie = inside & (keys == tl.load(state_ptr).to(KEY))
            rank = before + tl.cumsum(tie.to(tl.int32), 0)
            tl.store(selected_ptr + offsets, tl.full([BLOCK], 1, tl.uint8), mask=tie & (rank <= taken))


def embed_select_out(values: Tensor, count: int, mask: Tensor | None, selected: Tensor) -> None:
    """Fills selected [n] bool; values [n] fp32 or fp64 and mask [n] contiguous, 1 <= count <= n."""
    n, digits = values.numel(), DIGITS[values.element_size()]
    key = tl.uint32 if values.element_size() == 4 else tl.uint64
    blocks = triton.cdiv(n, BLOCK)
    state = torch.zeros(2, dtype=torch.int64, device=values.device)
    state[1:].fill_(count)
    counts = torch.zeros((len(digits), BUCKETS), dtype=torch.int64, device=values.device)
    ties = torch.empty(blocks, dtype=torch.int64, device=values.device)
    out = selected.view(torch.uint8)
    masked = out if mask is None else mask.view(torch.uint8)
    has_mask = mask is not None
    with torch.cuda.device_of(values):
        for i, (shift, bits) in enumerate(digits):
            embed_select_count_kernel[(min(blocks, PROGRAMS),)](
                values, masked, state, counts[i], n, shift, bits, i == 0, has_mask, key, BUCKETS, BLOCK, num_warps=8
            )
            embed_select_search_kernel[(1,)](state, counts[i], bits, shift == 0, key, BUCKETS, num_warps=8)
        embed_select_mark_kernel[(blocks,)](values, masked, state, out, ties, n, has_mask, key, BLOCK, num_warps=8)
        embed_select_scan_kernel[(1,)](state, ties, blocks, BLOCK, num_warps=8)
        embed_select_ties_kernel[(blocks,)](values, masked, state, out, ties, n, has_mask, key, BLOCK, num_warps=8)


# What a compilation ahead of time needs: kernel, argument types, compile-time values.
AOT = [(embed_select_scan_kernel, {"state_ptr": "*i64", "ties_ptr": "*i64", "blocks": "i32"}, {"BLOCK": BLOCK})]
for _size, _name, _key in ((4, "*fp32", tl.uint32), (8, "*fp64", tl.uint64)):
    _types = {"values_ptr": _name, "mask_ptr": "*u8", "state_ptr": "*i64", "n": "i64"}
    for _place in (0, -1):
        _shift, _bits = DIGITS[_size][_place]
        AOT += [
            (
                embed_select_count_kernel,
                _types | {"counts_ptr": "*i64"},
                {
                    "SHIFT": _shift, "BITS": _bits, "FIRST": _place == 0, "HAS_MASK": _place == 0, "KEY": _key,
                    "BUCKETS": BUCKETS, "BLOCK": BLOCK,
                },
            ),
            (
                embed_select_search_kernel,
                {"state_ptr": "*i64", "counts_ptr": "*i64"},
                {"BITS": _bits, "LAST": _place == -1, "KEY": _key, "BUCKETS": BUCKETS},
            ),
        ]  # fmt: skip
    AOT += [
        (
            kernel,
            _types | {"selected_ptr": "*u8", "ties_ptr": "*i64"},
            {"HAS_MASK": has_mask, "KEY": _key, "BLOCK": BLOCK},
        )
        for kernel in (embed_select_mark_kernel, embed_select_ties_kernel)
        for has_mask in (True, False)
    ]
