"""Ops on parameters: affine reconstruction from reference parameters, sampling-then-moving average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import OpSpec
from ..ops._library import FLOATS
from ..ops.affine_reconstruct import FORWARD_ as AFFINE_RECONSTRUCT_
from ..ops.affine_reconstruct import MODES, check_modes
from ..ops.affine_reconstruct import attempt as attempt_affine_
from ..ops.sma_update import PAIRS
from ..ops.sma_update import SPEC as SMA_UPDATE
from ..ops.sma_update import attempt as attempt_sma_
from . import _check
from ._check import dtype_in, same_device, same_shape

MOST_REFS = 1 << 20  # the kernels' segment sum walks refs in the second dimension of a grid


def affine_reconstruct(
    w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, *, tied: Tensor | None = None
) -> Tensor:
    """k * refs[mode] + d where tied, else w.

    w [*] fp32, bf16, fp16 or fp64; k, d [*] of w's dtype, or fp32 where w is bf16 or fp16; mode [*] uint8, int16
    or int32, every value in [0, M); refs [M] of k's dtype, M <= 2**20; tied [*] bool, None = every element. Returns a
    new tensor [*] of w's dtype. Arithmetic in fp32 (fp64 for fp64): the product and the sum are rounded separately,
    then once into w's dtype, and all backends agree to the bit.

    Gradients flow to w, k, d and refs. The gradient of refs is the segment sum of k * grad over the tied elements of
    each mode, added in fp64 in a fixed order: the same in every run, and on the CPU for any number of threads. There
    are neither gradients of gradients nor forward-mode derivatives (RuntimeError).

    Raises ValueError for shapes and, on the CPU, for a mode outside [0, M) (on CUDA such an element becomes NaN:
    a check would have to wait for the device), TypeError for dtypes and devices, BackendError for a forced backend.

    Source: the affine parameter embedding of STDET (Zhang et al., TMLR 2025), w_i = k_i * w_ref(mode i) + d_i.
    """
    f = "affine_reconstruct"
    for name, value in (("w", w), ("k", k), ("d", d), ("mode", mode), ("refs", refs)):
        _check.tensor(f, name, value)
    if tied is not None:
        _check.tensor(f, "tied", tied)
    _check.no_forward_mode(f)
    _check_embedding(f, w, k, d, mode, refs, tied)
    return torch.ops.lic_fast.affine_reconstruct(w, k, d, mode, refs, tied)


def affine_reconstruct_(
    w: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    d: Tensor | Sequence[Tensor],
    mode: Tensor | Sequence[Tensor],
    refs: Tensor,
    *,
    tied: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """affine_reconstruct in place, for one tensor or a list of tensors in one launch; no gradients.

    w, k, d, mode, tied: as in affine_reconstruct, each a tensor or a list of as many; refs [M] serves all of them.
    Elements that are not tied keep their bits. Where a mode lies outside [0, M) the CPU raises before anything is
    written. Raises what affine_reconstruct raises, ValueError for a w that shares memory with
    k, d or mode, and RuntimeError for an argument that requires grad outside no_grad.
    Source: as affine_reconstruct.
    """
    f = "affine_reconstruct_"
    ws, ks, ds, modes = (
        _check.tensor_list(f, name, value) for name, value in (("w", w), ("k", k), ("d", d), ("mode", mode))
    )
    masks = [] if tied is None else _check.tensor_list(f, "tied", tied)
    _check.tensor(f, "refs", refs)
    for name, values in (("w", ws), ("k", ks), ("d", ds), ("refs", [refs])):
        _check.no_gradient(f, name, values)
    bounded = refs.numel() <= MOST_REFS and (tied is None or len(masks) > 0)
    if not (bounded and attempt_affine_(ws, ks, ds, modes, refs, masks)):
        _check.same_length(
            f, ("w", ws), ("k", ks), ("d", ds), ("mode", modes), *([("tied", masks)] if tied is not None else [])
        )
        for i, item in enumerate(ws):
            _check_embedding(f, item, ks[i], ds[i], modes[i], refs, masks[i] if masks else None)
            same_device(f, ("w[0]", ws[0]), (f"w[{i}]", item))
            for name, values in (("k", ks), ("d", ds), ("mode", modes)):
                _check.no_overlap(f, (f"w[{i}]", item), (f"{name}[{i}]", values[i]))
        check_modes(modes, refs)
        for group in _by_dtype(AFFINE_RECONSTRUCT_, ws):
            picked = [[xs[i] for i in group] for xs in (ws, ks, ds, modes)]
            torch.ops.lic_fast.affine_reconstruct_(*picked, refs, [masks[i] for i in group] if masks else [])


def sma_update_(
    slow: Tensor | Sequence[Tensor], fast: Tensor | Sequence[Tensor], *, alpha: float, reset: bool = True
) -> None:
    """slow <- slow + alpha * (fast - slow), then fast <- slow where reset; in place, one launch for the whole list.

    slow [*] fp32, or fp64 where fast is fp64; fast [*] fp32, bf16, fp16 or fp64 (the parameters); tensors or lists of
    as many, shapes equal pair by pair. alpha in [0, 1] weighs the new point. Reads and writes each byte once.
    Arithmetic in fp32, or in fp64 where fast is fp64; the difference, product and sum are rounded separately, and
    all backends agree to the bit.

    Raises ValueError for lengths, shapes, alpha and pairs that share memory, TypeError for dtypes and devices,
    RuntimeError for an argument that requires grad outside no_grad, BackendError for a forced backend.

    Source: SMA (Zhang et al., TMLR 2025) names the factor alpha = 0.8 and the period of 5 steps; its equation is not
    public, and this form, that of Lookahead (Zhang et al., NeurIPS 2019), is a reconstruction.
    """
    f = "sma_update_"
    slows, fasts = _check.tensor_list(f, "slow", slow), _check.tensor_list(f, "fast", fast)
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"{f}: alpha must be in [0, 1], got {alpha!r}")
    for name, values in (("slow", slows), ("fast", fasts)):
        _check.no_gradient(f, name, values)
    if not attempt_sma_(slows, fasts, float(alpha), bool(reset)):
        _check.same_length(f, ("slow", slows), ("fast", fasts))
        for i, (s, p) in enumerate(zip(slows, fasts, strict=True)):
            same_shape(f, (f"slow[{i}]", s), (f"fast[{i}]", p))
            if (s.dtype, p.dtype) not in PAIRS:
                raise TypeError(
                    f"{f}: slow[{i}] must be float32, or float64 where fast[{i}] is float64, "
                    f"got {s.dtype} and {p.dtype}; convert slow with .to()"
                )
            same_device(f, ("slow[0]", slows[0]), (f"slow[{i}]", s), (f"fast[{i}]", p))
            _check.no_overlap(f, (f"slow[{i}]", s), (f"fast[{i}]", p))
        for group in _by_dtype(SMA_UPDATE, fasts):
            picked = [[xs[i] for i in group] for xs in (slows, fasts)]
            torch.ops.lic_fast.sma_update_(*picked, float(alpha), bool(reset))


def _by_dtype(spec: OpSpec, tensors: list[Tensor]) -> list[list[int]]:
    """Places grouped by dtype: the choice of backend is made for one dtype at a time.

    Raises BackendError, before anything is written, where there is none for one of them.
    """
    groups: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(i)
    if len(groups) > 1 and not torch.compiler.is_compiling():
        for dtype in groups:
            spec.choose(tensors[0].device.type, dtype)
    return list(groups.values())


def _check_embedding(f: str, w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None) -> None:
    same_shape(f, ("w", w), ("k", k), ("d", d), ("mode", mode), ("tied", tied))
    if refs.dim() != 1:
        raise ValueError(f"{f}: refs must have one dimension [M], got shape {list(refs.shape)}")
    if refs.numel() > MOST_REFS:
        raise ValueError(f"{f}: refs has too many elements, got {refs.numel()}; use at most {MOST_REFS} modes")
    dtype_in(f, "w", w, FLOATS)
    half = w.dtype in (torch.bfloat16, torch.float16)
    dtype_in(f, "k", k, (w.dtype, torch.float32) if half else (w.dtype,))
    for name, value in (("d", d), ("refs", refs)):
        dtype_in(f, name, value, (k.dtype,))
    dtype_in(f, "mode", mode, MODES)
    if tied is not None:
        dtype_in(f, "tied", tied, (torch.bool,))
    same_device(f, ("w", w), ("k", k), ("d", d), ("mode", mode), ("refs", refs), ("tied", tied))
