"""Argument checks shared by the public functions: every message says what was got and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._library import plain

_TENSORS = {Tensor, torch.nn.Parameter}


def tensor(function: str, name: str, value: object) -> Tensor:
    """`value` where it is a tensor; else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    return value


def tensor_list(function: str, name: str, value: object) -> list[Tensor]:
    """`value` as a list of tensors: a single tensor becomes a list of one; else TypeError."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) is list and set(map(type, value)) <= _TENSORS:
        return value
    if not isinstance(value, Sequence) or not all([isinstance(item, Tensor) for item in value]):
        raise TypeError(f"{function}: {name} must be a tensor or a list of tensors, got {type(value).__name__}")
    return list(value)


def same_length(function: str, first: tuple[str, Sequence], *others: tuple[str, Sequence]) -> None:
    """ValueError where the named lists differ in length."""
    for name, values in others:
        if len(values) != len(first[1]):
            raise ValueError(
                f"{function}: lists differ in length, got {len(first[1])} {first[0]} and {len(values)} {name}; "
                f"pass one of each for every tensor"
            )


def same_shape(function: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """ValueError where a named tensor's shape differs; nothing is broadcast."""
    for name, value in others:
        if value is not None and value.shape != first[1].shape:
            raise ValueError(
                f"{function}: {name} must have the shape of {first[0]}, got {list(value.shape)} and "
                f"{list(first[1].shape)}; expand it first"
            )


def same_device(function: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """TypeError where a named tensor lies on another device."""
    for name, value in others:
        if value is not None and value.device != first[1].device:
            raise TypeError(
                f"{function}: {name} must be on the device of {first[0]}, got {value.device} and {first[1].device}; "
                f"move it with .to()"
            )


def dtype_in(function: str, name: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """TypeError where `value` has a dtype outside `allowed`."""
    if value.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{function}: {name} must be one of {names}, got {value.dtype}; convert it with .to()")


def no_gradient(function: str, name: str, values: Sequence[Tensor]) -> None:
    """RuntimeError where an argument of an op in place requires grad while gradients are recorded: it has none."""
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        raise RuntimeError(
            f"{function}: {name} requires grad, and no gradient is recorded; call it under torch.no_grad()"
        )


def no_forward_mode(function: str) -> None:
    """RuntimeError inside forward-mode differentiation (torch.func.jvp, dual_level): tangents would be lost."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(f"{function}: forward-mode derivatives are not supported; use reverse mode")


def no_overlap(function: str, written: tuple[str, Tensor], read: tuple[str, Tensor]) -> None:
    """ValueError where a tensor that is written shares memory with one that is read."""
    (a_name, a), (b_name, b) = written, read
    shared = a is b
    if plain(a) and plain(b) and a.numel() and b.numel() and a.device.type != "meta":
        (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
        shared = a_first < b_end and b_first < a_end
    if shared:
        raise ValueError(f"{function}: {a_name} and {b_name} share memory; clone one of them")


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
