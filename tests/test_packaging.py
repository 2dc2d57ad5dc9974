"""What is built and shipped: the plan of a build, the libraries' ABI, wheels, sdist."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lic_fast import _build, _native, cli

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = (ROOT / "setup.py").is_file()
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="runs in a source checkout")


def setup(command: list[str], mode: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"LIC_FAST_BUILD": mode} | environment
    return subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, env=env, capture_output=True, text=True)


def wheel(tmp_path: Path, mode: str) -> Path:
    base = ["build", "--build-base", str(tmp_path / "build"), "egg_info", "--egg-base", str(tmp_path)]
    done = setup([*base, "bdist_wheel", "--dist-dir", str(tmp_path / "dist")], mode)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").glob("*.whl")
    return path


def test_plan_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(_build, "find_torch", lambda: None)
    assert "torch was not importable" in _build.make_plan().libraries["cpp"]
    assert _build.make_plan().built() == []
    with pytest.raises(_build.BuildError, match="LIC_FAST_BUILD=cuda cannot be met: torch was not importable"):
        _build.make_plan("cuda")
    old = _build.Torch(Path("/"), "2.9.1", None)
    monkeypatch.setattr(_build, "find_torch", lambda: old)
    assert _build.make_plan().libraries["cpp"] == "torch 2.9.1 is older than 2.10"
    monkeypatch.setattr(_build, "find_torch", lambda: _build.Torch(Path("/"), "2.11.0+cu130", "13.0"))
    monkeypatch.setattr(_build, "find_cxx", lambda: None)
    assert "no C++ compiler" in _build.make_plan().libraries["cpp"]
    monkeypatch.setattr(_build, "find_cxx", lambda: "g++")
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    assert _build.make_plan().built() == ["cpp"] and "no nvcc" in _build.make_plan().libraries["cuda"]
    with pytest.raises(_build.BuildError, match="unknown LIC_FAST_BUILD, got 'gpu'"):
        _build.make_plan("gpu")


def test_nvcc_is_found_in_cuda_home_first(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.find_nvcc() == str(nvcc)


def test_arch_list(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert _build._gencode(_build.cuda_archs())[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert _build.cuda_archs() == ["8.6", "9.0a+PTX"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in _build._gencode(_build.cuda_archs())
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(_build.BuildError, match="got 'Hopper'"):
        _build._gencode(_build.cuda_archs())


def test_a_failed_compilation_is_one_line_with_a_log_and_keeps_the_old_library(monkeypatch, tmp_path, capsys):
    for folder in ("cpu", "cuda"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc" / "bind.cpp").write_text("int broken = ;\n")
    old = tmp_path / "_C.abi3.so"
    old.write_bytes(b"old")
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    assert cli.main(["build", "--libraries", "cpp"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bind.cpp" in error and str(tmp_path / "_build.log") in error
    assert old.read_bytes() == b"old" and "broken" in (tmp_path / "_build.log").read_text()


def test_two_builds_take_turns(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import _build; from pathlib import Path\n"
        "with _build.file_lock(Path(sys.argv[2])):\n"
        "  a = time.time(); time.sleep(0.4); print(a, time.time())\n"
    )
    command = [sys.executable, "-c", code, str(Path(_build.__file__).parent), str(tmp_path / "lock")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    spans = sorted(tuple(map(float, p.communicate()[0].split())) for p in running)
    assert spans[0][1] <= spans[1][0]


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_library_uses_stable_symbols_only(backend):
    path = _native.library_path(backend)
    if not path.is_file():
        pytest.skip(f"{path.name} is not built")
    tool = Path(sys.executable).with_name("torch-abi-audit")
    if not tool.is_file():
        pytest.skip("torch-abi-audit is not installed")
    done = subprocess.run([tool, "--check", "both", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unstable=0" in done.stdout and "Min torch:   2.10.0" in done.stdout


def test_cuda_library_loads_without_a_gpu():
    path = _native.library_path("cuda")
    if not path.is_file() or torch.version.cuda is None:
        pytest.skip("needs the CUDA library and a CUDA torch")
    ctypes.CDLL(str(path), mode=os.RTLD_NOW)  # every symbol resolves
    assert torch.ops.lic_fast_cuda.sma_update_.default
    cubins = subprocess.run(["grep", "-c", "sm_90", str(path)], capture_output=True, text=True)
    assert int(cubins.stdout) > 0


@needs_checkout
def test_insisting_on_a_library_that_cannot_be_built_fails_in_one_line(tmp_path):
    done = setup(["--version"], "cuda", PATH=os.path.dirname(sys.executable), CUDA_HOME="", CXX="")
    assert done.returncode != 0
    assert done.stderr.strip().startswith("lic_fast: build: LIC_FAST_BUILD=cuda cannot be met")
    assert len(done.stderr.strip().splitlines()) == 1


@needs_checkout
def test_pure_wheel_holds_every_room_and_the_sources(tmp_path):
    path = wheel(tmp_path, "none")
    assert path.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(path).namelist())
    for name in (
        "lic_fast/_build_info.json", "lic_fast/csrc/bind.cpp", "lic_fast/csrc/cuda/device.cuh",
        "lic_fast/triton_kernels/sma_update.py", "lic_fast/benchmarks/__main__.py", "lic_fast/reference/sma_update.py",
        "lic_fast/coding/constant_tables/gaussian.bin",
    ):  # fmt: skip
        assert name in names
    assert not [name for name in names if name.endswith(".so") or "/results/" in name or name.startswith("tests/")]


@needs_checkout
def test_native_wheel_is_abi3(tmp_path):
    if _build.make_plan().libraries["cpp"]:
        pytest.skip("no C++ build here")
    built = os.environ.get("LIC_FAST_WHEEL")  # one that .ci/run has built already
    path = Path(built) if built else wheel(tmp_path, "cpp")
    assert "-cp310-abi3-linux_" in path.name
    assert "lic_fast/_C.abi3.so" in zipfile.ZipFile(path).namelist()


def test_auto_mode_leaves_out_what_does_not_compile_and_what_is_stale(monkeypatch, tmp_path):
    def compile_library(backend, plan, output, log=None):
        if backend == "cuda":
            raise _build.BuildError("build: nvcc failed: unsupported GNU version!")
        output.write_bytes(b"new")

    plan = _build.Plan(None, sys.executable, sys.executable, {"cpp": None, "cuda": None})
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    monkeypatch.setattr(_build, "compile_library", compile_library)
    monkeypatch.setattr(_build, "make_plan", lambda mode: plan)
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"of an earlier build")
    built, _ = _build.build_in_place("auto")
    assert built.built() == ["cpp"] and (tmp_path / "_C.abi3.so").read_bytes() == b"new"
    assert not (tmp_path / "_C_cuda.abi3.so").exists()
    assert "unsupported GNU version" in (tmp_path / "_build_info.json").read_text()
    with pytest.raises(_build.BuildError, match="unsupported GNU"):
        _build.build_in_place("cuda")


def test_a_damaged_build_record_is_no_record(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    (tmp_path / "_build_info.json").write_text("")
    assert _native.build_info.__wrapped__() == {}
