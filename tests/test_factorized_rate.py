"""lic_fast.functional.factorized_rate in every backend at hand."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.functional import factorized_rate
from lic_fast.functional.likelihood import pack_factorized
from lic_fast.reference._noise import philox_words, uniform_noise

EVERY_BACKEND = backend_parameters("factorized_rate")
INTERPRETED = ("cpu", "triton")
FILTERS = (3, 3, 3, 3)
OUTPUTS = ("bits", "likelihood", "bits_per_channel")


def weights_of(channels, init_scale=10.0, spread=0.5, filters=FILTERS, seed=0):
    """Parameters as EntropyBottleneck starts with them, moved by up to `spread`."""
    g = torch.Generator().manual_seed(seed)
    scale = init_scale ** (1 / (len(filters) + 1))
    rows = []
    for i, (a, b) in enumerate(itertools.pairwise((1, *filters, 1))):
        rows.append(torch.full((channels, a * b), math.log(math.expm1(1 / scale / b))))
        rows.append(torch.rand(channels, b, generator=g) - 0.5)
        if i < len(filters):
            rows.append(torch.zeros(channels, b))
    weights = torch.cat(rows, 1)
    return weights + spread * (2 * torch.rand(weights.shape, generator=g) - 1)


def latent(shape, spread=5.0, dtype=torch.float32, device="cpu", seed=1):
    y = spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return y.to(device, dtype)


def run(backend, y, weights, medians=None, *, through=None, up=None, **settings):
    """(y_hat, rate, gradients of y, weights, medians) in one backend; through, up: the gradients of the results."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (y, weights, medians)]
    if y.stride() != leaves[0].stride():  # clone keeps no halves
        leaves[0] = y.detach().requires_grad_()
    with lic_fast.use_backend(backend):
        y_hat, rate = factorized_rate(*leaves, **settings)
        results = [rate] + ([y_hat] if through is not None else [])
        ups = [torch.ones_like(rate) if up is None else up] + ([through] if through is not None else [])
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(results, wanted, ups, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return y_hat.detach(), rate.detach(), *grads


def assert_near(ours, theirs, nats=1e-4, relative=1e-5):
    """Every element within `nats`, or within `relative` of itself; NaN and inf in the same places."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = ours.double(), theirs.double()
    odd = ~torch.isfinite(theirs)
    assert torch.equal(odd, ~torch.isfinite(ours))
    error = (ours - theirs)[~odd].abs()
    excess = error - torch.maximum(relative * theirs[~odd].abs(), torch.tensor(nats, device=error.device))
    assert not (excess > 0).any(), f"{int((excess > 0).sum())} elements, worst error {error.max():.3e}"


def assert_sums_near(ours, theirs, relative):
    """Sums of terms of both signs: against the largest of the tensor."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, scale = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    assert error <= relative * scale + 1e-30, f"error {error:.3e}, scale {scale:.3e}"


def taken(device, backend, dtype):
    """Whether the backend takes the dtype; the interpreter's bf16 is left out."""
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        return False
    return lic_fast.explain("factorized_rate", device, dtype).reasons[backend] is None


def test_philox_is_that_of_the_paper_and_the_noise_symmetric():
    assert philox_words(torch.zeros(1, dtype=torch.int64), 4).tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]  # fmt: skip
    u = uniform_noise(torch.tensor([5]), torch.empty(100_000), torch.float32)
    assert u.abs().max() < 0.5 and (u == 0).sum() == 0
    assert abs(u.mean()) < 4 / math.sqrt(12 * len(u)) and abs(u.var() - 1 / 12) < 1e-3


@EVERY_BACKEND
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1])
def test_noise_has_the_bits_of_the_specification(device, backend, seed):
    shapes = ((1, 1, 1), (1, 1, 4), (2, 3, 5), (3, 2, 1), (5, 2, 2, 2), (2, 3, 67), (1, 2, 300))
    for shape in shapes[:2] if (device, backend) == INTERPRETED and seed in (0, 7) else shapes:
        y = torch.zeros(shape, device=device)
        with lic_fast.use_backend(backend):
            y_hat, _ = factorized_rate(y, weights_of(shape[1]).to(device), quantize="noise", seed=seed)
        assert torch.equal(y_hat, uniform_noise(torch.tensor([seed], device=device), y, torch.float32))


