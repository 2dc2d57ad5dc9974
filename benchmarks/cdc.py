"""CDC: rate, distortion and perception by the sampler's steps; and seconds of decoding beside a textbook's code.

`lic-fast bench cdc --checkpoint run/checkpoint.pt --data PHOTOS`. Every photograph is coded to a real file for each
number of steps and each deviation of the first noise, and decoded again: bytes, PSNR, MS-SSIM, LPIPS where its package
and weights are at hand, sliced Wasserstein distances of patches, and how much fine detail there is. Then a decode of
one image, interleaved with the same networks written in PyTorch's own operations. Rows go to cdc.csv, the plot of steps
against quality to cdc.png; a grid of pictures goes to --pictures, since photographs are their owners'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..codec import CDC, CDC_NAMES, BitstreamError
from ..training import ImageCodec, TrainingError
from ..training.data import open_photos
from ..training.errors import optional_import
from ..training.files import make_folder
from ..training.image_codec import psnr
from ..training.measure import _ms_ssim
from ..training.plots import _figure, _style, _write
from ._cdc_perception import detail, lpips_of, sliced_wasserstein, why_no_lpips
from ._cdc_textbook import TextbookUNet, textbook_sample
from ._harness import OURS, Timing, collector_off
from ._rows import RowsError, append, commit, default_output, device_name, now, read

PHASES = ("quality", "decode")
_DISTANCES = ("swd_fine", "swd_middle", "swd_coarse")
MEASURES = ("bpp", "psnr", "ms_ssim", "lpips", *_DISTANCES, "detail")
COLUMNS = ("kind", "model", "channels", "weights", "lmbda", "trained_steps", "image", "height", "width")
COLUMNS += ("sampling_steps", "gamma", "eta", "seed", "bytes", *MEASURES, "backend", "median_ms", "p20_ms", "p80_ms")
COLUMNS += ("repeats", "difference", "device", "threads", "torch", "lic_fast", "commit", "utc")
_PANELS = {
    "psnr": "PSNR [dB]", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "swd_fine": "distance of fine patches",
    "swd_coarse": "distance of coarse patches", "detail": "detail beside the original",
}  # fmt: skip
_ALLOWED = 1e-3  # between the textbook's image and ours, in [-1, 1]: fp32 over the steps


class WrongError(RuntimeError):
    """Two ways of decoding that give two images."""


def _row(kind: str, device: torch.device, **cells: object) -> dict[str, str]:
    shared = {
        "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "lic_fast": __version__, "commit": commit(), "utc": now(),
    }  # fmt: skip
    return {
        name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
        for name, value in {"kind": kind, **cells, **shared}.items()
    }


def _middle(pixels: Any, side: int | None) -> Any:
    if side is None:
        return pixels
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def quality(codec: ImageCodec, options: argparse.Namespace) -> list[dict[str, str]]:
    """A row a photograph, number of steps and gamma; draws the grid. Raises what coding does."""
    photos = open_photos(options.data, "cdc", limit=options.limit, cached=False)
    made, grid = [], []
    model = {
        "model": codec.config.model, "channels": " ".join(map(str, codec.config.channels or ())),
        "weights": codec.digest.hex()[:12], "lmbda": codec.config.lmbda, "trained_steps": options.trained_steps,
    }  # fmt: skip
    for index, name in enumerate(photos.names):
        pixels = _middle(photos.read(index), options.crop)
        height, width = pixels.shape[:2]
        shown = [pixels]
        for gamma in options.gammas:
            for steps in options.sampling_steps:
                settings = {"steps": steps, "gamma": gamma, "eta": options.eta, "seed": options.seed}
                codec.sampled_by(**settings)
                data = codec.encode(pixels)
                decoded = codec.decode(data)
                if gamma == options.gammas[0]:
                    shown.append(decoded)
                found = {
                    "bpp": 8 * len(data) / (height * width), "psnr": psnr(pixels, decoded),
                    "ms_ssim": _ms_ssim(pixels, decoded), "lpips": lpips_of(pixels, decoded),
                    "detail": detail(pixels, decoded),
                    **dict(zip(_DISTANCES, sliced_wasserstein(pixels, decoded), strict=True)),
                }  # fmt: skip
                settings["sampling_steps"] = settings.pop("steps")
                size = {"image": name, "height": height, "width": width, "bytes": len(data)}
                made.append(_row("quality", codec.device, **model, **size, **settings, **found))
                append(options.output / "cdc.csv", made[-1:], COLUMNS)
        grid.append(shown)
        print(f"{name}: done", flush=True)
    titles = ["original", *(f"{steps} steps" for steps in options.sampling_steps)]
    draw_pictures(grid, titles, options.pictures / "cdc_pictures.png")
    return made


def means(rows: Sequence[dict[str, str]]) -> dict[tuple[float, int], dict[str, float | None]]:
    """The measures by (gamma, steps), over the images that have them."""
    groups: dict[tuple[float, int], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((float(row["gamma"]), int(row["sampling_steps"])), []).append(row)
    found: dict[tuple[float, int], dict[str, float | None]] = {}
    for key, group in groups.items():
        cells = {name: [float(row[name]) for row in group if row[name]] for name in MEASURES}
        found[key] = {name: statistics.fmean(values) if values else None for name, values in cells.items()}
    return found


def table(rows: Sequence[dict[str, str]]) -> str:
    """The means over the photographs, in Markdown."""
    heads = ("gamma", "steps", "bpp", "PSNR [dB]", "MS-SSIM", "LPIPS", "fine", "middle", "coarse", "detail")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    formats = ("{:.4f}", "{:.2f}", "{:.4f}", "{:.4f}", "{:.1f}", "{:.1f}", "{:.1f}", "{:.3f}")
    for (gamma, steps), each in sorted(means(rows).items()):
        cells = ["" if each[n] is None else f.format(each[n]) for n, f in zip(MEASURES, formats, strict=True)]
        lines.append(f"| {gamma:g} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Quality against steps, a curve a gamma. Raises TrainingError (disk), ImportError."""
    found = means(rows)
    names = [name for name in _PANELS if any(each[name] is not None for each in found.values())]
    figure = _figure(3.2 * len(names), 3.4)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for gamma in sorted({gamma for gamma, _ in found}, reverse=True):
            points = [(steps, each[name]) for (own, steps), each in sorted(found.items()) if own == gamma]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=f"gamma {gamma:g}")
        axis.set(xlabel="steps", ylabel=_PANELS[name], xscale="log")
        _style(axis)
    axes[0].legend(frameon=False, fontsize=8)
    row, images = rows[0], len({row["image"] for row in rows})
    bpp = statistics.fmean(float(row["bpp"]) for row in rows)
    trained = f", trained for {row['trained_steps']} steps" if row["trained_steps"] else ""
    figure.suptitle(
        f"{row['model']} {row['channels']}, lambda {row['lmbda']}{trained}: {images} images, {bpp:.3f} bpp", fontsize=10
    )
    _write(figure, path)


