"""refresh_eigenbasis: a step of the QR iteration for all of a model's factors, batched by size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import refresh_eigenbasis
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings
from ._soap_inputs import factors, plan, tensors

_FLOPS = 14  # d^3 a factor, as Plan counts them: two products and two passes of Cholesky-QR
Refreshed = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _stacks(values: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    sizes = Counter(d for v in values for d in plan(v.shape).factor_sizes() if d)
    pairs = [factors(d, count) for d, count in sorted(sizes.items())]
    return [gg.to(device) for gg, _ in pairs], [q.to(device) for _, q in pairs]


def _householder(GG: Sequence[Tensor], Q: Sequence[Tensor], dtype: torch.dtype) -> Refreshed:
    """The same refresh by torch.linalg.qr in `dtype`, batched by size."""
    results = []
    for gg, q in zip(GG, Q, strict=True):
        P = gg @ q
        order = (q * P).sum(-2).argsort(dim=-1, descending=True)
        new = torch.linalg.qr(P.gather(-1, order.unsqueeze(-2).expand(P.shape)).to(dtype)).Q.to(q.dtype)
        results.append((new, order, q.mT @ new))
    return tuple(list(column) for column in zip(*results, strict=True))  # type: ignore[return-value]


def _one_by_one(GG: Sequence[Tensor], Q: Sequence[Tensor]) -> Refreshed:
    """Matrix by matrix, as nikhilvyas/SOAP and pytorch_optimizer refresh."""
    results = [
        [_householder([gg], [q], gg.dtype) for gg, q in zip(*pair, strict=True)] for pair in zip(GG, Q, strict=True)
    ]
    return tuple([torch.stack([one[i][0] for one in batch]) for batch in results] for i in range(3))  # type: ignore[return-value]


def _judged(GG: Sequence[Tensor], Q: Sequence[Tensor], results: Refreshed) -> list[Tensor]:
    """What says whether a refresh is right, in fp64; signs of columns are free, so the bases themselves do not.

    For each size: new^T new; the part of new^T P below the diagonal, P's columns in their order and of norm 1 (zero in
    a QR factorisation); the Rayleigh quotients in their order, over the largest; rotation - Q^T new.
    """
    judged = []
    for gg, q, new, order, rotation in zip(GG, Q, *results, strict=True):
        gg, q, new = gg.double(), q.double(), new.double()
        P = gg @ q
        quotients = (q * P).sum(-2).gather(-1, order)
        P = P.gather(-1, order.unsqueeze(-2).expand(P.shape))
        R = new.mT @ (P / torch.linalg.vector_norm(P, dim=-2, keepdim=True))
        judged += [new.mT @ new, R.tril(-1), quotients / quotients.amax(-1, keepdim=True), rotation - q.mT @ new]
    return judged


def _expected(GG: Sequence[Tensor], Q: Sequence[Tensor]) -> Expected:
    wide = [[x.double() for x in stacks] for stacks in (GG, Q)]
    exact = _judged(*wide, _householder(*wide, torch.float64))
    eager = _judged(GG, Q, _householder(GG, Q, torch.float32))
    return Expected.of(exact, eager, [1.0] * len(exact))


def _group(name: str, values: Sequence[Tensor], settings: Settings) -> Group:
    GG, Q = _stacks(values, settings.device)
    count, elements = sum(len(q) for q in Q), sum(q.numel() for q in Q)
    moved = 16 * elements + sum(8 * q.shape[0] * q.shape[1] for q in Q)
    flops = _FLOPS * sum(len(q) * q.shape[-1] ** 3 for q in Q)

    def case(backend: str, run: Callable[[], Sequence[list[Tensor]]]) -> Case:
        return Case(backend, run, lambda out: _judged(GG, Q, (out[0], out[1], out[2])), moved, flops)

    usable, left_out = backends("refresh_eigenbasis", settings.device, torch.float32)
    ours = [case(OURS + b, forced(b, lambda: refresh_eigenbasis(GG, Q))) for b in usable]
    peers = [
        case("torch.linalg.qr fp32, batched by size", lambda: _householder(GG, Q, torch.float32)),
        case("torch.linalg.qr fp64, batched by size", lambda: _householder(GG, Q, torch.float64)),
        case("torch.linalg.qr fp32, matrix by matrix", lambda: _one_by_one(GG, Q)),
    ]
    return Group(
        op="refresh_eigenbasis",
        case="Cholesky-QR (lic_fast.reference: composed of torch's)",
        inputs=f"{name} ({count} factors, {elements} elements)",
        dtype="fp32",
        device=settings.device,
        cases=[*ours, *peers],
        expected=_expected(GG, Q),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model, in fp32: SOAP's state has that dtype for every dtype of the weights but fp64."""
    for name, model in settings.models.items():
        yield _group(name, tensors(model, settings), settings)
