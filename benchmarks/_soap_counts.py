"""What a step of an optimizer costs besides time: dispatched ops, kernel launches, bytes of state, refreshes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OURS = "lic_fast"
_VIEWS = {"aten::_unsafe_view", "aten::_reshape_alias"}  # views that their schemas do not call so
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


class OpCounter(TorchDispatchMode):
    """Counts in `ops` the dispatched ops that are not views; an op of lic_fast is one, and what it dispatches too.

    A native kernel is one op, whatever it calls inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts `func` and runs it."""
        self.ops += func.namespace != "profiler" and not _is_view(func)
        if func.namespace != _OURS:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        with self:  # through the dispatcher what it calls would not be seen
            return importlib.import_module(f"lic_fast.ops.{name.rstrip('_')}")._op(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return func._schema.name in _VIEWS or any(alias is not None and not alias.is_write for alias in aliases)


def count_ops(run: Callable[[], Any]) -> int:
    """How many ops that are not views `run` dispatches."""
    with OpCounter() as counter:
        run()
    return counter.ops


def count_launches(run: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels and CUDA graphs `run` launches by torch.profiler; None on the CPU, where it only runs."""
    if device.type != "cuda":
        run()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key.startswith(_LAUNCHES))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all storages that an optimizer holds beside its parameters and their gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = {x.untyped_storage().data_ptr() for p in params for x in (p, p.grad) if x is not None}
    found: dict[int, int] = {}
    for tensor in _tensors(optimizer.__dict__, set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached through containers and the attributes of objects."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (type, str, bytes)) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from _tensors(item, seen)


@contextmanager
def counted_qr() -> Iterator[Callable[[], int]]:
    """Within the block the function that it gives says how often torch.linalg.qr was called so far."""
    original, calls = torch.linalg.qr, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    torch.linalg.qr = counting
    try:
        yield lambda: calls
    finally:
        torch.linalg.qr = original
