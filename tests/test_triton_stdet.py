"""The Triton kernels of the stdet ops, called directly, against the specification: to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import devices

from lic_fast import _triton
from lic_fast.functional.embedding import FlatLayout
from lic_fast.reference import stdet as reference

USABLE = [device for device in devices() if _triton.why_not(device) is None]
pytestmark = [
    pytest.mark.skipif(not USABLE, reason="Triton runs neither here nor under its interpreter"),
    pytest.mark.parametrize("device", USABLE),
]

TIED, STATELESS, OUTSIDE = FlatLayout.TIED, FlatLayout.STATELESS, FlatLayout.OUTSIDE
SHAPES = [(7,), (0,), (1,), (33, 65), (3, 5, 7), (1025,), (2048,), (1000, 1), ()]
KINDS = ["mixed", "nothing embedded", "everything embedded"]
WRITTEN = ("params", "slow", "exp_avg", "exp_avg_sq")


def module():
    return _triton.kernels("stdet")


def codes(kind, count, modes, g):
    """A byte for each of `count` elements: free, tied with or without a state, without a mode, averaged only."""
    mode = torch.randint(0, max(modes, 1), (count,), generator=g)
    if kind == "nothing embedded":
        return torch.full((count,), OUTSIDE)
    if kind == "everything embedded":
        return mode + TIED + STATELESS
    flags = torch.tensor([0, 0, TIED, TIED + STATELESS, OUTSIDE, OUTSIDE + STATELESS])
    picked = flags[torch.randint(0, len(flags), (count,), generator=g)]
    return torch.where(picked & OUTSIDE == OUTSIDE, picked, picked + mode)


def case(kind="mixed", shapes=SHAPES, modes=5, dtype=torch.float32, slow=True, device="cpu", seed=0):
    """The tensors of a step by name, in the order of the op. What no element has use for is NaN."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    layout = FlatLayout([p.numel() for p in params])
    code = layout.new_code()
    real = torch.cat([torch.arange(first, first + n) for first, n in zip(layout.starts, layout.sizes, strict=False)])
    code[real] = codes(kind, len(real), modes, g).to(torch.uint8)
    chosen = real[torch.randperm(len(real), generator=g)[:modes]]
    code[chosen] = code[chosen] & OUTSIDE  # references are free, embeddable or not
    states, embeddable = code & STATELESS == 0, code & OUTSIDE != OUTSIDE
    places = states.cumsum(0) - 1
    refs = []
    for place in chosen.tolist():
        tensor = max(t for t, first in enumerate(layout.starts[:-1]) if first <= place and layout.sizes[t])
        refs.append((tensor, place - layout.starts[tensor], int(places[place])))
    tied = code & TIED != 0
    grads = [torch.randn(p.shape, generator=g).to(dtype) for p in params]
    for grad, part in zip(grads, layout.split(tied), strict=True):
        grad.view(-1)[part] = float("nan")
    m, v, k, d = (torch.randn(len(code), generator=g) for _ in range(4))
    m[tied], k[~tied], d[~tied] = float("nan"), float("nan"), float("nan")
    hyper = torch.rand(len(params), 7, generator=g, dtype=torch.float64) * 0.1
    hyper[:, 1:4] = 1.0 - hyper[:, 1:4] * 0.5
    hyper[::2, 5], hyper[::3, 6], hyper[:, 4] = 0.0, 0.0, 1e-8
    args = {
        "params": params, "grads": grads, "slow": [torch.randn(s, generator=g) for s in shapes] if slow else [],
        "code": code, "base": layout.base_of(code), "k": k[embeddable], "d": d[embeddable],
        "exp_avg": m[states] * 0.1, "exp_avg_sq": v[states].square(),
        "refs": torch.tensor(refs, dtype=torch.int64).reshape(-1, 3),
    }  # fmt: skip
    moved = {name: [t.to(device) for t in x] if isinstance(x, list) else x.to(device) for name, x in args.items()}
    return moved | {"hyper": hyper}


def copied(args, device=None):
    def copy(t):
        return t.to(device or t.device, copy=True)

    return {name: [copy(t) for t in x] if isinstance(x, list) else copy(x) for name, x in args.items()}


def assert_same_bits(ours, theirs):
    integer = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    ours = ours.cpu()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.view(integer)[~ours.isnan()], theirs.view(integer)[~theirs.isnan()])


def assert_steps_like_the_specification(args, alpha=1.0, reset=True):
    want = copied(args, "cpu")
    reference.stdet_adam_step_(*want.values(), alpha, reset)
    module().stdet_adam_step_(*args.values(), alpha, reset)
    for name in WRITTEN:
        ours, theirs = args[name], want[name]
        for x, y in zip(*([ours, theirs] if isinstance(ours, list) else [[ours], [theirs]]), strict=True):
            assert_same_bits(x, y)
    return want


def dtypes(device):
    return [torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])]  # interpreted, it truncates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slow", "alpha", "reset"),
    [(False, 1.0, True), *((True, alpha, reset) for alpha in (0.0, 0.8, 1.0) for reset in (True, False))],
)
def test_a_step(device, kind, slow, alpha, reset):
    for dtype in dtypes(device):
        args = case(kind, dtype=dtype, slow=slow, device=device)
        before = copied(args, "cpu")
        want = assert_steps_like_the_specification(args, alpha, reset)
        changed = [not torch.equal(want["params"][i], before["params"][i]) for i in (0, 3, 5)]
        assert all(changed) and not any(p.isnan().any() for p in want["params"])


