"""lic_fast::schedule_quantize_, schedule_dequantize_, schedule_levels: elements of a step of a latent's schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import schedule as reference
from ._library import define, mark_changed

_DTYPES = (torch.float32,)


def _native_kernel(backend: str, name: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        if not _native.op(backend, name)(*args):
            raise RuntimeError(f"{name}: the kernel refused tensors that passed the checks; please report this")

    return run


def _triton_kernel(name: str) -> Callable[..., None]:
    return lambda *args: getattr(_triton.kernels("schedule"), name)(*args)


def _quantized(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`kernel` fills what is allocated here."""

    def run(y_hat: Tensor, y: Tensor, parameters: Tensor, *place: int) -> tuple[Tensor, Tensor, Tensor]:
        out = _new_quantized(parameters)
        kernel(y_hat, y, parameters, *out, *place)
        return out

    return run


def _new_quantized(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = parameters.shape
    return tuple(parameters.new_empty((b, c // 2, h, w), dtype=t) for t in (torch.int32, torch.uint8, torch.float32))


def _dequantized(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    def run(y_hat: Tensor, symbols: Tensor, parameters: Tensor, *place: int) -> Tensor:
        values = torch.empty_like(symbols, dtype=torch.float32)
        kernel(y_hat, symbols, parameters, values, *place)
        return values

    return run


def _levelled(kernel: Callable[..., None]) -> Callable[[Tensor], Tensor]:
    def run(parameters: Tensor) -> Tensor:
        levels = _new_quantized(parameters)[1]
        kernel(parameters, levels)
        return levels

    return run


def _spec(name: str, native: str, allocating: Callable, plain: Callable) -> OpSpec:
    def of(backend: str) -> Callable:
        return allocating(_native_kernel(backend, native))

    def why_not(backend: str) -> Callable:
        return lambda device: _native.why_not(backend, device)

    return register(
        OpSpec(
            name,
            {
                "cuda": Impl(of("cuda"), ("cuda",), _DTYPES, why_not("cuda")),
                "triton": Impl(allocating(_triton_kernel(native)), ("cuda", "cpu"), _DTYPES, _triton.why_not),
                "cpp": Impl(of("cpp"), ("cpu",), _DTYPES, why_not("cpp")),
                "reference": Impl(plain, None, _DTYPES),
            },
            {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
        )
    )


QUANTIZE = _spec("schedule_quantize_", "schedule_quantize_", _quantized, reference.schedule_quantize_)
DEQUANTIZE = _spec("schedule_dequantize_", "schedule_dequantize_", _dequantized, reference.schedule_dequantize_)
LEVELS = _spec("schedule_levels", "schedule_levels_out", _levelled, reference.schedule_levels)


def _quantize(y_hat: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = QUANTIZE(y_hat, y_hat, *rest)
    mark_changed([y_hat])
    return found


def _dequantize(y_hat: Tensor, *rest: Any) -> Tensor:
    found = DEQUANTIZE(y_hat, y_hat, *rest)
    mark_changed([y_hat])
    return found


_PLACE = "SymInt first, SymInt row, SymInt column, SymInt stride"
define(
    f"schedule_quantize_(Tensor(a!) y_hat, Tensor y, Tensor parameters, {_PLACE}) -> (Tensor, Tensor, Tensor)",
    _quantize,
    lambda y_hat, y, parameters, *place: _new_quantized(parameters),
)
define(
    f"schedule_dequantize_(Tensor(a!) y_hat, Tensor symbols, Tensor parameters, {_PLACE}) -> Tensor",
    _dequantize,
    lambda y_hat, symbols, parameters, *place: torch.empty_like(symbols, dtype=torch.float32),
)
define(
    "schedule_levels(Tensor parameters) -> Tensor",
    lambda parameters: LEVELS(parameters, parameters),
    lambda parameters: _new_quantized(parameters)[1],
)
