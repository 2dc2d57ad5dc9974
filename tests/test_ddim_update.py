"""lic_fast.functional.ddim_update in every backend at hand, and the normal noise of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_by_rule, backend_parameters

import lic_fast
from lic_fast.functional import ddim_update
from lic_fast.reference._noise import normal_noise, uniform_noise

EVERY_BACKEND = backend_parameters("ddim_update")
INTERPRETED = ("cpu", "triton")
SHAPES = [(0,), (1,), (5,), (1023,), (1, 3, 17, 19), (2, 3, 64, 33), (70001,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair(shape, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=g)).to(dtype).to(device) for scale in (1.0, 1.5)]


def expected(x, f, a, b, clamp, noise, seed):
    """The specification, from the reference of the backend that every machine has."""
    with lic_fast.use_backend("reference"):
        return ddim_update(x.contiguous(), f.contiguous(), a=a, b=b, clamp=clamp, noise=noise, seed=seed)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clamp", [1.0, 0.0, None])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_every_backend_has_the_references_bits(device, backend, dtype, shape, clamp, noise):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    x, f = pair(shape, dtype, device)
    settings = {"a": 0.83, "b": -1.2e-1, "clamp": clamp, "noise": noise, "seed": 1 << 40 | 77}
    if lic_fast.explain("ddim_update", device, dtype).reasons[backend]:
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            ddim_update(x, f, **settings)
        return
    with lic_fast.use_backend(backend):
        out = ddim_update(x, f, **settings)
    assert out.dtype == dtype and torch.equal(out, expected(x, f, **settings))
    limit = math.inf if clamp is None else clamp
    exact = 0.83 * x.double() - 0.12 * f.double().clamp(-limit, limit)
    eager = 0.83 * x - 0.12 * f.clamp(-limit, limit)
    if noise:
        normal = normal_noise(torch.tensor([1 << 40 | 77], device=device), x)
        exact, eager = exact + 0.3 * normal.double(), eager + (0.3 * normal).to(dtype)
    assert_by_rule(out, eager, exact)


@EVERY_BACKEND
def test_layouts_keep_the_noise_in_row_major_order(device, backend):
    x, f = pair((2, 4, 5, 7), device=device)
    settings = {"a": 0.5, "b": 0.25, "clamp": 1.0, "noise": 1.0, "seed": 3}
    for options in (settings, settings | {"noise": 0.0}):
        right = expected(x, f, **options)
        layouts = (
            lambda t: t.to(memory_format=torch.channels_last),
            lambda t: torch.stack([t, t], -1)[..., 0],
            lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
            lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
            torch.clone,
        )
        for first in layouts:
            for second in (first, torch.clone):
                with lic_fast.use_backend(backend):
                    out = ddim_update(first(x), second(f), **options)
                assert torch.equal(out, right) and out.stride() == torch.empty_like(first(x)).stride()


@EVERY_BACKEND
def test_values_that_are_not_finite(device, backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([1.0, 1.0, 1.0, inf, nan, 1.0], device=device)
    f = torch.tensor([nan, inf, -inf, 0.0, 0.0, -3.0], device=device)
    with lic_fast.use_backend(backend):
        clamped, free = ddim_update(x, f, a=1.0, b=0.5), ddim_update(x, f, a=1.0, b=0.5, clamp=None)
    assert clamped.nan_to_num(nan=-9.0, posinf=9.0).tolist() == [-9.0, 1.5, 0.5, 9.0, -9.0, 0.5]
    assert free.nan_to_num(nan=-9.0, posinf=9.0, neginf=-8.0).tolist() == [-9.0, 9.0, -8.0, 9.0, -9.0, -0.5]


@EVERY_BACKEND
def test_opcheck_gradients_and_compile(device, backend):
    x, f = pair((2, 3, 4, 5), device=device)
    with lic_fast.use_backend(backend):
        seed = torch.tensor([5], device=device)
        for options in ((None, 0.9, 0.3, 1.0, 0.0), (seed, 0.9, 0.3, float("inf"), 0.5)):
            leaves = [t.clone().requires_grad_() for t in (x, f)]
            torch.library.opcheck(torch.ops.lic_fast.ddim_update, (*leaves, *options))
        wide = [t.double().requires_grad_() for t in (x, f)]
        assert torch.autograd.gradcheck(lambda x, f: ddim_update(x, f, a=0.9, b=0.3, noise=0.1, seed=5), wide)
        step = torch.compile(lambda x, f: ddim_update(x, f, a=0.9, b=0.3), fullgraph=True, backend="aot_eager")
        assert torch.equal(step(x, f), ddim_update(x, f, a=0.9, b=0.3))
        by_number = ddim_update(x, f, a=0.9, b=0.3, noise=1.0, seed=5)
        assert torch.equal(by_number, ddim_update(x, f, a=0.9, b=0.3, noise=1.0, seed=seed))


def test_the_noise_is_normal():
    stats = pytest.importorskip("scipy.stats")
    special = pytest.importorskip("scipy.special")
    seed = torch.tensor([2**33 + 12345])
    n = normal_noise(seed, torch.empty(1 << 20)).double()
    assert abs(n.mean()) < 4e-3 and abs(n.var() - 1) < 6e-3 and abs((n**4).mean() - 3) < 0.06
    assert stats.kstest(n[: 1 << 17].numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([n[:-1], n[1:]]))[0, 1]) < 5e-3
    u = uniform_noise(seed, torch.empty(1 << 20), torch.float64)
    exact = torch.from_numpy(special.ndtri((u + 0.5).numpy()))
    assert (n - exact).abs().max() < 2e-6


def test_the_noise_of_the_ends_and_of_zero(monkeypatch):
    """All 24-bit words near the ends, around the middle and around the change of exponent."""
    special = pytest.importorskip("scipy.special")
    edges = torch.cat([torch.arange(c - 300, c + 300) for c in (300, 1 << 22, 1 << 23, 3 << 22, (1 << 24) - 300)])
    monkeypatch.setattr("lic_fast.reference._noise.philox_words", lambda seed, n: edges << 8)
    n = normal_noise(torch.tensor([0]), torch.empty(len(edges))).double()
    u = (2 * edges + 1 - (1 << 24)).double() / (1 << 25)
    below, above = (torch.from_numpy(special.ndtri((0.5 + sign * u).numpy())) for sign in (1, -1))
    exact = torch.where(u < 0, below, -above)
    assert (n - exact).abs().max() < 2e-6 and torch.equal(n.sign(), u.sign()) and n.abs().max() < 5.43
    assert torch.equal(n[:600], -n[-600:].flip(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"f": torch.ones(3)}, ValueError, r"f must have the shape of x, got \[3\] and \[2\]"),
        ({"f": torch.ones(2).double()}, TypeError, "f must be one of float32, got torch.float64"),
        ({"x": torch.ones(2).long()}, TypeError, "x must be one of"),
        ({"f": 3.0}, TypeError, "f must be a tensor, got float"),
        ({"a": float("nan")}, ValueError, "a must be a finite number, got nan"),
        ({"noise": "1"}, ValueError, "noise must be a finite number, got '1'"),
        ({"clamp": -1.0}, ValueError, "clamp must be a number >= 0, or None for none, got -1.0"),
        ({"noise": 1.0}, ValueError, "with noise, seed must be an integer in"),
        ({"noise": 1.0, "seed": -1}, ValueError, "got -1"),
        ({"noise": 1.0, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "a tensor .1. int64"),
        ({"f": torch.ones(2, device="meta")}, TypeError, "f must be on the device of x"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": torch.ones(2), "f": torch.ones(2), "a": 1.0, "b": 1.0} | change
    with pytest.raises(error, match=message) as caught:
        ddim_update(arguments.pop("x"), arguments.pop("f"), **arguments)
    assert str(caught.value).startswith("ddim_update: ") and "\n" not in str(caught.value)
