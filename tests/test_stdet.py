"""lic_fast.functional.stdet_adam_step_, stdet_reconstruct_ and stdet_mask_ in every backend at hand."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_by_rule, backend_parameters
from embedded import HYPER, by_equations, copied, embedded, spread, written
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import ODD, REAL, elic, strided, transposed

import lic_fast
from lic_fast.functional import FlatLayout, stdet_adam_step_, stdet_mask_, stdet_reconstruct_
from lic_fast.functional.embedding import in_memory_order
from lic_fast.reference import stdet as reference

EVERY_BACKEND = backend_parameters("stdet_adam_step_")
INTERPRETED = ("cpu", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHARES = {
    "free": {"tied": 0.0},
    "mixed": {},
    "all with a state": {"kept": 1.0},
    "none with a state": {"kept": 0.0},
    "nothing embeddable": {"tied": 0.0, "outside": 1.0},
    "all tied": {"tied": 1.0, "kept": 0.0},
}
WITH_DECAY = [*HYPER[:5], 0.01, 0.003]


def skip_where_the_interpreter_truncates(device, backend, dtype):
    if (device, backend) == INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bf16 stores")


def refused(device, backend, dtype):
    """Whether the backend does not take the dtype; a forced one must then say so and change nothing."""
    if not lic_fast.explain("stdet_adam_step_", device, dtype).reasons[backend]:
        return False
    args = embedded([(3, 5)], dtype, device)
    before = copied(args)
    with lic_fast.use_backend(backend), pytest.raises(lic_fast.BackendError, match="does not take"):
        stdet_adam_step_(**args)
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(before), strict=True))
    return True


def assert_steps_agree(args, backend, alpha=0.8, reset=True):
    """One step in `backend`: bit for bit the reference (in fp64 by the rule), by the rule what fp64 makes of it."""
    same, exact = copied(args), by_equations(args, alpha, reset)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=alpha, reset=reset)
    reference.stdet_adam_step_(*same.values(), alpha, reset)
    for x, s, e in zip(written(args), written(same), exact, strict=True):
        assert_by_rule(x, s, e.to(x.device))
        if x.dtype is not torch.float64:  # torch's fp64 roots on the CPU are its vector library's, an ulp off
            assert torch.equal(x, s)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind", ["no average", "average", "average and reset"])
def test_matches_reference_and_fp64(device, backend, dtype, shares, kind):
    skip_where_the_interpreter_truncates(device, backend, dtype)
    if refused(device, backend, dtype):
        return
    shapes = ODD + REAL[:3]
    args = embedded(shapes, dtype, device, missing=(4, 9), slow=kind != "no average", **SHARES[shares])
    assert_steps_agree(args, backend, reset=kind == "average and reset")


@EVERY_BACKEND
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("reset", [True, False])
def test_ends_of_alpha_decay_and_one_mode(device, backend, alpha, reset):
    for modes in (1, 62):
        args = embedded(ODD, device=device, modes=modes, hyper=WITH_DECAY)
        if alpha == 1.0:  # slow is then not even looked at
            free = spread(args, "exp_avg", float("nan")).isnan().logical_not()
            slow, place = in_memory_order(args["slow"][6]), FlatLayout([p.numel() for p in args["params"]]).starts[6]
            slow[free[place : place + 1025] & (args["code"][place : place + 1025] < 128)] = float("nan")
            assert slow.isnan().any()
        else:
            assert_steps_agree(copied(args), backend, alpha, reset)
        same = copied(args)
        with lic_fast.use_backend(backend):
            stdet_adam_step_(**args, alpha=alpha, reset=reset)
        reference.stdet_adam_step_(*same.values(), alpha, reset)
        assert all(torch.equal(x, y) for x, y in zip(written(args), written(same), strict=True))


@EVERY_BACKEND
def test_parameters_of_elic(device, backend):
    args = embedded(elic((32, 40)), device=device, modes=10, missing=range(0, 300, 7))
    assert_steps_agree(args, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", [strided, transposed, lambda t: t.contiguous(memory_format=torch.channels_last)])
def test_layouts(device, backend, layout):
    """Dense parameters are walked as memory holds them, strided ones as if they were contiguous."""
    args = embedded([(4, 6, 5, 3), (8, 30, 3, 3), (70, 40, 1, 1)], device=device)
    args["params"] = [layout(p) for p in args["params"]]
    args["grads"][0], args["slow"][1] = layout(args["grads"][0]), layout(args["slow"][1])
    args["slow"][2] = strided(args["slow"][2])
    dense = copied(args)
    if layout is strided:
        dense["params"] = [p.contiguous() for p in dense["params"]]
    for name in ("grads", "slow"):
        dense[name] = [torch.empty_like(p).copy_(x) for p, x in zip(dense["params"], dense[name], strict=True)]
    reference.stdet_adam_step_(*dense.values(), 0.8, True)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=0.8)
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(dense), strict=True))


@EVERY_BACKEND
def test_what_is_not_finite_stays_where_it_is(device, backend):
    """NaN and infinity in what an element does not use do not reach it; a mode that is none gives NaN."""
    args = embedded([(63, 65), (3000,)], device=device, modes=2)
    code = FlatLayout([p.numel() for p in args["params"]]).split(args["code"])
    for p, g, c in zip(args["params"], args["grads"], code, strict=True):
        in_memory_order(g)[c >= 128] = float("nan")
        in_memory_order(p)[c >= 128] = float("inf")
    expected = copied(args)
    reference.stdet_adam_step_(*expected.values(), 0.8, True)
    assert all(x.isfinite().all() for x in written(expected))
    wild = copied(args)
    tied = (wild["code"] >= 128).nonzero().flatten()[::3]
    wild["code"][tied] = wild["code"][tied] & 192 | torch.arange(len(tied), device=device).to(torch.uint8) % 61 + 2
    for x in (args, wild):
        same = copied(x)
        reference.stdet_adam_step_(*same.values(), 0.8, True)
        with lic_fast.use_backend(backend):
            stdet_adam_step_(**x, alpha=0.8)
        for ours, theirs in zip(written(x), written(same), strict=True):
            assert torch.equal(ours.nan_to_num(nan=-7.0), theirs.nan_to_num(nan=-7.0))
    assert sum(int(p.isnan().sum()) for p in wild["params"]) == len(tied)


@EVERY_BACKEND
@pytest.mark.parametrize(("optimizer", "decay"), [("Adam", 0.0), ("Adam", 0.1), ("AdamW", 0.1)])
def test_steps_in_a_row_are_those_of_torch(device, backend, optimizer, decay):
    lr, b1, b2, eps = 1e-2, 0.9, 0.99, 1e-8
    args = embedded([(7, 9), (1030,), (1,)], device=device, modes=0, tied=0.0, outside=1.0, slow=False)
    args["exp_avg"].zero_(), args["exp_avg_sq"].zero_()
    twins = [[p.to(t, copy=True).requires_grad_() for p in args["params"]] for t in (torch.float32, torch.float64)]
    theirs = [
        getattr(torch.optim, optimizer)(twin, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, foreach=False)
        for twin in twins
    ]
    for step in range(1, 7):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in args["params"]]
        l2, wd = (decay, 0.0) if optimizer == "Adam" else (0.0, lr * decay)
        row = [lr / (1 - b1**step), b1, b2, (1 - b2**step) ** -0.5, eps, l2, wd]
        args["hyper"] = torch.tensor([row] * 3, dtype=torch.float64)
        args["grads"] = [g.to(device) for g in gradients]
        with lic_fast.use_backend(backend):
            stdet_adam_step_(**args)
        for twin, their in zip(twins, theirs, strict=True):
            for p, g in zip(twin, args["grads"], strict=True):
                p.grad = g.to(p.dtype)
            their.step()
    for x, s, e in zip(args["params"], *twins, strict=True):
        assert_by_rule(x, s.detach(), e.detach())


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruct_and_mask(device, backend, dtype):
    skip_where_the_interpreter_truncates(device, backend, dtype)
    if refused(device, backend, dtype):
        return
    for shares in SHARES.values():
        args = embedded(ODD + REAL[:3], dtype, device, missing=(4, 9), **shares)
        sizes = [p.numel() for p in args["params"]]
        embedding = [args[name] for name in ("code", "base", "k", "d", "refs")]
        expected = copied(args)
        reference.stdet_reconstruct_(expected["params"], *embedding)
        reference.stdet_mask_(expected["grads"], args["code"], sizes)
        with lic_fast.use_backend(backend):
            stdet_reconstruct_(args["params"], *embedding)
            stdet_mask_(args["grads"], args["code"], sizes=sizes)
        for name in ("params", "grads"):
            assert all(torch.equal(x, y) for x, y in zip(args[name], expected[name], strict=True))
        for p, g, c in zip(args["params"], args["grads"], FlatLayout(sizes).split(args["code"]), strict=True):
            assert not p.isnan().any()
            assert not in_memory_order(g)[c >= 128].any() if g.numel() else True


@EVERY_BACKEND
def test_empty_lists_opcheck_and_compile(device, backend):
    args = embedded([(5, 3), (0,), (1100,)], device=device, missing=(0,))
    expected, nothing = copied(args), embedded([], device=device, modes=0)
    embedding = [args[name] for name in ("code", "base", "k", "d", "refs")]
    sizes = [p.numel() for p in args["params"]]
    reference.stdet_adam_step_(*expected.values(), 0.8, True)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**nothing)
        stdet_reconstruct_([], *(nothing[name] for name in ("code", "base", "k", "d", "refs")))
        stdet_mask_([], nothing["code"], sizes=[])
        x = copied(args)
        torch.library.opcheck(torch.ops.lic_fast.stdet_adam_step_, (*x.values(), 0.8, True))
        torch.library.opcheck(torch.ops.lic_fast.stdet_reconstruct_, (x["params"], *embedding))
        torch.library.opcheck(torch.ops.lic_fast.stdet_mask_, (x["grads"], x["code"], sizes))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(**x):
            stdet_mask_(x["grads"], x["code"], sizes=sizes)
            stdet_adam_step_(**x, alpha=0.8)
            return x["params"][0] + 1

        out = step(**args)
    assert torch.equal(out, expected["params"][0] + 1)
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(expected), strict=True))


def digest():
    """Of what steps leave whose blocks hold every kind of element; run in processes of their own too."""
    told = hashlib.sha256()
    for dtype in DTYPES:
        for seed, shares in enumerate(SHARES.values()):
            args = embedded([*ODD, (96, 192, 3, 3), (192, 3, 5, 5)], dtype, seed=seed, missing=(9,), **shares)
            for averaging in (args["slow"], []):
                stdet_adam_step_(**args | {"slow": averaging}, alpha=0.8)
            stdet_mask_(args["grads"], args["code"], sizes=[p.numel() for p in args["params"]])
            for tensor in [*written(args), *args["grads"]]:
                told.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def test_simd_variants_and_thread_counts_agree_bit_for_bit():
    whole = digest()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert digest() == whole
    finally:
        torch.set_num_threads(threads)
    if lic_fast.explain("stdet_adam_step_", "cpu").reasons["cpp"]:
        return
    code = "import test_stdet as t; print(t.digest())"
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(lic_fast.__file__).parents[1])])
    for variant in ("generic", "avx2"):
        env = os.environ | {"LIC_FAST_SIMD": variant, "PYTHONPATH": here, "LIC_FAST_BACKEND": "cpp"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == whole


@EVERY_BACKEND
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 63, 255, 1023, 1024, 1025, 2500]), min_size=1, max_size=5),
    shares=st.tuples(*[st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0])] * 3),
    seed=st.integers(0, 2**31),
    averages=st.booleans(),
    reset=st.booleans(),
)
def test_any_code(device, backend, sizes, shares, seed, averages, reset):
    tied, kept, outside = shares
    modes = min(sum(sizes), 5)
    args = embedded(
        [(n,) for n in sizes], device=device, seed=seed, modes=modes, slow=averages,
        tied=tied if modes else 0.0, kept=kept, outside=outside, missing=(seed % 7,),
    )  # fmt: skip
    assert_steps_agree(args, backend, 0.7, reset)


@pytest.mark.skipif("cpp" not in lic_fast.explain("stdet_adam_step_", "cpu").reasons, reason="not built")
@pytest.mark.parametrize("offset", [-1, 1, 1 << 40, -(1 << 62), 1 << 62])
def test_a_base_that_is_wrong_leads_nowhere(offset):
    """Where a block's moments or coefficients would lie outside the tensors, it is left alone, and told."""
    for column in (0, 1):
        args = embedded([(5000,)], slow=False)
        args["base"][0 if offset == -1 else -1, column] += offset
        with lic_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="base does not count what code holds"):
            stdet_adam_step_(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "lists differ in length"),
        ({"grads": [torch.ones(4)]}, ValueError, r"grads\[0\] must have the shape"),
        ({"grads": [torch.ones(3).double()]}, TypeError, r"grads\[0\] must be as params\[0\]"),
        ({"params": [torch.ones(3, dtype=torch.int32)]}, TypeError, r"params\[0\] must be one of"),
        ({"params": [torch.ones(3, requires_grad=True)]}, RuntimeError, r"torch.no_grad"),
        ({"slow": [torch.ones(3).bfloat16()]}, TypeError, r"slow\[0\] must be"),
        ({"code": torch.zeros(3, dtype=torch.uint8)}, ValueError, "code must be contiguous with 1 dimension, 1024"),
        ({"base": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "base must be contiguous with 2 dimensions"),
        ({"k": torch.ones(7)}, ValueError, "must have the shape of k"),
        ({"exp_avg": torch.ones(7).double()}, TypeError, "exp_avg must be"),
        ({"refs": torch.zeros(64, 3, dtype=torch.int64)}, ValueError, r"refs must be \[M, 3\] with M <= 63"),
        ({"hyper": torch.ones(1, 6, dtype=torch.float64)}, ValueError, r"hyper must be float64 \[1, 7\]"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"hyper": None}, TypeError, "hyper must be a tensor"),
        ({"slow": [torch.ones(3, requires_grad=True)]}, RuntimeError, r"torch.no_grad"),
        ({"exp_avg": torch.ones(3, requires_grad=True)}, RuntimeError, r"torch.no_grad"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    args = embedded([(3,)], modes=1, missing=() if "grads" in change else (0,))
    before = copied(args)
    with pytest.raises(error, match=message) as caught:
        stdet_adam_step_(**args | change)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("stdet_adam_step_: ")
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(before), strict=True))


