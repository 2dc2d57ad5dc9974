"""What `lic-fast doctor` prints: versions, GPU, each backend usable or the reason and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import _native, _triton
from ._dispatch import OPS, explain

PACKAGES = ("torch", "triton", "numpy", "compressai", "torchvision", "lic_fast")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend_line(name: str, device: str, reason: str | None) -> str:
    return f"  {name:<10} {device:<5} {'usable' if reason is None else 'not usable: ' + reason}"


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        why = "torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        return [f"  none ({why})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        lines.append(f"  {found.name}, compute capability {found.major}.{found.minor}, {memory:.0f} GiB")
    return lines


def _library_lines() -> list[str]:
    info = _native.build_info()
    if not info:
        return ["  no record of a build"]
    lines = []
    for backend, state in info["libraries"].items():
        path = _native.library_path(backend)
        if state == "built" and path.is_file():
            torch_built = info["torch"]
            state = f"built against torch {torch_built['version']} by {info['nvcc' if backend == 'cuda' else 'cxx']}"
            if backend == "cuda":
                state += f" for {', '.join(info['cuda_archs'])}"
        lines.append(f"  {path.name:<18} {state}")
    return lines


def report() -> str:
    """The whole report, one fact a line."""
    triton_cpu, triton_cuda = _triton.why_not("cpu"), _triton.why_not("cuda")
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in PACKAGES]
    lines += [f"CUDA in torch {torch.version.cuda or 'none'}", "", "GPU", *_gpu_lines()]
    lines += ["", "Backends"]
    lines.append(_backend_line("cuda", "cuda", _native.why_not("cuda", "cuda")))
    lines.append(_backend_line("triton", "cuda", triton_cuda))
    lines.append(_backend_line("triton", "cpu", triton_cpu))
    lines.append(_backend_line("cpp", "cpu", _native.why_not("cpp", "cpu")))
    lines.append(_backend_line("reference", "any", None))
    lines += ["", "Native libraries", *_library_lines()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", f"Ops on {device}, float32 (integers where an op takes no other)"]
    lines += [f"  {name:<24} {explain(name, device).chosen}" for name in sorted(OPS)]
    return "\n".join(lines)
