"""What STDET refuses, each with one line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..functional import FlatLayout
from .sma import SMA

CHOICES = {
    "sensitivity": ("taylor", "fisher", "magnitude", "random"),
    "dummy_mode": ("project", "freeze_epoch"),
    "gradient": ("drop", "overwrite", "chain"),
    "t_origin": ("global", "warmup"),
    "snapshots": ("bf16", "exact"),
    "fused": ("auto", False),
}
WHOLE = {"warmup_epochs": 2, "period": 1, "modes": 1, "samples": 1, "seed": 0}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def options(**given: Any) -> None:
    """ValueError, naming it, for an option outside its range; TypeError where dummy cannot be called."""
    for name, known in CHOICES.items():
        if given[name] not in known:
            raise ValueError(f"STDET: {name} must be one of {', '.join(map(repr, known))}, got {given[name]!r}")
    for name, least in WHOLE.items():
        value = given[name]
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"STDET: {name} must be a whole number >= {least}, got {value!r}")
    if given["modes"] > FlatLayout.MOST_MODES:
        raise ValueError(f"STDET: modes must be at most {FlatLayout.MOST_MODES}, got {given['modes']}")
    for name in ("embeddable", "true_per_epoch"):
        if not (math.isfinite(given[name]) and 0.0 <= given[name] <= 1.0):
            raise ValueError(f"STDET: {name} must be a share in [0, 1], got {given[name]!r}")
    if not callable(given["dummy"]):
        raise TypeError(
            f"STDET: dummy must be a function from an epoch to a share, got {type(given['dummy']).__name__}; "
            "for none give lambda t: 0"
        )
    if given["gradient"] == "overwrite" and given["dummy_mode"] == "freeze_epoch":
        raise ValueError(
            "STDET: gradient='overwrite' trains all weights, dummy_mode='freeze_epoch' ties dummies; choose one"
        )


def averaged(optimizer: Optimizer, sma: tuple[float, int] | None) -> Optimizer:
    """The optimizer, wrapped in SMA where `sma` is (alpha, every)."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"STDET: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if sma is None:
        return optimizer
    if not isinstance(sma, (tuple, list)) or len(sma) != 2:
        raise TypeError(f"STDET: sma must be None or (alpha, every), got {sma!r}")
    return SMA(optimizer, alpha=sma[0], every=sma[1])


def parameters(model_or_params: nn.Module | Iterable[Tensor], optimizer: Optimizer) -> tuple[list[Tensor], list[bool]]:
    """(the optimizer's parameters that require grad, whether the weights of each may be embedded)."""
    if isinstance(model_or_params, nn.Module):
        named = model_or_params.named_parameters()
        wanted = [p for name, p in named if p.requires_grad and name.rpartition(".")[2] != "quantiles"]
        outer = {p for group in optimizer.param_groups for p in group["params"]}
        wanted = [p for p in wanted if p in outer]
    else:
        wanted = list(model_or_params)
        if not all(isinstance(p, Tensor) for p in wanted):
            raise TypeError("STDET: model_or_params must be a module or tensors; pass the model")
        wanted = [p for p in wanted if p.requires_grad]
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    known = set(params)
    if any(p not in known for p in wanted):
        raise ValueError("STDET: a parameter is not in the optimizer; give the parameters it trains")
    chosen = set(wanted)
    if not any(p.numel() for p in wanted):
        raise ValueError("STDET: there is no weight that the optimizer trains; give a model with parameters")
    first = params[0]
    for p in params:
        if p.dtype not in FLOATS or (p.dtype, p.device) != (first.dtype, first.device):
            raise TypeError(
                f"STDET: all parameters must share one floating dtype and one device, got {first.dtype} on "
                f"{first.device} and {p.dtype} on {p.device}; use one STDET for each"
            )
        if not (p.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(p)):
            raise ValueError(f"STDET: a parameter of shape {list(p.shape)} is a strided view; make it contiguous")
    return params, [p in chosen for p in params]


def state(state_dict: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a state that is STDET's own; ValueError where it is none, or of other settings."""
    keys = {"settings", "epoch", "sensitivity", "snapshots", "embedding", "adam"}
    own = state_dict.get("stdet")
    if set(state_dict) != {"optimizer", "stdet"} or not isinstance(own, dict) or set(own) != keys:
        raise ValueError(
            f"STDET.load_state_dict: not a state of STDET, got keys {sorted(map(str, state_dict))}; "
            "load one that state_dict() gave"
        )
    for name, value in settings.items():
        got = own["settings"].get(name)
        if got != value:
            told = "other" if name in ("shapes", "strides") else f"{got!r}"
            raise ValueError(
                f"STDET.load_state_dict: {name} differs, the state has {told}"
                f"{'' if told == 'other' else f', this object {value!r}'}; build STDET as it was"
            )
    return own
