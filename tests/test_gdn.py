"""lic_fast.functional.gdn in every backend at hand, and the modules lic_fast.entropy.GDN and GDN1."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import assert_by_rule, backend_parameters

import lic_fast
import lic_fast.entropy
from lic_fast.functional import gdn

EVERY_BACKEND = backend_parameters("gdn")
INTERPRETED = ("cpu", "triton")
FORMS = [(inverse, simplified) for inverse in (False, True) for simplified in (False, True)]
EVERY_FORM = pytest.mark.parametrize(("inverse", "simplified"), FORMS, ids=["gdn", "gdn1", "igdn", "igdn1"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# one tile and its edges, images within tiles and tiles within images, a channel, more channels than one panel
SHAPES = [(2, 5, 7, 9), (1, 1, 1, 1), (3, 1, 4, 4), (7, 13, 3), (4, 6), (2, 50, 5, 8), (1, 8, 20, 33)]
LARGE = [(3, 192, 13, 11), (1, 320, 6, 4), (2, 128, 32, 32)]
PEDESTAL = 2.0**-36
BETA_BOUND = torch.tensor((1e-6 + PEDESTAL) ** 0.5).item()


def inputs(shape, dtype=torch.float32, device="cpu", seed=0, below=True):
    """(x, beta, gamma, grad): parameters as they are stored, some of them below their bounds."""
    g = torch.Generator().manual_seed(seed)
    C = shape[1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    beta = 0.5 + torch.rand(C, generator=g)
    gamma = 0.3 * torch.eye(C) + 0.3 / max(C, 1) ** 0.5 * torch.rand(C, C, generator=g)
    if below:
        beta[::5] -= 3.0
        gamma[torch.rand(C, C, generator=g) < 0.2] *= -1
        beta[: C // 2] = beta[: C // 2].clamp(min=0.3)  # the bound itself makes norms near 1e-6: few of them
    if dtype is torch.float16:
        beta = beta.clamp(min=0.5)  # the square of 1 / norm at the bound is beyond fp16
    x, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return tuple(t.to(device) for t in (x, beta.to(wide), gamma.to(wide), grad))


class Bounded(torch.autograd.Function):
    """CompressAI's lower bound."""

    @staticmethod
    def forward(ctx, value, bound):
        ctx.save_for_backward(value)
        ctx.bound = bound
        return value.clamp(min=bound)

    @staticmethod
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        return ((value >= ctx.bound) | (grad < 0)) * grad, None


def eager(x, beta, gamma, inverse, simplified):
    """The same in PyTorch, all of it in x's dtype."""
    shift = (Bounded.apply(beta, BETA_BOUND) ** 2 - PEDESTAL).to(x.dtype)
    mix = (Bounded.apply(gamma, 2.0**-18) ** 2 - PEDESTAL).to(x.dtype)
    norm = torch.einsum("ij,bj...->bi...", mix, x.abs() if simplified else x**2)
    norm = norm + shift.view(-1, *[1] * (x.dim() - 2))
    if simplified:
        return x * norm if inverse else x * (1.0 / norm)
    return x * (norm.sqrt() if inverse else norm.rsqrt())


def everything(function, x, beta, gamma, grad, **options):
    """[y, gradients of x, beta, gamma]"""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, beta, gamma)]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_all_by_rule(ours, args, factor, **form):
    exact = everything(eager, *(t.double() for t in args), **form)
    same = everything(eager, *args, **form)
    for mine, s, e in zip(ours, same, exact, strict=True):
        assert_by_rule(mine, s, e, factor)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@EVERY_BACKEND
@EVERY_FORM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(device, backend, dtype, inverse, simplified):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    form = {"inverse": inverse, "simplified": simplified}
    if lic_fast.explain("gdn", device, dtype).reasons[backend]:
        x, beta, gamma, _ = inputs((2, 3, 4), dtype, device)
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            gdn(x, beta, gamma)
        return
    interpreted = (device, backend) == INTERPRETED
    for i, shape in enumerate(SHAPES if interpreted else SHAPES + LARGE):
        for recompute in [i % 2 == 1] if interpreted else [False, True]:
            args = inputs(shape, dtype, device)
            before = [t.clone() for t in args]
            with lic_fast.use_backend(backend):
                ours = everything(gdn, *args, recompute=recompute, **form)
            assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
            assert [t.dtype for t in ours] == [dtype, dtype, args[1].dtype, args[2].dtype]
            # a kept factor of 8 or 11 bits enters the parameters' sums up to three times, all of a norm's alike
            coarse = dtype in (torch.bfloat16, torch.float16) and not recompute
            assert_all_by_rule(ours, args, 8.0 if coarse else 3.0, **form)