@pytest.mark.parametrize("row", [[1, 0, 0], [-1, 0, 0], [0, 3, 0], [0, 0, 99], [0, 0, -1]])
def test_references_outside_the_tensors_are_refused(row):
    if lic_fast.explain("stdet_adam_step_", "cpu").reasons["cpp"]:
        pytest.skip("cpp is not built")
    args = embedded([(3,)], modes=1, tied=0.0)
    before = copied(args)
    args["refs"] = torch.tensor([row])
    with lic_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="a reference lies outside of them"):
        stdet_adam_step_(**args)
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(before), strict=True))


@pytest.mark.parametrize("name", ["params", "grads", "slow", "d", "exp_avg", "exp_avg_sq"])
def test_shared_memory_is_refused(name):
    if lic_fast.explain("stdet_adam_step_", "cpu").reasons["cpp"]:
        pytest.skip("cpp is not built")
    args = embedded([(2000,), (3, 5)])
    shared = args["params"][0]  # of the first tensor's last elements, but for `params`: then of others
    given = args[name]
    if isinstance(given, list):
        given = [shared, given[1]] if name != "params" else [shared, shared[1985:].view(3, 5)]
    else:
        given = args["exp_avg" if name == "exp_avg_sq" else "exp_avg_sq"][: len(given)]
        args["d"], args["k"] = (given, args["k"][: len(given)]) if name == "d" else (args["d"], args["k"])
    args[name] = given
    before = copied(args)
    with lic_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="share memory"):
        stdet_adam_step_(**args)
    assert all(torch.equal(x, y) for x, y in zip(written(args), written(before), strict=True))


