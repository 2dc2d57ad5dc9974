"""q_sample and q_sample_loss: what diffusion training does to a batch before its network and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import functional
from ..reference._noise import normal_noise
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

# [B, 3, H, W]: the paper's batch of crops, and a larger one
SHAPES = ((4, 3, 256, 256), (16, 3, 256, 256))
QUICK = ((2, 3, 32, 32),)
NOISING, OF_IMAGE = "noising", "loss of an image, forward and backward"
OF_NOISE = "noising, and loss of the noise, forward and backward"
_SEED = 11


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """([x, f], [signal, spread, weight])."""
    g = torch.Generator().manual_seed(_SEED)
    images = [(scale * torch.randn(shape, generator=g)).to(device, dtype) for scale in (0.5, 0.8)]
    share = torch.linspace(0.05, 0.95, shape[0], device=device)
    return images, [share.sqrt(), (1 - share).sqrt(), (share / (1 - share)).clamp(max=5)]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None, None, None]


def noised(x: Tensor, signal: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
    """In PyTorch's own operations, in x's dtype."""
    return _column(signal, x) * x + _column(spread, x) * noise


def loss(f: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same for the loss; in fp32 for halves, as autocast has it."""
    wide = torch.promote_types(f.dtype, torch.float32)
    return (weight * (f.to(wide) - target.to(wide)).square().mean((1, 2, 3))).mean()


def _graded(value: Tensor, leaf: Tensor) -> list[Tensor]:
    """[the loss, its gradient]."""
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def _ours(kind: str, x: Tensor, f: Tensor, columns: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    signal, spread, weight = columns
    leaf = f.detach().clone().requires_grad_()

    def noise_first() -> list[Tensor]:
        noisy = functional.q_sample(x, signal, spread, seed=_SEED)
        return [noisy, *_graded(functional.q_sample_loss(leaf, None, weight, seed=_SEED), leaf)]

    if kind == OF_IMAGE:
        return lambda: _graded(functional.q_sample_loss(leaf, x, weight), leaf)
    return noise_first if kind == OF_NOISE else lambda: [functional.q_sample(x, signal, spread, seed=_SEED)]


def _plain(
    kind: str, x: Tensor, f: Tensor, columns: Sequence[Tensor], noise: Tensor | None, wrap: Callable = lambda g: g
) -> Callable[[], list[Tensor]]:
    """In PyTorch's own operations, each function through wrap; noise None draws PyTorch's."""
    signal, spread, weight = columns
    leaf = f.detach().clone().requires_grad_()

    def first(x: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.randn_like(x) if noise is None else noise
        return noised(x, signal, spread, drawn), drawn

    first, last = wrap(first), wrap(lambda f, target: loss(f, target, weight))

    def noise_first() -> list[Tensor]:
        noisy, drawn = first(x)
        return [noisy, *_graded(last(leaf, drawn), leaf)]

    if kind == OF_IMAGE:
        return lambda: _graded(last(leaf, x), leaf)
    return noise_first if kind == OF_NOISE else lambda: [first(x)[0]]


def _group(shape: Sequence[int], dtype: str, kind: str, settings: Settings) -> Group:
    (x, f), columns = _inputs(shape, DTYPES[dtype], settings.device)
    normal = normal_noise(torch.tensor([_SEED], device=x.device), x)
    # tensors read and written: x and the noisy one; f and x, f and x again and the gradient; x, noisy, f, f, gradient
    moved = {NOISING: 2, OF_IMAGE: 5, OF_NOISE: 5}[kind] * x.nbytes
    flops = {NOISING: 3, OF_IMAGE: 5, OF_NOISE: 8}[kind] * x.numel()
    exact = _plain(kind, x.double(), f.double(), [c.double() for c in columns], normal.double())()
    same_noise = _plain(kind, x, f, columns, normal.to(x.dtype))

    def case(backend: str, run: Callable[[], list[Tensor]], outputs: Callable = list) -> Case:
        return Case(backend, run, outputs, moved, flops)

    # PyTorch's generator draws other noise: what it gives is timed, and checked with ours in its place
    check: Callable = list if kind == OF_IMAGE else lambda _: same_noise()
    usable, left_out = backends("q_sample", settings.device, x.dtype)
    cases = [case(OURS + b, forced(b, _ours(kind, x, f, columns))) for b in usable]
    cases.append(case("eager", _plain(kind, x, f, columns, None), check))
    reason = compile_why_not(settings.device)
    if reason is None:
        cases.append(case("torch.compile", _plain(kind, x, f, columns, None, compiled), check))
    else:
        left_out["torch.compile"] = reason
    return Group(
        op="q_sample",
        case=kind,
        inputs=str(list(shape)),
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=Expected.of(exact, same_noise(), [magnitude(t) for t in exact]),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape, dtype and job; the shapes are images' and do not depend on the models."""
    for shape in QUICK if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            for kind in (NOISING, OF_IMAGE, OF_NOISE):
                forget_compiled()
                yield _group(shape, dtype, kind, settings)
