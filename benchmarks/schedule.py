"""schedule_quantize_, schedule_dequantize_: the largest step of a latent's schedule, encoded and decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import schedule_dequantize_, schedule_levels, schedule_quantize_
from ..reference import schedule as specification
from ._contenders import backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings

# latents [B, C, H, W] of images of 512 x 768 and 2160 x 3840, and of a batch of crops of 256
SHAPES = ((1, 192, 32, 48), (1, 192, 135, 240), (16, 192, 16, 16))
QUICK = ((1, 16, 9, 12),)
_PLACE = {"first": 0, "row": 1, "column": 1, "stride": 2}
_SEED = 17


class _Inputs:
    """A latent, the parameters of a step of all its channels, and what is written."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        g = torch.Generator().manual_seed(_SEED)
        self.y = (8 * torch.randn(shape, generator=g)).to(device)
        part = specification.of_step(self.y, shape[1], **_PLACE).shape
        scales = torch.exp(4 * torch.rand(part, generator=g) - 2)
        self.parameters = torch.cat([scales, 4 * torch.randn(part, generator=g)], 1).to(device)
        self.y_hat = torch.zeros_like(self.y)
        self.symbols, _, _ = specification.schedule_quantize_(self.y_hat, self.y, self.parameters, **_PLACE)

    def reset(self) -> None:
        """Puts the start of y_hat back."""
        self.y_hat.zero_()


def _encode(x: _Inputs, function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Any]:
    return lambda: function(x.y_hat, x.y, x.parameters, **_PLACE)


def _decode(x: _Inputs, levels: Callable[[Tensor], Tensor], function: Callable[..., Tensor]) -> Callable[[], Any]:
    return lambda: (levels(x.parameters), function(x.y_hat, x.symbols, x.parameters, **_PLACE))


def _plain(direction: str) -> tuple[Callable[..., Any], ...]:
    if direction == "encode":
        return (specification.schedule_quantize_,)
    return specification.schedule_levels, specification.schedule_dequantize_


def _group(shape: Sequence[int], direction: str, settings: Settings) -> Group:
    x = _Inputs(shape, settings.device)
    make = _encode if direction == "encode" else _decode
    functions = (schedule_quantize_,) if direction == "encode" else (schedule_levels, schedule_dequantize_)
    n = x.symbols.numel()
    moved = n * (25 if direction == "encode" else 21)

    def case(name: str, run: Callable[[], Any]) -> Case:
        return Case(name, run, lambda found: [*(t.float() for t in found), x.y_hat], moved, 2 * n, x.reset)

    usable, left_out = backends("schedule_quantize_", settings.device, torch.float32)
    cases = [case(OURS + b, forced(b, make(x, *functions))) for b in usable]
    reason = compile_why_not(settings.device)
    if reason is None:
        cases.append(case("torch.compile", make(x, *map(compiled, _plain(direction)))))
    else:
        left_out["torch.compile"] = reason
    x.reset()
    exact = [*(t.double() for t in make(x, *_plain(direction))()), x.y_hat.double()]
    x.reset()
    return Group(
        op="schedule",
        case=direction,
        inputs=f"step of [{', '.join(map(str, shape))}], {n} elements",
        dtype="fp32",
        device=settings.device,
        cases=cases,
        expected=Expected(exact, [0.0] * len(exact), [torch.float32] * len(exact)),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a latent and direction: all channels of phase (1, 1) of the finest grid. reference is eager PyTorch."""
    for shape in QUICK if settings.quick else SHAPES:
        for direction in ("encode", "decode"):
            forget_compiled()
            yield _group(shape, direction, settings)