@pytest.mark.parametrize("modes", [1, 2, 63])
def test_other_numbers_of_modes(device, modes):
    for seed, kind in enumerate(KINDS):
        assert_steps_like_the_specification(case(kind, modes=modes, device=device, seed=seed), 0.8)


@pytest.mark.parametrize("shapes", [[(1,)], [(0,), (3,), (0,)], [(1024,)], [(1023,), (1025,)], [(2, 1024)]], ids=str)
def test_odd_lists(device, shapes):
    for kind in KINDS:
        assert_steps_like_the_specification(case(kind, shapes, modes=1, device=device), 0.8)


def test_tensors_without_a_gradient_are_averaged_and_rebuilt_only(device):
    for slow in (True, False):
        args = case(slow=slow, device=device)
        for i in (0, 3, 6):
            args["grads"][i] = torch.empty(0, device=device)
        assert_steps_like_the_specification(args, 0.8)


def test_misaligned_tensors(device):
    args = case(device=device)
    for name in ("params", "grads", "slow", "code", "k", "d", "exp_avg", "exp_avg_sq"):
        whole = args[name] if isinstance(args[name], list) else [args[name]]
        moved = [
            torch.cat([t.new_zeros(i % 3 + 1), t.view(-1)])[i % 3 + 1 :].view(t.shape) for i, t in enumerate(whole)
        ]
        args[name] = moved if isinstance(args[name], list) else moved[0]
    assert_steps_like_the_specification(args, 0.8)


def test_every_step_has_its_own_hyperparameters_and_gradients(device):
    args = case(device=device)
    for t in range(3):
        args["hyper"] = args["hyper"] * 0.99
        args["grads"] = [torch.randn_like(g, device=device) for g in args["grads"]]
        assert_steps_like_the_specification(args, 0.8, reset=t != 1)


def test_a_tiny_weight_decay_counts_before_it_is_rounded(device):
    """0 * p of an infinite p is NaN, and l2 that fp32 rounds to 0 is still there."""
    args = case("nothing embedded", [(8,)], modes=1, device=device)
    args["params"][0][3] = float("inf")
    args["hyper"][0, 5] = 1e-60
    want = assert_steps_like_the_specification(args)
    assert want["exp_avg"][3].isnan()


def test_references_and_modes_outside_give_nan(device):
    args = case(modes=6, device=device)
    n, states = len(SHAPES), len(args["exp_avg"])
    for row in ([n, 0, 0], [-1, 0, 0], [2**40, 0, 0], [3, 33 * 65, 0], [3, -1, 0], [1, 0, 0], [3, 2**40, 0]):
        ours = copied(args)
        want = copied(args, "cpu") | {"refs": args["refs"][:-1].cpu()}  # then the last mode has no reference either
        ours["refs"][-1] = torch.tensor(row)
        reference.stdet_adam_step_(*want.values(), 0.8, True)
        module().stdet_adam_step_(*ours.values(), 0.8, True)
        assert want["params"][3].isnan().any()
        for name in ("params", "slow"):
            for x, y in zip(ours[name], want[name], strict=True):
                assert_same_bits(x, y)
    for place in (-1, states, 2**40):
        ours = copied(args)
        ours["refs"][-1, 2] = place
        module().stdet_adam_step_(*ours.values(), 0.8, True)
        assert all(torch.equal(p.isnan().cpu(), q.isnan()) for p, q in zip(ours["params"], want["params"], strict=True))


def test_reconstruction_keeps_all_other_bits(device):
    for dtype in dtypes(device):
        for kind in KINDS:
            args = case(kind, dtype=dtype, slow=False, device=device)
            integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
            nans = {torch.float32: 0x7F812345, torch.float16: 0x7D23, torch.bfloat16: 0x7F91}
            free = [c & TIED == 0 for c in FlatLayout([p.numel() for p in args["params"]]).split(args["code"])]
            used = {(t, i) for t, i, _ in args["refs"].tolist()}
            spare = [i for i in free[3].nonzero().view(-1).tolist() if (3, i) not in used]
            args["params"][3].view(-1).view(integer)[spare[:9]] = nans[dtype]
            before, want = copied(args), copied(args, "cpu")
            names = ("params", "code", "base", "k", "d", "refs")
            reference.stdet_reconstruct_(*(want[name] for name in names))
            module().stdet_reconstruct_(*(args[name] for name in names))
            for p, q, b, kept in zip(args["params"], want["params"], before["params"], free, strict=True):
                assert_same_bits(p, q)
                assert torch.equal(p.view(integer).view(-1)[kept], b.view(integer).view(-1)[kept])


def test_mask(device):
    for dtype in dtypes(device):
        for kind in KINDS:
            args = case(kind, dtype=dtype, device=device)
            sizes = [p.numel() for p in args["params"]]
            args["grads"][0] = torch.empty(0, dtype=dtype, device=device)
            want = copied(args, "cpu")
            reference.stdet_mask_(want["grads"], want["code"], sizes)
            module().stdet_mask_(args["grads"], args["code"], sizes)
            for x, y in zip(args["grads"], want["grads"], strict=True):
                assert_same_bits(x, y)
                assert not x.isnan().any()


def test_empty_lists(device):
    args = case(shapes=[(0,), (0, 3)], modes=0, device=device)
    assert_steps_like_the_specification(args)
    module().stdet_reconstruct_(*(args[name] for name in ("params", "code", "base", "k", "d", "refs")))
    module().stdet_mask_(args["grads"], args["code"], [0, 0])


def test_the_default_dtype_does_not_matter(device):
    args = case(device=device)
    torch.set_default_dtype(torch.float64)
    try:
        assert_steps_like_the_specification(args, 0.8)
    finally:
        torch.set_default_dtype(torch.float32)
