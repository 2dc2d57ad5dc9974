"""What `lic_fast.accelerate` changes of a training: its step, its memory, and with the same noise nothing else.

`lic-fast bench acceleration --data DIR`. One model is trained three times on the photographs in DIR from the same
weights on the same batches, a step of each in turn: CompressAI's layers as they are, accelerated with noise drawn as
CompressAI draws it, and accelerated as `accelerate` leaves it, with noise of its own. The first two are the same
computation rounded differently; training is chaotic, so that their losses part slowly. How fast is measured beside
how fast two trainings with other noise do.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..training import TrainConfig, TrainingError
from ..training.errors import optional_import
from ..training.loop import Trainer
from ..training.models import resolve_device
from ._harness import Timing, collector_off
from ._memory import peak_allocated
from ._rows import RowsError, append, commit, default_output, device_name, now

STOCK, SAME, OWN = "CompressAI", "accelerated, CompressAI's noise", "accelerated"
# model: its sizes, batch, crop; the second and third smaller than published, so that three trainings take minutes
CASES = {
    "mbt2018-mean": ((128, 192), 4, 128),
    "cheng2020-anchor": ((64,), 4, 64),
    "elic2022-official": ((64, 120), 4, 64),
}
COLUMNS = ("model", "channels", "batch_size", "crop", "contender", "photographs", "steps", "device", "threads", "torch")
COLUMNS += ("lic_fast", "commit", "utc", "median_ms", "p20_ms", "p80_ms", "peak_bytes", "first_loss", "last_loss")
COLUMNS += ("parted_10", "parted_all", "parted_last")


class Contender:
    """A training with a generator state of its own, so that another's steps in between change nothing."""

    def __init__(self, name: str, config: TrainConfig) -> None:
        self.name = name
        self.trainer = Trainer(config)
        if name == SAME:
            for module in self.trainer.model.modules():
                if hasattr(module, "noise"):
                    module.noise = "torch"
        self._generators = self._states()
        self._batches: Iterator[Tensor] = self.trainer._batches()
        self.losses: list[float] = []
        self.milliseconds: list[float] = []

    def _states(self) -> tuple[Tensor, Tensor | None]:
        device = self.trainer.device
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _batch(self) -> Tensor:
        try:
            return next(self._batches)
        except StopIteration:  # an epoch's end
            self.trainer.progress.epoch, self.trainer.progress.position = self.trainer.progress.epoch + 1, 0
            self._batches = self.trainer._batches()
            return next(self._batches)

    def step(self) -> None:
        """One step of the training, as `lic-fast train` takes it."""
        cpu, cuda = self._generators
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.trainer.device)
        row = self.trainer._step(self._batch())
        self._generators = self._states()
        self.losses.append(row["loss"])
        self.milliseconds.append(1e3 * row["step_seconds"])

    def peak(self) -> int:
        """Bytes of one more step at its worst moment, beyond weights, gradients and moments."""
        batch = self._batch()
        return peak_allocated(lambda: batch.clone(), self.trainer._step, self.trainer.device)


def parted(losses: Sequence[float], others: Sequence[float]) -> float:
    """The mean of |a - b| / |b| over the steps."""
    return statistics.fmean(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def _compare(model: str, options: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    channels, batch, crop = CASES[model]
    config = TrainConfig(
        model=model, channels=channels, output="", data=options.data, steps=options.steps, batch_size=batch,
        crop=crop, lr=1e-4, seed=options.seed, device=options.device, min_epoch_steps=options.steps,
    )  # fmt: skip
    config.validate()
    entered = [Contender(name, dataclasses.replace(config, accelerate=name != STOCK)) for name in (STOCK, SAME, OWN)]
    with collector_off():
        for turn in optional_import("tqdm").tqdm(range(options.steps), desc=model, unit="step"):
            first = turn % len(entered)  # who comes after whom is no one's advantage
            for contender in entered[first:] + entered[:first]:
                contender.step()
    device, stock = entered[0].trainer.device, entered[0]
    shared = {
        "model": model, "channels": " ".join(map(str, channels)), "batch_size": str(batch), "crop": str(crop),
        "photographs": str(len(stock.trainer.photos)), "steps": str(options.steps), "device": device_name(device),
        "threads": str(torch.get_num_threads()), "torch": torch.__version__, "lic_fast": __version__,
        "commit": commit(), "utc": now(),
    }  # fmt: skip
    rows, lines = [], [f"{model} {channels}, batch {batch}, crop {crop}, {options.steps} steps"]
    for contender in entered:
        own, other = contender.losses, stock.losses
        timing, peak, fifth = Timing.of(contender.milliseconds[2:]), contender.peak(), max(1, options.steps // 5)
        last, last_stock = (statistics.fmean(losses[-fifth:]) for losses in (own, other))
        apart = {
            "parted_10": parted(own[:10], other[:10]),
            "parted_all": parted(own, other),
            "parted_last": abs(last - last_stock) / last_stock,
        }
        values = {
            "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "peak_bytes": peak,
            "first_loss": own[0], "last_loss": last, **apart,
        }  # fmt: skip
        rows.append({**shared, "contender": contender.name, **{name: f"{value:.6g}" for name, value in values.items()}})
        lines.append(
            f"  {contender.name:34}{timing.median:9.1f} ms a step, {peak / 2**20:8.1f} MiB, loss {last:8.4f}; from "
            f"CompressAI's {apart['parted_10']:.1e} (10 steps), {apart['parted_all']:.1e} (all), the last fifth's "
            f"mean {apart['parted_last']:.1e}"
        )
    return rows, "\n".join(lines)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lic-fast bench acceleration", description="Training with and without lic_fast.accelerate."
    )
    parser.add_argument("--data", metavar="DIR", help="folder of photographs (default: those inside scikit-image)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch has")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    options = parser.parse_args(argv)
    if options.steps < 10:
        parser.error(f"--steps must be at least 10, got {options.steps}")
    options.output = options.output or default_output()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, appends to acceleration.csv; returns the exit code."""
    options = _options(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        resolve_device(options.device, "acceleration")
        for model in options.models:
            rows, text = _compare(model, options)
            append(options.output / "acceleration.csv", rows, COLUMNS)
            print(text, end="\n\n", flush=True)
    except (TrainingError, ValueError, ImportError, RowsError, OSError) as error:
        print(f"acceleration: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"rows: {options.output / 'acceleration.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
