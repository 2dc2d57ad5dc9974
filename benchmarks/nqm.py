"""The noisy quadratic model: the steady-state variance of SGD, SMA and EMA, simulated beside its closed forms.

`python -m lic_fast.benchmarks.nqm` or `lic-fast bench nqm`. torch.optim.SGD minimizes a/2 x^2 with the gradient
a (x - c), c ~ N(0, 1), alone and within lic_fast.optim.SMA with and without reset, on many independent coordinates in
fp64, on the CPU. The variance is the mean of x^2 over coordinates and cycles; its standard error comes from the
coordinates, which are independent, so that the steps need not be. docs/SMA.md derives the closed forms.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lic_fast import __version__, explain
from lic_fast.optim import SMA
from lic_fast.training.errors import optional_import

from ._rows import RowsError, append, commit, default_output, device_name, now

LR = 0.1  # nothing but lr * a matters; the curvature follows from it
TRANSIENT = 1e-6  # what is left of the start when the measurement begins, relative to the variance
STEPS = 100_000  # a longer burn-in is refused
WRONG = 5.0  # standard errors between simulation and closed form that fail the run
COLUMNS = ("method", "weight", "every", "lr_times_a", "coordinates", "cycles", "burn_in", "seed", "simulated")
COLUMNS += ("standard_error", "closed_form", "difference", "decay", "backend", "dtype", "device", "threads", "torch")
COLUMNS += ("lic_fast", "commit", "utc")


def sgd_variance(lr: float, a: float, sigma: float = 1.0) -> float:
    """Variance of x under x <- rho x + lr a c, rho = 1 - lr a, c of variance sigma^2."""
    return (lr * a * sigma) ** 2 / (1 - (1 - lr * a) ** 2)


def sma_ratio(rho: float, alpha: float, every: int) -> float:
    """Variance of SMA's slow weights (with reset, right after an average) over sgd_variance.

    Zhang et al., NeurIPS 2019, proposition 2, after cancelling 1 - rho^every.
    """
    r = rho**every
    return alpha * (1 + r) / (2 - alpha * (1 - r))


def trained_ratio(rho: float, alpha: float, every: int, after: int) -> float:
    """Variance of the weights that SMA trains, `after` steps after a reset (0 .. every), over sgd_variance."""
    kept = rho ** (2 * after)
    return kept * sma_ratio(rho, alpha, every) + 1 - kept


def ema_ratio(rho: float, weight: float, every: int) -> float:
    """Variance of an average beside the training, weight `weight` on the new point every `every` steps, likewise."""
    kept = (1 - weight) * rho**every
    return weight / (2 - weight) * (1 + kept) / (1 - kept)


def sma_decay(rho: float, alpha: float, every: int) -> float:
    """What `every` steps leave of the mean of SMA's slow weights, as a factor."""
    return 1 - alpha + alpha * rho**every


def ema_decay(rho: float, weight: float, every: int) -> float:
    """What `every` steps leave of the mean of an average beside the training in the end, as a factor's size."""
    return max(1 - weight, abs(rho**every))


def slower_sgd_ratio(rho: float, alpha: float, every: int) -> float:
    """Variance of SGD, at the lower learning rate whose mean decays as SMA's does, over sgd_variance at rho."""
    q = abs(sma_decay(rho, alpha, every)) ** (1 / every)
    return (1 - q) / (1 + q) * (1 + rho) / (1 - rho)


class Method(NamedTuple):
    """What is measured, and the weight of a new point in it."""

    name: str
    weight: float

    @property
    def label(self) -> str:
        return self.name if self.name == "sgd" else f"{self.name} {self.weight:g}"

    def ratio(self, rho: float, every: int) -> float:
        if self.name == "sgd":
            return 1.0
        if self.name == "sma-trained":
            return trained_ratio(rho, self.weight, every, every - 1)
        return (sma_ratio if self.name == "sma" else ema_ratio)(rho, self.weight, every)

    def decay(self, rho: float, every: int) -> float:
        if self.name == "sgd":
            return abs(rho**every)
        return abs((ema_decay if self.name == "ema" else sma_decay)(rho, self.weight, every))


class Problem(NamedTuple):
    """One simulation; curvatures are values of lr * a."""

    curvatures: tuple[float, ...]
    alpha: float = 0.8
    every: int = 5
    coordinates: int = 200_000
    cycles: int = 40
    seed: int = 0

    @property
    def methods(self) -> list[Method]:
        """sma-trained: the weights that SMA trains, every - 1 steps after a reset."""
        weights = [Method("ema", self.alpha), Method("ema", 1 - self.alpha)]
        methods = [Method("sgd", 1.0), Method("sma", self.alpha), Method("sma-trained", self.alpha), *weights]
        return list(dict.fromkeys(methods))

    @property
    def burn_in(self) -> int:
        """Cycles until the start, x = 0, shows by no more than TRANSIENT: variances decay by squares of factors."""
        factors = [m.decay(1 - curvature, self.every) for m in self.methods for curvature in self.curvatures]
        return math.ceil(math.log(TRANSIENT) / (2 * math.log(max(factors))))


