"""lic_fast::gdn, divisive normalization across channels, and its gradients lic_fast::gdn_bwd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import gdn as reference
from ._library import FLOATS, define


def channels_last(x: Tensor) -> bool:
    """Whether x [B, C, *] is walked, and its result laid out, with the channels next to each other."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _walked(tensor: Tensor, last: bool) -> Tensor:
    """`tensor` [B, C, *] contiguous in the order that is walked; a copy where it is laid out otherwise."""
    return (tensor.movedim(1, -1) if last else tensor).contiguous()


def _like(x: Tensor) -> Tensor:
    """Room for a result: of x's shape, in x's memory format; no view, which autograd would not let change in place."""
    return torch.empty_like(x, memory_format=torch.preserve_format if channels_last(x) else torch.contiguous_format)


def _flat_forward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Lays x out and runs `kernel(x, beta, gamma, *form, channels_last, y, factor)`."""

    def run(x: Tensor, beta: Tensor, gamma: Tensor, *form: Any) -> tuple[Tensor, Tensor]:
        *form, keep = form
        last = channels_last(x)
        y, factor = _like(x), _like(x) if keep else x.new_empty(0)
        parameters = beta.contiguous(), gamma.contiguous()
        kernel(_walked(x, last), *parameters, *form, last, _walked(y, last), _walked(factor, last and keep))
        return y, factor

    return run


def _wanted(x: Tensor, beta: Tensor, gamma: Tensor, need: list[bool]) -> list[Tensor]:
    """Room for the gradients; without elements where not needed."""
    return [
        (_like(t) if t is x else torch.empty_like(t, memory_format=torch.contiguous_format))
        if needed
        else t.new_empty(0)
        for needed, t in zip(need, (x, beta, gamma), strict=True)
    ]


def _flat_backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Lays all out as x and runs `kernel(grad, x, factor, beta, gamma, *form, channels_last, dx, dbeta, dgamma)`."""

    def run(
        grad: Tensor, x: Tensor, factor: Tensor | None, beta: Tensor, gamma: Tensor, *form: Any
    ) -> tuple[Tensor, ...]:
        *form, need = form
        last = channels_last(x)
        results = _wanted(x, beta, gamma, need)
        kept = x.new_empty(0) if factor is None else _walked(factor, last)
        out = results[0].movedim(1, -1) if last and need[0] else results[0]
        parameters = beta.contiguous(), gamma.contiguous()
        kernel(_walked(grad, last), _walked(x, last), kept, *parameters, *form, last, out, *results[1:])
        return tuple(results)

    return run


def _reference_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, factor = reference.gdn(x, *rest)
    keep = rest[-1]
    return _like(x).copy_(y), _like(x).copy_(factor) if keep else factor


def _reference_backward(
    grad: Tensor, x: Tensor, factor: Tensor | None, beta: Tensor, gamma: Tensor, *form: Any
) -> tuple[Tensor, ...]:
    *form, need = form
    results = reference.gdn_bwd(grad, x, factor, beta, gamma, *form)
    room = _wanted(x, beta, gamma, need)
    return tuple(to.copy_(value) if needed else to for needed, to, value in zip(need, room, results, strict=True))


def _native_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: _native.op("cpp", name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("gdn"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], kernel: str, plain: Callable[..., Any]) -> OpSpec:
    cpp = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    triton = tuple(dtype for dtype in FLOATS if dtype is not torch.float64)
    impls = {
        "triton": Impl(wrap(_triton_kernel(kernel)), ("cuda", "cpu"), triton, _triton.why_not),
        "cpp": Impl(wrap(_native_kernel(kernel)), ("cpu",), cpp, lambda device: _native.why_not("cpp", device)),
        "reference": Impl(plain, None, FLOATS),
    }
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}))


FORWARD = _spec("gdn", _flat_forward, "gdn_out", _reference_forward)
BACKWARD = _spec("gdn_bwd", _flat_backward, "gdn_bwd_out", _reference_backward)


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return FORWARD(x, x, *rest)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return BACKWARD(x, grad, x, *rest)


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x) if rest[-1] else x.new_empty(0)


def _fake_backward(
    grad: Tensor, x: Tensor, factor: Tensor | None, beta: Tensor, gamma: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_wanted(x, beta, gamma, rest[-1]))


_FORM = "bool inverse, bool simplified, float beta_bound, float gamma_bound, float pedestal"
define(
    f"gdn(Tensor x, Tensor beta, Tensor gamma, {_FORM}, bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    f"gdn_bwd(Tensor grad, Tensor x, Tensor? factor, Tensor beta, Tensor gamma, {_FORM}, bool[] need)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, beta, gamma, *form, keep = inputs
    _, factor = output
    ctx.mark_non_differentiable(factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, factor if keep else None, beta, gamma)
    ctx.form = form


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 9
    results = torch.ops.lic_fast.gdn_bwd(grad, *ctx.saved_tensors, *ctx.form, need)
    return (*(result if needed else None for result, needed in zip(results, need, strict=True)), *[None] * 6)


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "gdn: gradients of gradients are not supported; write x * torch.rsqrt(conv2d(x**2, gamma, beta)) in PyTorch "
        "where you need them"
    )


torch.library.register_autograd("lic_fast::gdn", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::gdn_bwd", _no_second_order)
