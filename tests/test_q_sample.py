"""lic_fast.functional.q_sample and q_sample_loss in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters

import lic_fast
from lic_fast.functional import ddim_update, q_sample, q_sample_loss
from lic_fast.reference._noise import normal_noise

EVERY_BACKEND = backend_parameters("q_sample")
INTERPRETED = ("cpu", "triton")
SHAPES = [(1, 1), (5,), (3, 1023), (1, 3, 17, 19), (4, 3, 64, 32), (2, 17001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED = 1 << 40 | 77


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """[x, f, signal, spread, weight]."""
    g = torch.Generator().manual_seed(seed)
    images = [(scale * torch.randn(shape, generator=g)).to(dtype) for scale in (1.0, 1.5)]
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(device) for t in (*images, *torch.rand(3, shape[0], generator=g).to(wide))]


def column(values, like):
    return values.reshape(-1, *[1] * (like.dim() - 1))


def plain_loss(f, target, weight, absolute):
    """In f's dtype, by PyTorch's own operations."""
    error = f - target.to(f.dtype)
    each = (error.abs() if absolute else error.square()).flatten(1 if f.dim() > 1 else 0).reshape(len(f), -1).mean(1)
    return (weight.to(f.dtype) * each).mean()


def with_gradients(function, *leaves, grad=3.0):
    """[the loss, the gradients of grad times it]."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(grad * loss, leaves)]