@EVERY_BACKEND
@pytest.mark.parametrize("init_scale", [1, 10, 100, 1000])
def test_against_the_reference_over_all_distances(device, backend, init_scale):
    channels = 1 if (device, backend) == INTERPRETED else 3
    weights = weights_of(channels, init_scale, 1.0).to(device)
    for spread, output, bound in itertools.product((1, 30, 1e3), OUTPUTS, ("none", "compressai")):
        if (device, backend) == INTERPRETED and (spread, bound) != (30, "none"):
            continue
        y = latent((2, channels, 37), spread, device=device).clamp(-1e4, 1e4)
        settings = {"quantize": "noise", "seed": 3, "bound": bound, "output": output}
        shape = y.shape[:2] if output == "bits_per_channel" else y.shape
        up = torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape)
        ours, theirs = (run(b, y, weights, up=up, **settings) for b in (backend, "reference"))
        assert torch.equal(ours[0], theirs[0])
        assert_near(ours[1], theirs[1])
        assert_near(ours[2], theirs[2])
        assert_sums_near(ours[3], theirs[3], 2e-5)


@EVERY_BACKEND
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_likelihood_against_mpmath(device, backend, dtype, relative):
    mp = pytest.importorskip("mpmath")
    weights = torch.cat([weights_of(1, scale, 1.0, seed=scale) for scale in (1, 10, 100, 1000)]).to(dtype)
    distances = torch.cat([torch.linspace(-30, 30, 61), torch.logspace(1.5, 4, 20), -torch.logspace(1.5, 4, 20)])
    y = distances.to(dtype).expand(4, -1).contiguous()[None]
    with lic_fast.use_backend(backend):
        _, bits = factorized_rate(y.to(device), weights.to(device))
    softplus = lambda x: mp.log1p(mp.exp(x))  # noqa: E731
    with mp.workdps(60):
        for c, i in itertools.product(range(4), range(y.shape[2])):
            logits = []
            for side in (-0.5, 0.5):
                values, place, w = [mp.mpf(y[0, c, i].item()) + side], 0, [mp.mpf(x) for x in weights[c].tolist()]
                for k, (a, b) in enumerate(itertools.pairwise((1, *FILTERS, 1))):
                    rows = [w[place + r * a : place + (r + 1) * a] for r in range(b)]
                    bias, factor = w[place + a * b : place + a * b + b], w[place + a * b + b : place + a * b + 2 * b]
                    values = [mp.fdot(map(softplus, rows[r]), values) + bias[r] for r in range(b)]
                    if k < len(FILTERS):
                        values = [v + mp.tanh(factor[r]) * mp.tanh(v) for r, v in enumerate(values)]
                    place += a * b + (2 * b if k < len(FILTERS) else 0)
                logits.append(values[0])
            exact = -mp.log(mp.expm1(logits[1] - logits[0])) + softplus(-logits[0]) + softplus(logits[1])
            error = abs(bits[0, c, i].item() * math.log(2) - exact)
            assert error <= max(relative * abs(exact), 10 * relative), (c, float(distances[i]), float(error))


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("quantize", ["none", "noise", "ste", "dequantize"])
def test_dtypes_and_quantize_modes(device, backend, dtype, quantize):
    if not taken(device, backend, dtype):
        if (device, backend) == INTERPRETED:
            pytest.skip("Triton's interpreter truncates bf16 stores")
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            factorized_rate(latent((1, 2, 3), dtype=dtype, device=device), weights_of(2).to(device))
        return
    wide = torch.promote_types(dtype, torch.float32)
    interpreted = (device, backend) == INTERPRETED
    channels = 2 if interpreted else 5
    weights, medians = weights_of(channels).to(device, wide), torch.linspace(-2, 2, channels).to(device, wide)
    y = latent((3, channels, 4, 3), dtype=dtype, device=device)
    settings = {"quantize": quantize, "seed": 9 if quantize == "noise" else None}
    up, through = latent(y.shape, 1, wide, device, 2), latent(y.shape, 1, dtype, device, 3)
    for centre in [medians] if interpreted and dtype is not torch.float32 else [None, medians]:
        ours, theirs = (
            run(b, y, weights, centre, up=up, through=None if quantize == "none" else through, **settings)
            for b in (backend, "reference")
        )
        assert torch.equal(ours[0], theirs[0])
        precise = {torch.float64: 1e-10, torch.float32: 2e-6}
        assert_near(ours[1], theirs[1], precise[wide], precise[wide])
        small = precise.get(dtype, 2 * torch.finfo(dtype).eps)  # a rounding to dtype
        assert_near(ours[2], theirs[2], small, small)
        for a, b in zip(ours[3:], theirs[3:], strict=True):
            assert_sums_near(a, b, precise[wide])


