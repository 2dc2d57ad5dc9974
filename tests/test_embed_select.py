"""lic_fast.functional.embed_select in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lic_fast
from lic_fast.functional import embed_select

EVERY_BACKEND = backend_parameters("embed_select")
INTERPRETED = ("cpu", "triton")
DTYPES = (torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")


def expected(values, count, mask=None):
    """By Python's own sort, which is stable and knows -0.0 as 0.0."""
    listed = values.tolist()
    allowed = [True] * len(listed) if mask is None else mask.tolist()
    candidates = [i for i, (v, a) in enumerate(zip(listed, allowed, strict=True)) if a and v == v]
    chosen = sorted(candidates, key=listed.__getitem__)[:count]
    selected = torch.zeros(len(listed), dtype=torch.bool)
    selected[torch.tensor(chosen, dtype=torch.int64)] = True
    return selected


def run(backend, values, count, mask=None):
    with lic_fast.use_backend(backend):
        selected = embed_select(values, count, mask)
    assert selected.dtype is torch.bool and selected.device == values.device
    assert set(selected.view(torch.uint8).unique().tolist()) <= {0, 1}
    return selected.cpu()


def special(dtype, n, seed=0):
    """Values that stress the order: both zeros, subnormals, neighbours, infinities, NaN of both signs, repeats."""
    info, g = torch.finfo(dtype), torch.Generator().manual_seed(seed)
    tiny = info.smallest_normal
    few = [0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 2, tiny * info.eps, -tiny * info.eps, 1.0, -1.0, 1.0 + info.eps]
    few += [info.max, info.min, INF, -INF, NAN, -NAN, 3.0, 3.0, 1.0 - info.eps]
    return torch.tensor(few, dtype=dtype)[torch.randint(0, len(few), (n,), generator=g)]


def kinds(dtype, n):
    g = torch.Generator().manual_seed(n)
    noise = torch.randn(n, generator=g, dtype=dtype)
    yield "random", noise
    yield "sizes", (noise * 1e-3).abs()
    yield "wide", noise.sign() * (30 * noise.abs()).exp()
    yield "few", noise.round()
    yield "equal", torch.full_like(noise, -2.5)
    yield "no number", torch.full_like(noise, NAN)
    yield "special", special(dtype, n)
    yield "sorted", noise.sort().values
    yield "close", 1.0 + noise * 4 * torch.finfo(dtype).eps  # only the last digit tells them apart


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 2, 31, 2047, 2048, 4099])
def test_kinds_of_values_and_counts(device, backend, dtype, n):
    counts = {0, 1, n // 3, max(n - 1, 0), n, n + 5, 10**30}
    if (device, backend) == INTERPRETED and n > 2048:  # slow
        counts = {n // 3}
    for name, values in kinds(dtype, n):
        for count in sorted(counts):
            assert torch.equal(run(backend, values.to(device), count), expected(values, count)), (name, count)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.9, 1.0])
def test_masks(device, backend, dtype, density):
    n = 3001
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) < density
    for name, values in kinds(dtype, n):
        for count in (700, n) if (device, backend) == INTERPRETED else (1, 700, int(mask.sum()), n):
            ours = run(backend, values.to(device), count, mask.to(device))
            assert torch.equal(ours, expected(values, count, mask)), (name, count)
            assert int(ours.sum()) == min(count, int((mask & ~values.isnan()).sum()))


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million(device, backend, dtype):
    n = 20_011 if (device, backend) == INTERPRETED else 1_000_003
    values = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=dtype)
    mask = values.roll(1) > -1
    for data in (values, values.mul(3).round(), torch.zeros_like(values)):
        order = data[mask].sort(stable=True).indices[: n // 4]
        wanted = torch.zeros(n, dtype=torch.bool)
        wanted[mask.nonzero().flatten()[order]] = True
        assert torch.equal(run(backend, data.to(device), n // 4, mask.to(device)), wanted)


@pytest.mark.parametrize("backend", [b for d, b in EVERY_BACKEND.args[1] if d == "cpu" and b != "triton"])
def test_any_number_of_threads(backend):
    values = torch.randn(300_007, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(backend, values, 100_000))
    torch.set_num_threads(before)
    assert torch.equal(*results) and int(results[0].sum()) == 100_000


@EVERY_BACKEND
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])), max_size=80),
    count=st.integers(0, 90),
    bits=st.integers(0, 2**80 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_values(device, backend, values, count, bits, dtype):
    data = torch.tensor(values, dtype=dtype)
    mask = torch.tensor([bool(bits >> i & 1) for i in range(len(values))], dtype=torch.bool)
    for allowed in (None, mask):
        on_device = None if allowed is None else allowed.to(device)
        assert torch.equal(run(backend, data.to(device), count, on_device), expected(data, count, allowed))


@EVERY_BACKEND
def test_strided_and_misaligned_vectors(device, backend):
    wide = torch.randn(2003, 3, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    mask = wide > -0.5
    for pick in (lambda t: t[:, 1], lambda t: t.flatten()[1:2002], lambda t: t.flatten()[3:]):
        ours = run(backend, pick(wide.to(device)), 400, pick(mask.to(device)))
        assert torch.equal(ours, expected(pick(wide), 400, pick(mask)))


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    values = torch.randn(50, device=device)
    mask = values > 0
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.embed_select, (values, 7, mask))
        torch.library.opcheck(torch.ops.lic_fast.embed_select, (values, 7, None))
        compiled = torch.compile(embed_select, fullgraph=True, backend="aot_eager")
        for count in (7, 8, 60):  # from the second on it is a symbol
            assert torch.equal(compiled(values, count, mask).cpu(), expected(values, count, mask))


V = torch.zeros(4)


@pytest.mark.parametrize(
    ("values", "count", "mask", "error", "message"),
    [
        (V.view(2, 2), 1, None, ValueError, r"values must have one dimension \[n\], got shape \[2, 2\]"),
        (V, -1, None, ValueError, "count must be an int >= 0, got -1"),
        (V, 1.0, None, ValueError, "count must be an int >= 0, got 1.0"),
        (V, True, None, ValueError, "count must be an int >= 0, got True"),
        (V.half(), 1, None, TypeError, "values must be one of float32, float64, got torch.float16"),
        (V, 1, V, TypeError, "mask must be one of bool, got torch.float32"),
        (V, 1, V[:3] > 0, ValueError, r"mask must have the shape of values, got \[3\] and \[4\]"),
        (V, 1, (V > 0).to("meta"), TypeError, "mask must be on the device of values"),
        ([1.0], 1, None, TypeError, "values must be a tensor, got list"),
        (V, 1, [True], TypeError, "mask must be a tensor, got list"),
        (V.clone().requires_grad_(), 1, None, RuntimeError, "values requires grad"),
    ],
)
def test_bad_input_is_named(values, count, mask, error, message):
    with pytest.raises(error, match=message) as caught:
        embed_select(values, count, mask)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("embed_select: ")
