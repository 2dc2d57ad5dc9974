"""One interleaved run of cases on the same inputs: checked against fp64 first, then timed."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS = "lic_fast."
CEILING = "copy_ (ceiling)"
LONG_MS = 10_000.0
_MIB = 1 << 20


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One contender: what is timed, what it must have computed, and what it moves at the least.

    run: the timed call. outputs: from what `run` returned, the tensors to check. bytes, flops: of one run,
    every input read once and every output written once. prepare: called before every run, untimed.
    """

    backend: str
    run: Callable[[], Any]
    outputs: Callable[[Any], Sequence[Tensor]]
    bytes: int
    flops: int
    prepare: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Expected:
    """The fp64 result, and for each of its tensors the largest error that is let through."""

    exact: list[Tensor]
    budgets: list[float]
    dtypes: list[torch.dtype]

    @classmethod
    def of(cls, exact: Sequence[Tensor], eager: Sequence[Tensor], scales: Sequence[float], k: float = 2.0) -> Expected:
        """err(ours, fp64) <= k * err(eager, fp64) + 4 * eps(fp32) * scale, tensor by tensor.

        err: the largest error. eager: PyTorch's result in the dtype of the run. scales: the magnitude of the
        terms of each sum.
        """
        tiny = 4 * torch.finfo(torch.float32).eps
        budgets = [k * _error(e, x) + tiny * scale for e, x, scale in zip(eager, exact, scales, strict=True)]
        return cls(list(exact), budgets, [e.dtype for e in eager])

    def poison(self) -> None:
        """Fills memory that the allocator hands out next with NaN, so that an unwritten output shows."""
        held = [
            torch.full(x.shape, math.nan, dtype=dtype, device=x.device)
            for x, dtype in zip(self.exact, self.dtypes, strict=True)
        ]
        del held

    def complaint(self, outputs: Sequence[Tensor]) -> str | None:
        """What is wrong with `outputs`, or None."""
        if len(outputs) != len(self.exact):
            return f"{len(outputs)} results instead of {len(self.exact)}"
        for i, (out, exact) in enumerate(zip(outputs, self.exact, strict=True)):
            if out.shape != exact.shape or out.dtype != self.dtypes[i]:
                return f"result {i} is {out.dtype} {list(out.shape)}, not {self.dtypes[i]} {list(exact.shape)}"
            error = _error(out, exact)
            if not error <= self.budgets[i]:
                return f"result {i} is off by {error:.3g}, more than the {self.budgets[i]:.3g} let through"
        return None


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().max()) if exact.numel() else 0.0


def magnitude(*tensors: Tensor) -> float:
    """The largest absolute value in the tensors."""
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


@dataclass(frozen=True)
class Group:
    """The cases that are compared with each other in one interleaved run; left_out: backend -> reason."""

    op: str
    case: str
    inputs: str
    dtype: str
    device: torch.device
    cases: list[Case]
    expected: Expected
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. models: name -> function that returns fp32 tensors; tied: percentages."""

    models: Mapping[str, Callable[[], Sequence[Tensor]]]
    dtypes: Sequence[str] = ("fp32",)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 30
    tied: Sequence[int] = (50,)
    quick: bool = False
    ceiling_mib: int = 256
    output: Path = Path("lic_fast_results")


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repetitions of one case."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Percentiles by linear interpolation between the sorted samples."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), cuts[0], cuts[3], len(samples))

    @property
    def spread(self) -> float:
        """The distance from p20 to p80 as a fraction of the median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Result:
    """A case that was checked and timed; ceiling: the copy bandwidth in GB/s, measured in the same run."""

    case: Case
    timing: Timing
    ceiling: float

    @property
    def gbps(self) -> float:
        return self.case.bytes / self.timing.median / 1e6

    @property
    def fraction(self) -> float:
        return self.gbps / self.ceiling


@dataclass(frozen=True)
class Outcome:
    """What came of a group: results fastest first, and the cases refused because their result was wrong."""

    results: list[Result]
    refused: dict[str, str]


def wall_timer(clock: Callable[[], float] = time.perf_counter) -> Callable[[Callable[[], Any]], float]:
    """Times one call in milliseconds by a host clock; the result is freed after the clock is read."""

    def timed(run: Callable[[], Any]) -> float:
        start = clock()
        result = run()
        stop = clock()
        del result
        return (stop - start) * 1e3

    return timed


def _event_timed(run: Callable[[], Any]) -> float:
    """Times one call in milliseconds by CUDA events on an idle device, so that launching counts too."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = run()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop)


def _last_level_cache(device: torch.device) -> int:
    """Bytes of L2 on CUDA, of L3 on the CPU (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text().strip() if path.is_file() else "32768K"
    return int(text.removesuffix("K")) * 1024


def cold_caches(device: torch.device) -> Callable[[], None]:
    """A function that reads a buffer of twice the last-level cache.

    It only reads: lines left dirty would be written back inside the timed region.
    """
    buffer = torch.ones(2 * _last_level_cache(device) // 4, device=device)
    return lambda: float(buffer.sum()) and None


def ceiling_case(device: torch.device, mib: int) -> Case:
    """The measured ceiling: a copy_ of `mib` MiB, bytes read plus bytes written."""
    source = torch.rand(mib * _MIB // 4, device=device)
    target = torch.empty_like(source)
    return Case(CEILING, lambda: target.copy_(source), lambda out: [out], 2 * mib * _MIB, 0)


@contextmanager
def collector_off() -> Iterator[None]:
    """Within the block Python's garbage collector does not run."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure(
    cases: Sequence[Case],
    repeats: int,
    timer: Callable[[Callable[[], Any]], float],
    flush: Callable[[], None] = _nothing,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Milliseconds by backend: every repetition runs each case once, in turn, with cold caches.

    A case that has taken LONG_MS is left out of the repetitions after its third.
    """
    samples: dict[str, list[float]] = {case.backend: [] for case in cases}
    with collector_off():
        for repeat in range(-warmup, repeats):
            for case in cases:
                if repeat >= 3 and sum(samples[case.backend]) > LONG_MS:
                    continue
                case.prepare()
                flush()
                elapsed = timer(case.run)
                if repeat >= 0:
                    samples[case.backend].append(elapsed)
    return samples


def verified(cases: Sequence[Case], expected: Expected) -> tuple[list[Case], dict[str, str]]:
    """The cases whose result is right, and for the others what is wrong. torch.compile compiles here."""
    right, refused = [], {}
    for case in cases:
        case.prepare()
        expected.poison()
        complaint = expected.complaint(case.outputs(case.run()))
        if complaint is None:
            right.append(case)
        else:
            refused[case.backend] = complaint
    return right, refused


def run_group(
    group: Group,
    settings: Settings,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Outcome:
    """Checks every case, then times the right ones, interleaved with a copy; no result where none is."""
    right, refused = verified(group.cases, group.expected)
    if not right:
        return Outcome([], refused)
    ceiling = ceiling_case(group.device, settings.ceiling_mib)
    if timer is None:
        timer = _event_timed if group.device.type == "cuda" else wall_timer()
    samples = measure([ceiling, *right], settings.repeats, timer, cold_caches(group.device))
    timings = {backend: Timing.of(values) for backend, values in samples.items()}
    copied = ceiling.bytes / timings[CEILING].median / 1e6
    results = [Result(case, timings[case.backend], copied) for case in (ceiling, *right)]
    return Outcome(sorted(results, key=lambda result: result.timing.median), refused)