def draw_pictures(grid: Sequence[Sequence[Any]], titles: Sequence[str], path: Path) -> None:
    """Photographs as rows, the original first. Raises TrainingError (disk), ImportError."""
    make_folder(path.parent)
    figure = _figure(1.8 * len(titles), 1.8 * len(grid) + 0.3)
    axes = figure.subplots(len(grid), len(titles), squeeze=False)
    for line, pictures in zip(axes, grid, strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    _write(figure, path)


def _contenders(codec: CDC, y_hat: Tensor, steps: int, compiled: bool) -> dict[str, Any]:
    start = codec._noise(y_hat.new_zeros((1, 3, *(16 * side for side in y_hat.shape[2:]))), 0, 0, codec.gamma)
    plain = TextbookUNet(codec.denoiser)
    runs = {
        OURS + "CDC.sample": lambda: codec.sample(y_hat, steps=steps, eta=0.0, tile=0),
        "textbook eager": lambda: textbook_sample(codec, plain, y_hat, start, steps),
    }
    if y_hat.is_cuda:
        runs[OURS + "CDC.sample, no graph"] = lambda: _without_graph(codec, runs[OURS + "CDC.sample"])
    if compiled:
        fast = torch.compile(plain)
        runs["textbook torch.compile"] = lambda: textbook_sample(codec, fast, y_hat, start, steps)
    return runs


def _without_graph(codec: CDC, run: Any) -> Tensor:
    codec.cuda_graph = False
    try:
        return run()
    finally:
        codec.cuda_graph = True


def decode_times(
    codec: CDC, y_hat: Tensor, steps: int, repeats: int, compiled: bool
) -> list[tuple[str, Timing, float]]:
    """(who, milliseconds from y_hat to the image, largest difference from ours), all once a round, one round unseen.

    Two rounds unseen on a GPU, where the second is recorded. Raises WrongError where the images differ.
    """
    runs = _contenders(codec, y_hat, steps, compiled)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    off: dict[str, float] = dict.fromkeys(runs, 0.0)
    with collector_off():
        for repeat in range(-2 if y_hat.is_cuda else -1, repeats):
            ours: Tensor | None = None
            for name, run in runs.items():
                began = time.perf_counter()
                image = run()
                if image.is_cuda:
                    torch.cuda.synchronize()
                taken = 1e3 * (time.perf_counter() - began)
                ours = image if ours is None else ours
                off[name] = max(off[name], float((image - ours).abs().max()))
                if not off[name] <= _ALLOWED * max(1.0, float(ours.abs().max())):
                    raise WrongError(f"{name} differs by {off[name]:.3g} from lic_fast's image")
                if repeat >= 0:
                    spent[name].append(taken)
    return [(name, Timing.of(values), off[name]) for name, values in spent.items()]


def decode(codec: CDC, model: str, device: torch.device, options: argparse.Namespace) -> str:
    """Rows of decoding; a table. The latent is random, the time does not depend on it."""
    height, width = options.sides
    generator = torch.Generator().manual_seed(options.seed)
    channels = codec.content.latent_channels
    y_hat = (2 * torch.randn(1, channels, height // 16, width // 16, generator=generator)).round().to(device)
    steps = options.decode_steps
    shared = {"model": model, "channels": codec.sizes.width, "height": height, "width": width}
    shared |= {"sampling_steps": steps, "gamma": codec.gamma, "eta": 0.0, "seed": 0}
    rows, lines = [], [f"{model} of width {codec.sizes.width}, {width}x{height} in {steps} steps, interleaved"]
    for name, timing, off in decode_times(codec, y_hat, steps, options.repeats, options.compile):
        cells = {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "repeats": timing.repeats}
        rows.append(_row("decode", device, backend=name, difference=off, **cells, **shared))
        lines.append(f"  {name:26} {timing.median:10.1f} ms ({timing.p20:.1f} to {timing.p80:.1f}), off {off:.1e}")
    append(options.output / "cdc.csv", rows, COLUMNS)
    return "\n".join(lines)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lic-fast bench cdc", description="CDC: quality by steps, and decoding.")
    parser.add_argument("--checkpoint", help="checkpoint.pt of a cdc model of lic-fast train; needed for quality")
    parser.add_argument("--data", metavar="DIR", help="photographs to code (default: those inside scikit-image)")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="only the first N by name (default: 8)")
    parser.add_argument("--crop", type=int, default=None, metavar="PIXELS", help="only the middle of each")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--sampling-steps", nargs="+", type=int, default=[1, 2, 5, 9, 17, 33, 65], metavar="N")
    parser.add_argument("--gammas", nargs="+", type=float, default=[0.8, 0.0], metavar="G")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=list(CDC_NAMES), default="cdc-x", help="that is timed, with random weights")
    parser.add_argument("--channels", type=int, default=None, metavar="N", help="its width (default: its own)")
    parser.add_argument("--sides", nargs=2, type=int, default=[256, 256], metavar=("H", "W"), help="of the timed image")
    parser.add_argument("--decode-steps", type=int, default=17, metavar="N")
    parser.add_argument("--compile", action="store_true", help="time the textbook through torch.compile, too")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of a timing")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch has")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pictures", type=Path, default=Path("lic_fast_cdc"), help="folder of the grid of pictures")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    options = parser.parse_args(argv)
    if "quality" in options.only and options.checkpoint is None:
        parser.error("quality needs a --checkpoint; or pass --only decode")
    if min(options.limit, options.repeats, options.decode_steps, *options.sampling_steps) < 1:
        parser.error("--limit, --repeats and all steps must be at least 1")
    options.output = options.output or default_output()
    return options