@EVERY_BACKEND
def test_one_sided_rule_below_the_bound(device, backend):
    weights = weights_of(1, 1.0).to(device)
    y = torch.tensor([[[0.5, 400.0, -400.0, 3.0]]], device=device)
    for output, sign in itertools.product(("bits", "likelihood"), (1.0, -1.0)):
        up = torch.full_like(y, sign)
        ours = run(backend, y, weights, up=up, bound=1e-9, output=output)
        theirs = run("reference", y, weights, up=up, bound=1e-9, output=output)
        assert_near(ours[1], theirs[1], 1e-6)
        assert_near(ours[2], theirs[2], 1e-6)
        stopped = (output == "bits") == (sign < 0)
        assert bool((ours[2][..., 1:3] == 0).all()) or not stopped
        assert (ours[2][..., (0, 3)] != 0).all()


@EVERY_BACKEND
@pytest.mark.parametrize(
    "shape", [(3, 2), (1, 1, 1), (9, 3, 2, 2), (2, 2, 5, 7), (1, 2, 65, 127), (70, 1, 61), (3, 2, 16)]
)
def test_layouts_and_sizes(device, backend, shape):
    if (device, backend) == INTERPRETED and math.prod(shape) > 1000:
        pytest.skip("slow under Triton's interpreter")
    weights, wide = weights_of(shape[1]).to(device), latent((shape[0], 2 * shape[1], *shape[2:]), device=device)
    layouts = [wide[:, : shape[1]], wide.chunk(2, 1)[1], wide[:, ::2]]
    if len(shape) == 4:
        layouts.append(wide[:, : shape[1]].contiguous(memory_format=torch.channels_last))
    cases = list(itertools.product(layouts, OUTPUTS, (False, True)))
    if (device, backend) == INTERPRETED:  # each of each; over all shapes each output with either
        alternate = itertools.cycle((len(shape) == 3, len(shape) != 3))
        cases = list(zip(layouts, (*OUTPUTS, OUTPUTS[0]), alternate, strict=False))
    for y, output, expanded in cases:
        up = torch.randn(shape[:2] if output == "bits_per_channel" else shape, device=device)
        if expanded:
            up = torch.ones((), device=device).expand(up.shape)
        ours, theirs = (
            run(b, y, weights, up=up, through=torch.ones_like(y), quantize="noise", seed=4, output=output)
            for b in (backend, "reference")
        )
        assert torch.equal(ours[0], theirs[0]) and ours[0].is_contiguous() and ours[2].shape == y.shape
        assert_near(ours[1], theirs[1], 1e-5, 2e-6)
        assert_near(ours[2], theirs[2], 1e-5)
        assert_sums_near(ours[3], theirs[3], 3e-6)


@EVERY_BACKEND
def test_non_finite_values_stay_where_they_are(device, backend):
    y = torch.tensor([[1.0, math.nan, 2.0, math.inf, -math.inf, 3.0] * 4], device=device)[None]
    for quantize in ("none", "noise", "ste"):
        y_hat, bits, grad, _ = run(backend, y, weights_of(1).to(device), quantize=quantize, seed=1)
        finite = torch.isfinite(y)
        assert torch.isfinite(bits[finite]).all() and torch.isfinite(grad[finite]).all()
        assert torch.isnan(bits[torch.isnan(y)]).all() and torch.isnan(grad[torch.isnan(y)]).all()
        assert not torch.isfinite(bits[~finite]).any()
        assert torch.isnan(y_hat[torch.isnan(y)]).all()
    weights = weights_of(3).to(device)
    weights[1, 20] = math.nan
    _, bits, grad, grad_weights = run(backend, latent((2, 3, 5), device=device), weights)
    assert torch.isnan(bits[:, 1]).all() and torch.isfinite(bits[:, ::2]).all()
    assert torch.isnan(grad_weights[1]).any() and torch.isfinite(grad_weights[::2]).all()


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0), (2, 0, 4)])
def test_empty(device, backend, shape):
    y, weights = torch.empty(shape, device=device), weights_of(shape[1]).to(device)
    for output in OUTPUTS:
        y_hat, rate, grad_y, grad_weights = run(backend, y, weights, quantize="noise", output=output)
        assert y_hat.shape == grad_y.shape == y.shape and not rate.any()
        assert rate.shape == (shape[:2] if output == "bits_per_channel" else shape)
        assert grad_weights.shape == weights.shape and not grad_weights.any()


