"""Steps to a loss: at which step SOAP has the rate-distortion loss that a tuned Adam ends with.

`python -m lic_fast.benchmarks.convergence --data DIR` or `lic-fast bench convergence --data DIR`. The demo's model is
trained on the photographs in DIR with each method, first at every learning rate of a grid with the first seed, then
at the best of them with every seed. The learning rate is constant, and everything but the optimizer is alike: weights,
batches, noise, layers (CompressAI's), clipping, no weight decay. The loss is measured at fixed intervals on photographs
held out of the training, always on the same crops, and smoothed by a trailing mean of three. What convergence.csv
already holds is not trained again, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lic_fast import __version__, explain
from lic_fast.training import TrainConfig, TrainingError
from lic_fast.training.data import open_run
from lic_fast.training.errors import optional_import
from lic_fast.training.loop import Trainer
from lic_fast.training.models import resolve_device

from ._rows import RowsError, append, commit, default_output, device_name, now, read
from .demo import BATCH, CHANNELS, CROP, MODEL

METHODS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "soap": {"optimizer": "soap"},
    "adam-sma": {"optimizer": "adam", "sma": True},
    "soap-sma": {"optimizer": "soap", "sma": True},
    "adam-stdet-sma": {"optimizer": "adam", "stdet": True, "sma": True},
    "soap-stdet-sma": {"optimizer": "soap", "stdet": True, "sma": True},
}
LRS = {"adam": (3e-4, 1e-3, 3e-3), "soap": (1e-3, 3e-3, 1e-2)}
SMOOTH = 3
# A run is known by these: their losses and their seconds compare with each other.
KEY = ("method", "lr", "seed", "steps", "every", "model", "channels", "crop", "batch_size", "lmbda", "photographs")
KEY += ("backend", "device", "threads", "torch", "lic_fast")
COLUMNS = (*KEY, "commit", "utc", "held_out", "step", "loss", "seconds", "optimizer_seconds", "skipped")


class Curve(NamedTuple):
    """Held-out loss over the steps of one run, smoothed, and the seconds spent in steps until then."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]

    @staticmethod
    def of(rows: Sequence[dict[str, str]]) -> Curve:
        raw = [float(row["loss"]) for row in rows]
        smooth = [statistics.fmean(raw[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(raw))]
        return Curve([int(row["step"]) for row in rows], smooth, [float(row["seconds"]) for row in rows])

    @property
    def final(self) -> float:
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf

    def reaches(self, loss: float) -> int | None:
        """The place of the first measurement at or below `loss`."""
        return next((i for i, value in enumerate(self.losses) if value <= loss), None)


class Bench:
    """The runs of convergence.csv, and those that are missing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.output / "convergence.csv"
        photos, held_out, _ = open_run(self._config(options.methods[0], 1e-3, 0))
        if held_out is None:
            raise TrainingError("too few photographs to hold some out; give a --data of at least 10")
        self.photographs = photos.fingerprint()[:8] + held_out.fingerprint()[:8]
        self.rows: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in read(self.path, COLUMNS) if self.path.is_file() else []:
            self.rows.setdefault(tuple(row[name] for name in KEY), []).append(row)
        self.curves: dict[tuple[str, float, int], Curve] = {}

    def curve(self, method: str, lr: float, seed: int) -> Curve:
        """The curve of one run, from the file or trained now."""
        if (method, lr, seed) not in self.curves:
            key = self._key(method, lr, seed)
            rows = self.rows.get(tuple(key.values()), [])
            if len(rows) != self.options.steps // self.options.every:  # appended in one piece
                rows = self._train(Trainer(self._config(method, lr, seed)), key)
                append(self.path, rows, COLUMNS)
            self.curves[method, lr, seed] = curve = Curve.of(rows)
            print(f"{method:14} lr {lr:<7g} seed {seed}: {curve.final:8.4f} in {curve.seconds[-1]:.0f} s", flush=True)
        return self.curves[method, lr, seed]

    def _config(self, method: str, lr: float, seed: int) -> TrainConfig:
        config = TrainConfig(
            model=MODEL, channels=CHANNELS, output="", data=self.options.data, steps=self.options.steps, crop=CROP,
            batch_size=BATCH, lr=lr, seed=seed, device=self.options.device, accelerate=False, **METHODS[method],
            **self._schedule(method),
        )  # fmt: skip
        config.validate()
        return config

    def _schedule(self, method: str) -> dict[str, Any]:
        """STDET's schedule of 70 epochs, scaled to as many as there are measurements: each is an epoch of its own.

        The warm-up takes 2/7 of them, what is embedded for good grows evenly to 50 % from there on, and dummies grow
        by as much over the whole training as in the paper, to 25 %.
        """
        if not METHODS[method].get("stdet"):
            return {}
        epochs = self.options.steps // self.options.every
        warmup = max(2, round(epochs * 20 / 70))
        return {
            "stdet_epoch_steps": self.options.every, "stdet_warmup": warmup,
            "stdet_true": 0.5 / max(1, epochs - warmup), "stdet_dummy": (0.02 * 70 / epochs, 0.25),
        }  # fmt: skip

    def _key(self, method: str, lr: float, seed: int) -> dict[str, str]:
        config = self._config(method, lr, seed)
        device = resolve_device(config.device, "convergence")
        ops = ("soap_update_", "stdet_adam_step_", "sma_update_")
        ops = [op for op in ops if op.partition("_")[0] in method.split("-")]
        values = (
            method, f"{lr:g}", seed, self.options.steps, self.options.every, MODEL, " ".join(map(str, CHANNELS)), CROP,
            BATCH, f"{config.lmbda:g}", self.photographs,
            " ".join(str(explain(op, device).chosen) for op in ops), device_name(device), torch.get_num_threads(),
            torch.__version__, __version__,
        )  # fmt: skip
        return dict(zip(KEY, map(str, values), strict=True))

    def _train(self, trainer: Trainer, key: dict[str, str]) -> list[dict[str, str]]:
        """Rows of one run. From the step on where it is given up, the loss is infinite."""
        rows, seconds, updates = [], 0.0, 0.0
        shared = {**key, "commit": commit(), "utc": now(), "held_out": str(len(trainer.held_out))}
        batches = trainer._batches()
        for step in range(1, self.options.steps + 1):
            if trainer.progress.skipped_in_a_row < trainer.config.max_nonfinite:
                row = trainer._step(next(batches))
                began = time.perf_counter()
                trainer.stepping.after_step(step, epoch_ended=False)
                ending = time.perf_counter() - began
                seconds += row["step_seconds"] + ending
                updates += row["optimizer_seconds"] + ending
            if step % self.options.every == 0:
                given_up = trainer.progress.skipped_in_a_row >= trainer.config.max_nonfinite
                loss = math.inf if given_up else trainer._validation_loss()
                measured = {
                    "step": str(step), "loss": f"{loss:.6g}", "seconds": f"{seconds:.2f}",
                    "optimizer_seconds": f"{updates:.2f}", "skipped": str(trainer.progress.skipped),
                }  # fmt: skip
                rows.append({**shared, **measured})
        return rows

    def best(self, method: str) -> float:
        """The learning rate of the grid with the least final loss; says so where the grid ought to go on."""
        finals = {lr: self.curve(method, lr, self.options.seeds[0]).final for lr in sorted(self.options.lrs[method])}
        best = min(finals, key=lambda lr: finals[lr])
        edge = len(finals) > 1 and best in (min(finals), max(finals))
        print(f"{method}: best at lr {best:g}" + (", the end of its grid: widen it with --lrs" if edge else ""))
        return best


def _table(curves: dict[str, list[Curve]], seeds: Sequence[int], first: str) -> str:
    """For every seed: the loss that `first` ends with, and where each method reached it."""
    lines = [("seed", f"{first}'s final loss", *(f"{name}: step (of {first}'s), s" for name in curves))]
    shares: dict[str, list[float]] = {name: [] for name in curves}
    for i, seed in enumerate(seeds):
        base = curves[first][i]
        cells = []
        for name, of_seeds in curves.items():
            place = of_seeds[i].reaches(base.final)
            share = math.inf if place is None else of_seeds[i].steps[place] / base.steps[-1]
            shares[name].append(share)
            if place is None:
                cells.append("not reached")
            else:
                cells.append(f"{of_seeds[i].steps[place]} ({share:.0%}), {of_seeds[i].seconds[place]:.1f}")
        lines.append((str(seed), f"{base.final:.4f}", *cells))
    spread = (
        f"{statistics.fmean(s):.0%} ({min(s):.0%} to {max(s):.0%})" if math.isfinite(max(s)) else "not by every seed"
        for s in shares.values()
    )
    lines.append(("mean", f"{statistics.fmean(curve.final for curve in curves[first]):.4f}", *spread))
    finals = (f"{statistics.fmean(curve.final for curve in of_seeds):.4f}" for of_seeds in curves.values())
    lines.append(("", "own final loss, mean", *finals))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _plot(curves: dict[str, list[Curve]], names: dict[str, str], first: str, path: Path) -> None:
    figure = optional_import("matplotlib.figure").Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, of_seeds in curves.items():
        steps = of_seeds[0].steps
        losses = list(zip(*(curve.losses for curve in of_seeds), strict=True))
        seconds = [statistics.fmean(at) for at in zip(*(curve.seconds for curve in of_seeds), strict=True)]
        for axis, x in zip(axes, (steps, seconds), strict=True):
            (line,) = axis.plot(x, [statistics.fmean(at) for at in losses], label=names[name], linewidth=1.6)
            axis.fill_between(
                x, [min(at) for at in losses], [max(at) for at in losses], color=line.get_color(), alpha=0.2
            )
    target = statistics.fmean(curve.final for curve in curves[first])
    for axis, label in zip(axes, ("step", "seconds in steps"), strict=True):
        axis.axhline(target, color="#555555", linewidth=0.8, linestyle="--")
        axis.set(xlabel=label, yscale="log")
        axis.grid(alpha=0.25, which="both", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out R-D loss, mean and spread")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{MODEL} {CHANNELS}, batch {BATCH}, crop {CROP}, {len(curves[first])} seeds", fontsize=10)
    figure.savefig(path, dpi=130)


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    method, _, values = text.partition("=")
    try:
        rates = tuple(float(value) for value in values.split(","))
    except ValueError:
        rates = ()
    if method not in METHODS or not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError(f"not METHOD=LR,..., got {text!r}; pass for example soap=1e-3,3e-3")
    return method, rates


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lic-fast bench convergence", description="Steps to Adam's final loss.")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of photographs; a tenth is held out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["adam", "soap"], help="the first is the mark")
    parser.add_argument("--lrs", nargs="+", type=_grid, default=[], metavar="METHOD=LR,LR", help="another grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, metavar="N")
    parser.add_argument("--every", type=int, default=25, metavar="N", help="steps between two measurements")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    options = parser.parse_args(argv)
    if not 1 <= options.every <= options.steps:
        parser.error(f"--every must be between 1 and --steps, got {options.every}")
    options.lrs = {name: LRS[name.split("-")[0]] for name in options.methods} | dict(options.lrs)
    options.output = options.output or default_output()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table and draws convergence.png; returns the exit code."""
    options = _options(argv)
    try:
        bench = Bench(options)
        chosen = {method: bench.best(method) for method in options.methods}
        curves = {name: [bench.curve(name, lr, seed) for seed in options.seeds] for name, lr in chosen.items()}
        picture = options.output / "convergence.png"
        _plot(curves, {name: f"{name}, lr {lr:g}" for name, lr in chosen.items()}, options.methods[0], picture)
    except (TrainingError, ValueError, ImportError, RowsError, OSError) as error:
        print(f"convergence: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"\n{_table(curves, options.seeds, options.methods[0])}\n\nrows: {bench.path}\nplot: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
