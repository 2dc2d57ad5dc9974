"""stdet_adam_step_: Adam, affine reconstruction and moving average of a partly embedded model, in place, with reset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import FlatLayout, stdet_adam_step_
from ..functional.embedding import in_memory_order
from ..reference.stdet import stdet_adam_step_ as specification
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

MODES = 10
LR, BETA1, BETA2, EPS = 1e-4, 0.9, 0.999, 1e-8
ALPHA = 0.8
_STEP = 1000  # steps taken before the timed ones
_NOISE = 1e-3
_SEED = 17
_FLOPS = 16  # an element's: Adam 14, k r + d 2; the average 3 more
# Case -> for each step of a run whether it averages: STDET does every few steps.
RUNS = {
    "adam step": (False,),
    "adam step and average": (True,),
    "5 steps, the last averages": (False, False, False, False, True),
}


def _hyper(step: int, n: int) -> Tensor:
    row = [LR / (1 - BETA1**step), BETA1, BETA2, 1 / math.sqrt(1 - BETA2**step), EPS, 0.0, 0.0]
    return torch.tensor(row, dtype=torch.float64).repeat(n, 1)


class _Parts:
    """The code of a list of parameters: `percent` of what may be embedded is, biases and other vectors may not."""

    def __init__(self, values: Sequence[Tensor], percent: int, generator: torch.Generator) -> None:
        self.layout = FlatLayout([v.numel() for v in values])
        code = self.layout.new_code()
        candidates = []
        for t, (value, part) in enumerate(zip(values, self.layout.split(code), strict=True)):
            if value.dim() < 2:
                continue
            part.copy_(torch.randint(MODES, part.shape, generator=generator, dtype=torch.uint8))
            embedded = torch.rand(part.shape, generator=generator) < percent / 100
            part |= embedded * (FlatLayout.TIED | FlatLayout.STATELESS)
            candidates += [(t, e) for e in torch.randperm(len(part), generator=generator)[:MODES].tolist()]
        self.places = candidates[:: max(1, len(candidates) // MODES)][:MODES]
        for t, e in self.places:
            code[self.layout.starts[t] + e] &= FlatLayout.OUTSIDE
        slots = (code & FlatLayout.STATELESS).eq(0).cumsum(0) - 1
        rows = [[t, e, int(slots[self.layout.starts[t] + e])] for t, e in self.places]
        self.refs = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        self.code, self.base = code, self.layout.base_of(code)

    def packed(self, dense: Sequence[Tensor], bits: int) -> Tensor:
        """The elements that have a place in a compact tensor: those whose code is not `bits` there."""
        chosen = [
            in_memory_order(x)[(c & bits != bits).to(x.device)]
            for x, c in zip(dense, self.layout.split(self.code), strict=True)
        ]
        return torch.cat(chosen)


class _State:
    """A partly embedded model as ours takes it, and with it the dense tensors that the peers take."""

    def __init__(self, values: Sequence[Tensor], dtype: torch.dtype, percent: int) -> None:
        g = torch.Generator().manual_seed(_SEED)
        device = values[0].device
        parts = _Parts(values, percent, g)

        def noise(scale: float) -> list[Tensor]:
            return [torch.empty_like(v).copy_(scale * torch.randn(v.shape, generator=g)) for v in values]

        self.params = [v.to(dtype, copy=True) for v in values]
        self.grads = [x.to(dtype) for x in noise(_NOISE)]
        self.slow = [p.float() + n for p, n in zip(self.params, noise(_NOISE), strict=True)]
        self.exp_avg, self.exp_avg_sq = noise(0.2 * _NOISE), [x.square() for x in noise(_NOISE)]
        self.k, self.d = [1 + n for n in noise(0.1)], noise(0.05)
        self.code, self.base, self.refs = (x.to(device) for x in (parts.code, parts.base, parts.refs))
        self.flat = [parts.packed(x, FlatLayout.OUTSIDE) for x in (self.k, self.d)]
        self.moments = [parts.packed(x, FlatLayout.STATELESS) for x in (self.exp_avg, self.exp_avg_sq)]
        self.hyper = [_hyper(_STEP + 1 + i, len(values)) for i in range(max(map(len, RUNS.values())))]
        self.steps = [torch.tensor(float(_STEP), device=device) for _ in values]  # as torch.optim keeps them
        codes = [c.to(device).view(v.shape) for c, v in zip(parts.layout.split(parts.code), values, strict=True)]
        self.with_tied = [t for t, c in enumerate(codes) if bool((c & FlatLayout.TIED).any())]
        self.tied = [codes[t] & FlatLayout.TIED != 0 for t in self.with_tied]
        self.mode = [(codes[t] & FlatLayout.OUTSIDE).int().flatten() for t in self.with_tied]
        self.places = parts.places
        changed = [*self.params, *self.slow, *self.exp_avg, *self.exp_avg_sq, *self.moments, *self.steps]
        self._changed, self._start = changed, [x.clone() for x in changed]

    def reset(self) -> None:
        """Puts the starting values back."""
        for x, start in zip(self._changed, self._start, strict=True):
            x.copy_(start)

    def ours(self, step: int, averages: bool) -> tuple[Sequence[Tensor] | Tensor, ...]:
        """The arguments of stdet_adam_step_ but its settings."""
        slow = self.slow if averages else []
        return (
            self.params, self.grads, slow, self.code, self.base, *self.flat, *self.moments, self.refs, self.hyper[step]
        )  # fmt: skip

    def bytes(self, averages: bool) -> int:
        """Of one step: every array read once, and what changes written once."""
        changed = [*self.params, *self.moments, *(self.slow if averages else [])]
        return 2 * _size(changed) + _size([*self.grads, self.code, *self.flat])


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _rebuilt(state: _State, tensors: Sequence[Tensor]) -> None:
    """Tied elements of dense tensors, with PyTorch: each operation over all tensors where PyTorch has it so."""
    if not state.with_tied:
        return
    refs = torch.stack([tensors[t].view(-1)[e] for t, e in state.places]).float()
    looked_up = [refs.index_select(0, mode).view(tied.shape) for mode, tied in zip(state.mode, state.tied, strict=True)]
    torch._foreach_mul_(looked_up, [state.k[t] for t in state.with_tied])
    torch._foreach_add_(looked_up, [state.d[t] for t in state.with_tied])
    for t, tied, value in zip(state.with_tied, state.tied, looked_up, strict=True):
        tensors[t].copy_(torch.where(tied, value, tensors[t]))


def _foreach_adam(state: _State, step: int) -> None:
    """As torch.optim.Adam(foreach=True) has it, gradients of embedded weights and all: they are rebuilt anyway."""
    p, g, m, v = state.params, state.grads, state.exp_avg, state.exp_avg_sq
    wide = g if g[0].dtype is m[0].dtype else [x.to(m[0].dtype) for x in g]
    torch._foreach_lerp_(m, wide, 1 - BETA1)
    torch._foreach_mul_(v, BETA2)
    torch._foreach_addcmul_(v, wide, wide, 1 - BETA2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, math.sqrt(1 - BETA2**step))
    torch._foreach_add_(denominator, EPS)
    target = p if p[0].dtype is m[0].dtype else [x.to(m[0].dtype) for x in p]
    torch._foreach_addcdiv_(target, m, denominator, -LR / (1 - BETA1**step))
    if target is not p:
        torch._foreach_copy_(p, target)


def _fused_adam(state: _State, step: int) -> None:
    torch._foreach_add_(state.steps, 1)
    torch._fused_adam_(
        state.params, state.grads, state.exp_avg, state.exp_avg_sq, [], state.steps, amsgrad=False, lr=LR, beta1=BETA1,
        beta2=BETA2, maximize=False, weight_decay=0.0, eps=EPS, grad_scale=None, found_inf=None,
    )  # fmt: skip


def _peer(state: _State, run: Sequence[bool], adam: Callable[[_State, int], None]) -> None:
    for i, averages in enumerate(run):
        adam(state, _STEP + 1 + i)
        if not averages:
            _rebuilt(state, state.params)
            continue
        fast = state.params if state.params[0].dtype is torch.float32 else [p.float() for p in state.params]
        torch._foreach_lerp_(state.slow, fast, ALPHA)
        _rebuilt(state, state.slow)
        torch._foreach_copy_(state.params, state.slow)


def _expected(state: _State, run: Sequence[bool]) -> Expected:
    state.reset()

    def wide(value: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return [x.double() for x in value]

    start = [wide(value) for value in state.ours(0, True)]
    for i, averages in enumerate(run):
        slow = start[2] if averages else []
        specification(*start[:2], slow, *start[3:-1], state.hyper[i], ALPHA, True)
        specification(*state.ours(i, averages), ALPHA, True)
    exact = [*start[0], *(start[2] if any(run) else [])]
    return Expected.of(exact, _results(state, run), [magnitude(x) for x in exact])


def _results(state: _State, run: Sequence[bool]) -> list[Tensor]:
    return [*state.params, *(state.slow if any(run) else [])]


def _peers(
    case: Callable[..., Case], state: _State, run: Sequence[bool], settings: Settings
) -> tuple[list[Case], dict[str, str]]:
    peers, missing = [case("torch._foreach_", lambda: _peer(state, run, _foreach_adam))], {}
    if state.params[0].dtype is torch.float32:
        peers.append(case("torch._fused_adam_", lambda: _peer(state, run, _fused_adam)))
    else:
        missing["torch._fused_adam_"] = "it wants both averages in the dtype of the weights"
    reason = compile_why_not(settings.device)
    if reason is None and settings.quick:
        reason = "it compiles for minutes; --quick leaves it out"
    if reason is None and len(run) > 1:
        reason = "it compiles each step of the run: see the cases of one step"
    if reason is not None:
        return peers, {**missing, "torch.compile": reason}
    whole = compiled(lambda: _peer(state, run, _foreach_adam))
    return [*peers, case("torch.compile", whole)], missing


def _group(name: str, label: str, state: _State, dtype: str, percent: int, settings: Settings) -> Group:
    run = RUNS[name]
    elements = sum(p.numel() for p in state.params)
    moved = sum(state.bytes(averages) for averages in run)
    flops = sum((_FLOPS + 3 * averages) * elements for averages in run)

    def case(backend: str, steps: Callable[[], None]) -> Case:
        return Case(backend, steps, lambda _: _results(state, run), moved, flops, state.reset)

    def ours() -> None:
        for i, averages in enumerate(run):
            stdet_adam_step_(*state.ours(i, averages), alpha=ALPHA, reset=True)

    usable, left_out = backends("stdet_adam_step_", settings.device, DTYPES[dtype])
    peers, missing = _peers(case, state, run, settings)
    return Group(
        op="stdet",
        case=f"{name}, {percent} % embedded",
        inputs=label,
        dtype=dtype,
        device=settings.device,
        cases=[*(case(OURS + b, forced(b, ours)) for b in usable), *peers],
        expected=_expected(state, run),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """For each model, dtype of its weights and embedded percentage: a step, one that averages, and five in a row."""
    for name, model in settings.models.items():
        values = parameters.load(model, device=settings.device, quantiles=False)
        for dtype in settings.dtypes:
            for percent in settings.tied:
                state = _State(values, DTYPES[dtype], percent)
                for run in RUNS:
                    forget_compiled()
                    yield _group(run, parameters.label(name, values), state, dtype, percent, settings)
