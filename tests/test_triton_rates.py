"""The Triton kernels of the likelihoods against the specification: what only their own paths can get wrong."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import devices

import lic_fast
from lic_fast import _triton
from lic_fast.functional import likelihood
from lic_fast.reference._noise import philox_words, uniform_noise

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from lic_fast.triton_kernels import rates  # noqa: E402

USABLE = [device for device in devices() if _triton.why_not(device) is None]
pytestmark = [
    pytest.mark.skipif(not USABLE, reason="Triton runs neither here nor under its interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, for the interpreter
    pytest.mark.parametrize("device", USABLE),
]

FAMILIES = ("gaussian", "logistic", "laplace")
MODES = ("none", "noise", "ste", "dequantize")
OUTPUTS = ("bits", "likelihood", "bits_per_channel")
SEED = -(2**62) + 12345
# relative and, times max(1, 1 / scale), absolute: an order tighter than what all backends promise. Outputs of 16 bits
# are off by a rounding of their own
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float64: (2e-9, 1e-11), torch.float16: (1e-3, 1e-6)}


def numbers(shape, spread=1.0, seed=0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latent(dtype, device, shape, k=1, widest=3.0):
    """y, scales from exp(-widest) to exp(widest), means; some y far away, some next to half a unit from the mean."""
    b, c, *rest = shape
    scales = torch.exp(numbers((b, k * c, *rest), 0.7, 1).clamp(-1, 1) * widest)
    means = numbers((b, k * c, *rest), 2.0, 2)
    y = numbers(shape, 3.0, 3)
    flat = y.view(-1)
    flat[::5] = flat[::5] * 30
    flat[1::5] = means[:, :c].reshape(-1)[1::5] + 0.5
    return [t.to(dtype).to(device) for t in (y, scales, means)]


def run(backend, function, tensors, upstream=None, **settings):
    """y_hat, the rate, and the gradients for a random upstream or the given (of y_hat and of the rate)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with lic_fast.use_backend(backend):
        y_hat, rate = function(*leaves, **settings)
        if upstream is None:
            upstream = [numbers(t.shape, seed=9).to(t) for t in (y_hat, rate)]
        given = [(t, g) for t, g in zip((y_hat, rate), upstream, strict=True) if g is not None]
        outputs, weights = zip(*given, strict=True)
        used = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, used, strict=True)]
    return y_hat.detach(), rate.detach(), grads


def assert_close(ours, exact, unit, tolerance):
    relative, absolute = tolerance
    assert ours.shape == exact.shape and ours.dtype == exact.dtype
    ours, exact = ours.double(), exact.double()
    error, exact = torch.where(ours == exact, 0.0, (ours - exact).abs()), exact.abs()  # fp16 overflows
    allowed = torch.maximum(relative * exact, absolute * torch.as_tensor(unit, device=ours.device))
    worst = (error - allowed).argmax() if error.numel() else 0
    assert (error <= allowed).all(), f"{ours.flatten()[worst]} for {exact.flatten()[worst]}, allowed {allowed.max()}"


def compare(function, tensors, unit=1.0, upstream=None, **settings):
    ours, exact = (run(backend, function, tensors, upstream, **settings) for backend in ("triton", "reference"))
    assert torch.equal(ours[0], exact[0])
    dtype = tensors[0].dtype
    assert_close(ours[1], exact[1], 1.0, TOLERANCE[torch.promote_types(dtype, torch.float32)])
    for grad, expected in zip(ours[2], exact[2], strict=True):
        assert_close(grad, expected, unit, TOLERANCE[dtype])
    return ours


