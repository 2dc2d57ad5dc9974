"""A run that is killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.training import TrainConfig, TrainingError, commands, files, loop, train  # noqa: E402
from lic_fast.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and do not fight other processes for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Trains slowly, so that the parent can kill it in the middle, on as many threads as the parent.
CHILD = """
import sys, time, torch
from lic_fast.training import TrainConfig, files, train
torch.set_num_threads(int(sys.argv[1]))
write = files.Log.write
files.Log.write = lambda log, row: (write(log, row), time.sleep(0.03))
train(TrainConfig(**eval(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):  # from 10 on, one is held out for validation
        small = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image_module.fromarray(small).resize((96, 80)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos: Path, one_thread) -> TrainConfig:
    """A run of two steps that no test may change."""
    config = tiny(tmp_path_factory.mktemp("finished") / "run", photos, steps=2)
    train(config)
    return config


def tiny(output: Path, folder: Path, **changes) -> TrainConfig:
    settings = dict(
        model="bmshj2018-hyperprior",
        output=str(output),
        data=str(folder),
        channels=(8, 8),
        crop=64,
        batch_size=2,
        steps=STEPS,
        min_epoch_steps=9,
        patience=0,
        lr_factor=0.9,
        lr=1e-3,
        checkpoint_every=4,
        quiet=True,
        device="cpu",
    )
    return TrainConfig(**{**settings, **changes})


def log_without_timings(folder: Path) -> list[dict[str, str]]:
    rows = files.read_log(folder / "log.csv")
    return [{name: value for name, value in row.items() if name not in files.TIMINGS} for row in rows]


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def kill_at(config: TrainConfig, step: int) -> int:
    """Train `config` in another process, SIGKILL it once `step` rows are logged; the rows it left."""
    arguments = [str(torch.get_num_threads()), repr(config.as_dict())]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.PIPE)
    log = Path(config.output) / "log.csv"
    deadline = time.monotonic() + 120
    while len(files.read_log(log)) < step:
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    return len(files.read_log(log))


STDET = {"stdet": True, "stdet_warmup": 3, "stdet_epoch_steps": 5, "stdet_true": 0.1, "stdet_samples": 60}
METHODS = {
    "adam": {},
    "sma": {"sma": True},
    "soap": {"optimizer": "soap"},
    "soap-sma-diagnose": {"optimizer": "soap", "sma": True, "diagnose": 3},
    "stdet-sma": {**STDET, "sma": True},
    "soap-stdet": {**STDET, "optimizer": "soap"},
}


@pytest.mark.parametrize("method", METHODS)
def test_kill_and_resume_equals_never_stopping(tmp_path: Path, photos: Path, method: str) -> None:
    whole, broken = (tiny(tmp_path / name, photos, **METHODS[method]) for name in ("whole", "broken"))
    expected = train(whole)
    step = random.SystemRandom().randint(1, STEPS - 5)
    logged = kill_at(broken, step)
    saved = load_checkpoint(Path(broken.output) / "checkpoint.pt", "test")["progress"]["step"]
    assert saved < STEPS and logged < STEPS, f"killed at {step}, logged {logged}, saved {saved}"
    result = train(dataclasses.replace(broken, resume=True))
    assert log_without_timings(Path(broken.output)) == log_without_timings(Path(whole.output)), (step, saved)
    assert result.final_loss == expected.final_loss
    ends = [load_checkpoint(Path(run.output) / "checkpoint.pt", "test") for run in (whole, broken)]
    for name in ("model", "slow", "optimizer", "aux_optimizer", "scheduler", "progress", "rng", "diagnostics", "stdet"):
        assert same(ends[0][name], ends[1][name]), name
    epochs = [files.read_log(Path(run.output) / "stdet.csv") for run in (whole, broken)]
    assert bool(epochs[0]) == ("stdet" in method)
    for row in (*epochs[0], *epochs[1]):
        del row["seconds"]
    assert epochs[0] == epochs[1]
    scores = [Path(run.output) / "diagnostics.csv" for run in (whole, broken)]
    assert all(path.is_file() == ("diagnose" in METHODS[method]) for path in scores)
    assert "diagnose" not in METHODS[method] or scores[0].read_bytes() == scores[1].read_bytes()


def test_a_run_may_be_lengthened_while_the_learning_rate_falls(tmp_path: Path, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop.Trainer, "_validation_loss", lambda self: 1.0)
    train(tiny(tmp_path / "once", photos, steps=40))
    first = tiny(tmp_path / "twice", photos, steps=25, checkpoint_every=None)
    train(first)
    train(dataclasses.replace(first, steps=40, resume=True, workers=1))
    rates = [row["lr"] for row in log_without_timings(tmp_path / "once")]
    assert rates[::11] == ["0.001", "0.001", "0.0009", "0.00081"], "11 photographs, twice, two a step"
    assert log_without_timings(tmp_path / "once") == log_without_timings(tmp_path / "twice")


def test_rows_after_the_checkpoint_are_dropped_even_half_written(tmp_path: Path, photos: Path) -> None:
    config = tiny(tmp_path / "run", photos, steps=6)
    train(config)
    log = tmp_path / "run" / "log.csv"
    expected = log_without_timings(tmp_path / "run")
    with log.open("a") as file:
        file.write("7,0,99,1,1,1,1,1,1,1,1,0\n8,0,9")
    train(dataclasses.replace(config, resume=True))
    assert log_without_timings(tmp_path / "run") == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "bmshj2018-factorized"}, "model"),
        ({"channels": (8, 12)}, "channels"),
        ({"lmbda": 0.05}, "lmbda"),
        ({"batch_size": 3}, "batch-size"),
        ({"seed": 1}, "seed"),
        ({"sma": True}, "sma"),
        ({"optimizer": "adam-fused"}, "optimizer"),
        ({"accelerate": False}, "no-accelerate"),
    ],
)
def test_another_run_is_not_resumed(finished: TrainConfig, changes: dict, field: str) -> None:
    run = Path(finished.output)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(TrainingError, match=f"cannot resume with another .*leave --{field} out") as caught:
        train(dataclasses.replace(finished, resume=True, **changes))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_other_photographs_are_not_resumed(tmp_path: Path, photos: Path) -> None:
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    config = tiny(tmp_path / "run", photos, steps=2)
    train(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (photos / "00.png").rename(photos / "zz.png")
    with pytest.raises(TrainingError, match="another data"):
        train(dataclasses.replace(config, resume=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_there_must_be_a_checkpoint_to_resume(tmp_path: Path, photos: Path) -> None:
    config = tiny(tmp_path / "run", photos, steps=2, resume=True)
    with pytest.raises(TrainingError, match="no checkpoint at"):
        train(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(TrainingError, match="is damaged, cut short, or not a checkpoint"):
        train(config)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == b"PK\x03\x04 no zip"


def test_foreign_newer_and_truncated_checkpoints_are_told(tmp_path: Path, photos: Path) -> None:
    train(tiny(tmp_path / "run", photos, steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    saved, whole = load_checkpoint(path, "test"), path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingError, match="damaged, cut short") as caught:
            load_checkpoint(path, "test")
        assert "\n" not in str(caught.value)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(TrainingError, match="was not written by lic-fast train"):
        load_checkpoint(path, "test")
    torch.save({**saved, "format": 2}, path)
    with pytest.raises(TrainingError, match="format 2, this version reads 1"):
        load_checkpoint(path, "test")
    save_checkpoint(path, {name: value for name, value in saved.items() if name != "rng"})
    with pytest.raises(TrainingError, match="lacks rng"):
        load_checkpoint(path, "test")


def test_the_command_line_resumes_with_the_settings_of_the_run(tmp_path: Path, photos: Path, capsys) -> None:
    train(tiny(tmp_path / "once", photos, steps=12))
    train(tiny(tmp_path / "twice", photos, steps=5))
    parser = argparse.ArgumentParser()
    commands.add_train_parser(parser.add_subparsers())
    args = parser.parse_args(["train", "--resume", "--output", str(tmp_path / "twice"), "--steps", "12", "--quiet"])
    assert args.run(args) == 0
    assert "steps:         12" in capsys.readouterr().out
    assert log_without_timings(tmp_path / "once") == log_without_timings(tmp_path / "twice")
