"""lic_fast.functional.adam_update_ in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from preconditioned import copied, tensors
from shapes import ODD, REAL, transposed

import lic_fast
from lic_fast.functional import adam_update_
from lic_fast.reference.adam_update import adam_update_ as reference

EVERY_BACKEND = backend_parameters("adam_update_")
INTERPRETED = ("cpu", "triton")
WRITTEN = ("params", "exp_avg", "exp_avg_sq")


def lists(shapes, dtype=torch.float32, device="cpu"):
    args = tensors([(shape, range(len(shape))) for shape in shapes], dtype, device)
    return {name: value for name, value in args.items() if name not in ("GG", "Q")}


def run(args, backend, **settings):
    """In `backend`; where it refuses these settings by name, nothing may have changed, and auto mode runs them."""
    before = copied(args)
    try:
        with lic_fast.use_backend(backend):
            adam_update_(**args, **settings)
    except lic_fast.BackendError:
        assert settings.get("normalize_grads")
        assert all(torch.equal(x, y) for name in WRITTEN for x, y in zip(args[name], before[name], strict=True))
        assert torch.equal(args["counts"], before["counts"])
        adam_update_(**args, **settings)


def assert_agrees(args, before, correct_bias=True, normalize_grads=False):
    exact, same = copied(before, torch.float64), copied(before)
    for twin in (exact, same):
        reference(*twin.values(), correct_bias, normalize_grads)
    for name in WRITTEN:
        for x, s, e in zip(args[name], same[name], exact[name], strict=True):
            assert_by_rule(x, s, e)
    assert torch.equal(args["counts"], exact["counts"])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"correct_bias": False}, {"normalize_grads": True}], ids=str)
def test_matches_fp64_and_reference(device, backend, dtype, settings):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    args = lists(ODD + REAL[:2], dtype, device)
    if settings.get("normalize_grads"):
        args = lists([shape for shape in ODD + REAL[:2] if 0 not in shape], dtype, device)
    before = copied(args)
    if lic_fast.explain("adam_update_", device, dtype).reasons[backend]:
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            adam_update_(**args, **settings)
        assert all(torch.equal(x, y) for name in WRITTEN for x, y in zip(args[name], before[name], strict=True))
        return
    run(args, backend, **settings)
    assert_agrees(args, before, **settings)


@EVERY_BACKEND
def test_layouts(device, backend):
    args = lists([(4, 6, 5, 3), (8, 3, 3, 3), (5, 7)], device=device)
    before = copied(args)
    args["params"] = [transposed(p) for p in args["params"]]
    args["grads"][1] = args["grads"][1].contiguous(memory_format=torch.channels_last)
    args["exp_avg"][2] = transposed(args["exp_avg"][2])
    run(args, backend)
    assert_agrees(args, before)


@EVERY_BACKEND
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_tensor(device, backend, value):
    args = lists([(1000,), (3,), (70, 40)], device=device)
    args["grads"][2][-1, -1] = value
    before = copied(args)
    run(args, backend)
    assert_agrees(args, before)
    assert all(torch.equal(args[name][2], before[name][2]) for name in WRITTEN)
    assert args["counts"].tolist() == [[4, 1], [4, 1], [3, 2]]


@EVERY_BACKEND
def test_first_step_and_opcheck(device, backend):
    args = lists([(65,), (2, 3)], device=device)
    args["counts"].zero_()
    before = copied(args)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.adam_update_, (*copied(args).values(), True, False))
        adam_update_(**{name: [] if isinstance(value, list) else value[:0] for name, value in args.items()})
    run(args, backend)
    assert_agrees(args, before)


def test_agrees_with_torch_adamw():
    """torch adds eps after the bias correction and decays before the update: eps = 0 and no decay make them one."""
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0)
    args = {name: [torch.zeros(50, dtype=torch.float64)] for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    args["params"] = [p.detach().clone()]
    counts = torch.zeros(1, 2, dtype=torch.int64)
    hyper = torch.tensor([[1e-2, 0.9, 0.95, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(50, dtype=torch.float64)
        theirs.step()
        adam_update_(**args | {"grads": [p.grad]}, counts=counts, hyper=hyper)
    torch.testing.assert_close(args["params"][0], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": [torch.ones(4)]}, ValueError, r"grads\[0\] must have the shape"),
        ({"grads": []}, ValueError, "lists differ in length"),
        ({"params": [torch.ones(3, dtype=torch.int32)]}, TypeError, r"params\[0\] must be one of"),
        ({"exp_avg": [torch.ones(3).bfloat16()]}, TypeError, r"exp_avg\[0\] must be one of float32"),
        ({"counts": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "counts must be a contiguous"),
        ({"hyper": None}, TypeError, "hyper must be a tensor"),
        ({"grads": [torch.ones(3).to_sparse()]}, TypeError, "must be dense"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    args = lists([(3,)])
    before = copied(args)
    with pytest.raises(error, match=message) as caught:
        adam_update_(**args | change)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("adam_update_: ")
    assert all(torch.equal(x, y) for name in WRITTEN for x, y in zip(args[name], before[name], strict=True))
