"""Gradient-conflict scores of a run: how well rate and distortion agree, and each update with the one before.

Working definitions, with t the step and all main parameters taken as one vector (the quantiles left out):

    S_inter(t) = cos(delta_t, delta_{t-1})     delta_t: by how much step t changed the parameters (averages of SMA too)
    S_intra(t) = cos(P_t g_R, P_t g_D)         g_R, g_D: gradients of the rate and of lambda * 255^2 * MSE, on the batch
                                               and the noise of step t; P_t: the preconditioner as step t finds it
    S_intra_shared(t)                          the same over the parameters alone that both terms reach

Most parameters serve one of the two terms: decoders know no rate, entropy models no distortion. They cannot conflict,
but dilute S_intra to almost nothing; S_intra_shared, mostly over the encoder, leaves them out.

P_t is diag(1 / (sqrt(v_hat) + eps)) for Adam, the identity for SGD, and for SOAP: into the eigenbases, divided by
sqrt(v) + eps, and back. Source: the framework is that of Wang et al. (arXiv 2502.00604). The formulas with which
Zhang & Zhu (arXiv 2601.20769) apply it to learned image compression are not public: these are a reconstruction.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lic_fast.training.errors import TrainingError
from lic_fast.training.files import make_folder, read_log
from lic_fast.training.optimizers import unwrapped
from lic_fast.training.plots import plot_diagnostics

COLUMNS = ("step", "s_intra", "s_intra_shared", "s_inter")
FILE, PICTURE = "diagnostics.csv", "diagnostics.png"


class Diagnostics:
    """Measures the scores beside the training, which it does not change: no parameter, no gradient, no random number.

    optimizer: of the main parameters, inside SMA or not; parameters: those; every: steps between two measurements of
    S_intra, which costs two more backward passes. S_inter is measured at every step, and costs two copies of the
    parameters. A score that is not defined (no update or no state of the optimizer yet) is None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], every: int) -> None:
        self.optimizer, self.parameters, self.every = unwrapped(optimizer), list(parameters), every
        self._before: Tensor | None = None
        self._last: Tensor | None = None  # the update of the step before
        self._intra: tuple[float | None, float | None] = (None, None)

    def before_update(self, rate: Tensor, distortion: Tensor, step: int) -> None:
        """Call between the forward and the backward pass of `step`; both terms are scalars and keep their graph."""
        self._intra = (None, None)
        if step % self.every == 0:
            gradients = [
                torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
                for term in (rate, distortion)
            ]
            self._intra = s_intra(self.optimizer, self.parameters, *gradients)
        self._before = _flat(self.parameters)

    def after_update(self) -> dict[str, float | None]:
        """Call after the step; returns s_intra, s_intra_shared and s_inter."""
        update = _flat(self.parameters).sub_(self._before)
        inter = None if self._last is None else cosine([(update, self._last)])
        self._last, self._before = update, None
        return dict(zip(COLUMNS[1:], (*self._intra, inter), strict=True))

    def state_dict(self) -> dict[str, Tensor | None]:
        """The last update, which the next step is compared with."""
        return {"last_update": self._last}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Take up what state_dict gave."""
        last = state["last_update"]
        self._last = None if last is None else last.to(self.parameters[0].device)


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().float().reshape(-1) for parameter in parameters])


def cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """The cosine between two vectors given in pieces, summed in fp64; None where one is zero or not finite."""
    return _angle(_products(pairs))


def _products(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[list[float]]:
    """a . b, a . a and b . b of every pair."""
    sums = [torch.stack([(x * y).sum(dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b))]) for a, b in pairs]
    return torch.stack(sums).tolist() if sums else []


def _angle(products: list[list[float]]) -> float | None:
    dot, first, second = (sum(values) for values in zip(*products, strict=True)) if products else (0.0, 0.0, 0.0)
    scale = math.sqrt(first) * math.sqrt(second)
    return dot / scale if scale > 0 and math.isfinite(dot / scale) else None


def s_intra(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    rate: Sequence[Tensor | None],
    distortion: Sequence[Tensor | None],
) -> tuple[float | None, float | None]:
    """The cosine of the preconditioned gradients of both terms, over all parameters and over those that both reach.

    A gradient of None counts as zeros. None before the first update, and where a gradient is zero.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    pairs = []
    for parameter, *gradients in zip(parameters, rate, distortion, strict=True):
        pair = [g if g is None else preconditioned(optimizer, groups[parameter], parameter, g) for g in gradients]
        known = [g for g in pair if g is not None]
        if known:  # else neither term reaches it, or it has no state yet
            pairs.append(tuple(torch.zeros_like(known[0]) if g is None else g for g in pair))
    products = _products(pairs)
    return _angle(products), _angle([piece for piece in products if piece[1] > 0 and piece[2] > 0])


def preconditioned(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, gradient: Tensor
) -> Tensor | None:
    """P g, of the parameter's shape, from the state of Adam and its kin, SOAP or SGD; None where there is none yet.

    group: the parameter's. Raises ValueError for SOAP with merged axes.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return gradient
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return None
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    gradient = gradient.to(square.dtype)
    if "Q" not in state:
        corrected = square / (1 - float(group["betas"][1]) ** float(state["step"]))
        return gradient / (corrected.sqrt() + group["eps"])
    if len(state["Q"]) != gradient.dim():
        raise ValueError("diagnostics: SOAP merged the axes of a parameter; train with merge_dims=False")
    return rotated(rotated(gradient, state["Q"]) / (square.sqrt() + group["eps"]), state["Q"], back=True)


def rotated(x: Tensor, bases: Sequence[Any], back: bool = False) -> Tensor:
    """x with each axis a multiplied by bases[a]^T, or by bases[a] where `back`; an empty one is the identity."""
    for axis, basis in enumerate(bases):
        if len(basis):
            x = torch.tensordot(x, basis, dims=([axis], [1 if back else 0])).movedim(-1, axis)
    return x


def read(run: str | Path) -> list[dict[str, str]]:
    """The rows of diagnostics.csv in the folder of a run. Raises TrainingError where there are none."""
    rows = read_log(Path(run) / FILE)
    if not rows:
        raise TrainingError(f"diagnostics: no scores in {Path(run) / FILE}; train with --diagnose")
    return rows


def compare(runs: Sequence[str | Path], output: str | Path) -> str:
    """Draw the scores of runs over one another into the PNG `output`; returns a table of their means.

    Raises TrainingError (a run without scores, a full disk) and ImportError.
    """
    scores = {str(run): read(run) for run in runs}
    make_folder(Path(output).parent)
    plot_diagnostics(scores, Path(output), "gradient conflicts")
    width = max(map(len, scores))
    heads = ("steps", "S_intra", "shared", "|shared|", "below 0", "S_inter")
    lines = [f"{'run':{width}}" + "".join(f"{head:>10}" for head in heads)]
    for run, rows in scores.items():
        intra, shared, inter = ([float(row[name]) for row in rows if row[name]] for name in COLUMNS[1:])
        means = [_mean(intra), _mean(shared), _mean([abs(value) for value in shared])]
        cells = [rows[-1]["step"], *(f"{mean:.4f}" for mean in means)]
        cells += [f"{_mean([float(value < 0) for value in shared]):.0%}", f"{_mean(inter):.4f}"]
        lines.append(f"{run:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
