"""The grouped Triton kernels of SOAP's ops, called directly, against the specification in fp64."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, devices

from lic_fast import _triton
from lic_fast.reference.adam_update import adam_update_ as adam_reference
from lic_fast.reference.rotate_moments import rotate_moments_ as rotate_reference
from lic_fast.reference.soap_update import soap_update_ as soap_reference

USABLE = [device for device in devices() if _triton.why_not(device) is None]
pytestmark = [
    pytest.mark.skipif(not USABLE, reason="Triton runs neither here nor under its interpreter"),
    pytest.mark.parametrize("device", USABLE),
]

# shape, which axes have a factor
SMALL = [((7,), "1"), ((1,), "1"), ((5, 9), "11"), ((3, 3, 5, 3), "1111"), ((2, 1, 5, 7), "1000")]
MIXED = [
    ((37,), "1"), ((36, 20), "11"), ((70, 3), "11"), ((20, 70), "01"), ((20, 9), "10"), ((6, 10), "00"),
    ((3, 3, 8, 12), "1111"), ((3, 3, 8, 12), "0011"), ((1, 1, 12, 16), "1111"), ((5, 5, 6, 4), "1100"),
    ((2, 3, 2, 5, 4), "11111"), ((7, 7, 2, 3), "1111"), ((5, 4, 5, 2, 3), "00011"), ((1, 1), "11"),
]  # fmt: skip


def module(name):
    return _triton.kernels(name)


def tensors(cases, device="cpu", dtype=torch.float32, seed=0):
    """[params, grads, exp_avg, exp_avg_sq, GG, Q], the first four laid out plainly."""
    g = torch.Generator().manual_seed(seed)
    lists = [[], [], [], [], [], []]
    for shape, axes in cases:
        made = [torch.randn(shape, generator=g) for _ in range(4)]
        made[2].mul_(0.1)
        made[3].square_()
        for place, t in zip(lists, made, strict=False):
            place.append(t)
        for d, on in zip(shape, axes, strict=True):
            factor = torch.randn((d, d + 2), generator=g) if on == "1" else torch.empty(0, 0)
            gram = (factor @ factor.T / d).tril()
            lists[4].append(gram + gram.tril(-1).T if on == "1" else torch.empty(0, 0))
            basis = torch.linalg.qr(torch.randn((d, d), generator=g))[0] if on == "1" else torch.empty(0, 0)
            lists[5].append(basis.contiguous())
    lists[:2] = [[t.to(dtype) for t in x] for x in lists[:2]]
    return [[t.to(device) for t in x] for x in lists]


def copies(lists, dtype=None):
    return [[t.clone() if dtype is None else t.to(dtype, copy=True) for t in x] for x in lists]


def scalars(n, device, **changes):
    row = {"lr": 3e-3, "beta1": 0.95, "beta2": 0.9, "shampoo_beta": 0.8, "eps": 1e-8, "weight_decay": 0.1} | changes
    counts = torch.tensor([[3 * i, i] for i in range(n)]).reshape(n, 2)
    return counts.to(device), torch.tensor([list(row.values())] * n, dtype=torch.float64).reshape(n, 6).to(device)


def as_weights(t):
    """The view [kh, kw, O, I] of a weight that lies as [O, I, kh, kw]."""
    if t.dim() < 3:
        return t
    return t.permute(-2, -1, *range(t.dim() - 2)).contiguous().permute(*range(2, t.dim()), 0, 1)


LAYOUTS = {
    "plain": lambda t: t.clone(),
    "weights": as_weights,
    "channels_last": lambda t: t.movedim(-2, 0).contiguous().movedim(0, -2) if t.dim() > 2 else t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 1],
}


def check(ours, same, exact, tiny=4.0):
    for lists in zip(ours, same, exact, strict=True):
        for x, y, z in zip(*lists, strict=True):
            assert_by_rule(x, y, z, tiny)


def run_soap(lists, device, normalize=False, correct=True, precision="tf32x3", **changes):
    """Ours, the specification in the same dtype, and in fp64 from the same values."""
    n = len(lists[0])
    counts, hyper = scalars(n, device, **changes)
    same, exact = copies(lists), copies(lists, torch.float64)
    counts_same, counts_exact = counts.clone(), counts.clone()
    soap_reference(*same, counts_same, hyper, correct, normalize, precision)
    soap_reference(*exact, counts_exact, hyper, correct, normalize, precision)
    grads = copies([lists[1]])[0]
    assert module("soap_update").soap_update_(*lists, counts, hyper, correct, normalize, precision)
    assert torch.equal(counts, counts_exact)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(lists[1], grads, strict=True))
    return same, exact


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_soap_in_every_layout(device, layout):
    lists = tensors(MIXED, device)
    lists[:2] = [[LAYOUTS[layout](t) for t in x] for x in lists[:2]]
    same, exact = run_soap(lists, device)
    check(lists, same, exact)
    for GG in lists[4]:
        assert torch.equal(GG, GG.mT)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("correct", [False, True])
def test_soap_on_lists_of_one(device, case, correct):
    lists = tensors([case], device)
    check(lists, *run_soap(lists, device, correct=correct, precision="ieee", shampoo_beta=0.3))


def test_soap_adds_long_sums_in_pieces(device):
    lists = tensors([((2, 900, 5), "111"), ((3000, 4), "01")], device)
    check(lists, *run_soap(lists, device))
    again = tensors([((2, 900, 5), "111"), ((3000, 4), "01")], device)
    run_soap(again, device)
    assert all(torch.equal(a, b) for x, y in zip(lists, again, strict=True) for a, b in zip(x, y, strict=True))


def test_soap_takes_half_precision(device):
    for dtype in [torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16]:  # the interpreter truncates
        lists = tensors(SMALL + MIXED[:4], device, dtype)
        lists[:2] = [[as_weights(t) for t in x] for x in lists[:2]]
        check(lists, *run_soap(lists, device))


def test_soap_normalizes_the_update(device):
    lists = tensors(SMALL + MIXED[:8], device)
    check(lists, *run_soap(lists, device, normalize=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_soap_skips_a_gradient_that_is_not_finite(device, bad):
    lists = tensors(SMALL, device)
    for i in (0, 3):
        lists[1][i].view(-1)[-1] = bad
    before = copies(lists)
    same, exact = run_soap(lists, device, normalize=bad > 0)
    lists[1], same[1], exact[1] = [], [], []
    check(lists, same, exact)
    assert all(torch.equal(lists[x][i], before[x][i]) for x in (0, 2, 3) for i in (0, 3))


def test_soap_refuses_what_it_does_not_take(device):
    soap = module("soap_update").soap_update_
    for cases, change in (
        ([((9, 9, 3, 3), "1111")], lambda x: x),
        ([((3, 3), "11")], lambda x: [[t.double() for t in y] for y in x]),
        ([((3, 3), "11")], lambda x: [x[0], x[1], [t.mT for t in x[2]], *x[3:]]),
    ):
        lists = change(tensors(cases, device))
        before, (counts, hyper) = copies(lists), scalars(1, device)
        assert not soap(*lists, counts, hyper, True, False, "tf32")
        assert all(torch.equal(a, b) for x, y in zip(lists, before, strict=True) for a, b in zip(x, y, strict=True))
        assert counts.tolist() == [[0, 0]]
    assert soap([], [], [], [], [], [], *scalars(0, device), True, False, "tf32")


def test_soap_waits_for_nothing_and_keeps_its_plan(device, monkeypatch):
    lists = tensors(SMALL, device)
    counts, hyper = scalars(len(SMALL), device)
    soap = module("soap_update").soap_update_
    assert soap(*lists, counts, hyper, True, False, "tf32")

    def refuse(*args, **kwargs):
        raise AssertionError("a launch waits for the device, or builds its plan anew")

    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module("soap_plan"), "build", refuse)
            patch.setattr(module("plans"), "table", refuse)
            for name in ("item", "tolist", "cpu") if device == "cuda" else ():
                patch.setattr(torch.Tensor, name, refuse)
            hyper[:, 0] *= 2  # read on the device
            lists[1] = [t.clone() for t in lists[1]]  # gradients elsewhere
            assert soap(*lists, counts, hyper, True, False, "tf32")
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(counts[:, 0].cpu(), torch.tensor([3 * i + 2 for i in range(len(SMALL))]))


def test_rotation_of_moments(device):
    cases = SMALL + MIXED
    lists = tensors(cases, device)
    moments, rotation = lists[2:4], lists[5]
    g = torch.Generator().manual_seed(5)
    order = [torch.randperm(len(Q), generator=g).to(device) for Q in rotation]
    same, exact = copies(moments), copies(moments, torch.float64)
    rotate_reference(*same, rotation, order)
    rotate_reference(*exact, [Q.double() for Q in rotation], order)
    untouched = [m.data_ptr() for m in moments[0]]
    assert module("rotate_moments").rotate_moments_(*moments, rotation, order)
    check(moments, same, exact)
    assert all(torch.equal(a, b) for a, b in zip(moments[1], same[1], strict=True))
    assert [m.data_ptr() for m in moments[0]] == untouched
    assert module("rotate_moments").rotate_moments_([], [], [], [])


def test_rotation_keeps_its_plan_wherever_rotations_lie(device, monkeypatch):
    lists = tensors(SMALL, device)
    rotate, moments = module("rotate_moments").rotate_moments_, lists[2:4]
    order = [torch.empty(0, dtype=torch.int64, device=device)] * len(lists[5])
    assert rotate(*moments, lists[5], order)
    same, rotation = copies(moments), [Q.clone() for Q in lists[5]]  # as a CUDA graph's pool has them: elsewhere
    monkeypatch.setattr(module("plans"), "table", None)
    assert rotate(*moments, rotation, order)
    exact = copies(same, torch.float64)
    rotate_reference(*same, rotation, order)
    rotate_reference(*exact, [Q.double() for Q in rotation], order)
    check(moments, same, exact)


def test_rotation_knows_another_dtype_at_the_same_address(device):
    rotate, memory = module("rotate_moments").rotate_moments_, torch.ones(2, 24, device=device)
    turn = torch.eye(4, device=device).flip(0).contiguous()
    empty, order = torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    m, v = (half[:12].view(3, 4) for half in memory)
    assert rotate([m], [v], [empty, turn], [order, order])
    m, v = (half.view(torch.float64).view(3, 4) for half in memory)
    assert not rotate([m], [v], [empty, turn], [order, order])
    assert not rotate([m], [v], [empty.double(), turn.double()], [order, order])


def test_as_many_plans_are_kept_as_staggered_refreshes_have(device):
    plans = module("plans")
    for build in (lambda: "plan", None):  # the second time round there is nothing to build
        for i in range(100):
            assert plans.plan(("many", i), torch.device(device), build) == "plan"


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adam(device, correct, dtype):
    shapes = [(), (0,), (1,), (7,), (192, 3, 1), (3, 0), (1025,), (4, 6, 5, 3)]
    g = torch.Generator().manual_seed(1)
    lists = [[torch.randn(s, generator=g).to(device) for s in shapes] for _ in range(4)]
    lists[3] = [t.square() for t in lists[3]]
    lists = [[t.mT.contiguous().mT if t.dim() == 3 else t for t in x] for x in lists]
    lists[:2] = [[t.to(dtype) for t in x] for x in lists[:2]]
    lists[1][3][2] = float("inf")
    counts, hyper = scalars(len(shapes), device)
    same, exact, told = copies(lists), copies(lists, torch.float64), counts.clone()
    adam_reference(*same, counts.clone(), hyper, correct, False)
    adam_reference(*exact, told, hyper, correct, False)
    adam = module("adam_update").adam_update_
    assert adam(*lists, counts, hyper, correct, False)
    assert torch.equal(counts, told)
    check(lists[::2] + lists[3:], same[::2] + same[3:], exact[::2] + exact[3:])
    assert torch.equal(lists[2][3], same[2][3]) and torch.equal(lists[0][3], same[0][3])
    assert not adam(*lists, counts, hyper, correct, True)
    assert not adam([t.double() for t in lists[0]], *lists[1:], counts, hyper, correct, False)
    assert torch.equal(counts, told)
