"""lic-fast train: loss, skipped steps, messages, full disks. Tiny models on photographs made here."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.training import (  # noqa: E402
    RateDistortionLoss,
    TrainConfig,
    TrainingError,
    commands,
    files,
    loop,
    train,
)
from lic_fast.training.data import open_photos  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and do not fight other processes for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph(path: Path, seed: int = 0, height: int = 80, width: int = 96) -> Path:
    """A smooth random picture, so that no two crops are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image_module.fromarray(small).resize((width, height), image_module.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        photograph(folder / f"{index}.png", index)
    return folder


def tiny(tmp_path: Path, folder: Path | None, **changes) -> TrainConfig:
    settings = dict(
        model="bmshj2018-factorized",
        output=str(tmp_path / "run"),
        data=None if folder is None else str(folder),
        channels=(8, 8),
        crop=64,
        batch_size=2,
        steps=6,
        min_epoch_steps=4,
        quiet=True,
        device="cpu",
    )
    return TrainConfig(**{**settings, **changes})


def log_without_timings(folder: Path) -> list[dict[str, str]]:
    rows = files.read_log(folder / "log.csv")
    return [{name: value for name, value in row.items() if name not in files.TIMINGS} for row in rows]


def test_a_run_writes_its_four_files_and_sums_up(tmp_path: Path, photos: Path) -> None:
    result = train(tiny(tmp_path, photos, steps=10))
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "log.csv",
        "loss.png",
    ]
    rows = files.read_log(run / "log.csv")
    assert tuple(rows[0]) == files.COLUMNS and [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [int(row["epoch"]) for row in rows] == [0] * 4 + [1] * 4 + [2] * 2
    assert result.final_loss == pytest.approx(float(rows[-1]["loss"]))
    assert result.summary["steps"] == 10 and result.skipped == 0
    assert 0 < result.optimizer_seconds < result.step_seconds < result.seconds
    assert image_module.open(run / "loss.png").size[0] > 500
    assert json.loads((run / "config.json").read_text())["config"]["channels"] == [8, 8]


def test_training_learns(tmp_path: Path, photos: Path) -> None:
    result = train(tiny(tmp_path, photos, steps=60, lr=1e-3))
    first = float(files.read_log(tmp_path / "run" / "log.csv")[0]["loss"])
    assert result.final_loss < 0.5 * first


def test_loss_is_lambda_times_255_squared_mse_plus_bits_a_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 8, 16, generator=generator)
    output = {
        "x_hat": torch.rand(2, 3, 8, 16, generator=generator),
        "likelihoods": {"y": torch.full((2, 5, 2, 4), 0.25), "z": torch.full((2, 3, 1, 1), 0.5)},
    }
    terms = RateDistortionLoss(0.013)(output, target, torch.tensor(7.0))
    mse = ((output["x_hat"].double() - target.double()) ** 2).mean().item()
    bpp = (2 * 5 * 2 * 4 * 2 + 2 * 3 * 1) / (2 * 8 * 16)
    assert terms["bpp"].item() == pytest.approx(bpp, rel=1e-6)
    assert terms["mse"].item() == pytest.approx(mse, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.013 * 255**2 * mse + bpp, rel=1e-5)
    assert terms["psnr"].item() == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert terms["aux"].item() == 7


def test_the_packaged_photographs_train_without_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    opened = open_photos(None, "train")
    assert len(opened) >= 4 and all(opened.read(i).shape[2] == 3 for i in range(len(opened)))
    assert train(tiny(tmp_path, None, steps=2)).broken_images == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, photos: Path, workers: int) -> None:
    train(tiny(tmp_path, photos, output=str(tmp_path / "none")))
    train(tiny(tmp_path, photos, output=str(tmp_path / "some"), workers=workers))
    assert log_without_timings(tmp_path / "none") == log_without_timings(tmp_path / "some")


