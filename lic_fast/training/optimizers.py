"""Optimizers by name: a later one plugs in with one line of OPTIMIZERS."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator

import torch

from lic_fast import BackendError, explain, use_backend
from lic_fast.optim import SMA, SOAP, param_groups
from lic_fast.training.config import TrainConfig
from lic_fast.training.models import resolve_device, split_parameters

# (model, learning rate) -> optimizer of all its parameters but the quantiles
Factory = Callable[[torch.nn.Module, float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "adam": lambda model, lr: torch.optim.Adam(_main(model), lr=lr),
    "adam-fused": lambda model, lr: torch.optim.Adam(_main(model), lr=lr, fused=True),
    "soap": lambda model, lr: SOAP(param_groups(model), lr=lr, weight_decay=0.0),  # as Adam above: no decay
}
STDET_OPS = (
    "cmd_assign", "embed_select", "rls_update_", "sensitivity_accumulate_", "stdet_adam_step_", "stdet_mask_",
    "stdet_reconstruct_",
)  # fmt: skip
OPS = {"soap": ("soap_update_", "adam_update_", "refresh_eigenbasis", "rotate_moments_")}


def _main(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in split_parameters(model)[0]]


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the main parameters, wrapped in SMA where the config says so.

    Raises ValueError where the name is unknown.
    """
    if config.optimizer not in OPTIMIZERS:
        near = difflib.get_close_matches(config.optimizer, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"train: unknown optimizer, got {config.optimizer!r}; {hint}known: {', '.join(OPTIMIZERS)}")
    optimizer = OPTIMIZERS[config.optimizer](model, config.lr)
    return SMA(optimizer, alpha=config.sma_alpha, every=config.sma_every) if config.sma else optimizer


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside SMA, or the optimizer itself."""
    return optimizer.optimizer if isinstance(optimizer, SMA) else optimizer


def slow_weights(optimizer: SMA, names: dict[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The slow weights by name: they come in the order of the parameter groups, which is not that of the model."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[p]: slow for p, slow in zip(parameters, optimizer.slow_weights(), strict=True)}


@contextlib.contextmanager
def insisted_backend(config: TrainConfig) -> Iterator[None]:
    """Every op of the run in `config.backend`. Raises BackendError where it cannot run here."""
    if config.backend == "auto":
        yield
        return
    with use_backend(config.backend):
        for op in ("sma_update_", *OPS.get(config.optimizer, ()), *(STDET_OPS if config.stdet else ())):
            told = explain(op, resolve_device(config.device, "train"))
            if told.chosen is None:
                reason = told.reasons[config.backend]
                raise BackendError(f"train: backend {config.backend!r} was asked for and cannot run {op}: {reason}")
        yield
