"""Choice of backends: explain, use_backend, LIC_FAST_BACKEND, and that nothing falls back silently."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import lic_fast
from lic_fast import _dispatch
from lic_fast.functional import affine_reconstruct, sma_update_


def average():
    slow = torch.zeros(3)
    sma_update_(slow, torch.ones(3), alpha=0.5)
    return slow


def test_forced_backend_that_cannot_run_raises_and_changes_nothing():
    slow, fast = torch.zeros(3), torch.ones(3)
    with (
        lic_fast.use_backend("cuda"),
        pytest.raises(lic_fast.BackendError, match="'cuda' was asked for") as caught,
    ):
        sma_update_(slow, fast, alpha=0.5)
    assert "runs on cuda, not on cpu" in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(slow, torch.zeros(3))


def test_use_backend_is_a_context_and_a_setter():
    with lic_fast.use_backend("reference"):
        assert lic_fast.explain("sma_update_", "cpu").chosen == "reference"
        with lic_fast.use_backend("auto"):
            assert not lic_fast.explain("sma_update_", "cpu").forced
        assert lic_fast.explain("sma_update_", "cpu").forced
    lic_fast.use_backend("reference")
    assert lic_fast.explain("sma_update_", "cpu").chosen == "reference"
    lic_fast.use_backend("auto")
    assert not lic_fast.explain("sma_update_", "cpu").forced


def test_unknown_names():
    with pytest.raises(lic_fast.BackendError, match="unknown backend, got 'tpu'; use auto, cuda, triton, cpp"):
        lic_fast.use_backend("tpu")
    assert not lic_fast.explain("sma_update_", "cpu").forced
    with pytest.raises(ValueError, match="unknown op, got 'x'; use one of adam_update_, affine_reconstruct"):
        lic_fast.explain("x")


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("LIC_FAST_BACKEND", "reference")
    assert lic_fast.explain("sma_update_", "cpu").chosen == "reference"
    monkeypatch.setenv("LIC_FAST_BACKEND", "nonsense")
    with pytest.raises(lic_fast.BackendError, match="LIC_FAST_BACKEND: unknown backend"):
        average()
    with lic_fast.use_backend("reference"):  # wins over the variable
        assert torch.equal(average(), torch.full((3,), 0.5))


def test_explain_gives_a_reason_and_a_remedy_for_each_backend():
    told = lic_fast.explain("affine_reconstruct", "cpu")
    assert set(told.reasons) == set(_dispatch.BACKENDS)
    assert told.reasons[told.chosen] is None
    text = str(told)
    assert text.count("\n") == len(_dispatch.BACKENDS) and "affine_reconstruct on cpu with torch.float32" in text
    none = lic_fast.explain("affine_reconstruct", "cpu", torch.int64)
    assert none.chosen is None and all(none.reasons.values())
    assert "does not take torch.int32" in str(lic_fast.explain("sma_update_", "cpu", torch.int32))


def test_a_missing_library_is_explained_with_its_remedy(monkeypatch, tmp_path):
    from lic_fast import _build, _native

    monkeypatch.setattr(_native, "library_path", lambda backend: tmp_path / "_C.abi3.so")
    assert "is not built" in _native._load.__wrapped__("cpp") and "run: lic-fast build" in _native._load.__wrapped__(
        "cpp"
    )
    (tmp_path / "_C.abi3.so").write_bytes(b"a library built by an earlier version")
    assert "sources of another version; run: lic-fast build" in _native._load.__wrapped__("cpp")
    (tmp_path / "_C.abi3.so").write_bytes(f"lic_fast_stamp={_build.stamp()}, and no library".encode())
    assert "does not load" in _native._load.__wrapped__("cpp")


def test_blocks_that_do_not_nest_leave_nothing_behind():
    first = lic_fast.use_backend("reference").__enter__()
    second = lic_fast.use_backend("cuda").__enter__()
    first.__exit__(None, None, None)
    told = lic_fast.explain("sma_update_", "cpu")
    assert told.forced and told.chosen is None  # still cuda, which cannot run here
    second.__exit__(None, None, None)
    assert not lic_fast.explain("sma_update_", "cpu").forced


def test_a_setting_inside_a_block_outlives_it():
    with lic_fast.use_backend("cuda"):
        lic_fast.use_backend("reference")
        assert lic_fast.explain("sma_update_", "cpu").chosen == "reference"
    assert lic_fast.explain("sma_update_", "cpu").forced
    lic_fast.use_backend("auto")


def test_the_reference_runs_on_any_device():
    assert lic_fast.explain("sma_update_", "meta").chosen == "reference"
    sma_update_(torch.ones(3, device="meta"), torch.ones(3, device="meta"), alpha=0.5)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(_dispatch.OPS["sma_update_"], "_choices", {})
    with caplog.at_level(logging.INFO, logger="lic_fast"):
        average()
        average()
    assert len([r for r in caplog.records if "sma_update_ on cpu with torch.float32 runs in" in r.getMessage()]) == 1


def test_forced_choice_reaches_the_backward_pass():
    w = torch.randn(4, requires_grad=True)
    zeros = torch.zeros(4)
    out = affine_reconstruct(w, zeros, zeros, torch.zeros(4, dtype=torch.uint8), torch.ones(1))
    with lic_fast.use_backend("cuda"), pytest.raises(lic_fast.BackendError, match="affine_reconstruct_bwd"):
        out.sum().backward()


def test_simd_variants_agree_bit_for_bit():
    if lic_fast.explain("affine_reconstruct", "cpu").reasons["cpp"]:
        pytest.skip("the C++ library is not built")
    code = (
        "import torch, lic_fast, hashlib, lic_fast.functional as F\n"
        "lic_fast.use_backend('cpp'); g = torch.Generator().manual_seed(0)\n"
        "r = lambda *s: torch.randn(*s, generator=g)\n"
        "h = hashlib.sha256()\n"
        "for modes in (5, 20, 90):\n"
        "  for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "    w, k, d = (r(70001).to(dtype).requires_grad_() for _ in 'abc')\n"
        "    refs = r(modes).to(dtype).requires_grad_()\n"
        "    mode = torch.randint(0, modes, (70001,), generator=g).to(torch.int16); tied = r(70001) > 0\n"
        "    out = F.affine_reconstruct(w, k, d, mode, refs, tied=tied)\n"
        "    grads = torch.autograd.grad(out, (w, k, d, refs), r(70001).to(dtype))\n"
        "    slow = r(70001); fast = w.detach().clone()\n"
        "    if dtype is torch.float64: slow = slow.double()\n"
        "    F.sma_update_(slow, fast, alpha=0.8)\n"
        "    for t in (out, *grads, slow, fast): h.update(t.detach().double().numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    hashes = set()
    for variant in ("generic", "avx2", ""):
        env = os.environ | {"LIC_FAST_SIMD": variant}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1


def test_every_op_runs_on_the_cpu_in_its_usual_dtype() -> None:
    for op in _dispatch.OPS:
        told = lic_fast.explain(op, "cpu")
        assert told.chosen is not None, told
    assert lic_fast.explain("ans_coder_encode", "cpu").dtype is torch.int32
    assert lic_fast.explain("mixture_rate", "cpu").dtype is torch.float32