def test_broken_images_are_left_out_counted_and_told(tmp_path: Path, photos: Path, caplog) -> None:
    whole = photograph(photos / "cut.jpg", 9, 300, 300).read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.png").write_text("not a picture")
    (photos / "notes.txt").write_text("no image, and not counted as one")
    cut = photograph(photos / "half.png", 8, 200, 200).read_bytes()
    (photos / "half.png").write_bytes(cut[: len(cut) // 2])
    result = train(tiny(tmp_path, photos))
    assert result.broken_images == 4
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "4 unreadable image(s) left out of 8" in warnings[0] and "\n" not in warnings[0]
    named = {entry["name"] for entry in json.loads((tmp_path / "run" / "config.json").read_text())["broken_images"]}
    assert named == {"cut.jpg", "empty.png", "text.png", "half.png"}


def test_a_folder_without_usable_images_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    with pytest.raises(TrainingError, match="not a folder"):
        train(tiny(tmp_path, folder))
    folder.mkdir()
    with pytest.raises(TrainingError, match="no image file in"):
        train(tiny(tmp_path, folder))
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no usable image in .*, got 1 unreadable \(a.png"):
        train(tiny(tmp_path, folder))
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_falls_on_a_plateau(tmp_path: Path, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop.Trainer, "_validation_loss", lambda self: 1.0)
    train(tiny(tmp_path, photos, steps=16, patience=1, lr_factor=0.5))
    rates = [float(row["lr"]) for row in files.read_log(tmp_path / "run" / "log.csv")]
    assert rates == [1e-4] * 12 + [5e-5] * 4


class Poisoned(RateDistortionLoss):
    """Adds NaN to the loss of the training steps named in `at` (by order of call)."""

    at: frozenset[int] = frozenset()
    calls = 0

    def forward(self, output, target, aux):
        terms = super().forward(output, target, aux)
        type(self).calls += 1
        if self.calls in self.at:
            terms["loss"] = terms["loss"] * math.nan
        return terms


@pytest.fixture
def poison(monkeypatch):
    def arm(*at: int) -> None:
        monkeypatch.setattr(Poisoned, "calls", 0)
        monkeypatch.setattr(Poisoned, "at", frozenset(at))
        monkeypatch.setattr(loop, "RateDistortionLoss", Poisoned)

    return arm


def test_a_step_that_is_not_finite_updates_nothing(tmp_path: Path, photos: Path, poison, caplog) -> None:
    poison(3)
    config = dataclasses.replace(tiny(tmp_path, photos), channels=(8, 8))
    trainer = loop.Trainer(config)
    batches = trainer._batches()
    for _ in range(2):
        trainer._step(next(batches))
    before = [tensor.clone() for tensor in _state(trainer)]
    row = trainer._step(next(batches))
    assert row["skipped"] == 1 and math.isnan(row["loss"])
    assert all(torch.equal(old, new) for old, new in zip(before, _state(trainer), strict=True))
    assert "step 3 skipped" in caplog.text and "not finite: loss, grad_norm;" in caplog.text
    assert "gradient: entropy_bottleneck.matrices.0" in caplog.text, "the model's first parameter"
    assert trainer._step(next(batches))["skipped"] == 0
    assert not all(torch.equal(old, new) for old, new in zip(before, _state(trainer), strict=True))


def _state(trainer: loop.Trainer) -> list[torch.Tensor]:
    tensors = list(trainer.model.parameters())
    for optimizer in (trainer.optimizer, trainer.aux_optimizer):
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path: Path, photos: Path, poison) -> None:
    poison(2, 3, 5)
    result = train(tiny(tmp_path, photos, max_nonfinite=3))
    assert result.skipped == 3 and result.steps == 6 and math.isfinite(result.final_loss)
    assert [row["skipped"] for row in files.read_log(tmp_path / "run" / "log.csv")] == list("011010")


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_good_checkpoint(
    tmp_path: Path, photos: Path, poison
) -> None:
    poison(*range(4, 99))
    with pytest.raises(TrainingError, match="3 steps in a row were not finite, the last is step 6"):
        train(tiny(tmp_path, photos, steps=20, max_nonfinite=3))
    saved = loop.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "test")
    assert saved["progress"]["step"] == 6 and saved["progress"]["skipped"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_weights_that_are_not_finite_never_reach_the_checkpoint(tmp_path: Path, photos: Path, monkeypatch) -> None:
    step = torch.optim.Adam.step

    def ruin(self, closure=None):
        step(self, closure)
        self.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", ruin)
    with pytest.raises(TrainingError, match="not finite"):
        train(tiny(tmp_path, photos, max_nonfinite=2, checkpoint_every=1))
    saved = loop.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "test")
    assert saved["progress"]["step"] == 0 and all(t.isfinite().all() for t in saved["model"].values())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, photos: Path) -> None:
    config = tiny(tmp_path, photos)
    train(config)
    run = tmp_path / "run"
    before = (run / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*checkpoint\.pt: ") as caught:
            train(dataclasses.replace(config, steps=12, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError) and "\n" not in str(caught.value)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not list(run.glob(".*"))
    assert train(dataclasses.replace(config, steps=12, resume=True)).steps == 12


@pytest.mark.parametrize("name", ["log.csv", "loss.png", "config.json"])
def test_a_full_disk_is_one_line_wherever_it_strikes(tmp_path: Path, photos: Path, monkeypatch, name: str) -> None:
    write = files._write_all

    def full(file, data):
        if name in str(file.name) and not data.startswith(b"step,"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(files, "_write_all", full)
    with pytest.raises(TrainingError, match=f"cannot write .*{re.escape(name)}: No space left") as caught:
        train(tiny(tmp_path, photos))
    assert "\n" not in str(caught.value) and not list((tmp_path / "run").glob(".*"))
    assert loop.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "test")["progress"]["step"] in (0, 4, 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "mbt2018-men"}, "did you mean mbt2018-mean"),
        ({"model": "nonsense"}, "known: .*cheng2020-anchor, .*elic2022-official"),
        ({"model": "mbt2018-mean-vbr"}, "variable-rate model.*train mbt2018-mean instead"),
        ({"model": "elic"}, "did you mean elic2022-chandelier"),
        ({"model": "ssf2020"}, "unknown model"),
        ({"channels": (8,)}, "takes 2 channel numbers, got 1; pass --channels N,M"),
        ({"model": "cheng2020-anchor"}, "takes 1 channel numbers, got 2; pass --channels N"),
        ({"channels": (8, 1)}, "M of bmshj2018-factorized is too small, got 1"),
        ({"optimizer": "adan"}, "did you mean adam"),
        ({"crop": 100}, "--crop takes a multiple of 64"),
        ({"lmbda": math.nan}, "--lmbda takes a positive number"),
        ({"batch_size": 0}, "--batch-size takes at least 1"),
        ({"batch_size": 2.5}, "--batch-size takes at least 1, a whole number"),
        ({"epochs": 3}, "steps and epochs are both given"),
        ({"lr_factor": 1.0}, "--lr-factor takes between 0 and 1"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path: Path, photos: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        train(tiny(tmp_path, photos, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_used_output_folder_is_left_alone(tmp_path: Path, photos: Path) -> None:
    train(tiny(tmp_path, photos, steps=2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(TrainingError, match="already holds a run"):
        train(tiny(tmp_path, photos, steps=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no CUDA device"):
        train(tiny(tmp_path, photos, device="cuda"))


@pytest.mark.parametrize("extra", [{"amp": "bf16"}, {"channels_last": True}, {"optimizer": "adam-fused"}])
def test_the_fast_variants_train_alike(tmp_path: Path, photos: Path, extra: dict) -> None:
    plain = train(tiny(tmp_path, photos, output=str(tmp_path / "plain")))
    fast = train(tiny(tmp_path, photos, **extra))
    assert fast.skipped == 0 and fast.final_loss == pytest.approx(plain.final_loss, rel=0.02)


@pytest.mark.parametrize(
    "name", ["elic2022-official", "elic2022-chandelier", "cheng2020-anchor-checkerboard", "mbt2018"]
)
def test_the_context_models_train(tmp_path: Path, photos: Path, name: str) -> None:
    channels = (8,) if name.startswith("cheng") else (8, 20)
    result = train(tiny(tmp_path, photos, model=name, channels=channels, steps=1, batch_size=1))
    assert math.isfinite(result.final_loss)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "lower --batch-size or --crop"),
        (RuntimeError("no C++ compiler\nmore"), r"torch.compile failed \(no C\+\+ compiler\)"),
    ],
)
def test_failures_of_the_machine_are_told(tmp_path: Path, photos: Path, monkeypatch, error, said: str) -> None:
    def fail(self, batch):
        raise error

    monkeypatch.setattr(loop.Trainer, "_step", fail)
    with pytest.raises(TrainingError, match=said) as caught:
        train(tiny(tmp_path, photos, compile=True))
    assert "\n" not in str(caught.value)


def test_the_command_line_prints_a_summary(tmp_path: Path, photos: Path, capsys) -> None:
    parser = argparse.ArgumentParser()
    commands.add_train_parser(parser.add_subparsers())
    line = f"train --model bmshj2018-factorized --data {photos} --output {tmp_path / 'run'} --channels 8,8"
    line += " --crop 64 --batch-size 2 --steps 3 --quiet --device cpu --seed 5"
    args = parser.parse_args(line.split())
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "steps:         3 (0 full epochs), 0 skipped" in shown and "final loss:" in shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 5


def test_the_parsers_import_no_optional_package() -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('compressai', 'matplotlib', 'PIL', 'skimage'):\n"
        "            raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import lic_fast.training.commands\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    from lic_fast.training.errors import optional_import

    with pytest.raises(ImportError, match=re.escape("pytorch-msssim is not installed")) as caught:
        optional_import("pytorch_msssim")
    assert 'pip install "lic_fast[train]"' in str(caught.value)