@pytest.mark.parametrize("quantize", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_density(device, family, quantize):
    function = getattr(likelihood, f"{family}_rate")
    turn = FAMILIES.index(family) + MODES.index(quantize)
    for i, (dtype, shape) in enumerate(
        [(torch.float32, (2, 3, 4, 6)), (torch.float64, (1, 5, 7)), (torch.float16, (3, 7)), (torch.float32, (3, 3, 9))]
    ):
        tensors = latent(dtype, device, shape, widest=3.0 if i else 7.0)
        unit = (1 / tensors[1].double().amin()).clamp_min(1)
        settings = {"quantize": quantize, "seed": SEED, "scale_bound": 0.2 if i == 3 else 0.0}
        compare(function, tensors, unit, output=OUTPUTS[(turn + i) % 3], **settings)
        if i == 1:
            compare(function, tensors[:2], unit, output=OUTPUTS[turn % 3], **settings)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_mixtures(device, k, logits):
    for i, dtype in enumerate((torch.float32, torch.float64)):
        names = [FAMILIES[(j + k + i) % 3 if k != 3 else 0] for j in range(k)]
        shape = [(2, 2, 3, 4), (2, 3, 5), (3, 2)][(k + i + logits) % 3]
        tensors = latent(dtype, device, shape, k, widest=1.5)
        weights = numbers(tensors[1].shape, 2.0, 4)
        if not logits:
            weights = weights.reshape(shape[0], k, -1).softmax(1).reshape(weights.shape)
        compare(
            likelihood.mixture_rate, [*tensors, weights.to(tensors[0])], 4.0, families=names, logits=logits, seed=SEED,
            quantize=MODES[(k + i) % 4], output=OUTPUTS[(k + 2 * i) % 3], scale_bound=0.3,
        )  # fmt: skip


def test_noise_of_all_layouts_and_seeds(device):
    kinds = [(torch.float32, 0), (torch.float64, SEED), (torch.float32, 2**63 - 1)]
    for i, shape in enumerate(((1, 1), (2, 3), (3, 5, 7), (2, 4, 8), (1, 2, 516), (2, 2, 700))):
        dtype, seed = kinds[i % 3]
        zero, one = torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
        packed = torch.tensor([seed], device=device)
        expected = uniform_noise(packed, zero, dtype)
        for output in ("bits", "bits_per_channel"):
            with lic_fast.use_backend("triton"):
                noise, _ = likelihood.laplace_rate(zero, one, quantize="noise", seed=packed, output=output)
            assert torch.equal(noise, expected)
    flat = torch.zeros(2, 6, 1, 9, device=device)
    weights = torch.zeros(6, 58, device=device)
    with lic_fast.use_backend("triton"):
        noise, _ = likelihood.factorized_rate(flat, weights, quantize="noise", seed=7)
    assert torch.equal(noise, uniform_noise(torch.tensor([7], device=device), flat, torch.float32))


@triton.jit
def noise_at(seed, out, first, VECTOR: tl.constexpr):
    values = rates.noise(seed, tl.cast(first, tl.int64), tl.cast(4, tl.int64), tl.float32, 2, 4, VECTOR)
    tl.store(out + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], values)


def test_counters_beyond_32_bits(device):
    def words_of(counter):
        c, key = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [5, 0]
        for _ in range(10):
            first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(second >> 32) ^ c[1] ^ key[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ key[1], first & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    assert words_of(0) == philox_words(torch.tensor([5]), 4).tolist()
    first = 4 * (3 * 2**32 - 1)
    words = words_of(first // 4) + words_of(first // 4 + 1)
    expected = torch.tensor([(2 * (word >> 8) + 1 - 2**24) / 2**25 for word in words], device=device)
    out, seed = torch.empty(8, device=device), torch.tensor([5], device=device)
    for vector in (True, False):
        noise_at[(1,)](seed, out, first, vector)
        assert torch.equal(out, expected)


def test_rounding_of_every_number(device):
    halves = [0.5, 1.5, 2.5, 0.3, 0.0, 0.49999997, 2**22 + 0.5, 2**22 + 1.5, 2**23 - 0.5, 2**23 + 1.0, 3e7 + 2, 1e30]
    values = torch.tensor([*halves, math.inf, math.nan], dtype=torch.float64)
    values = torch.cat([values, -values, values + 2.0**51])
    for dtype in (torch.float32, torch.float64):
        y = values.to(dtype).to(device)[None]
        with lic_fast.use_backend("triton"):
            y_hat, _ = likelihood.laplace_rate(y, torch.ones_like(y), quantize="ste")
        assert torch.equal(y_hat.nan_to_num(nan=7.0), y.round().nan_to_num(nan=7.0))
        assert torch.equal(y_hat.signbit(), y.signbit() | y_hat.signbit().logical_and(y.isnan()))


def test_halves_of_channels_are_read_in_place(device):
    both = torch.cat(latent(torch.float32, device, (3, 2, 4, 5))[1:], 1)
    y = latent(torch.float32, device, (3, 2, 4, 5))[0]
    for function, tensors in (
        (likelihood.gaussian_rate, [torch.cat([y, y], 1).chunk(2, 1)[1], *both.chunk(2, 1)]),
        (likelihood.logistic_rate, [y, *both[:, :, 1:].chunk(2, 1)]),  # not dense: a copy
        (likelihood.mixture_rate, [y, *torch.cat([both.abs(), both, both.abs()], 1).chunk(3, 1)]),
    ):
        if function is likelihood.logistic_rate:
            tensors[0] = tensors[0][:, :, 1:]
        output = "bits" if function is likelihood.mixture_rate else "bits_per_channel"
        results = [
            run("triton", function, given, quantize="ste", output=output)
            for given in (tensors, [t.contiguous() for t in tensors])
        ]
        assert torch.equal(results[0][1], results[1][1])
        assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3), (2, 2, 2, 8), (1, 2, 1100), (2, 1, 1028)])
