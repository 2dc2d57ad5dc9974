"""Noise schedules of CDC, and the coefficients of its sampler's steps; plain numbers, all in fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999


def cosine(steps: int) -> Tensor:
    """abar [steps] fp64: the share of the signal's power that is left at each step, by a squared cosine.

    As in the published code: its steps + 1 points lie evenly on [0, steps + 1], and not on [0, steps] as in Nichol and
    Dhariwal (ICML 2021).
    """
    x = torch.linspace(0, steps + 1, steps + 1, dtype=torch.float64)
    power = torch.cos((x / (steps + 1) + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * (math.pi / 2)).square()
    betas = (1 - power[1:] / power[:-1]).clamp(0, _LARGEST_BETA)
    return torch.cumprod(1 - betas, 0)


def linear(steps: int) -> Tensor:
    """abar [steps] fp64 for variances that grow linearly, from 0.1 / steps to 20 / steps (Ho et al., 2020)."""
    betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of the sampler: x <- a x + b clamp(f(x, time)) + noise n."""

    time: float
    a: float
    b: float
    noise: float


def ddim_steps(abar: Tensor, count: int, eta: float, predicts: str) -> Iterator[Step]:
    """The steps of DDIM (Song et al., ICLR 2021), the noisiest first, for abar [N] fp64.

    count: how many, evenly over [0, N - 1]. predicts: "x", f is x_0, to be clamped; "eps", f is the noise. eta: 0 is
    deterministic, 1 as noisy as DDPM. With s = eta sigma: x' = sqrt(abar') x_0 + sqrt(1 - abar' - s^2) eps + s n, in
    which eps, or x_0, is a sum of x and f: so x' is, too. The time is what the networks were trained with: the place
    in the schedule for "x", the place in the sampler's for "eps".
    """
    total = len(abar)
    places = torch.linspace(0, total - 1, count).long().tolist() if count > 1 else [total - 1]
    rounded = abar.float().double().tolist()  # in the published models, a table of fp32
    for i in reversed(range(count)):
        now, after = rounded[places[i]], rounded[places[i - 1]] if i else 1.0
        sigma = math.sqrt((1 - after) / (1 - now)) * math.sqrt(max(0.0, 1 - now / after))
        noise = eta * sigma
        keep = math.sqrt(max(0.0, 1 - after - noise * noise))
        if predicts == "x":
            a = keep / math.sqrt(1 - now)
            yield Step(places[i] / total, a, math.sqrt(after) - a * math.sqrt(now), noise)
        else:
            a = math.sqrt(after / now)
            yield Step(i / count, a, keep - math.sqrt(after) * math.sqrt(1 / now - 1), noise)
