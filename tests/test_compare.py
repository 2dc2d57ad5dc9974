"""lic-fast evaluate of several checkpoints and classic codecs: curves, BD-rates, files, refusals."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_msssim")
pytest.importorskip("bjontegaard")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.training import TrainConfig, TrainingError, commands, compare, train  # noqa: E402
from lic_fast.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from lic_fast.training.classic import CLASSIC, ClassicCodec, usual_qualities  # noqa: E402
from lic_fast.training.comparison import bd_rate, comparison_table  # noqa: E402
from lic_fast.training.image_codec import psnr  # noqa: E402

FILES = {"results.csv", "points.csv", "bd_rate.csv", "plot.png"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(image_module.fromarray(small).resize((width, height), image_module.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Path:
    """photos/ of two sizes, a.pt trained, b.pt with other weights and lambda, c.pt of another model."""
    root = tmp_path_factory.mktemp("compare")
    (root / "photos").mkdir()
    for index, (height, width) in enumerate([(170, 180), (64, 48)]):
        image_module.fromarray(picture(height, width, index)).save(root / "photos" / f"{index}.png")
    for name, model, steps in (("a", "bmshj2018-factorized", 40), ("c", "msp-fast", 1)):
        config = TrainConfig(
            model=model, output=str(root / name), data=str(root / "photos"), channels=(8, 8), crop=64, batch_size=2,
            steps=steps, lr=1e-3, quiet=True, device="cpu",
        )  # fmt: skip
        train(config)
        (root / name / "checkpoint.pt").rename(root / f"{name}.pt")
    saved = load_checkpoint(root / "a.pt", "test")
    saved["model"]["g_a.6.weight"] *= 3
    saved["config"]["lmbda"] = 0.05
    save_checkpoint(root / "b.pt", {name: value for name, value in saved.items() if name not in ("kind", "format")})
    return root


def run(*line: object) -> int:
    parser = argparse.ArgumentParser()
    commands.add_evaluate_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, line)])
    return args.run(args)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_checkpoints_beside_classic_codecs(world: Path, tmp_path: Path, capsys) -> None:
    checkpoints = [world / "a.pt", world / "b.pt", f"mine={world / 'c.pt'}"]
    line = ["--against", "jpeg,webp", "--qualities", "jpeg=10,40,80", "--qualities", "webp=20,70", "--output", tmp_path]
    assert run(*checkpoints, world / "photos", *line, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == FILES
    points, rows, bd = (read(tmp_path / name) for name in ("points.csv", "results.csv", "bd_rate.csv"))
    curves = ["bmshj2018-factorized"] * 2 + ["mine"] + ["jpeg"] * 3 + ["webp"] * 2
    assert [point["codec"] for point in points] == curves
    assert [point["setting"] for point in points][1:4] == ["lambda 0.05", "lambda 0.013", "quality 10"]
    assert len(rows) == 16 and [row["image"] for row in rows] == ["0.png", "1.png"] * 8
    for place, point in enumerate(points):
        own = rows[2 * place : 2 * place + 2]
        assert float(point["bpp"]) == pytest.approx(sum(float(row["bpp"]) for row in own) / 2, rel=1e-4)
        assert float(point["psnr"]) == pytest.approx(sum(float(row["psnr"]) for row in own) / 2, rel=1e-4)
        assert (point["bpp_estimated"] == "") == (point["codec"] in CLASSIC)
        assert point["ms_ssim"] == own[0]["ms_ssim"] and own[1]["ms_ssim"] == "", "blank below 161 pixels"
    assert [(row["codec"], row["anchor"]) for row in bd] == [
        (name, "jpeg") for name in ("bmshj2018-factorized", "mine", "webp")
    ]
    assert "a curve needs two points, got 1" in bd[1]["note"] and bd[1]["bd_rate_psnr"] == ""
    assert "BD-rate beside jpeg" in shown and "quality 70" in shown and bd[2]["overlap_psnr"] != ""
    assert image_module.open(tmp_path / "plot.png").size[0] > 400


def test_the_bytes_are_those_of_real_files(world: Path, tmp_path: Path) -> None:
    compared = compare([world / "a.pt"], world / "photos", against=["jpeg"], qualities={"jpeg": [30]}, output=tmp_path)
    pixels = picture(170, 180, 0)
    image_module.fromarray(pixels).save(tmp_path / "x.jpg", quality=30, optimize=True, progressive=True)
    row = next(row for row in compared.rows if row["codec"] == "jpeg" and row["image"] == "0.png")
    assert row["bpp"] == 8 * (tmp_path / "x.jpg").stat().st_size / (170 * 180)
    assert row["psnr"] == psnr(pixels, np.asarray(image_module.open(tmp_path / "x.jpg").convert("RGB")))
    assert row["encode_seconds"] > 0 and row["decode_seconds"] > 0 and row["bpp_estimated"] is None


def test_an_anchor_of_ones_choice_and_no_classic_codec(world: Path, tmp_path: Path) -> None:
    names = [f"one={world / 'a.pt'}", f"one={world / 'b.pt'}", f"two={world / 'b.pt'}", f"two={world / 'a.pt'}"]
    compared = compare(names, world / "photos", output=tmp_path, anchor="two", device="cpu", limit=1)
    assert compared.curves == ["one", "two"] and compared.anchor == "two" and len(compared.rows) == 4
    assert sorted(compared.curve("one")) == sorted(compared.curve("two"))
    (row,) = compared.bd_rates
    assert row["codec"] == "one" and row["anchor"] == "two"
    if not row["note"]:
        assert row["bd_rate_psnr"] == pytest.approx(0, abs=1e-6) and row["overlap_psnr"] == 1
    assert "BD-rate beside two" in comparison_table(compared)


def test_one_curve_needs_no_bd_rate(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bjontegaard", None)
    compared = compare([world / "a.pt", world / "b.pt"], world / "photos", output=tmp_path, limit=1)
    assert compared.bd_rates == [] and "BD-rate" not in comparison_table(compared)
    with pytest.raises(ImportError, match=r'bjontegaard is not installed.*pip install "lic_fast\[compare\]"'):
        compare([world / "a.pt"], world / "photos", against=["jpeg"], output=tmp_path)


def test_bd_rate_is_the_packages_and_exact_where_it_is_known() -> None:
    curve = [(0.2, 28.0), (0.4, 31.0), (0.8, 34.0), (1.6, 37.0)]
    half = [(rate / 2, quality) for rate, quality in curve]
    value, overlap = bd_rate(curve, half[::-1])
    assert value == pytest.approx(-50, abs=1e-9) and overlap == 1
    assert bd_rate(half, curve)[0] == pytest.approx(100, abs=1e-9)
    straight = [(0.2 * 2**k, 28 + 3 * k) for k in (0.5, 1.5)]  # two points on the line of the four
    value, overlap = bd_rate(curve, straight)
    assert value == pytest.approx(0, abs=1e-9) and overlap == pytest.approx(1 / 3)
    apart = bd_rate(curve, [(1, 50.0), (2, 51.0)])
    assert math.isnan(apart[0]) and apart[1] == 0
    package = pytest.importorskip("bjontegaard")
    other = [(0.15, 27.0), (0.45, 31.5), (1.1, 36.0)]
    theirs = package.bd_rate(*zip(*curve, strict=True), *zip(*other, strict=True), "pchip", False, min_overlap=0)
    assert bd_rate(curve, other)[0] == pytest.approx(theirs)


def test_bd_rate_of_curves_that_are_none() -> None:
    curve = [(0.2, 28.0), (0.4, 31.0)]
    with pytest.raises(ValueError, match="needs two points, got 1"):
        bd_rate(curve, curve[:1])
    for bad in ([(0.4, 28.0), (0.2, 31.0)], [(0.2, 28.0), (0.4, 28.0)], [(0.2, 28.0), (0.2, 29.0)]):
        with pytest.raises(ValueError, match="does not rise"):
            bd_rate(bad, curve)


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_codecs_spend_more_for_more(name: str) -> None:
    if name == "jxl":
        pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(0).integers(-20, 21, (96, 80, 3)) + picture(96, 80)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    sizes, qualities = [], []
    for quality in (usual_qualities(name)[1], usual_qualities(name)[-1]):
        codec = ClassicCodec(name, quality)
        data = codec.encode(pixels)
        decoded = codec.decode(data)
        assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
        sizes.append(len(data))
        qualities.append(psnr(pixels, decoded))
    assert sizes[0] < sizes[1] and 12 < qualities[0] < qualities[1] and codec.estimate(pixels) == (None, None)


def test_what_is_refused_before_anything_is_coded(world: Path, tmp_path: Path, monkeypatch) -> None:
    a, photos = world / "a.pt", world / "photos"
    monkeypatch.setattr(ClassicCodec, "encode", lambda *_: pytest.fail("coded"))
    for options, said in (
        ({"against": ["bpg"]}, "unknown codec, got 'bpg'; use some of jpeg"),
        ({"against": ["jpeg"], "anchor": "webp"}, "unknown anchor, got 'webp'; use one of bmshj2018-factorized, jpeg"),
        ({"against": ["jpeg"], "qualities": {"webp": [3]}}, "not compared, got 'webp'"),
        (
            {"against": ["jpeg"], "qualities": {"jpeg": [101]}},
            "quality of jpeg is out of range, got 101; pass 1 to 100",
        ),
        ({"against": ["jpeg"], "limit": 0}, "--limit takes at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            compare([a], photos, output=tmp_path / "x", **options)
    with pytest.raises(ValueError, match="'jpeg' is the name of a classic codec"):
        compare([f"jpeg={a}"], photos, against=["jpeg"], output=tmp_path / "x")
    with pytest.raises(TrainingError, match="no checkpoint at"):
        compare([a, world / "none.pt"], photos, output=tmp_path / "x")
    with pytest.raises(ValueError, match="one checkpoint is compared with nothing"):
        run(a, photos, "--anchor", "jpeg")
    with pytest.raises(SystemExit):
        run(a, photos, "--against", "jpeg", "--qualities", "jpeg=best")
    assert not (tmp_path / "x").exists()


def test_a_format_that_this_pillow_lacks(monkeypatch) -> None:
    features = pytest.importorskip("PIL.features")
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    with pytest.raises(TrainingError, match="built without AVIF; install another, or leave avif out"):
        ClassicCodec("avif", 50)
    assert ClassicCodec("webp", 50).quality == 50
