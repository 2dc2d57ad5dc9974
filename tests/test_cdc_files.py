"""CDC's files: a short training, and photographs through lic-fast compress and decompress."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.codec import CDC, BitstreamError, unpack  # noqa: E402
from lic_fast.training import ImageCodec, TrainConfig, TrainingError, coding_commands, commands, train  # noqa: E402
from lic_fast.training.loss import RateDistortionLoss  # noqa: E402
from lic_fast.training.models import build_model  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and do not fight other processes for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Iterator[Path]:
    """photos/ with odd sizes, and a trained checkpoint of each kind."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("cdc")
    usual = dict(CDC.usual_steps)
    CDC.usual_steps.update(x=5, eps=6)  # short, for the files below too
    (root / "photos").mkdir()
    for index, (height, width) in enumerate([(100, 70), (1, 1), (101, 131)]):
        small = np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        photo = image_module.fromarray(small).resize((width, height), image_module.Resampling.BICUBIC)
        photo.save(root / "photos" / f"{index}.png")
    for name, steps in (("cdc-x-light", 60), ("cdc-eps-light", 2)):
        train(
            TrainConfig(
                model=name, output=str(root / name), data=str(root / "photos"), channels=(8,), crop=64,
                batch_size=2, steps=steps, lr=2e-3, lmbda=0.05, quiet=True, device="cpu",
            )
        )  # fmt: skip
    yield root
    CDC.usual_steps.update(usual)


def run(*line: object) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for add in (
        commands.add_evaluate_parser,
        coding_commands.add_compress_parser,
        coding_commands.add_decompress_parser,
    ):
        add(subparsers)
    args = parser.parse_args([str(word) for word in line])
    return args.run(args)


def test_training_lowers_the_loss(world: Path) -> None:
    """At the fixed times and noise of eval mode: those that training draws make the loss of a step a matter of luck."""
    with (world / "cdc-x-light" / "log.csv").open() as file:
        assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(file))
    pixels = np.asarray(image_module.open(world / "photos" / "2.png"))[:64, :128]
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    x = torch.cat([x[..., :64], x[..., 64:]])
    torch.manual_seed(0)
    losses = []
    for codec in (
        build_model("cdc-x-light", (8,)),
        ImageCodec(world / "cdc-x-light" / "checkpoint.pt", device="cpu", command="test").model,
    ):
        with torch.no_grad():
            losses.append(RateDistortionLoss(0.05)(codec.eval()(x), x, x.new_zeros(()))["loss"].item())
    assert losses[1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("name", ["cdc-x-light", "cdc-eps-light"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_files_through_the_commands(world: Path, name: str, index: int, tmp_path: Path) -> None:
    checkpoint, source = world / name / "checkpoint.pt", world / "photos" / f"{index}.png"
    coded, decoded = tmp_path / "a.licf", tmp_path / "a.png"
    assert run("compress", checkpoint, source, coded) == 0
    assert run("decompress", checkpoint, coded, decoded) == 0
    pixels = np.asarray(image_module.open(decoded))
    assert pixels.shape == np.asarray(image_module.open(source)).shape
    codec = ImageCodec(checkpoint, device="cpu", command="test")
    assert np.array_equal(pixels, codec.decode(coded.read_bytes())) and unpack(coded.read_bytes()).model == name
    data = coded.read_bytes()
    coded.write_bytes(data[:-9] + b"x" + data[-8:])
    with pytest.raises(BitstreamError):
        run("decompress", checkpoint, coded, decoded)


def test_settings_of_the_sampler_through_the_commands(world: Path, tmp_path: Path, capsys) -> None:
    checkpoint, source = world / "cdc-x-light" / "checkpoint.pt", world / "photos" / "2.png"
    pictures = {}
    for name, options in {
        "own": [], "again": ["--seed", 0], "other": ["--seed", 7], "short": ["--sampling-steps", 2],
        "noisy": ["--eta", 0.5], "grey": ["--gamma", 0], "tiled": ["--tile", 128, "--overlap", 64],
    }.items():  # fmt: skip
        coded, decoded = tmp_path / f"{name}.licf", tmp_path / f"{name}.png"
        assert run("compress", checkpoint, source, coded, "--quiet", *options) == 0
        assert run("decompress", checkpoint, coded, decoded, "--quiet") == 0
        pictures[name] = decoded.read_bytes()
        written, read = capsys.readouterr().out.splitlines()
        assert written.partition("; sampled by")[2] == read.partition("; sampled by")[2] != ""
        told = {"other": "seed 7", "short": " 2 steps", "noisy": "eta 0.5", "grey": "gamma 0,", "tiled": "tiles of 128"}
        assert told.get(name, "5 steps, seed 0, gamma 0.8, eta 0") in read
    assert pictures["own"] == pictures["again"] and len(set(pictures.values())) == len(pictures) - 1
    with pytest.raises(ValueError, match=r"CDC.compress: steps must be 1 to 8193, got 0"):
        run("compress", checkpoint, source, tmp_path / "no", "--sampling-steps", 0)
    with pytest.raises(ValueError, match="tile must be a multiple of 64"):
        run("compress", checkpoint, source, tmp_path / "no", "--tile", 100)
    assert not (tmp_path / "no").exists()


def test_other_models_have_no_sampler(world: Path, tmp_path: Path) -> None:
    train(
        TrainConfig(
            model="msp-base", output=str(tmp_path / "msp"), data=str(world / "photos"), channels=(8, 8), crop=64,
            batch_size=1, steps=1, quiet=True, device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(
        TrainingError, match="compress: msp-base has no sampler, got seed, eta; these are of cdc models"
    ):
        run("compress", tmp_path / "msp" / "checkpoint.pt", world / "photos" / "0.png", "x", "--seed", 1, "--eta", 0)


def test_a_bar_for_every_image_unless_quiet(world: Path, tmp_path: Path, monkeypatch) -> None:
    import tqdm

    seen = []
    monkeypatch.setattr(tqdm, "tqdm", lambda steps, **options: seen.append(len(steps)) or steps)
    checkpoint, source, coded = world / "cdc-x-light" / "checkpoint.pt", world / "photos" / "1.png", tmp_path / "a.licf"
    run("compress", checkpoint, source, coded, "--sampling-steps", 3)
    run("decompress", checkpoint, coded, tmp_path / "a.png")
    assert seen == [3, 3]  # one of the verification
    run("decompress", checkpoint, coded, tmp_path / "a.png", "--quiet")
    assert len(seen) == 2
