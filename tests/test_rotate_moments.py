"""lic_fast.functional.rotate_moments_ in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from preconditioned import SHAPES, basis, tensors

import lic_fast
from lic_fast.functional import rotate_moments_
from lic_fast.reference.rotate_moments import rotate_moments_ as reference

EVERY_BACKEND = backend_parameters("rotate_moments_")
INTERPRETED = ("cpu", "triton")


def rotations(shapes, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(3)
    made = tensors(shapes, torch.float64 if dtype is torch.float64 else torch.float32, device)
    rotation, order = [], []
    for shape, without in shapes:
        for axis, d in enumerate(shape):
            has = axis not in without
            rotation.append((basis(d, g, dtype) if has else torch.empty(0, 0, dtype=dtype)).to(device))
            order.append((torch.randperm(d, generator=g) if has else torch.empty(0, dtype=torch.int64)).to(device))
    return made["exp_avg"], made["exp_avg_sq"], rotation, order


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_fp64_and_reference(device, backend, dtype):
    if (device, backend) == INTERPRETED and dtype is torch.float64:
        pytest.skip("the Triton kernels take fp32 state")
    shapes = [*SHAPES, ((5, 5, 3, 64), ()), ((70, 100), ())]
    m, v, rotation, order = rotations(shapes, dtype, device)
    same = [x.clone() for x in m], [x.clone() for x in v]
    exact = tuple([x.to(torch.float64, copy=True) for x in xs] for xs in (m, v))
    reference(*same, rotation, order)
    reference(*exact, [r.double() for r in rotation], order)
    with lic_fast.use_backend(backend):
        rotate_moments_(m, v, rotation, order)
    for ours, s, e in zip(m, same[0], exact[0], strict=True):
        assert_by_rule(ours, s, e, factor=4.0)
    assert all(torch.equal(a, b) for a, b in zip(v, same[1], strict=True))


@EVERY_BACKEND
def test_forth_and_back_and_opcheck(device, backend):
    m, v, rotation, order = rotations([((3, 3, 10, 12), ()), ((7, 9), ())], device=device)
    before = [x.clone() for x in m], [x.clone() for x in v]
    back = [r.mT.contiguous() for r in rotation], [o.argsort() for o in order]
    with lic_fast.use_backend(backend):
        torch.library.opcheck(
            torch.ops.lic_fast.rotate_moments_, ([x.clone() for x in m], [x.clone() for x in v], rotation, order)
        )
        rotate_moments_([], [], [], [])
        rotate_moments_(m, v, rotation, order)
        rotate_moments_(m, v, *back)
    for ours, old in zip(m, before[0], strict=True):
        torch.testing.assert_close(ours, old, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(v, before[1], strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rotation": []}, ValueError, "one rotation for every axis, got 0 for 2 axes"),
        ({"order": [torch.arange(4), torch.arange(3)]}, ValueError, r"order\[0\] must be \[3\] int64"),
        ({"exp_avg_sq": [torch.ones(4, 3)]}, ValueError, r"exp_avg_sq\[0\] must have the shape"),
        ({"exp_avg": [torch.ones(3, 4).half()]}, TypeError, r"exp_avg\[0\] must be one of"),
        ({"rotation": [torch.eye(4), torch.eye(4)]}, ValueError, r"rotation\[0\] must be contiguous \[3, 3\]"),
    ],
)
def test_bad_input_is_named(change, error, message):
    m, v, rotation, order = rotations([((3, 4), ())])
    args = {"exp_avg": m, "exp_avg_sq": v, "rotation": rotation, "order": order} | change
    with pytest.raises(error, match=message) as caught:
        rotate_moments_(**args)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("rotate_moments_: ")


def test_an_order_outside_its_axis_changes_nothing():
    m, v, rotation, order = rotations([((3, 4), ())])
    before = [x.clone() for x in m + v]
    order[1][2] = 4
    with pytest.raises((ValueError, IndexError)):
        rotate_moments_(m, v, rotation, order)
    if lic_fast.explain("rotate_moments_").chosen == "cpp":
        assert all(torch.equal(a, b) for a, b in zip(m + v, before, strict=True))
