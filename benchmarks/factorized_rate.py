"""factorized_rate: bits of hyper-latents under CompressAI's EntropyBottleneck, forward and backward with noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional.likelihood import pack_factorized
from ..reference._noise import uniform_noise
from ..reference.factorized_rate import factorized_rate as specification
from ..reference.factorized_rate import factorized_rate_bwd as specification_bwd
from ..reference.factorized_rate import layers
from ._contenders import backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

FILTERS = (3, 3, 3, 3)
SHAPES = ((16, 192, 4, 4), (8, 192, 8, 8), (1, 192, 32, 48), (4, 320, 32, 32))
QUICK = ((4, 192, 4, 4),)
BOUND = 1e-9
_SEED = 5
_FLOPS = 1000  # an element, forward and backward: two walks of about 250 each way


def _inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(y, weights, seed): parameters as EntropyBottleneck starts with them, a little apart."""
    generator = torch.Generator().manual_seed(_SEED)
    y = 3 * torch.randn(shape, generator=generator)
    weights = 0.3 * torch.randn(shape[1], 58, generator=generator)
    for matrix, _, _ in layers(weights, FILTERS):
        matrix -= 1.0  # views: matrices start near this value
    return y.to(device), weights.to(device), torch.tensor([_SEED], device=device)


def _plain(y: Tensor, noise: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """Bits as CompressAI computes them, step by step: two walks, sigmoids, their difference, the bound."""
    values = (y + noise).transpose(0, 1).reshape(y.shape[1], 1, -1)

    def walk(logits: Tensor) -> Tensor:
        for matrix, bias, factor in weights:
            logits = torch.matmul(torch.nn.functional.softplus(matrix), logits) + bias
            if factor is not None:
                logits = logits + torch.tanh(factor) * torch.tanh(logits)
        return logits

    lower, upper = walk(values - 0.5), walk(values + 0.5)
    likelihood = (torch.sigmoid(upper) - torch.sigmoid(lower)).clamp_min(BOUND)
    bits = likelihood.log2().neg()
    return bits.reshape(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1)


def _compressai(weights: Tensor) -> tuple[Any, str | None]:
    """CompressAI's module with these parameters, or the reason that there is none."""
    try:
        from compressai.entropy_models import EntropyBottleneck
    except ImportError:
        return None, "compressai is not installed; run: pip install compressai"
    module = EntropyBottleneck(len(weights), filters=FILTERS).to(weights.device).train()
    kinds: tuple[list[Any], ...] = ([], [], [])
    for name, parameter in module.named_parameters():
        for found, kind in zip(kinds, ("matri", "bias", "factor"), strict=True):
            if kind in name:
                found.append(parameter)
    with torch.no_grad():
        for i, parts in enumerate(layers(weights, FILTERS)):
            for found, part in zip(kinds, parts, strict=True):
                if part is not None:
                    found[i].copy_(part)
    return (module, kinds), None


def _packed(grads: list[Tensor], matrices: int) -> Tensor:
    """Gradients of matrices, biases and factors as one [C, 58]."""
    groups = [grads[:matrices], grads[matrices : 2 * matrices], grads[2 * matrices :]]
    return pack_factorized(*groups)


def _peers(
    case: Callable[..., Case], y: Tensor, weights: Tensor, noise: Tensor, settings: Settings
) -> tuple[list[Case], dict[str, str]]:
    made, reason = _compressai(weights)
    if made is None:
        return [], {"CompressAI, eager": reason, "CompressAI, torch.compile": reason}
    module, (matrices, biases, factors) = made
    leaves = [y, *matrices, *biases, *factors]
    parameters = list(zip(matrices, biases, [*factors, None], strict=True))

    def outputs(found: tuple[Tensor, ...]) -> list[Tensor]:
        return [found[0], found[1], _packed(list(found[2:]), len(matrices))]

    def eager() -> tuple[Tensor, ...]:
        """The module's own code, with the noise handed in."""
        values = (y + noise).transpose(0, 1).reshape(y.shape[1], 1, -1)
        likelihood = module.likelihood_lower_bound(module._likelihood(values)[0])
        bits = likelihood.log2().neg().reshape(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1)
        return (bits.detach(), *torch.autograd.grad(bits.sum(), leaves))

    cases = [case("CompressAI, eager", eager, outputs)]
    reason = compile_why_not(settings.device)
    if reason is None and settings.quick:
        reason = "it compiles for half a minute; --quick leaves it out"
    if reason is not None:
        return cases, {"CompressAI's formula, torch.compile": reason}
    function = compiled(_plain)

    def fused() -> tuple[Tensor, ...]:
        bits = function(y, noise, parameters)
        return (bits.detach(), *torch.autograd.grad(bits.sum(), leaves))

    return [*cases, case("CompressAI's formula, torch.compile", fused, outputs)], {}


def _expected(y: Tensor, weights: Tensor, seed: Tensor, noise: Tensor) -> Expected:
    """fp64 from the specification, with the noise added in fp32; what fp32 loses is what CompressAI's formula loses."""
    wide, value = weights.double(), (y + noise).double()
    one = torch.ones_like(value)
    _, bits = specification(value, wide, None, None, FILTERS, 0, BOUND, 0)
    grad_y, grad_w, _ = specification_bwd(None, one, value, wide, None, None, FILTERS, 0, BOUND, 0)
    leaves = [y.clone().requires_grad_(), weights.clone().requires_grad_()]
    eager = _plain(leaves[0], noise, list(layers(leaves[1], FILTERS)))
    grads = torch.autograd.grad(eager.sum(), leaves)
    scales = [magnitude(bits), magnitude(grad_y), magnitude(grad_w)]
    return Expected.of([bits, grad_y, grad_w], [eager.detach(), *grads], scales)


def _group(shape: tuple[int, ...], settings: Settings) -> Group:
    y, weights, seed = _inputs(shape, settings.device)
    noise = uniform_noise(seed, y, torch.float32)
    expected = _expected(y, weights, seed, noise)
    y.requires_grad_(), weights.requires_grad_()
    moved = 4 * (4 * y.numel() + 2 * weights.numel())  # y twice, bits and y's gradient; parameters and theirs

    def case(backend: str, run: Callable[[], Any], outputs: Callable[[Any], list[Tensor]] = list) -> Case:
        return Case(backend, run, outputs, moved, _FLOPS * y.numel())

    def ours() -> tuple[Tensor, ...]:
        _, bits = functional.factorized_rate(y, weights, quantize="noise", seed=seed, bound=BOUND)
        return (bits.detach(), *torch.autograd.grad(bits.sum(), (y, weights)))

    usable, left_out = backends("factorized_rate", settings.device, torch.float32)
    peers, missing = _peers(case, y, weights, noise, settings)
    return Group(
        op="factorized_rate",
        case="forward and backward",
        inputs=f"latent {list(shape)}",
        dtype="fp32",
        device=settings.device,
        cases=[*(case(OURS + b, forced(b, ours)) for b in usable), *peers],
        expected=expected,
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a shape: hyper-latents of batches of crops and of an image, and a large latent."""
    for shape in QUICK if settings.quick else SHAPES:
        forget_compiled()
        yield _group(shape, settings)
