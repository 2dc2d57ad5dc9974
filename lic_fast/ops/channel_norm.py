"""lic_fast::channel_norm, normalization over channels with a ReLU and a shift, and its gradients ::channel_norm_bwd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import channel_norm as reference
from ._library import FLOATS, define

_SHORT_PLANE = 16


def channels_last(x: Tensor) -> bool:
    """Whether x [B, C, *] lies with the channels next to each other, and its result does."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _like(x: Tensor) -> Tensor:
    """Room for a result, in x's memory format."""
    return torch.empty_like(x, memory_format=torch.preserve_format if channels_last(x) else torch.contiguous_format)


def _parameters(x: Tensor, *values: Tensor | None) -> list[Tensor]:
    """In the dtype of the arithmetic; none is an empty tensor."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return [x.new_empty(0, dtype=wide) if v is None else v.to(wide).contiguous() for v in values]


def _rows(x: Tensor) -> Tensor:
    """x [B, C, *] as [B, *, C], contiguous: a view where it is channels-last, else a copy."""
    return x.movedim(1, -1).contiguous()


def _are_planes(x: Tensor) -> bool:
    """Whether the native kernels walk x as [B, C, places]: rows of few places would be short, and are copied."""
    return x.dim() > 2 and not channels_last(x) and x.shape[2:].numel() >= _SHORT_PLANE


def _walked(x: Tensor, planes: bool) -> Tensor:
    return x.contiguous() if planes else _rows(x)


def _room(result: Tensor, planes: bool) -> Tensor:
    """What the kernel writes: the result itself where it lies as the kernel walks."""
    if planes:
        return result
    rows = result.movedim(1, -1)
    return rows if rows.is_contiguous() else torch.empty_like(rows, memory_format=torch.contiguous_format)


def _returned(result: Tensor, written: Tensor, planes: bool) -> Tensor:
    return result if planes or written.data_ptr() == result.data_ptr() else result.copy_(written.movedim(-1, 1))


def _forward_by(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Runs `kernel(x, weight, bias, shift, planes, relu, eps, out)`; x and out [B, C, *] or [B, *, C], contiguous."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, relu: bool, eps: float) -> Tensor:
        y, planes = _like(x), _are_planes(x)
        written = _room(y, planes)
        kernel(_walked(x, planes), *_parameters(x, weight, bias, shift), planes, relu, eps, written)
        return _returned(y, written, planes)

    return run


def _backward_by(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def run(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, eps: float) -> tuple[Tensor, ...]:
        d_x, planes = _like(x), _are_planes(x)
        written, parameters = _room(d_x, planes), _parameters(x, weight, bias)
        sums = *(torch.empty_like(p) for p in parameters), parameters[0].new_empty(x.shape[:2])
        kernel(_walked(grad, planes), _walked(x, planes), *parameters, planes, relu, eps, written, *sums)
        return _returned(d_x, written, planes), *sums

    return run


def _reference_forward(x: Tensor, *rest: Any) -> Tensor:
    return _like(x).copy_(reference.channel_norm(x, *rest))


def _reference_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    d_x, *others = reference.channel_norm_bwd(grad, x, *rest)
    return (_like(x).copy_(d_x), *(each.contiguous() for each in others))


def _native_kernel(backend: str, name: str) -> Callable[..., Any]:
    return lambda *args: _native.op(backend, name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("channel_norm"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], plain: Callable[..., Any]) -> OpSpec:
    cpp = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    cpp_kernel, cuda_kernel = (wrap(_native_kernel(backend, f"{name}_out")) for backend in ("cpp", "cuda"))
    impls = {
        "cuda": Impl(cuda_kernel, ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)),
        "triton": Impl(_triton_kernel(name), ("cuda", "cpu"), FLOATS, _triton.why_not),
        "cpp": Impl(cpp_kernel, ("cpu",), cpp, lambda device: _native.why_not("cpp", device)),
        "reference": Impl(plain, None, FLOATS),
    }
    # CUDA C++ stands second until it has been timed beside Triton on a GPU
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}))


FORWARD = _spec("channel_norm", _forward_by, _reference_forward)
BACKWARD = _spec("channel_norm_bwd", _backward_by, _reference_backward)


def _forward(x: Tensor, *rest: Any) -> Tensor:
    return FORWARD(x, x, *rest)


def _backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return BACKWARD(x, grad, x, *rest)


def _fake_forward(x: Tensor, *rest: Any) -> Tensor:
    return _like(x)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    d_weight, d_bias = (weight.new_empty(weight.shape, dtype=wide) for _ in range(2))
    return _like(x), d_weight, d_bias, x.new_empty(x.shape[:2], dtype=wide)


define(
    "channel_norm(Tensor x, Tensor weight, Tensor bias, Tensor? shift, bool relu, float eps) -> Tensor",
    _forward,
    _fake_forward,
)
define(
    "channel_norm_bwd(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool relu, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, shift, ctx.relu, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.shift_dtype = None if shift is None else shift.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    d_x, d_weight, d_bias, d_shift = torch.ops.lic_fast.channel_norm_bwd(grad, x, weight, bias, ctx.relu, ctx.eps)
    to_x, to_weight, to_bias, to_shift = ctx.needs_input_grad[:4]
    return (
        d_x if to_x else None,
        d_weight.to(weight.dtype) if to_weight else None,
        d_bias.to(bias.dtype) if to_bias else None,
        d_shift.to(ctx.shift_dtype) if to_shift else None,
        None,
        None,
    )


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "channel_norm: gradients of gradients are not supported; write it with torch.var_mean where you need them"
    )


torch.library.register_autograd("lic_fast::channel_norm", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::channel_norm_bwd", _no_second_order)
