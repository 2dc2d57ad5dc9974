"""Ops of SOAP: the ordinary step, Adam beside it, the refresh of eigenbases, the rotation of moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import FLOATS
from ..ops.refresh_eigenbasis import DTYPES, METHODS
from ..ops.soap_update import PRECISIONS
from . import _check
from ._check import dtype_in, same_device, same_length, same_shape

HYPER = ("lr", "beta1", "beta2", "shampoo_beta", "eps", "weight_decay")


def adam_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    counts: Tensor,
    hyper: Tensor,
    *,
    correct_bias: bool = True,
    normalize_grads: bool = False,
) -> None:
    """One Adam step with SOAP's conventions over a list of tensors, in place.

    params, grads [*] fp32, bf16, fp16 or fp64, one dtype for all params; exp_avg, exp_avg_sq [*] fp32, fp64 where
    params are fp64; counts [n, 2] int64: steps taken and steps skipped; hyper [n, 6] fp64: lr, beta1, beta2,
    shampoo_beta (not read), eps, weight_decay. All on one device; nothing waits for it. With t the count of steps
    taken, this one included: m and v are the averages of g and g^2,
    p <- (p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)) * (1 - lr * weight_decay), without the
    bias correction where correct_bias is False, the update divided by its root mean square where normalize_grads.
    A tensor whose gradient is not finite is left as it is, and its second count goes up instead of the first.

    Raises ValueError for lengths and shapes, TypeError for dtypes and devices, RuntimeError for a tensor that requires
    grad outside no_grad, BackendError for a forced backend.
    Source: Vyas et al., SOAP (2024), as in the authors' implementation (eps outside the bias correction, decay last).
    """
    f = "adam_update_"
    lists = _lists(f, params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_moments(f, lists, counts, hyper)
    torch.ops.lic_fast.adam_update_(*lists.values(), counts, hyper, bool(correct_bias), bool(normalize_grads))


def soap_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    GG: Sequence[Tensor],
    Q: Sequence[Tensor],
    counts: Tensor,
    hyper: Tensor,
    *,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    precision: str = "tf32x3",
) -> None:
    """One step of SOAP between two refreshes over a list of tensors, in place.

    params, grads: 1 to 5 axes, any strides, dtypes as in adam_update_; exp_avg, exp_avg_sq: contiguous, of the same
    shapes, fp32, fp64 where params are fp64. GG and Q: for each axis of each tensor in turn one [d, d] of the dtype of
    exp_avg, contiguous, or [0, 0] for an axis without a preconditioner. counts, hyper and the Adam step itself: as in
    adam_update_. The gradient is projected by every Q^T, Adam's averages live in that basis, its update is projected
    back; then GG <- shampoo_beta * GG + (1 - shampoo_beta) * (the sum of g g^T over the other axes).

    The kernels are fastest where the two longest axes come last. precision is that of a GPU's projections: "ieee",
    "tf32x3" (fp32 to within a few roundings, on tensor cores) or "tf32"; GG is never taken in plain TF32.

    Raises what adam_update_ raises, and ValueError for precision.
    Source: Vyas et al., SOAP (2024), Algorithm 3, in the order of the authors' implementation.
    """
    f = "soap_update_"
    lists = _lists(f, params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    factors = {name: _check.tensor_list(f, name, values) for name, values in (("GG", GG), ("Q", Q))}
    if precision not in PRECISIONS:
        raise ValueError(f"{f}: unknown precision, got {precision!r}; use one of {', '.join(PRECISIONS)}")
    _check_moments(f, lists, counts, hyper)
    _check_factors(f, lists, factors)
    settings = (bool(correct_bias), bool(normalize_grads), precision)
    torch.ops.lic_fast.soap_update_(*lists.values(), *factors.values(), counts, hyper, *settings)


def refresh_eigenbasis(
    GG: Sequence[Tensor], Q: Sequence[Tensor], *, method: str = "cholesky_qr"
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """One step of the QR iteration towards the eigenvectors of GG, starting from Q, batched by size.

    GG, Q: lists of [N, d, d] fp32 or fp64, one batch for each size d. Returns four lists: the new bases [N, d, d]; the
    order [N, d] int64, column order[j] of Q having become column j, by decreasing diag(Q^T GG Q); the rotations Q^T new
    [N, d, d]; and whether `method` served each matrix [N] bool.

    method: "cholesky_qr" (two passes of column-scaled Cholesky-QR, the first in fp64), "qr" (Householder in fp64), or
    "eigh" (the eigenvectors themselves). Where Cholesky-QR meets a matrix that is singular to rounding, Householder's
    QR takes its place on the CPU; on CUDA, which is not waited for, a shifted Cholesky-QR does for up to eight
    matrices of a batch, and others keep their basis in the new order. A GG that is not finite keeps its Q.

    Raises ValueError for shapes and method, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: SOAP's power iteration and QR (Vyas et al., 2024); Cholesky-QR in two passes and its column scaling are our
    choice of algorithm for the same factor.
    """
    f = "refresh_eigenbasis"
    factors, bases = _check.tensor_list(f, "GG", GG), _check.tensor_list(f, "Q", Q)
    same_length(f, ("GG", factors), ("Q", bases))
    if method not in METHODS:
        raise ValueError(f"{f}: unknown method, got {method!r}; use one of {', '.join(METHODS)}")
    for i, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor.dim() != 3 or factor.shape[1] != factor.shape[2]:
            raise ValueError(f"{f}: GG[{i}] must be a batch of square matrices [N, d, d], got {list(factor.shape)}")
        same_shape(f, (f"GG[{i}]", factor), (f"Q[{i}]", basis))
        dtype_in(f, f"GG[{i}]", factor, DTYPES)
        dtype_in(f, f"Q[{i}]", basis, (factor.dtype,))
        same_device(f, ("GG[0]", factors[0]), (f"GG[{i}]", factor), (f"Q[{i}]", basis))
    kept = [i for i, factor in enumerate(factors) if factor.numel()]
    results = torch.ops.lic_fast.refresh_eigenbasis([factors[i] for i in kept], [bases[i] for i in kept], method)
    if len(kept) == len(factors):
        return tuple(map(list, results))  # type: ignore[return-value]
    return _with_empty(bases, kept, results)


def rotate_moments_(
    exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], rotation: Sequence[Tensor], order: Sequence[Tensor]
) -> None:
    """Adam's moments of a list of tensors carried into refreshed eigenbases, in place.

    exp_avg, exp_avg_sq: 1 to 5 axes, contiguous, fp32 or fp64; rotation and order: for each axis of each tensor in
    turn what refresh_eigenbasis gave, [d, d] of the same dtype and [d] int64, or [0, 0] and [0] for an axis that did
    not change. exp_avg is rotated; exp_avg_sq, which has no exact transport, follows the sorting.

    Raises ValueError for lengths and shapes, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: Vyas et al., SOAP (2024), as in the authors' implementation.
    """
    f = "rotate_moments_"
    lists = _lists(f, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    rotations, orders = _check.tensor_list(f, "rotation", rotation), _check.tensor_list(f, "order", order)
    first, axes = lists["exp_avg"], [d for m in lists["exp_avg"] for d in m.shape]
    for i, m in enumerate(first):
        dtype_in(f, f"exp_avg[{i}]", m, DTYPES)
        _check_state(f, i, m, lists["exp_avg_sq"][i], (first[0].dtype,))
    for name, values in (("rotation", rotations), ("order", orders)):
        if len(values) != len(axes):
            raise ValueError(f"{f}: one {name} for every axis, got {len(values)} for {len(axes)} axes")
    for i, (d, r, places) in enumerate(zip(axes, rotations, orders, strict=True)):
        _check_square(f, f"rotation[{i}]", r, d, first[0])
        if places.numel() and (places.shape != (d,) or places.dtype is not torch.int64 or not r.numel()):
            raise ValueError(
                f"{f}: order[{i}] must be [{d}] int64 beside its rotation, or empty, got {list(places.shape)}"
            )
        same_device(f, ("exp_avg[0]", first[0]), (f"order[{i}]", places))
    torch.ops.lic_fast.rotate_moments_(*lists.values(), rotations, orders)


def _lists(f: str, **values: object) -> dict[str, list[Tensor]]:
    lists = {name: _check.tensor_list(f, name, value) for name, value in values.items()}
    first, *others = lists.items()
    same_length(f, first, *others)
    for name, tensors in lists.items():
        if name != "grads":
            _check.no_gradient(f, name, tensors)
    return lists


def _check_moments(f: str, lists: dict[str, list[Tensor]], counts: Tensor, hyper: Tensor) -> None:
    params, grads = lists["params"], lists["grads"]
    for name, value, shape, dtype in (
        ("counts", counts, (len(params), 2), torch.int64),
        ("hyper", hyper, (len(params), len(HYPER)), torch.float64),
    ):
        _check.tensor(f, name, value)
        if tuple(value.shape) != shape or value.dtype is not dtype or not value.is_contiguous():
            raise ValueError(
                f"{f}: {name} must be a contiguous {dtype} tensor of shape {list(shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
        if params:
            same_device(f, ("params[0]", params[0]), (name, value))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if i == 0:
            dtype_in(f, "params[0]", p, FLOATS)
        if p.dtype is not params[0].dtype:
            raise TypeError(
                f"{f}: params must share one dtype, got {params[0].dtype} and {p.dtype}; call once for each dtype"
            )
        if g.shape != p.shape:
            same_shape(f, (f"params[{i}]", p), (f"grads[{i}]", g))
        if g.dtype is not p.dtype:
            dtype_in(f, f"grads[{i}]", g, FLOATS)
        if g.is_sparse or g.device != p.device:
            raise TypeError(
                f"{f}: grads[{i}] must be dense and on the device of params[{i}], got {g.layout} {g.device}"
            )
        _check_state(
            f, i, lists["exp_avg"][i], lists["exp_avg_sq"][i],
            (torch.float64 if p.dtype is torch.float64 else torch.float32,), p, f == "soap_update_",
        )  # fmt: skip


def _check_state(
    f: str, i: int, m: Tensor, v: Tensor, dtypes: Sequence[torch.dtype], p: Tensor | None = None, dense: bool = True
) -> None:
    for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
        like = m if p is None else p
        if value.shape != like.shape or value.dtype not in dtypes or value.device != like.device:
            same_shape(f, (f"tensor {i}", like), (f"{name}[{i}]", value))
            dtype_in(f, f"{name}[{i}]", value, dtypes)
            same_device(f, (f"tensor {i}", like), (f"{name}[{i}]", value))
        if dense and not (value.is_contiguous() and 1 <= value.dim() <= 5 and value.numel()):
            raise ValueError(
                f"{f}: {name}[{i}] must be contiguous with 1 to 5 axes and not empty, got {list(value.shape)}; "
                f"make it contiguous(), or leave it out"
            )


def _check_factors(f: str, lists: dict[str, list[Tensor]], factors: dict[str, list[Tensor]]) -> None:
    axes = [d for p in lists["params"] for d in p.shape]
    for name, values in factors.items():
        if len(values) != len(axes):
            raise ValueError(
                f"{f}: one entry of {name} for every axis of every tensor, got {len(values)} for {len(axes)}"
            )
        for i, (d, value) in enumerate(zip(axes, values, strict=True)):
            _check_square(f, f"{name}[{i}]", value, d, lists["exp_avg"][0])
    for i, (gg, q) in enumerate(zip(*factors.values(), strict=True)):
        if gg.shape != q.shape:
            same_shape(f, (f"GG[{i}]", gg), (f"Q[{i}]", q))


def _check_square(f: str, name: str, value: Tensor, d: int, like: Tensor) -> None:
    if value.numel() == 0:
        return
    if value.shape != (d, d) or not value.is_contiguous():
        raise ValueError(f"{f}: {name} must be contiguous [{d}, {d}] or [0, 0], got {list(value.shape)}")
    if value.dtype is not like.dtype or value.device != like.device:
        dtype_in(f, name, value, (like.dtype,))
        same_device(f, ("exp_avg[0]", like), (name, value))


def _with_empty(bases: list[Tensor], kept: list[int], results: tuple) -> tuple:
    """The results with a place for each batch that has no element."""
    new, order, rotation, served = [torch.empty_like(q) for q in bases], [], [torch.empty_like(q) for q in bases], []
    for q in bases:
        order.append(torch.empty(q.shape[:2], dtype=torch.int64, device=q.device))
        served.append(torch.ones(len(q), dtype=torch.bool, device=q.device))
    for column, values in zip((new, order, rotation, served), results, strict=True):
        for i, value in zip(kept, values, strict=True):
            column[i] = value
    return new, order, rotation, served
