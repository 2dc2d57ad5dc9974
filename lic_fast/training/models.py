"""The image models that train with one plain rate-distortion loss, by name: CompressAI's, MSPCodec and CDC."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from typing import Any

import torch

from lic_fast.codec import CDC, CDC_NAMES, MSP_NAMES, MSPCodec
from lic_fast.patch import accelerate
from lic_fast.training.config import LAMBDAS, TrainConfig
from lic_fast.training.errors import TrainingError, optional_import
from lic_fast.training.precision import keep_entropy_fp32

_HIGHER_LAMBDAS = (0.0932, 0.1800)  # CompressAI's qualities 7 and 8, which complete its table
_MIN_CHANNELS = 4
_SIZED_LIKE = {name: "elic2022-official" if name.endswith("-elic") else "mbt2018-mean" for name in MSP_NAMES}
_logger = logging.getLogger("lic_fast.training")


@functools.cache
def _registered() -> tuple[dict[str, type], tuple[str, ...]]:
    """(name -> class of the models this loop trains, names of the variable-rate ones it does not)."""
    models = optional_import("compressai.models")
    optional_import("compressai.zoo")
    registry = optional_import("compressai.registry")
    trained, refused = {}, []
    for name, cls in registry.MODELS.items():
        if not issubclass(cls, models.CompressionModel) or not _codes_images(cls):
            continue
        if name.endswith("-vbr"):
            refused.append(name)
        else:
            trained[name] = cls
    trained.update(dict.fromkeys(MSP_NAMES, MSPCodec))
    trained.update(dict.fromkeys(CDC_NAMES, CDC))
    return dict(sorted(trained.items())), tuple(refused)


def _codes_images(cls: type) -> bool:
    return ".pointcloud" not in cls.__module__ and ".video" not in cls.__module__


def __getattr__(name: str) -> Any:
    if name == "MODELS":  # name -> class, filled from CompressAI on first use
        return _registered()[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_class(name: str) -> type:
    """The class of model `name`. Raises ValueError: unknown, or variable-rate (another loop)."""
    trained, refused = _registered()
    if name in refused:
        raise ValueError(
            f"train: {name} is a variable-rate model, and needs a loop that draws a quality for every batch; "
            f"train {name.removesuffix('-vbr')} instead"
        )
    if name not in trained:
        near = difflib.get_close_matches(name, trained, n=1) or [known for known in trained if name in known]
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"train: unknown model, got {name!r}; {hint}known: {', '.join(trained)}")
    return trained[name]


def resolve_channels(name: str, channels: tuple[int, ...] | None, lmbda: float) -> tuple[int, ...]:
    """The sizes (N) or (N, M) of model `name`; None takes CompressAI's for the quality nearest lmbda.

    Raises ValueError where the count or a size does not suit the model.
    """
    parameters = inspect.signature(model_class(name).__init__).parameters
    wanted = [key for key in ("N", "M") if key in parameters]
    if channels is None:
        return _default_channels(name, parameters, wanted, lmbda)
    if len(channels) != len(wanted):
        raise ValueError(
            f"train: {name} takes {len(wanted)} channel numbers, got {len(channels)}; "
            f"pass --channels {','.join(wanted)}"
        )
    least = {"N": _MIN_CHANNELS, "M": 20 if "groups" in parameters else _MIN_CHANNELS}
    for key, value in zip(wanted, channels, strict=True):
        if value < least[key]:
            raise ValueError(f"train: {key} of {name} is too small, got {value}; pass at least {least[key]}")
    return tuple(channels)


def _default_channels(name: str, parameters: Any, wanted: list[str], lmbda: float) -> tuple[int, ...]:
    if name in CDC_NAMES:
        return (CDC_NAMES[name]["sizes"].width,)
    like = _SIZED_LIKE.get(name, name)
    table = optional_import("compressai.zoo.image").cfgs.get(like)
    if table is None:
        parameters = inspect.signature(model_class(like).__init__).parameters
        return tuple(parameters[key].default for key in wanted)
    ladder = LAMBDAS + _HIGHER_LAMBDAS
    quality = 1 + min(range(len(ladder)), key=lambda i: abs(ladder[i] - lmbda))
    return tuple(table[min(quality, max(table))])


def build_model(name: str, channels: tuple[int, ...]) -> torch.nn.Module:
    """Model `name` with its random initial weights. ELIC with M <= 128 gets groups as 1:1:2:4:12."""
    cls = model_class(name)
    if cls in (MSPCodec, CDC):
        return cls.from_name(name, *channels)
    if "groups" in inspect.signature(cls.__init__).parameters and channels[1] <= 128:
        m = channels[1]
        first = [m // 20, m // 20, m // 10, m // 5]
        return cls(*channels, groups=[*first, m - sum(first)])
    return cls(*channels)


def prepare_model(config: TrainConfig, device: torch.device) -> torch.nn.Module:
    """The model that `config` trains, on `device`, with its random initial weights from torch's generator."""
    model = build_model(config.model, config.channels).to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.accelerate:
        _logger.info("train: %s", accelerate(model, verbose=False))
    if config.amp == "bf16":
        keep_entropy_fp32(model, device.type)
    return model


def split_parameters(
    model: torch.nn.Module,
) -> tuple[list[tuple[str, torch.nn.Parameter]], list[tuple[str, torch.nn.Parameter]]]:
    """(the weights the rate-distortion loss trains, the quantiles the auxiliary loss trains), with names."""
    main, quantiles = [], []
    for name, parameter in model.named_parameters():
        (quantiles if name.rpartition(".")[2] == "quantiles" else main).append((name, parameter))
    return main, quantiles


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load `state` into `model`. Raises TrainingError, in one line, where names or sizes differ."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = lines[1] if len(lines) > 1 else lines[0]
        raise TrainingError(
            f"the checkpoint's weights do not fit its model ({detail[:200]}); "
            "use the CompressAI version it was trained with"
        ) from error


def resolve_device(asked: str, command: str) -> torch.device:
    """The torch device of auto, cpu or cuda. Raises TrainingError where CUDA is asked for and absent."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise TrainingError(f"{command}: no CUDA device is usable here, got --device cuda; use --device cpu")
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)