def test_sums_by_channel(device, shape):
    y, scales, means = latent(torch.float32, device, shape)
    settings = {"quantize": "noise", "seed": 3, "output": "bits_per_channel"}
    compare(likelihood.gaussian_rate, [y, scales, means], 1 / scales.min().item(), **settings)


def test_upstream_in_every_form(device):
    y, scales, means = latent(torch.float32, device, (2, 3, 8))
    for output, shape in (("bits", (2, 3, 8)), ("bits_per_channel", (2, 3))):
        full = torch.full(shape, -0.7, device=device)
        through = torch.full(y.shape, 0.3, device=device)
        for quantize in ("ste", "dequantize"):
            settings = {"quantize": quantize, "output": output}
            for pair in ((through, full), (None, full), (through, None)):
                expanded = [None if g is None else g.flatten()[:1].view([1] * g.dim()).expand(g.shape) for g in pair]
                dense = compare(likelihood.laplace_rate, [y, scales, means], 30.0, pair, **settings)
                one = run("triton", likelihood.laplace_rate, [y, scales, means], expanded, **settings)
                assert all(torch.equal(a, b) for a, b in zip(dense[2], one[2], strict=True))


def test_only_what_is_needed_is_computed(device):
    y, scales, means = latent(torch.float32, device, (2, 4, 4))
    weights = numbers((2, 4, 4)).to(y)
    given = [t.repeat(1, 2, 1) if i else t for i, t in enumerate((y, scales, means, weights))]
    with lic_fast.use_backend("triton"):
        rest = (None, torch.ones_like(y), y.new_empty(0), *given, None, [0, 1], 0, 0.1, 0.0, True, 0)
        full = torch.ops.lic_fast.mixture_rate_bwd(*rest, [True] * 4)
        for i in range(4):
            part = torch.ops.lic_fast.mixture_rate_bwd(*rest, [j == i for j in range(4)])
            assert torch.equal(part[i], full[i]) and not any(part[j].numel() for j in range(4) if j != i)


@pytest.mark.parametrize("output", OUTPUTS)
def test_bounds_pass_gradients_that_raise(device, output):
    y = torch.linspace(-40, 40, 24, device=device).reshape(1, 2, 12)
    scales = torch.tensor([0.05, 0.11, 1.0, 4.0], device=device).repeat(6).reshape(1, 2, 12)
    shape = (1, 2) if output == "bits_per_channel" else y.shape
    for sign in (1.0, -1.0):
        upstream = (None, torch.full(shape, sign, device=device))
        for bound in ("compressai", 0.01):
            settings = {"bound": bound, "output": output}
            compare(likelihood.gaussian_rate, [y, scales, 0.1 * y], 20.0, upstream, **settings)
    weights = torch.zeros(1, 4, 12, device=device)
    settings = {"bound": 1e-3, "output": output, "logits": True, "families": ["laplace", "logistic"]}
    twice = [t.repeat(1, 2, 1) for t in (scales, 0.1 * y)]
    compare(likelihood.mixture_rate, [y, *twice, weights], 20.0, upstream, **settings)


