"""The README's first command: one small model trained twice on photographs, then one photograph to a file and back.

`python -m lic_fast.benchmarks.demo [--data DIR] [--steps N] [--output DIR]`. The stock loop is CompressAI's layers
and PyTorch's Adam; the fast path is what lic_fast has for the same loop. Each run has a process of its own, so that
its memory is its own.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import lic_fast
from lic_fast import cli
from lic_fast.training import TrainConfig, TrainingError, TrainResult, train
from lic_fast.training.files import read_log

MODEL, CHANNELS, CROP, BATCH = "mbt2018-mean", (32, 48), 128, 8
STOCK = {"optimizer": "adam", "accelerate": False}
FAST = {"optimizer": "soap", "sma": True}
LRS = {"stock": 1e-3, "fast": 3e-3}
OPTIMIZER_OPS = ["soap_update_", "adam_update_", "refresh_eigenbasis", "rotate_moments_", "sma_update_"]
OPS = {"fast": [*OPTIMIZER_OPS, "mixture_rate", "factorized_rate", "gdn"]}


def _run(config: TrainConfig) -> TrainResult:
    """In a fresh process: its peak memory is that of this run."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, config).result()


def _photograph(data: str | None) -> Path:
    if data is None:
        import skimage

        return Path(skimage.data_dir) / "astronaut.png"
    from lic_fast.training.data import open_photos

    return Path(open_photos(data, "demo").paths[0])


class Curve(NamedTuple):
    """Of the steps of a run that were taken: their number, the mean loss of the last tenth of the run, seconds."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]
    window: int

    @staticmethod
    def of(folder: Path) -> Curve:
        rows = [row for row in read_log(folder / "log.csv") if row["skipped"] == "0"]
        losses, window = [float(row["loss"]) for row in rows], max(1, len(rows) // 10)
        means = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        seconds = list(itertools.accumulate(float(row["step_seconds"]) for row in rows))
        return Curve([int(row["step"]) for row in rows], means, seconds, window)

    def reaches(self, loss: float) -> str:
        """Step and seconds of the first mean at or below `loss`."""
        found = zip(self.steps, self.losses, self.seconds, strict=True)
        return next((f"{step}, {seconds:.1f} s" for step, mean, seconds in found if mean <= loss), "never")


def _plot(curves: dict[str, Curve], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, curve in curves.items():
        for axis, x in zip(axes, (curve.steps, curve.seconds), strict=True):
            axis.plot(x, curve.losses, label=name)
    window = curves["stock"].window
    for axis, label in zip(axes, ("step", "seconds in steps"), strict=True):
        axis.set(xlabel=label, ylabel=f"R-D loss, mean of {window} steps", yscale="log")
        axis.grid(alpha=0.25, which="both", linewidth=0.6)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _table(results: dict[str, TrainResult], curves: dict[str, Curve]) -> str:
    def ops(name: str) -> str:
        chosen = collections.Counter(lic_fast.explain(op).chosen for op in OPS.get(name, []))
        return ", ".join(f"{backend} ({count} ops)" for backend, count in chosen.items()) or "PyTorch only"

    lines = [
        ("", *results),
        ("final R-D loss", *(f"{r.final_loss:.4f}" for r in results.values())),
        ("stock's, reached at step", *(curves[name].reaches(curves["stock"].losses[-1]) for name in results)),
        ("final bpp", *(f"{r.final_bpp:.4f}" for r in results.values())),
        ("final PSNR [dB]", *(f"{r.final_psnr:.2f}" for r in results.values())),
        ("step [ms, median]", *(f"{1e3 * r.step_seconds:.1f}" for r in results.values())),
        ("optimizer [ms, median]", *(f"{1e3 * r.optimizer_seconds:.2f}" for r in results.values())),
        ("peak memory [MiB]", *(f"{(r.peak_memory_bytes or 0) / 2**20:.0f}" for r in results.values())),
        ("backends", *(ops(name) for name in results)),
    ]
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lic_fast demo", description="Stock loop against fast path, small.")
    parser.add_argument("--data", metavar="DIR", help="folder of photographs (default: those inside scikit-image)")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--output", default="demo", metavar="DIR")
    args = parser.parse_args(argv)
    output = Path(args.output)
    results = {}
    for name, options in (("stock", STOCK), ("fast", FAST)):
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n{name}: {MODEL} {CHANNELS}, {args.steps} steps, lr {LRS[name]:g}, {options}", flush=True)
        config = TrainConfig(
            model=MODEL, channels=CHANNELS, output=str(folder), data=args.data, steps=args.steps, crop=CROP,
            batch_size=BATCH, lr=LRS[name], min_epoch_steps=args.steps, **options,
        )  # fmt: skip
        try:
            results[name] = _run(config)
        except (TrainingError, ValueError, ImportError) as error:
            print(f"demo: error: {error}", file=sys.stderr)
            return 2
    curves = {name: Curve.of(output / name) for name in results}
    print(f"\n{_table(results, curves)}\n")
    plot = output / "loss.png"
    _plot(curves, plot, f"{MODEL} {CHANNELS}, batch {BATCH}, crop {CROP}")
    print(f"plot: {plot}")
    checkpoint, stream = str(output / "fast" / "checkpoint.pt"), str(output / "photograph.licf")
    codes = [
        cli.main(["compress", checkpoint, str(_photograph(args.data)), stream]),
        cli.main(["decompress", checkpoint, stream, str(output / "photograph.png")]),
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
