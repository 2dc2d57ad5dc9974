"""The command line as a user meets it: exit codes, and one clear line for everything that can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lic_fast
from lic_fast import cli

pytest.importorskip("compressai")
pytest.importorskip("skimage")

TINY = ["--model", "bmshj2018-factorized", "--channels", "8,8", "--crop", "64", "--batch-size", "2", "--steps", "2"]


def run_in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lic_fast", *arguments], capture_output=True, text=True)


@pytest.fixture
def run(capfd):
    """Runs a command in this process, as main() does for the console script."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return call


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("lic-fast: error: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def test_doctor_names_every_backend_and_a_remedy():
    done = run_in_a_process("doctor")
    assert done.returncode == 0
    for name in ("cuda", "triton", "cpp", "reference", "torch", "GPU", "Native libraries", "sma_update_"):
        assert name in done.stdout
    for line in done.stdout.splitlines():
        if "is not built" in line:
            assert "run: " in line


def test_version_and_usage(run):
    assert run("--version").stdout.strip() == f"lic_fast {lic_fast.__version__}"
    assert run().returncode == 2 and "COMMAND" in run().stderr
    assert run("no-such-command").returncode == 2
    assert "(default: True)" not in run("train", "--help").stdout  # of what an option with --no- switches off


def test_train_evaluate_compress_decompress(run, tmp_path):
    output = str(tmp_path / "run")
    done = run("train", *TINY, "--sma", "--sma-every", "1", "--output", output)
    assert done.returncode == 0, done.stderr
    assert_one_line(run_in_a_process("train", *TINY, "--output", output), "already holds a run", "--resume")
    assert {"checkpoint.pt", "log.csv", "loss.png", "config.json"} <= set(os.listdir(output))
    checkpoint = f"{output}/checkpoint.pt"
    import skimage

    photo = os.path.join(skimage.data_dir, "astronaut.png")
    done = run("compress", checkpoint, photo, str(tmp_path / "a.licf"))
    assert done.returncode == 0 and " bytes, " in done.stdout and " bpp, " in done.stdout, done.stderr
    assert run("decompress", checkpoint, str(tmp_path / "a.licf"), str(tmp_path / "a.png")).returncode == 0
    assert_one_line(run("decompress", checkpoint, photo, str(tmp_path / "b.png")), "not a")
    assert not (tmp_path / "b.png").exists()
    assert_one_line(run("train", *TINY[2:], "--model", "mbt2018-mean", "--output", output, "--resume"), "another model")


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (["--backend", "cuda"], {}, ["backend 'cuda' was asked for", "not on cpu"]),
        (["--sma", "--sma-every", "1"], {"LIC_FAST_BACKEND": "triton"}, ["'triton' was asked for"]),
        (["--sma", "--sma-every", "1"], {"LIC_FAST_BACKEND": "nope"}, ["unknown backend, got 'nope'"]),
        (["--model", "mbt2018-maen"], {}, ["mbt2018-maen", "mbt2018-mean"]),
        (["--device", "cuda"], {}, ["cuda"]),
        (["--data", "{empty}"], {}, ["no usable", "{empty}"]),
        (["--data", "{empty}/missing"], {}, ["missing"]),
        (["--lmbda", "-1"], {}, ["lmbda", "positive"]),
    ],
    ids=["backend", "environment", "unknown-backend", "model", "device", "empty-folder", "no-folder", "lambda"],
)
def test_what_can_go_wrong_is_one_line_and_leaves_nothing(run, monkeypatch, tmp_path, arguments, environment, parts):
    import torch

    if arguments[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "broken.png").write_bytes(b"\x89PNG nothing more")
    arguments = [argument.format(empty=empty) for argument in arguments]
    backend = environment or "--backend" in arguments
    device = ["--device", "cpu"] if backend else []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = run("train", *TINY, "--output", str(tmp_path / "run"), *device, *arguments)
    assert_one_line(done, *(part.format(empty=empty) for part in parts))
    if not backend:
        assert not (tmp_path / "run").exists()


def test_bench_lists_its_ops():
    assert cli.main(["bench", "--list"]) == 0
    assert cli.main(["bench", "no-such-op"]) == 2
