"""Optimizers by name: a later one plugs in with one line of OPTIMIZERS."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch

from lic_fast.training.config import TrainConfig

Factory = Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adam-fused": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the main parameters, wrapped in SMA where the config says so.

    Raises ValueError where the name is unknown.
    """
    if config.optimizer not in OPTIMIZERS:
        near = difflib.get_close_matches(config.optimizer, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"train: unknown optimizer, got {config.optimizer!r}; {hint}known: {', '.join(OPTIMIZERS)}")
    optimizer = OPTIMIZERS[config.optimizer](parameters, config.lr)
    if not config.sma:
        return optimizer
    from lic_fast.optim import SMA

    return SMA(optimizer, alpha=config.sma_alpha, every=config.sma_every)
