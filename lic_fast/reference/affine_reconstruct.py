"""Element-wise affine reconstruction from reference parameters, as specified, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(k: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: that of k, at least fp32."""
    return torch.promote_types(k.dtype, torch.float32)


def look_up(refs: Tensor, mode: Tensor) -> Tensor:
    """refs[mode] in the wide dtype. A mode outside [0, M): ValueError on the CPU, NaN on a device."""
    index = mode.long()
    inside = (index >= 0) & (index < refs.numel())
    if mode.device.type == "cpu" and not bool(inside.all()):
        raise ValueError(mode_error(mode, refs))
    if refs.numel() == 0:
        return torch.full(mode.shape, float("nan"), dtype=wide_dtype(refs), device=mode.device)
    values = refs.to(wide_dtype(refs))[index.clamp(0, refs.numel() - 1)]
    return torch.where(inside, values, float("nan"))


def mode_error(mode: Tensor, refs: Tensor) -> str:
    """The message for a mode outside [0, M)."""
    low, high = int(mode.min()), int(mode.max())
    return (
        f"affine_reconstruct: a mode lies outside refs, got modes {low} to {high} with {refs.numel()} refs; "
        f"every mode must be in [0, {refs.numel()})"
    )


def affine_reconstruct(w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None) -> Tensor:
    """k * refs[mode] + d where tied, else w: rounded after the product, after the sum, and once into w's dtype."""
    wide = wide_dtype(k)
    value = (k.to(wide) * look_up(refs, mode) + d.to(wide)).to(w.dtype)
    return value if tied is None else torch.where(tied, value, w)


def affine_reconstruct_bwd(
    grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w, k, d (shape of grad) and refs [M]; the last a segment sum in fp64, in a fixed order."""
    wide = wide_dtype(k)
    free = torch.zeros_like(grad, dtype=torch.bool) if tied is None else ~tied
    g = grad.to(wide)
    grad_w = torch.where(free, grad, torch.zeros_like(grad))
    grad_k = torch.where(free, 0.0, g * look_up(refs, mode)).to(k.dtype)
    grad_d = torch.where(free, 0.0, g).to(k.dtype)
    terms = torch.where(free, 0.0, k.to(wide) * g).double()
    sums = torch.zeros(refs.shape, dtype=torch.float64, device=refs.device)
    inside = (mode >= 0) & (mode < refs.numel())
    grad_refs = sums.index_put_((mode[inside].long(),), terms[inside], accumulate=True)
    return grad_w, grad_k, grad_d, grad_refs.to(refs.dtype)


def affine_reconstruct_(
    w: list[Tensor], k: list[Tensor], d: list[Tensor], mode: list[Tensor], refs: Tensor, tied: list[Tensor]
) -> None:
    """The same, into w, tensor by tensor; `tied` is empty where every element is tied."""
    masks = tied or [None] * len(w)
    results = [affine_reconstruct(*item, refs, mask) for *item, mask in zip(w, k, d, mode, masks, strict=True)]
    for target, value in zip(w, results, strict=True):
        target.copy_(value)
