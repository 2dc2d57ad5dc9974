"""What a training run is made of. Plain data: this module imports neither torch nor CompressAI."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LAMBDAS = (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483)
DEFAULT_EPOCHS = 80

# What may differ between a run and its resumption: none of these changes a batch, a loss or an update.
FREE_ON_RESUME = frozenset(
    "data val output steps epochs workers device checkpoint_every max_nonfinite diagnose resume quiet backend".split()
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are those of the STDET/SMA paper, section 4.1, where it gives them.

    `data` None means the photographs inside scikit-image; `channels` None the model's own sizes for this
    lambda. An epoch has at least `min_epoch_steps` steps: a small folder is visited several times, with
    other crops each time. Without `steps` and `epochs`, the run has 80 epochs.
    """

    model: str
    output: str
    data: str | None = None
    val: str | None = None
    steps: int | None = None
    epochs: int | None = None
    lmbda: float = 0.0130
    batch_size: int = 16
    crop: int = 256
    lr: float = 1e-4
    aux_lr: float = 1e-3
    clip: float = 2.0
    optimizer: str = "adam"
    sma: bool = False
    sma_alpha: float = 0.8
    sma_every: int = 5
    stdet: bool = False
    stdet_warmup: int = 20
    stdet_embeddable: float = 0.75
    stdet_true: float = 0.01
    stdet_dummy: tuple[float, float] = (0.02, 0.25)
    stdet_period: int = 1
    stdet_epoch_steps: int | None = None
    stdet_modes: int = 10
    stdet_samples: int = 1000
    stdet_sensitivity: str = "taylor"
    stdet_dummy_mode: str = "project"
    stdet_gradient: str = "drop"
    stdet_origin: str = "global"
    stdet_continuity: bool = False
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    accelerate: bool = True
    channels: tuple[int, ...] | None = None
    checkpoint_every: int | None = None
    min_epoch_steps: int = 50
    patience: int = 5
    lr_factor: float = 0.5
    max_nonfinite: int = 10
    backend: str = "auto"
    diagnose: int = 0
    resume: bool = False
    quiet: bool = False

    def validate(self) -> None:
        """Raises ValueError, naming the field, where a value makes no sense."""
        counts = ("batch_size", "sma_every", "min_epoch_steps", "max_nonfinite", "stdet_warmup", "stdet_period")
        for name in (*counts, "stdet_modes", "stdet_samples"):
            value = getattr(self, name)
            self._check(name, int(value) == value and value >= 1, "at least 1, a whole number")
        for name in ("steps", "epochs", "checkpoint_every", "stdet_epoch_steps"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        for name in ("lmbda", "lr", "aux_lr"):
            value = getattr(self, name)
            self._check(name, math.isfinite(value) and value > 0, "a positive number")
        self._check("clip", math.isfinite(self.clip) and self.clip >= 0, "0 (off) or a positive number")
        self._check("workers", self.workers >= 0, "0 or more")
        self._check("diagnose", int(self.diagnose) == self.diagnose >= 0, "0 (off) or a number of steps")
        self._check("patience", self.patience >= 0, "0 or more")
        self._check("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        self._check("lr_factor", 0 < self.lr_factor < 1, "between 0 and 1")
        self._check("sma_alpha", 0 < self.sma_alpha <= 1, "above 0 and at most 1")
        self._check("crop", self.crop >= 64 and self.crop % 64 == 0, "a multiple of 64")
        self._check("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        self._check("amp", self.amp in ("off", "bf16"), "off or bf16")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"train: steps and epochs are both given, got {self.steps} and {self.epochs}; give one")
        for name in ("stdet_embeddable", "stdet_true"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        rate, most = self.stdet_dummy
        self._check("stdet_dummy", rate >= 0 and 0 <= most <= 1, "RATE,MOST: shares of the weights, 0.02,0.25")
        if self.diagnose and self.stdet:
            raise ValueError("train: diagnose reads the optimizer's moments, which stdet takes over; give one of both")
        if self.diagnose and self.compile:
            raise ValueError(
                "train: diagnose needs a graph that torch.compile does not keep, got both; run without --compile"
            )

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"train: {name} is out of range, got {getattr(self, name)!r}; {option} takes {wanted}")

    @property
    def title(self) -> str:
        """What heads the pictures of the run."""
        tricks = (" + STDET" if self.stdet else "") + (" + SMA" if self.sma else "")
        return f"{self.model}, lambda {self.lmbda:g}, {self.optimizer}{tricks}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, as checkpoint.pt and config.json hold them."""
        values = dataclasses.asdict(self)
        values["channels"] = None if self.channels is None else list(self.channels)
        values["stdet_dummy"] = list(self.stdet_dummy)
        return values


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The config that `as_dict` gave; fields this version does not know are left out."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    kept = {name: value for name, value in values.items() if name in known}
    if kept.get("channels") is not None:
        kept["channels"] = tuple(kept["channels"])
    kept.setdefault("accelerate", False)  # a run from before there was such a thing
    if "stdet_dummy" in kept:
        kept["stdet_dummy"] = tuple(kept["stdet_dummy"])
    return TrainConfig(**kept)


def first_difference(saved: TrainConfig, asked: TrainConfig) -> str | None:
    """The first field, in order of declaration, that a resumed run must not change but does; else None."""
    for field in dataclasses.fields(TrainConfig):
        if field.name not in FREE_ON_RESUME and getattr(saved, field.name) != getattr(asked, field.name):
            return field.name
    return None
