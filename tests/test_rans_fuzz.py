"""tests/fuzz/rans_fuzz.cpp under AddressSanitizer and UBSan: damaged containers through the C++ parser and decoders.

LIC_FAST_FUZZ_CASES: how many; `make fuzz` runs a million.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = int(os.environ.get("LIC_FAST_FUZZ_CASES", "100000"))
FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE_SECONDS, RUN_SECONDS = 600, 3600
ENDS = {
    "opened": {
        "done", "truncated", "foreign", "version", "profile", "flags", "number", "impossible", "trailing", "check",
        "padding",
    },
    "decoded": {"done", "index outside", "ran out", "left over"},
}  # fmt: skip

if not (ROOT / "csrc").is_dir():
    pytest.skip("runs in a source checkout", allow_module_level=True)


def compiled(source: Path, program: Path) -> str | None:
    """Compiles `source` with sanitizers; what went wrong, or None."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "no C++ compiler was found"
    command = [compiler, "-std=c++20", *FLAGS, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    return done.stderr[-4000:] if done.returncode else None


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    """The program; skips where a program of one line does not compile or run with sanitizers."""
    folder = tmp_path_factory.mktemp("fuzz")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    reason = compiled(probe, folder / "probe")
    if reason is None:
        ran = subprocess.run([folder / "probe"], capture_output=True, text=True)
        reason = ran.stderr if ran.returncode else None
    if reason is not None:
        pytest.skip(f"sanitizers do not work here: {reason.strip()[-200:]}")
    reason = compiled(ROOT / "tests" / "fuzz" / "rans_fuzz.cpp", folder / "rans_fuzz")
    assert reason is None, reason
    return folder / "rans_fuzz"


def run(fuzzer: Path, first: int, count: int) -> dict:
    done = subprocess.run([fuzzer, str(first), str(count)], capture_output=True, text=True, timeout=RUN_SECONDS)
    assert done.returncode == 0, f"rans_fuzz {first} {count}: exit status {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_damaged_streams_do_no_harm(fuzzer, capsys):
    """No crash, leak, hang or allocation over the bound, all decoders agree; and every kind of end is come to."""
    workers = min(os.cpu_count() or 1, 8)
    starts = [CASES * i // workers for i in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda i: run(fuzzer, starts[i], starts[i + 1] - starts[i]), range(workers)))
    for place, ends in ENDS.items():
        counts = sum((Counter(result[place]) for result in results), Counter())
        if "LIC_FAST_FUZZ_CASES" in os.environ:
            with capsys.disabled():
                print(f"\n{place}: {dict(counts)}", end="")
        assert set(counts) == ends, f"{place}: {counts}"
        if place == "opened":
            assert counts.total() == CASES