def refused(device, backend, dtype, run):
    if not lic_fast.explain("q_sample", device, dtype).reasons[backend]:
        return False
    with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
        run()
    return True


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_noises_with_the_references_bits(device, backend, dtype, shape):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    x, _, signal, spread, _ = inputs(shape, dtype, device)
    run = lambda: q_sample(x, signal, spread, seed=SEED)  # noqa: E731
    if refused(device, backend, dtype, run):
        return
    with lic_fast.use_backend(backend):
        noisy = run()
    with lic_fast.use_backend("reference"):
        assert noisy.dtype == dtype and torch.equal(noisy, run())
    normal = normal_noise(torch.tensor([SEED], device=device), x)
    columns = [column(each, x) for each in (signal, spread)]
    exact = columns[0].double() * x.double() + columns[1].double() * normal.double()
    assert_by_rule(noisy, columns[0].to(dtype) * x + columns[1].to(dtype) * normal.to(dtype), exact)
    alone = [ddim_update(x, x, a=0.0, b=0.0, noise=1.0, seed=SEED), q_sample(x, 0 * signal, 1 + 0 * spread, seed=SEED)]
    assert torch.equal(*alone)  # one seed is one noise, of the sampler too


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("of_noise", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_losses_by_the_rule_and_gradients_with_the_references_bits(device, backend, dtype, shape, of_noise, absolute):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    x, f, _, _, weight = inputs(shape, dtype, device)
    settings = {"absolute": absolute, "seed": SEED if of_noise else None}
    run = lambda f: q_sample_loss(f, None if of_noise else x, weight, **settings)  # noqa: E731
    if refused(device, backend, dtype, lambda: run(f)):
        return
    target = normal_noise(torch.tensor([SEED], device=device), x) if of_noise else x
    with lic_fast.use_backend(backend):
        loss, d_f = with_gradients(run, f)
    with lic_fast.use_backend("reference"):
        assert torch.equal(d_f, with_gradients(run, f)[1])
    assert loss.shape == () and loss.dtype is torch.promote_types(dtype, torch.float32) and d_f.dtype is dtype
    exact = with_gradients(lambda f: plain_loss(f, target.double(), weight.double(), absolute), f.double())
    eager = with_gradients(lambda f: plain_loss(f, target, weight, absolute), f)
    assert_by_rule(loss, eager[0].to(loss.dtype), exact[0])
    assert_by_rule(d_f, eager[1], exact[1])


@EVERY_BACKEND
def test_gradients_reach_the_image_too(device, backend):
    x, f, signal, spread, weight = inputs((3, 2, 5, 7), device=device)
    with lic_fast.use_backend(backend):
        _, d_f, d_x = with_gradients(lambda f, x: q_sample_loss(f, x, weight), f, x)
        (only_x,) = with_gradients(lambda x: q_sample_loss(f, x, weight), x)[1:]
        (through,) = with_gradients(lambda x: (q_sample(x, signal, spread, seed=5) * f).sum(), x)[1:]
    assert torch.equal(d_x, -d_f) and torch.equal(d_x, only_x)
    torch.testing.assert_close(through, 3 * f * column(signal, f))


@EVERY_BACKEND
def test_small_gradients_of_halves_are_scaled_before_they_are_rounded(device, backend):
    """Times 1 / (elements), a gradient would be lost in fp16 if it were rounded before a loss scaler's factor."""
    if lic_fast.explain("q_sample_loss", device, torch.float16).reasons[backend]:
        pytest.skip("does not take fp16")
    f = torch.full((2, 3, 128, 128), 1e-3, dtype=torch.float16, device=device)
    with lic_fast.use_backend(backend):
        _, d_f = with_gradients(lambda f: q_sample_loss(f, torch.zeros_like(f), f.new_ones(2)), f, grad=2.0**16)
    torch.testing.assert_close(d_f.double().mean().item(), 2 * 0.001 * 65536 / f.numel(), rtol=2e-3, atol=0)


def layouts():
    return (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        torch.clone,
    )


@EVERY_BACKEND
def test_layouts_keep_the_noise_in_row_major_order(device, backend):
    x, f, signal, spread, weight = inputs((2, 4, 5, 8), device=device)
    with lic_fast.use_backend(backend):
        noisy = q_sample(x, signal, spread, seed=3)
        right = [
            with_gradients(lambda f, s=s: q_sample_loss(f, None if s else x, weight, seed=s), f) for s in (3, None)
        ]
        for first in layouts():
            out = q_sample(first(x), signal.repeat_interleave(2)[::2], spread, seed=3)
            assert torch.equal(out, noisy) and out.stride() == torch.empty_like(first(x)).stride()
            for second in (first, torch.clone):
                for s, (loss, d_f) in zip((3, None), right, strict=True):
                    leaf = first(f).detach().requires_grad_()
                    found = q_sample_loss(leaf, None if s else second(x), weight, seed=s)
                    torch.testing.assert_close(found.detach(), loss)
                    assert torch.equal(torch.autograd.grad(3.0 * found, leaf)[0], d_f)


@EVERY_BACKEND
def test_empty_tensors_and_values_that_are_not_finite(device, backend):
    inf, nan = float("inf"), float("nan")
    with lic_fast.use_backend(backend):
        for shape in ((0, 3), (2, 0), (0,)):
            x, f, signal, spread, weight = inputs(shape, device=device)
            assert q_sample(x, signal, spread, seed=1).shape == shape
            for target, seed in ((x, None), (None, 1)):
                run = lambda f, t=target, w=weight, s=seed: q_sample_loss(f, t, w, seed=s)  # noqa: E731
                loss, d_f = with_gradients(run, f)
                assert loss.isnan() and d_f.shape == shape
        f, x = torch.tensor([[nan, inf, -inf, 0.0, 2.0]], device=device), torch.zeros(1, 5, device=device)
        weight = torch.ones(1, device=device)
        for absolute, slopes in ((True, [-9, 0.2, -0.2, 0, 0.2]), (False, [-9, 7, -7, 0, 0.8])):
            settings = {"absolute": absolute}
            loss, d_f = with_gradients(lambda f, o=settings: q_sample_loss(f, x, weight, **o), f, grad=1.0)
            assert loss.isnan()
            torch.testing.assert_close(d_f.nan_to_num(nan=-9, posinf=7, neginf=-7), x.new_tensor([slopes]))
            assert q_sample_loss(f[:, 1:], x[:, 1:], weight, **settings) == inf


@EVERY_BACKEND
def test_losses_do_not_depend_on_the_number_of_threads(device, backend):
    if (device, backend) == INTERPRETED or backend == "reference":
        pytest.skip("one thread, or PyTorch's own sums")
    x, f, signal, spread, weight = inputs((3, 2, 137, 141), device=device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with lic_fast.use_backend(backend):
                steps = [lambda f, s=s: q_sample_loss(f, None if s else x, weight, seed=s) for s in (3, None)]
                found.append([q_sample(x, signal, spread, seed=3), *(t for s in steps for t in with_gradients(s, f))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@EVERY_BACKEND
def test_opcheck_gradcheck_and_compile(device, backend):
    x, f, signal, spread, weight = inputs((2, 3, 4, 5), device=device)
    seed = torch.tensor([5], device=device)
    with lic_fast.use_backend(backend):
        leaves = [t.clone().requires_grad_() for t in (x, f)]
        torch.library.opcheck(torch.ops.lic_fast.q_sample, (leaves[0], signal, spread, seed))
        for options in ((None, weight, seed, False), (leaves[0], weight, None, True)):
            torch.library.opcheck(torch.ops.lic_fast.q_sample_loss, (leaves[1], *options))
        wide = [t.double() for t in (x, f, signal, spread, weight)]
        a, b = (t.requires_grad_() for t in wide[:2])
        assert torch.autograd.gradcheck(lambda x: q_sample(x, *wide[2:4], seed=5), a, fast_mode=True)
        for absolute in (False, True):
            run = lambda f, x=None, s=5, a=absolute: q_sample_loss(f, x, wide[4], seed=s, absolute=a)  # noqa: E731
            assert torch.autograd.gradcheck(run, b, fast_mode=True)
            assert torch.autograd.gradcheck(lambda f, x, run=run: run(f, x, None), (b, a), fast_mode=True)
        step = torch.compile(
            lambda f, x: q_sample_loss(f, x, weight) + q_sample(x, signal, spread, seed=5).sum(),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        torch.testing.assert_close(step(f, x), q_sample_loss(f, x, weight) + q_sample(x, signal, spread, seed=5).sum())
        assert torch.equal(q_sample(x, signal, spread, seed=5), q_sample(x, signal, spread, seed=seed))


def test_second_derivatives_are_refused():
    x, f, _, _, weight = inputs((2, 3, 4))
    f.requires_grad_()
    (first,) = torch.autograd.grad(q_sample_loss(f, x, weight), f, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        first.sum().backward()


BAD = [
    ({"x": torch.ones(())}, ValueError, r"x must be \[B, \*\], got \[\]"),
    ({"signal": torch.ones(3)}, ValueError, r"signal must be \[2\] for x \[2, 5\], got \[3\]"),
    ({"spread": torch.ones(2).double()}, TypeError, "spread must be one of float32"),
    ({"x": torch.ones(2, 5).long()}, TypeError, "x must be one of"),
    ({"spread": 1.0}, TypeError, "spread must be a tensor, got float"),
    ({"signal": torch.ones(2, device="meta")}, TypeError, "signal must be on the device of x"),
    ({"signal": torch.ones(2, requires_grad=True)}, RuntimeError, "signal requires grad"),
    ({"seed": None}, ValueError, "seed must be an integer in"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "a tensor .1. int64"),
]
BAD_LOSS = [
    ({"x": None}, ValueError, "the target is x, or where x is None the noise of seed, got neither"),
    ({"seed": 1}, ValueError, "got both"),
    ({"x": torch.ones(2, 4)}, ValueError, r"x must have the shape of f, got \[2, 4\] and \[2, 5\]"),
    ({"x": torch.ones(2, 5).double()}, TypeError, "x must be one of float32"),
    ({"x": 3.0}, TypeError, "x must be a tensor, got float"),
    ({"x": torch.ones(2, 5, device="meta")}, TypeError, "x must be on the device of f"),
    ({"f": torch.ones(2, 5).long()}, TypeError, "f must be one of"),
    ({"weight": torch.ones(5)}, ValueError, r"weight must be \[2\]"),
    ({"weight": torch.ones(2, requires_grad=True)}, RuntimeError, "weight requires grad"),
    ({"x": None, "seed": -1}, ValueError, "got -1"),
]


@pytest.mark.parametrize(
    ("function", "change", "error", "message"), [(0, *c) for c in BAD] + [(1, *c) for c in BAD_LOSS]
)
def test_bad_input_is_named(function, change, error, message):
    ones, two = torch.ones(2, 5), torch.ones(2)
    arguments = ({"x": ones, "signal": two, "spread": two, "seed": 1}, {"f": ones, "x": ones, "weight": two})[function]
    arguments = arguments | change
    seed = {"seed": arguments.pop("seed")} if "seed" in arguments else {}
    with pytest.raises(error, match=message) as caught:
        (q_sample, q_sample_loss)[function](*arguments.values(), **seed)
    name = ("q_sample", "q_sample_loss")[function]
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
