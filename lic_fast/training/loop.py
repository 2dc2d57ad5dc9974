"""The training loop: a CompressAI model, one loss, two optimizers, and checkpoints that resume exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lic_fast.training.checkpoint import load_checkpoint, save_checkpoint
from lic_fast.training.config import DEFAULT_EPOCHS, TrainConfig, first_difference, from_dict
from lic_fast.training.data import RandomCrops, Schedule, central_crops, open_run
from lic_fast.training.diagnostics import COLUMNS, FILE, PICTURE, Diagnostics
from lic_fast.training.errors import TrainingError, optional_import
from lic_fast.training.files import Log, atomic_write, make_folder, read_log
from lic_fast.training.loss import RateDistortionLoss
from lic_fast.training.models import (
    load_weights,
    model_class,
    prepare_model,
    resolve_channels,
    resolve_device,
    split_parameters,
)
from lic_fast.training.optimizers import build_optimizer, insisted_backend, slow_weights, unwrapped
from lic_fast.training.plots import plot_diagnostics, plot_training
from lic_fast.training.portable import make_portable, without_integers
from lic_fast.training.report import CHECKPOINT, CONFIG, LOG, PLOT, TrainResult, sum_up, versions
from lic_fast.training.stepping import Stepping

_TERMS = ("loss", "bpp", "mse", "psnr", "aux")
_logger = logging.getLogger("lic_fast.training")


@dataclasses.dataclass
class Progress:
    """Where a run stands: `step` batches seen in all (skipped ones too), `position` of them in this epoch."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: float = math.inf
    skipped: int = 0
    skipped_in_a_row: int = 0


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, into the folder `config.output`; go on with the run there if `config.resume`.

    Seeds torch's global generators. Raises ValueError (a setting), TrainingError (data, disk, checkpoint, too
    many steps that are not finite), ImportError (the training extra is missing).
    """
    config.validate()
    model_class(config.model)
    for name in ("matplotlib", "numpy", "tqdm", "PIL"):
        optional_import(name)
    config = dataclasses.replace(config, channels=resolve_channels(config.model, config.channels, config.lmbda))
    output = Path(config.output)
    saved = None
    if config.resume:
        saved = load_checkpoint(output / CHECKPOINT, "train")
        _check_same_run(from_dict(saved["config"]), config)
    else:
        held = [name for name in (CHECKPOINT, LOG, CONFIG) if (output / name).exists()]
        if held:
            raise TrainingError(
                f"train: {output} already holds a run ({held[0]}); go on with --resume or choose another --output"
            )
    with insisted_backend(config):
        return _run(config, saved)


def _run(config: TrainConfig, saved: dict[str, Any] | None) -> TrainResult:
    trainer = Trainer(config)
    if saved is not None:
        trainer.restore(saved)
    try:
        return trainer.run()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"train: the GPU has no memory left at batch size {config.batch_size} and crop {config.crop}; "
            "lower --batch-size or --crop"
        ) from error
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not config.compile or trainer.progress.step > 0:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(f"train: torch.compile failed ({reason}); run without --compile") from error


def resumed_config(output: str, given: dict[str, Any]) -> TrainConfig:
    """The config of the run in folder `output` with the settings in `given` over it. Raises TrainingError."""
    saved = load_checkpoint(Path(output) / CHECKPOINT, "train")["config"]
    if "steps" in given or "epochs" in given:
        saved = {**saved, "steps": None, "epochs": None}
    return from_dict({**saved, "quiet": False, **given, "output": output, "resume": True})


def _check_same_run(saved: TrainConfig, asked: TrainConfig) -> None:
    name = first_difference(saved, asked)
    if name is not None:
        option = "no-accelerate" if name == "accelerate" else name.replace("_", "-")
        raise TrainingError(
            f"train: cannot resume with another {name}: the run has {getattr(saved, name)!r}, "
            f"got {getattr(asked, name)!r}; leave --{option} out, or start a new --output"
        )


class Trainer:
    """One run. `_step` is the whole of the method; the rest feeds it, writes down what it did, and saves."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = resolve_device(config.device, "train")
        self.photos, self.held_out, self.broken = open_run(config)
        self.schedule = Schedule(len(self.photos), config.batch_size, config.min_epoch_steps, config.seed)
        self.total_steps = config.steps or (config.epochs or DEFAULT_EPOCHS) * self.schedule.steps_per_epoch
        torch.manual_seed(config.seed)
        self.model = prepare_model(config, self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.criterion = RateDistortionLoss(config.lmbda)
        main, quantiles = split_parameters(self.model)
        self.names, self.main = {parameter: name for name, parameter in main}, [parameter for _, parameter in main]
        self.optimizer = build_optimizer(self.model, config)
        self.stepping = Stepping(self.model, self.optimizer, config)
        self.aux_optimizer = torch.optim.Adam([parameter for _, parameter in quantiles], lr=config.aux_lr)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=config.lr_factor, patience=config.patience
        )
        self.diagnostics = Diagnostics(self.optimizer, self.main, config.diagnose) if config.diagnose else None
        self.progress = Progress()
        self._saved_step = -1

    def run(self) -> TrainResult:
        """Train to the last step, then save, plot and sum up. Raises TrainingError."""
        started = time.perf_counter()
        resuming = self._saved_step >= 0
        make_folder(self.output)
        if not resuming:
            self._save()
        self._write_config()
        with contextlib.ExitStack() as stack:
            keep = self.progress.step if resuming else None
            logs = [stack.enter_context(contextlib.closing(log)) for log in self._logs(keep)]
            stack.enter_context(self.stepping.opened(self.output, keep))
            bar = stack.enter_context(self._bar())
            batches = self._batches()
            while self.progress.step < self.total_steps:
                asked = time.perf_counter()
                row = self._step(next(batches))
                for log in logs:
                    log.write(row)
                self._show(bar, row, self.config.batch_size / (time.perf_counter() - asked))
                if self.progress.skipped_in_a_row >= self.config.max_nonfinite:
                    self._give_up()
                self._after_step()
        if self._make_portable() or self._saved_step != self.progress.step:
            self._save()
        self._plot()
        seconds = time.perf_counter() - started
        skipped = getattr(unwrapped(self.optimizer), "skipped_steps", 0)
        progress = dataclasses.asdict(self.progress)
        embedding = self.stepping.summary()
        return sum_up(self.config, progress, len(self.broken), self.device, seconds, skipped, embedding)

    def _logs(self, keep: int | None) -> list[Log]:
        scores = [Log(self.output / FILE, keep, COLUMNS)] if self.diagnostics is not None else []
        return [Log(self.output / LOG, keep), *scores]

    def _plot(self) -> None:
        self.stepping.plot(self.output, self.config.title)
        plot_training(read_log(self.output / LOG), self.output / PLOT, self.config.title)
        if self.diagnostics is not None:
            plot_diagnostics({"scores": read_log(self.output / FILE)}, self.output / PICTURE, self.config.title)

    def _step(self, batch: Tensor) -> dict[str, float | int | None]:
        """One update of weights and quantiles; none of either where a term or a gradient is not finite.

        The quantiles follow the auxiliary loss alone: what the main loss sends them is dropped.
        """
        began = time.perf_counter()
        x = self._to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == "bf16"):
            output = self.forward(x)
        terms = self.criterion(output, x, self.model.aux_loss())
        began += self._measure_conflict(terms)
        terms["loss"].backward()
        self.stepping.after_backward()
        self.aux_optimizer.zero_grad(set_to_none=True)
        terms["aux"].backward()
        norm = get_total_norm([p.grad for p in self.main if p.grad is not None])
        values = torch.stack([*(terms[name].detach().float() for name in _TERMS), norm.float()]).tolist()
        row = dict(zip((*_TERMS[:-1], "aux_loss", "grad_norm"), values, strict=True))
        lr = self.optimizer.param_groups[0]["lr"]
        stepping = time.perf_counter()  # tolist() has waited for the device
        bad = [name for name, value in row.items() if name != "psnr" and not math.isfinite(value)]
        if bad:
            self._skip(bad)
        else:
            self._update(norm, row["loss"])
        self._wait()
        ended = time.perf_counter()
        self.progress.step += 1
        self.progress.position += 1
        times = {"step_seconds": ended - began, "optimizer_seconds": ended - stepping}
        place = {"step": self.progress.step, "epoch": self.progress.epoch}
        scores = {} if self.diagnostics is None else self.diagnostics.after_update()
        return {**place, **row, "lr": lr, **times, "skipped": int(bool(bad)), **scores}

    def _measure_conflict(self, terms: dict[str, Tensor]) -> float:
        """The seconds that --diagnose takes of a step before its update, and that are not the step's own."""
        if self.diagnostics is None:
            return 0.0
        self._wait()
        began = time.perf_counter()
        self.diagnostics.before_update(terms["bpp"], terms["distortion"], self.progress.step + 1)
        self._wait()
        return time.perf_counter() - began

    def _update(self, norm: Tensor, loss: float) -> None:
        if self.config.clip > 0:
            clip_grads_with_norm_(self.main, self.config.clip, norm)
        self.stepping.step()
        self.aux_optimizer.step()
        self.progress.loss_sum += loss
        self.progress.loss_count += 1
        self.progress.skipped_in_a_row = 0

    def _skip(self, bad: list[str]) -> None:
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        named = (n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        first = next(named, "none")
        _logger.warning(
            "train: step %d skipped, nothing updated; not finite: %s; first parameter with such a gradient: "
            "%s",
            self.progress.step + 1, ", ".join(bad), first,
        )  # fmt: skip

    def _give_up(self) -> None:
        count, self.progress.skipped_in_a_row = self.progress.skipped_in_a_row, 0
        self._save()
        raise TrainingError(
            f"train: {count} steps in a row were not finite, the last is step {self.progress.step}; "
            f"{self.output / CHECKPOINT} holds the last good state, lower --lr or --clip and start anew"
        )

    def _after_step(self) -> None:
        every = self.config.checkpoint_every
        epoch_ended = self.progress.position == self.schedule.steps_per_epoch
        self.stepping.after_step(self.progress.step, epoch_ended)
        if epoch_ended:
            self._end_epoch()
        elif every is not None and self.progress.step % every == 0:
            self._save()

    def _end_epoch(self) -> None:
        loss = self._validation_loss()
        self.scheduler.step(loss)
        progress = self.progress
        progress.best = min(progress.best, loss)
        progress.epoch, progress.position = progress.epoch + 1, 0
        progress.loss_sum, progress.loss_count = 0.0, 0
        self._save()
        self._plot()

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Mean loss on the centres of the held-out photographs, with rounding instead of noise and the slow
        weights of SMA; where none is held out, the mean training loss of the epoch; infinity if not finite.
        """
        if self.held_out is None:
            return self.progress.loss_sum / self.progress.loss_count if self.progress.loss_count else math.inf
        self.model.eval()
        total = 0.0
        with self._slow_weights():
            for batch in central_crops(self.held_out, self.config.crop, self.config.batch_size):
                x = self._to_device(batch)
                total += self.criterion(self.model(x), x, x.new_zeros(()))["loss"].item() * len(x)
        self.model.train()
        return total / len(self.held_out) if math.isfinite(total) else math.inf

    def _make_portable(self) -> bool:
        crops = central_crops(self.held_out or self.photos, self.config.crop, self.config.batch_size)
        return make_portable(self.model, map(self._to_device, crops), self._slow_weights)

    def _slow_weights(self):
        return self.optimizer.swap() if self.config.sma else contextlib.nullcontext()

    def _to_device(self, batch: Tensor) -> Tensor:
        x = batch.to(self.device, non_blocking=True).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batches(self) -> Iterator[Tensor]:
        loader = torch.utils.data.DataLoader(
            RandomCrops(self.photos, self.config.crop, self.config.seed),
            batch_sampler=self.schedule.batches(self.progress.epoch, self.progress.position),
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: the global one belongs to the quantization noise
        )
        try:
            yield from loader
        except TrainingError as error:  # a worker's comes with its traceback; the last line is the message
            raise TrainingError(str(error).strip().splitlines()[-1].rpartition("TrainingError: ")[2]) from error

    def _save(self) -> None:
        """Write the checkpoint, unless the weights are not finite: then the last good one stays."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            _logger.warning("train: the weights at step %d are not finite; no checkpoint written", self.progress.step)
            return
        # the tensors that SMA's state holds too; the file stores them once
        slow = slow_weights(self.optimizer, self.names) if self.config.sma else None
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        contents = {
            "config": self.config.as_dict(),
            "data": self._data(),
            "model": self.model.state_dict(),
            "slow": slow,
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "versions": versions(),
            "stdet": self.stepping.state_dict(),
            "diagnostics": self.diagnostics and self.diagnostics.state_dict(),
        }
        save_checkpoint(self.output / CHECKPOINT, contents)
        self._saved_step = self.progress.step

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up the state that `_save` wrote. Raises TrainingError where the photographs are others."""
        if saved["data"] != self._data():
            raise TrainingError(
                f"train: cannot resume with another data: the run has {saved['data']['images']} photographs, "
                f"got {len(self.photos)} or others by name; give the same --data and --val, or a new --output"
            )
        load_weights(self.model, without_integers(saved["model"]))
        self.stepping.load_state_dict(saved["optimizer"], saved.get("stdet"))
        self.aux_optimizer.load_state_dict(saved["aux_optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.diagnostics is not None and saved.get("diagnostics"):
            self.diagnostics.load_state_dict(saved["diagnostics"])
        self.progress = Progress(**saved["progress"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], self.device)
        self._saved_step = self.progress.step

    def _data(self) -> dict[str, Any]:
        held = self.held_out
        return {
            "images": len(self.photos),
            "names": self.photos.fingerprint(),
            "held_out": 0 if held is None else len(held),
            "held_out_names": None if held is None else held.fingerprint(),
        }

    def _write_config(self) -> None:
        contents = {
            "config": self.config.as_dict(),
            "data": self._data(),
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "total_steps": self.total_steps,
            "broken_images": [{"name": name, "reason": reason} for name, reason in self.broken],
            "versions": versions(),
        }
        atomic_write(self.output / CONFIG, (json.dumps(contents, indent=2) + "\n").encode())

    def _bar(self):
        return optional_import("tqdm").tqdm(
            total=self.total_steps, initial=self.progress.step, unit="step", disable=self.config.quiet
        )

    def _show(self, bar, row: dict[str, float | int], images_per_second: float) -> None:
        bar.set_postfix_str(
            f"loss {row['loss']:.3f} bpp {row['bpp']:.3f} psnr {row['psnr']:.2f} lr {row['lr']:.1e} "
            f"{images_per_second:.1f} img/s",
            refresh=False,
        )
        bar.update()
