"""gaussian_rate and mixture_rate: bits and all gradients of a latent, as one training step has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import gaussian_rate, mixture_rate
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude
from .parameters import _compressai

# A training batch of 256 x 256 crops, and one 2K image: latents of 320 channels at a sixteenth of the size.
LATENTS = {"16 x 320 x 16 x 16": (16, 320, 16, 16), "1 x 320 x 68 x 120": (1, 320, 68, 120)}
QUICK = {"2 x 32 x 8 x 8": (2, 32, 8, 8)}
COMPONENTS = (1, 3)
_SEED = 23
_FLOPS = 150  # an element's and component's, both ways


class _Inputs:
    """Leaves y, scales, means and, for a mixture, weights: latents as a trained model has them.

    Scales from CompressAI's bound to 8, as many in every octave; each latent is drawn from its first component.
    """

    def __init__(self, shape: Sequence[int], k: int, dtype: torch.dtype, device: torch.device) -> None:
        g = torch.Generator().manual_seed(_SEED)
        batch, channels, *rest = shape
        wide = (batch, k * channels, *rest)
        means = torch.randn(wide, generator=g)
        scales = 0.11 * (8 / 0.11) ** torch.rand(wide, generator=g)
        y = means[:, :channels] + scales[:, :channels] * torch.randn(shape, generator=g)
        leaves = [y, scales, means]
        if k > 1:
            weights = torch.rand((batch, k, channels, *rest), generator=g) + 0.05
            leaves.append((weights / weights.sum(1, keepdim=True)).reshape(wide))
        self.leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]

    def ours(self) -> list[Tensor]:
        """Bits, and the gradients by one kernel each way; without noise, so that all contenders agree."""
        run = gaussian_rate if len(self.leaves) == 3 else mixture_rate
        _, bits = run(*self.leaves, bound="compressai", output="bits_per_channel")
        loss = bits.sum()
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]

    def peer(self, likelihood: Callable[..., Tensor]) -> list[Tensor]:
        """The same through CompressAI's likelihood and a logarithm."""
        loss = -likelihood(*self.leaves).log2().sum()
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]


def _likelihood(k: int, device: torch.device) -> Callable[..., Tensor]:
    models = _compressai("entropy_models")
    if k == 1:
        model = models.GaussianConditional(None).to(device)
        return lambda y, s, m: model.likelihood_lower_bound(model._likelihood(y, s, m))
    model = models.GaussianMixtureConditional(K=k).to(device)
    return lambda y, s, m, w: model.likelihood_lower_bound(model._likelihood(y, s, m, w))


def _expected(x: _Inputs, eager: Sequence[Tensor]) -> Expected:
    wide = [leaf.detach().double().requires_grad_() for leaf in x.leaves]
    run = gaussian_rate if len(wide) == 3 else mixture_rate
    _, bits = run(*wide, bound="compressai")
    exact = [bits.sum().detach(), *torch.autograd.grad(bits.sum(), wide)]
    return Expected.of(exact, eager, [magnitude(e) for e in exact], k=4.0)


def _group(name: str, shape: Sequence[int], k: int, dtype: str, settings: Settings) -> Group:
    x = _Inputs(shape, k, DTYPES[dtype], settings.device)
    likelihood = _likelihood(k, settings.device)
    moved = sum(3 * leaf.nbytes for leaf in x.leaves)
    elements = k * x.leaves[0].numel()

    def case(backend: str, run: Callable[[], list[Tensor]]) -> Case:
        return Case(backend, run, lambda out: out, moved, _FLOPS * elements)

    usable, left_out = backends("mixture_rate", settings.device, DTYPES[dtype])
    cases = [case(OURS + b, forced(b, x.ours)) for b in usable]
    cases.append(case("CompressAI", lambda: x.peer(likelihood)))
    reason = compile_why_not(settings.device)
    if reason is None:
        whole = compiled(likelihood)
        cases.append(case("CompressAI, torch.compile", lambda: x.peer(whole)))
    else:
        left_out["torch.compile"] = reason
    return Group(
        op="mixture_rate",
        case="forward and backward, one component" if k == 1 else f"forward and backward, {k} components",
        inputs=name,
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=_expected(x, x.peer(likelihood)),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a latent, number of components and dtype; the models of the settings do not matter."""
    for name, shape in (QUICK if settings.quick else LATENTS).items():
        for k in COMPONENTS:
            for dtype in settings.dtypes:
                forget_compiled()
                yield _group(name, shape, k, dtype, settings)
