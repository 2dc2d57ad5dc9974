"""The steps of a run's main optimizer: its own, or those of STDET around it, with their log and picture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lic_fast.optim import STDET
from lic_fast.training.config import TrainConfig
from lic_fast.training.files import Log, read_log
from lic_fast.training.plots import plot_embedding

FILE, PICTURE = "stdet.csv", "stdet.png"
COLUMNS = "step epoch true dummy trainable_share state_bytes embedding_bytes host_bytes explained seconds".split()


class Stepping:
    """What the loop calls around a step, whether or not the run embeds weights (`stdet` is None where it does not)."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer, config: TrainConfig) -> None:
        self.optimizer, self._epoch_steps = optimizer, config.stdet_epoch_steps
        self.stdet = build_stdet(model, optimizer, config) if config.stdet else None
        self._log: Log | None = None

    @contextlib.contextmanager
    def opened(self, folder: Path, keep_until: int | None) -> Iterator[None]:
        """Within the block, ends of epochs are written to stdet.csv; see Log."""
        if self.stdet is None:
            yield
            return
        with contextlib.closing(Log(folder / FILE, keep_until, COLUMNS)) as self._log:
            yield
        self._log = None

    def after_backward(self) -> None:
        """Between backward and the norm of the gradients: that of embedded weights is 0."""
        if self.stdet is not None:
            self.stdet.after_backward()

    def step(self) -> None:
        """One update of the main parameters."""
        (self.optimizer if self.stdet is None else self.stdet).step()

    def after_step(self, step: int, epoch_ended: bool) -> None:
        """Ends an epoch of STDET where one is due: with the data's, or every `stdet_epoch_steps` steps."""
        if self.stdet is None or not (epoch_ended if self._epoch_steps is None else step % self._epoch_steps == 0):
            return
        began = time.perf_counter()
        report = self.stdet.epoch_end()
        seconds = time.perf_counter() - began
        if self._log is not None:
            told = (
                step, report.epoch, report.true, report.dummy, report.trainable_share, report.state_bytes,
                report.embedding_bytes, report.host_bytes, report.mean_explained, seconds,
            )  # fmt: skip
            self._log.write(dict(zip(COLUMNS, told, strict=True)))

    def plot(self, folder: Path, title: str) -> None:
        """stdet.png, once the modes are found."""
        if self.stdet is not None and self.stdet.report().embeddable:
            plot_embedding(read_log(folder / FILE), self.stdet, folder / PICTURE, title)

    def summary(self) -> str:
        """The embedding in a line; empty without one."""
        return "" if self.stdet is None else str(self.stdet.report())

    def state_dict(self) -> dict[str, Any] | None:
        """STDET's own state, None without it; the optimizer's is apart."""
        return None if self.stdet is None else self.stdet.state_dict()["stdet"]

    def load_state_dict(self, optimizer: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Takes up the states of the optimizer and of STDET."""
        if self.stdet is None:
            self.optimizer.load_state_dict(optimizer)
        else:
            self.stdet.load_state_dict({"optimizer": optimizer, "stdet": own})


def build_stdet(model: torch.nn.Module, optimizer: Optimizer, config: TrainConfig) -> STDET:
    """STDET as the config says, around its optimizer."""
    rate, most = config.stdet_dummy
    return STDET(
        model, optimizer, warmup_epochs=config.stdet_warmup, embeddable=config.stdet_embeddable,
        true_per_epoch=config.stdet_true, dummy=lambda t: min(rate * t, most), period=config.stdet_period,
        modes=config.stdet_modes, samples=config.stdet_samples, sensitivity=config.stdet_sensitivity,
        dummy_mode=config.stdet_dummy_mode, gradient=config.stdet_gradient, t_origin=config.stdet_origin,
        continuity=config.stdet_continuity, seed=config.seed,
    )  # fmt: skip
