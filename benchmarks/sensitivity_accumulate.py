"""sensitivity_accumulate_: s += |w g| over all parameters of a model, in place, with reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import FlatLayout, sensitivity_accumulate_
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

_SEED = 17


class _State:
    """Sums in one flat tensor as a controller keeps them, weights, gradients; reset puts the sums back."""

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self.params = [p.to(dtype) for p in params]
        self.grads = [torch.randn(p.shape, generator=generator).to(p.device, dtype) for p in params]
        layout = FlatLayout([p.numel() for p in params])
        self.whole = torch.rand(layout.starts[-1], generator=generator).to(params[0].device)
        self.s = layout.split(self.whole)
        self._start = self.whole.clone()
        # the same as single tensors, which is how torch.compile does best
        self.flat = [torch.cat([x.flatten() for x in xs]) for xs in (self.s, self.params, self.grads)]
        self._start_of_flat = self.flat[0].clone()

    def reset(self) -> None:
        """Puts the starting sums back."""
        self.whole.copy_(self._start)
        self.flat[0].copy_(self._start_of_flat)


def _per_tensor(s: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """As one writes it; terms that are not finite are not caught, which spares every peer here a pass."""
    for total, p, g in zip(s, params, grads, strict=True):
        total.add_((p.to(total.dtype) * g.to(total.dtype)).abs_().view(-1))


def _foreach(s: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if params[0].dtype is not s[0].dtype:
        params, grads = ([x.to(s[0].dtype) for x in xs] for xs in (params, grads))
    terms = torch._foreach_mul(params, grads)
    torch._foreach_abs_(terms)
    torch._foreach_add_(s, [x.view(-1) for x in terms])


def _fused(s: Tensor, p: Tensor, g: Tensor) -> None:
    s.add_((p.to(s.dtype) * g.to(s.dtype)).abs())


def _expected(x: _State) -> Expected:
    x.reset()
    exact = [
        s.double() + (p.double() * g.double()).abs().view(-1) for s, p, g in zip(x.s, x.params, x.grads, strict=True)
    ]
    _per_tensor(x.s, x.params, x.grads)
    return Expected.of(exact, x.s, [magnitude(e) for e in exact])


def _peers(case: Callable[..., Case], x: _State, settings: Settings) -> tuple[list[Case], dict[str, str]]:
    peers = [
        case("eager, tensor by tensor", lambda: _per_tensor(x.s, x.params, x.grads)),
        case("torch._foreach_", lambda: _foreach(x.s, x.params, x.grads)),
    ]
    reason = compile_why_not(settings.device)
    if reason is not None:
        return peers, {"torch.compile": reason}
    one = compiled(_fused)
    peers.append(case("torch.compile, one flat tensor", lambda: one(*x.flat), True))
    if settings.quick:
        return peers, {"torch.compile, list": "it compiles for half a minute; --quick leaves it out"}
    whole = compiled(lambda s, params, grads: _foreach(s, params, grads))
    peers.append(case("torch.compile, list", lambda: whole(x.s, x.params, x.grads)))
    return peers, {}


def _group(name: str, values: Sequence[Tensor], dtype: str, settings: Settings) -> Group:
    x = _State(values, DTYPES[dtype])
    elements = x.flat[0].numel()
    moved = 2 * x.flat[0].nbytes + x.flat[1].nbytes + x.flat[2].nbytes

    def case(backend: str, run: Callable[[], None], flat: bool = False) -> Case:
        def outputs(_: None) -> Sequence[Tensor]:
            return x.flat[0].split([p.numel() for p in x.params]) if flat else x.s

        return Case(backend, run, outputs, moved, 3 * elements, x.reset)

    usable, left_out = backends("sensitivity_accumulate_", settings.device, DTYPES[dtype])
    ours = [case(OURS + b, forced(b, lambda: sensitivity_accumulate_(x.s, x.params, x.grads))) for b in usable]
    ours += [
        case(f"{OURS}{b}, one flat tensor", forced(b, lambda: sensitivity_accumulate_(*x.flat)), True)
        for b in usable
        if b != "reference"
    ]
    peers, missing = _peers(case, x, settings)
    return Group(
        op="sensitivity_accumulate",
        case="taylor",
        inputs=parameters.label(name, values),
        dtype=dtype,
        device=settings.device,
        cases=[*ours, *peers],
        expected=_expected(x),
        left_out={**left_out, **missing},
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model and dtype of its weights and gradients; the sums are fp32."""
    for name, model in settings.models.items():
        for dtype in settings.dtypes:
            forget_compiled()
            yield _group(name, parameters.load(model, device=settings.device), dtype, settings)
