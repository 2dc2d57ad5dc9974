"""sma_update_: the sampling-then-moving average over all parameters of a model, in place, with reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import sma_update_
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

ALPHA = 0.8
_NOISE = 1e-3
_SEED = 7


class _State:
    """Slow and fast weights that are averaged in place, and what they are set back to before each run."""

    def __init__(self, slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
        self._start = ([t.clone() for t in slow], [t.clone() for t in fast])
        self.slow, self.fast = list(slow), list(fast)

    def reset(self) -> None:
        """Puts the starting values back."""
        for state, start in zip((self.slow, self.fast), self._start, strict=True):
            torch._foreach_copy_(state, start)

    def flat(self) -> _State:
        """The same values as one slow and one fast tensor."""
        return _State(*([torch.cat([t.flatten() for t in start])] for start in self._start))

    def results(self) -> list[Tensor]:
        """What an update leaves: the slow weights, then the fast ones."""
        return [*self.slow, *self.fast]


def _start(values: Sequence[Tensor], dtype: torch.dtype) -> _State:
    generator = torch.Generator().manual_seed(_SEED)
    noise = [_NOISE * torch.randn(v.shape, generator=generator) for v in values]
    fast = [(v + n.to(v.device)).to(dtype) for v, n in zip(values, noise, strict=True)]
    return _State(values, fast)


def _per_tensor(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    for s, f in zip(slow, fast, strict=True):
        s.add_((f - s).mul_(ALPHA))
        f.copy_(s)


def _foreach(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    wide = [f if f.dtype == s.dtype else f.to(s.dtype) for s, f in zip(slow, fast, strict=True)]
    torch._foreach_lerp_(slow, wide, ALPHA)
    torch._foreach_copy_(fast, slow)


def _split(flat: _State, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [t.numel() for t in like]
    parts = [part for t in flat.results() for part in t.split(sizes)]
    return [part.view(t.shape) for part, t in zip(parts, [*like, *like], strict=True)]


def _expected(state: _State) -> Expected:
    state.reset()
    exact = [s.double() + ALPHA * (f.double() - s.double()) for s, f in zip(state.slow, state.fast, strict=True)]
    scales = [magnitude(s, f) for s, f in zip(state.slow, state.fast, strict=True)]
    _per_tensor(state.slow, state.fast)
    return Expected.of([*exact, *exact], state.results(), [*scales, *scales])


def _peers(
    case: Callable[..., Case], state: _State, flat: _State, settings: Settings
) -> tuple[list[Case], dict[str, str]]:
    peers = [
        case("eager, tensor by tensor", lambda: _per_tensor(state.slow, state.fast), state),
        case("torch._foreach_lerp_", lambda: _foreach(state.slow, state.fast), state),
    ]
    reason = compile_why_not(settings.device)
    if reason is not None:
        return peers, {"torch.compile": reason}
    one = compiled(lambda slow, fast: _foreach(slow, fast))
    peers.append(case("torch.compile, one flat tensor", lambda: one(flat.slow, flat.fast), flat))
    if settings.quick:
        return peers, {"torch.compile, list": "it compiles for half a minute; --quick leaves it out"}
    whole = compiled(lambda slow, fast: _foreach(slow, fast))
    peers.append(case("torch.compile, list", lambda: whole(state.slow, state.fast), state))
    return peers, {}


def _group(name: str, values: Sequence[Tensor], dtype: str, settings: Settings) -> Group:
    state = _start(values, DTYPES[dtype])
    elements = sum(t.numel() for t in values)
    moved = 2 * sum(t.numel() * t.element_size() for t in state.results())

    def case(backend: str, run: Callable[[], None], on: _State) -> Case:
        def outputs(_: None) -> list[Tensor]:
            return on.results() if on is state else _split(on, values)

        return Case(backend, run, outputs, moved, 3 * elements, on.reset)

    usable, left_out = backends("sma_update_", settings.device, torch.float32)
    ours = [case(OURS + b, forced(b, lambda: sma_update_(state.slow, state.fast, alpha=ALPHA)), state) for b in usable]
    flat = state.flat()  # the same memory for all cases on one flat tensor: where pages lie shows in the figures
    ours += [
        case(f"{OURS}{b}, one flat tensor", forced(b, lambda: sma_update_(flat.slow, flat.fast, alpha=ALPHA)), flat)
        for b in usable
        if b != "reference"
    ]
    peers, missing = _peers(case, state, flat, settings)
    return Group(
        op="sma_update",
        case="update",
        inputs=parameters.label(name, values),
        dtype=dtype,
        device=settings.device,
        cases=[*ours, *peers],
        expected=_expected(state),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model and dtype of the fast weights; the slow ones are fp32."""
    for name, model in settings.models.items():
        for dtype in settings.dtypes:
            forget_compiled()
            yield _group(name, parameters.load(model, device=settings.device), dtype, settings)
