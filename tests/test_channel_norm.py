"""lic_fast.functional.channel_norm in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters

import lic_fast
from lic_fast.functional import channel_norm

EVERY_BACKEND = backend_parameters("channel_norm")
INTERPRETED = ("cpu", "triton")
SHAPES = [(1, 1), (3, 5), (2, 7, 3), (1, 64, 9, 11), (2, 96, 5, 7), (1, 33, 1, 1), (2, 320, 4, 4), (1, 130, 40, 17)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ids = str


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """x off centre, weight and bias away from 1 and 0, shift, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    x = (2.0 + torch.randn(shape, generator=g)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (1 + 0.3 * torch.randn(shape[1], generator=g)).to(wide), torch.randn(shape[1], generator=g).to(wide)
    shift = torch.randn(shape[:2], generator=g).to(wide)
    return [t.to(device) for t in (x, weight, bias, shift, torch.randn(shape, generator=g).to(dtype))]


def plain(x, weight, bias, shift, relu):
    """In x's dtype (the parameters' where it is wider), by PyTorch's own operations."""
    rows = x.movedim(1, -1)
    y = torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-5).movedim(-1, 1)
    y = torch.relu(y) if relu else y
    return y if shift is None else y + shift.to(x.dtype).reshape(*shift.shape, *[1] * (x.dim() - 2))


def with_gradients(function, values, dtype=None):
    leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in values[:4]]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, values[4].to(y.dtype))]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("relu", [True, False])
def test_values_and_gradients_by_the_rule(device, backend, dtype, shape, relu):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    values = inputs(shape, dtype, device)
    run = lambda x, w, b, s: channel_norm(x, w, b, shift=s, relu=relu)  # noqa: E731
    if lic_fast.explain("channel_norm", device, dtype).reasons[backend]:
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            run(*values[:4])
        return
    reference = lambda x, w, b, s: plain(x, w, b, s, relu)  # noqa: E731
    if relu:  # a value next to zero may fall on either side of it, and its gradient with it
        before = plain(values[0].double(), *(v.double() for v in values[1:3]), None, False)
        values[4][before.abs() < 1e-2 if dtype in (torch.bfloat16, torch.float16) else before.abs() < 1e-5] = 0
    exact = with_gradients(reference, values, torch.float64)
    eager = with_gradients(reference, values)
    with lic_fast.use_backend(backend):
        ours = with_gradients(run, values)
    if shape[1] == 1:  # a channel alone is its mean: the gradients of x and weight are zero, or PyTorch's rounding
        exact[1:3] = map(torch.zeros_like, exact[1:3])
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_by_rule(mine, theirs, truth)


@EVERY_BACKEND
@pytest.mark.parametrize("sides", [(5, 3), (13, 11)], ids=str)  # the latter's planes are long enough to be walked
def test_layouts_and_memory_formats(device, backend, sides):
    x, weight, bias, shift, grad = inputs((2, 6, *sides), device=device)
    with lic_fast.use_backend(backend):
        expected = channel_norm(x, weight, bias, shift=shift, relu=True)
        assert expected.is_contiguous()
        last = x.to(memory_format=torch.channels_last)
        for laid_out in (last, x.transpose(2, 3).contiguous().transpose(2, 3), x.repeat(1, 1, 1, 2)[..., ::2][..., :3]):
            kept = laid_out if laid_out.shape == x.shape else None
            if kept is None or not torch.equal(kept, x):
                continue
            y = channel_norm(kept, weight, bias, shift=shift, relu=True)
            torch.testing.assert_close(y, expected)
            assert y.is_contiguous(memory_format=torch.channels_last) == (kept is last)
        ours = [t.clone().requires_grad_() for t in (last, x)]
        for leaf in ours:
            channel_norm(leaf, weight, bias, relu=True).backward(grad)
        torch.testing.assert_close(ours[0].grad, ours[1].grad)