def test_what_is_not_a_number_stays_in_its_element(device):
    for family in FAMILIES:
        y = torch.tensor([[0.0, math.nan, 1.0, 1.0, math.inf, -math.inf, 2.0, 0.0]], device=device)
        scales = torch.tensor([[1.0, 1.0, math.nan, -1.0, 1.0, 1.0, 0.0, 1.0]], device=device)
        function = getattr(likelihood, f"{family}_rate")
        for output in ("bits", "likelihood"):
            with lic_fast.use_backend("triton"):
                _, rate = function(y, scales, scale_bound=0, output=output)
            assert rate.isnan().tolist()[0][:4] == [False, True, True, True] and rate[0, 6].isnan()
            assert torch.isfinite(rate[0, [0, 7]]).all()


@pytest.mark.parametrize("k", [2, 6])
def test_weights_of_zero_and_below(device, k):
    y = torch.full((1, 1, 4), 60.0, device=device)
    scales, means = torch.ones(1, k, 4, device=device), torch.zeros(1, k, 4, device=device)
    means[:, 0] = 60.0  # the one that would count does not
    weights = torch.full((1, k, 4), 1 / (k - 1), device=device)
    weights[:, 0] = 0.0
    weights[0, 1, 3] = -0.5
    with lic_fast.use_backend("triton"):
        _, rate = likelihood.mixture_rate(y, scales, means, weights, families="laplace")
    with lic_fast.use_backend("reference"):
        _, expected = likelihood.mixture_rate(y, scales, means, weights, families="laplace")
    assert_close(rate[..., :3], expected[..., :3], 1.0, TOLERANCE[torch.float32])
    assert rate[0, 0, 3].isnan()


def parameters(channels, dtype, device, spread=0.7):
    """Weights of the factorized density, and medians."""
    return [numbers((channels, 58), spread, 5).to(dtype).to(device), numbers(channels, 1.0, 6).to(dtype).to(device)]


@pytest.mark.parametrize(
    ("dtype", "shape", "quantize", "output"),
    [
        (torch.float32, (2, 3, 4, 4), "noise", "bits"),
        (torch.float32, (3, 2, 3), "dequantize", "bits_per_channel"),
        (torch.float32, (100, 1, 4), "ste", "bits"),  # several programs share a channel
        (torch.float64, (2, 2, 5), "dequantize", "likelihood"),
        (torch.float64, (2, 2, 130), "none", "bits_per_channel"),
        (torch.float16, (4, 2), "none", "bits"),
    ],
)
def test_factorized(device, dtype, shape, quantize, output):
    y = numbers(shape, 4.0, 3).to(dtype).to(device)
    wide = torch.promote_types(dtype, torch.float32)
    weights, medians = parameters(shape[1], wide, device)
    settings = {"quantize": quantize, "output": output, "seed": 3}
    ours, exact = (
        run(backend, likelihood.factorized_rate, [y, weights, medians], **settings)
        for backend in ("triton", "reference")
    )
    assert torch.equal(ours[0], exact[0])
    assert_close(ours[1], exact[1], 1.0, TOLERANCE[wide])
    for grad, expected in zip(ours[2], exact[2], strict=True):
        assert_close(grad, expected, expected.double().abs().max().clamp_min(1), TOLERANCE[grad.dtype])
    if shape[0] == 100:
        again = run("triton", likelihood.factorized_rate, [y, weights, medians], **settings)
        assert all(torch.equal(a, b) for a, b in zip(ours[2], again[2], strict=True))


def test_a_flat_factorized_density_keeps_its_digits(device):
    """As wide as 1e5: the logits at both ends agree in four digits or more."""
    y = numbers((1, 2, 16), 1e4, 3).float().to(device)
    weights, _ = parameters(2, torch.float32, device, 0.1)
    weights[:, :3] = -11.0
    compare(likelihood.factorized_rate, [y, weights], 1.0, upstream=(None, torch.ones_like(y)), bound="compressai")


def test_factorized_reads_halves_in_place_and_takes_one_upstream(device):
    y = numbers((3, 4, 2, 3), 3.0, 3).float().to(device).chunk(2, 1)[1]
    weights, medians = parameters(2, torch.float32, device)
    dense, expanded = torch.ones(3, 2, device=device), torch.ones((), device=device).expand(3, 2)
    results = [
        run(
            "triton", likelihood.factorized_rate, [given, weights, medians], (None, upstream),
            quantize="ste", output="bits_per_channel",
        )
        for given, upstream in ((y, expanded), (y.contiguous(), dense))
    ]  # fmt: skip
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
