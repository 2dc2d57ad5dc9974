"""lic_fast::q_sample(x, signal, spread, seed), the noising of diffusion training, and its loss ::q_sample_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import q_sample as reference
from ._library import FLOATS, define, is_dense, laid_out_as


def _by_samples(x: Tensor, noisy: bool) -> Tensor:
    """x [B, *] as kernels walk it: dense, sample after sample; noise is counted in row-major order."""
    if x.is_contiguous():
        return x
    apart = len(x) == 1 or x.stride(0) == x.numel() // len(x)
    return x if apart and not noisy and is_dense(x) else x.contiguous()


def _wide(x: Tensor, values: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return values.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _present(like: Tensor, value: Tensor | None) -> Tensor:
    """None as an empty tensor."""
    return like.new_empty(0, dtype=torch.int64) if value is None else value


def _noising(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Runs `kernel(x, signal, spread, seed, out)`, x and out contiguous."""

    def run(x: Tensor, signal: Tensor, spread: Tensor, seed: Tensor) -> Tensor:
        out, walked = torch.empty_like(x), _by_samples(x, True)
        target = out if out.is_contiguous() else torch.empty_like(walked)
        kernel(walked, _wide(x, signal), _wide(x, spread), seed, target)
        return out if target is out else out.copy_(target)

    return run


def _loss(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Runs `kernel(f, x, weight, seed, absolute, loss [])`; of x and seed one is empty."""

    def run(f: Tensor, x: Tensor | None, weight: Tensor, seed: Tensor | None, absolute: bool) -> Tensor:
        if not f.numel():
            return _nothing(f)
        walked = _by_samples(f, seed is not None)
        target = None if x is None else laid_out_as(walked, x)
        loss = torch.empty((), dtype=torch.promote_types(f.dtype, torch.float32), device=f.device)
        kernel(walked, _present(f, target), _wide(f, weight), _present(f, seed), absolute, loss)
        return loss

    return run


def _loss_backward(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Runs `kernel(f, x, scale, seed, absolute, d_f)`."""

    def run(grad: Tensor, f: Tensor, x: Tensor | None, weight: Tensor, seed: Tensor | None, absolute: bool) -> Tensor:
        d_f, walked = torch.empty_like(f), _by_samples(f, seed is not None)
        target = None if x is None else laid_out_as(walked, x)
        out = d_f if d_f.stride() == walked.stride() else torch.empty_like(walked)
        scale = reference.gradient_scale(grad, f, weight, absolute).contiguous()
        kernel(walked, _present(f, target), scale, _present(f, seed), absolute, out)
        return d_f if out is d_f else d_f.copy_(out)

    return run


def _nothing(f: Tensor) -> Tensor:
    """The mean over no elements, as torch.mean has it."""
    return torch.full((), float("nan"), dtype=torch.promote_types(f.dtype, torch.float32), device=f.device)


def _native_kernel(backend: str, name: str) -> Callable[..., Any]:
    return lambda *args: _native.op(backend, name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("q_sample"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], plain: Callable[..., Tensor]) -> OpSpec:
    out = f"{name}_out"
    impls = {
        "cuda": Impl(
            wrap(_native_kernel("cuda", out)), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
        ),
        "triton": Impl(wrap(_triton_kernel(out)), ("cuda", "cpu"), FLOATS, _triton.why_not),
        "cpp": Impl(
            wrap(_native_kernel("cpp", out)),
            ("cpu",),
            tuple(dtype for dtype in FLOATS if dtype is not torch.float16),
            lambda device: _native.why_not("cpp", device),
        ),
        "reference": Impl(plain, None, FLOATS),
    }
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}))


NOISING = _spec("q_sample", _noising, reference.q_sample)
LOSS = _spec("q_sample_loss", _loss, reference.q_sample_loss)
LOSS_BACKWARD = _spec("q_sample_loss_bwd", _loss_backward, reference.q_sample_loss_bwd)


define(
    "q_sample(Tensor x, Tensor signal, Tensor spread, Tensor seed) -> Tensor",
    lambda x, *rest: NOISING(x, x, *rest),
    lambda x, *rest: torch.empty_like(x),
)
define(
    "q_sample_loss(Tensor f, Tensor? x, Tensor weight, Tensor? seed, bool absolute) -> Tensor",
    lambda f, *rest: LOSS(f, f, *rest),
    lambda f, *rest: f.new_empty((), dtype=torch.promote_types(f.dtype, torch.float32)),
)
define(
    "q_sample_loss_bwd(Tensor grad, Tensor f, Tensor? x, Tensor weight, Tensor? seed, bool absolute) -> Tensor",
    lambda grad, f, *rest: LOSS_BACKWARD(f, grad, f, *rest),
    lambda grad, f, *rest: torch.empty_like(f),
)


def _save_noising(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _noising_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signal,) = ctx.saved_tensors
    column = signal.to(torch.promote_types(grad.dtype, torch.float32)).reshape(-1, *[1] * (grad.dim() - 1))
    return (grad * column).to(grad.dtype) if ctx.needs_input_grad[0] else None, None, None, None


def _save_loss(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.absolute = inputs
    ctx.save_for_backward(*tensors)


def _loss_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    f, x, weight, seed = ctx.saved_tensors
    to_f, to_x = ctx.needs_input_grad[:2]
    d_f = torch.ops.lic_fast.q_sample_loss_bwd(grad, f, x, weight, seed, ctx.absolute) if to_f or to_x else None
    return d_f if to_f else None, -d_f if to_x else None, None, None, None


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "q_sample_loss: gradients of gradients are not supported; write it in PyTorch's operations where you need them"
    )


torch.library.register_autograd("lic_fast::q_sample", _noising_gradients, setup_context=_save_noising)
torch.library.register_autograd("lic_fast::q_sample_loss", _loss_gradients, setup_context=_save_loss)
torch.library.register_autograd("lic_fast::q_sample_loss_bwd", _no_second_order)
