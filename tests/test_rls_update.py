"""lic_fast.functional.rls_update_ in every backend at hand."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import backend_parameters
from shapes import ODD, REAL, strided, transposed

import lic_fast
from lic_fast.functional import FlatLayout, rls_update_
from lic_fast.functional.embedding import in_memory_order
from lic_fast.reference.rls_update import rls_update_ as reference

EVERY_BACKEND = backend_parameters("rls_update_")
INTERPRETED = ("cpu", "triton")
TIED, STATELESS, OUTSIDE = FlatLayout.TIED, FlatLayout.STATELESS, FlatLayout.OUTSIDE
F32, F64 = torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
BITS = {F32: torch.int32, F64: torch.int64}


def embedded(shapes, dtype=F32, modes=10, device="cpu", seed=0, code_of=None):
    """The arguments of rls_update_, with codes of every kind unless code_of(n, generator) says otherwise."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    layout = FlatLayout([p.numel() for p in params])
    code = layout.new_code()
    for part in layout.split(code):
        part.copy_(any_code(part.numel(), modes, g) if code_of is None else code_of(part.numel(), g))
    base = layout.base_of(code)
    n = int(code.bitwise_and(OUTSIDE).ne(OUTSIDE).sum())
    wide = F64 if dtype is F64 else F32
    k, d = (torch.randn(n, generator=g, dtype=F64).to(wide) for _ in "kd")
    gains = torch.randn(modes, 4, generator=g, dtype=F64)
    change = torch.full((len(code),), 7.0, dtype=wide)
    return [[p.to(device) for p in params], *(x.to(device) for x in (code, base, k, d, gains, change))]


def any_code(n, modes, g):
    """Free, tied for a while and for good, of every mode and some that do not exist, dense runs and mixed ones."""
    mode = torch.randint(modes, (n,), generator=g, dtype=torch.uint8)
    state = torch.tensor([0, 0, 0, TIED, TIED | STATELESS, STATELESS], dtype=torch.uint8)
    code = mode | state[torch.randint(6, (n,), generator=g)]
    rare = torch.rand(n, generator=g)
    code = torch.where(rare < 0.05, OUTSIDE | (code & 0xC0), code)
    code = torch.where(rare > 0.98, torch.randint(256, (n,), generator=g, dtype=torch.uint8), code)
    code[512 : 512 + 300] = mode[512 : 512 + 300]  # stretches of one kind: free, outside, tied
    code[1024 : 1024 + 140] = OUTSIDE
    code[1164 : 1164 + 400] |= TIED
    return code


def free(modes):
    return lambda n, g: torch.randint(modes, (n,), generator=g, dtype=torch.uint8)


def copies(args):
    return [[x.clone() for x in a] if isinstance(a, list) else a.clone() for a in args]


