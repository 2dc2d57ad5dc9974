"""lic_fast::sma_update_(slow, fast, alpha, reset): sampling-then-moving average over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.sma_update import sma_update_ as reference
from ._library import FLOATS, all_contiguous, copy_back, define, is_dense, laid_out_as, mark_changed, plain

# (slow, fast) dtypes that are averaged; the arithmetic is in the wider of the two.
PAIRS = (*((torch.float32, fast) for fast in FLOATS), (torch.float64, torch.float64))


def _flat(kernel: Callable[..., bool]) -> Callable[..., None]:
    """Strided views are copied in and out, the rest is walked where it lies."""

    def run(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
        walked_slow, walked_fast = slow, fast
        if not all_contiguous(slow, fast):
            walked_slow = [s if is_dense(s) else s.contiguous() for s in slow]
            walked_fast = [laid_out_as(s, f) for s, f in zip(walked_slow, fast, strict=True)]
        if not kernel(walked_slow, walked_fast, alpha, reset):
            raise RuntimeError("sma_update_: the kernel refused lists that passed the checks; please report this")
        copy_back(slow, walked_slow)
        if reset:
            copy_back(fast, walked_fast)

    return run


def _native_kernel(backend: str) -> Callable[..., bool]:
    return lambda *args: _native.op(backend, "sma_update_")(*args)


def _triton_kernel(*args: object) -> bool:
    return _triton.kernels("sma_update").sma_update_(*args)


_CPP_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)  # of fast, as in all of this table
SPEC = register(
    OpSpec(
        "sma_update_",
        {
            "cuda": Impl(
                _flat(_native_kernel("cuda")), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_flat(_triton_kernel), ("cuda", "cpu"), FLOATS, _triton.why_not),
            "cpp": Impl(
                _flat(_native_kernel("cpp")), ("cpu",), _CPP_DTYPES, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(reference, None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    if slow:
        SPEC(fast[0], slow, fast, alpha, reset)
        mark_changed([*slow, *fast] if reset else slow)


def _fake(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    return None


def attempt(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> bool:
    """Averages by the shortest way: the native kernel, where it is the choice, checks the lists itself.

    False, nothing written, where it is not or finds anything out of the ordinary.
    """
    if not (slow and fast and (slow[0].dtype, fast[0].dtype) in PAIRS and plain(fast[0])):
        return False
    backend = SPEC.choose(fast[0].device.type, fast[0].dtype)
    if backend not in ("cpp", "cuda") or not _native.op(backend, "sma_update_")(slow, fast, alpha, reset):
        return False
    mark_changed([*slow, *fast] if reset else slow)
    return True


define("sma_update_(Tensor(a!)[] slow, Tensor(b!)[] fast, float alpha, bool reset) -> ()", _op, _fake)
