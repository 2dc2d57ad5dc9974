"""lic_fast::refresh_eigenbasis: the QR iteration on batches of SOAP's factors, one batch for each size."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._dispatch import Impl, OpSpec, register
from ..reference.refresh_eigenbasis import METHODS, householder
from ..reference.refresh_eigenbasis import refresh_eigenbasis as reference
from ._library import define

__all__ = ["METHODS", "SPEC"]

DTYPES = (torch.float32, torch.float64)
Refreshed = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _every(GG: list[Tensor], Q: list[Tensor], method: str) -> Refreshed:
    results = [reference(factors, bases, method) for factors, bases in zip(GG, Q, strict=True)]
    return tuple(list(column) for column in zip(*results, strict=True))  # type: ignore[return-value]


def _cpp(GG: list[Tensor], Q: list[Tensor], method: str) -> Refreshed:
    if method != "cholesky_qr":
        return _every(GG, Q, method)
    GG, Q = [x.contiguous() for x in GG], [x.contiguous() for x in Q]
    new, rotation = [torch.empty_like(q) for q in Q], [torch.empty_like(q) for q in Q]
    order = [torch.empty(q.shape[:2], dtype=torch.int64) for q in Q]
    served = [torch.empty(len(q), dtype=torch.bool) for q in Q]
    if not _native.op("cpp", "refresh_eigenbasis")(GG, Q, new, order, rotation, served):
        raise RuntimeError("refresh_eigenbasis: the kernel refused batches that passed the checks; please report this")
    for i, good in enumerate(served):
        if not bool(good.all()):
            _repair(GG[i], Q[i], new[i], order[i], rotation[i], good)
    return new, order, rotation, served


def _repair(GG: Tensor, Q: Tensor, new: Tensor, order: Tensor, rotation: Tensor, served: Tensor) -> None:
    """Householder's QR for the matrices that the kernel left in their old basis, where they are finite."""
    for i in torch.nonzero(~served).flatten().tolist():
        basis = new[i]
        if bool(GG[i].isfinite().all()):
            basis = householder((GG[i].double() @ Q[i].double())[:, order[i]]).to(basis.dtype)
        if bool(basis.isfinite().all()):
            new[i] = basis
        rotation[i] = Q[i].mT @ new[i]


SPEC = register(
    OpSpec(
        "refresh_eigenbasis",
        {
            "cpp": Impl(_cpp, ("cpu",), DTYPES, lambda device: _native.why_not("cpp", device)),
            "reference": Impl(_every, None, DTYPES),
        },
        {"cpu": ("cpp", "reference"), "cuda": ("reference",)},
    )
)


def _op(GG: list[Tensor], Q: list[Tensor], method: str) -> Refreshed:
    return SPEC(GG[0], GG, Q, method) if GG else ([], [], [], [])


def _fake(GG: list[Tensor], Q: list[Tensor], method: str) -> Refreshed:
    order = [q.new_empty(q.shape[:2], dtype=torch.int64) for q in Q]
    served = [q.new_empty(q.shape[:1], dtype=torch.bool) for q in Q]
    return [torch.empty_like(q) for q in Q], order, [torch.empty_like(q) for q in Q], served


define(
    "refresh_eigenbasis(Tensor[] GG, Tensor[] Q, str method) -> (Tensor[], Tensor[], Tensor[], Tensor[])", _op, _fake
)
