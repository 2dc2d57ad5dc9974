"""Likelihoods and their gradients against mpmath in 60 digits, over scales 1e-6 to 1e6 and distances to 100 scales.

LIC_FAST_GRID_POINTS asks for more points a family than the 400 of an ordinary run.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import usable

import lic_fast
from lic_fast.functional import gaussian_rate, laplace_rate, logistic_rate, mixture_rate

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


def _exact_mixture(families, y, parameters):
    """log p of a mixture, and its derivatives by y and by each component's scale, mean and weight."""
    parts = [(*_exact(family, y - m, s), mpmath.mpf(w)) for family, s, m, w in zip(families, *parameters, strict=True)]
    p = sum(w * mpmath.exp(log_p) for log_p, _, _, w in parts)
    likely = [mpmath.exp(log_p) / p for log_p, *_ in parts]
    by_d = [w * r * d for r, (_, d, _, w) in zip(likely, parts, strict=True)]
    by_s = [w * r * s for r, (_, _, s, w) in zip(likely, parts, strict=True)]
    return mpmath.log(p), sum(by_d), by_s, [-d for d in by_d], likely


def _mixtures(count):
    """y [1, 1, n] and scales, means, weights [1, 3, n]: scales 1e-3 to 1e3, most y near a mean, some far from all."""
    g = torch.Generator().manual_seed(9)
    scales = 10 ** (6 * torch.rand(1, 3, count, generator=g, dtype=torch.float64) - 3)
    means = torch.randint(-8, 9, (1, 3, count), generator=g) / 4
    weights = torch.rand(1, 3, count, generator=g) + 1e-3
    near = scales[:, :1] * torch.randn(1, 1, count, generator=g) * 3
    y = torch.where(torch.rand(1, 1, count, generator=g) < 0.8, means[:, :1] + near, 20 * near)
    return [t.float() for t in (y, scales, means, weights / weights.sum(1, keepdim=True))]


@pytest.mark.parametrize("families", [("gaussian",) * 3, ("gaussian", "logistic", "laplace")])
def test_mixtures_within_tolerance_of_sixty_digits(families):
    tensors = _mixtures(max(200, POINTS // 20))
    with mpmath.workdps(60):
        points = [
            _exact_mixture(families, mpmath.mpf(y), parameters)
            for y, *parameters in zip(tensors[0][0, 0].tolist(), *(t[0].T.tolist() for t in tensors[1:]), strict=True)
        ]
        exact = [torch.tensor([[float(v) for v in ([p[i]] if i < 2 else p[i])] for p in points]).T for i in range(5)]
    least = tensors[1][0].double().amin(0)
    # who has which share in a likelihood of e^-n is what n's last digits in fp32 say
    relative = (4e-7 * exact[0].abs()).clamp_min(1e-5)
    for device, backend in PAIRS:
        leaves = [t.clone().to(device).requires_grad_() for t in tensors]
        with lic_fast.use_backend(backend):
            _, bits = mixture_rate(*leaves, families=families, scale_bound=0.0)
            grads = torch.autograd.grad(bits.sum(), leaves)
        for name, ours, want in zip(("log p", "y", "scales", "means", "weights"), (bits, *grads), exact, strict=True):
            nats = ours.detach().double().cpu()[0] * -(torch.tensor(2.0, dtype=torch.float64).log())
            absolute = 1e-4 if name in ("log p", "weights") else 1e-4 * (1 / least).clamp_min(1)
            allowed = 1e-5 * want.abs() if name == "log p" else relative * want.abs()
            score = (nats - want).abs() / torch.maximum(allowed, torch.as_tensor(absolute))
            assert score.max() <= 1, f"{backend} {name}: {score.max():.3g}"
            print(f"{families} {backend} {name}: at most {score.max():.3g} of what is allowed")
