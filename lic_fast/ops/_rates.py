"""What the likelihood ops share: how kernels meet their tensors, and how gradients that nobody asked for travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ._library import FLOATS

NONE, NOISE, STE, DEQUANTIZE = range(4)  # how y is quantised
BITS, LIKELIHOOD, BITS_PER_CHANNEL = range(3)  # what is returned


def samples(tensor: Tensor) -> Tensor:
    """`tensor` itself where every sample lies dense in row-major order, at whatever distance; else a copy.

    Halves of the channels, as `chunk(2, 1)` gives them, are read where they lie.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    if tensor.shape[0] > 1 and tensor.stride(0) < expected:
        return tensor.contiguous()
    return tensor


def upstream(grad: Tensor | None) -> Tensor | None:
    """A gradient contiguous, or as one element that stands for all: a sum sends back a single number, expanded."""
    if grad is None or grad.is_contiguous():
        return grad
    if grad.numel() > 1 and not any(grad.stride()):
        return grad.as_strided((1,), (1,))
    return grad.contiguous()


def rate_like(y: Tensor, output: int) -> Tensor:
    """Room for the rate: fp32, or fp64 for fp64; [B, C] for sums, else y's shape."""
    shape = y.shape[:2] if output == BITS_PER_CHANNEL else y.shape
    return torch.empty(shape, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)


def y_hat_like(y: Tensor, quantize: int) -> Tensor:
    """Room for y_hat; without elements where nothing is quantised."""
    return torch.empty(0 if quantize == NONE else y.shape, dtype=y.dtype, device=y.device)


def wanted(tensor: Tensor | None, like: Tensor, need: bool) -> Tensor:
    """Contiguous room for a gradient of `tensor`; without elements where not needed."""
    if tensor is None or not need:
        return torch.empty(0, dtype=like.dtype, device=like.device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def kept(results: tuple[Tensor | None, ...], rooms: list[Tensor]) -> tuple[Tensor, ...]:
    """The reference's gradients, in the form that the kernels give them."""
    return tuple(
        room.copy_(result) if room.numel() and result is not None else room
        for result, room in zip(results, rooms, strict=True)
    )


def spec(name: str, run: Callable[..., Any], kernel: str, module: str, plain: Callable[..., Any]) -> OpSpec:
    """An op in four backends: `run(kernel)` makes an implementation from a kernel that fills its last arguments."""

    def native(backend: str) -> Callable[..., Any]:
        return run(lambda *args: _native.op(backend, kernel)(*args))

    cpp_dtypes = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    impls = {
        "cuda": Impl(native("cuda"), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)),
        "triton": Impl(
            run(lambda *args: getattr(_triton.kernels(module), kernel)(*args)),
            ("cuda", "cpu"),
            FLOATS,
            _triton.why_not,
        ),
        "cpp": Impl(native("cpp"), ("cpu",), cpp_dtypes, lambda device: _native.why_not("cpp", device)),
        "reference": Impl(plain, None, FLOATS),
    }
    return register(OpSpec(name, impls, {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}))


def no_second_order(function: str) -> Callable[..., None]:
    """The gradient formula of a gradient op: there is none."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{function}: gradients of gradients are not supported; write the density in PyTorch where you need them"
        )

    return refuse
