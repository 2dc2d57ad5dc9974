"""ddim_update: one step of a diffusion sampler that predicts the image, without and with noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..reference._noise import normal_noise
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

# [B, 3, H, W]: the paper's crops, a photograph of Kodak, and 2K
SHAPES = ((1, 3, 256, 256), (1, 3, 512, 768), (1, 3, 1088, 1920))
QUICK = ((1, 3, 64, 64),)
_NOW, _AFTER, _SIGMA = 0.41, 0.58, 0.2  # of a schedule's middle: what is left of the signal's power, before and after
_SEED = 11


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """[x, f]: f beyond 1 in places, as networks' are."""
    g = torch.Generator().manual_seed(_SEED)
    return [(scale * torch.randn(shape, generator=g)).to(device, dtype) for scale in (1.0, 0.6)]


def textbook(x: Tensor, f: Tensor, normal: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The step as samplers are usually written: clamp, the noise that the image leaves, and the next level."""
    image = f.clamp(-1.0, 1.0)
    noise = (x * (1 / _NOW) ** 0.5 - image) / (1 / _NOW - 1) ** 0.5
    sigma = 0.0 if normal is None else _SIGMA
    following = _AFTER**0.5 * image + (1 - _AFTER - sigma**2) ** 0.5 * noise
    return following if normal is None else following + sigma * normal(x)


def coefficients(noisy: bool) -> dict[str, Any]:
    """The same step as one sum."""
    sigma = _SIGMA if noisy else 0.0
    a = ((1 - _AFTER - sigma**2) / (1 - _NOW)) ** 0.5
    numbers: dict[str, Any] = {"a": a, "b": _AFTER**0.5 - a * _NOW**0.5}
    return numbers | {"noise": sigma, "seed": _SEED} if noisy else numbers


def _expected(x: Tensor, f: Tensor, normal: Tensor | None) -> Expected:
    given = None if normal is None else lambda like: normal.to(like.dtype)
    exact = [textbook(x.double(), f.double(), given)]
    return Expected.of(exact, [textbook(x, f, given)], [magnitude(x, f)])


def _group(shape: Sequence[int], dtype: str, noisy: bool, settings: Settings) -> Group:
    x, f = _inputs(shape, DTYPES[dtype], settings.device)
    moved, flops = 3 * x.nbytes, (5 if noisy else 3) * x.numel()
    normal = normal_noise(torch.tensor([_SEED], device=x.device), x) if noisy else None

    def case(backend: str, run: Callable[[], Tensor], outputs: Callable[[Tensor], list[Tensor]]) -> Case:
        return Case(backend, run, outputs, moved, flops)

    def same(y: Tensor) -> list[Tensor]:
        return [y]

    usable, left_out = backends("ddim_update", settings.device, x.dtype)
    numbers = coefficients(noisy)
    cases = [case(OURS + b, forced(b, lambda: functional.ddim_update(x, f, **numbers)), same) for b in usable]
    # PyTorch's generator draws other noise: what it gives is timed, and checked with ours in its place
    drawn = torch.randn_like if noisy else None

    def with_ours(_: Tensor) -> list[Tensor]:
        return same(textbook(x, f, None if normal is None else lambda like: normal.to(like.dtype)))

    check = with_ours if noisy else same
    cases.append(case("eager", lambda: textbook(x, f, drawn), check))
    reason = compile_why_not(settings.device)
    if reason is None:
        whole = compiled(lambda x, f: textbook(x, f, drawn))
        cases.append(case("torch.compile", lambda: whole(x, f), check))
    else:
        left_out["torch.compile"] = reason
    return Group(
        op="ddim_update",
        case="with noise" if noisy else "no noise",
        inputs=str(list(shape)),
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=_expected(x, f, normal),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape, dtype and kind of step; the shapes are images' and do not depend on the models."""
    for shape in QUICK if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            for noisy in (False, True):
                forget_compiled()
                yield _group(shape, dtype, noisy, settings)
