"""lic_fast::adam_update_: Adam with SOAP's conventions over a list of tensors without preconditioners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, before_falling_back, register
from ..reference.adam_update import adam_update_ as reference
from ._library import FLOATS, copy_back, define, is_dense, laid_out_as, mark_changed

TRITON_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float64)
CPP_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)


def _flat(kernel: Callable[..., bool]) -> Callable[..., None]:
    """Tensors that are not laid out alike are copied in and out; what a kernel does not do, the reference does."""

    def run(params, grads, exp_avg, exp_avg_sq, counts, hyper, correct_bias, normalize_grads) -> None:
        walked = [p if is_dense(p) else p.contiguous() for p in params]
        moments = [[laid_out_as(p, m) for p, m in zip(walked, ms, strict=True)] for ms in (exp_avg, exp_avg_sq)]
        grads = [laid_out_as(p, g) for p, g in zip(walked, grads, strict=True)]
        settings = (correct_bias, normalize_grads)
        if not kernel(walked, grads, *moments, counts, hyper, *settings):
            before_falling_back("adam_update_", f"it does not take these tensors or normalize_grads={normalize_grads}")
            reference(walked, grads, *moments, counts, hyper, *settings)
        for originals, stand_ins in ((params, walked), (exp_avg, moments[0]), (exp_avg_sq, moments[1])):
            copy_back(originals, stand_ins)

    return run


def _native_kernel(backend: str) -> Callable[..., bool]:
    return lambda *args: _native.op(backend, "adam_update_")(*args)


def _triton_kernel(*args: object) -> bool:
    return _triton.kernels("adam_update").adam_update_(*args)


SPEC = register(
    OpSpec(
        "adam_update_",
        {
            "cuda": Impl(
                _flat(_native_kernel("cuda")), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_flat(_triton_kernel), ("cuda", "cpu"), TRITON_DTYPES, _triton.why_not),
            "cpp": Impl(
                _flat(_native_kernel("cpp")), ("cpu",), CPP_DTYPES, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(reference, None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    counts: Tensor, hyper: Tensor, correct_bias: bool, normalize_grads: bool,
) -> None:  # fmt: skip
    if params:
        SPEC(params[0], params, grads, exp_avg, exp_avg_sq, counts, hyper, correct_bias, normalize_grads)
        mark_changed([*params, *exp_avg, *exp_avg_sq, counts])


def _fake(*args: object) -> None:
    return None


define(
    "adam_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!) counts, Tensor hyper, bool correct_bias, bool normalize_grads) -> ()",
    _op,
    _fake,
)