@EVERY_BACKEND
def test_other_filters_run_in_the_reference_only(device, backend):
    y, weights = latent((2, 3, 5), device=device), weights_of(3, filters=(3, 2)).to(device)
    _, expected = factorized_rate(y, weights, filters=(3, 2))
    if backend != "reference":
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="filters"):
            factorized_rate(y, weights, filters=(3, 2))
    with lic_fast.use_backend("reference"):
        assert torch.equal(factorized_rate(y, weights, filters=(3, 2))[1], expected)
    _, _, grad_y, grad_weights = run("auto", y, weights, filters=(3, 2))
    assert grad_y.any() and grad_weights.any()


@EVERY_BACKEND
@pytest.mark.parametrize("training", [True, False])
def test_against_compressai(device, backend, training):
    models = pytest.importorskip("compressai.entropy_models")
    torch.manual_seed(0)
    module = models.EntropyBottleneck(3, init_scale=8).to(device).train(training)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    lists = [[], [], []]
    for name, p in module.named_parameters():
        for found, kind in zip(lists, ("matri", "bias", "factor"), strict=True):
            found.extend([p] if kind in name else [])
    y, medians = latent((2, 3, 4, 4), 4, device=device), module.quantiles[:, 0, 1]
    theirs = y.clone().requires_grad_()
    if training:  # as in its forward, with the noise of ours
        expected_y = theirs + uniform_noise(torch.tensor([3], device=device), y, torch.float32)
        likelihood, *_ = module._likelihood(expected_y.transpose(0, 1).reshape(3, 1, -1))
        expected = module.likelihood_lower_bound(likelihood).reshape(3, 2, 4, 4).transpose(0, 1)
    else:
        expected_y, expected = module(theirs)
    parameters = [p for p in module.parameters() if p is not module.quantiles]
    up, through = torch.rand_like(y) + 0.5, torch.randn_like(y)
    leaves = [theirs, *parameters, module.quantiles]
    expected_grads = torch.autograd.grad([expected.log(), expected_y], leaves, [up, through], allow_unused=True)
    ours = y.clone().requires_grad_()
    with lic_fast.use_backend(backend):
        y_hat, likelihood = factorized_rate(
            ours, pack_factorized(*lists), medians, quantize="noise" if training else "dequantize",
            seed=3 if training else None, bound="compressai", output="likelihood",
        )  # fmt: skip
        grads = torch.autograd.grad([likelihood.log(), y_hat], [ours, *leaves[1:]], [up, through], allow_unused=True)
    assert torch.equal(y_hat, expected_y)
    assert_near(likelihood.detach(), expected.detach(), 1e-6, 1e-4)  # CompressAI's fp32 difference is the less precise
    for a, b in zip(grads, expected_grads, strict=True):
        zero = torch.zeros(()) if a is None and b is None else torch.zeros_like(a if a is not None else b)
        assert_sums_near(zero if a is None else a, zero if b is None else b, 2e-3)


