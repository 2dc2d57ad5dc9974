"""Mixed precision: transforms in bfloat16, likelihoods in fp32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lic_fast.training.errors import optional_import


def keep_entropy_fp32(model: torch.nn.Module, device_type: str) -> int:
    """Make every entropy model of `model` (EntropyBottleneck, GaussianConditional, ...) run outside autocast.

    The forward of each instance is replaced by one that switches autocast off and casts its floating-point
    tensors to fp32: bfloat16 has 8 bits of mantissa, and the difference of two cumulative probabilities near
    1 needs more. Parameters, buffers and state_dict are untouched. Returns how many modules were wrapped.
    """
    kind = optional_import("compressai.entropy_models").EntropyModel
    modules = [module for module in model.modules() if isinstance(module, kind)]
    for module in modules:
        module.forward = _in_fp32(module.forward, device_type)
    return len(modules)


def _in_fp32(forward, device_type: str):
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return forward(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return wrapped


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
