"""lic_fast::factorized_rate and its gradients: the density of CompressAI's EntropyBottleneck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._dispatch import before_falling_back
from ..reference import factorized_rate as reference
from ._library import define
from ._rates import kept, no_second_order, rate_like, samples, spec, upstream, wanted, y_hat_like

__all__ = ["BACKWARD", "FORWARD"]

Optional = Tensor | None
FILTERS = [3, 3, 3, 3]  # those that the kernels keep in registers; the reference takes any


def _forward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`kernel(y, weights, medians, seed, quantize, likelihood_bound, output, y_hat, rate)` fills the last two."""

    def run(
        y: Tensor, weights: Tensor, medians: Optional, seed: Optional, filters: list[int], quantize: int,
        likelihood_bound: float, output: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if list(filters) != FILTERS:
            before_falling_back("factorized_rate", f"it takes filters {tuple(FILTERS)}, got {tuple(filters)}")
            return reference.factorized_rate(y, weights, medians, seed, filters, quantize, likelihood_bound, output)
        y_hat, rate = y_hat_like(y, quantize), rate_like(y, output)
        if not y.numel():
            return y_hat, rate.zero_()
        centre = None if medians is None else medians.contiguous()
        kernel(samples(y), weights.contiguous(), centre, seed, quantize, likelihood_bound, output, y_hat, rate)
        return y_hat, rate

    return run


def _rooms(y: Tensor, weights: Tensor, medians: Optional, need: list[bool]) -> list[Tensor]:
    return [wanted(t, y, needed) for t, needed in zip((y, weights, medians), need, strict=True)]


def _backward(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """`kernel(grad_y_hat, grad_rate, y, ..., output, grad_y, grad_weights, grad_medians)`.

    It fills those of the last three that have elements.
    """

    def run(
        grad_y_hat: Optional, grad_rate: Optional, y: Tensor, weights: Tensor, medians: Optional, seed: Optional,
        filters: list[int], quantize: int, likelihood_bound: float, output: int, need: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if list(filters) != FILTERS:
            return _reference_backward(
                grad_y_hat, grad_rate, y, weights, medians, seed, filters, quantize, likelihood_bound, output, need
            )
        rooms = _rooms(y, weights, medians, need)
        if not y.numel():
            return tuple(room.zero_() for room in rooms)
        centre = None if medians is None else medians.contiguous()
        kernel(
            upstream(grad_y_hat), upstream(grad_rate), samples(y), weights.contiguous(), centre, seed, quantize,
            likelihood_bound, output, *rooms,
        )  # fmt: skip
        return tuple(rooms)

    return run


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, need = args
    return kept(reference.factorized_rate_bwd(*inputs), _rooms(*inputs[2:5], need))


FORWARD = spec("factorized_rate", _forward, "factorized_rate_out", "factorized_rate", reference.factorized_rate)
BACKWARD = spec("factorized_rate_bwd", _backward, "factorized_rate_bwd_out", "factorized_rate", _reference_backward)

_ARGUMENTS = (
    "Tensor y, Tensor weights, Tensor? medians, Tensor? seed, int[] filters, int quantize, float likelihood_bound, "
    "int output"
)
define(
    f"factorized_rate({_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda y, *rest: FORWARD(y, y, *rest),
    lambda y, weights, medians, seed, filters, quantize, likelihood_bound, output: (
        y_hat_like(y, quantize),
        rate_like(y, output),
    ),
)
define(
    f"factorized_rate_bwd(Tensor? grad_y_hat, Tensor? grad_rate, {_ARGUMENTS}, bool[] need)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad_y_hat, grad_rate, y, *rest: BACKWARD(y, grad_y_hat, grad_rate, y, *rest),
    lambda grad_y_hat, grad_rate, y, weights, medians, *rest: tuple(_rooms(y, weights, medians, rest[-1])),
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _gradients(ctx: Any, grad_y_hat: Optional, grad_rate: Optional) -> tuple[Optional, ...]:
    need = list(ctx.needs_input_grad[:3])
    if grad_y_hat is None and grad_rate is None:
        return (None,) * 8
    results = torch.ops.lic_fast.factorized_rate_bwd(grad_y_hat, grad_rate, *ctx.saved_tensors, *ctx.settings, need)
    return (*(result if needed else None for result, needed in zip(results, need, strict=True)), *(None,) * 5)


torch.library.register_autograd("lic_fast::factorized_rate", _gradients, setup_context=_save)
torch.library.register_autograd("lic_fast::factorized_rate_bwd", no_second_order("factorized_rate"))
