"""What SOAP refuses, with one line each."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..functional.preconditioning import METHODS, PRECISIONS

REFRESHES = ("auto", *METHODS)
_NUMBERS = ("lr", "betas", "shampoo_beta", "eps", "weight_decay")
_FLAGS = ("merge_dims", "precondition_1d", "normalize_grads", "correct_bias", "precondition")


def settings_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What of a group has to be looked at again when it changes; a tensor stands for itself, whatever its value."""
    names = (*_NUMBERS, "precondition_frequency", "correct_bias", "normalize_grads")
    return tuple(id(value) if isinstance(value := group[name], Tensor) else value for name in names)


def squares_fit(grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether a gradient is finite and sums of its squares are too, in `dtype`. Waits for the device."""
    if grad.numel() == 0:
        return True
    largest = float(grad.abs().max())
    return math.isfinite(largest) and largest * largest * grad.numel() < torch.finfo(dtype).max


def _number(value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return math.nan
        return 0.0 if value.device.type != "cpu" else float(value)  # a device is not waited for
    return float(value) if isinstance(value, numbers.Real) else math.nan


def _require(good: bool, name: str, wanted: str, value: Any) -> None:
    if not good:
        raise ValueError(f"SOAP: {name} must be {wanted}, got {value!r}")


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a setting of a parameter group that is out of range."""
    for name in ("lr", "eps", "weight_decay"):
        number = _number(group[name])
        _require(math.isfinite(number) and number >= 0, name, "a finite number >= 0", group[name])
    betas = group["betas"]
    _require(
        isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= _number(b) < 1 for b in betas),
        "betas", "two numbers in [0, 1)", betas,
    )  # fmt: skip
    _require(_number(group["shampoo_beta"]) < 1, "shampoo_beta", "below 1 (negative: betas[1])", group["shampoo_beta"])
    for name in ("precondition_frequency", "max_precond_dim"):
        value = group[name]
        _require(isinstance(value, numbers.Integral) and value >= 1, name, "a whole number >= 1", value)
    for name in _FLAGS:
        _require(group[name] in (True, False), name, "True or False", group[name])


def check_options(
    data_format: str, refresh: str, stagger: bool, refresh_memory: int | None, precision: str, capturable: bool
) -> None:
    """Raises ValueError for an option of the whole optimizer that is unknown."""
    for name, value, known in (
        ("data_format", data_format, ("channels_first", "channels_last")),
        ("refresh", refresh, REFRESHES),
        ("precision", precision, PRECISIONS),
    ):
        _require(value in known, name, f"one of {', '.join(known)}", value)
    for name, value in (("stagger", stagger), ("capturable", capturable)):
        _require(value in (True, False), name, "True or False", value)
    _require(
        refresh_memory is None or (isinstance(refresh_memory, int) and refresh_memory > 0),
        "refresh_memory", "None or a number of bytes > 0", refresh_memory,
    )  # fmt: skip
