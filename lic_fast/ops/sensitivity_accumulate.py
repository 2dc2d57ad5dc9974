"""lic_fast::sensitivity_accumulate_(s, params, grads, kind): sums of the weights' sensitivities over lists."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.sensitivity_accumulate import KINDS
from ..reference.sensitivity_accumulate import sensitivity_accumulate_ as reference
from ._library import FLOATS, define, is_dense, laid_out_as, mark_changed, plain

__all__ = ["KINDS", "SPEC", "attempt"]


def _flat(kernel: Callable[..., bool | None]) -> Callable[..., None]:
    """Parameters and gradients that are not dense and laid out alike, which are only read, are copied."""

    def run(s: list[Tensor], params: list[Tensor], grads: list[Tensor], kind: int) -> None:
        walked = [p if is_dense(p) else p.contiguous() for p in params]
        pairs = zip(walked, grads, strict=True)
        if kernel(s, walked, [g if g.numel() != p.numel() else laid_out_as(p, g) for p, g in pairs], kind) is False:
            raise RuntimeError(
                "sensitivity_accumulate_: the kernel refused lists that passed the checks; please report this"
            )

    return run


def _native_kernel(backend: str) -> Callable[..., bool]:
    return lambda *args: _native.op(backend, "sensitivity_accumulate_")(*args)


def _triton_kernel(*args: object) -> bool:
    return _triton.kernels("sensitivity_accumulate").sensitivity_accumulate_(*args)


_CPP_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)  # of params, as in all of this table
SPEC = register(
    OpSpec(
        "sensitivity_accumulate_",
        {
            "cuda": Impl(
                _flat(_native_kernel("cuda")), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_flat(_triton_kernel), ("cuda", "cpu"), FLOATS, _triton.why_not),
            "cpp": Impl(
                _flat(_native_kernel("cpp")), ("cpu",), _CPP_DTYPES, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(_flat(reference), None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(s: list[Tensor], params: list[Tensor], grads: list[Tensor], kind: int) -> None:
    if params:
        SPEC(params[0], s, params, grads, kind)
        mark_changed(s)


def _fake(s: list[Tensor], params: list[Tensor], grads: list[Tensor], kind: int) -> None:
    return None


def attempt(s: list[Tensor], params: list[Tensor], grads: list[Tensor], kind: int) -> bool:
    """Adds by the shortest way: the native kernel, where it is the choice, checks the lists itself.

    False, nothing written, where it is not or finds anything out of the ordinary.
    """
    if not (s and params and params[0].dtype in FLOATS and plain(params[0])):
        return False
    backend = SPEC.choose(params[0].device.type, params[0].dtype)
    if backend not in ("cpp", "cuda") or not _native.op(backend, "sensitivity_accumulate_")(s, params, grads, kind):
        return False
    mark_changed(s)
    return True


define("sensitivity_accumulate_(Tensor(a!)[] s, Tensor[] params, Tensor[] grads, int kind) -> ()", _op, _fake)
