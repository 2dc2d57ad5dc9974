"""gdn: divisive normalization across channels, forward and backward, as a training step runs it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

# [B, C, H, W]: crops of 256 through the layers of a factorized prior and of a larger model, and a whole image
SHAPES = ((8, 128, 64, 64), (8, 192, 32, 32), (4, 192, 128, 128), (1, 320, 16, 24))
QUICK = ((2, 32, 16, 16),)
_SEED = 11


def _inputs(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """([x, beta, gamma], gradient of y), parameters as they are stored."""
    g = torch.Generator().manual_seed(_SEED)
    C = shape[1]
    x, grad = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(2))
    gamma = 0.3 * torch.eye(C) + 0.3 / C**0.5 * (0.01 + torch.rand(C, C, generator=g))
    beta = 0.5 + torch.rand(C, generator=g)
    return [x, beta.to(device), gamma.to(device)], grad


def _plain(inverse: bool) -> Callable[..., Tensor]:
    """The function in plain PyTorch, differentiable; nothing of these inputs lies below its bound."""

    def function(x: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        shift, mix = ((p**2 - 2.0**-36).to(x.dtype) for p in (beta, gamma))
        norm = torch.nn.functional.conv2d(x**2, mix[:, :, None, None], shift)
        return x * (norm.sqrt() if inverse else norm.rsqrt())

    return function


def _compressai(inverse: bool, beta: Tensor, gamma: Tensor, dtype: torch.dtype) -> torch.nn.Module:
    module = importlib.import_module("compressai.layers").GDN(len(beta), inverse=inverse).to(beta.device)
    with torch.no_grad():
        module.beta.copy_(beta)
        module.gamma.copy_(gamma)
    return module.to(dtype)


def _step(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], list[Tensor]]:
    """One run forward and backward: y and the gradients of the leaves."""
    x, *_ = leaves

    def run() -> list[Tensor]:
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return run


def _peers(
    case: Callable[..., Case], values: Sequence[Tensor], grad: Tensor, inverse: bool, settings: Settings
) -> tuple[list[Case], dict[str, str]]:
    if importlib.util.find_spec("compressai") is None:
        return [], {"CompressAI": "compressai is not installed; run: pip install compressai"}
    x = values[0].clone().requires_grad_()
    module = _compressai(inverse, *values[1:], x.dtype)
    leaves = [x, module.beta, module.gamma]

    def wide(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """The parameters' gradients in the dtype that ours has."""
        return run if x.dtype is torch.float32 else lambda: [t.float() if t.dim() < 4 else t for t in run()]

    cases = [case("CompressAI, eager", wide(_step(module, leaves, grad)))]
    reason = compile_why_not(settings.device)
    if reason is not None:
        return cases, {"CompressAI, torch.compile": reason}
    return [*cases, case("CompressAI, torch.compile", wide(_step(compiled(module), leaves, grad)))], {}


def _expected(values: Sequence[Tensor], grad: Tensor, inverse: bool) -> Expected:
    results = []
    for dtype in (torch.float64, torch.float32 if grad.dtype is torch.float32 else None):
        leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in values]
        function = _plain(inverse)
        upstream = grad.to(leaves[0].dtype)
        results.append(_step(lambda x, f=function, rest=leaves[1:]: f(x, *rest), leaves, upstream)())
    exact, eager = results
    # a factor that is kept in bf16 enters the parameters' sums up to three times
    return Expected.of(exact, eager, [magnitude(t) for t in exact], k=2.0 if grad.dtype is torch.float32 else 8.0)


def _group(shape: Sequence[int], dtype: str, inverse: bool, settings: Settings) -> Group:
    values, grad = _inputs(shape, DTYPES[dtype], settings.device)
    x = values[0]
    # read: x and dy forward and backward (x twice); written: y, dx; the factor both
    moved = 7 * x.nbytes
    flops = 6 * x.shape[1] * x.numel()

    def case(backend: str, run: Callable[[], Any]) -> Case:
        return Case(backend, run, list, moved, flops)

    def ours(recompute: bool) -> Callable[[], list[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in values]
        _, beta, gamma = leaves
        return _step(
            lambda x: functional.gdn(x, beta, gamma, inverse=inverse, recompute=recompute),
            leaves,
            grad,
        )

    usable, left_out = backends("gdn", settings.device, x.dtype)
    cases = [case(OURS + b, forced(b, ours(False))) for b in usable]
    cases += [case(f"{OURS}{b}, recompute", forced(b, ours(True))) for b in usable if b != "reference"]
    peers, missing = _peers(case, values, grad, inverse, settings)
    return Group(
        op="gdn",
        case=f"{'inverse' if inverse else 'normalize'}, forward and backward",
        inputs=str(list(shape)),
        dtype=dtype,
        device=settings.device,
        cases=[*cases, *peers],
        expected=_expected(values, grad, inverse),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape, dtype and direction; the shapes are layers' and do not depend on the models."""
    for shape in QUICK if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            for inverse in (False, True):
                forget_compiled()
                yield _group(shape, dtype, inverse, settings)
