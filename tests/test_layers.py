"""Who may import whom, and the laws of the house that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("runs in a source checkout", allow_module_level=True)

# A room may import itself, the rooms named here, and outside packages; see CONTRIBUTING.md.
BASE = {"_dispatch", "_build"}
ALLOWED = {
    "_build": set(),
    "_dispatch": set(),
    "_native": BASE,
    "_triton": BASE,
    "reference": set(),
    "triton_kernels": set(),
    "ops": BASE | {"_native", "_triton", "reference"},
    "functional": BASE | {"ops"},
    "optim": BASE | {"functional"},
    "coding": BASE | {"functional"},
    "entropy": BASE | {"functional", "coding"},
    "codec": BASE | {"functional", "entropy", "coding"},
    "patch": BASE | {"functional", "entropy", "coding"},
    "training": BASE | {"functional", "optim", "entropy", "coding", "codec", "patch"},
    "doctor": BASE | {"_native", "_triton"},
    "cli": BASE | {"doctor", "training"},
    "__main__": {"cli"},
    "__init__": BASE | {"functional", "optim", "patch"},
}
OPTIONAL = {
    "compressai",
    "matplotlib",
    "tqdm",
    "PIL",
    "skimage",
    "torchvision",
    "pytorch_msssim",
    "lpips",
    "triton",
    "scipy",
    "bjontegaard",
    "imagecodecs",
}


def modules():
    for path in sorted((ROOT / "lic_fast").rglob("*.py")):
        yield path, path.relative_to(ROOT / "lic_fast").with_suffix("").parts
    for path in sorted((ROOT / "triton_kernels").glob("*.py")):
        yield path, ("triton_kernels", path.stem)


def imports(path, parts):
    """(absolute module, whether at module level) of every import."""
    package = ["lic_fast", *parts[:-1]]
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if node.module is None or name == "lic_fast":
                for alias in node.names:
                    yield f"{name}.{alias.name}", id(node) in top
            else:
                yield name, id(node) in top


def test_rooms_import_only_what_they_may():
    wrong = []
    for path, parts in modules():
        room = parts[0]
        assert room in ALLOWED, f"{path}: a room that tests/test_layers.py does not know"
        for name, _ in imports(path, parts):
            if name.startswith("lic_fast."):
                other = name.split(".")[1]
                known = other in ALLOWED
                if known and other != room and other not in ALLOWED[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if name.split(".")[0] in ("tests", "benchmarks"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_lazily():
    wrong = []
    for path, parts in modules():
        if parts[0] == "triton_kernels":
            continue
        # a drop-in is a subclass of what it stands in for; entropy/__init__.py imports these files at first use
        optional = OPTIONAL - {"compressai"} if parts[0] == "entropy" and parts[-1] != "__init__" else OPTIONAL
        for name, top in imports(path, parts):
            if top and name.split(".")[0] in optional:
                wrong.append(f"{path.relative_to(ROOT)} imports {name} at module level")
    assert not wrong, "\n".join(wrong)


def test_csrc_cpu_and_cuda_do_not_include_each_other():
    for folder, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / folder).iterdir():
            assert f'#include "{other}/' not in path.read_text(), path


def test_an_op_is_named_alike_in_every_room():
    from lic_fast._dispatch import OPS

    rooms = {
        "reference": "lic_fast/reference/{}.py",
        "triton": "triton_kernels/{}.py",
        "cpp": "csrc/cpu/{}.cpp",
        "cuda": "csrc/cuda/{}.cu",
    }
    files = {path.stem for path in (ROOT / "lic_fast" / "ops").glob("[!_]*.py")}
    backends = {file: {"reference"} for file in files}
    for name, spec in OPS.items():
        file = next(f for f in files if name.startswith(f))
        backends[file] |= set(spec.impls)
    for op, names in backends.items():
        for backend, room in rooms.items():
            assert (ROOT / room.format(op)).is_file() == (backend in names), f"{room.format(op)}: {sorted(names)}"
        for place in (f"tests/test_{op}.py", f"benchmarks/{op}.py"):
            assert (ROOT / place).is_file(), place


def test_files_and_functions_stay_short():
    long = []
    for folder in ("lic_fast", "triton_kernels", "csrc", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                lines = len(path.read_text().splitlines())
                if lines > 400:
                    long.append(f"{path.relative_to(ROOT)}: {lines} lines")
            if path.suffix == ".py":
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                        long.append(
                            f"{path.relative_to(ROOT)}: {node.name} is {node.end_lineno - node.lineno + 1} lines"
                        )
    assert not long, "\n".join(long)


def test_refused_patterns():
    refused = re.compile(
        r"except Exception|PYBIND11_MODULE|torch/extension\.h|library\.custom_op|-std=c\+\+|-march=native"
    )
    refused_flags = re.compile(r"--use_fast_math|-ffast-math")
    for folder in ("lic_fast", "triton_kernels", "csrc", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                code = "\n".join(line.split("//")[0].split("#:")[0] for line in path.read_text().splitlines())
                assert not refused.search(code), path
                assert not refused_flags.search(code), path


def test_public_functions_are_documented():
    import lic_fast

    for module in (lic_fast.functional, lic_fast.optim):
        for name in module.__all__:
            text = getattr(module, name).__doc__ or ""
            assert "Raises" in text and "Source" in text, f"{name}: say what is raised and where it comes from"
