"""soap_update_: an ordinary step of SOAP over all preconditioned tensors of a model, in place, with reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import soap_update_
from ..reference.soap_update import soap_update_ as specification
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude
from ._soap_inputs import BETA1, BETA2, EPS, LR, WEIGHT_DECAY, Walked, step_flops, step_size, tensors, turned

Stack = tuple[list[int], Tensor, Tensor, list[Tensor | None], list[Tensor | None]]


def _batched(params: Sequence[Tensor], grads: Sequence[Tensor], stacks: Sequence[Stack]) -> None:
    """The same step in PyTorch, batched by shape: one bmm for each axis of each shape. It skips no gradient."""
    for places, m, v, GG, Q in stacks:
        g = torch.stack([grads[i] for i in places]).to(m.dtype)
        x = turned(g, Q)
        m.lerp_(x, 1 - BETA1)
        v.mul_(BETA2).addcmul_(x, x, value=1 - BETA2)
        update = turned(m / v.sqrt().add_(EPS), Q, back=True)
        _apply([params[i] for i in places], update)
        for axis, factor in enumerate(GG):
            if factor is not None:
                rows = g.movedim(axis + 1, 1).flatten(2) if g.dim() > 2 else g.unsqueeze(-1)
                factor.baddbmm_(rows, rows.mT, beta=BETA2, alpha=1 - BETA2)


def _apply(params: list[Tensor], update: Tensor) -> None:
    if params[0].dtype is update.dtype:
        torch._foreach_add_(params, list(update.unbind()), alpha=-step_size())
        torch._foreach_mul_(params, 1 - LR * WEIGHT_DECAY)
    else:
        value = torch.stack(params).to(update.dtype).sub_(update, alpha=step_size()).mul_(1 - LR * WEIGHT_DECAY)
        torch._foreach_copy_(params, list(value.unbind()))


def _expected(state: Walked) -> Expected:
    state.reset()
    lists = (state.params, state.grads, state.exp_avg, state.exp_avg_sq, state.GG, state.Q)
    p, g, m, v, gg, q = ([x.double() for x in tensors] for tensors in lists)
    specification(p, g, m, v, gg, q, state.counts.clone(), state.hyper, True, False, "ieee")
    exact = [*p, *m, *v, *(x for x in gg if x.numel())]
    scales = [magnitude(x) for x in exact]
    specification(*lists, state.counts, state.hyper, True, False, "ieee")
    expected = Expected.of(exact, state.results(), scales)
    # Dividing by the root of a small average makes the largest error of one tensor's update a matter of luck, for all
    # contenders alike. The updates of all tensors are of one size, that of lr: their worst error is the measure.
    worst = max(expected.budgets[: len(p)])
    return Expected(expected.exact, [worst] * len(p) + expected.budgets[len(p) :], expected.dtypes)


def _peers(case: Callable[..., Case], state: Walked, settings: Settings) -> tuple[list[Case], dict[str, str]]:
    stacks = [(a.places, a.exp_avg, a.exp_avg_sq, a.GG, a.Q) for a in state.alike]
    peers = [case("torch.bmm, batched by shape", lambda: _batched(state.params, state.grads, stacks))]
    reason = compile_why_not(settings.device)
    if reason is None and settings.quick:
        reason = "it compiles for a minute; --quick leaves it out"
    if reason is not None:
        return peers, {"torch.compile, batched by shape": reason}
    whole = compiled(_batched)
    return [*peers, case("torch.compile, batched by shape", lambda: whole(state.params, state.grads, stacks))], {}


def _ours(case: Callable[..., Case], state: Walked, usable: Sequence[str], device: torch.device) -> list[Case]:
    lists = (state.params, state.grads, state.exp_avg, state.exp_avg_sq, state.GG, state.Q)

    def step(precision: str) -> None:
        soap_update_(*lists, state.counts, state.hyper, precision=precision)

    cases = [case(OURS + b, forced(b, lambda: step("tf32x3"))) for b in usable]
    if device.type == "cuda":  # tf32 alone is no fp32: it would not pass the check
        cases += [case(f"{OURS}{b}, ieee", forced(b, lambda: step("ieee"))) for b in usable if b != "reference"]
    return cases


def _group(name: str, values: Sequence[Tensor], dtype: str, settings: Settings) -> Group:
    state = Walked(values, DTYPES[dtype])
    # params, both averages and GG are read and written, gradients and Q read
    moved = sum(2 * x.nbytes for x in state.results()) + sum(x.nbytes for x in [*state.grads, *state.Q])
    flops = step_flops(state.shapes)

    def case(backend: str, run: Callable[[], None]) -> Case:
        return Case(backend, run, lambda _: state.results(), moved, flops, state.reset)

    usable, left_out = backends("soap_update_", settings.device, DTYPES[dtype])
    peers, missing = _peers(case, state, settings)
    return Group(
        op="soap_update",
        case="ordinary step",
        inputs=parameters.label(name, state.params),
        dtype=dtype,
        device=settings.device,
        cases=[*_ours(case, state, usable, settings.device), *peers],
        expected=_expected(state),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model and dtype of the weights and gradients; the state is fp32."""
    for name, model in settings.models.items():
        for dtype in settings.dtypes:
            forget_compiled()
            yield _group(name, tensors(model, settings), dtype, settings)
