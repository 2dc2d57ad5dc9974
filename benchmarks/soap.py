"""soap: whole steps of the optimizer beside Adam, nikhilvyas/SOAP, pytorch_optimizer and HeavyBall, step by step."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import explain
from . import _rows, parameters
from ._harness import CEILING, OURS, Settings, Timing, ceiling_case, cold_caches, collector_off
from ._soap_counts import count_launches, count_ops, counted_qr, state_bytes
from ._soap_inputs import refresh_flops, step_flops, tensors
from ._soap_peers import FAILURES, FREQUENCY, NOISE, Contender, contenders, reason

# The first step only initialises; step 11 is the first with a refresh for every contender: the last of the warm-up.
WARMUP = FREQUENCY + 1
_COUNTED = (3, WARMUP)  # the steps of the warm-up whose ops and launches are counted: an ordinary one, a refresh
_OPS = ("soap_update_", "adam_update_", "refresh_eigenbasis", "rotate_moments_")
_SEED = 17


@dataclass(frozen=True)
class Taken:
    """One timed step: wall clock and the process's CPU time in ms, and whether it refreshed a basis."""

    wall: float
    cpu: float
    refreshed: bool


@dataclass
class Racer:
    """A contender with parameters and state of its own."""

    contender: Contender
    params: list[Parameter]
    optimizer: torch.optim.Optimizer
    taken: list[Taken] = field(default_factory=list)
    ops: dict[bool, int] = field(default_factory=dict)  # by whether the step refreshed
    launches: dict[bool, int | None] = field(default_factory=dict)
    state: int = 0

    @classmethod
    def of(cls, contender: Contender, values: Sequence[Tensor]) -> Racer:
        """With clones of `values`."""
        params = [Parameter(v.clone()) for v in values]
        return cls(contender, params, contender.build(params))

    def feed(self, gradients: Sequence[Tensor], scratch: Sequence[Tensor]) -> None:
        """Gives it the gradients, in memory that it may change, as some do."""
        torch._foreach_copy_(list(scratch), list(gradients))
        for p, g in zip(self.params, scratch, strict=True):
            p.grad = g

    def step(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()

    def count(self, device: torch.device, refreshes: Callable[[], int]) -> None:
        """One step whose ops and launches are counted, and kept by whether it refreshed."""
        before = refreshes()
        launches: list[int | None] = []
        ops = count_ops(lambda: launches.append(count_launches(self.step, device)))
        refreshed = refreshes() > before
        self.ops[refreshed], self.launches[refreshed] = ops, launches[0]

    def refreshes(self, qr_calls: Callable[[], int]) -> Callable[[], int]:
        """What counts up where it refreshes: lic_fast's own count, for the others their calls of torch.linalg.qr."""
        if self.contender.ours:
            return lambda: self.optimizer.refreshed_matrices  # type: ignore[attr-defined]
        return qr_calls

    @property
    def staggered(self) -> bool:
        """Whether most steps refresh a part: no step of those is ordinary."""
        return 2 * sum(t.refreshed for t in self.taken) > len(self.taken)

    def walls(self, refreshed: bool) -> list[float]:
        """Milliseconds of the steps with or without a refresh; without one, where staggered, of all."""
        return [t.wall for t in self.taken if t.refreshed is refreshed or (self.staggered and not refreshed)]


@dataclass
class Race:
    """What a run gave: who came through, the copies' ms, and who failed on the way."""

    racers: list[Racer]
    copies: list[float]
    failed: dict[str, str]


def _clock(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3, time.process_time() * 1e3


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(wall clock, CPU time of the process) of a call in milliseconds, a GPU's work included in the former."""
    wall, cpu = _clock(device)
    run()
    wall_after, cpu_after = _clock(device)
    return wall_after - wall, cpu_after - cpu


class _Course:
    """The gradients, the same for all, and one step of one racer."""

    def __init__(self, values: Sequence[Tensor], device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(_SEED)
        self._gradients, self._scratch = ([torch.empty_like(v) for v in values] for _ in range(2))
        self._flush = cold_caches(device)

    def advance(self) -> None:
        """The next step's gradients: N(0, 1) * NOISE."""
        for g in self._gradients:
            g.normal_(generator=self._generator).mul_(NOISE)

    def drive(self, racer: Racer, step: int, qr_calls: Callable[[], int]) -> None:
        """Step number `step` of a racer: plain or counted in the warm-up, then timed."""
        racer.feed(self._gradients, self._scratch)
        refreshes = racer.refreshes(qr_calls)
        if step in _COUNTED:
            racer.count(self._device, refreshes)
        elif step <= WARMUP:
            racer.step()
        else:
            before = refreshes()
            self._flush()
            wall, cpu = _timed(racer.step, self._device)
            racer.taken.append(Taken(wall, cpu, refreshes() > before))


def race(entered: Sequence[Contender], values: Sequence[Tensor], steps: int, settings: Settings) -> Race:
    """Every contender takes its step t before any takes t + 1, and a copy is timed with each.

    A peer that raises is out of the race; an error of ours is raised.
    """
    result = Race([Racer.of(contender, values) for contender in entered], [], {})
    course = _Course(values, settings.device)
    ceiling = ceiling_case(settings.device, settings.ceiling_mib)
    with collector_off(), counted_qr() as qr_calls:
        for step in range(1, WARMUP + steps + 1):
            course.advance()
            if step > WARMUP:
                result.copies.append(_timed(ceiling.run, settings.device)[0])
            for racer in list(result.racers):
                try:
                    course.drive(racer, step, qr_calls)
                except FAILURES as error:
                    if racer.contender.ours:
                        raise
                    result.failed[racer.contender.name] = f"its step {step} fails, {reason(error)}"
                    result.racers.remove(racer)
            gc.collect()
    for racer in result.racers:
        racer.state = state_bytes(racer.optimizer)
    return result


@dataclass(frozen=True)
class Work:
    """The least that a step must do: bytes, and useful flops (see step_flops, refresh_flops)."""

    bytes: int
    flops: int
    refresh_flops: int

    @classmethod
    def of(cls, racer: Racer) -> Work:
        """Parameters and state are read and written, gradients and Q read."""
        moved = 7 * sum(p.nbytes for p in racer.params)
        shapes = [tuple(p.shape) for p in racer.params]
        if not racer.contender.preconditioned:
            return cls(moved, 20 * sum(p.numel() for p in racer.params), 0)
        factors = sum(4 * d * d for shape in shapes for d in shape if len(shape) > 1 and d > 1)
        return cls(moved + 3 * factors, step_flops(shapes), refresh_flops(shapes))


def _cells(racer: Racer, copied: float) -> dict[str, str]:
    """The measured columns of a racer's row; copied: GB/s of the copy."""
    work = Work.of(racer)
    ordinary, refresh = Timing.of(racer.walls(False)), racer.walls(True)
    period = statistics.fmean(t.wall for t in racer.taken)
    flops = work.flops + (work.refresh_flops // FREQUENCY if racer.staggered else 0)
    gbps = work.bytes / ordinary.median / 1e6
    first = next(iter(racer.ops))
    cells = {
        "backend": racer.contender.name, "median_ms": ordinary.median, "p20_ms": ordinary.p20, "p80_ms": ordinary.p80,
        "gbps": gbps, "ceiling_gbps": copied, "fraction": gbps / copied, "repeats": len(racer.taken),
        "bytes": work.bytes, "flops": flops, "period_ms": period,
        "refresh_ms": statistics.median(refresh) if refresh else None,
        "slowest_ms": max(t.wall for t in racer.taken), "cpu_ms": statistics.fmean(t.cpu for t in racer.taken),
        "refreshes": sum(t.refreshed for t in racer.taken), "gflops": flops / ordinary.median / 1e6,
        "period_gflops": (work.flops + work.refresh_flops / FREQUENCY) / period / 1e6,
        "refresh_flops": work.refresh_flops, "state_bytes": racer.state,
        "ops": racer.ops.get(False, racer.ops[first]), "refresh_ops": racer.ops.get(True),
        "launches": racer.launches.get(False, racer.launches[first]), "refresh_launches": racer.launches.get(True),
    }  # fmt: skip
    return {name: _text(value) for name, value in cells.items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _chosen(device: torch.device) -> str:
    """The backends of the ops behind lic_fast's rows."""
    return ", ".join(f"{op}: {explain(op, device).chosen}" for op in _OPS)


def _row_cells(result: Race, settings: Settings) -> list[dict[str, str]]:
    """The cells that tell the rows apart, the copy's first, fastest period first."""
    moved = ceiling_case(torch.device("meta"), settings.ceiling_mib).bytes
    copy = Timing.of(result.copies)
    copied = moved / copy.median / 1e6
    racers = [
        {**_cells(r, copied), "chosen": _chosen(settings.device) if r.contender.ours else ""} for r in result.racers
    ]
    ceiling = {
        "backend": CEILING, "median_ms": copy.median, "p20_ms": copy.p20, "p80_ms": copy.p80, "gbps": copied,
        "ceiling_gbps": copied, "fraction": 1.0, "repeats": len(result.copies), "bytes": moved, "flops": 0,
    }  # fmt: skip
    first = {name: _text(value) for name, value in ceiling.items()}
    return [first, *sorted(racers, key=lambda row: float(row["period_ms"]))]


_SHOWN = {
    "median_ms": "ordinary ms", "period_ms": "mean ms", "refresh_ms": "refresh ms", "slowest_ms": "slowest ms",
    "cpu_ms": "CPU ms", "refreshes": "refreshes", "gflops": "GFLOPS", "state_bytes": "state MB", "ops": "ops",
    "refresh_ops": "refresh ops", "launches": "launches", "refresh_launches": "refresh launches",
}  # fmt: skip


def _shown(name: str, value: str) -> str:
    if not value:
        return "-"
    if name == "state_bytes":
        return f"{int(value) / 1e6:.1f}"
    return f"{float(value):.2f}" if name.endswith("_ms") or name == "gflops" else value


def _table(head: str, rows: Sequence[dict[str, str]], left_out: dict[str, str], refused: dict[str, str]) -> str:
    racers = [row for row in rows if row["backend"] != CEILING]
    shown = {name: title for name, title in _SHOWN.items() if any(row.get(name) for row in racers)}
    lines = [["", *shown.values()]]
    for row in racers:
        star = "*" if row["backend"].startswith(OURS) else " "
        lines.append([f"{star} {row['backend']}", *(_shown(name, row.get(name, "")) for name in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [head]
    for first, *others in lines if racers else []:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([f"  {first:{widths[0]}}", *cells]))
    text += [f"    left out: {name}: {why}" for name, why in left_out.items()]
    text += [f"  ! REFUSED: {name}: {why}" for name, why in refused.items()]
    return "\n".join(text)


def comparisons(settings: Settings) -> Iterator[tuple[list[dict[str, str]], str, int]]:
    """For each model its rows, the same as text, and how many of lic_fast's contenders are refused. fp32 only.

    Timed are whole periods of FREQUENCY steps, at least settings.repeats steps of each contender.
    """
    steps = FREQUENCY * -(-settings.repeats // FREQUENCY)
    entered, left_out, refused = contenders(settings.device)
    for name, model in settings.models.items():
        values = tensors(model, settings)
        result = race(entered, values, steps, settings)
        label = parameters.label(name, values)
        same = _rows.shared("soap", f"step, a refresh every {FREQUENCY}", label, "fp32", settings.device)
        rows = [{**same, **cells} for cells in _row_cells(result, settings)]
        where = f"{same['device']}, {same['threads']} threads"
        head = f"soap: {same['case']} | {label} | fp32 | {where} | {_chosen(settings.device)}"
        yield rows, _table(head, rows, left_out | result.failed, refused), len(refused)
        del result