def _run(options: argparse.Namespace) -> None:
    path = options.output / "cdc.csv"
    if "quality" in options.only:
        optional_import("matplotlib")
        codec = ImageCodec(options.checkpoint, device=options.device, command="cdc")
        options.trained_steps = _trained_steps(Path(options.checkpoint))
        made = quality(codec, options)
        draw(made, options.output / "cdc.png")
        print(table(made))
        print(f"LPIPS is missing: {why_no_lpips()}" if why_no_lpips() else "LPIPS: AlexNet's")
        print(f"plot: {options.output / 'cdc.png'}\npictures: {options.pictures / 'cdc_pictures.png'}")
    if "decode" in options.only:
        torch.manual_seed(options.seed)
        device = torch.device(options.device)
        model = CDC.from_name(options.model, options.channels).eval().to(device)
        print(decode(model, options.model, device, options))
    read(path, COLUMNS)
    print(f"rows: {path}")


def _trained_steps(checkpoint: Path) -> int | None:
    from ..training.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint, "cdc").get("progress", {}).get("step")


def main(argv: Sequence[str] | None = None) -> int:
    """Codes, samples, times; prints, appends to cdc.csv, draws; returns 0, or 2 for errors."""
    options = _options(argv)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or threads)
        _run(options)
    except (TrainingError, BitstreamError, WrongError, ValueError, ImportError, RowsError, OSError) as error:
        print(f"cdc: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
