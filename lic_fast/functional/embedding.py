"""Ops on partly embedded models (STDET): parameters in one flat index space, a byte each that says what they are.

`code`, `base`, `k`, `d`, `exp_avg`, `exp_avg_sq`: see lic_fast.functional.FlatLayout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import FLOATS, is_dense
from ..ops.stdet import layout as _layout
from . import _check


class FlatLayout:
    """Where the elements of a list of parameters lie in flat tensors, and how `code` names what they are.

    sizes: elements of each tensor. starts [n + 1]: the first place of each and the number of all places. Tensor t's
    elements lie in the order in which memory holds them, from a multiple of BLOCK on, PADDING behind them.

    A byte of code [places] uint8: TIED (bit 7), a step rebuilds the element as k * reference + d; STATELESS (bit 6), it
    has no moments (embedded for good, or padding); the other bits its mode, OUTSIDE where it is never embedded.
    k and d [elements not OUTSIDE], exp_avg and exp_avg_sq [elements not STATELESS], in flat order.

    Raises nothing of its own. Source: our choice, so that a step reads and writes no byte of what it does not need.
    """

    BLOCK, TIED, STATELESS, OUTSIDE = _layout.BLOCK, _layout.TIED, _layout.STATELESS, _layout.OUTSIDE
    PADDING, MOST_MODES = _layout.PADDING, _layout.MOST_MODES

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.starts = _layout.starts(self.sizes)
        self.elements = sum(self.sizes)

    def new_code(self, device: torch.device | str = "cpu") -> Tensor:
        """A code in which every element is free and OUTSIDE, [places] uint8."""
        code = torch.full((self.starts[-1],), self.PADDING, dtype=torch.uint8, device=device)
        for part in self.split(code):
            part.fill_(self.OUTSIDE)
        return code

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor [places] that belong to each parameter, views of [size]."""
        return [flat[first : first + size] for first, size in zip(self.starts, self.sizes, strict=False)]

    def base_of(self, code: Tensor) -> Tensor:
        """Elements that have a state, and embeddable ones, before each block: [places / BLOCK, 2] int64."""
        return _layout.base_of(code)

    def places(self, base: Tensor, states: int, coefficients: int) -> list[_layout.Place]:
        """For each parameter the slices of code, of exp_avg [states] and of k [coefficients] that are its own."""
        return list(_layout.places(self.sizes, base, states, coefficients))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, [n], sharing it.

    Raises ValueError where the tensor is not dense. Source: our choice, see FlatLayout.
    """
    if not is_dense(tensor):
        raise ValueError(f"in_memory_order: the tensor must be dense, got strides {list(tensor.stride())}; clone it")
    return _layout.flat(tensor)


def stdet_adam_step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], slow: Sequence[Tensor], code: Tensor, base: Tensor,
    k: Tensor, d: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, refs: Tensor, hyper: Tensor,
    *, alpha: float = 1.0, reset: bool = True,
) -> None:  # fmt: skip
    """An Adam step of the free elements, affine reconstruction of the tied ones and the moving average, in one pass.

    params: n tensors [*] of one dtype, fp32, bf16, fp16 or fp64. grads: n tensors, each of its parameter's shape and
    dtype, or without elements where there is no gradient: that tensor takes no Adam step. slow: n tensors [*] of k's
    dtype where this step averages, else empty. code [places] uint8, base [places / 1024, 2] int64, k and d [E],
    exp_avg and exp_avg_sq [S]: see FlatLayout; fp32, or fp64 for fp64 parameters. refs [M, 3] int64: the tensor of
    each mode's reference, its element there in the order of memory, its place in exp_avg; references are free. hyper
    [n, 7] fp64 on the CPU: lr / (1 - beta1^t), beta1, beta2, 1 / sqrt(1 - beta2^t), eps, Adam's weight decay, lr times
    AdamW's weight decay.

    Free elements: g <- g + l2 p; p <- p - decay p; m <- m + (1 - beta1)(g - m); v <- beta2 v + (1 - beta2) g^2;
    p <- p - step_size m / (scale sqrt(v) + eps); then slow <- slow + alpha (p - slow) (alpha = 1: slow <- p), and
    p <- slow where reset. Tied ones: k r + d with the new value r of their reference, in slow too. Averages of tied
    elements that still have a place stand still. Arithmetic in k's dtype, unfused: all backends agree to the bit.

    Raises ValueError for lengths and shapes, TypeError for dtypes and devices, BackendError for a forced backend,
    RuntimeError for what is written and requires grad outside no_grad and, natively, for tensors that share memory.
    What code, base and refs say is checked in C++ only (RuntimeError if beyond them); a mode outside [0, M) is NaN.
    Source: Adam (Kingma and Ba, 2015) and AdamW; SMA and the affine embedding of STDET (Zhang et al., TMLR 2025), whose
    treatment of the gradients and moments of embedded weights is not public: dropping both is a reconstruction.
    """
    f = "stdet_adam_step_"
    params, grads, slow = (
        _check.tensor_list(f, n, x) for n, x in (("params", params), ("grads", grads), ("slow", slow))
    )
    if not params:
        return
    _check.same_length(f, ("params", params), ("grads", grads), *([("slow", slow)] if slow else []))
    wide = _check_layout(f, params, code, base, k, d, refs)
    _check.no_gradient(f, "slow, exp_avg or exp_avg_sq", [*slow, exp_avg, exp_avg_sq])
    for name, value in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _flat_of(f, name, value, wide, params[0])
    _check.same_shape(f, ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if g.numel() or not p.numel():
            _check.same_shape(f, (f"params[{i}]", p), (f"grads[{i}]", g))
        if g.dtype != p.dtype or g.device != p.device:
            raise TypeError(
                f"{f}: grads[{i}] must be as params[{i}], got {g.dtype} on {g.device}; convert it with .to()"
            )
    for i, s in enumerate(slow):
        _check.same_shape(f, (f"params[{i}]", params[i]), (f"slow[{i}]", s))
        _check.dtype_in(f, f"slow[{i}]", s, (wide,))
        _check.same_device(f, (f"params[{i}]", params[i]), (f"slow[{i}]", s))
    _check.tensor(f, "hyper", hyper)
    if hyper.dtype is not torch.float64 or hyper.device.type != "cpu" or list(hyper.shape) != [len(params), 7]:
        raise ValueError(
            f"{f}: hyper must be float64 [{len(params)}, 7] on the CPU, got {hyper.dtype} {list(hyper.shape)} on "
            f"{hyper.device}; give one row for each parameter"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{f}: alpha must be in [0, 1], got {alpha!r}")
    torch.ops.lic_fast.stdet_adam_step_(
        params, grads, slow, code, base, k, d, exp_avg, exp_avg_sq, refs, hyper.contiguous(), float(alpha), bool(reset)
    )


def stdet_reconstruct_(
    params: Sequence[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor
) -> None:
    """Tied elements become k r + d, r the value of their mode's reference in `params`; all others keep their bits.

    The arguments are those of stdet_adam_step_. Raises what it raises.
    Source: the affine parameter embedding of STDET (Zhang et al., TMLR 2025).
    """
    f = "stdet_reconstruct_"
    params = _check.tensor_list(f, "params", params)
    if params:
        _check_layout(f, params, code, base, k, d, refs)
        torch.ops.lic_fast.stdet_reconstruct_(params, code, base, k, d, refs)


def stdet_mask_(grads: Sequence[Tensor], code: Tensor, *, sizes: Sequence[int]) -> None:
    """The gradients of tied elements become 0, so that a norm is that of what is trained.

    grads: n tensors of one dtype, laid out in memory like their parameters, without elements where there is none. code:
    see FlatLayout. sizes: elements of each of the n parameters. Raises ValueError for sizes, TypeError for dtypes and
    devices, BackendError for a forced backend. Source: our reading of STDET, whose gradients are not public.
    """
    f = "stdet_mask_"
    grads, sizes = _check.tensor_list(f, "grads", grads), [int(size) for size in sizes]
    _check.same_length(f, ("sizes", sizes), ("grads", grads))
    _check.tensor(f, "code", code)
    _check.no_gradient(f, "grads", grads)
    for i, (g, size) in enumerate(zip(grads, sizes, strict=True)):
        if size < 0 or g.numel() not in (0, size):
            raise ValueError(f"{f}: grads[{i}] must have {size} elements or none, got {g.numel()}")
        _check.dtype_in(f, f"grads[{i}]", g, (grads[0].dtype,) if grads[0].dtype in FLOATS else FLOATS)
        _check.same_device(f, ("code", code), (f"grads[{i}]", g))
    _flat_of(f, "code", code, torch.uint8, code, _layout.starts(sizes)[-1])
    if grads:
        torch.ops.lic_fast.stdet_mask_(grads, code, sizes)


def _flat_of(
    f: str, name: str, value: Tensor, dtype: torch.dtype, like: Tensor, elements: int | None = None, dims: int = 1
) -> None:
    _check.tensor(f, name, value)
    _check.dtype_in(f, name, value, (dtype,))
    _check.same_device(f, ("params[0]", like), (name, value))
    if value.dim() != dims or not value.is_contiguous() or (elements is not None and len(value) != elements):
        wanted = "" if elements is None else f", {elements} long"
        raise ValueError(
            f"{f}: {name} must be contiguous with {dims} dimension{'s' * (dims > 1)}{wanted}, got {list(value.shape)}; "
            "see FlatLayout"
        )


def _check_layout(
    f: str, params: list[Tensor], code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor | None = None
) -> torch.dtype:
    """The dtype of k, d and the moments, where the embedding fits the parameters."""
    first = params[0]
    for i, p in enumerate(params):
        _check.dtype_in(f, f"params[{i}]", p, (first.dtype,) if first.dtype in FLOATS else FLOATS)
        _check.same_device(f, ("params[0]", first), (f"params[{i}]", p))
    _check.no_gradient(f, "params", params)
    wide = torch.float64 if first.dtype is torch.float64 else torch.float32
    elements = _layout.starts([p.numel() for p in params])[-1]
    _flat_of(f, "code", code, torch.uint8, first, elements)
    _flat_of(f, "base", base, torch.int64, first, elements // _layout.BLOCK, 2)
    for name, value in (("k", k), ("d", d)):
        _flat_of(f, name, value, wide, first)
    _check.same_shape(f, ("k", k), ("d", d))
    if refs is None:
        return wide
    _flat_of(f, "refs", refs, torch.int64, first, None, 2)
    if refs.shape[1] != 3 or len(refs) > _layout.MOST_MODES:
        raise ValueError(f"{f}: refs must be [M, 3] with M <= {_layout.MOST_MODES}, got {list(refs.shape)}")
    return wide
