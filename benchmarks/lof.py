"""What overfitting the latent gains: rate-distortion cost, bytes and PSNR of photographs before and after.

`lic-fast bench lof --checkpoint run/checkpoint.pt --data DIR`. Every photograph is coded twice with the
checkpoint, as `lic-fast compress` does it and after a search by `lic_fast.codec.overfit`, to real bytes that are
decoded again. A result has no row where the decoder's picture is not the one that the encoder promised.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..codec import BitstreamError, Overfit
from ..training import ImageCodec, TrainingError
from ..training.data import open_photos
from ..training.image_codec import psnr
from ..training.plots import _figure, _style, _write
from ._rows import RowsError, append, commit, default_output, device_name, now

COLUMNS = ("image", "height", "width", "model", "channels", "weights", "lmbda", "seconds_budget", "iterations_budget")
COLUMNS += ("device", "threads", "torch", "lic_fast", "commit", "utc", "steps", "seconds", "bytes", "bytes_before")
COLUMNS += ("psnr", "psnr_before", "bpp_estimated", "bpp_estimated_before", "cost", "cost_before", "real_cost")
COLUMNS += ("real_cost_before",)


class WrongError(RuntimeError):
    """A stream that does not decode to what was promised."""


def _coded(codec: ImageCodec, pixels: Any, lmbda: float, y: torch.Tensor | None) -> dict[str, float]:
    """Bytes, PSNR of the 8-bit pictures and cost by both. Raises WrongError."""
    data = codec.encode(pixels, y)
    got, (bpp, promised) = psnr(pixels, codec.decode(data)), codec.estimate(pixels, y)
    if not math.isclose(got, promised, rel_tol=1e-12):
        raise WrongError(f"decoded to {got:.6f} dB, promised {promised:.6f} dB")
    height, width = pixels.shape[:2]
    cost = 8 * len(data) / (height * width) + lmbda * 255**2 / 10 ** (got / 10)
    return {"bytes": len(data), "psnr": got, "bpp_estimated": bpp, "real_cost": cost}


def _row(codec: ImageCodec, pixels: Any, options: argparse.Namespace) -> tuple[dict[str, str], Overfit]:
    lmbda = codec.config.lmbda if options.lmbda is None else options.lmbda
    found = codec.overfit(
        pixels, lmbda=lmbda, seconds=options.seconds, iterations=options.iterations, progress=not options.quiet
    )
    before, after = (_coded(codec, pixels, lmbda, y) for y in (None, found.y))
    values = {
        "height": pixels.shape[0], "width": pixels.shape[1], "model": codec.config.model,
        "channels": " ".join(map(str, codec.config.channels or ())), "weights": codec.digest.hex()[:12],
        "lmbda": f"{lmbda:g}", "seconds_budget": options.seconds or "", "iterations_budget": options.iterations or "",
        "device": device_name(codec.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "lic_fast": __version__, "commit": commit(), "utc": now(), "steps": found.steps,
        "seconds": f"{found.seconds:.2f}", "cost": f"{found.after.loss:.6g}", "cost_before": f"{found.before.loss:.6g}",
    }  # fmt: skip
    values |= {name: f"{value:.6g}" for name, value in after.items()}
    values |= {f"{name}_before": f"{value:.6g}" for name, value in before.items()}
    return {name: str(value) for name, value in values.items()}, found


def _change(row: dict[str, str], name: str = "real_cost") -> float:
    """By how many percent a figure of a row changed."""
    return 100 * (float(row[name]) / float(row[f"{name}_before"]) - 1)


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows and their means, as a table in Markdown."""
    lines = ["| image | bytes | PSNR [dB] | real cost | change | steps |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        values = {name: float(row[name]) for name in COLUMNS[COLUMNS.index("bytes") :]}
        lines.append(
            f"| {row['image']} | {values['bytes_before']:.0f} -> {values['bytes']:.0f} | "
            f"{values['psnr_before']:.2f} -> {values['psnr']:.2f} | "
            f"{values['real_cost_before']:.4f} -> {values['real_cost']:.4f} | "
            f"{_change(row):+.1f} % | {row['steps']} |"
        )
    means = {name: statistics.fmean(_change(row, name) for row in rows) for name in ("bytes", "real_cost")}
    gain = statistics.fmean(float(row["psnr"]) - float(row["psnr_before"]) for row in rows)
    lines.append(f"| mean change | {means['bytes']:+.1f} % | {gain:+.2f} | | {means['real_cost']:+.1f} % | |")
    return "\n".join(lines)


def _plot(rows: Sequence[dict[str, str]], found: Sequence[Overfit], path: Path) -> None:
    """Left: the change of the cost over the time of each search; right: at its end."""
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for row, each in zip(rows, found, strict=True):
        times = [*(time for time, _ in each.history), each.seconds]
        costs = [*(cost for _, cost in each.history), each.after.loss]
        changes = [100 * (cost / each.before.loss - 1) for cost in costs]
        left.step(times, changes, where="post", label=Path(row["image"]).stem, linewidth=1.4)
    left.set(xlabel="time [s]", ylabel="change of the cost [%]")
    left.legend(frameon=False, fontsize=7, ncols=2)
    names, changes = [Path(row["image"]).stem for row in rows], [_change(row) for row in rows]
    right.barh(names, changes, color="#1f77b4", height=0.7)
    right.axvline(statistics.fmean(changes), color="#d62728", linewidth=1, linestyle="--", label="mean")
    right.invert_yaxis()
    right.set(xlabel="change of the real cost [%]")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        _style(axis)
    row = rows[0]
    figure.suptitle(f"{row['model']} {row['channels']}, lambda {row['lmbda']}, {row['device']}", fontsize=10)
    _write(figure, path)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lic-fast bench lof", description="What overfitting the latent gains.")
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of an msp model of lic-fast train")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of photographs")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="only the first N by name (default: 8)")
    parser.add_argument("--seconds", type=float, default=None, help="budget of an image (default: 60)")
    parser.add_argument("--iterations", type=int, default=None, help="budget of an image, in steps, instead")
    parser.add_argument("--lmbda", type=float, default=None, help="default: that of the checkpoint")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch has")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    options = parser.parse_args(argv)
    if options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    if options.seconds is None and options.iterations is None:
        options.seconds = 60.0
    options.output = options.output or default_output()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Searches, codes, prints, appends to lof.csv, draws lof.png; returns 0, 1 where a cost rose, 2 for errors."""
    options = _options(argv)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or threads)
        codec = ImageCodec(options.checkpoint, device=options.device, command="lof")
        photos = open_photos(options.data, "lof", limit=options.limit, cached=False)
        rows, searches = [], []
        for index, name in enumerate(photos.names):
            row, found = _row(codec, photos.read(index), options)
            rows.append({"image": name, **row})
            searches.append(found)
            append(options.output / "lof.csv", rows[-1:], COLUMNS)
            print(f"{name}: {_change(rows[-1]):+.2f} %, {found.legs}", flush=True)
        _plot(rows, searches, options.output / "lof.png")
    except (TrainingError, BitstreamError, WrongError, ValueError, ImportError, RowsError, OSError) as error:
        print(f"lof: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print(f"\n{table(rows)}\n\nrows: {options.output / 'lof.csv'}\nplot: {options.output / 'lof.png'}")
    worse = [row["image"] for row in rows if _change(row) > 0]
    if worse:
        print(f"lof: the real cost rose: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
