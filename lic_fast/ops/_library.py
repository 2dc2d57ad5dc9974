"""The torch.library namespace of lic_fast, and what the ops share: defining, and laying tensors out alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lic_fast", "DEF")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def define(schema: str, function: Callable, fake: Callable) -> None:
    """Defines lic_fast::<schema> with one implementation for every device, and its fake."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lic_fast::{name}", fake, lib=LIBRARY)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each place once, in any order of the dimensions."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def alike(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all tensors are dense and share one order in memory, so that a flat loop pairs their elements."""
    if first.is_contiguous():
        return all(t is None or t.is_contiguous() for t in others)
    return is_dense(first) and all(t is None or t.stride() == first.stride() for t in others)


def laid_out_as(first: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` itself where it shares the order in memory of the dense tensor `first`, else a copy that does."""
    if alike(first, tensor):
        return tensor
    return torch.empty_like(first, dtype=tensor.dtype).copy_(tensor)


def copy_back(originals: list[Tensor], walked: list[Tensor]) -> None:
    """Writes what a kernel left in stand-ins back into the tensors they stand for."""
    if originals is not walked:
        for original, stand_in in zip(originals, walked, strict=True):
            if original is not stand_in:
                original.copy_(stand_in)


def all_contiguous(*lists: list[Tensor]) -> bool:
    """Whether every tensor of every list is contiguous: the common case, asked before anything dearer."""
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists)


def plain(tensor: Tensor) -> bool:
    """Whether an op that only changes its inputs may skip torch's dispatcher, which costs more than small lists do.

    It may not while a graph is traced, under a dispatch mode (fake tensors, functionalization), or for subclasses.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not tensor.is_neg()
    )


def mark_changed(tensors: list[Tensor]) -> None:
    """Tells autograd that kernels have changed the tensors: a graph that saved one of them then refuses to run."""
    if torch.is_inference_mode_enabled():
        tensors = [t for t in tensors if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)
