"""Every Triton kernel compiles ahead of time for sm_80 and sm_90, and every case for one of them, without a GPU."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import lic_fast.triton_kernels as rooms  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

MODULES = [importlib.import_module(f"{rooms.__name__}.{m.name}") for m in pkgutil.iter_modules(rooms.__path__)]
# a case: kernel, argument types, compile-time values, and options where the launcher does not take the defaults
CASES = [(*case, {})[:4] for module in MODULES for case in getattr(module, "AOT", [])]


def test_every_kernel_is_listed():
    compiled = {kernel.fn.__name__ for kernel, *_ in CASES}
    written = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert written and compiled == written


# element-wise kernels: the tensors that a full block reads and writes, at least
TENSORS = {
    "sma_update_kernel": (2, 1), "adam_flags_kernel": (1, 0), "adam_update_kernel": (4, 3),
    "affine_reconstruct_fwd_kernel": (3, 1), "affine_reconstruct_list_kernel": (3, 1),
    "affine_reconstruct_bwd_kernel": (1, 3), "ddim_update_kernel": (2, 1),
    "q_sample_kernel": (1, 1), "q_sample_loss_kernel": (1, 0), "q_sample_loss_bwd_kernel": (1, 1),
    "sensitivity_accumulate_kernel": (2, 1), "rls_update_kernel": (1, 0),
    "mixture_rate_fwd_kernel": (3, 1), "mixture_rate_bwd_kernel": (5, 3),
}  # fmt: skip
VECTORS = [i for i, c in enumerate(CASES) if c[0].fn.__name__ in TENSORS and c[2].get("VECTOR", True)]


def targets():
    """(case, arch) to compile: both where a kernel first meets bf16, or its vector branch, or neither; else in turn."""
    seen, found = set(), []
    for i, (kernel, types, values, _) in enumerate(CASES):
        kinds = [*types.values(), *values.values()]
        key = kernel.fn.__name__, "*bf16" in kinds or tl.bfloat16 in kinds, values.get("VECTOR", values.get("LAST"))
        turn = [90] if i in VECTORS else [(80, 90)[i % 2]]
        found += [(i, arch) for arch in (turn if key in seen else (80, 90))]
        seen.add(key)
    return found


@functools.cache
def compiled(case, arch):
    """(the compiled kernel, its options); told for sm_90 that its pointers are aligned, as a launch tells it."""
    aligned = arch == 90
    kernel, types, values, options = CASES[case]
    options = {"enable_fp_fusion": False} | options
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in values.items()}
    pointers = [name for name in names if signature[name].startswith("*")] if aligned else []
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), options


@pytest.mark.parametrize(
    ("case", "arch"), [pytest.param(i, arch, id=f"{i}-{CASES[i][0].fn.__name__}-{arch}") for i, arch in targets()]
)
def test_compiles(case, arch):
    built, options = compiled(case, arch)
    assert built.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{arch}" in built.asm["ptx"]
    if not options["enable_fp_fusion"]:  # element-wise: products and sums round separately, as in eager PyTorch
        assert "fma.rn.f" not in built.asm["ptx"]
    assert ".local" not in built.asm["ptx"], "an array went to local memory"


@pytest.mark.parametrize("case", VECTORS)
def test_full_blocks_of_aligned_tensors_take_vectors(case):
    name, values = CASES[case][0].fn.__name__, CASES[case][2]
    built, _ = compiled(case, 90)
    for kind, least in zip(("ld", "st"), TENSORS[name], strict=True):
        assert len(re.findall(rf"\b{kind}\.global\.v[24]\.b(?:32|64)\b", built.asm["ptx"])) >= least
    widest = "v2.b64" if values.get("WIDE", values.get("W")) is tl.float64 else "v4.b32"
    bf16_alone = name.startswith("q_sample") and "*bf16" in CASES[case][1].values()
    if name == "rls_update_kernel":
        bf16_alone = values["W"] in (tl.bfloat16, tl.float16) and not values["HAS_CHANGE"]
    if bf16_alone:
        widest = "v2.b32"  # all it walks in memory order is four of these
    assert f".global.{widest}" in built.asm["ptx"]
