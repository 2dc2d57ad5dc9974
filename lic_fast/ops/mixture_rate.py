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


def _forward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`kernel(y, scales, means, weights, seed, families, quantize, ..., y_hat, rate)` fills the last two."""

    def run(
        y: Tensor, scales: Tensor, means: Optional, weights: Optional, seed: Optional, families: list[int],
        quantize: int, scale_bound: float, likelihood_bound: float, logits: bool, output: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y_hat, rate = y_hat_like(y, quantize), rate_like(y, output)
        if not y.numel():
            return y_hat, rate.zero_()
        laid = [None if t is None else samples(t) for t in (y, scales, means, weights)]
        kernel(*laid, seed, families, quantize, scale_bound, likelihood_bound, logits, output, y_hat, rate)
        return y_hat, rate

    return run


def _rooms(y: Tensor, scales: Tensor, means: Optional, weights: Optional, need: list[bool]) -> list[Tensor]:
    return [wanted(t, y, needed) for t, needed in zip((y, scales, means, weights), need, strict=True)]


def _backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """`kernel(grad_y_hat, grad_rate, y, ..., output, grad_y, grad_scales, grad_means, grad_weights)`.

    It fills those of the last four that have elements.
    """

    def run(
        grad_y_hat: Optional, grad_rate: Optional, y: Tensor, scales: Tensor, means: Optional, weights: Optional,
        seed: Optional, families: list[int], quantize: int, scale_bound: float, likelihood_bound: float, logits: bool,
        output: int, need: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rooms = _rooms(y, scales, means, weights, need)
        if not y.numel():
            return tuple(rooms)
        laid = [None if t is None else samples(t) for t in (y, scales, means, weights)]
        kernel(
            upstream(grad_y_hat), upstream(grad_rate), *laid, seed, families, quantize, scale_bound, likelihood_bound,
            logits, output, *rooms,
        )  # fmt: skip
        return tuple(rooms)

    return run


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, need = args
    return kept(reference.mixture_rate_bwd(*inputs), _rooms(*inputs[2:6], need))


FORWARD = spec("mixture_rate", _forward, "mixture_rate_out", "mixture_rate", reference.mixture_rate)
BACKWARD = spec("mixture_rate_bwd", _backward, "mixture_rate_bwd_out", "mixture_rate", _reference_backward)

_ARGUMENTS = (
    "Tensor y, Tensor scales, Tensor? means, Tensor? weights, Tensor? seed, int[] families, int quantize, "
    "float scale_bound, float likelihood_bound, bool logits, int output"
)
define(
    f"mixture_rate({_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda y, *rest: FORWARD(y, y, *rest),
    lambda y, scales, means, weights, seed, families, quantize, scale_bound, likelihood_bound, logits, output: (
        y_hat_like(y, quantize),
        rate_like(y, output),
    ),
)
define(
    f"mixture_rate_bwd(Tensor? grad_y_hat, Tensor? grad_rate, {_ARGUMENTS}, bool[] need)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_y_hat, grad_rate, y, *rest: BACKWARD(y, grad_y_hat, grad_rate, y, *rest),
    lambda grad_y_hat, grad_rate, y, scales, means, weights, *rest: tuple(_rooms(y, scales, means, weights, rest[-1])),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _gradients(ctx: Any, grad_y_hat: Optional, grad_rate: Optional) -> tuple[Optional, ...]:
    need = list(ctx.needs_input_grad[:4])
    if grad_y_hat is None and grad_rate is None:
        return (None,) * 11
    results = torch.ops.lic_fast.mixture_rate_bwd(grad_y_hat, grad_rate, *ctx.saved_tensors, *ctx.settings, need)
    return (*(result if needed else None for result, needed in zip(results, need, strict=True)), *(None,) * 7)


torch.library.register_autograd("lic_fast::mixture_rate", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::mixture_rate_bwd", no_second_order("mixture_rate"))
