"""lic_fast::mixture_rate and its gradients: Gaussian, logistic and Laplace rates, alone (K = 1) or mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import mixture_rate as reference
from ..reference.mixture_rate import GAUSSIAN, LAPLACE, LOGISTIC
from ._library import define
from ._rates import kept, no_second_order, rate_like, samples, spec, upstream, wanted, y_hat_like

__all__ = ["BACKWARD", "FAMILIES", "FORWARD"]

FAMILIES = {"gaussian": GAUSSIAN, "logistic": LOGISTIC, "laplace": LAPLACE}
Optional = Tensor | None


def _slopes_like(y: Tensor, weights: Optional, components: int, slopes: bool) -> Tensor:
    """Room for the derivatives that a forward pass on the CPU leaves; without elements where none are made.

    There a density costs arithmetic, which is done once. On a GPU it costs memory: gradients evaluate the density again
    and read and write a seventh less.
    """
    made = slopes and y.device.type == "cpu"
    shape = (reference.planes(components, weights is None), *y.shape) if made else 0
    return torch.empty(shape, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)


def _forward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`kernel(y, scales, means, weights, seed, families, quantize, ..., y_hat, rate, slopes)` fills the last three."""

    def run(
        y: Tensor, scales: Tensor, means: Optional, weights: Optional, seed: Optional, families: list[int],
        quantize: int, scale_bound: float, likelihood_bound: float, logits: bool, output: int, slopes: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y_hat, rate = y_hat_like(y, quantize), rate_like(y, output)
        room = _slopes_like(y, weights, len(families), slopes)
        if not y.numel():
            return y_hat, rate.zero_(), room
        laid = [None if t is None else samples(t) for t in (y, scales, means, weights)]
        kernel(*laid, seed, families, quantize, scale_bound, likelihood_bound, logits, output, y_hat, rate, room)
        return y_hat, rate, room

    return run


def _reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, slopes = args
    y, weights, families = args[0], args[3], args[5]
    room = _slopes_like(y, weights, len(families), slopes)
    if room.numel():
        room.copy_(reference.mixture_rate_slopes(*inputs))
    return *reference.mixture_rate(*inputs), room


def _rooms(y: Tensor, scales: Tensor, means: Optional, weights: Optional, need: list[bool]) -> list[Tensor]:
    return [wanted(t, y, needed) for t, needed in zip((y, scales, means, weights), need, strict=True)]


def _backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """`kernel(grad_y_hat, grad_rate, slopes, y, ..., output, grad_y, grad_scales, grad_means, grad_weights)`.

    It fills those of the last four that have elements, and reads slopes if they have.
    """

    def run(
        grad_y_hat: Optional, grad_rate: Optional, slopes: Tensor, y: Tensor, scales: Tensor, means: Optional,
        weights: Optional, seed: Optional, families: list[int], quantize: int, scale_bound: float,
        likelihood_bound: float, logits: bool, output: int, need: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rooms = _rooms(y, scales, means, weights, need)
        if not y.numel():
            return tuple(rooms)
        laid = [None if t is None else samples(t) for t in (y, scales, means, weights)]
        kernel(
            upstream(grad_y_hat), upstream(grad_rate), slopes, *laid, seed, families, quantize, scale_bound,
            likelihood_bound, logits, output, *rooms,
        )  # fmt: skip
        return tuple(rooms)

    return run


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    grad_y_hat, grad_rate, slopes, *inputs, need = args
    y, _, _, _, _, families, quantize, _, likelihood_bound, _, output = inputs
    if not slopes.numel():
        slopes = reference.mixture_rate_slopes(*inputs)
    results = reference.mixture_rate_bwd(
        grad_y_hat, grad_rate, slopes, y, len(families), quantize, likelihood_bound, output
    )
    return kept(results, _rooms(*inputs[:4], need))


FORWARD = spec("mixture_rate", _forward, "mixture_rate_out", "mixture_rate", _reference)
BACKWARD = spec("mixture_rate_bwd", _backward, "mixture_rate_bwd_out", "mixture_rate", _reference_backward)

_ARGUMENTS = (
    "Tensor y, Tensor scales, Tensor? means, Tensor? weights, Tensor? seed, int[] families, int quantize, "
    "float scale_bound, float likelihood_bound, bool logits, int output"
)
define(
    f"mixture_rate({_ARGUMENTS}, bool slopes) -> (Tensor, Tensor, Tensor)",
    lambda y, *rest: FORWARD(y, y, *rest),
    lambda y, scales, means, weights, seed, families, quantize, scale_bound, bound, logits, output, slopes: (
        y_hat_like(y, quantize),
        rate_like(y, output),
        _slopes_like(y, weights, len(families), slopes),
    ),
)
define(
    f"mixture_rate_bwd(Tensor? grad_y_hat, Tensor? grad_rate, Tensor slopes, {_ARGUMENTS}, bool[] need)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_y_hat, grad_rate, slopes, y, *rest: BACKWARD(y, grad_y_hat, grad_rate, slopes, y, *rest),
    lambda grad_y_hat, grad_rate, slopes, y, scales, means, weights, *rest: tuple(
        _rooms(y, scales, means, weights, rest[-1])
    ),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *inputs[:5])
    ctx.settings = inputs[5:-1]


def _gradients(ctx: Any, grad_y_hat: Optional, grad_rate: Optional, _: None) -> tuple[Optional, ...]:
    need = list(ctx.needs_input_grad[:4])
    if grad_y_hat is None and grad_rate is None:
        return (None,) * 12
    results = torch.ops.lic_fast.mixture_rate_bwd(grad_y_hat, grad_rate, *ctx.saved_tensors, *ctx.settings, need)
    return (*(result if needed else None for result, needed in zip(results, need, strict=True)), *(None,) * 8)


torch.library.register_autograd("lic_fast::mixture_rate", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::mixture_rate_bwd", no_second_order("mixture_rate"))
