"""Likelihoods and their gradients against mpmath in 60 digits, over scales 1e-6 to 1e6 and distances to 100 scales.

LIC_FAST_GRID_POINTS asks for more points a family than the 400 of an ordinary run.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import usable

import lic_fast
from lic_fast.functional import gaussian_rate, laplace_rate, logistic_rate

mpmath = pytest.importorskip("mpmath")
POINTS = int(os.environ.get("LIC_FAST_GRID_POINTS", "400"))
FUNCTIONS = {"gaussian": gaussian_rate, "logistic": logistic_rate, "laplace": laplace_rate}
PAIRS = [pair for pair in usable("mixture_rate") if pair != ("cpu", "triton")]  # its interpreter: test_mixture_rate.py


def _above(family, x):
    """P(X > x), and the density at x, of the standard variable."""
    if family == "gaussian":
        return mpmath.erfc(x / mpmath.sqrt(2)) / 2, mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)
    if family == "logistic":
        fall = mpmath.exp(-abs(x))
        above = fall / (1 + fall) if x > 0 else 1 / (1 + fall)
        return above, fall / (1 + fall) ** 2
    fall = mpmath.exp(-abs(x)) / 2
    return (fall if x > 0 else 1 - fall), fall


def _exact(family, y, s):
    """log p and its derivatives by y and s."""
    sign, distance, s = (1 if y > 0 else -1), abs(mpmath.mpf(y)), mpmath.mpf(s)
    a, b = (distance - 0.5) / s, (distance + 0.5) / s
    (above_a, at_a), (above_b, at_b) = _above(family, a), _above(family, b)
    p = above_a - above_b
    return mpmath.log(p), sign * (at_b - at_a) / (s * p), (a * at_a - b * at_b) / (s * p)


def _grid(seed):
    g = torch.Generator().manual_seed(seed)
    s = 10 ** (12 * torch.rand(POINTS, generator=g, dtype=torch.float64) - 6)
    y = s * 100 * (2 * torch.rand(POINTS, generator=g, dtype=torch.float64) - 1)
    near = torch.rand(POINTS, generator=g) < 0.4
    y = torch.where(near, 4 * torch.rand(POINTS, generator=g, dtype=torch.float64) - 2, y)
    return y.float()[None], s.float()[None]


@pytest.mark.parametrize("family", FUNCTIONS)
def test_within_tolerance_of_sixty_digits(family):
    y, s = _grid(list(FUNCTIONS).index(family))
    with mpmath.workdps(60):
        points = [_exact(family, a, b) for a, b in zip(y[0].tolist(), s[0].tolist(), strict=True)]
        exact = torch.tensor([[float(v) for v in point] for point in points], dtype=torch.float64).T
    for device, backend in PAIRS:
        leaves = [t.clone().to(device).requires_grad_() for t in (y, s)]
        with lic_fast.use_backend(backend):
            _, bits = FUNCTIONS[family](*leaves, scale_bound=0.0)
            grads = torch.autograd.grad(bits.sum(), leaves)
        for name, ours, want in zip(("log p", "by y", "by s"), (bits, *grads), exact, strict=True):
            nats = ours.detach().double().cpu()[0] * -(torch.tensor(2.0, dtype=torch.float64).log())
            absolute = 1e-4 if name == "log p" else 1e-4 * (1 / s[0].double()).clamp_min(1)
            score = (nats - want).abs() / torch.maximum(1e-5 * want.abs(), torch.as_tensor(absolute))
            assert score.max() <= 1, (
                f"{backend} {name}: {score.max():.3g} at y {y[0][score.argmax()]}, s {s[0][score.argmax()]}"
            )
            print(f"{family} {backend} {name}: at most {score.max():.3g} of what is allowed")
