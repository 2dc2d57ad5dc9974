"""channel_norm: normalization over channels, ReLU and time bias, as CDC's U-Net runs it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import functional
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled, step
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

# [B, C, H, W]: the first, third and last level of CDC's U-Net for a crop of 256
SHAPES = ((1, 64, 256, 256), (1, 192, 64, 64), (1, 384, 8, 8))
QUICK = ((1, 32, 16, 16),)
_SEED = 11


def _inputs(shape: Sequence[int], dtype: torch.dtype, last: bool, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """([x, weight, bias, shift], gradient of y)."""
    g = torch.Generator().manual_seed(_SEED)
    layout = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.randn(shape, generator=g).to(device, dtype, memory_format=layout) for _ in range(2))
    vectors = [torch.randn(size, generator=g).to(device) for size in (shape[1], shape[1], shape[:2])]
    return [x + 0.5, *vectors], grad


def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """In PyTorch's own operations, in x's dtype."""
    weight, bias, shift = (p.to(x.dtype) for p in (weight, bias, shift))
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + 1e-5) * weight[:, None, None] + bias[:, None, None]
    return torch.relu(y) + shift[:, :, None, None]


def _ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    return functional.channel_norm(x, weight, bias, shift=shift, relu=True)


def _group(shape: Sequence[int], dtype: str, last: bool, trained: bool, settings: Settings) -> Group:
    values, grad = _inputs(shape, DTYPES[dtype], last, settings.device)
    if trained:  # a value next to zero may fall on either side of it, and its gradient with it
        near = functional.channel_norm(values[0], values[1], values[2]).abs() < (1e-4 if dtype == "fp32" else 3e-2)
        grad = torch.where(near, 0, grad)
    given = grad if trained else None
    x = values[0]
    moved, flops = (5 if trained else 2) * x.nbytes, (25 if trained else 9) * x.numel()

    def case(backend: str, run: Callable[[], list[Tensor]]) -> Case:
        return Case(backend, run, list, moved, flops)

    usable, left_out = backends("channel_norm", settings.device, x.dtype)
    cases = [case(OURS + b, forced(b, step(_ours, values, given))) for b in usable]
    cases.append(case("eager", step(plain, values, given)))
    reason = compile_why_not(settings.device)
    if reason is None:
        cases.append(case("torch.compile", step(compiled(plain), values, given)))
    else:
        left_out["torch.compile"] = reason
    exact = step(plain, [t.double() for t in values], given if given is None else given.double())()
    eager = step(plain, values, given)()
    return Group(
        op="channel_norm",
        case=f"{'forward and backward' if trained else 'forward'}, {'channels_last' if last else 'contiguous'}",
        inputs=str(list(shape)),
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=Expected.of(exact, eager, [magnitude(t) for t in exact]),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape, dtype, memory format and direction; the shapes are layers' and do not depend on the models."""
    for shape in QUICK if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            for last in (True, False):
                for trained in (False, True):
                    forget_compiled()
                    yield _group(shape, dtype, last, trained, settings)
