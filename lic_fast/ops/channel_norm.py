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


def _by_rows(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """Runs `kernel(rows, weight, bias, shift, relu, eps, out)`; rows and out [B, *, C] contiguous."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, relu: bool, eps: float) -> Tensor:
        out = _like(x)
        direct = out.movedim(1, -1).is_contiguous()
        rows = out.movedim(1, -1) if direct else torch.empty_like(x.movedim(1, -1), memory_format=_CONTIGUOUS)
        kernel(_rows(x), *_parameters(x, weight, bias, shift), relu, eps, rows)
        return out if direct else out.copy_(rows.movedim(-1, 1))

    return run


def _by_rows_backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def run(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, eps: float) -> tuple[Tensor, ...]:
        d_x = _like(x)
        direct = d_x.movedim(1, -1).is_contiguous()
        rows = d_x.movedim(1, -1) if direct else torch.empty_like(x.movedim(1, -1), memory_format=_CONTIGUOUS)
        parameters = _parameters(x, weight, bias)
        d_weight, d_bias = (torch.empty_like(p) for p in parameters)
        d_shift = parameters[0].new_empty(x.shape[:2])
        kernel(_rows(grad), _rows(x), *parameters, relu, eps, rows, d_weight, d_bias, d_shift)
        return d_x if direct else d_x.copy_(rows.movedim(-1, 1)), d_weight, d_bias, d_shift

    return run


_CONTIGUOUS = torch.contiguous_format


def _reference_forward(x: Tensor, *rest: Any) -> Tensor:
    return _like(x).copy_(reference.channel_norm(x, *rest))


def _reference_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    d_x, *others = reference.channel_norm_bwd(grad, x, *rest)
    return (_like(x).copy_(d_x), *(each.contiguous() for each in others))


def _native_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: _native.op("cpp", name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("channel_norm"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], kernel: str, plain: Callable[..., Any]) -> OpSpec:
    cpp = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    impls = {
        "triton": Impl(_triton_kernel(name), ("cuda", "cpu"), FLOATS, _triton.why_not),
        "cpp": Impl(wrap(_native_kernel(kernel)), ("cpu",), cpp, lambda device: _native.why_not("cpp", device)),
        "reference": Impl(plain, None, FLOATS),
    }
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}))


FORWARD = _spec("channel_norm", _by_rows, "channel_norm_out", _reference_forward)
BACKWARD = _spec("channel_norm_bwd", _by_rows_backward, "channel_norm_bwd_out", _reference_backward)


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