@EVERY_BACKEND
def test_opcheck_gradcheck_and_compile(device, backend):
    interpreted = (device, backend) == INTERPRETED
    channels = 1 if interpreted else 3
    y = latent((2, channels, 5), device=device).requires_grad_()
    weights = weights_of(channels).to(device).requires_grad_()
    medians, seed = torch.zeros(channels, device=device, requires_grad=True), torch.tensor([3], device=device)
    with lic_fast.use_backend(backend):
        for mode, output in ((3, 2), (1, 1), (0, 0))[: 1 if interpreted else None]:
            args = (y, weights, medians, seed if mode == 1 else None, list(FILTERS), mode, 1e-9, output)
            torch.library.opcheck(torch.ops.lic_fast.factorized_rate, args)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def loss(y, weights):
            y_hat, bits = factorized_rate(y, weights, quantize="noise", seed=seed)
            return bits.sum() + (y_hat * y_hat).sum()

        grads = torch.autograd.grad(loss(y, weights), (y, weights))
        y_hat, bits = factorized_rate(y, weights, quantize="noise", seed=seed)
        expected = torch.autograd.grad(bits.sum() + (y_hat * y_hat).sum(), (y, weights))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        with pytest.raises(RuntimeError, match="gradients of gradients"):
            g = torch.autograd.grad(factorized_rate(y, weights)[1].sum(), y, create_graph=True)[0]
            g.sum().backward()
        leaves = [t.detach().double().requires_grad_() for t in (y, weights)]
        for output in OUTPUTS:

            def rate(y, weights, output=output):
                return factorized_rate(y, weights, output=output)[1]

            assert torch.autograd.gradcheck(rate, leaves, fast_mode=interpreted)  # in one direction, then


def test_what_is_computed_does_not_depend_on_threads_and_hardly_on_simd():
    """AVX2 and AVX-512 fuse products with sums, and agree; others agree with them in the quantised values."""
    if lic_fast.explain("factorized_rate", "cpu").reasons["cpp"]:
        pytest.skip("the C++ library is not built")
    code = (
        "import torch, lic_fast, hashlib, sys; from lic_fast.functional import factorized_rate\n"
        "lic_fast.use_backend('cpp'); g = torch.Generator().manual_seed(0); h, v = hashlib.sha256(), hashlib.sha256()\n"
        "r = lambda *s: torch.randn(*s, generator=g)\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "  for shape in ((40, 5, 2, 2), (2, 5, 61, 97), (300, 3, 7)):\n"
        "    y, w = (5 * r(*shape)).to(dtype).requires_grad_(), 0.5 * r(shape[1], 58)\n"
        "    w = w.to(torch.promote_types(dtype, torch.float32)).requires_grad_()\n"
        "    for output in ('bits', 'bits_per_channel'):\n"
        "      x, bits = factorized_rate(y, w, quantize='noise', seed=5, output=output)\n"
        "      v.update(x.detach().double().numpy().tobytes())\n"
        "      lic_fast.use_backend('reference')\n"
        "      near = factorized_rate(y, w, output=output, quantize='noise', seed=5)[1]\n"
        "      assert torch.allclose(bits, near, rtol=1e-5, atol=1e-4); lic_fast.use_backend('cpp')\n"
        "      for t in (x, bits, *torch.autograd.grad(bits.sum() + x.sum(), (y, w))):\n"
        "        h.update(t.detach().double().numpy().tobytes())\n"
        "print(v.hexdigest(), h.hexdigest())\n"
    )
    hashes = {}
    for variant, threads in (("generic", "1"), ("generic", "2"), ("avx2", "1"), ("", "1"), ("", "3")):
        env = os.environ | {"LIC_FAST_SIMD": variant}
        done = subprocess.run(
            [sys.executable, "-c", code, threads], env=env, capture_output=True, text=True, check=True
        )
        hashes.setdefault(variant == "generic", set()).add(done.stdout)
    assert len(hashes[True]) == len(hashes[False]) == 1
    assert hashes[True].pop().split()[0] == hashes[False].pop().split()[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.zeros(3, 57)}, ValueError, r"weights must be \[C, 58\]"),
        ({"weights": torch.zeros(3, 58).double()}, TypeError, "weights must be"),
        ({"y": torch.zeros(4)}, ValueError, "at least 2 dimensions"),
        ({"y": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "y must be"),
        ({"medians": torch.zeros(2)}, ValueError, r"medians must be \[C\]"),
        ({"quantize": "round"}, ValueError, "quantize must be one of"),
        ({"quantize": "noise", "seed": 0.5}, ValueError, "seed must be"),
        ({"bound": 2.0}, ValueError, "bound must be"),
        ({"output": "nats"}, ValueError, "output must be one of"),
        ({"filters": (3, 0)}, ValueError, "weights must be"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"y": torch.zeros(2, 3, 4), "weights": torch.zeros(3, 58), **change}
    with pytest.raises(error, match=message) as caught:
        factorized_rate(arguments.pop("y"), arguments.pop("weights"), arguments.pop("medians", None), **arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("factorized_rate: ")
