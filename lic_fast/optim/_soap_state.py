"""SOAP's state: allocated once, stacked by shape, with a view for each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._soap_plan import Plan


@dataclass(eq=False)
class FactorStack:
    """GG and Q [N, d, d] of all factors of one size that were allocated together."""

    GG: Tensor
    Q: Tensor
    picked: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def rows(self, places: tuple[int, ...]) -> Tensor:
        """The places on the device: sent there once, since that waits, and cannot be recorded in a CUDA graph."""
        if places not in self.picked:
            self.picked[places] = torch.tensor(places, device=self.GG.device)
        return self.picked[places]


@dataclass(eq=False)
class Counts:
    """Steps taken and steps skipped of all parameters of a device, [n, 2] int64. It grows when parameters come in."""

    table: Tensor

    def grow(self, rows: int) -> int:
        """Adds rows of zeros; returns the first. Views of the table of before are stale afterwards."""
        first = len(self.table)
        self.table = torch.cat([self.table, self.table.new_zeros(rows, 2)])
        return first


@dataclass(eq=False)
class Slot:
    """One parameter's place in the stacks. GG, Q and factors have an entry for each walked axis."""

    param: Tensor
    group: int
    plan: Plan
    exp_avg: Tensor
    exp_avg_sq: Tensor
    counts: Counts
    row: int
    GG: list[Tensor] = field(default_factory=list)
    Q: list[Tensor] = field(default_factory=list)
    factors: list[tuple[FactorStack, int] | None] = field(default_factory=list)
    entry: dict[str, Any] | None = None  # what optimizer.state holds of it
    attempts: int = 0  # steps taken or skipped, known without asking the device
    phase: int = 0

    def __post_init__(self) -> None:
        self.kind = (self.param.shape, self.param.dtype, self.param.device)

    def publish(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Makes the entries of `state` those of public(), in the dictionary that is there."""
        if self.entry is None or state.get(self.param) is not self.entry:
            state[self.param] = self.entry = {}
        self.entry.update(self.public())

    def public(self) -> dict[str, Any]:
        """The entries of optimizer.state: views with the parameter's shape, factors in the order of its axes."""
        whole = self.plan.unwalk if self.plan.preconditioned else lambda tensor: tensor
        place = {a: i for i, a in enumerate(self.plan.order)}

        def by_axis(matrices: list[Tensor]) -> list[Any]:
            return [matrices[place[a]] if has else [] for a, has in enumerate(self.plan.factored)]

        return {
            "step": self.counts.table[self.row, 0],
            "skipped": self.counts.table[self.row, 1],
            "phase": self.phase,
            "exp_avg": whole(self.exp_avg),
            "exp_avg_sq": whole(self.exp_avg_sq),
            "GG": by_axis(self.GG),
            "Q": by_axis(self.Q),
        }


def state_dtype(param: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, else fp32."""
    return torch.float64 if param.dtype is torch.float64 else torch.float32


def allocate(requests: Sequence[tuple[Tensor, int, Plan]], counts: dict[torch.device, Counts]) -> list[Slot]:
    """Slots full of zeros for (parameter, group, plan), in that order; equal shapes share a stack."""
    moments = _moment_stacks(requests)
    factors = _factor_stacks(requests)
    rows = {}
    for device in dict.fromkeys(param.device for param, _, _ in requests):
        bank = counts.setdefault(device, Counts(torch.zeros(0, 2, dtype=torch.int64, device=device)))
        needed = sum(param.device == device for param, _, _ in requests)
        rows[device] = iter(range(first := bank.grow(needed), first + needed))
    slots = []
    for i, (param, group, plan) in enumerate(requests):
        slot = Slot(param, group, plan, *moments[i], counts[param.device], next(rows[param.device]))
        if plan.preconditioned:
            none = slot.exp_avg.new_empty(0, 0)
            slot.factors = factors[i]
            slot.GG = [none if f is None else f[0].GG[f[1]] for f in slot.factors]
            slot.Q = [none if f is None else f[0].Q[f[1]] for f in slot.factors]
        slots.append(slot)
    return slots


def _moment_stacks(requests: Sequence[tuple[Tensor, int, Plan]]) -> list[tuple[Tensor, Tensor]]:
    alike: dict[Any, list[int]] = {}
    result: list[Any] = [None] * len(requests)
    for i, (param, _, plan) in enumerate(requests):
        if plan.preconditioned:
            alike.setdefault((param.device, state_dtype(param), plan.sizes), []).append(i)
        else:  # walked flat, in the parameter's own order in memory
            result[i] = tuple(torch.zeros_like(param, dtype=state_dtype(param)) for _ in range(2))
    for (device, dtype, sizes), places in alike.items():
        stacks = torch.zeros(2, len(places), *sizes, dtype=dtype, device=device)
        for row, i in enumerate(places):
            result[i] = (stacks[0, row], stacks[1, row])
    return result


def _factor_stacks(
    requests: Sequence[tuple[Tensor, int, Plan]],
) -> dict[int, list[tuple[FactorStack, int] | None]]:
    alike: dict[Any, list[tuple[int, int]]] = {}
    result: dict[int, list[Any]] = {}
    for i, (param, _, plan) in enumerate(requests):
        if plan.preconditioned:
            result[i] = [None] * len(plan.order)
            for axis, d in enumerate(plan.factor_sizes()):
                if d:
                    alike.setdefault((param.device, state_dtype(param), d), []).append((i, axis))
    for (device, dtype, d), places in alike.items():
        stack = FactorStack(*(torch.zeros(len(places), d, d, dtype=dtype, device=device) for _ in range(2)))
        for row, (i, axis) in enumerate(places):
            result[i][axis] = (stack, row)
    return result


def fill(slot: Slot, state: dict[str, Any]) -> None:
    """Copies a parameter's saved state (ours or nikhilvyas/SOAP's), which misfit has looked at, into its slot."""
    ours = slot.public()
    for name in ("exp_avg", "exp_avg_sq"):
        ours[name].copy_(state[name])
    if slot.plan.preconditioned:
        for name in ("GG", "Q"):
            for mine, saved in zip(ours[name], state[name], strict=True):
                if len(mine):
                    mine.copy_(saved)
    taken, skipped = int(state["step"]), int(state.get("skipped", 0))
    slot.counts.table[slot.row] = torch.tensor([taken, skipped])
    slot.attempts = taken + skipped
    slot.phase = int(state.get("phase", slot.phase))


def misfit(param: Tensor, plan: Plan, state: dict[str, Any]) -> str | None:
    """What about a saved state does not fit a parameter, or None."""
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq", "GG", "Q") if state.get(name) is None]
    if missing:
        return f"{missing[0]} is missing"
    for name in ("step", "skipped", "phase"):
        value = state.get(name, 0)
        if not isinstance(value, (int, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1) or value < 0:
            return f"{name} is {value!r}, not a count"
    for name in ("exp_avg", "exp_avg_sq"):
        value = state[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return f"{name} is no floating tensor"
        if tuple(value.shape) != tuple(param.shape):
            return f"{name} has shape {list(value.shape)}, the parameter {list(param.shape)}"
    return _misfit_of_factors(plan, state)


def _misfit_of_factors(plan: Plan, state: dict[str, Any]) -> str | None:
    for name in ("GG", "Q"):
        saved = state[name]
        if not isinstance(saved, (list, tuple)):
            return f"{name} is no list of factors"
        if not plan.preconditioned:
            sizes = [len(matrix) for matrix in saved if len(matrix) > 1]
            if sizes:
                return f"{name} has a factor of size {sizes[0]}, which the settings here do not make"
            continue
        if len(saved) != len(plan.axes):
            return f"{name} has {len(saved)} factors, the settings here make {len(plan.axes)}"
        for d, has, matrix in zip(plan.axes, plan.factored, saved, strict=True):
            if has and (not isinstance(matrix, Tensor) or tuple(matrix.shape) != (d, d) or matrix.is_complex()):
                return f"{name} has no factor of size {d}, which the settings here make"
            if not has and len(matrix) > 1:
                return f"{name} has a factor of size {len(matrix)}, which the settings here do not make"
    return None
