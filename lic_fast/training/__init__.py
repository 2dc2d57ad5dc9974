"""Training, evaluation and image files: an ordinary loop around any CompressAI image model.

`train(TrainConfig(...))` is what `lic-fast train` runs. Names are loaded on first use, so that importing
this package (the command line does) costs neither CompressAI nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "TrainConfig": "config",
    "TrainingError": "errors",
    "TrainResult": "report",
    "train": "loop",
    "ImageCodec": "image_codec",
    "evaluate": "evaluate",
    "compare": "comparison",
    "RateDistortionLoss": "loss",
}

__all__ = [
    "ImageCodec",
    "RateDistortionLoss",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "compare",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # a submodule of the same name (evaluate) must not shadow the function
    return value
