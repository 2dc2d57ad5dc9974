"""Rate and quality of a checkpoint on photographs, from real files' bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lic_fast.training.data import open_photos
from lic_fast.training.errors import TrainingError, optional_import
from lic_fast.training.files import make_folder
from lic_fast.training.image_codec import ImageCodec
from lic_fast.training.measure import MEASURED, MS_SSIM_LEAST_SIDE, aligned, mean_row, measure, write_csv
from lic_fast.training.plots import plot_evaluation

_logger = logging.getLogger("lic_fast.training")


def evaluate(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    output: str | Path | None = None,
    device: str = "auto",
    sma: bool = True,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Code and decode every photograph under `folder`; write results.csv and plot.png; return a row an image.

    bpp counts the bytes of the container, bpp_estimated comes from the likelihoods; psnr [dB] and ms_ssim
    compare the 8-bit pictures; ms_ssim is None below 161 pixels a side. `limit` takes the first so many by
    name. `output` is by default the folder evaluate beside the checkpoint. `sma` False takes the fast weights
    of an --sma run. Raises TrainingError, ValueError, ImportError.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: limit is out of range, got {limit}; --limit takes at least 1")
    for name in ("matplotlib", "pytorch_msssim"):
        optional_import(name)
    codec = ImageCodec(checkpoint, device=device, slow=None if sma else False, command="evaluate")
    photos = open_photos(str(folder), "evaluate", limit=limit, cached=False)
    if photos.warning():
        _logger.warning("evaluate: %s", photos.warning())
    target = Path(checkpoint).parent / "evaluate" if output is None else Path(output)
    make_folder(target)
    rows = [measure(codec, name, photos.read(index)) for index, name in enumerate(photos.names)]
    write_csv([*rows, mean_row(rows)], target / "results.csv")
    weights = ", slow weights" if codec.slow else ""
    mean = mean_row(rows)
    points = [(row["bpp"], row["psnr"]) for row in rows if math.isfinite(row["psnr"])]
    if points:
        title = f"{codec.config.model}, lambda {codec.config.lmbda:g}{weights}"
        plot_evaluation(points, (mean["bpp"], mean["psnr"]), target / "plot.png", title)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows and their mean as aligned text, with a note where ms_ssim is blank."""
    heads = ("image", "size", "bpp", "bpp est.", "PSNR dB", "MS-SSIM", "enc s", "dec s")
    formats = ("{:.4f}", "{:.4f}", "{:.2f}", "{:.5f}", "{:.3f}", "{:.3f}")
    lines: list[Sequence[str]] = [heads]
    for row in [*rows, mean_row(rows)]:
        size = "" if row["height"] is None else f"{row['width']}x{row['height']}"
        cells = ("" if row[n] is None else f.format(row[n]) for n, f in zip(MEASURED, formats, strict=True))
        lines.append((row["image"], size, *cells))
    text = aligned(lines)
    text.insert(1, "-" * max(map(len, text)))
    text.insert(-1, text[1])
    if any(row["ms_ssim"] is None for row in rows):
        text.append(f"MS-SSIM is blank below {MS_SSIM_LEAST_SIDE} pixels a side.")
    return "\n".join(text)


def read_stream(path: Path) -> bytes:
    """The bytes of the file `path`. Raises TrainingError where there are none."""
    if not path.is_file():
        raise TrainingError(f"decompress: no such file, got {path}; give a .licf file")
    return path.read_bytes()
