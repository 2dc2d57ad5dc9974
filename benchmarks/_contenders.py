"""Who takes part in a group: the lic_fast backends that run here, and what torch.compile needs to."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import explain, use_backend
from ._harness import OURS

# Triton's interpreter runs on the CPU too, but for tests: it is not timed.
_MEANT_FOR = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def backends(op: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """The lic_fast backends of `op` that run on `device`, and the reason for each that does not."""
    reasons = {name: explain(op, device, dtype).reasons[name] for name in _MEANT_FOR[device.type]}
    usable = [name for name, reason in reasons.items() if reason is None]
    return usable, {OURS + name: reason for name, reason in reasons.items() if reason is not None}


def forced(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with every op in `backend`."""

    def call() -> Any:
        with use_backend(backend):
            return run()

    return call


def compile_why_not(device: torch.device) -> str | None:
    """The reason torch.compile cannot generate code for `device`, or None where it can."""
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "triton is not installed; run: pip install triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler, looked for {compiler}; install g++"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile for fixed shapes and whole; it compiles at the first call."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def forget_compiled() -> None:
    """Drops what torch.compile has made: without it a later group would meet the limit on recompilations."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the reset would import it
        torch.compiler.reset()


def step(function: Callable[..., Tensor], values: Sequence[Tensor], grad: Tensor | None) -> Callable[[], list[Tensor]]:
    """One run: [y], and with `grad`, of y, the gradients of all values after it."""
    if grad is None:
        return lambda: [function(*values)]
    leaves = [t.detach().requires_grad_() for t in values]

    def run() -> list[Tensor]:
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    return run
