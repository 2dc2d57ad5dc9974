"""Compiles the native libraries; shared by setup.py and `lic-fast build`.

Imports nothing outside the standard library, so that setup.py can load this file where torch is absent.
The compilers are called directly: the same command lines serve both callers, and none needs a GPU.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # the oldest torch that one build serves
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
MODES = ("auto", "none", "cpp", "cuda")
LIBRARIES = {"cpp": "_C", "cuda": "_C_cuda"}


class BuildError(RuntimeError):
    """A native library cannot be built; the message is one line and names the remedy."""


@dataclass(frozen=True)
class Torch:
    """The torch found on this machine, read without importing it."""

    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Plan:
    """Which libraries a build makes, and for each one left out, why."""

    torch: Torch | None
    cxx: str | None
    nvcc: str | None
    libraries: dict[str, str | None]  # backend -> None where it is built, else the reason

    def without(self, backend: str, reason: str) -> Plan:
        """The plan with `backend` left out for `reason`."""
        return dataclasses.replace(self, libraries=self.libraries | {backend: reason})

    def built(self) -> list[str]:
        """The backends this plan compiles."""
        return [backend for backend, reason in self.libraries.items() if reason is None]


def source_root() -> Path:
    """The folder with bind.cpp: csrc/ inside an installed package, beside the package in a checkout."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "bind.cpp").is_file():
            return folder
    raise BuildError("build: the C++ sources (csrc/) are missing beside lic_fast; reinstall lic_fast")


