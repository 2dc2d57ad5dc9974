"""Every Triton kernel compiles ahead of time for sm_80 and sm_90, without a GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import lic_fast.triton_kernels as rooms  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

MODULES = [importlib.import_module(f"{rooms.__name__}.{m.name}") for m in pkgutil.iter_modules(rooms.__path__)]
CASES = [(kernel, types, values) for module in MODULES for kernel, types, values in getattr(module, "AOT", [])]


def test_every_kernel_is_listed():
    compiled = {kernel.fn.__name__ for kernel, _, _ in CASES}
    written = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert written and compiled == written


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{i}-{c[0].fn.__name__}" for i, c in enumerate(CASES)])
def test_compiles(case, arch):
    kernel, types, values = CASES[case]
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in values.items()})
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
    assert built.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{arch}" in built.asm["ptx"]
    assert "fma.rn.f" not in built.asm["ptx"]  # products and sums round separately, as in eager PyTorch
    assert ".local" not in built.asm["ptx"], "an array went to local memory"
