"""lic_fast::ddim_update(x, f, seed, a, b, clamp, noise): an update of a diffusion sampler in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.ddim_update import ddim_update as reference
from ._library import FLOATS, define, is_dense, laid_out_as


def _flat(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Lays x and f out alike and runs `kernel(x, f, seed or an empty tensor, a, b, clamp, noise, out)`."""

    def run(x: Tensor, f: Tensor, seed: Tensor | None, *numbers: float) -> Tensor:
        out = torch.empty_like(x)
        # noise is counted in row-major order, whatever the layout
        walked = x if is_dense(x) and (seed is None or x.is_contiguous()) else x.contiguous()
        target = out if out.stride() == walked.stride() else torch.empty_like(walked)
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        kernel(walked, laid_out_as(walked, f), none if seed is None else seed, *numbers, target)
        return out if target is out else out.copy_(target)

    return run


def _native_kernel(backend: str) -> Callable[..., Any]:
    return lambda *args: _native.op(backend, "ddim_update_out")(*args)


def _triton_kernel(*args: Any) -> None:
    _triton.kernels("ddim_update").ddim_update_out(*args)


_CPP_DTYPES = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
SPEC = register(
    OpSpec(
        "ddim_update",
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


def _op(x: Tensor, f: Tensor, seed: Tensor | None, a: float, b: float, clamp: float, noise: float) -> Tensor:
    return SPEC(x, x, f, seed, a, b, clamp, noise)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


define(
    "ddim_update(Tensor x, Tensor f, Tensor? seed, float a, float b, float clamp, float noise) -> Tensor", _op, _fake
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, f, _, ctx.a, ctx.b, ctx.clamp, _ = inputs
    ctx.save_for_backward(f)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (f,) = ctx.saved_tensors
    to_x, to_f = ctx.needs_input_grad[:2]
    return (
        grad * ctx.a if to_x else None,
        grad * ctx.b * (f.abs() <= ctx.clamp) if to_f else None,
        *[None] * 5,
    )


torch.library.register_autograd("lic_fast::ddim_update", _gradients, setup_context=_save)