def find_torch() -> Torch | None:
    """The importable torch, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    version_file = root / "version.py"
    if not version_file.is_file():
        return None
    found = runpy.run_path(str(version_file))
    return Torch(root, str(found["__version__"]), found.get("cuda"))


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++ from PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, PATH, the toolkit's usual folder, or the wheel that PyPI ships."""
    candidates: list[Path] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "bin" / "nvcc")
    if shutil.which("nvcc"):
        candidates.append(Path(str(shutil.which("nvcc"))))
    candidates += [Path("/usr/local/cuda/bin/nvcc"), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return None


def _toolkit_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """Include and library flags that nvcc from PyPI's wheels needs; a toolkit of its own knows its folders."""
    root = Path(nvcc).resolve().parents[1]
    include = [f"-I{root / name}" for name in ("include/cccl", "cccl") if (root / name / "nv" / "target").is_file()]
    return include, [f"-L{root / 'lib'}"] if (root / "lib" / "libcudart_static.a").is_file() else []


def make_plan(mode: str = "auto") -> Plan:
    """Decides what to build under LIC_FAST_BUILD=`mode`.

    auto builds what this machine can; none builds nothing; cpp and cuda insist, and raise BuildError
    where they cannot be met.
    """
    if mode not in MODES:
        raise BuildError(f"build: unknown LIC_FAST_BUILD, got {mode!r}; use one of {', '.join(MODES)}")
    torch, cxx, nvcc = find_torch(), find_cxx(), find_nvcc()
    why_cpp = _why_not_cpp(torch, cxx)
    why_cuda = why_cpp
    if why_cpp is None and nvcc is None:
        release = (torch.cuda if torch else None) or "13.0"
        wheels = " ".join(f'"nvidia-{name}=={release}.*"' for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl"))
        why_cuda = f"no nvcc in CUDA_HOME, PATH, /usr/local/cuda* or PyPI's wheels; pip install {wheels} brings one"
    if mode == "none":
        why_cpp = why_cuda = "switched off by LIC_FAST_BUILD=none"
    elif mode == "cpp":
        why_cuda = "switched off by LIC_FAST_BUILD=cpp"
    if mode == "cpp" and why_cpp:
        raise BuildError(f"build: LIC_FAST_BUILD=cpp cannot be met: {why_cpp}")
    if mode == "cuda" and why_cuda:
        raise BuildError(f"build: LIC_FAST_BUILD=cuda cannot be met: {why_cuda}")
    return Plan(torch, cxx, nvcc, {"cpp": why_cpp, "cuda": why_cuda})


def _why_not_cpp(torch: Torch | None, cxx: str | None) -> str | None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "free-threaded Python has no stable ABI"
    if sys.platform != "linux":
        return f"the native libraries are built on Linux only, this is {sys.platform}"
    if torch is None:
        return "torch was not importable in the build environment (pip isolates builds)"
    if tuple(int(part) for part in torch.version.split("+")[0].split(".")[:2]) < TORCH_TARGET:
        return f"torch {torch.version} is older than {TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
    return None if cxx else "no C++ compiler in $CXX or PATH"


def cuda_archs() -> list[str]:
    """Architectures to compile for: TORCH_CUDA_ARCH_LIST in torch's notation, else 8.0;9.0+PTX."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    return [item for item in text.replace(" ", ";").split(";") if item]


def _gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise BuildError(f"build: unknown entry in TORCH_CUDA_ARCH_LIST, got {arch!r}; write it as 9.0 or 9.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _compile_command(backend: str, plan: Plan, source: Path, output: Path) -> list[str]:
    assert plan.torch is not None and plan.cxx is not None
    include = [f"-I{source_root()}", f"-I{plan.torch.root / 'include'}", f"-I{sysconfig.get_path('include')}"]
    target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
    defines = [f"-DTORCH_TARGET_VERSION={target:#018x}ULL", f"-DTORCH_EXTENSION_NAME={LIBRARIES[backend]}"]
    defines.append(f"-DLIC_FAST_STAMP={stamp()}")
    if source.suffix == ".cu":
        host = ["-ccbin", plan.cxx, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags = ["-O3", "-DUSE_CUDA", *_gencode(cuda_archs()), "--threads", "2"]
        include += _toolkit_flags(str(plan.nvcc))[0]
        return [str(plan.nvcc), *flags, *host, *defines, *include, "-c", str(source), "-o", str(output)]
    # -ffp-contract=off: every SIMD variant rounds alike, and like eager PyTorch
    flags = [
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
    ]
    flags += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-Wno-psabi",
    ]  # g++ 12 warns inside its own AVX-512 headers
    system = [item.replace("-I", "-isystem", 1) if "csrc" not in item else item for item in include]
    return [plan.cxx, *flags, *defines, *system, "-c", str(source), "-o", str(output)]


def _link_command(backend: str, plan: Plan, objects: list[Path], output: Path) -> list[str]:
    assert plan.torch is not None and plan.cxx is not None
    lib = plan.torch.root / "lib"
    names = ["c10", "torch_cpu", "torch"]
    if backend == "cuda" and plan.torch.cuda:  # a CPU torch has none of these: compiled, but not loadable
        names += ["c10_cuda", "torch_cuda"]
    libraries = [f"-L{lib}", *(f"-l{name}" for name in names)]
    if backend == "cuda":
        head = [str(plan.nvcc), "-shared", "--cudart", "static", "-ccbin", plan.cxx, *_toolkit_flags(str(plan.nvcc))[1]]
    else:
        head = [plan.cxx, "-shared"]
    return [*head, *map(str, objects), "-o", str(output), *libraries]


def stamp() -> str:
    """Names the C++ sources: a library with another stamp was built from others and must not be loaded."""
    digest = hashlib.blake2b(digest_size=8)
    root = source_root()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def sources(backend: str) -> list[Path]:
    """The files of one library: bind.cpp and csrc/cpu/*.cpp, or bind.cpp and csrc/cuda/*.cu."""
    root = source_root()
    kernels = root.glob("cpu/*.cpp") if backend == "cpp" else root.glob("cuda/*.cu")
    return [root / "bind.cpp", *sorted(kernels)]


def compile_library(backend: str, plan: Plan, output: Path, log: Path | None = None) -> None:
    """Compiles and links one library to `output` (replaced only on success); commands and output go to `log`."""
    lines: list[str] = []

    def call(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines.append(" ".join(command) + "\n" + done.stdout + done.stderr)
        if done.returncode != 0:
            raise BuildError(_failure(command[0], done.stderr, log))

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="lic_fast_build_") as folder:
            pairs = [(source, Path(folder) / f"{source.stem}.o") for source in sources(backend)]
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
                list(pool.map(lambda pair: call(_compile_command(backend, plan, *pair)), pairs))
            linked = output.with_name(f".{output.name}.new")
            call(_link_command(backend, plan, [pair[1] for pair in pairs], linked))
            os.replace(linked, output)
    finally:
        if log is not None:
            with log.open("a") as stream:
                stream.write("\n".join(lines))
        else:
            sys.stderr.write("\n".join(lines))


def _failure(tool: str, stderr: str, log: Path | None) -> str:
    first = next((line for line in stderr.splitlines() if "error" in line), stderr.strip()[:200])
    where = f"; the whole output is in {log}" if log else ""
    return f"build: {Path(tool).name} failed: {first}{where}"


def build_info(plan: Plan) -> dict:
    """What was built from what, as stored in _build_info.json."""
    return {
        "torch": plan.torch and {"version": plan.torch.version, "cuda": plan.torch.cuda},
        "cxx": _version_line(plan.cxx) if plan.built() else None,
        "nvcc": _version_line(plan.nvcc) if "cuda" in plan.built() else None,
        "cuda_archs": cuda_archs() if "cuda" in plan.built() else None,
        "libraries": {backend: reason or "built" for backend, reason in plan.libraries.items()},
    }


def _version_line(tool: str | None) -> str | None:
    if tool is None:
        return None
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else None)


def write_build_info(plan: Plan, folder: Path) -> None:
    """Writes _build_info.json into the package folder `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "._build_info.json.new"
    new.write_text(json.dumps(build_info(plan), indent=2) + "\n")
    os.replace(new, folder / "_build_info.json")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; a second process waits."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build_in_place(mode: str = "auto") -> tuple[Plan, Path]:
    """Compiles the libraries into the package folder under a file lock; returns the plan and the log's path."""
    plan = make_plan(mode)
    log = PACKAGE / "_build.log"
    if not os.access(PACKAGE, os.W_OK):
        raise BuildError(f"build: {PACKAGE} is not writable; install lic_fast into a virtual environment of yours")
    with file_lock(PACKAGE / ".build.lock"):
        log.write_text("")
        for backend in plan.built():
            try:
                compile_library(backend, plan, PACKAGE / f"{LIBRARIES[backend]}.abi3.so", log)
            except BuildError as error:
                if mode != "auto":
                    raise
                plan = plan.without(backend, str(error))
        for backend in set(LIBRARIES) - set(plan.built()):
            (PACKAGE / f"{LIBRARIES[backend]}.abi3.so").unlink(missing_ok=True)  # of other sources, sooner or later
        write_build_info(plan, PACKAGE)
    return plan, log
