"""lic_fast::affine_reconstruct, its gradients lic_fast::affine_reconstruct_bwd, and in place affine_reconstruct_."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Impl, OpSpec, register
from ..reference import affine_reconstruct as reference
from ._library import FLOATS, all_contiguous, copy_back, define, is_dense, laid_out_as, mark_changed, plain

MODES = (torch.uint8, torch.int16, torch.int32)
Masks = list[Tensor]
DONE, OUTSIDE = 0, 2  # what the native kernels over lists return (1: not walkable); only DONE has written


def check_modes(modes: list[Tensor], refs: Tensor) -> None:
    """ValueError where a mode on the CPU lies outside refs: for what has to be known before anything is written."""
    for mode in modes:
        if mode.device.type == "cpu" and mode.numel() and (int(mode.min()) < 0 or int(mode.max()) >= refs.numel()):
            raise ValueError(reference.mode_error(mode, refs))


def _flat_forward(kernel: Callable[..., bool]) -> Callable[..., Tensor]:
    """Out of place: lays the inputs out like the result and runs `kernel(w, k, d, mode, refs, tied, out)`."""

    def run(w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None) -> Tensor:
        out = torch.empty_like(w)
        mask = None if tied is None else laid_out_as(out, tied)
        flat = [laid_out_as(out, t) for t in (w, k, d, mode)]
        if not kernel(*flat, refs.contiguous(), mask, out):
            check_modes([mode], refs)
        return out

    return run


def _flat_forward_(kernel: Callable[..., int]) -> Callable[..., None]:
    """In place over a list: strided tensors are copied in and out, the rest is walked where it lies."""

    def run(w: list[Tensor], k: list[Tensor], d: list[Tensor], mode: list[Tensor], refs: Tensor, tied: Masks) -> None:
        targets = w
        if not all_contiguous(w, k, d, mode, tied):
            targets = [t if is_dense(t) else t.contiguous() for t in w]
            k, d, mode = ([laid_out_as(t, x) for t, x in zip(targets, xs, strict=True)] for xs in (k, d, mode))
            tied = [laid_out_as(t, x) for t, x in zip(targets, tied, strict=True)] if tied else []
        status = kernel(targets, k, d, mode, refs.contiguous(), tied)
        if status == OUTSIDE:
            check_modes(mode, refs)
        if status != DONE:
            raise RuntimeError(
                "affine_reconstruct_: the kernel refused lists that passed the checks; please report this"
            )
        copy_back(w, targets)

    return run


def _wanted(dense: Tensor, k: Tensor, need: list[bool]) -> list[Tensor]:
    """Room for the gradients of w, k and d; without elements where not needed."""
    return [
        torch.empty_like(dense, dtype=dtype) if needed else dense.new_empty(0, dtype=dtype)
        for needed, dtype in zip(need, (dense.dtype, k.dtype, k.dtype), strict=False)
    ]


def _flat_backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients: `kernel(grad, k, mode, refs, tied, grad_w, grad_k, grad_d, grad_refs)` fills what is wanted."""

    def run(
        grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None, need: list[bool]
    ) -> tuple[Tensor, ...]:
        dense = grad if is_dense(grad) else grad.contiguous()
        flat = [laid_out_as(dense, t) for t in (k, mode)]
        mask = None if tied is None else laid_out_as(dense, tied)
        wanted = _wanted(dense, k, need)
        sums = refs.new_empty(refs.numel() if need[3] else 0, dtype=torch.float64)
        kernel(dense, *flat, refs.contiguous(), mask, *wanted, sums)
        return (*wanted, sums.to(refs.dtype))

    return run


def _reference_backward(
    grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None, need: list[bool]
) -> tuple[Tensor, ...]:
    results = reference.affine_reconstruct_bwd(grad, k, mode, refs, tied)
    shapes = _fake_backward(grad, k, mode, refs, tied, need)
    return tuple(
        like.copy_(result) if needed else like for needed, like, result in zip(need, shapes, results, strict=True)
    )


def _reference_forward(w: Tensor, *rest: Any) -> Tensor:
    out = torch.empty_like(w)
    value = reference.affine_reconstruct(w, *rest)
    return value if value.stride() == out.stride() else out.copy_(value)


def _native_kernel(backend: str, name: str) -> Callable[..., Any]:
    return lambda *args: _native.op(backend, name)(*args)


