"""One ordinary step of SOAP over a whole list of tensors, in ten launches and without a wait:

    gather        the gradient into scratch, mixed by the tap axes' bases; flags of what is not finite  (soap_taps.py)
    step_scalars  counts, and each tensor's scalars of this step                                     (step_scalars.py)
    gram          GG += (1 - shampoo_beta) (Gram of the gradient - GG), axes R and C                 (grouped_gemm.py)
    gram_sum      the same for sums that were cut into pieces
    tap_gram      the same for tap axes
    rows, columns the projections; columns ends with Adam on what is projected: n = m / (sqrt(v) + eps)
    columns_back, rows_back
    scatter       taps unmixed, p <- (p - step_size u) (1 - lr weight_decay), rounded once

normalize_grads takes two more (the update's root mean square); launches that would have no tile are left out.
ELIC's 176 matrices and convolutions (32 M elements) take 290 MB of scratch, about 2 GB through device memory (gather 12
bytes an element, rows and the back projections 8 each, columns 24, Grams 8, scatter 12) and 88 GFLOP with padding.
`precision` is tl.dot's for everything that goes with the bases; Grams are "ieee" when it is, else "tf32x3"; those of
taps are always "ieee". Views of parameters and gradients in any layout, fp32, bf16 or fp16; the state fp32, contiguous.
Not taken (False, and nothing launched): fp64, more than 64 taps with bases or factors, 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import grouped_gemm as gemm
from . import plans, soap_plan
from . import soap_taps as taps
from .step_scalars import step_scalars_kernel

BLOCK = 1024


def _build(params, grads, exp_avg, exp_avg_sq, GG, Q, device) -> soap_plan.Plan | bool:
    entries, first = [], 0
    for p, g, m, v in zip(params, grads, exp_avg, exp_avg_sq, strict=True):
        axes = slice(first, first + m.dim())
        first = axes.stop
        entries.append(soap_plan.entry(p, g, m, v, GG[axes], Q[axes]))
        if entries[-1] is None:
            return False
    return soap_plan.build(entries, device, step=True)


def project(
    plan: soap_plan.Plan, name: str, scratch: Tensor, precision: str, *, back: bool = False, step: bool = True
) -> None:
    """One launch of a projection by its name in the plan."""
    tiles = plan.tiles[name]
    if not len(tiles):
        return
    sizes = (gemm.LONG, gemm.WIDE, gemm.SMALL, gemm.BK)
    if name.startswith("rows"):
        gemm.project_rows_kernel[(len(tiles),)](
            tiles, scratch, plan.scalars, back, step, precision, *sizes, **gemm.LAUNCH
        )  # fmt: skip
    else:
        adam = step and not back
        gemm.project_columns_kernel[(len(tiles),)](
            tiles, scratch, plan.scalars, back, adam, step, precision, *sizes, gemm.ELEMENTS,
            **gemm.LAUNCH,
        )  # fmt: skip


def _grams(plan: soap_plan.Plan, scratch: Tensor, precision: str) -> None:
    tiles = plan.tiles
    if n := len(tiles["gram"]):
        gemm.gram_kernel[(n,)](
            tiles["gram"], scratch, plan.scalars, plan.gram_sums, precision, gemm.GRAM_TILE, gemm.GRAM_BK,
            **gemm.LAUNCH,
        )  # fmt: skip
    if n := len(tiles["gram_sum"]):
        gemm.gram_sum_kernel[(n,)](
            tiles["gram_sum"], scratch, plan.scalars, plan.gram_sums, gemm.GRAM_TILE, num_warps=4
        )  # fmt: skip
    if n := len(tiles["tap_gram"]):
        taps.tap_gram_kernel[(n,)](
            tiles["tap_gram"], scratch, plan.scalars, plan.tap_sums, taps.PAIRS, taps.PARTIALS, num_warps=4
        )  # fmt: skip


def _scatter(plan: soap_plan.Plan, pointers: Tensor, scratch: Tensor, normalize: bool, precision: str) -> None:
    ends = plan.tiles["ends"]
    for mode in (1, 2) if normalize else (0,):
        if len(ends):
            taps.scatter_kernel[(len(ends),)](
                ends, plan.tensors, pointers, scratch, plan.scalars, plan.sums, mode, precision,
                plan.most_taps, taps.TILE, taps.ROUNDS, **taps.LAUNCH,
            )  # fmt: skip
        if mode == 1:
            taps.divisor_kernel[(len(plan.tensors),)](
                plan.tensors, scratch, plan.scalars, plan.sums, taps.SUM_BLOCK, num_warps=4
            )  # fmt: skip


def _launch(plan, pointers, counts, hyper, correct_bias: bool, normalize: bool, precision: str) -> None:
    scratch = torch.empty(plan.floats, device=counts.device)
    gram_precision = "ieee" if precision == "ieee" else "tf32x3"
    ends = plan.tiles["ends"]
    if len(ends):
        taps.gather_kernel[(len(ends),)](
            ends, plan.tensors, pointers, scratch, plan.flags, plan.tap_sums, True, precision, "ieee",
            plan.most_taps, taps.TILE, taps.ROUNDS, **taps.LAUNCH,
        )  # fmt: skip
    step_scalars_kernel[(len(plan.tensors),)](
        plan.tensors, scratch, plan.flags, plan.scalars, counts, hyper, taps.WIDTH.value, taps.GATHERS.value,
        correct_bias, BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _grams(plan, scratch, gram_precision)
    project(plan, "rows", scratch, precision)
    project(plan, "columns", scratch, precision)
    project(plan, "columns_back", scratch, precision, back=True)
    project(plan, "rows_back", scratch, precision, back=True)
    _scatter(plan, pointers, scratch, normalize, precision)


def soap_update_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    GG: Sequence[Tensor], Q: Sequence[Tensor], counts: Tensor, hyper: Tensor,
    correct_bias: bool, normalize_grads: bool, precision: str,
) -> bool:  # fmt: skip
    """One step of the whole list, without a wait; False, having launched nothing, where it is not taken."""
    if not counts.is_contiguous() or not hyper.is_contiguous():
        return False
    if not params:
        return True
    device, pointer = exp_avg[0].device, Tensor.data_ptr
    key = (
        "soap", *(tuple(map(pointer, t)) for t in (exp_avg, exp_avg_sq, GG, Q)), tuple([p.shape for p in params]),
        tuple(map(Tensor.stride, params)), tuple(map(Tensor.stride, grads)),
        tuple([t.dtype for t in params]), tuple([t.dtype for t in grads]),
    )  # fmt: skip
    plan = plans.plan(key, device, lambda: _build(params, grads, exp_avg, exp_avg_sq, GG, Q, device))
    if not plan:
        return False
    pointers = plans.numbers(device, tuple(map(pointer, grads)), tuple(map(pointer, params)))
    with torch.cuda.device_of(exp_avg[0]):
        _launch(plan, pointers, counts, hyper, correct_bias, normalize_grads, precision)
    return True