def assert_same_results(args, expected):
    for ours, theirs in zip(args[3:5] + args[6:], expected[3:5] + expected[6:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_same(args, expected):
    assert_same_results(args, expected)
    for ours, theirs in zip(args[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def check(args, backend, with_change=True):
    expected = copies(args)
    reference(*expected[:6], expected[6] if with_change else None)
    with lic_fast.use_backend(backend):
        rls_update_(*args[:6], args[6] if with_change else None)
    assert_same(args, expected)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("with_change", [True, False])
def test_agrees_with_the_reference_to_the_bit(device, backend, dtype, with_change):
    args = embedded(ODD + REAL[: 3 if (device, backend) == INTERPRETED else None], dtype, device=device)
    refused = lic_fast.explain("rls_update_", device, dtype).reasons[backend]
    if refused:
        before = copies(args)
        with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
            rls_update_(*args)
        assert_same(args, before)
        return
    if dtype in (F32, F64):  # sums beyond the largest numbers, and what is no number
        args[0][-1].view(-1)[:6] = torch.tensor([INF, -INF, NAN, 1e38, -1e38, 0.0])
        args[3][:3000:7] *= 1e37
    check(args, backend, with_change)


@EVERY_BACKEND
@pytest.mark.parametrize("modes", [0, 1, 2, 16, 17, 63])
def test_numbers_of_modes(device, backend, modes):
    args = embedded([(2500,), (77,)], modes=max(modes, 1), device=device)
    args[1][:64] = torch.arange(64)  # each mode, those that do not exist too
    args[2] = FlatLayout([2500, 77]).base_of(args[1])
    n = int(args[1].bitwise_and(OUTSIDE).ne(OUTSIDE).sum())
    args[3], args[4] = (torch.randn(n, generator=torch.Generator().manual_seed(i)).to(device) for i in (1, 2))
    args[5] = args[5][:modes].contiguous()
    check(args, backend)
    assert args[6][:63].isnan().tolist() == [mode >= modes for mode in range(63)]
    assert args[3][:63].isnan().tolist() == args[4][:63].isnan().tolist() == [mode >= modes for mode in range(63)]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_who_moves(device, backend, dtype):
    """code -> whether k and d move, and change: by hand, not by the reference."""
    rules = {
        0: (True, None), 1: (True, None), OUTSIDE: (False, NAN), TIED: (False, INF), TIED | 1: (False, INF),
        TIED | STATELESS: (False, NAN), STATELESS: (False, NAN), TIED | OUTSIDE: (False, NAN),
        TIED | STATELESS | OUTSIDE: (False, NAN), STATELESS | OUTSIDE: (False, NAN),
        5: (True, NAN), TIED | 5: (False, INF),
    }  # fmt: skip
    codes = torch.tensor(list(rules) * 30, dtype=torch.uint8)
    args = embedded([(len(codes),)], dtype, modes=2, device=device, code_of=lambda n, g: codes)
    before = copies(args)
    with lic_fast.use_backend(backend):
        rls_update_(*args)
    params, _, _, k, d, gains, change = args
    slot = 0
    for i, c in enumerate(codes.tolist()):
        moves, expected = rules[c]
        if c & OUTSIDE != OUTSIDE:
            old_k, old_d = before[3][slot].item(), before[4][slot].item()
            if moves and expected is None:
                r, g0, g1, norm = gains[c].tolist()
                e = (params[0][i].item() - old_k * r) - old_d
                same = torch.tensor([old_k + e * g0, old_d + e * g1, abs(e) * norm], dtype=F64).to(dtype)
                assert [k[slot].item(), d[slot].item(), change[i].item()] == same.tolist()
            elif moves:
                assert k[slot].isnan() and d[slot].isnan()
            else:
                assert (k[slot].item(), d[slot].item()) == (old_k, old_d)
            slot += 1
        if expected is not None:
            torch.testing.assert_close(change[i].item(), expected, equal_nan=True)
    assert slot == len(k)
    assert change[len(codes) :].isnan().all() and len(change) == 1024  # padding


@EVERY_BACKEND
def test_what_stands_still_keeps_its_bits(device, backend):
    args = embedded([(5000,)], device=device)
    kept = args[1][args[1] & OUTSIDE != OUTSIDE] >= STATELESS
    odd = torch.tensor([0x7FC0BEEF, -0x80000000 + 1, 0x7F800000], dtype=torch.int32, device=device)  # NaN, -tiny, inf
    for x in args[3:5]:
        x.view(torch.int32)[kept] = odd.repeat(len(x))[: int(kept.sum())]
    before = copies(args)
    check(args, backend)
    for ours, old in zip(args[3:5], before[3:5], strict=True):
        assert torch.equal(ours.view(torch.int32)[kept], old.view(torch.int32)[kept])


class Mode:
    """What a controller keeps of a mode's reference: epochs, mean, sum of squared deviations."""

    def __init__(self, values):
        self.epochs, self.mean = len(values), values.mean()
        self.spread = ((values - self.mean) ** 2).sum()

    def gains(self, r):
        self.epochs += 1
        delta = r - self.mean
        self.mean += delta / self.epochs
        self.spread += delta * (r - self.mean)
        g0 = (r - self.mean) / self.spread if self.spread > 0 else 0.0
        g1 = 1 / self.epochs - self.mean * g0
        return [r, g0, g1, np.hypot(g0, g1)]


@EVERY_BACKEND
def test_is_least_squares_over_all_epochs(device, backend):
    if lic_fast.explain("rls_update_", device, F64).reasons[backend]:
        pytest.fail("fp64 is what this is about")
    rng, seed, epochs, modes = np.random.default_rng(0), 5, 50, 3
    n, mode = 1500, np.arange(1500) % 3
    refs = 0.3 + 0.1 * rng.standard_normal((seed + epochs, modes)).cumsum(0)
    weights = rng.standard_normal(n) * refs[:, mode] + rng.standard_normal(n)
    weights += 0.05 * rng.standard_normal((seed + epochs, n)).cumsum(0)

    def fit(upto):
        found = np.empty((2, n))
        for m in range(modes):
            columns = np.stack([refs[:upto, m], np.ones(upto)], 1)
            found[:, mode == m] = np.linalg.lstsq(columns, weights[:upto, mode == m], rcond=None)[0]
        return torch.from_numpy(found).to(device)

    args = embedded([(n,)], F64, modes, device, code_of=lambda n, g: torch.from_numpy(mode).to(torch.uint8))
    args[3], args[4] = (x.clone() for x in fit(seed))
    controller = [Mode(refs[:seed, m]) for m in range(modes)]
    for epoch in range(seed, seed + epochs):
        args[0] = [torch.from_numpy(weights[epoch]).to(device)]
        args[5] = torch.tensor([controller[m].gains(refs[epoch, m]) for m in range(modes)], dtype=F64).to(device)
        old_k, old_d = args[3].clone(), args[4].clone()
        with lic_fast.use_backend(backend):
            rls_update_(*args)
        torch.testing.assert_close(torch.stack(args[3:5]), fit(epoch + 1), rtol=1e-10, atol=1e-10)
        moved = torch.hypot(args[3] - old_k, args[4] - old_d)
        torch.testing.assert_close(args[6][:n], moved, rtol=1e-8, atol=1e-12)


@EVERY_BACKEND
def test_a_reference_that_never_moved_leaves_the_mean_to_d(device, backend):
    args = embedded([(300,)], F64, 1, device, code_of=free(1))
    history = [x.to(device) for x in torch.randn(9, 300, dtype=F64, generator=torch.Generator().manual_seed(3))]
    args[3].fill_(2.0)
    args[4].copy_(history[0] - 2.0 * 0.25)
    mode, k = Mode(np.array([0.25])), args[3].clone()
    for w in history[1:]:
        args[0], args[5] = [w], torch.tensor([mode.gains(0.25)], dtype=F64, device=device)
        with lic_fast.use_backend(backend):
            rls_update_(*args)
    assert torch.equal(args[3], k)
    torch.testing.assert_close(args[4], torch.stack(history).mean(0) - 0.5, rtol=1e-12, atol=1e-12)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", [strided, transposed, lambda t: t.contiguous(memory_format=torch.channels_last)])
def test_layouts(device, backend, layout):
    shapes = [(4, 6, 5, 3), (8, 3, 3, 3), (2, 9, 9, 9)]
    args = embedded(shapes, device=device)
    args[0] = [layout(p) for p in args[0]]
    expected = copies(args)
    expected[0] = [in_memory_order(p if p.stride(-1) != 2 else p.contiguous()) for p in args[0]]
    reference(*expected)
    with lic_fast.use_backend(backend):
        rls_update_(*args)
    assert_same_results(args, expected)


@EVERY_BACKEND
def test_views_that_are_not_aligned(device, backend):
    args = embedded([(2048,), (3000,)], device=device)
    whole = [torch.randn(4001, device=device) for _ in args[0]]
    args[0] = [x[1 : 1 + p.numel()] for x, p in zip(whole, args[0], strict=True)]
    for i in (1, 3, 4, 6):  # code, k, d, change
        args[i] = torch.cat([args[i][:1], args[i]])[1:]
    check(args, backend)


@EVERY_BACKEND
def test_empty_lists_tensors_and_embeddings(device, backend):
    with lic_fast.use_backend(backend):
        rls_update_(*embedded([], device=device))
    check(embedded([(0,), (0, 3)], device=device), backend)
    args = embedded([(5,), (0,), (1030,)], device=device, code_of=lambda n, g: torch.full((n,), OUTSIDE))
    assert args[3].numel() == 0
    check(args, backend)
    assert args[6].isnan().all()


@EVERY_BACKEND
def test_opcheck_and_compile(device, backend):
    args = embedded([(5, 3), (1100,)], device=device)
    expected = copies(args)
    reference(*expected)
    with lic_fast.use_backend(backend):
        for change in (args[6].clone(), None):
            torch.library.opcheck(torch.ops.lic_fast.rls_update_, (*copies(args[:6]), change))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(params, *rest):
            rls_update_(params, *rest)
            return rest[2] + 1

        out = step(*args)
    torch.testing.assert_close(out, expected[3] + 1, rtol=0, atol=0, equal_nan=True)
    assert_same(args, expected)


def test_threads_and_instruction_sets_do_not_matter():
    script = (
        "import torch, sys; sys.path.insert(0, 'tests'); torch.set_num_threads(int(sys.argv[1]))\n"
        "from test_rls_update import embedded, rls_update_; import hashlib\n"
        "digest = hashlib.sha256()\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "    for modes in (10, 40):\n"
        "        args = embedded([(70000,), (33, 31), (192,)], dtype, modes)\n"
        "        rls_update_(*args)\n"
        "        for x in args[3:5] + args[6:]: digest.update(x.nan_to_num(nan=7.0).numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    found = set()
    for simd, threads in (("generic", 1), ("avx2", 2), ("", 1), ("", 2)):
        env = {**os.environ, "LIC_FAST_SIMD": simd}
        run = subprocess.run([sys.executable, "-c", script, str(threads)], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.add(run.stdout.strip())
    assert len(found) == 1


def test_a_saved_coefficient_that_moved_cannot_be_differentiated():
    args = embedded([(40,)], code_of=free(10))
    x = torch.ones(40, requires_grad=True)
    loss = (x * args[3]).sum()
    rls_update_(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, [torch.ones(40), torch.ones(2)], ValueError, "code must be contiguous with 1 dimension, 2048 long"),
        (0, [torch.ones(40, dtype=torch.int32)], TypeError, r"params\[0\] must be one of"),
        (0, [torch.ones(40, requires_grad=True)], RuntimeError, "params requires grad"),
        (0, 3.0, TypeError, "params must be a tensor or a list"),
        (1, torch.zeros(1024, dtype=torch.int32), TypeError, "code must be one of uint8"),
        (2, torch.zeros(1, 3, dtype=torch.int64)[:, ::2], ValueError, "base must be contiguous"),
        (3, torch.ones(39), ValueError, "d must have the shape of k"),
        (3, torch.ones(40, dtype=F64), TypeError, "k must be one of float32"),
        (4, torch.ones(40, requires_grad=True), RuntimeError, "k, d, gains or change requires grad"),
        (5, torch.zeros(10, 4), TypeError, "gains must be one of float64"),
        (5, torch.zeros(10, 3, dtype=F64), ValueError, r"gains must be \[M, 4\] with M <= 63, got \[10, 3\]"),
        (5, torch.zeros(64, 4, dtype=F64), ValueError, r"got \[64, 4\]"),
        (5, torch.zeros(10, 4, dtype=F64, device="meta"), TypeError, "gains must be on the device of"),
        (6, torch.zeros(40), ValueError, "change must be contiguous with 1 dimension, 1024 long"),
        (6, torch.zeros(1024, dtype=F64), TypeError, "change must be one of float32"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(place, value, error, message):
    args = embedded([(40,)], code_of=free(10))
    before = copies(args)
    given = [value if i == place else x for i, x in enumerate(args)]
    with pytest.raises(error, match=message) as caught:
        rls_update_(*given)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("rls_update_: ")
    assert_same(args, before)


def test_shared_memory_is_refused():
    args = embedded([(1024,)], code_of=free(10))
    for i, j in ((4, 3), (6, 3), (6, 4)):
        with pytest.raises(ValueError, match="share memory"):
            rls_update_(*(args[j] if place == i else x for place, x in enumerate(args)))
    with pytest.raises(ValueError, match=r"d and params\[0\] share memory"):
        rls_update_([args[4]], *args[1:])


@pytest.mark.skipif("cpp" not in lic_fast.explain("rls_update_", "cpu").reasons, reason="not built")
@pytest.mark.parametrize("begin", [-1, 3000 - 951, 1 << 20, 1 << 62, -(1 << 62)])
def test_a_base_that_is_wrong_leads_nowhere(begin):
    """A block whose coefficients would lie outside k and d is left alone, and told."""
    args = embedded([(3000,)], code_of=free(10))
    expected = copies(args)
    reference(*expected)
    args[2][2, 1], old = begin, copies(args)
    with lic_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="base does not count what code holds"):
        rls_update_(*args)
    for i in (3, 4):
        assert torch.equal(args[i][:2048], expected[i][:2048]) and torch.equal(args[i][2048:], old[i][2048:])
