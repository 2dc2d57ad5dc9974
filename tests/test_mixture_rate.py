"""Gaussian, logistic, Laplace and mixture rates in every backend at hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.functional import gaussian_rate, laplace_rate, logistic_rate, mixture_rate
from lic_fast.reference import mixture_rate as reference
from lic_fast.reference._noise import uniform_noise

EVERY_BACKEND = backend_parameters("mixture_rate")
INTERPRETED = ("cpu", "triton")
SINGLE = {"gaussian": gaussian_rate, "logistic": logistic_rate, "laplace": laplace_rate}
FAMILIES = pytest.mark.parametrize("family", SINGLE)
CODES = {"none": 0, "noise": 1, "ste": 2, "dequantize": 3}
OUTPUTS = {"bits": 0, "likelihood": 1, "bits_per_channel": 2}
COARSE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(k, shape=(2, 3, 5, 7), dtype=torch.float32, device="cpu", seed=0):
    """y, scales, means, weights (None for k = 0, which stands for one component without weights)."""
    g = torch.Generator().manual_seed(seed)
    wide = (shape[0], max(k, 1) * shape[1], *shape[2:])
    y, means = 3 * torch.randn(shape, generator=g), torch.randn(wide, generator=g)
    scales = 10 ** (2 * torch.rand(wide, generator=g) - 1.2)
    weights = torch.rand(wide, generator=g) if k else None
    return [None if t is None else t.to(device, dtype).requires_grad_() for t in (y, scales, means, weights)]


def close(ours, exact, scales=None, dtype=torch.float32):
    """|error| <= 1e-5 relative or 1e-4 absolute (gradients: times max(1, 1 / scale)), coarser where dtypes are."""
    assert ours.shape == exact.shape
    exact = exact.double().to(ours.device)
    ours = ours.double()
    relative = COARSE[dtype]
    absolute = torch.tensor(10 * relative if dtype is not torch.float64 else relative, dtype=torch.float64)
    if scales is not None:
        absolute = absolute.to(ours.device) * (1 / scales.double()).clamp_min(1)
    allowed = torch.maximum(relative * exact.abs(), absolute.to(ours.device).expand_as(exact))
    wrong = ~((ours - exact).abs() <= allowed) & ~(ours == exact)
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {ours[wrong][0]} for {exact[wrong][0]}"


def against_reference(device, backend, args, families, mode, output, bound=0.0, logits=False, scale_bound=0.11):
    y, scales, means, weights = args
    seed = torch.tensor([77], device=device) if mode == "noise" else None
    rest = (list(families), CODES[mode], scale_bound, bound, logits, OUTPUTS[output])
    op = torch.ops.lic_fast.mixture_rate
    with lic_fast.use_backend(backend):
        y_hat, rate, _ = op(y, scales, means, weights, seed, *rest, True)
        g = torch.Generator().manual_seed(5)
        up = [torch.randn(t.shape, generator=g).to(device, t.dtype) for t in (y_hat, rate)]
        leaves = [t for t in args if t is not None]
        ours = torch.autograd.grad([y_hat, rate] if y_hat.numel() else [rate], leaves, up if y_hat.numel() else up[1:])
    plain = [None if t is None else t.detach() for t in args]
    y_ref, rate_ref = reference.mixture_rate(*plain, seed, *rest)
    assert torch.equal(y_hat, y_ref)
    close(rate, rate_ref, dtype=torch.float64 if y.dtype is torch.float64 else torch.float32)
    slopes = reference.mixture_rate_slopes(*plain, seed, *rest)
    up[0] = up[0] if y_hat.numel() else None
    grads = reference.mixture_rate_bwd(*up, slopes, y.detach(), len(families), CODES[mode], bound, OUTPUTS[output])
    wide = scales.detach().clamp_min(max(scale_bound, 1e-6))
    least = wide.reshape(y.shape[0], len(families), *y.shape[1:]).amin(1)
    for name, one, exact in zip(
        ("y", "scales", "means", "weights"), ours, [t for t in grads if t is not None], strict=False
    ):
        close(one, exact, least if name == "y" else wide, y.dtype)


def allowed(device, backend, dtype):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    refused = lic_fast.explain("mixture_rate", device, dtype).reasons[backend]
    if refused:
        args = inputs(0, dtype=dtype, device=device)
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            gaussian_rate(*args[:3])
    return not refused


@EVERY_BACKEND
@FAMILIES
@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_one_component_matches_the_reference(device, backend, family, mode, output):
    code = list(SINGLE).index(family)
    bounds = (0.0, 1e-9, 0.05)
    if (device, backend) == INTERPRETED:  # each with every mode and output
        turn = (list(CODES).index(mode) + list(OUTPUTS).index(output)) % 3
        bounds = bounds[turn : turn + 1]
    for bound in bounds:
        against_reference(device, backend, inputs(0, device=device), [code], mode, output, bound)


@EVERY_BACKEND
@pytest.mark.parametrize(("families", "logits"), [((0, 0), False), ((0, 1, 2), True), ((2, 0, 1), False), ((0,), True)])
@pytest.mark.parametrize("mode", CODES)
def test_mixtures_match_the_reference(device, backend, families, logits, mode):
    kinds = (("bits", 0.0), ("likelihood", 1e-9), ("bits_per_channel", 0.01))
    if (device, backend) == INTERPRETED:  # each with every mode and mixture
        turn = (CODES[mode] + len(families) + sum(families[:1])) % 3
        kinds = kinds[turn : turn + 1]
    for output, bound in kinds:
        args = inputs(len(families), device=device)
        against_reference(device, backend, args, families, mode, output, bound, logits)


@EVERY_BACKEND
@pytest.mark.parametrize("logits", [False, True])
def test_sixteen_components(device, backend, logits):
    args = inputs(16, (1, 2, 3, 4), device=device)
    against_reference(device, backend, args, [i % 3 for i in range(16)], "noise", "bits", 0.0, logits)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 3])
def test_dtypes(device, backend, dtype, k):
    if allowed(device, backend, dtype):
        for mode in CODES:
            args = inputs(k, dtype=dtype, device=device)
            against_reference(device, backend, args, [0, 1, 2][: max(k, 1)], mode, "bits")


@EVERY_BACKEND
@FAMILIES
def test_grid_of_scales_and_distances(device, backend, family):
    scales = 10 ** torch.linspace(-6, 6, 37, dtype=torch.float64)
    sigmas = torch.cat([torch.linspace(-100, 100, 41), torch.tensor([-50.0, 1e-6, -1e-3, 0.01, 0.3, 1.0, 3.0, 50.0])])
    around = torch.tensor([0.0, 0.25, 0.4999999, 0.5, 0.5000001, -0.75, 1.0, 7.5])
    y = torch.cat([scales[:, None] * sigmas, around.double().expand(37, -1)], 1).float()[None].to(device)
    s = scales[:, None].expand_as(y[0]).float()[None].contiguous().to(device)
    against_reference(device, backend, [y.requires_grad_(), s.requires_grad_(), None, None],
                      [list(SINGLE).index(family)], "none", "bits", scale_bound=0.0)  # fmt: skip


@EVERY_BACKEND
@FAMILIES
def test_gradients_are_right_fifty_sigma_out(device, backend, family):
    y = torch.tensor([[50.0, -50.0]], device=device, requires_grad=True)
    with lic_fast.use_backend(backend):
        _, likelihood = SINGLE[family](y, torch.ones(1, 2, device=device), output="likelihood")
        (grad,) = torch.autograd.grad(-likelihood.log().sum(), y)
    expected = {"gaussian": 49.52, "logistic": 1.0, "laplace": 1.0}[family]
    assert torch.allclose(grad.cpu(), torch.tensor([[expected, -expected]]), rtol=1e-3)


@EVERY_BACKEND
@pytest.mark.parametrize("k", [0, 3])
def test_layouts_read_alike(device, backend, k):
    y, scales, means, weights = (None if t is None else t.detach() for t in inputs(k, (3, 4, 6, 5), device=device))
    args = [list(SINGLE)[:3]] if k else []

    def run(*tensors):
        leaves = [t.detach().requires_grad_() if t.is_contiguous() else t.requires_grad_() for t in tensors]
        with lic_fast.use_backend(backend):
            if k:
                out = mixture_rate(*leaves, families=args[0], quantize="noise", seed=3)
            else:
                out = gaussian_rate(*leaves, quantize="noise", seed=3)
            return [*out, *torch.autograd.grad(out[1].sum(), leaves)]  # the upstream gradient is expanded

    tensors = [y, scales, means] + ([weights] if k else [])
    expected = run(*tensors)
    halves = [torch.cat([t, t], 1).chunk(2, 1)[1] for t in tensors]
    last = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    gaps = [torch.stack([t, t], -1)[..., 1] for t in tensors]
    for other in (halves, last, gaps):
        assert all(torch.equal(a, b) for a, b in zip(run(*other), expected, strict=True))


@EVERY_BACKEND
def test_noise_is_the_reference_s_and_the_same_in_the_backward_pass(device, backend):
    y, scales, means, _ = inputs(0, (3, 5, 3, 7), device=device)
    for seed in (0, -1, 2**62 + 12345):
        with lic_fast.use_backend(backend):
            y_hat, bits = gaussian_rate(y, scales, means, quantize="noise", seed=seed)
            noisy = torch.autograd.grad(bits.sum(), [y, scales, means])
            still = y_hat.detach().requires_grad_()
            plain_bits = gaussian_rate(still, scales, means)[1]
            plain = torch.autograd.grad(plain_bits.sum(), [still, scales, means])
        key = torch.tensor([seed], device=device)
        assert torch.equal(y_hat.detach(), y.detach() + uniform_noise(key, y, torch.float32))
        assert torch.equal(bits, plain_bits)
        assert all(torch.equal(a, b) for a, b in zip(noisy, plain, strict=True))


@EVERY_BACKEND
def test_noise_is_uniform(device, backend):
    stats = pytest.importorskip("scipy.stats")
    n = 4096 if (device, backend) == INTERPRETED else 1 << 18
    zero, one = torch.zeros(1, 2, n // 2, device=device), torch.ones(1, 2, n // 2, device=device)
    for seed in (1, 2, 3):
        with lic_fast.use_backend(backend):
            u = gaussian_rate(zero, one, quantize="noise", seed=seed)[0].flatten().double().cpu()
        assert u.abs().max() < 0.5
        assert stats.kstest(u.numpy(), "uniform", (-0.5, 1)).pvalue > 1e-4
        words = ((u * 2**25 + 2**24 - 1) / 2).long()
        ones = torch.stack([(words >> bit) & 1 for bit in range(24)]).sum(1).double()
        assert stats.chi2.sf(float(((ones - n / 2) ** 2 / (n / 4)).sum()), 24) > 1e-4


@EVERY_BACKEND
def test_bounds_are_one_sided(device, backend):
    y = torch.tensor([[9.0, 0.0]], device=device, requires_grad=True)
    s = torch.tensor([[0.05, 0.05]], device=device, requires_grad=True)
    with lic_fast.use_backend(backend):
        _, p = gaussian_rate(y, s, bound="compressai", output="likelihood")
        (up,) = torch.autograd.grad(
            -p.log().sum(), s, retain_graph=True
        )  # would raise the first scale, lower the second
        (down,) = torch.autograd.grad(p.log().sum(), s)
    assert p[0, 0] == torch.tensor(1e-9)
    assert up[0, 1] == 0 and down[0, 0] == 0


@EVERY_BACKEND
def test_non_finite_values_stay_where_they_are(device, backend):
    nan, inf = float("nan"), float("inf")
    y = torch.tensor([[nan, 1.0, 1.0, 1.0, inf, -inf, 1.0, 1.0]], device=device, requires_grad=True)
    s = torch.tensor([[1.0, nan, -1.0, 0.0, 1.0, 1.0, inf, 1.0]], device=device, requires_grad=True)
    for function in SINGLE.values():
        with lic_fast.use_backend(backend):
            _, bits = function(y, s, scale_bound=0.0)
            bits.sum().backward()
            assert bits[0, :4].isnan().all() and torch.isfinite(bits[0, 7])
            assert torch.equal(function(y[:, 7:], s[:, 7:], scale_bound=0.0)[1], bits[:, 7:])


@EVERY_BACKEND
def test_weights_of_zero(device, backend):
    y, s, m = torch.zeros(1, 1, 4), torch.full((1, 2, 4), 0.2), torch.zeros(1, 2, 4)
    w = torch.tensor([[[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, 1.0]]])
    y, s, m, w = (t.to(device).requires_grad_() for t in (y, s, m, w))
    with lic_fast.use_backend(backend):
        _, bits = mixture_rate(y, s, m, w)
        one = gaussian_rate(y, s[:, :1], m[:, :1])[1]
        grads = torch.autograd.grad(bits[..., :2].sum(), [y, s, m, w])
    assert torch.allclose(bits[..., :2], one[..., :2], atol=1e-6)
    assert bits[0, 0, 2] == float("inf") and bits[0, 0, 3].isnan()
    assert torch.isfinite(grads[0][..., :2]).all() and torch.isfinite(grads[3][..., :2]).all()


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0,)])
def test_empty(device, backend, shape):
    y = torch.empty(shape, device=device, requires_grad=True)
    with lic_fast.use_backend(backend):
        y_hat, bits = gaussian_rate(y, torch.ones(shape, device=device), quantize="noise")
        bits.sum().backward()
    assert y_hat.shape == bits.shape == y.grad.shape == torch.Size(shape)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(), (1,), (37,), (2, 3)])
def test_few_dimensions(device, backend, shape):
    y, s = torch.full(shape, 0.3, device=device), torch.full(shape, 0.7, device=device)
    with lic_fast.use_backend(backend):
        bits = gaussian_rate(y, s)[1]
        y_hat = gaussian_rate(y, s, quantize="ste")[0]
    assert bits.shape == y_hat.shape == torch.Size(shape) and (y_hat == 0).all()
    erf = torch.special.erf(torch.tensor([0.2, 0.8], dtype=torch.float64) / 0.7 / 2**0.5).sum() / 2
    assert torch.allclose(bits.double().cpu(), -torch.log2(erf), rtol=1e-5)


@EVERY_BACKEND
def test_long_rows_and_many_samples_sum_alike(device, backend):
    small = (device, backend) == INTERPRETED
    for shape in ((1, 2, 900 if small else 10007), (3, 4, 1), (2, 700 if small else 5000, 3)):
        y, s, m, _ = inputs(0, shape, device=device)
        with lic_fast.use_backend(backend):
            rows = gaussian_rate(y, s, m, output="bits_per_channel")[1]
            bits = gaussian_rate(y, s, m)[1]
        assert torch.allclose(rows.double(), bits.double().flatten(2).sum(2), rtol=1e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("k", [0, 2])
def test_gradcheck(device, backend, k):
    y, s, m, w = inputs(k, (1, 2, 3), torch.float64, device)
    fast = (device, backend) == INTERPRETED  # in one direction
    with lic_fast.use_backend(backend):
        if k:
            for logits in (False, True):

                def run(*tensors, logits=logits):
                    names = ["gaussian", "laplace"]
                    return mixture_rate(*tensors, families=names, logits=logits, scale_bound=0)[1]

                assert torch.autograd.gradcheck(run, (y, s, m, w), fast_mode=fast)
        else:
            for function in SINGLE.values():
                assert torch.autograd.gradcheck(
                    lambda *a, f=function: f(*a, scale_bound=0)[1], (y, s, m), fast_mode=fast
                )


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    y, s, m, w = inputs(2, (2, 3, 5), device=device)
    seed = torch.tensor([4], device=device)
    rest = (seed, [0, 1], 1, 0.11, 0.0, False, 0, True)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.mixture_rate, (y, s, m, w, *rest))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(*tensors):
            y_hat, bits = mixture_rate(*tensors, families=["gaussian", "logistic"], quantize="noise", seed=seed)
            return y_hat.sum() + bits.sum()

        ours = torch.autograd.grad(step(y, s, m, w), [y, s, m, w])
        y_hat, bits = mixture_rate(y, s, m, w, families=["gaussian", "logistic"], quantize="noise", seed=seed)
        expected = torch.autograd.grad(y_hat.sum() + bits.sum(), [y, s, m, w])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_against_compressai():
    models = pytest.importorskip("compressai.entropy_models")
    y, s, m, _ = inputs(0, (2, 4, 8, 8))
    with torch.no_grad():
        y += 0.01  # no ties
    model = models.GaussianConditional(None, scale_bound=0.11).eval()
    y_hat, likelihood = model(y, s, m)
    ours_hat, ours = gaussian_rate(y, s, m, quantize="dequantize", bound="compressai", output="likelihood")
    assert torch.equal(y_hat, ours_hat)
    assert torch.allclose(ours, likelihood, atol=2e-6)
    big = (likelihood > 1e-3) & (s < 8)  # where CompressAI's own differences have digits
    theirs = torch.autograd.grad((-likelihood.log2() * big).sum(), s)[0]
    mine = torch.autograd.grad((-ours.log2() * big).sum(), s)[0]
    assert torch.allclose(mine, theirs, rtol=2e-2, atol=2e-3)


PROBE = """
import sys, torch, hashlib, lic_fast
from lic_fast.functional import mixture_rate, gaussian_rate, logistic_rate, laplace_rate
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(1)
y, w = 4 * torch.randn(3, 4, 37, 41, generator=g), torch.rand(3, 12, 37, 41, generator=g)
s, m = 10 ** (4 * torch.rand(3, 12, 37, 41, generator=g) - 2), torch.randn(3, 12, 37, 41, generator=g)
values, h = hashlib.sha256(), hashlib.sha256()
for f in (gaussian_rate, logistic_rate, laplace_rate):
    ours = f(y, s[:, :4], m[:, :4])[1]
    with lic_fast.use_backend("reference"):
        assert torch.allclose(ours, f(y, s[:, :4], m[:, :4])[1], rtol=1e-5, atol=1e-4)
