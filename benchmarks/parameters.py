"""The parameters of real models as lists of tensors: the initial values, no download."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

_SEED = 2025
_QUALITY = 3


def _compressai(module: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            # CompressAI scripts helpers at import, which torch calls deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit.*")
            return importlib.import_module(f"compressai.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "compressai":
            raise
        raise ImportError(
            "benchmarks: the tensor lists come from CompressAI, which is not installed; "
            'run: pip install "lic_fast[compressai]"'
        ) from None


def _detached(build: Callable[[], torch.nn.Module]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return [parameter.detach().clone() for parameter in build().parameters()]


@functools.cache
def _zoo_model(name: str) -> list[Tensor]:
    build = _compressai("zoo").image_models[name]
    return _detached(lambda: build(quality=_QUALITY, pretrained=False))


@functools.cache
def _elic() -> list[Tensor]:
    return _detached(_compressai("models").Elic2022Official)


# name -> function that returns the fp32 parameters on the CPU; smallest first, and --quick takes the first.
MODELS: dict[str, Callable[[], Sequence[Tensor]]] = {
    "mbt2018-mean": functools.partial(_zoo_model, "mbt2018-mean"),
    "cheng2020-anchor": functools.partial(_zoo_model, "cheng2020-anchor"),
    "elic2022-official": _elic,
}


def load(
    model: str | Callable[[], Sequence[Tensor]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The parameters of `model`, a name in MODELS or a function like those, as clones of `dtype` on `device`.

    The values are kept for the life of the process: a second call only copies. Raises ValueError for an
    unknown name, ImportError where CompressAI is missing.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"load: unknown model, got {model!r}; use one of {', '.join(MODELS)}")
        model = MODELS[model]
    return [value.to(device=device, dtype=dtype, copy=True) for value in model()]


def label(name: str, tensors: Sequence[Tensor]) -> str:
    """How rows name an input set: model, number of tensors, number of elements."""
    count = len(tensors)
    return f"{name} ({count} tensor{'s' * (count != 1)}, {sum(t.numel() for t in tensors)} elements)"