@EVERY_BACKEND
def test_empty_tensors_and_values_that_are_not_finite(device, backend):
    with lic_fast.use_backend(backend):
        for shape in ((0, 3, 4), (2, 3, 0), (0, 1)):
            x = torch.empty(shape, device=device, requires_grad=True)
            weight = torch.ones(shape[1], device=device, requires_grad=True)
            y = channel_norm(x, weight, weight.detach(), relu=True)
            y.sum().backward()
            assert y.shape == shape and x.grad.shape == shape and torch.equal(weight.grad, torch.zeros_like(weight))
        x = torch.ones(1, 4, 3, device=device)
        x[0, 1, 1] = float("nan")
        ones = torch.ones(4, device=device)
        y = channel_norm(x, ones, ones, relu=True)
        assert y[..., 1].isnan().all() and torch.equal(y[..., [0, 2]], torch.ones_like(y[..., [0, 2]]))
        x = torch.ones(2, 4, 300, device=device)  # more than a tile of places, whose last one is not full
        x[0, 1, 290], x[1, 3, 7] = float("nan"), float("inf")
        for laid_out in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            y = channel_norm(laid_out, ones, ones, relu=True)
            bad = y.isnan().nonzero()[:, [0, 2]].unique(dim=0)
            assert bad.tolist() == [[0, 290], [1, 7]] and (y.nan_to_num(nan=1.0) == 1).all()


@EVERY_BACKEND
def test_sums_do_not_depend_on_the_number_of_threads(device, backend):
    if (device, backend) == INTERPRETED:
        pytest.skip("the interpreter has one thread")
    values = inputs((3, 48, 37, 41), device=device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with lic_fast.use_backend(backend):
                found.append(with_gradients(lambda x, w, b, s: channel_norm(x, w, b, shift=s, relu=True), values))
    finally:
        torch.set_num_threads(before)
    if backend != "reference":  # PyTorch's own sums may
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("with_shift", [True, False])
def test_opcheck_gradcheck_and_compile(device, backend, with_shift):
    x, weight, bias, shift, _ = inputs((2, 6, 3, 4), device=device)
    shift = shift if with_shift else None
    with lic_fast.use_backend(backend):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, shift)]
        torch.library.opcheck(torch.ops.lic_fast.channel_norm, (*leaves, True, 1e-5))
        whole = torch.compile(lambda x, w, b, s: channel_norm(x, w, b, shift=s), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x, weight, bias, shift), channel_norm(x, weight, bias, shift=shift))
        wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, shift)]
        wide = [t if t is None else t.detach().requires_grad_() for t in wide]
        given = [t for t in wide if t is not None]
        assert torch.autograd.gradcheck(
            lambda x, w, b, s=None: channel_norm(x, w, b, shift=s), given, fast_mode=True, raise_exception=True
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x must be \[B, C, \*\] with C >= 1, got \[3\]"),
        ({"x": torch.ones(2, 0, 3)}, ValueError, "C >= 1"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \[3\] for x \[2, 3, 5\], got \[4\]"),
        ({"shift": torch.ones(3)}, ValueError, r"shift must be \[2, 3\]"),
        ({"bias": torch.ones(3).double()}, TypeError, "bias must be one of float32"),
        ({"x": torch.ones(2, 3, 5).long()}, TypeError, "x must be one of"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0, got -1.0"),
        ({"weight": torch.ones(3, device="meta")}, TypeError, "weight must be on the device of x"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": torch.ones(2, 3, 5), "weight": torch.ones(3), "bias": torch.ones(3)} | change
    first = [arguments.pop(name) for name in ("x", "weight", "bias")]
    with pytest.raises(error, match=message) as caught:
        channel_norm(*first, **arguments)
    assert str(caught.value).startswith("channel_norm: ") and "\n" not in str(caught.value)


def test_second_derivatives_are_refused():
    x, weight, bias, _, _ = inputs((2, 3, 4))
    x.requires_grad_()
    (first,) = torch.autograd.grad(channel_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        first.sum().backward()
