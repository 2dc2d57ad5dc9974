"""What coding a latent step by step does to the elements of a step: gather, round, index; dequantise, scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import schedule as _op  # noqa: F401  defines the ops
from . import _check

_FLOAT = (torch.float32,)


def schedule_levels(parameters: Tensor) -> Tensor:
    """The indexes by which lic_fast.coding codes elements: uint8 [B, c, h, w] of fp32 parameters [B, 2 c, h, w].

    The first c channels are scales; their bits decide, 16 levels to an octave, from 0 (scales below 0.11328125,
    negative ones too) to 243 (docs/BITSTREAM.md, section 2). The others, means, play no part.

    Raises TypeError for what is no fp32 tensor, ValueError for other shapes, BackendError for a forced backend.
    Source: our choice.
    """
    f = "schedule_levels"
    return torch.ops.lic_fast.schedule_levels(_parameters(f, parameters).contiguous())


def schedule_quantize_(
    y_hat: Tensor, y: Tensor, parameters: Tensor, *, first: int, row: int, column: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(symbols int32, levels uint8, values fp32), all [B, c, h, w], of a step's elements; writes values into y_hat.

    The elements are y[:, first : first + c, row::stride, column::stride] of y [B, C, H, W]; parameters [B, 2 c, h, w]
    are their scales, then their means. symbols = round(y - mean), ties to even, limited to +-2**30 (NaN becomes
    -2**30); levels as schedule_levels gives them; values = symbols + mean, which y_hat [B, C, H, W] has in these
    places then: what a decoder will have there. One pass. y_hat and y fp32 and contiguous; no gradients.

    Raises TypeError for dtypes and devices, ValueError for shapes, places and shared memory, RuntimeError for y_hat
    that requires grad, BackendError for a forced backend.
    Source: our choice.
    """
    f = "schedule_quantize_"
    place = _checked(f, y_hat, parameters, first, row, column, stride)
    _check.dtype_in(f, "y", _check.tensor(f, "y", y), _FLOAT)
    _check.same_shape(f, ("y_hat", y_hat), ("y", y))
    _check.same_device(f, ("y_hat", y_hat), ("y", y))
    _check.no_overlap(f, ("y_hat", y_hat), ("y", y))
    return torch.ops.lic_fast.schedule_quantize_(y_hat, y.detach().contiguous(), parameters.contiguous(), *place)


def schedule_dequantize_(
    y_hat: Tensor, symbols: Tensor, parameters: Tensor, *, first: int, row: int, column: int, stride: int
) -> Tensor:
    """values = symbols + means, fp32 [B, c, h, w], which also go into y_hat, as schedule_quantize_ puts them there.

    symbols int32 [B, c, h, w]; the rest as in schedule_quantize_. Raises what that raises.
    Source: our choice.
    """
    f = "schedule_dequantize_"
    place = _checked(f, y_hat, parameters, first, row, column, stride)
    _check.dtype_in(f, "symbols", _check.tensor(f, "symbols", symbols), (torch.int32,))
    b, c, h, w = parameters.shape
    if symbols.shape != (b, c // 2, h, w):
        raise ValueError(f"{f}: symbols must be {[b, c // 2, h, w]} for these parameters, got {list(symbols.shape)}")
    _check.same_device(f, ("y_hat", y_hat), ("symbols", symbols))
    return torch.ops.lic_fast.schedule_dequantize_(y_hat, symbols.contiguous(), parameters.contiguous(), *place)


def _parameters(f: str, parameters: object) -> Tensor:
    tensor = _check.tensor(f, "parameters", parameters)
    _check.dtype_in(f, "parameters", tensor, _FLOAT)
    if tensor.dim() != 4 or tensor.shape[1] % 2:
        raise ValueError(f"{f}: parameters must be [B, 2 c, h, w], scales first, got {list(tensor.shape)}")
    return tensor.detach()


def _checked(
    f: str, y_hat: object, parameters: object, first: int, row: int, column: int, stride: int
) -> tuple[int, int, int, int]:
    y_hat, parameters = _check.tensor(f, "y_hat", y_hat), _parameters(f, parameters)
    _check.dtype_in(f, "y_hat", y_hat, _FLOAT)
    if y_hat.dim() != 4 or not y_hat.is_contiguous():
        raise ValueError(f"{f}: y_hat must be [B, C, H, W] and contiguous, got {list(y_hat.shape)}; make it so")
    _check.no_gradient(f, "y_hat", [y_hat])
    _check.same_device(f, ("y_hat", y_hat), ("parameters", parameters))
    _check.no_overlap(f, ("y_hat", y_hat), ("parameters", parameters))
    if stride < 1 or not (0 <= row < stride and 0 <= column < stride) or first < 0:
        raise ValueError(
            f"{f}: a step begins at 0 <= first and 0 <= row, column < stride, got {first}, {row}, {column} and {stride}"
        )
    b, channels, height, width = y_hat.shape
    h, w = (max(0, -((at - side) // stride)) for at, side in ((row, height), (column, width)))
    c = parameters.shape[1] // 2
    if first + c > channels or parameters.shape != (b, 2 * c, h, w):
        raise ValueError(
            f"{f}: the step has [{b}, c, {h}, {w}] elements of {channels} channels, got parameters "
            f"{list(parameters.shape)} from channel {first}; pass [B, 2 c, h, w]"
        )
    return first, row, column, stride
