"""Says whether Triton can run, and imports its kernels on first use. The only module that imports triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch


def interpreted() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1 before triton is imported): kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _import_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install triton"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import ({error}); run: pip install --upgrade --force-reinstall triton"
    return None


def why_not(device: str) -> str | None:
    """The reason Triton kernels cannot run on `device`, or None where they can."""
    if device == "cpu" and not interpreted():
        return "Triton runs on the CPU only under its interpreter; set TRITON_INTERPRET=1 (slow, for tests)"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    return _import_error()


def kernels(name: str) -> ModuleType:
    """The module triton_kernels/<name>.py."""
    return importlib.import_module(f"lic_fast.triton_kernels.{name}")
