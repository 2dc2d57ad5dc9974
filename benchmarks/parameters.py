"""The parameters of real models as lists of tensors: the initial values, no download."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
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


class Named(list[Tensor]):
    """Tensors, and in `names` what their model calls them."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        names, tensors = zip(*named, strict=True)
        super().__init__(tensors)
        self.names: tuple[str, ...] = names


def _detached(build: Callable[[], torch.nn.Module]) -> Named:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return Named((name, parameter.detach().clone()) for name, parameter in build().named_parameters())


@functools.cache
def _zoo_model(name: str) -> Named:
    build = _compressai("zoo").image_models[name]
    return _detached(lambda: build(quality=_QUALITY, pretrained=False))


@functools.cache
def _elic() -> Named:
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
    *,
    quantiles: bool = True,
) -> list[Tensor]:
    """The parameters of `model`, a name in MODELS or a function like those, as clones of `dtype` on `device`.

    quantiles=False leaves out the quantiles of entropy bottlenecks, which have an optimizer of their own. The values
    are kept for the life of the process: a second call only copies. Raises ValueError for an unknown name, ImportError
    where CompressAI is missing.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"load: unknown model, got {model!r}; use one of {', '.join(MODELS)}")
        model = MODELS[model]
    values = model()
    if not quantiles and isinstance(values, Named):
        values = [v for name, v in zip(values.names, values, strict=True) if not name.endswith("quantiles")]
    return [value.to(device=device, dtype=dtype, copy=True) for value in values]


def label(name: str, tensors: Sequence[Tensor]) -> str:
    """How rows name an input set: model, number of tensors, number of elements."""
    count = len(tensors)
    return f"{name} ({count} tensor{'s' * (count != 1)}, {sum(t.numel() for t in tensors)} elements)"
