"""lic_fast::cmd_assign: the mode of every weight by correlation of trajectories, and its affine fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference.cmd_assign import cmd_assign as reference
from ..reference.cmd_assign import directions
from ._library import FLOATS, define

Assigned = tuple[Tensor, Tensor, Tensor, Tensor]


def _outputs(snapshots: Tensor) -> Assigned:
    n = snapshots.shape[1]
    dtype = torch.float64 if snapshots.dtype is torch.float64 else torch.float32
    k, d, correlation = (torch.empty(n, dtype=dtype, device=snapshots.device) for _ in range(3))
    return torch.empty(n, dtype=torch.uint8, device=snapshots.device), k, d, correlation


def _filled(kernel: Callable[..., None]) -> Callable[..., Assigned]:
    """`kernel(snapshots, directions, mean, norm, *outputs)` fills what is allocated here."""

    def run(snapshots: Tensor, *tables: Tensor) -> Assigned:
        if snapshots.stride(1) != 1 and snapshots.shape[1] > 1:
            snapshots = snapshots.contiguous()
        outputs = _outputs(snapshots)
        if snapshots.shape[1]:
            kernel(snapshots, *tables, *outputs)
        return outputs

    return run


def _native_kernel(backend: str) -> Callable[..., None]:
    return lambda *args: _native.op(backend, "cmd_assign_out")(*args)


def _triton_kernel(*args: Any) -> None:
    _triton.kernels("cmd_assign").cmd_assign_out(*args)


SPEC = register(
    OpSpec(
        "cmd_assign",
        {
            "cuda": Impl(
                _filled(_native_kernel("cuda")), ("cuda",), FLOATS, lambda device: _native.why_not("cuda", device)
            ),
            "triton": Impl(_filled(_triton_kernel), ("cuda", "cpu"), FLOATS, _triton.why_not),
            "cpp": Impl(
                _filled(_native_kernel("cpp")), ("cpu",), FLOATS, lambda device: _native.why_not("cpp", device)
            ),
            "reference": Impl(reference, None, FLOATS),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )
)


def _op(snapshots: Tensor, refs: Tensor) -> Assigned:
    tables = [table.contiguous() for table in directions(refs)]
    return SPEC(snapshots, snapshots, *tables)


def _fake(snapshots: Tensor, refs: Tensor) -> Assigned:
    return _outputs(snapshots)


define("cmd_assign(Tensor snapshots, Tensor refs) -> (Tensor, Tensor, Tensor, Tensor)", _op, _fake)
