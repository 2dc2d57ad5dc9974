"""lic_fast::linear_attention_context, keys and values summed over the places, and its gradients ::..._bwd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import linear_attention as reference
from ._library import FLOATS, define


def _walked(x: Tensor) -> Tensor:
    """x [B, C, *] as [B, C, N] with channels or places next to each other: a view where it lies so, else a copy."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return flat if flat.stride(2) == 1 or flat.stride(1) == 1 else flat.contiguous()


def _room(x: Tensor) -> Tensor:
    """Room for a gradient, dense in x's order of channels and places."""
    last = x.dim() > 2 and not x.is_contiguous() and x.stride(1) == 1
    if not last:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_permuted(x.shape, (0, *range(2, x.dim()), 1), dtype=x.dtype, device=x.device)


def _results(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(k.dtype, torch.float32)
    context = k.new_empty((len(k), v.shape[1], k.shape[1]), dtype=wide)
    return context, k.new_empty((len(k), 2, k.shape[1]), dtype=wide)


def _forward_by(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Runs `kernel(k, v, context, statistics)`; k [B, K, N], v [B, V, N], whose places or channels lie dense."""

    def run(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        results = _results(k, v)
        kernel(_walked(k), _walked(v), *results)
        return results

    return run


def _backward_by(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Runs `kernel(grad, k, v, inner, statistics, d_k, d_v)`, the last two walked like k and v."""

    def run(grad: Tensor, k: Tensor, v: Tensor, inner: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        rooms = _room(k), _room(v)
        kernel(grad.contiguous(), _walked(k), _walked(v), inner.contiguous(), statistics, *map(_walked, rooms))
        return rooms

    return run


def _reference_backward(grad: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    d_k, d_v = reference.linear_attention_context_bwd(grad, k, v, *rest)
    return _room(k).copy_(d_k), _room(v).copy_(d_v)


def _native_kernel(backend: str, name: str) -> Callable[..., Any]:
    return lambda *args: _native.op(backend, name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("linear_attention"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], plain: Callable[..., Any]) -> OpSpec:
    cpp = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    triton = tuple(dtype for dtype in FLOATS if dtype is not torch.float64)
    kernels = {backend: wrap(_native_kernel(backend, f"{name}_out")) for backend in ("cpp", "cuda")}
    impls = {
        "cuda": Impl(kernels["cuda"], ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)),
        "triton": Impl(wrap(_triton_kernel(f"{name}_out")), ("cuda", "cpu"), triton, _triton.why_not),
        "cpp": Impl(kernels["cpp"], ("cpu",), cpp, lambda device: _native.why_not("cpp", device)),
        "reference": Impl(plain, None, FLOATS),
    }
    # CUDA C++ stands second until it has been timed beside Triton, whose products take tensor cores
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}))


FORWARD = _spec("linear_attention_context", _forward_by, reference.linear_attention_context)
BACKWARD = _spec("linear_attention_context_bwd", _backward_by, _reference_backward)


def _forward(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return FORWARD(k, k, v)


def _backward(grad: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return BACKWARD(k, grad, k, *rest)


define("linear_attention_context(Tensor k, Tensor v) -> (Tensor, Tensor)", _forward, _results)
define(
    "linear_attention_context_bwd(Tensor grad, Tensor k, Tensor v, Tensor inner, Tensor statistics)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda grad, k, v, inner, statistics: (_room(k), _room(v)),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    k, v, context, statistics = ctx.saved_tensors
    inner = (grad * context).sum(1)
    d_k, d_v = torch.ops.lic_fast.linear_attention_context_bwd(grad, k, v, inner, statistics)
    return d_k if ctx.needs_input_grad[0] else None, d_v if ctx.needs_input_grad[1] else None


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "linear_attention: gradients of gradients are not supported; write it with torch.softmax where you need them"
    )


torch.library.register_autograd("lic_fast::linear_attention_context", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::linear_attention_context_bwd", _no_second_order)
