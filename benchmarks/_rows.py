"""Rows: what a result is keyed by, how it is appended to a CSV file, and how a group is printed."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import __version__, _native
from ._harness import CEILING, OURS, Group, Outcome, Result

COLUMNS = (
    *("op", "case", "backend", "inputs", "dtype", "device", "threads"),
    *("python", "torch", "triton", "lic_fast", "compiler", "commit", "utc"),
    *("median_ms", "p20_ms", "p80_ms", "gbps", "ceiling_gbps", "fraction", "repeats", "bytes", "flops"),
)
# Columns that the rows of a whole optimizer have besides; ms and counts are those of a step.
FURTHER = {
    "soap": (
        *("period_ms", "refresh_ms", "slowest_ms", "cpu_ms", "refreshes", "gflops", "period_gflops", "refresh_flops"),
        *("state_bytes", "ops", "refresh_ops", "launches", "refresh_launches", "chosen"),
    ),
    "stdet_training": ("step_ms", "added", "peak_bytes", "state", "chosen"),
    "decompress": ("chosen",),
}
_HERE = Path(__file__).resolve().parent


class RowsError(RuntimeError):
    """A file of rows that cannot be read or appended to."""


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU by /proc/cpuinfo."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _compiler(device: torch.device) -> str:
    """What built the native library of `device`; empty where there is none."""
    info = _native.build_info()
    backend, key = ("cuda", "nvcc") if device.type == "cuda" else ("cpp", "cxx")
    return str(info.get(key) or "") if info.get("libraries", {}).get(backend) == "built" else ""


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def in_checkout() -> bool:
    """Whether these files lie in a source checkout, not in an installed package."""
    return (_HERE.parent / "csrc" / "bind.cpp").is_file() and (_HERE.parent / "setup.py").is_file()


@functools.cache
def commit() -> str:
    """The commit of the checkout, -dirty where anything but the rows differs from it; empty elsewhere."""
    if not in_checkout() or shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(_HERE.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return "" if head is None else head + ("-dirty" if changes else "")


def default_output() -> Path:
    """benchmarks/results of the checkout where it can be written, else ./lic_fast_results."""
    results = _HERE / "results"
    return results if in_checkout() and os.access(results, os.W_OK) else Path("lic_fast_results")


def now() -> str:
    """The time of day, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a file of rows, which depend on its name."""
    return (*COLUMNS, *FURTHER.get(path.stem, ()))


def rows(group: Group, outcome: Outcome) -> list[dict[str, str]]:
    """One row a result; the rows of one group share their time."""
    same = shared(group.op, group.case, group.inputs, group.dtype, group.device)
    return [{**same, **_measured(result)} for result in outcome.results]


def shared(op: str, case: str, inputs: str, dtype: str, device: torch.device) -> dict[str, str]:
    """What all rows of one comparison have in common."""
    return {
        "op": op,
        "case": case,
        "inputs": inputs,
        "dtype": dtype,
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _triton(),
        "lic_fast": __version__,
        "compiler": _compiler(device),
        "commit": commit(),
        "utc": now(),
    }


def _measured(result: Result) -> dict[str, str]:
    return {
        "backend": result.case.backend,
        "median_ms": f"{result.timing.median:.6g}",
        "p20_ms": f"{result.timing.p20:.6g}",
        "p80_ms": f"{result.timing.p80:.6g}",
        "gbps": f"{result.gbps:.6g}",
        "ceiling_gbps": f"{result.ceiling:.6g}",
        "fraction": f"{result.fraction:.4f}",
        "repeats": str(result.timing.repeats),
        "bytes": str(result.case.bytes),
        "flops": str(result.case.flops),
    }


def append(path: Path, new: list[dict[str, str]], columns: Sequence[str] | None = None) -> None:
    """Appends rows to a CSV file, with a header where it is new. Raises RowsError for other columns."""
    if not new:
        return
    columns = columns or columns_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file() or path.stat().st_size == 0
    if not is_new:
        read(path, columns)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(new)


def read(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises RowsError where its columns are not today's."""
    columns = columns or columns_of(path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise RowsError(f"benchmarks: {path} has other columns; move it away or pass --output")
        return list(reader)


def table(group: Group, outcome: Outcome) -> str:
    """The group as aligned text, fastest first; lic_fast's own rows are marked with a star."""
    where = f"{device_name(group.device)}, {torch.get_num_threads()} threads"
    lines = [f"{group.op}: {group.case} | {group.inputs} | {group.dtype} | {where}"]
    if outcome.results:
        width = max(len(result.case.backend) for result in outcome.results)
        lines.append(f"    {'backend':{width}}  median ms  p20 - p80 ms       spread    GB/s  of ceiling")
    for result in outcome.results:
        t = result.timing
        star = "*" if result.case.backend.startswith(OURS) else " "
        span = f"{t.p20:.3f} - {t.p80:.3f}"
        lines.append(
            f"  {star} {result.case.backend:{width}}  {t.median:9.3f}  {span:<17}  {t.spread:6.0%}"
            f"  {result.gbps:6.1f}  {result.fraction:9.0%}{'  <- ceiling' * (result.case.backend == CEILING)}"
        )
    lines += [f"    left out: {backend}: {reason}" for backend, reason in group.left_out.items()]
    lines += [f"  ! REFUSED: {backend}: {reason}" for backend, reason in outcome.refused.items()]
    return "\n".join(lines)
