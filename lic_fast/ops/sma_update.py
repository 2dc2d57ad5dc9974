"""lic_fast::sma_update_(slow, fast, alpha, reset): sampling-then-moving average over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.sma_update import sma_update_ as reference
from ._library import FLOATS, alike, all_contiguous, define, mark_changed, plain

# (slow, fast) dtypes that are averaged; the arithmetic is in the wider of the two.
PAIRS = (*((torch.float32, fast) for fast in FLOATS), (torch.float64, torch.float64))


def _run(
    kernel: Callable[..., bool],
    skip: tuple[torch.dtype, ...],
    slow: list[Tensor],
    fast: list[Tensor],
    alpha: float,
    reset: bool,
) -> None:
    """Runs `kernel` on the pairs that a flat loop can walk, the reference on strided views and dtypes in `skip`."""
    if not (all_contiguous(slow, fast) and {f.dtype for f in fast}.isdisjoint(skip)):
        flat = [f.dtype not in skip and alike(s, f) for s, f in zip(slow, fast, strict=True)]
        rest = [i for i, ok in enumerate(flat) if not ok]
        reference([slow[i] for i in rest], [fast[i] for i in rest], alpha, reset)
        slow = [t for t, ok in zip(slow, flat, strict=True) if ok]
        fast = [t for t, ok in zip(fast, flat, strict=True) if ok]
    if slow and not kernel(slow, fast, alpha, reset):
        raise RuntimeError("sma_update_: the kernel refused lists that passed the checks; please report this")


def _cuda(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    _run(_native.op("cuda", "sma_update_"), (), slow, fast, alpha, reset)


def _run_triton(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    _run(_triton.kernels("sma_update").sma_update_, (), slow, fast, alpha, reset)


def _cpp(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    _run(_native.op("cpp", "sma_update_"), (torch.float16,), slow, fast, alpha, reset)


SPEC = register(
    OpSpec(
        "sma_update_",
        {
            "cuda": Impl(_cuda, ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)),
            "triton": Impl(_run_triton, ("cuda", "cpu"), FLOATS, _triton.why_not),
            "cpp": Impl(_cpp, ("cpu",), FLOATS, lambda device: _native.why_not("cpp", device)),
            "reference": Impl(reference, None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    if slow:
        SPEC(slow[0], slow, fast, alpha, reset)
        mark_changed([*slow, *fast] if reset else slow)


def _fake(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> None:
    return None


def attempt(slow: list[Tensor], fast: list[Tensor], alpha: float, reset: bool) -> bool:
    """Averages by the shortest way: the native kernel, where it is the choice, checks the lists itself.

    False, nothing written, where it is not or finds anything out of the ordinary.
    """
    if not (slow and fast and (slow[0].dtype, fast[0].dtype) in PAIRS and plain(slow[0])):
        return False
    backend = SPEC.choose(slow[0].device.type, slow[0].dtype)
    if backend not in ("cpp", "cuda") or not _native.op(backend, "sma_update_")(slow, fast, alpha, reset):
        return False
    mark_changed([*slow, *fast] if reset else slow)
    return True


define("sma_update_(Tensor(a!)[] slow, Tensor(b!)[] fast, float alpha, bool reset) -> ()", _op, _fake)
