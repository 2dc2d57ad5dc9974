"""Integer arithmetic that is the same everywhere: networks whose results a decoder must have to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._library import plain as _plain
from ..ops.integer_conv2d import SPEC as _SPEC
from ..ops.integer_conv2d import pack as _pack
from ..ops.integer_conv2d import packed_shape as _packed_shape
from . import _check

_MOST = 32767
_MOST_PRODUCTS = 1 << 22  # of two int16: fp64 holds their sums exactly
_INT16, _INT32 = (torch.int16,), (torch.int32,)


def integer_conv2d_pack(weight: Tensor) -> Tensor:
    """weight int16 [O, C, k, k] in the order the kernels read it: int16 [ceil(O / 16), k * k, ceil(C / 2), 16, 2].

    Make it once, and anew where the weight has changed. Raises ValueError for shapes, TypeError for dtypes.
    Source: our choice; pairs of channels are what x86's multiply-adds of 16-bit integers take.
    """
    f = "integer_conv2d_pack"
    _check.dtype_in(f, "weight", _check.tensor(f, "weight", weight), (torch.int16,))
    _check_weight(f, weight)
    return _pack(weight)


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    leaky: bool = False,
    limit: int | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """out = ((bias + sum over c, u, v of weight * f(x)) >> shift) + residual, in integers: equal bits everywhere.

    x int16 [B, C, H, W], any strides; weight int16 [O, C, k, k], k 1 or 3, stride 1, padded with k // 2 zeros a side;
    bias int32 [O]; shift int32 [O], of which the low five bits count, an arithmetic shift of the sum with its bias
    (rounding to nearest is a bias with 1 << (shift - 1) added). residual int16 [B, O, H, W]. f is the identity, or
    where leaky max(x, (328 x + 2**14) >> 15), a leaky ReLU of slope 0.01001. Sums are modulo 2**32: choose weights so
    that sum |weight| * max |x| + |bias| < 2**31, and there is none that wraps.

    limit, 1 to 32767: the result is clamped to +-limit, int16 [B, O, H, W] in channels_last. Without it, the result is
    int32 [B, O, H, W], contiguous, modulo 2**32. packed: what integer_conv2d_pack made of weight, to save making it.
    Every backend, thread count and processor gives the same; there are no gradients.

    Raises ValueError for shapes and limit, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: our choice; integer networks for entropy models are Ballé et al. (ICLR 2019).
    """
    f = "integer_conv2d"
    _check_types(f, x, weight, bias, shift, residual, packed)
    _check_weight(f, weight)
    outputs, channels = weight.shape[:2]
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{f}: x must be [B, {channels}, H, W] for this weight, got {list(x.shape)}")
    if bias.shape != (outputs,) or shift.shape != (outputs,):
        raise ValueError(
            f"{f}: bias and shift must be [{outputs}], got {list(bias.shape)} and {list(shift.shape)}; "
            "give one of each for every output"
        )
    if residual is not None and residual.shape != (x.shape[0], outputs, *x.shape[2:]):
        raise ValueError(
            f"{f}: residual must be {[x.shape[0], outputs, *x.shape[2:]]}, got {list(residual.shape)}; expand it first"
        )
    if packed is not None and packed.shape != _packed_shape(weight):
        raise ValueError(
            f"{f}: packed must be {list(_packed_shape(weight))}, got {list(packed.shape)}; use integer_conv2d_pack"
        )
    bound = 0 if limit is None else limit
    if limit is not None and not 1 <= limit <= _MOST:
        raise ValueError(f"{f}: limit must be 1 to {_MOST} or None, got {limit!r}; int16 holds no more")
    if _plain(x):
        return _SPEC(x, x, weight, bias, shift, residual, packed, leaky, bound)
    return torch.ops.lic_fast.integer_conv2d(x, weight, bias, shift, residual, packed, leaky, bound)


def _check_types(
    f: str, x: object, weight: object, bias: object, shift: object, residual: object, packed: object
) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "shift": shift, "residual": residual, "packed": packed}
    for name, value in named.items():
        if value is not None or name not in ("residual", "packed"):
            value = _check.tensor(f, name, value)
            _check.dtype_in(f, name, value, _INT32 if name in ("bias", "shift") else _INT16)
            if value.device != x.device:
                _check.same_device(f, ("x", x), (name, value))


def _check_weight(f: str, weight: Tensor) -> None:
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in (1, 3) or not weight.numel():
        raise ValueError(f"{f}: weight must be [O, C, k, k], k 1 or 3, not empty, got {list(weight.shape)}")
    if weight[0].numel() > _MOST_PRODUCTS:
        raise ValueError(f"{f}: at most {_MOST_PRODUCTS} products a sum, got {weight[0].numel()}; use fewer channels")