class Measured(NamedTuple):
    """A simulated variance, its standard error and its closed form, all over sgd_variance."""

    method: Method
    curvature: float
    simulated: float
    standard_error: float
    closed_form: float

    @property
    def difference(self) -> float:
        """Simulated minus closed form, in standard errors."""
        return (self.simulated - self.closed_form) / self.standard_error


class _Walk:
    """One optimizer with parameters of its own, a parameter a curvature."""

    def __init__(self, method: Method, problem: Problem) -> None:
        self.method = method
        self.params = [Parameter(torch.zeros(problem.coordinates, dtype=torch.float64)) for _ in problem.curvatures]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.params, lr=LR)
        if method.name != "sgd":
            self.optimizer = SMA(self.optimizer, method.weight, problem.every, reset=method.name == "sma")
        self.measured = {method: [torch.zeros_like(p.detach()) for p in self.params]}  # sums of x^2
        if method.name == "sma":
            self.measured[method._replace(name="sma-trained")] = [torch.zeros_like(p.detach()) for p in self.params]

    def step(self, curvatures: Sequence[float], noise: Sequence[Tensor]) -> None:
        for p, curvature, c in zip(self.params, curvatures, noise, strict=True):
            p.grad = (p.detach() - c).mul_(curvature / LR)
        self.optimizer.step()

    def measure(self, name: str) -> None:
        for method, sums in self.measured.items():
            if method.name == name:
                slow = isinstance(self.optimizer, SMA) and name != "sma-trained"
                values = self.optimizer.slow_weights() if slow else self.params
                for total, x in zip(sums, values, strict=True):
                    total.addcmul_(x.detach(), x.detach())


def simulate(problem: Problem) -> list[Measured]:
    """Every method at every curvature: independent noise for each curvature, the same for all methods."""
    walks = [_Walk(method, problem) for method in problem.methods if method.name != "sma-trained"]
    generator = torch.Generator().manual_seed(problem.seed)
    burn_in = problem.burn_in * problem.every
    for step in range(1, burn_in + problem.cycles * problem.every + 1):
        noise = [torch.randn(problem.coordinates, generator=generator, dtype=torch.float64) for _ in problem.curvatures]
        for walk in walks:
            walk.step(problem.curvatures, noise)
            if step > burn_in and (step + 1) % problem.every == 0:
                walk.measure("sma-trained")
            if step > burn_in and step % problem.every == 0:
                walk.measure(walk.method.name)
    sums = {method: totals for walk in walks for method, totals in walk.measured.items()}
    measured = []
    for i, curvature in enumerate(problem.curvatures):
        unit = sgd_variance(LR, curvature / LR) * problem.cycles
        for method in problem.methods:
            each = sums[method][i] / unit
            error = each.std().item() / math.sqrt(problem.coordinates)
            closed_form = method.ratio(1 - curvature, problem.every)
            measured.append(Measured(method, curvature, each.mean().item(), error, closed_form))
    return measured


def _rows(problem: Problem, measured: Sequence[Measured]) -> list[dict[str, str]]:
    shared = {
        "every": problem.every, "coordinates": problem.coordinates, "cycles": problem.cycles,
        "burn_in": problem.burn_in, "seed": problem.seed, "dtype": "fp64", "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "lic_fast": __version__, "commit": commit(),
        "utc": now(),
    }  # fmt: skip
    chosen = str(explain("sma_update_", torch.device("cpu"), torch.float64).chosen)
    return [
        {name: str(value) for name, value in shared.items()}
        | {
            "method": m.method.name, "weight": f"{m.method.weight:g}", "lr_times_a": f"{m.curvature:g}",
            "simulated": f"{m.simulated:.6g}", "standard_error": f"{m.standard_error:.3g}",
            "closed_form": f"{m.closed_form:.6g}", "difference": f"{m.difference:.2f}",
            "decay": f"{m.method.decay(1 - m.curvature, problem.every):.6g}",
            "backend": "" if m.method.name == "sgd" else chosen,
        }
        for m in measured
    ]  # fmt: skip


