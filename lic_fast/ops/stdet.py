"""lic_fast::stdet_adam_step_, stdet_reconstruct_ and stdet_mask_: the steps of a partly embedded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import _layout as layout
from ..reference import stdet as reference
from ._library import FLOATS, copy_back, define, is_dense, laid_out_as, mark_changed

__all__ = ["MASK", "RECONSTRUCT", "STEP", "layout"]

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if all(map(is_dense, tensors)) else [t if is_dense(t) else t.contiguous() for t in tensors]


def _alike(walked: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """`tensors` laid out in memory like `walked`; those without elements stand for what is not there."""
    if not tensors:
        return tensors
    pairs = zip(walked, tensors, strict=True)
    return [t if t.numel() != w.numel() else laid_out_as(w, t) for w, t in pairs]


def _flat_step(kernel: Callable[..., None]) -> Callable[..., None]:
    """Strided tensors are copied in and out."""

    def run(params: list[Tensor], grads: list[Tensor], slow: list[Tensor], *rest: Any) -> None:
        walked = _dense(params)
        walked_slow = _alike(walked, slow)
        kernel(walked, _alike(walked, grads), walked_slow, *rest)
        copy_back(params, walked)
        copy_back(slow, walked_slow)

    return run


def _flat_in_place(kernel: Callable[..., None]) -> Callable[..., None]:
    def run(tensors: list[Tensor], *rest: Any) -> None:
        walked = _dense(tensors)
        kernel(walked, *rest)
        copy_back(tensors, walked)

    return run


def _native_kernel(backend: str, name: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        if not _native.op(backend, name)(*args):
            raise RuntimeError(
                f"{name}: tensors share memory, or a reference lies outside of them; clone them, or correct refs"
            )

    return run


def _triton_kernel(name: str) -> Callable[..., None]:
    return lambda *args: getattr(_triton.kernels("stdet"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], plain: Callable[..., None]) -> OpSpec:
    impls = {
        "cuda": Impl(
            wrap(_native_kernel("cuda", name)), ("cuda",), GPU_DTYPES, lambda device: _native.why_not("cuda", device)
        ),
        "triton": Impl(wrap(_triton_kernel(name)), ("cuda", "cpu"), GPU_DTYPES, _triton.why_not),
        "cpp": Impl(
            wrap(_native_kernel("cpp", name)), ("cpu",), CPP_DTYPES, lambda device: _native.why_not("cpp", device)
        ),
        "reference": Impl(wrap(plain), None, FLOATS),
    }
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}))


STEP = _spec("stdet_adam_step_", _flat_step, reference.stdet_adam_step_)
RECONSTRUCT = _spec("stdet_reconstruct_", _flat_in_place, reference.stdet_reconstruct_)
MASK = _spec("stdet_mask_", _flat_in_place, reference.stdet_mask_)


def _step(params: list[Tensor], grads: list[Tensor], slow: list[Tensor], *rest: Any) -> None:
    if params:
        STEP(params[0], params, grads, slow, *rest)
        exp_avg, exp_avg_sq = rest[4:6]
        mark_changed([*params, *slow, exp_avg, exp_avg_sq])


def _reconstruct(params: list[Tensor], *rest: Any) -> None:
    if params:
        RECONSTRUCT(params[0], params, *rest)
        mark_changed(params)


def _mask(grads: list[Tensor], code: Tensor, sizes: list[int]) -> None:
    if grads:
        MASK(grads[0], grads, code, sizes)
        mark_changed(grads)


def _fake(*args: object) -> None:
    return None


_EMBEDDING = "Tensor code, Tensor base, Tensor k, Tensor d"
define(
    f"stdet_adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] slow, {_EMBEDDING}, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor refs, Tensor hyper, float alpha, bool reset) -> ()",
    _step,
    _fake,
)
define(f"stdet_reconstruct_(Tensor(a!)[] params, {_EMBEDDING}, Tensor refs) -> ()", _reconstruct, _fake)
define("stdet_mask_(Tensor(a!)[] grads, Tensor code, int[] sizes) -> ()", _mask, _fake)