@EVERY_BACKEND
def test_alpha_that_only_rounds_to_one_averages(device, backend):
    args = embedded([(3000,)], device=device)
    args["slow"][0] *= 1e3
    assert_steps_agree(args, backend, alpha=1 - 2**-30, reset=False)


@EVERY_BACKEND
def test_tied_elements_without_coefficients_become_nan(device, backend):
    args = embedded([(3000,)], device=device)
    code = args["code"]
    lost = [int((code & 0xC0 == kind).nonzero()[9]) for kind in (0x80, 0xC0)]  # with a state and without
    code[lost] |= FlatLayout.OUTSIDE
    args["base"], args["k"], args["d"] = FlatLayout([3000]).base_of(code), args["k"][2:], args["d"][2:]
    same = copied(args)
    reference.stdet_adam_step_(*same.values(), 0.8, True)
    with lic_fast.use_backend(backend):
        stdet_adam_step_(**args, alpha=0.8)
    assert args["params"][0].isnan().nonzero().flatten().tolist() == sorted(lost)
    for x, y in zip(written(args), written(same), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("grads", "code", "size", "error", "message"),
    [
        ([torch.ones(3)], None, 3, TypeError, "code must be a tensor"),
        ([torch.empty(0)], torch.empty(0, dtype=torch.uint8), -5, ValueError, r"grads\[0\] must have -5 elements"),
        ([torch.ones(3, requires_grad=True)], torch.zeros(1024, dtype=torch.uint8), 3, RuntimeError, "torch.no_grad"),
    ],
)
def test_bad_input_of_mask_is_named(grads, code, size, error, message):
    with pytest.raises(error, match=message):
        stdet_mask_(grads, code, sizes=[size])
