"""Builds lic_fast: pure Python always, plus up to two native libraries where torch and a compiler are at hand.

LIC_FAST_BUILD=auto (default) builds what this environment can and records the rest with its reason;
none builds nothing; cpp and cuda insist and fail in one line where they cannot be met. pip isolates builds
from your torch unless you pass --no-build-isolation, so `pip install .` is pure Python and
`pip install --no-build-isolation .` is native. TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured. No network,
no GPU is asked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "lic_fast"))
import _build

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f'lic_fast: setuptools {setuptools.__version__} is too old; run pip install "setuptools>=77"')
try:
    MODE = os.environ.get("LIC_FAST_BUILD", "auto")
    PLAN = _build.make_plan(MODE)
except _build.BuildError as error:
    sys.exit(f"lic_fast: {error}")


class BuildPython(build_py):
    """Copies the package and adds the record of what was built from what."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # of an earlier build with other libraries
            for library in (Path(self.build_lib) / "lic_fast").glob("_C*.so"):
                library.unlink()
        _build.write_build_info(PLAN, _package(self))


def _package(command: build_py | build_ext) -> Path:
    return _build.PACKAGE if command.editable_mode else Path(command.build_lib) / "lic_fast"


class BuildNative(build_ext):
    """Hands each library to the compiler calls that `lic-fast build` uses too.

    In auto mode a library that does not compile is left out, with its reason on record.
    """

    editable_mode = False

    def build_extension(self, ext: Extension) -> None:
        global PLAN
        backend = {f"lic_fast.{name}": backend for backend, name in _build.LIBRARIES.items()}[ext.name]
        try:
            _build.compile_library(backend, PLAN, Path(self.get_ext_fullpath(ext.name)))
        except _build.BuildError as error:
            if not ext.optional:
                sys.exit(f"lic_fast: {error}")
            PLAN = PLAN.without(backend, str(error))
            _build.write_build_info(PLAN, _package(self))
            raise CompileError(str(error)) from None


# These rooms lie at the top of the repository and inside the installed package: their bare names are taken on PyPI.
ROOMS = {
    "triton_kernels": ["*.py"],
    "benchmarks": ["*.py"],
    "csrc": ["*.cpp", "*/*.cpp", "*/*.h", "*/*.cu", "*/*.cuh"],
}

setup(
    packages=[*find_packages(include=["lic_fast", "lic_fast.*"]), *(f"lic_fast.{room}" for room in ROOMS)],
    package_dir={f"lic_fast.{room}": room for room in ROOMS},
    package_data={
        "lic_fast.coding": ["constant_tables/*.bin"],
        **{f"lic_fast.{room}": patterns for room, patterns in ROOMS.items()},
    },
    ext_modules=[
        Extension(f"lic_fast.{_build.LIBRARIES[backend]}", sources=[], py_limited_api=True, optional=MODE == "auto")
        for backend in PLAN.built()
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if PLAN.built() else {},
)