@EVERY_BACKEND
def test_layouts(device, backend):
    for shape in [(2, 19, 6, 10), (2, 35, 3, 4, 5), (3, 8, 1, 7)]:
        x, beta, gamma, grad = inputs(shape, device=device)
        with lic_fast.use_backend(backend):
            expected = everything(gdn, x, beta, gamma, grad)
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            for g in (grad, grad.to(memory_format=last), grad.mT.contiguous().mT):
                ours = everything(gdn, x.to(memory_format=last), beta, gamma, g)
                assert ours[0].is_contiguous(memory_format=last) and ours[1].is_contiguous(memory_format=last)
                for mine, e in zip(ours, expected, strict=True):
                    torch.testing.assert_close(mine, e, rtol=1e-5, atol=1e-5)
                    assert backend == "reference" or torch.equal(mine, e)  # the same tiles
            y = gdn(x.to(memory_format=last).requires_grad_(), beta, gamma)
            torch.testing.assert_close(y.add_(1.0), expected[0] + 1.0, rtol=1e-5, atol=1e-5)  # autograd takes no view
            every_other = torch.stack([x, -x], -1)[..., 0]
            beta2, gamma2 = torch.stack([beta, -beta], -1)[..., 0], gamma.mT.contiguous().mT
            ours = everything(gdn, every_other, beta2, gamma2, grad.sum().expand(shape) * 0 + grad)
            assert ours[0].is_contiguous() and not every_other.is_contiguous()
            for mine, e in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, e, rtol=1e-5, atol=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0, 3), (0, 0)], ids=str)
def test_nothing_to_do(device, backend, shape):
    args = inputs(shape, device=device)
    for recompute in (False, True):
        with lic_fast.use_backend(backend):
            ours = everything(gdn, *args, recompute=recompute)
        assert [t.shape for t in ours] == [args[0].shape, args[0].shape, args[1].shape, args[2].shape]
        assert all(not t.any() for t in ours)


@EVERY_BACKEND
@EVERY_FORM
def test_nan_inf_and_zero_go_where_pytorch_takes_them(device, backend, inverse, simplified):
    x, beta, gamma, _ = inputs((2, 6, 3, 5), device=device, below=False)
    x[0, 2, 1, 1], x[1, 3, 0, 4], x[1, :, 2, 2] = float("nan"), float("inf"), 0.0
    form = {"inverse": inverse, "simplified": simplified}
    with lic_fast.use_backend(backend):
        torch.testing.assert_close(gdn(x, beta, gamma, **form), eager(x, beta, gamma, **form), equal_nan=True)
        gamma[1, 2] = float("nan")
        beta[4] = float("nan")
        y = gdn(x, beta, gamma, **form)
    torch.testing.assert_close(y, eager(x, beta, gamma, **form), equal_nan=True)
    assert y[:, 1].isnan().all() and y[:, 4].isnan().all() and not y[0, 0, 0].isnan().any()
    x, zero = torch.randn(2, 6, 3, 5, device=device), torch.zeros(6, device=device)  # a norm of zero
    with lic_fast.use_backend(backend):
        y = gdn(x, zero, torch.zeros_like(gamma), beta_min=0.0, **form)
    assert torch.equal(y, x * (0.0 if inverse else float("inf")))


