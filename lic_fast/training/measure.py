"""What is measured of a codec on a photograph, and how such rows are written down."""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lic_fast.training.data import to_tensor
from lic_fast.training.errors import optional_import
from lic_fast.training.files import atomic_write
from lic_fast.training.image_codec import psnr

COLUMNS = (
    "image",
    "height",
    "width",
    "bpp",
    "bpp_estimated",
    "psnr",
    "ms_ssim",
    "encode_seconds",
    "decode_seconds",
)
MS_SSIM_LEAST_SIDE = 161  # five scales of an 11-tap window
MEASURED = COLUMNS[3:]


def measure(codec: Any, name: str, pixels) -> dict[str, Any]:
    """A row of COLUMNS of `pixels`, numpy [H, W, 3] uint8, through an ImageCodec or a ClassicCodec."""
    height, width = pixels.shape[:2]
    estimated, _ = codec.estimate(pixels)
    began = time.perf_counter()
    data = codec.encode(pixels)
    encoded = time.perf_counter()
    decoded = codec.decode(data)
    ended = time.perf_counter()
    return {
        "image": name,
        "height": height,
        "width": width,
        "bpp": 8 * len(data) / (height * width),
        "bpp_estimated": estimated,
        "psnr": psnr(pixels, decoded),
        "ms_ssim": _ms_ssim(pixels, decoded),
        "encode_seconds": encoded - began,
        "decode_seconds": ended - encoded,
    }


def _ms_ssim(pixels, decoded) -> float | None:
    if min(pixels.shape[:2]) < MS_SSIM_LEAST_SIDE:
        return None
    pair = [to_tensor(side)[None].to(torch.float64) for side in (pixels, decoded)]
    return optional_import("pytorch_msssim").ms_ssim(*pair, data_range=255.0).item()


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of the measured columns over the images that have them."""
    mean: dict[str, Any] = {"image": "mean", "height": None, "width": None}
    for name in MEASURED:
        values = [row[name] for row in rows if row[name] is not None]
        mean[name] = statistics.fmean(values) if values else None
    return mean


def write_csv(rows: Sequence[dict[str, Any]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """The rows as a CSV file, six digits a number. Raises TrainingError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    atomic_write(path, text.getvalue().encode("utf-8", "surrogateescape"))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells of one width a column, the first column flush left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
