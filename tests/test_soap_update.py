"""lic_fast.functional.soap_update_ in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from preconditioned import SHAPES, copied, tensors

import lic_fast
from lic_fast.functional import soap_update_
from lic_fast.reference.soap_update import soap_update_ as reference

EVERY_BACKEND = backend_parameters("soap_update_")
INTERPRETED = ("cpu", "triton")
WRITTEN = ("params", "exp_avg", "exp_avg_sq", "GG")


def expected(args, **settings):
    """What fp64 and the reference in the same dtypes make of the arguments."""
    given = {"correct_bias": True, "normalize_grads": False, "precision": "ieee"} | settings
    exact, same = copied(args, torch.float64), copied(args)
    reference(*exact.values(), *given.values())
    reference(*same.values(), *given.values())
    return exact, same, given


def assert_agrees(ours, same, exact):
    for name in WRITTEN:
        for x, s, e in zip(ours[name], same[name], exact[name], strict=True):
            assert_by_rule(x, s, e, factor=4.0)
    assert torch.equal(ours["counts"], exact["counts"])


def skip_what_backend_refuses(device, backend, dtype):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    if lic_fast.explain("soap_update_", device, dtype).reasons[backend]:
        pytest.skip("refused, see test_adam_update")


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"correct_bias": False}, {"normalize_grads": True}], ids=str)
def test_matches_fp64_and_reference(device, backend, dtype, settings):
    skip_what_backend_refuses(device, backend, dtype)
    args = tensors(SHAPES, dtype, device)
    exact, same, given = expected(args, **settings)
    with lic_fast.use_backend(backend):
        soap_update_(**args, **given)
    assert_agrees(args, same, exact)
    if backend != "reference":  # torch's products are symmetric only up to rounding
        assert all(torch.equal(x, x.mT) for x in args["GG"])


@EVERY_BACKEND
def test_views_of_convolutions(device, backend):
    shapes = [((3, 3, 6, 10), ()), ((5, 5, 12, 9), ()), ((14, 6), ())]
    args = tensors(shapes, device=device)
    exact, same, given = expected(args)
    for name in ("params", "grads"):  # [O, I, k, k] weights walked as [k, k, O, I], one of them channels_last
        first, second, third = args[name]
        first = first.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        second = second.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last).permute(2, 3, 0, 1)
        args[name] = [first, second, third.T.contiguous().T]
        assert not any(x.is_contiguous() for x in args[name])
    with lic_fast.use_backend(backend):
        soap_update_(**args, **given)
    assert_agrees(args, same, exact)


@EVERY_BACKEND
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_tensor(device, backend, value):
    args = tensors(SHAPES[:4], device=device)
    args["grads"][1].view(-1)[-1] = value
    before = copied(args)
    exact, same, given = expected(args)
    with lic_fast.use_backend(backend):
        soap_update_(**args, **given)
    assert_agrees(args, same, exact)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(args[name][1], before[name][1])
    assert all(torch.equal(x, y) for x, y in zip(args["GG"][4:8], before["GG"][4:8], strict=True))
    assert args["counts"].tolist() == [[4, 1], [3, 2], [4, 1], [4, 1]]


@EVERY_BACKEND
def test_real_shapes(device, backend):
    small = (device, backend) == INTERPRETED
    shapes = [(1, 1, 24, 40), (5, 5, 3, 20)] if small else [(3, 3, 96, 192), (5, 5, 3, 192), (640, 320), (96, 96)]
    args = tensors([(shape, ()) for shape in shapes], device=device)
    exact, same, given = expected(args)
    with lic_fast.use_backend(backend):
        soap_update_(**args, **given)
    assert_agrees(args, same, exact)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads):
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        args = tensors([((3, 3, 40, 50), ()), ((70, 64), ()), ((5, 5, 3, 32), ())])
        soap_update_(**args)
        results.append(args)
    torch.set_num_threads(before)
    for name in WRITTEN:
        assert all(torch.equal(x, y) for x, y in zip(results[0][name], results[1][name], strict=True))


@EVERY_BACKEND
def test_opcheck_and_empty_list(device, backend):
    args = tensors(SHAPES[2:4], device=device)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.soap_update_, (*args.values(), True, False, "ieee"))
        empty = {name: [] if isinstance(value, list) else value[:0] for name, value in args.items()}
        soap_update_(**empty)


def changed(args, name, index, value):
    values = list(args[name])
    values[index] = value
    return args | {name: values}


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: a | {"grads": a["grads"][:-1]}, ValueError, "lists differ in length"),
        (lambda a: changed(a, "grads", 0, torch.ones(3)), ValueError, r"grads\[0\] must have the shape"),
        (lambda a: changed(a, "exp_avg", 1, a["exp_avg"][1].double()), TypeError, r"exp_avg\[1\] must be one of"),
        (lambda a: changed(a, "exp_avg", 0, a["exp_avg"][0].mT.contiguous().mT), ValueError, "contiguous"),
        (
            lambda a: {n: [x[:0] for x in t] if isinstance(t, list) else t for n, t in a.items()},
            ValueError,
            "not empty",
        ),
        (lambda a: a | {"Q": a["Q"][:-1]}, ValueError, "one entry of Q for every axis"),
        (lambda a: changed(a, "GG", 0, torch.ones(5, 5)), ValueError, r"GG\[0\] must be contiguous \[12, 12\]"),
        (lambda a: changed(a, "Q", 0, torch.empty(0, 0)), ValueError, r"Q\[0\] must have the shape of GG\[0\]"),
        (lambda a: a | {"counts": a["counts"].int()}, ValueError, "counts must be a contiguous torch.int64"),
        (lambda a: a | {"hyper": a["hyper"][:, :5]}, ValueError, r"hyper must be .* of shape \[2, 6\]"),
        (lambda a: a | {"precision": "fp8"}, ValueError, "unknown precision, got 'fp8'"),
        (lambda a: changed(a, "params", 1, a["params"][1].double()), TypeError, "params must share one dtype"),
        (lambda a: a | {"params": 3}, TypeError, "params must be a tensor or a list"),
        (lambda a: changed(a, "params", 0, a["params"][0].requires_grad_()), RuntimeError, "torch.no_grad"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(spoil, error, message):
    args = tensors(SHAPES[2:4])
    before = copied(args)
    with pytest.raises(error, match=message) as caught:
        soap_update_(**spoil(args))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("soap_update_: ")
    for name in WRITTEN:
        assert all(torch.equal(x.detach(), y) for x, y in zip(args[name], before[name], strict=True))
    assert torch.equal(args["counts"], before["counts"])
