"""Trainings of the study of MSP: every model with one loop, one budget, one schedule.

A model is trained once at one lambda, its stem, and from there a while at every lambda.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..training import TrainConfig
from ..training.checkpoint import load_checkpoint
from ..training.files import make_folder
from ..training.loop import Trainer
from ..training.models import load_weights
from ..training.report import CHECKPOINT

_LEAST = 0.05  # of the first learning rate is left at the end
_NEVER = 10**9  # epochs that the loop's own scheduler waits


class StudyTrainer(Trainer):
    """The loop of `lic-fast train` with a learning rate that falls by the step and not by the loss.

    Every model then trains under the same schedule; one that waits for a plateau of a noisy loss differs by chance.
    constant: the share of the run before it falls, down a half cosine. start: a checkpoint whose weights come first.
    """

    def __init__(self, config: TrainConfig, constant: float, start: Path | None) -> None:
        super().__init__(config)
        self.constant = constant
        if start is not None:
            load_weights(self.model, load_checkpoint(start, "msp")["model"])

    def _step(self, batch: Any) -> dict[str, Any]:
        share = falling(self.progress.step / self.total_steps, self.constant)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * share
        return super()._step(batch)


def falling(done: float, constant: float) -> float:
    """The share of the first learning rate where the share `done` of the run is behind."""
    along = min(max((done - constant) / (1 - constant), 0.0), 1.0)
    return 1 - (1 - _LEAST) * (1 - math.cos(math.pi * along)) / 2


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of the study; start: the run whose weights it begins with."""

    config: TrainConfig
    constant: float
    start: Run | None = None

    @property
    def path(self) -> Path:
        return Path(self.config.output) / CHECKPOINT

    def finished(self) -> bool:
        """Whether it is there, to its last step."""
        return self.path.is_file() and load_checkpoint(self.path, "msp")["progress"]["step"] >= self.config.steps

    def train(self) -> None:
        """To the last step, from where it was stopped; what it starts from comes first. Raises what train() does."""
        if self.finished():
            return
        if self.start is not None:
            self.start.train()
        make_folder(Path(self.config.output))
        trainer = StudyTrainer(self.config, self.constant, self.start and self.start.path)
        if self.path.is_file():
            trainer.restore(load_checkpoint(self.path, "msp"))
        trainer.run()


def run_of(model: str, lmbda: float, options: Any) -> Run:
    """The training of one model at one lambda, after its stem."""

    def config(folder: str, **settings: Any) -> TrainConfig:
        made = TrainConfig(
            model=model, output=str(options.runs / folder), data=options.data, optimizer=options.optimizer,
            seed=options.seed, channels=tuple(options.channels), device=options.device, quiet=True,
            patience=_NEVER, **settings,
        )  # fmt: skip
        made.validate()
        return made

    stem = config(
        f"stem/{model}", lmbda=options.lambdas[0], steps=options.steps, batch_size=options.batch_size,
        crop=options.crop, lr=options.lr,
    )  # fmt: skip
    batch_size = max(1, options.batch_size * options.crop**2 // options.tune_crop**2)  # as many pixels
    tuned = config(
        f"{model}-{lmbda:g}", lmbda=lmbda, steps=options.tune_steps, batch_size=batch_size, crop=options.tune_crop,
        lr=options.tune_lr,
    )  # fmt: skip
    return Run(tuned, 0.0, Run(stem, 0.6))
