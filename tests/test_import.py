"""`import lic_fast` is light: no CUDA context, no Triton, no CompressAI, no compilation, little time."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys, time
import torch
start = time.perf_counter()
import lic_fast
seconds = time.perf_counter() - start
heavy = [m for m in ("triton", "compressai", "matplotlib", "PIL", "skimage", "tqdm") if m in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light_and_fast():
    already = run("import json, sys, torch; print(json.dumps(list(sys.modules)))")
    results = [run(CODE) for _ in range(3)]
    assert min(result["seconds"] for result in results) < 0.3
    assert all(not result["cuda"] for result in results)
    assert set(results[0]["heavy"]) <= set(already)


def test_command_line_starts_without_compressai():
    code = (
        "import json, sys\nfrom lic_fast import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(); print(json.dumps([m for m in ('compressai', 'matplotlib', 'skimage') if m in sys.modules]))"
    )
    assert run(code) == []


def test_native_and_triton_are_not_needed():
    code = """
import sys, json
sys.modules["triton"] = None
from lic_fast import _native
_native.library_path = lambda backend: __import__("pathlib").Path("/nowhere") / backend
import lic_fast, torch
slow = torch.zeros(2)
lic_fast.functional.sma_update_(slow, torch.ones(2), alpha=0.5)
print(json.dumps([slow.tolist(), lic_fast.explain("sma_update_", "cpu").chosen]))
"""
    assert run(code) == [[0.5, 0.5], "reference"]
