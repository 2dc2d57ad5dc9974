"""rls_update_: an epoch's least-squares step of the coefficients of all parameters of a model, in place, with reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..functional import FlatLayout, rls_update_
from ..reference.rls_update import rls_update_ as specification
from . import parameters
from ._contenders import DTYPES, backends, compile_why_not, compiled, forced, forget_compiled
from ._harness import OURS, Case, Expected, Group, Settings, magnitude

MODES = 10
TIED = (0, 50)  # percent
_SPREAD = 0.05  # of the reference values, near that of convolution weights
_SEED = 19
_FLOPS = 8  # an element's


class _Inputs:
    """A model whose elements are all embeddable, and the same as dense tensors [elements] for the peers."""

    def __init__(self, values: Sequence[Tensor], dtype: torch.dtype, percent: int) -> None:
        generator, device = torch.Generator().manual_seed(_SEED), values[0].device
        self.params = [v.to(dtype) for v in values]
        layout = FlatLayout([v.numel() for v in values])
        code = layout.new_code()
        for part in layout.split(code):
            tied = torch.rand(part.shape, generator=generator) < percent / 100
            part.copy_(torch.randint(MODES, part.shape, generator=generator, dtype=torch.uint8) | tied * layout.TIED)
        self.base = layout.base_of(code).to(device)
        self.k, self.d = (torch.randn(layout.elements, generator=generator).to(device) for _ in "kd")
        self.gains = (_SPREAD * torch.randn(MODES, 4, generator=generator, dtype=torch.float64)).to(device)
        self.code = code.to(device)
        self.free = self.code < layout.STATELESS
        self.change = torch.empty(len(code), device=device)
        own = torch.cat(layout.split(self.code))
        self.mode, self.moves = (own & layout.OUTSIDE).int(), own < layout.STATELESS
        self.flat = torch.cat([p.flatten() for p in self.params])
        self.distance = torch.empty_like(self.k)
        self._start = (self.k.clone(), self.d.clone())

    def reset(self) -> None:
        """Puts the starting coefficients back."""
        for x, start in zip((self.k, self.d), self._start, strict=True):
            x.copy_(start)

    def ours(self) -> None:
        """The op."""
        rls_update_(self.params, self.code, self.base, self.k, self.d, self.gains, self.change)

    def dense(self) -> tuple[Tensor, ...]:
        """What the peers take beside the weights."""
        return self.mode, self.moves, self.k, self.d, self.gains, self.distance


def _dense(w: Tensor, mode: Tensor, moves: Tensor, k: Tensor, d: Tensor, gains: Tensor, distance: Tensor) -> None:
    """The same on tensors [elements] in PyTorch."""
    r, g0, g1, norm = (gains[:, i].contiguous() for i in range(4))
    e = (w.double() - k.double() * r.index_select(0, mode)) - d.double()
    distance.copy_(torch.where(moves, e.abs() * norm.index_select(0, mode), float("inf")))
    k.copy_(torch.where(moves, k + e * g0.index_select(0, mode), k.double()))
    d.copy_(torch.where(moves, d + e * g1.index_select(0, mode), d.double()))


def _expected(x: _Inputs) -> Expected:
    x.reset()
    wide, change = [x.k.double(), x.d.double()], x.change.double()
    specification([p.double() for p in x.params], x.code, x.base, *wide, x.gains, change)
    exact = [*wide, change[x.free]]
    specification(x.params, x.code, x.base, x.k, x.d, x.gains, x.change)
    return Expected.of(exact, [x.k, x.d, x.change[x.free]], [magnitude(e) for e in exact])


def _group(name: str, values: Sequence[Tensor], dtype: str, percent: int, settings: Settings) -> Group:
    x = _Inputs(values, DTYPES[dtype], percent)
    moved = x.flat.nbytes + x.code.nbytes + 2 * (x.k.nbytes + x.d.nbytes) + x.change.nbytes

    def case(backend: str, run: Callable[[], None], dense: bool = False) -> Case:
        def outputs(_: None) -> list[Tensor]:
            return [x.k, x.d, x.distance[x.moves] if dense else x.change[x.free]]

        return Case(backend, run, outputs, moved, _FLOPS * len(x.k), x.reset)

    def eager() -> None:
        _dense(torch.cat([p.flatten() for p in x.params]), *x.dense())

    usable, left_out = backends("rls_update_", settings.device, DTYPES[dtype])
    cases = [case(OURS + b, forced(b, x.ours)) for b in usable]
    cases.append(case("eager, dense coefficients", eager, True))
    reason = compile_why_not(settings.device)
    if reason is None:
        one = compiled(_dense)
        cases.append(case("torch.compile, one flat tensor, dense coefficients", lambda: one(x.flat, *x.dense()), True))
    else:
        left_out["torch.compile"] = reason
    return Group(
        op="rls_update",
        case=f"{percent} % tied",
        inputs=parameters.label(name, values),
        dtype=dtype,
        device=settings.device,
        cases=cases,
        expected=_expected(x),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """One group a model, dtype of its weights and percentage of tied elements; k and d are fp32."""
    for name, model in settings.models.items():
        for dtype in settings.dtypes:
            for percent in TIED:
                forget_compiled()
                yield _group(name, parameters.load(model, device=settings.device), dtype, percent, settings)
