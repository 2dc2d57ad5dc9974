"""lic_fast::soap_update_: one ordinary step of SOAP over a list of preconditioned tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, before_falling_back, register
from ..reference.soap_update import soap_update_ as reference
from ._library import FLOATS, copy_back, define, is_dense, mark_changed
from .adam_update import CPP_DTYPES, TRITON_DTYPES

PRECISIONS = ("ieee", "tf32x3", "tf32")


def _cpp(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], *rest: object) -> None:
    grads = [g.to(m.dtype) if g.dtype is torch.float16 else g for g, m in zip(grads, exp_avg, strict=True)]
    kernel = _native.op("cpp", "soap_update_")
    if kernel(params, grads, exp_avg, *rest):
        return
    walked = [p if is_dense(p) else p.contiguous() for p in params]  # strides that may overlap are not its to judge
    if not kernel(walked, grads, exp_avg, *rest):
        raise RuntimeError("soap_update_: the kernel refused lists that passed the checks; please report this")
    copy_back(params, walked)


def _run_triton(*args: object) -> None:
    if not _triton.kernels("soap_update").soap_update_(*args):
        before_falling_back("soap_update_", "it does not take these tensors")
        reference(*args)


SPEC = register(
    OpSpec(
        "soap_update_",
        {
            "triton": Impl(_run_triton, ("cuda", "cpu"), TRITON_DTYPES, _triton.why_not),
            "cpp": Impl(_cpp, ("cpu",), CPP_DTYPES, lambda device: _native.why_not("cpp", device)),
            "reference": Impl(reference, None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )
)


def _op(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], GG: list[Tensor],
    Q: list[Tensor], counts: Tensor, hyper: Tensor, correct_bias: bool, normalize_grads: bool, precision: str,
) -> None:  # fmt: skip
    if params:
        settings = (correct_bias, normalize_grads, precision)
        SPEC(params[0], params, grads, exp_avg, exp_avg_sq, GG, Q, counts, hyper, *settings)
        mark_changed([*params, *exp_avg, *exp_avg_sq, *GG, counts])


def _fake(*args: object) -> None:
    return None


define(
    "soap_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] GG, Tensor[] Q, Tensor(e!) counts, Tensor hyper, bool correct_bias, bool normalize_grads, "
    "str precision) -> ()",
    _op,
    _fake,
)
