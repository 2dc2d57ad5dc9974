"""lic_fast::rls_update_: a step of recursive least squares of the coefficients of a partly embedded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.rls_update import rls_update_ as reference
from ._library import FLOATS, define, is_dense, mark_changed

CPP_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)


def _flat(kernel: Callable[..., None]) -> Callable[..., None]:
    """Strided parameters, which are only read, are copied."""

    def run(params: list[Tensor], *rest: Any) -> None:
        kernel([p if is_dense(p) else p.contiguous() for p in params], *rest)

    return run


def _native_kernel(backend: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        if not _native.op(backend, "rls_update_")(*args):
            raise RuntimeError("rls_update_: the kernel refused tensors that passed the checks; please report this")

    return run


def _triton_kernel(*args: Any) -> None:
    _triton.kernels("rls_update").rls_update_(*args)


SPEC = register(
    OpSpec(
        "rls_update_",
        {
            "cuda": Impl(
                _flat(_native_kernel("cuda")), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_flat(_triton_kernel), ("cuda", "cpu"), FLOATS, _triton.why_not),
            "cpp": Impl(
                _flat(_native_kernel("cpp")), ("cpu",), CPP_DTYPES, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(_flat(reference), None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(
    params: list[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, gains: Tensor, change: Tensor | None
) -> None:
    if params:
        SPEC(params[0], params, code, base, k, d, gains, change)
        mark_changed([k, d] if change is None else [k, d, change])


def _fake(*args: object) -> None:
    return None


define(
    "rls_update_(Tensor[] params, Tensor code, Tensor base, Tensor(a!) k, Tensor(b!) d, Tensor gains, "
    "Tensor(c!)? change) -> ()",
    _op,
    _fake,
)
