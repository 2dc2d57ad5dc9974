"""What the benchmarks of SOAP run on: a model's tensors as the optimizer walks them, with factors amid training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optim._soap_plan import Plan, plan_of
from . import parameters
from ._harness import Settings

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.95, 0.95, 1e-8, 0.01
STEP = 21  # the step that is timed, its own count included
NOISE = 1e-3  # the size of a gradient's elements
_DECADES = 3.24  # of a gradient's singular values: a factor's condition is the square, 3e6
_FRESH = 1 - BETA2**10  # the weight in a factor of the gradients since the last refresh
_SEED = 11
_QUICK_ELEMENTS = 1 << 19


def plan(shape: Sequence[int]) -> Plan:
    """The plan that SOAP has for a shape by default."""
    return plan_of(tuple(shape), True, False, False, 10000, False)


def tensors(model: Callable[[], Sequence[Tensor]], settings: Settings) -> list[Tensor]:
    """The parameters of `model` without quantiles; with --quick only the first of each shape, and no large ones."""
    values = parameters.load(model, device=settings.device, quantiles=False)
    if not settings.quick:
        return values
    return list({v.shape: v for v in reversed(values) if v.numel() <= _QUICK_ELEMENTS}.values())[::-1]


def step_size() -> float:
    """lr with the bias corrections of both averages."""
    return LR * math.sqrt(1 - BETA2**STEP) / (1 - BETA1**STEP)


def step_flops(shapes: Sequence[Sequence[int]]) -> int:
    """Useful floating-point operations of an ordinary step, as Plan counts them.

    For each factored axis of length d of a tensor of n elements 5nd (two projections, half a Gram matrix), and 20n.
    """
    return sum(plan(shape).step_flops() for shape in shapes)


def refresh_flops(shapes: Sequence[Sequence[int]]) -> int:
    """What a refresh adds, as Plan counts it: 14 d^3 for each factor, 2nd for the rotation of its moments."""
    return sum(plan(shape).refresh_flops() for shape in shapes)


@functools.lru_cache(maxsize=8)
def _directions(d: int) -> Tensor:
    """Orthonormal directions [d, d], one a row, each scaled by its singular value in the gradients."""
    generator = torch.Generator().manual_seed(_SEED + d)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return basis * torch.logspace(0, -_DECADES, d)[:, None]


@functools.lru_cache(maxsize=64)
def _factors(d: int, first: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED * (first + 1) + d)
    directions = _directions(d)

    def average() -> Tensor:
        rows = torch.randn(4 * d, d, generator=generator) @ directions
        return rows.T @ rows * (NOISE**2 / 4)

    old = average()
    Q = torch.linalg.eigh(old).eigenvectors.flip(-1)
    return old.lerp(average(), _FRESH), Q.contiguous()


def factors(d: int, count: int) -> tuple[Tensor, Tensor]:
    """GG and Q [count, d, d] as a refresh meets them.

    GG averages gradients whose singular values fall by a factor of 1700; Q is the eigenbasis of the GG of ten steps
    before. Eight different pairs at the most, repeated.
    """
    pairs = [_factors(d, i % 8) for i in range(count)]
    return torch.stack([gg for gg, _ in pairs]), torch.stack([q for _, q in pairs])


@dataclass
class Alike:
    """The tensors of one walked shape: their places in the list and their state, stacked.

    GG, Q: for each axis [N, d, d], or None for an axis without a factor.
    """

    places: list[int]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    GG: list[Tensor | None]
    Q: list[Tensor | None]


class Walked:
    """The preconditioned tensors of a model and their state, as SOAP hands them to its ops.

    The lists hold views of the stacks in `alike`: ops on lists and ops on stacks change the same memory.
    """

    def __init__(self, values: Sequence[Tensor], dtype: torch.dtype) -> None:
        chosen = [v for v in values if plan(v.shape).preconditioned]
        self.shapes = [tuple(v.shape) for v in chosen]
        self.device = chosen[0].device if chosen else torch.device("cpu")
        generator = torch.Generator().manual_seed(_SEED)
        self.params = [plan(v.shape).walk(v.to(dtype)) for v in chosen]
        self.grads = [plan(v.shape).walk(self._noise(v, generator).to(dtype)) for v in chosen]
        self.alike = self._stacks(generator)
        self.exp_avg, self.exp_avg_sq = self._views("exp_avg"), self._views("exp_avg_sq")
        self.GG, self.Q = self._factor_views("GG"), self._factor_views("Q")
        self.counts, self.hyper = tables(len(chosen), self.device)
        stacks = [x for a in self.alike for x in (a.exp_avg, a.exp_avg_sq, *a.GG) if x is not None]
        self._changed = [*self.params, *stacks, self.counts]
        self._start = [x.clone() for x in self._changed]

    def _noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return (NOISE * torch.randn(like.shape, generator=generator)).to(self.device)

    def _stacks(self, generator: torch.Generator) -> list[Alike]:
        places: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(self.shapes):
            places.setdefault(plan(shape).sizes, []).append(i)
        result = []
        for sizes, members in places.items():
            # equal sizes may come of different shapes, but not with different factors: length 1 never has one
            pairs = [factors(d, len(members)) if d else None for d in plan(self.shapes[members[0]]).factor_sizes()]
            GG, Q = ([None if p is None else p[side].to(self.device) for p in pairs] for side in (0, 1))
            m, v = (self._noise(torch.empty(len(members), *sizes), generator) for _ in range(2))
            result.append(Alike(members, 0.2 * m, v.square(), GG, Q))
        return result

    def _views(self, name: str) -> list[Tensor]:
        found = {i: getattr(a, name)[row] for a in self.alike for row, i in enumerate(a.places)}
        return [found[i] for i in range(len(self.shapes))]

    def _factor_views(self, name: str) -> list[Tensor]:
        none = torch.empty(0, 0, device=self.device)
        found = {
            i: [none if stack is None else stack[row] for stack in getattr(a, name)]
            for a in self.alike
            for row, i in enumerate(a.places)
        }
        return [x for i in range(len(self.shapes)) for x in found[i]]

    def reset(self) -> None:
        """Puts the starting values back."""
        for x, start in zip(self._changed, self._start, strict=True):
            x.copy_(start)

    def results(self) -> list[Tensor]:
        """What a step changes: params, both averages, and each GG that there is."""
        return [*self.params, *self.exp_avg, *self.exp_avg_sq, *(gg for gg in self.GG if gg.numel())]


def tables(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """counts [count, 2] before step STEP and hyper [count, 6]."""
    row = torch.tensor([LR, BETA1, BETA2, BETA2, EPS, WEIGHT_DECAY], dtype=torch.float64)
    counts = torch.tensor([STEP - 1, 0]).repeat(count, 1)
    return counts.to(device), row.repeat(count, 1).to(device)


def turned(x: Tensor, bases: Sequence[Tensor | None], *, back: bool = False) -> Tensor:
    """x [N, d_1, ..., d_k] with every axis multiplied by its basis^T (its basis where back), one bmm an axis.

    The axis that is multiplied comes first and goes last: after k products all are in their places, uncopied.
    """
    for basis in bases:
        count, d, *rest = x.shape
        x = x.reshape(count, d, -1).mT
        if basis is not None:
            x = x @ (basis.mT if back else basis)
        x = x.unflatten(1, rest) if rest else x.squeeze(1)
    return x