def _triton_kernel(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(_triton.kernels("affine_reconstruct"), name)(*args)


def _spec(name: str, wrap: Callable[..., Any], kernel: str, plain: Callable[..., Any]) -> OpSpec:
    cpp_dtypes = tuple(dtype for dtype in FLOATS if dtype is not torch.float16)
    impls = {
        "cuda": Impl(
            wrap(_native_kernel("cuda", kernel)),
            ("cuda",),
            FLOATS,
            lambda device: _native.why_not("cuda", device),
        ),
        "triton": Impl(wrap(_triton_kernel(kernel)), ("cuda", "cpu"), FLOATS, _triton.why_not),
        "cpp": Impl(
            wrap(_native_kernel("cpp", kernel)),
            ("cpu",),
            cpp_dtypes,
            lambda device: _native.why_not("cpp", device),
        ),
        "reference": Impl(plain, None, FLOATS),
    }
    order = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
    return register(OpSpec(name, impls, order))


FORWARD = _spec("affine_reconstruct", _flat_forward, "affine_reconstruct_out", _reference_forward)
FORWARD_ = _spec("affine_reconstruct_", _flat_forward_, "affine_reconstruct_", reference.affine_reconstruct_)
BACKWARD = _spec("affine_reconstruct_bwd", _flat_backward, "affine_reconstruct_bwd_out", _reference_backward)


def _forward(w: Tensor, k: Tensor, d: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None) -> Tensor:
    return FORWARD(w, w, k, d, mode, refs, tied)


def _forward_(w: list[Tensor], k: list[Tensor], d: list[Tensor], mode: list[Tensor], refs: Tensor, tied: Masks) -> None:
    if w:
        FORWARD_(w[0], w, k, d, mode, refs, tied)
        mark_changed(w)


def attempt(w: list[Tensor], k: list[Tensor], d: list[Tensor], mode: list[Tensor], refs: Tensor, tied: Masks) -> bool:
    """affine_reconstruct_ by the shortest way: the native kernel, where it is the choice, checks the lists itself.

    False, nothing written, where it is not or finds anything out of the ordinary.
    """
    if not (w and w[0].dtype in FLOATS and plain(w[0])):
        return False
    backend = FORWARD_.choose(w[0].device.type, w[0].dtype)
    if backend not in ("cpp", "cuda"):
        return False
    if _native.op(backend, "affine_reconstruct_")(w, k, d, mode, refs, tied) != DONE:
        return False
    mark_changed(w)
    return True


def _backward(
    grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None, need: list[bool]
) -> tuple[Tensor, ...]:
    return BACKWARD(grad, grad, k, mode, refs, tied, need)


def _fake_backward(
    grad: Tensor, k: Tensor, mode: Tensor, refs: Tensor, tied: Tensor | None, need: list[bool]
) -> tuple[Tensor, ...]:
    dense = grad if is_dense(grad) else grad.contiguous()
    return (*_wanted(dense, k, need), refs.new_empty(refs.numel() if need[3] else 0))


# "mode_index": torch's own machinery passes a keyword named mode
_ARGUMENTS = "Tensor mode_index, Tensor refs, Tensor? tied"
define(
    f"affine_reconstruct(Tensor w, Tensor k, Tensor d, {_ARGUMENTS}) -> Tensor",
    _forward,
    lambda w, k, d, mode_index, refs, tied: torch.empty_like(w),
)
define(
    f"affine_reconstruct_bwd(Tensor grad, Tensor k, {_ARGUMENTS}, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
define(
    "affine_reconstruct_(Tensor(a!)[] w, Tensor[] k, Tensor[] d, Tensor[] mode_index, Tensor refs, Tensor[] tied)"
    " -> ()",
    _forward_,
    lambda w, k, d, mode_index, refs, tied: None,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, k, _, mode, refs, tied = inputs
    ctx.save_for_backward(k, mode, refs, tied)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, mode, refs, tied = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    results = torch.ops.lic_fast.affine_reconstruct_bwd(grad, k, mode, refs, tied, need)
    w, k, d, refs = (result if needed else None for result, needed in zip(results, need, strict=True))
    return w, k, d, None, refs, None


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "affine_reconstruct: gradients of gradients are not supported; "
        "write k * refs[mode] + d in PyTorch where you need them"
    )


torch.library.register_autograd("lic_fast::affine_reconstruct", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::affine_reconstruct_bwd", _no_second_order)
