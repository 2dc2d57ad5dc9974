"""adam_update_: Adam as SOAP runs it on what has no preconditioner, in place, with reset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import adam_update_
from ..reference.adam_update import adam_update_ as specification
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude
from ._soap_inputs import BETA1, BETA2, EPS, LR, NOISE, STEP, WEIGHT_DECAY, plan, step_size, tables, tensors

_SEED = 13
_FLOPS = 20  # an element's, as Plan counts them


class _State:
    """Parameters, gradients and both averages, and what they are set back to before each run."""

    def __init__(self, values: Sequence[Tensor], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(_SEED)

        def noise(scale: float) -> list[Tensor]:
            return [(scale * torch.randn(v.shape, generator=generator)).to(v.device) for v in values]

        self.params = [v.to(dtype) for v in values]
        self.grads = [g.to(dtype) for g in noise(NOISE)]
        self.exp_avg, self.exp_avg_sq = noise(0.2 * NOISE), [x.square() for x in noise(NOISE)]
        self.counts, self.hyper = tables(len(values), values[0].device)
        self.steps = [torch.tensor(STEP - 1.0, device=v.device) for v in values]  # as torch.optim keeps them
        self._changed = [*self.results(), self.counts, *self.steps]
        self._start = [x.clone() for x in self._changed]

    def lists(self) -> tuple[list[Tensor], ...]:
        """What every contender takes."""
        return self.params, self.grads, self.exp_avg, self.exp_avg_sq

    def results(self) -> list[Tensor]:
        """What a step leaves."""
        return [*self.params, *self.exp_avg, *self.exp_avg_sq]

    def reset(self) -> None:
        """Puts the starting values back."""
        for x, start in zip(self._changed, self._start, strict=True):
            x.copy_(start)


def _fused(state: _State) -> None:
    """torch's fused AdamW with its constants translated, so that it computes what SOAP's Adam does.

    It adds eps after the bias correction and decays the weights first: eps / sqrt(1 - beta2^t) and
    lr * (1 - lr * weight_decay) undo that.
    """
    lr = LR * (1 - LR * WEIGHT_DECAY)
    torch._foreach_add_(state.steps, 1)
    torch._fused_adamw_(
        *state.lists(), [], state.steps, amsgrad=False, lr=lr, beta1=BETA1, beta2=BETA2, maximize=False,
        weight_decay=LR * WEIGHT_DECAY / lr, eps=EPS / math.sqrt(1 - BETA2**STEP), grad_scale=None, found_inf=None,
    )  # fmt: skip


def _foreach(p: Sequence[Tensor], g: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    wide = g if g[0].dtype is m[0].dtype else [x.to(m[0].dtype) for x in g]
    torch._foreach_lerp_(m, wide, 1 - BETA1)
    torch._foreach_mul_(v, BETA2)
    torch._foreach_addcmul_(v, wide, wide, 1 - BETA2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_add_(denominator, EPS)
    target = p if p[0].dtype is m[0].dtype else [x.to(m[0].dtype) for x in p]
    torch._foreach_addcdiv_(target, m, denominator, -step_size())
    torch._foreach_mul_(target, 1 - LR * WEIGHT_DECAY)
    if target is not p:
        torch._foreach_copy_(p, target)


def _expected(state: _State) -> Expected:
    state.reset()
    wide = [[x.double() for x in tensors] for tensors in state.lists()]
    specification(*wide, state.counts.clone(), state.hyper, True, False)
    exact = [*wide[0], *wide[2], *wide[3]]
    specification(*state.lists(), state.counts, state.hyper, True, False)
    return Expected.of(exact, state.results(), [magnitude(x) for x in exact])


def _peers(case: Callable[..., Case], state: _State, settings: Settings) -> tuple[list[Case], dict[str, str]]:
    peers, missing = [case("torch._foreach_", lambda: _foreach(*state.lists()))], {}
    if state.params[0].dtype is torch.float32:
        peers.append(case("torch._fused_adamw_", lambda: _fused(state)))
    else:
        missing["torch._fused_adamw_"] = "it wants both averages in the dtype of the weights"
    reason = compile_why_not(settings.device)
    if reason is None and settings.quick:
        reason = "it compiles for half a minute; --quick leaves it out"
    if reason is not None:
        return peers, {**missing, "torch.compile": reason}
    whole = compiled(_foreach)
    return [*peers, case("torch.compile", lambda: whole(*state.lists()))], missing


def _group(case_name: str, name: str, values: Sequence[Tensor], dtype: str, settings: Settings) -> Group:
    state = _State(values, DTYPES[dtype])
    moved = sum(2 * x.nbytes for x in state.results()) + sum(x.nbytes for x in state.grads)
    flops = _FLOPS * sum(x.numel() for x in state.params)

    def case(backend: str, run: Callable[[], None]) -> Case:
        return Case(backend, run, lambda _: state.results(), moved, flops, state.reset)

    def step() -> None:
        adam_update_(*state.lists(), state.counts, state.hyper)

    usable, left_out = backends("adam_update_", settings.device, DTYPES[dtype])
    peers, missing = _peers(case, state, settings)
    return Group(
        op="adam_update",
        case=case_name,
        inputs=parameters.label(name, values),
        dtype=dtype,
        device=settings.device,
        cases=[*(case(OURS + b, forced(b, step)) for b in usable), *peers],
        expected=_expected(state),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """For each model and dtype of its weights: the tensors that SOAP does not precondition, and all of them."""
    for name, model in settings.models.items():
        for dtype in settings.dtypes:
            values = tensors(model, settings)
            plain = [v for v in values if not plan(v.shape).preconditioned]
            for case_name, chosen in (("tensors without a preconditioner", plain), ("all tensors", values)):
                if chosen:
                    forget_compiled()
                    yield _group(case_name, name, chosen, dtype, settings)
