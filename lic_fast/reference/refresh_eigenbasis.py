"""The refresh of SOAP's eigenbases, as specified: one step of the QR iteration from the basis of before."""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import full_precision

METHODS = ("cholesky_qr", "qr", "eigh")
FALLBACK_SLOTS = 8  # matrices of a batch that CUDA orthogonalises a second time, since it cannot ask which failed


def column_scaled(P: Tensor) -> Tensor:
    """P [..., d, d] with columns of norm 1. The Q of a QR factorisation does not see the scale of columns."""
    largest = P.abs().amax(-2, keepdim=True)
    P = P / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(P, dim=-2, keepdim=True)
    return P / torch.where(norm > 0, norm, 1)


def cholesky_qr(P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Q of P = QR with a positive diagonal of R [..., d, d] in `dtype`, whether it succeeded [...]) for P in fp64.

    Two passes of Cholesky-QR on unit columns: the first in fp64, since the Gram matrix squares P's condition; the
    second in `dtype` restores orthogonality to rounding. Fails, without raising, where the Gram matrix is numerically
    singular or not finite: Q is then meaningless.
    """
    wide = column_scaled(P)
    factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    once = torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False).to(dtype)
    again, info_again = torch.linalg.cholesky_ex(once.mT @ once)
    Q = torch.linalg.solve_triangular(again.mT, once, upper=True, left=False)
    return Q, (info == 0) & (info_again == 0) & Q.isfinite().all(-1).all(-1)


def householder(P: Tensor) -> Tensor:
    """Q of P = QR by LAPACK or cuSOLVER, [..., d, d] in P's dtype: orthonormal whatever P's rank."""
    return torch.linalg.qr(P).Q


def _gather_columns(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(-1, order.unsqueeze(-2).expand(x.shape))


def refresh_eigenbasis(GG: Tensor, Q: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new basis [N, d, d], order [N, d], rotation [N, d, d], whether `method` served [N]) for GG, Q [N, d, d].

    With P = GG Q in fp64 (its columns of small eigenvalues drown in fp32's rounding), the columns are sorted by the
    Rayleigh quotients diag(Q^T P), largest first: new column j comes from old column order[j]. The new basis is the
    orthogonal factor of P's QR factorisation ("cholesky_qr", or "qr": Householder), or the eigenvectors of GG ("eigh"),
    and rotation = Q^T new. Where Cholesky-QR fails (a P that is singular to rounding), Householder's QR on the CPU and
    a shifted Cholesky-QR on CUDA take its place; where GG is not finite, the old basis stays, in its order.
    """
    with full_precision(GG.device):
        return _refresh(GG, Q, method)


def _refresh(GG: Tensor, Q: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    usable = GG.isfinite().all(-1).all(-1)
    safe = torch.where(usable[:, None, None], GG, torch.eye(GG.shape[-1], dtype=GG.dtype, device=GG.device))
    P = safe.double() @ Q.double()
    order = (Q * P).sum(-2).argsort(dim=-1, descending=True, stable=True)
    order = torch.where(usable[:, None], order, torch.arange(order.shape[-1], device=order.device))
    sorted_Q, P = _gather_columns(Q, order), _gather_columns(P, order)
    if method == "eigh":
        new, served = torch.linalg.eigh(safe.double()).eigenvectors.flip(-1), torch.ones_like(usable)
    elif method == "qr":
        new, served = householder(P), torch.ones_like(usable)
    else:
        if P.device.type == "cuda":
            P = without_zero_columns(P, sorted_Q)
        new, served = cholesky_qr(P, Q.dtype)
        new = _second_attempt(new, served, P, sorted_Q)
    new = new.to(Q.dtype)
    new = torch.where((usable & new.isfinite().all(-1).all(-1))[:, None, None], new, sorted_Q)
    return new.contiguous(), order, (Q.mT @ new).contiguous(), served & usable


def without_zero_columns(P: Tensor, sorted_Q: Tensor) -> Tensor:
    """P with its columns of zeros replaced by those of the old basis, for a device that is not asked what failed.

    Dead channels make rows and columns of zeros in GG, and these columns of P. The old ones are orthogonal to all
    others of P, since GG takes them to zero: any QR would have to choose something like them.
    """
    return torch.where((P == 0).all(-2, keepdim=True), sorted_Q.to(P.dtype), P)


def _second_attempt(new: Tensor, served: Tensor, P: Tensor, sorted_Q: Tensor) -> Tensor:
    if P.device.type != "cuda":
        failed = torch.nonzero(~served).flatten()
        if len(failed):
            new = new.index_copy(0, failed, householder(P[failed]).to(new.dtype))
        return new
    # no host sync: a fixed number of the batch, failures first, goes through (GG + shift) Q, which has full rank
    slots = torch.topk((~served).int(), min(FALLBACK_SLOTS, len(P))).indices
    basis = sorted_Q[slots]
    norm = torch.linalg.vector_norm(P[slots], dim=-2).amax(-1)[:, None, None]
    shift = torch.where(norm > 0, 4 * P.shape[-1] * torch.finfo(new.dtype).eps * norm, 1)
    shifted, good = cholesky_qr(P[slots] + shift * basis, new.dtype)
    repaired = torch.where(good[:, None, None], shifted, basis)
    repaired = torch.where(served[slots][:, None, None], new[slots], repaired)
    rest = torch.where(served[:, None, None], new, sorted_Q)
    return rest.index_copy(0, slots, repaired)
