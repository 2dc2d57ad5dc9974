"""Loads the native libraries, once, and says why one is not usable. The only module that does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from . import _build


def _mend(backend: str) -> str:
    return f"lic-fast build --libraries {backend}"


def library_path(backend: str) -> Path:
    """Where the library of `backend` ("cpp" or "cuda") lies once it is built."""
    return _build.PACKAGE / f"{_build.LIBRARIES[backend]}.abi3.so"


@functools.cache
def build_info() -> dict[str, Any]:
    """What was built from what, as recorded by the build; empty where there is no record."""
    try:
        return json.loads((_build.PACKAGE / "_build_info.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@functools.cache
def _load(backend: str) -> str | None:
    """Loads a library; returns None, or the reason it cannot be used."""
    path = library_path(backend)
    if not path.is_file():
        recorded = build_info().get("libraries", {}).get(backend, "never built")
        return f"{path.name} is not built ({recorded}); run: {_mend(backend)}"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _build.TORCH_TARGET:
        return f"torch {torch.__version__} is older than the libraries' 2.10; run: pip install --upgrade torch"
    if f"lic_fast_stamp={_build.stamp()}".encode() not in path.read_bytes():
        return f"{path.name} was built from the sources of another version; run: {_mend(backend)}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({str(error).splitlines()[0]}); run: {_mend(backend)}"
    return None


def why_not(backend: str, device: str) -> str | None:
    """The reason the library of `backend` cannot run on `device`, or None where it can."""
    if backend == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; run: pip install torch"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
    return _load(backend) or (_probe() if backend == "cuda" else None)


@functools.cache
def _probe() -> str | None:
    """The reason the CUDA library cannot run on the current GPU and driver, or None."""
    error = op("cuda", "probe")()
    if error == 0:
        return None
    major, minor = torch.cuda.get_device_capability()
    archs = ", ".join(build_info().get("cuda_archs") or [])
    return (
        f"_C_cuda.abi3.so (built for {archs}) cannot run on this GPU ({major}.{minor}) with this driver, CUDA error "
        f"{error}; run: TORCH_CUDA_ARCH_LIST={major}.{minor} {_mend('cuda')}"
    )


def op(backend: str, name: str) -> Any:
    """The native op `name` of a loaded library."""
    return getattr(getattr(torch.ops, f"lic_fast_{backend}"), name)
