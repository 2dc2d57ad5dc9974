"""Seconds of decoding in the study of MSP: whole images, and the entropy part alone, from bytes to y_hat."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import accelerate, restore
from ..patch import KINDS
from ..training.data import load_rgb, to_tensor
from ..training.image_codec import ImageCodec
from ..training.models import build_model
from ._harness import OURS, Timing, collector_off
from ._msp_peers import AUTOREGRESSIVE, CHECKERBOARD, HYPERPRIOR, MSP, NAMES

WHOLE, ENTROPY = "decode", "entropy"
STOCK, FAST, OWN = "compressai", OURS + "accelerated", OURS + "msp"
STEPS, LANES = OWN + ".steps", OWN + ".lanes256"  # on a GPU: without a CUDA graph; with 256 chains side by side
_SEED = 29
_WARM = {"cpu": 1, "cuda": 3}  # rounds: on a GPU the first decodes step by step, the second records, the third replays
_SAME_PIXELS = 1e-3  # on a GPU: transposed convolutions need not repeat themselves to the bit there
_NOTHING = nn.Identity()
_CPU = torch.device("cpu")


class Contender(NamedTuple):
    """A model that decodes one image, by CompressAI's own code or by lic_fast's."""

    model: str
    backend: str
    module: nn.Module


class Measured(NamedTuple):
    """Milliseconds of one contender on one image, and the bytes of its stream."""

    contender: Contender
    part: str
    timing: Timing
    size: int


def trained_contenders(checkpoints: dict[str, Path], device: torch.device = _CPU) -> list[Contender]:
    """From checkpoints by name: every model accelerated, and the stock classes with the same weights beside."""
    found = []
    for name, path in checkpoints.items():
        model = ImageCodec(path, device="cpu", command="msp").model
        found += _all(name, model.to(device))
    return found


def untrained_contenders(channels: Sequence[int], device: torch.device = _CPU) -> list[Contender]:
    """With random weights, but latents and scales of several units, so that what is coded is not all zeros."""
    found = []
    for name in NAMES:
        torch.manual_seed(_SEED)
        model = build_model(name, tuple(channels)).eval()
        with torch.no_grad():
            [m for m in model.g_a.modules() if isinstance(m, nn.Conv2d)][-1].weight.mul_(20)
            scales = {
                HYPERPRIOR: lambda m: m.h_s[-1].bias,
                CHECKERBOARD: lambda m: m.latent_codec.y.entropy_parameters[-1].bias,
                AUTOREGRESSIVE: lambda m: m.entropy_parameters[-1].bias,
            }
            if name in scales:
                scales[name](model)[: channels[1]] += 2
        accelerate(model, only=[kind for kind in KINDS if kind != "gdn"], verbose=False)
        model.update()
        if name == MSP:  # as training leaves it
            noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(_SEED))
            model.make_portable(F.avg_pool2d(noise, 9, 1, 4))
        found += _all(name, model.to(device))
    return found


def _all(name: str, model: nn.Module) -> list[Contender]:
    if name == MSP:
        found = [Contender(name, OWN, model)]
        if next(model.parameters()).is_cuda:
            found += [Contender(name, backend, copy.deepcopy(model)) for backend in (STEPS, LANES)]
            found[1].module.entropy_model.cuda_graph = False
            found[2].module.entropy_model.lanes = 256
        return found
    stock = copy.deepcopy(model)
    restore(stock)
    return [Contender(name, FAST, model), Contender(name, STOCK, stock)]


@contextlib.contextmanager
def _without_synthesis(model: nn.Module) -> Iterator[None]:
    """Within the block decompress() gives y_hat, clamped: all of decoding but g_s."""
    kept, model.g_s = model.g_s, _NOTHING  # the same each time: a CUDA graph is that of one synthesis
    try:
        yield
    finally:
        model.g_s = kept


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """(milliseconds, result): until the device has it."""
    _wait()
    began = time.perf_counter()
    result = work()
    if result.is_cuda:
        _wait()
    return 1e3 * (time.perf_counter() - began), result


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _decoded(model: nn.Module, coded: dict[str, Any]) -> tuple[float, Tensor]:
    return _timed(lambda: model.decompress(coded["strings"], coded["shape"])["x_hat"])


def _size(strings: Any) -> int:
    return len(strings) if isinstance(strings, bytes) else sum(map(_size, strings))


@torch.no_grad()
def decode_times(contenders: Sequence[Contender], x: Tensor, repeats: int) -> list[Measured]:
    """Whole and entropy part, every contender once a round, on x's device; each decodes what the first of its name
    coded, on a GPU what it coded itself. Raises ValueError where one decodes something wrong.
    """
    keys = [place if x.is_cuda else contender.model for place, contender in enumerate(contenders)]
    coded: dict[Any, dict[str, Any]] = {}
    for key, contender in zip(keys, contenders, strict=True):
        if key not in coded:
            coded[key] = contender.module.compress(x)
    known: dict[Any, Tensor] = {}
    spent: dict[tuple[int, str], list[float]] = {}
    with collector_off():
        for repeat in range(-_WARM[x.device.type], repeats):
            for place, (name, backend, model) in enumerate(contenders):
                key = keys[place]
                taken, x_hat = _decoded(model, coded[key])
                with _without_synthesis(model):
                    alone, y_hat = _decoded(model, coded[key])
                if not _same(known.setdefault((key, WHOLE), x_hat), x_hat):
                    raise ValueError(f"msp: {name} of {backend} decodes other pixels than the one before it")
                if not torch.equal(known.setdefault((name if name == MSP else key, ENTROPY), y_hat), y_hat):
                    raise ValueError(f"msp: {name} of {backend} decodes another latent than the one before it")
                if repeat >= 0:
                    spent.setdefault((place, WHOLE), []).append(taken)
                    spent.setdefault((place, ENTROPY), []).append(alone)
    return [
        Measured(contenders[place], part, Timing.of(values), _size(coded[keys[place]]["strings"]))
        for (place, part), values in spent.items()
    ]


def _same(before: Tensor, x_hat: Tensor) -> bool:
    if x_hat.is_cuda:
        return torch.allclose(before, x_hat, rtol=0, atol=_SAME_PIXELS)
    return torch.equal(before, x_hat)


def picture(path: Path, height: int, width: int, multiple: int = 64) -> Tensor:
    """[1, 3, height, width] in [0, 1]: the middle of a photograph, mirrored where it is smaller, its edges repeated to
    a `multiple`, as an ImageCodec pads it: 64 for models with a hyperprior, 16 for MSP.
    """
    x = to_tensor(load_rgb(path))[None].float() / 255
    for axis, side in ((2, height), (3, width)):
        while x.shape[axis] < side:
            x = torch.cat([x, x.flip(axis)], axis)
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return nn.functional.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate").contiguous()


@torch.no_grad()
def scaling_times(
    model: nn.Module, path: Path, sides: Sequence[tuple[int, int]], repeats: int
) -> dict[tuple[int, int], tuple[Timing, int]]:
    """(milliseconds of the entropy part, bytes) of MSP by the size of the image, all sizes once a round."""
    streams, device = {}, next(model.parameters()).device
    for height, width in sides:
        y = model.g_a(picture(path, height, width, model.padding_multiple).to(device))
        streams[height, width] = (model.entropy_model.compress(y), y.shape[2:])
    spent: dict[tuple[int, int], list[float]] = {key: [] for key in streams}
    with collector_off():
        for repeat in range(-_WARM[device.type], repeats):
            for key, (strings, shape) in streams.items():
                taken, _ = _timed(lambda strings=strings, shape=shape: model.entropy_model.decompress(strings, shape))
                if repeat >= 0:
                    spent[key].append(taken)
    return {key: (Timing.of(values), _size(streams[key][0])) for key, values in spent.items()}


def latent_pixels(height: int, width: int) -> int:
    """Places of the latent of an image."""
    return math.ceil(height / 16) * math.ceil(width / 16)
