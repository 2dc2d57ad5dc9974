"""What a run leaves behind: the names of its files, and its result in a few numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lic_fast.training.config import TrainConfig
from lic_fast.training.errors import optional_import
from lic_fast.training.files import read_log

CHECKPOINT, LOG, CONFIG, PLOT = "checkpoint.pt", "log.csv", "config.json", "loss.png"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to. final_*: means over the last tenth of its steps, skipped ones left out;
    step_seconds and optimizer_seconds: medians (data loading left out of both); seconds: wall time of this
    call; peak_memory_bytes: of the CUDA allocator, or else of the whole process (None where the system does
    not tell); optimizer_skipped: updates of single parameters that the optimizer itself left out (SOAP);
    embedding: STDET's report.
    """

    output: str
    model: str
    steps: int
    epochs: int
    final_loss: float
    final_bpp: float
    final_psnr: float
    step_seconds: float
    optimizer_seconds: float
    seconds: float
    peak_memory_bytes: int | None
    skipped: int
    broken_images: int
    optimizer_skipped: int = 0
    embedding: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        """The fields as a dictionary of plain values."""
        return dataclasses.asdict(self)


def sum_up(
    config: TrainConfig,
    progress: dict[str, Any],
    broken: int,
    device: torch.device,
    seconds: float,
    optimizer_skipped: int = 0,
    embedding: str = "",
) -> TrainResult:
    """The result of the run that wrote log.csv in `config.output` and stands at `progress`."""
    rows = read_log(Path(config.output) / LOG)
    tail = rows[-max(1, math.ceil(len(rows) / 10)) :]
    return TrainResult(
        output=config.output,
        model=config.model,
        steps=progress["step"],
        epochs=progress["epoch"],
        final_loss=_over(tail, "loss", statistics.fmean),
        final_bpp=_over(tail, "bpp", statistics.fmean),
        final_psnr=_over(tail, "psnr", statistics.fmean),
        step_seconds=_over(rows, "step_seconds", statistics.median),
        optimizer_seconds=_over(rows, "optimizer_seconds", statistics.median),
        seconds=seconds,
        peak_memory_bytes=_peak_memory(device),
        skipped=progress["skipped"],
        broken_images=broken,
        optimizer_skipped=optimizer_skipped,
        embedding=embedding,
    )


def _over(rows: list[dict[str, str]], name: str, how: Callable[[list[float]], float]) -> float:
    values = [float(row[name]) for row in rows if row["skipped"] == "0"]
    return how(values) if values else math.nan


def versions() -> dict[str, str]:
    """Of the libraries that decide what a run computes."""
    return {"torch": str(torch.__version__), "compressai": str(optional_import("compressai").__version__)}


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform not in ("linux", "darwin"):
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