@EVERY_BACKEND
def test_only_what_needs_a_gradient_gets_one(device, backend):
    args = inputs((2, 9, 4, 6), device=device)
    with lic_fast.use_backend(backend):
        expected = everything(gdn, *args)
        for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(args[:3])]
            gdn(*leaves).backward(args[3])
            for i, leaf in enumerate(leaves):
                assert (leaf.grad is not None) == (i in wanted)
                assert leaf.grad is None or torch.equal(leaf.grad, expected[i + 1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_kept_for_backward(dtype, recompute):
    x, beta, gamma, _ = inputs((2, 16, 8, 8), dtype)
    x.requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = gdn(x, beta, gamma, recompute=recompute)
    extra = [t for place, t in kept.items() if place not in {v.data_ptr() for v in (x, beta, gamma)}]
    assert y.data_ptr() not in kept
    assert [(t.shape, t.dtype) for t in extra] == ([] if recompute else [(x.shape, dtype)])


@EVERY_BACKEND
def test_opcheck_gradcheck_and_no_second_order(device, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    form = (False, False, BETA_BOUND, 2.0**-18, PEDESTAL)
    with lic_fast.use_backend(backend):
        for x in (torch.randn(2, 3, 2, 3), torch.randn(2, 3, 2, 3).to(memory_format=torch.channels_last)):
            _, beta, gamma, _ = inputs((2, 3), dtype, below=False)
            leaves = [t.to(device, dtype).requires_grad_() for t in (x, beta, gamma)]
            for keep in (True, False):
                torch.library.opcheck(torch.ops.lic_fast.gdn, (*leaves, *form, keep))
            plain = [t.detach() for t in (leaves[0], *leaves)]
            backward = (*plain[:2], None, *plain[2:], *form, [True, False, True])
            torch.library.opcheck(torch.ops.lic_fast.gdn_bwd, backward)
            if dtype is torch.float64:
                for inverse, simplified in FORMS:
                    for recompute in (False, True):
                        options = {"inverse": inverse, "simplified": simplified, "recompute": recompute}
                        assert torch.autograd.gradcheck(lambda *a, o=options: gdn(*a, **o), leaves)
        (first,) = torch.autograd.grad(gdn(*leaves).sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="gdn: gradients of gradients are not supported"):
            first.sum().backward()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="gdn: forward-mode"):
            gdn(*leaves)


@EVERY_BACKEND
def test_compiles_whole(device, backend):
    if (device, backend) == INTERPRETED:
        pytest.skip("the interpreter is no target of torch.compile")
    args = inputs((2, 12, 5, 7), device=device)
    whole = torch.compile(gdn, fullgraph=True)
    with lic_fast.use_backend(backend):
        for recompute in (False, True):
            ours = everything(whole, *args, recompute=recompute)
            for mine, e in zip(ours, everything(gdn, *args, recompute=recompute), strict=True):
                torch.testing.assert_close(mine, e)


CHILD = """
import sys, torch
sys.path.insert(0, "tests")
from test_gdn import FORMS, assert_all_by_rule, everything, inputs, gdn
import lic_fast
import lic_fast.entropy
with lic_fast.use_backend("cpp"):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for inverse, simplified in FORMS:
            for shape in ((3, 70, 17, 9), (2, 50, 5, 8)):
                args = inputs(shape, dtype)
                form = {"inverse": inverse, "simplified": simplified}
                ours = everything(gdn, *args, **form)
                assert_all_by_rule(ours, args, 8.0 if dtype is torch.bfloat16 else 3.0, **form)
"""


@pytest.mark.parametrize("variant", ["generic", "avx2"])
def test_simd_variants(variant):
    if lic_fast.explain("gdn").reasons["cpp"]:
        pytest.skip("the native library is not built")
    environment = {**os.environ, "LIC_FAST_SIMD": variant}
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], check=True, env=environment, timeout=300)


