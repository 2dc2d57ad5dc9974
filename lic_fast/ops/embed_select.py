"""lic_fast::embed_select: the smallest elements of a vector as a mask, ties by index, without a sort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.embed_select import embed_select as reference
from ._library import define

DTYPES = (torch.float32, torch.float64)


def _filled(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    """`kernel(values, count, mask, selected)`, 1 <= count <= n, fills what is allocated here."""

    def run(values: Tensor, count: int, mask: Tensor | None) -> Tensor:
        count = min(count, values.numel())
        if count <= 0:
            return torch.zeros_like(values, dtype=torch.bool)
        selected = torch.empty(values.shape, dtype=torch.bool, device=values.device)
        kernel(values.contiguous(), count, None if mask is None else mask.contiguous(), selected)
        return selected

    return run


def _native_kernel(backend: str) -> Callable[..., None]:
    return lambda *args: _native.op(backend, "embed_select_out")(*args)


def _triton_kernel(*args: Any) -> None:
    _triton.kernels("embed_select").embed_select_out(*args)


SPEC = register(
    OpSpec(
        "embed_select",
        {
            "cuda": Impl(
                _filled(_native_kernel("cuda")), ("cuda",), DTYPES, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_filled(_triton_kernel), ("cuda", "cpu"), DTYPES, _triton.why_not),
            "cpp": Impl(
                _filled(_native_kernel("cpp")), ("cpu",), DTYPES, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(reference, None, DTYPES),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(values: Tensor, count: int, mask: Tensor | None) -> Tensor:
    return SPEC(values, values, count, mask)


def _fake(values: Tensor, count: int, mask: Tensor | None) -> Tensor:
    return torch.empty(values.shape, dtype=torch.bool, device=values.device)


define("embed_select(Tensor values, SymInt count, Tensor? mask) -> Tensor", _op, _fake)
