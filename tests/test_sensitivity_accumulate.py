"""lic_fast.functional.sensitivity_accumulate_ in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from shapes import ODD, REAL, elic, strided, transposed

import lic_fast
from lic_fast.functional import FlatLayout, sensitivity_accumulate_
from lic_fast.functional.embedding import in_memory_order
from lic_fast.reference.sensitivity_accumulate import KINDS
from lic_fast.reference.sensitivity_accumulate import sensitivity_accumulate_ as reference

EVERY_BACKEND = backend_parameters("sensitivity_accumulate_")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
INTERPRETED = ("cpu", "triton")
F32, F64 = torch.float32, torch.float64
DTYPES = (F32, torch.bfloat16, torch.float16, F64)
TERMS = {"taylor": lambda w, g: (w * g).abs(), "fisher": lambda w, g: g * g, "magnitude": lambda w, g: g.abs()}


def lists(shapes, dtype=F32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    params, grads = ([torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes] for _ in "pg")
    wide = F64 if dtype is F64 else F32
    return [torch.rand(p.numel(), generator=g).to(device, wide) for p in params], params, grads


def clones(tensors):
    return [t.clone() for t in tensors]


def run(s, params, grads, kind, backend):
    with lic_fast.use_backend(backend):
        sensitivity_accumulate_(s, params, grads, kind=kind)


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@EVERY_BACKEND
@EVERY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64_and_reference(device, backend, kind, dtype):
    s, params, grads = lists(ODD + REAL[:3], dtype, device)
    before = clones(s)
    if lic_fast.explain("sensitivity_accumulate_", device, dtype).reasons[backend]:
        with pytest.raises(lic_fast.BackendError, match="does not take"):
            run(s, params, grads, kind, backend)
        assert_equal(s, before)
        return
    expected = clones(s)
    reference(expected, params, grads, KINDS.index(kind))
    kept = clones(params + grads)
    run(s, params, grads, kind, backend)
    assert_equal(s, expected)  # all backends round alike
    assert_equal(params + grads, kept)
    for ours, old, p, g in zip(s, before, params, grads, strict=True):
        wide = [x.flatten().to(ours.dtype) for x in (p, g)]
        exact = old.double() + TERMS[kind](*(x.double() for x in wide))
        assert_by_rule(ours, old + TERMS[kind](*wide), exact)


@EVERY_BACKEND
def test_sums_of_several_batches_of_elic(device, backend):
    shapes = elic((32, 40)) if (device, backend) == INTERPRETED else elic()
    s, params, grads = lists(shapes, device=device)
    layout = FlatLayout([p.numel() for p in params])
    whole = torch.zeros(layout.starts[-1], device=device)
    s = layout.split(whole)
    exact = [torch.zeros(p.numel(), dtype=F64, device=device) for p in params]
    for batch in range(3):
        scaled = [g * (batch + 1) for g in grads]
        run(s, params, scaled, "taylor", backend)
        for x, p, g in zip(exact, params, scaled, strict=True):
            x += (p.double() * g.double()).abs().flatten()
    for ours, x in zip(s, exact, strict=True):
        torch.testing.assert_close(ours.double(), x, rtol=1e-6, atol=0)
    padding = torch.ones(len(whole), dtype=torch.bool, device=device)
    for part in layout.split(padding):
        part.fill_(False)
    assert padding.any() and not whole[padding].any()


@EVERY_BACKEND
@EVERY_KIND
def test_terms_that_are_not_finite_count_as_nothing(device, backend, kind):
    inf, nan = float("inf"), float("nan")
    w = torch.tensor([1.0, inf, nan, 0.0, 1e30, -1e30, 2.0, -3.0, 1.0], device=device)
    g = torch.tensor([inf, 1.0, 1.0, -inf, 1e30, 1e30, nan, 4.0, -3e38], device=device)
    s = torch.arange(9.0, device=device)
    counted = {
        "taylor": [0, 0, 0, 0, 0, 0, 0, 12.0, g[8].abs().item()],
        "fisher": [0, 1, 1, 0, 0, 0, 0, 16, 0],
        "magnitude": [0, 1, 1, 0, 1e30, 1e30, 0, 4, g[8].abs().item()],
    }[kind]
    expected = s + torch.tensor(counted, device=device)
    run([s], [w], [g], kind, backend)
    assert torch.equal(s, expected)
    s = torch.tensor([nan, inf, 1.0], device=device)  # sums that are lost already stay so
    run([s], [torch.ones(3, device=device)], [torch.ones(3, device=device)], kind, backend)
    assert s[0].isnan() and s[1:].tolist() == [inf, 2.0]


@EVERY_BACKEND
@EVERY_KIND
def test_no_term_is_negative_zero(device, backend, kind):
    s = torch.full((40,), -0.0, device=device)
    run([s], [torch.ones(40, device=device)], [torch.full((40,), -0.0, device=device)], kind, backend)
    assert not s.signbit().any()


@EVERY_BACKEND
def test_tensors_without_a_gradient_are_left_alone(device, backend):
    s, params, grads = lists([(700,), (3, 5), (0,), (2049,)], device=device)
    before = clones(s)
    grads[0], grads[1] = torch.empty(0, device=device), torch.empty(0, 5, device=device)
    run(s, params, grads, "taylor", backend)
    assert_equal(s[:3], before[:3])
    assert torch.equal(s[3], before[3] + (params[3] * grads[3]).abs())
    before = clones(s)
    run(s, params, [torch.empty(0, device=device)] * 4, "fisher", backend)
    run([], [], [], "fisher", backend)
    assert_equal(s, before)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", [strided, transposed, lambda t: t.contiguous(memory_format=torch.channels_last)])
def test_elements_pair_in_the_order_of_memory(device, backend, layout):
    _, params, grads = lists([(4, 6, 5, 3), (8, 3, 3, 3)], device=device)
    for make_p, make_g in ((layout, layout), (layout, torch.clone), (torch.clone, layout)):
        p, g = [make_p(t) for t in params], [make_g(t) for t in grads]
        s = [torch.ones(t.numel(), device=device) for t in p]
        run(s, p, g, "taylor", backend)
        for total, w, slope in zip(s, p, grads, strict=True):
            dense = w if w.stride(-1) != 2 else w.contiguous()  # strided() leaves gaps: then the order of the shape
            term = torch.empty_like(dense).copy_((w * slope).abs())
            assert torch.equal(total, 1 + in_memory_order(term))


@EVERY_BACKEND
def test_mixed_dtypes_and_views_that_are_not_aligned(device, backend):
    kinds = [kind for kind in DTYPES if kind is not torch.bfloat16 or (device, backend) != INTERPRETED]
    refused = [k for k in kinds if lic_fast.explain("sensitivity_accumulate_", device, k).reasons[backend]]
    columns = [lists([(3000,)], dtype, device, seed=i) for i, dtype in enumerate(kinds)]
    s, params, grads = ([c[j][0][i + 1 :] for i, c in enumerate(columns)] for j in range(3))
    expected, before = clones(s), clones(s)
    reference(expected, params, grads, 0)
    if refused:  # by name: nothing is written, nothing falls back; automatically: each dtype where it runs
        with pytest.raises(lic_fast.BackendError, match="does not take"):
            run(s, params, grads, "taylor", backend)
        assert_equal(s, before)
    run(s, params, grads, "taylor", "auto" if refused else backend)
    assert_equal(s, expected)


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    s, params, grads = lists([(5, 3), (17,)], device=device)
    expected = clones(s)
    reference(expected, params, grads, 0)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.sensitivity_accumulate_, (clones(s), params, grads, 1))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(total, p, g):
            sensitivity_accumulate_(total, p, g)
            return total[0] + 1

        out = step(s, params, grads)
    assert torch.equal(out, expected[0] + 1)
    assert_equal(s, expected)


def test_a_saved_sum_that_grew_cannot_be_differentiated():
    s, x = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (x * s).sum()
    sensitivity_accumulate_([s], [torch.ones(3)], [torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"s": []}, ValueError, "lists differ in length, got 1 params and 0 s"),
        ({"grads": [ONES, ONES]}, ValueError, "lists differ in length, got 1 params and 2 grads"),
        ({"s": [torch.ones(3)]}, ValueError, r"s\[0\] must be contiguous of shape \[4\], got \[3\]"),
        ({"s": [torch.ones(2, 2)]}, ValueError, r"s\[0\] must be contiguous of shape \[4\], got \[2, 2\]"),
        ({"s": [torch.ones(8)[::2]]}, ValueError, r"s\[0\] must be contiguous"),
        ({"s": [torch.ones(4, dtype=F64)]}, TypeError, r"s\[0\] must be one of float32, got torch.float64"),
        ({"params": [torch.ones(4, dtype=F64)]}, TypeError, r"s\[0\] must be one of float64"),
        ({"params": [torch.ones(4).long()]}, TypeError, r"params\[0\] must be one of"),
        ({"params": [torch.ones(4, requires_grad=True)]}, RuntimeError, "params requires grad"),
        ({"grads": [torch.ones(2, 2)]}, ValueError, r"grads\[0\] must have the shape of params\[0\]"),
        ({"grads": [torch.ones(4).half()]}, TypeError, r"grads\[0\] must be one of float32"),
        ({"grads": [torch.ones(4, device="meta")]}, TypeError, r"grads\[0\] must be on the device of"),
        ({"grads": [None]}, TypeError, "grads must be a tensor or a list of tensors"),
        ({"kind": "hessian"}, ValueError, "kind must be one of taylor, fisher, magnitude, got 'hessian'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    s = torch.full((4,), 2.0)
    with pytest.raises(error, match=message) as caught:
        sensitivity_accumulate_(**{"s": [s], "params": [ONES], "grads": [ONES], **change})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("sensitivity_accumulate_: ")
    assert s.tolist() == [2.0] * 4 and ONES.tolist() == [1.0] * 4


def test_shared_memory_is_refused():
    whole = torch.ones(40)
    for p, g in ((whole[8:], torch.ones(32)), (torch.ones(32), whole[8:]), (whole[:32], whole[:32])):
        with pytest.raises(ValueError, match=r"s\[0\] and (params|grads)\[0\] share memory"):
            sensitivity_accumulate_([whole[:32]], [p], [g])
    sensitivity_accumulate_([whole[:32]], [ONES.repeat(8)] * 1, [ONES.repeat(8)])
    assert whole[:32].tolist() == [2.0] * 32