def test_threads_do_not_change_a_bit():
    if lic_fast.explain("gdn").reasons["cpp"]:
        pytest.skip("the native library is not built")
    before = torch.get_num_threads()
    try:
        for shape in [(5, 100, 40, 33), (1, 192, 64, 65)]:
            args, results = inputs(shape), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                with lic_fast.use_backend("cpp"):
                    results.append(everything(gdn, *args))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_half_parameters_are_converted():
    x, beta, gamma, grad = inputs((2, 6, 4, 4), torch.bfloat16, below=False)
    half = [beta.bfloat16(), gamma.bfloat16()]
    ours = everything(gdn, x, *half, grad)
    wide = everything(gdn, x, *(p.float() for p in half), grad)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 4
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, wide, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x must be \[B, C, \*\], got \[3\]"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "x must be one of"),
        ({"x": torch.ones(2, 4, 4)}, ValueError, r"beta must be \[4\] for x with 4 channels, got \[3\]"),
        ({"gamma": torch.ones(3, 2)}, ValueError, r"gamma must be \[3, 3\] for x with 3 channels, got \[3, 2\]"),
        ({"beta": torch.ones(3).half()}, TypeError, "beta must be one of float32, got torch.float16"),
        ({"x": torch.ones(2, 3, 4).double()}, TypeError, "beta must be one of float64"),
        ({"gamma": torch.ones(3, 3, device="meta")}, TypeError, "gamma must be on the device of x"),
        ({"beta_min": -1.0}, ValueError, "beta_min must be a finite number >= 0"),
        ({"reparam_offset": float("nan")}, ValueError, "reparam_offset must be a finite number >= 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    args = {"x": torch.ones(2, 3, 4), "beta": torch.ones(3), "gamma": torch.eye(3)} | change
    with pytest.raises(error, match=message) as caught:
        gdn(args.pop("x"), args.pop("beta"), args.pop("gamma"), **args)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("gdn: ")


# ---- the modules


def pair(name, inverse, dtype=torch.float32, **options):
    """(CompressAI's module, ours), with equal parameters away from their first values."""
    layers = pytest.importorskip("compressai.layers")
    theirs = getattr(layers, name)(6, inverse=inverse, **options)
    with torch.no_grad():
        theirs.gamma.add_(0.2 * torch.rand(6, 6) - 0.05)
        theirs.beta.mul_(torch.rand(6) + 0.5)
        theirs.beta[2] = -1.0
    ours = getattr(lic_fast.entropy, name)(6, inverse=inverse, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def of_module(module, x, grad):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad)
    return [y.detach(), x.grad, module.beta.grad.clone(), module.gamma.grad.clone()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["GDN", "GDN1"])
def test_equals_compressai(name, inverse, dtype):
    x, grad = torch.randn(2, 6, 9, 7, dtype=dtype), torch.randn(2, 6, 9, 7, dtype=dtype)
    for options in ({}, {"beta_min": 1e-3}):
        theirs, ours = pair(name, inverse, dtype, **options)
        swapped = copy.deepcopy(theirs)
        swapped.__class__ = type(ours)
        expected = of_module(theirs, x, grad)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        for module in (ours, swapped, copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
            assert type(module) is type(ours) and isinstance(module, type(theirs))
            for recompute in (False, True):
                module.recompute = recompute
                for mine, e in zip(of_module(module, x, grad), expected, strict=True):
                    torch.testing.assert_close(mine, e, **tolerance)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["GDN", "GDN1"])
def test_scripted_modules_are_plain_pytorch(name, inverse):
    theirs, ours = pair(name, inverse)
    x, file = torch.randn(2, 6, 4, 4), io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Sequential(ours, ours)), file)
    file.seek(0)
    expected = theirs(theirs(x))
    for module in (torch.jit.load(file), torch.nn.Sequential(ours, ours)):
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GDN", "GDN1"])
def test_state_goes_both_ways(name):
    theirs, ours = pair(name, False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert vars(ours).keys() == vars(theirs).keys()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = type(theirs)(6)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.gamma, ours.gamma)
    back = copy.deepcopy(ours)
    back.__class__ = type(theirs)
    x = torch.randn(1, 6, 4, 4)
    assert torch.equal(back(x), theirs(x)) and back.state_dict().keys() == theirs.state_dict().keys()


def test_the_room_is_lazy_and_names_the_extra():
    code = """
import sys
import lic_fast.entropy
assert "compressai" not in sys.modules and "GDN" in dir(lic_fast.entropy)
sys.modules["compressai"] = None
try:
    lic_fast.entropy.GDN
except ImportError as error:
    assert "pip install lic_fast[compressai]" in str(error), error
else:
    raise SystemExit("no error")
try:
    lic_fast.entropy.NoSuchThing
except AttributeError as error:
    assert "NoSuchThing" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
