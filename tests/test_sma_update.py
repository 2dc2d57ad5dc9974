"""lic_fast.functional.sma_update_ in every backend at hand."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from shapes import ODD, REAL, elic, strided, transposed

import lic_fast
from lic_fast.functional import sma_update_
from lic_fast.ops.sma_update import PAIRS
from lic_fast.reference.sma_update import sma_update_ as reference

EVERY_BACKEND = backend_parameters("sma_update_")
INTERPRETED = ("cpu", "triton")


def lists(shapes, slow_dtype, fast_dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    slow = [torch.randn(shape, generator=g).to(slow_dtype).to(device) for shape in shapes]
    fast = [(s.double() + 0.1 * torch.randn(s.shape, generator=g).to(device)).to(fast_dtype) for s in slow]
    return slow, fast


def clones(tensors):
    return [t.clone() for t in tensors]


@EVERY_BACKEND
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(("slow_dtype", "fast_dtype"), PAIRS, ids=[f"{s}-{f}".replace("torch.", "") for s, f in PAIRS])
def test_matches_fp64_and_reference(device, backend, slow_dtype, fast_dtype, reset):
    if (device, backend) == INTERPRETED and fast_dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")
    refused = lic_fast.explain("sma_update_", device, fast_dtype).reasons[backend]
    if refused:
        slow, fast = lists([(3,)], slow_dtype, fast_dtype, device)
        before = clones(slow + fast)
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            sma_update_(slow, fast, alpha=0.8)
        assert all(torch.equal(a, b) for a, b in zip(slow + fast, before, strict=True))
        return
    slow, fast = lists(ODD + REAL[:3], slow_dtype, fast_dtype, device)
    exact = [s.double() + 0.8 * (f.double() - s.double()) for s, f in zip(slow, fast, strict=True)]
    expected_slow, expected_fast = clones(slow), clones(fast)
    reference(expected_slow, expected_fast, 0.8, reset)
    before = clones(fast)
    with lic_fast.use_backend(backend):
        sma_update_(slow, fast, alpha=0.8, reset=reset)
    for s, e, x in zip(slow, expected_slow, exact, strict=True):
        assert_by_rule(s, e, x)
        assert torch.equal(s, e)  # all backends round alike
    for f, e, b in zip(fast, expected_fast, before, strict=True):
        assert torch.equal(f, e if reset else b)


@EVERY_BACKEND
def test_elic_list_against_foreach(device, backend):
    small = (device, backend) == INTERPRETED
    shapes = elic((32, 40)) if small else elic()
    slow, fast = lists(shapes, torch.float32, torch.float32, device)
    exact = [s.double() + 0.8 * (f.double() - s.double()) for s, f in zip(slow, fast, strict=True)]
    peer = clones(slow)
    torch._foreach_lerp_(peer, fast, 0.8)
    with lic_fast.use_backend(backend):
        sma_update_(slow, fast, alpha=0.8)
    for s, f, p, x in zip(slow, fast, peer, exact, strict=True):
        assert_by_rule(s, p, x)
        assert torch.equal(s, f)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", [strided, transposed, lambda t: t.contiguous(memory_format=torch.channels_last)])
def test_layouts(device, backend, layout):
    slow, fast = lists([(4, 6, 5, 3), (8, 3, 3, 3)], torch.float32, torch.float32, device)
    expected_slow, expected_fast = clones(slow), clones(fast)
    reference(expected_slow, expected_fast, 0.3, True)
    for make_slow, make_fast in ((layout, layout), (layout, clone := torch.clone), (clone, layout)):
        s, f = [make_slow(t) for t in slow], [make_fast(t) for t in fast]
        with lic_fast.use_backend(backend):
            sma_update_(s, f, alpha=0.3)
        assert all(torch.equal(a, b) for a, b in zip(s + f, expected_slow + expected_fast, strict=True))


@EVERY_BACKEND
def test_mixed_dtypes_misaligned_views_and_empty_lists(device, backend):
    if (device, backend) == INTERPRETED:
        kinds = [torch.float32, torch.float64, torch.float16]
    else:
        kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    told = {kind: lic_fast.explain("sma_update_", device, kind).reasons[backend] for kind in kinds}
    refused = [kind for kind, reason in told.items() if reason]
    slow = [torch.randn(1000, device=device)[i + 1 :] for i in range(len(kinds))]
    fast = [torch.randn(1001, device=device).to(kind)[i + 2 :] for i, kind in enumerate(kinds)]
    expected_slow, expected_fast = clones(slow), clones(fast)
    reference(expected_slow, expected_fast, 0.8, True)
    if refused:  # by name: nothing is written, nothing falls back; automatically: each dtype where it runs
        before = clones(slow + fast)
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            sma_update_(slow, fast, alpha=0.8)
        assert all(torch.equal(a, b) for a, b in zip(slow + fast, before, strict=True))
    with lic_fast.use_backend("auto" if refused else backend):
        sma_update_([], [], alpha=0.5)
        sma_update_(slow, fast, alpha=0.8)
    assert all(torch.equal(a, b) for a, b in zip(slow + fast, expected_slow + expected_fast, strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_alpha_and_non_finite_values(device, backend, alpha):
    slow = [torch.tensor([1.0, 2.0, float("inf"), float("nan"), 1e38], device=device)]
    fast = [torch.tensor([3.0, float("inf"), 1.0, 1.0, -1e38], device=device)]
    expected_slow, expected_fast = clones(slow), clones(fast)
    reference(expected_slow, expected_fast, alpha, True)
    with lic_fast.use_backend(backend):
        sma_update_(slow, fast, alpha=alpha)
    for ours, theirs in zip(slow + fast, expected_slow + expected_fast, strict=True):
        assert torch.equal(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0))


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    slow, fast = lists([(5, 3), (17,)], torch.float32, torch.float32, device)
    with lic_fast.use_backend(backend):
        torch.library.opcheck(torch.ops.lic_fast.sma_update_, (slow, fast, 0.8, True))
        expected_slow, expected_fast = clones(slow), clones(fast)
        reference(expected_slow, expected_fast, 0.8, True)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(s, f):
            sma_update_(s, f, alpha=0.8)
            return f[0] + 1

        out = step(slow, fast)
    assert torch.equal(out, expected_fast[0] + 1)
    assert all(torch.equal(a, b) for a, b in zip(slow + fast, expected_slow + expected_fast, strict=True))


def test_a_saved_parameter_that_was_averaged_cannot_be_differentiated():
    w = torch.randn(4, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        sma_update_(torch.zeros(4), w, alpha=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("slow", "fast", "alpha", "error", "message"),
    [
        (
            torch.ones(2),
            torch.ones(3),
            0.5,
            ValueError,
            r"fast\[0\] must have the shape of slow\[0\], got \[3\]",
        ),
        ([torch.ones(2)], [], 0.5, ValueError, "lists differ in length"),
        (torch.ones(2).bfloat16(), torch.ones(2), 0.5, TypeError, "slow.0. must be float32"),
        (torch.ones(2), torch.ones(2).long(), 0.5, TypeError, "slow.0. must be float32"),
        (torch.ones(2), torch.ones(2, device="meta"), 0.5, TypeError, "must be on the device of"),
        (torch.ones(2), torch.ones(2), 1.5, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        (torch.ones(2), torch.ones(2), float("nan"), ValueError, "alpha must be in"),
        (3.0, torch.ones(2), 0.5, TypeError, "slow must be a tensor or a list of tensors, got float"),
        (torch.ones(2), torch.ones(2, requires_grad=True), 0.5, RuntimeError, "torch.no_grad"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(slow, fast, alpha, error, message):
    before = [t.clone() for t in (slow, fast) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    with pytest.raises(error, match=message) as caught:
        sma_update_(slow, fast, alpha=alpha)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("sma_update_: ")
    after = [t for t in (slow, fast) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_shared_memory_is_refused():
    whole = torch.ones(40)
    w = whole[:32]
    for other in (w, w.view(32), whole[8:]):
        with pytest.raises(ValueError, match="share memory"):
            sma_update_(w, other, alpha=0.5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_seen_by_autograd_wherever_they_happen(compiled, inference):
    w, x = torch.ones(3), torch.ones(3, requires_grad=True)

    def change():
        sma_update_(w, torch.full((3,), 5.0), alpha=1.0)

    loss = (x * w).sum()
    with torch.inference_mode(inference):
        (torch.compile(change, backend="eager") if compiled else change)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_arguments_that_require_grad_are_refused():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="slow requires grad"):
        sma_update_(x * 1, torch.zeros(3), alpha=0.75)