def _table(problem: Problem, measured: Sequence[Measured]) -> str:
    lines = [("lr * a", "method", "simulated", "closed form", "difference, SE", f"mean after {problem.every} steps")]
    lines += [
        (
            f"{m.curvature:g}", m.method.label, f"{m.simulated:.4f}", f"{m.closed_form:.4f}", f"{m.difference:+.2f}",
            f"{m.method.decay(1 - m.curvature, problem.every):.4f}",
        )
        for m in measured
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _plot(problem: Problem, measured: Sequence[Measured], figure_class: Any, path: Path) -> None:
    figure = figure_class(figsize=(9.5, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = [0.005 * i for i in range(1, 400)]
    for method in problem.methods:
        curve = [method.ratio(1 - x, problem.every) for x in grid]
        (line,) = left.plot(grid, curve, label=method.label, linewidth=1.5)
        mine = [m for m in measured if m.method == method]
        points, colour = [m.curvature for m in mine], line.get_color()
        left.errorbar(
            points, [m.simulated for m in mine], [4 * m.standard_error for m in mine], fmt="o", markersize=4, c=colour
        )
        if method.name != "sma-trained":  # its mean decays as sma's
            decay = [method.decay(1 - x, problem.every) for x in grid]
            right.plot(grid, decay, label=method.label, linewidth=1.5, c=colour)
    slower = [slower_sgd_ratio(1 - x, problem.alpha, problem.every) for x in grid]
    left.plot(grid, slower, "k--", linewidth=0.9, label="sgd slowed to sma's decay")
    left.set(ylabel="variance / variance of SGD", ylim=(0, 1.06))
    right.set(ylabel=f"|factor| on the mean, {problem.every} steps", ylim=(0, 1.06))
    for axis in (left, right):
        axis.set(xlabel="learning rate * curvature", xlim=(0, 2))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    title = f"noisy quadratic model, average every {problem.every} steps: lines closed forms, points simulated"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _problem(argv: Sequence[str] | None) -> tuple[Problem, Path]:
    parser = argparse.ArgumentParser(
        prog="lic-fast bench nqm",
        description="Steady-state variance of SGD, SMA and EMA on the noisy quadratic model, beside its closed forms.",
    )
    parser.add_argument("--alpha", type=float, default=0.8, help="weight of the new point, in (0, 1); default 0.8")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="steps between two averages (5)")
    parser.add_argument(
        "--curvatures", nargs="+", type=float, default=[0.1, 0.3, 0.5, 1.0, 1.5, 1.9], metavar="LR*A",
        help="learning rate times curvature, in (0, 2)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coordinates", type=int, default=None, metavar="N", help="200000; with --quick 10000")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    parser.add_argument("--quick", action="store_true", help="fewer coordinates and cycles; for CI")
    options = parser.parse_args(argv)
    if not 0 < options.alpha < 1:
        parser.error(f"--alpha must be between 0 and 1, both excluded, got {options.alpha}")
    if options.every < 1:
        parser.error(f"--every must be at least 1, got {options.every}")
    if not all(0 < curvature < 2 for curvature in options.curvatures):
        parser.error(f"--curvatures must be between 0 and 2, where SGD converges, got {options.curvatures}")
    if options.coordinates is not None and options.coordinates < 100:
        parser.error(f"--coordinates must be at least 100, for a standard error, got {options.coordinates}")
    coordinates = options.coordinates or (10_000 if options.quick else 200_000)
    curvatures = tuple(sorted(set(options.curvatures)))
    problem = Problem(curvatures, options.alpha, options.every, coordinates, 10 if options.quick else 40, options.seed)
    decays = [m.decay(1 - curvature, problem.every) for m in problem.methods for curvature in curvatures]
    if max(decays) >= 1 or problem.burn_in * problem.every > STEPS:
        parser.error(f"the start would show for more than {STEPS} steps; move --curvatures or --alpha off their limits")
    return problem, options.output or default_output()


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates, prints the table, appends to nqm.csv and draws nqm.png; returns the exit code, 1 where they differ."""
    problem, folder = _problem(argv)
    try:
        figure_class = optional_import("matplotlib.figure").Figure  # a missing package shows before the simulation
        measured = simulate(problem)
        append(folder / "nqm.csv", _rows(problem, measured), COLUMNS)
        _plot(problem, measured, figure_class, folder / "nqm.png")
    except (ImportError, RowsError, OSError) as error:
        print(f"nqm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"variance over SGD's; {problem.coordinates} coordinates, {problem.cycles} cycles of {problem.every} steps")
    print(f"{_table(problem, measured)}\n\nrows: {folder / 'nqm.csv'}\nplot: {folder / 'nqm.png'}")
    wrong = [m for m in measured if not abs(m.difference) <= WRONG]
    for m in wrong:
        print(f"nqm: {m.method.label} at {m.curvature:g} is {m.difference:+.1f} standard errors off", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