for dtype in (torch.float32, torch.bfloat16):
    for output in ("bits", "likelihood", "bits_per_channel"):
        t = [x.to(dtype).requires_grad_() for x in (y, s, m, w)]
        runs = [mixture_rate(*t, families=["gaussian", "logistic", "laplace"], quantize="noise", seed=9, output=output)]
        for f in (gaussian_rate, logistic_rate, laplace_rate):
            runs.append(f(t[0], t[1][:, :4], t[2][:, 4:8], quantize="noise", seed=9, output=output))
        for y_hat, rate in runs:
            values.update(y_hat.detach().float().numpy().tobytes())
            for x in (y_hat, rate, *torch.autograd.grad(rate.sum() + y_hat.sum(), t, allow_unused=True)):
                if x is not None:
                    h.update(x.detach().float().numpy().tobytes())
print(values.hexdigest(), h.hexdigest())
"""


def test_cpp_computes_the_same_bits_on_any_number_of_threads_and_the_same_values_everywhere():
    """AVX2 and AVX-512 fuse products with sums, and agree; others agree with them in the quantised values."""
    if lic_fast.explain("mixture_rate", "cpu").reasons["cpp"]:
        pytest.skip("the C++ library is not built")
    found = {}
    for simd, threads in (("", 1), ("", 2), ("avx2", 2), ("generic", 1), ("generic", 2)):
        env = os.environ | {"LIC_FAST_SIMD": simd, "LIC_FAST_BACKEND": ""}
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(threads)], env=env, check=True, capture_output=True, text=True
        )
        found.setdefault(simd == "generic", set()).add(done.stdout)
    assert len(found[True]) == len(found[False]) == 1
    assert found[True].pop().split()[0] == found[False].pop().split()[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(scales=torch.ones(2, 3)), ValueError, "scales"),
        (dict(scales=torch.ones(2, 2).double()), TypeError, "scales"),
        (dict(y=torch.ones(2, 2).long()), TypeError, "y must"),
        (dict(quantize="up"), ValueError, "quantize must be one of"),
        (dict(bound=2.0), ValueError, "bound must be"),
        (dict(scale_bound=-1.0), ValueError, "scale_bound must be"),
        (dict(quantize="noise", seed=2**70), ValueError, "seed must be"),
    ],
)
def test_errors_name_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message) as caught:
        gaussian_rate(**(dict(y=torch.ones(2, 2), scales=torch.ones(2, 2)) | change))
    assert str(caught.value).startswith("gaussian_rate: ")
    with pytest.raises(ValueError, match="mixture_rate: scales must be"):
        mixture_rate(*[torch.ones(1, 2, 3)] + [torch.ones(1, 3, 3)] * 3)
