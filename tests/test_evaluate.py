"""evaluate, compress and decompress: real bytes, exact pictures, loud refusals."""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_msssim")
image_module = pytest.importorskip("PIL.Image")

import lic_fast  # noqa: E402
from lic_fast.codec import BitstreamError, pack, unpack  # noqa: E402
from lic_fast.training import ImageCodec, TrainConfig, TrainingError, coding_commands, commands, evaluate, train  # noqa: E402
from lic_fast.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from lic_fast.training.data import load_rgb  # noqa: E402
from lic_fast.training.evaluate import table  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and do not fight other processes for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(image_module.fromarray(small).resize((width, height), image_module.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Path:
    """photos/ with three sizes, and a trained checkpoint of three kinds of model."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "photos").mkdir()
    for index, (height, width) in enumerate([(200, 170), (64, 64), (101, 259)]):
        image_module.fromarray(picture(height, width, index)).save(root / "photos" / f"{index}.png")
    for name, channels, steps in [
        ("bmshj2018-factorized", (8, 8), 60),
        ("mbt2018-mean", (8, 12), 60),
        ("cheng2020-anchor-checkerboard", (8,), 4),
        ("elic2022-official", (8, 20), 1),
        ("mbt2018", (8, 8), 1),
    ]:
        train(
            TrainConfig(
                model=name, output=str(root / name), data=str(root / "photos"), channels=channels, crop=64,
                batch_size=2, steps=steps, lr=1e-3, quiet=True, device="cpu",
            )
        )  # fmt: skip
    return root


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


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018-mean"])
def test_the_bytes_agree_with_the_estimate(world: Path, name: str, tmp_path: Path) -> None:
    rows = evaluate(world / name / "checkpoint.pt", world / "photos", output=tmp_path, device="cpu")
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        container = 8 * 160 / (row["height"] * row["width"])  # header, and what rANS flushes for each string
        low, high = 0.93 * row["bpp_estimated"], 1.07 * row["bpp_estimated"] + container
        assert low <= row["bpp"] <= high, row
        assert row["psnr"] > 8 and row["encode_seconds"] > 0 and row["decode_seconds"] > 0


def test_results_table_and_plot(world: Path, capsys) -> None:
    checkpoint = world / "mbt2018-mean" / "checkpoint.pt"
    assert run("evaluate", checkpoint, world / "photos", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    with (checkpoint.parent / "evaluate" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png", "mean"]
    assert [row["ms_ssim"] != "" for row in rows] == [True, False, False, True], "blank below 161 pixels"
    mean = sum(float(row["bpp"]) for row in rows[:3]) / 3
    assert float(rows[3]["bpp"]) == pytest.approx(mean, rel=1e-4)
    assert "MS-SSIM is blank below 161" in shown and "170x200" in shown and f"{mean:.4f}" in shown
    assert image_module.open(checkpoint.parent / "evaluate" / "plot.png").size[0] > 400


def test_limit_takes_the_first_by_name(world: Path, tmp_path: Path) -> None:
    checkpoint = world / "bmshj2018-factorized" / "checkpoint.pt"
    rows = evaluate(checkpoint, world / "photos", output=tmp_path, limit=2)
    assert [row["image"] for row in rows] == ["0.png", "1.png"] and "1.png" in table(rows)
    with pytest.raises(ValueError, match="--limit takes at least 1"):
        evaluate(checkpoint, world / "photos", output=tmp_path, limit=0)


MODELS = [
    "bmshj2018-factorized",
    "mbt2018-mean",
    "cheng2020-anchor-checkerboard",
    "elic2022-official",
    "mbt2018",
]


@pytest.mark.parametrize("name", MODELS)
def test_the_png_is_the_rounding_of_x_hat(world: Path, name: str, tmp_path: Path, capsys) -> None:
    checkpoint, image = world / name / "checkpoint.pt", world / "photos" / "2.png"
    coded, decoded = tmp_path / "x.licf", tmp_path / "x.png"
    assert run("compress", checkpoint, image, coded) == 0
    assert f"{coded.stat().st_size} bytes" in capsys.readouterr().out
    assert run("decompress", checkpoint, coded, decoded) == 0
    codec = ImageCodec(checkpoint, device="cpu", command="test")
    stream = unpack(coded.read_bytes())
    with torch.no_grad():
        x_hat = codec.model.decompress(stream.strings, stream.shape)["x_hat"][0, :, :101, :259]
    expected = (x_hat.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(load_rgb(decoded), expected)
    assert stream.check is not None and (stream.height, stream.width) == (101, 259)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_pixels_are_those_of_compressais_layers(world: Path, name: str) -> None:
    codec = ImageCodec(world / name / "checkpoint.pt", device="cpu", command="test")
    theirs = copy.deepcopy(codec.model)
    assert lic_fast.restore(theirs).swapped
    x = codec._padded(picture(101, 259))
    with torch.no_grad():
        coded, expected = codec.model.compress(x), theirs.compress(x)
        assert coded["strings"] == expected["strings"]
        ours, stock = (model.decompress(coded["strings"], coded["shape"])["x_hat"] for model in (codec.model, theirs))
    assert torch.equal(ours, stock)  # to the bit: rounded, one value in ten thousand would tell


def test_an_unverified_stream_says_so(world: Path, tmp_path: Path, capsys) -> None:
    checkpoint = world / "bmshj2018-factorized" / "checkpoint.pt"
    assert run("compress", checkpoint, world / "photos" / "0.png", tmp_path / "x.licf", "--no-verify") == 0
    assert "not verified" in capsys.readouterr().out
    assert unpack((tmp_path / "x.licf").read_bytes()).check is None


def test_streams_of_other_weights_models_and_devices_are_refused(world: Path, tmp_path: Path) -> None:
    codec = ImageCodec(world / "bmshj2018-factorized" / "checkpoint.pt", device="cpu", command="test")
    data = codec.encode(picture(70, 80))
    with pytest.raises(BitstreamError, match="made with bmshj2018-factorized, got a checkpoint of mbt2018-mean"):
        ImageCodec(world / "mbt2018-mean" / "checkpoint.pt", device="cpu", command="test").decode(data)
    saved = load_checkpoint(world / "bmshj2018-factorized" / "checkpoint.pt", "test")
    saved["model"]["g_s.0.bias"][0] += 1e-3
    save_checkpoint(tmp_path / "other.pt", {k: v for k, v in saved.items() if k not in ("kind", "format")})
    with pytest.raises(BitstreamError, match=r"made with weights [0-9a-f]{12}, the checkpoint holds"):
        ImageCodec(tmp_path / "other.pt", device="cpu", command="test").decode(data)
    with pytest.raises(BitstreamError, match=r"made on cuda, got cpu.*use --device cuda"):
        codec.decode(pack(dataclasses.replace(unpack(data), cuda=True)))


def test_pixels_that_differ_from_the_encoders_are_refused(world: Path) -> None:
    codec = ImageCodec(world / "bmshj2018-factorized" / "checkpoint.pt", device="cpu", command="test")
    pixels = picture(70, 80)
    data, decoded = codec.verified(pixels, codec.encode(pixels))
    assert np.array_equal(codec.decode(data), decoded)
    with pytest.raises(BitstreamError, match="not those the encoder saw"):
        codec.decode(pack(dataclasses.replace(unpack(data), check=unpack(data).check ^ 1)))


def test_a_stream_that_decodes_to_something_else_fails_verification(world: Path, monkeypatch) -> None:
    codec = ImageCodec(world / "bmshj2018-factorized" / "checkpoint.pt", device="cpu", command="test")
    pixels = picture(70, 80)
    monkeypatch.setattr(codec, "decode", lambda data: np.where(pixels > 127, 0, 255).astype(np.uint8))
    with pytest.raises(TrainingError, match="the model promises"):
        codec.verified(pixels, codec.encode(pixels))


@pytest.mark.parametrize("shape", [(60000, 60000), (4, 9999), ((1, 2), 3), 7, {"y": (1 << 20, 4, 4)}, (1, 2, 3, 4), ()])
def test_latents_that_cannot_be_are_refused_before_they_are_made(world: Path, shape) -> None:
    codec = ImageCodec(world / "bmshj2018-factorized" / "checkpoint.pt", device="cpu", command="test")
    stream = unpack(codec.encode(picture(70, 80)))
    with pytest.raises(BitstreamError, match="decode:"):
        codec.decode(pack(dataclasses.replace(stream, shape=shape)))


def test_damaged_files_are_told_in_one_line(world: Path, tmp_path: Path) -> None:
    checkpoint, out = world / "bmshj2018-factorized" / "checkpoint.pt", tmp_path / "x.png"
    run("compress", checkpoint, world / "photos" / "1.png", tmp_path / "x.licf")
    data = (tmp_path / "x.licf").read_bytes()
    for damaged in (b"", data[:40], data[:-1], data[:50] + b"\x00\x01" + data[52:], b"\x89PNG" + data):
        (tmp_path / "bad.licf").write_bytes(damaged)
        with pytest.raises(BitstreamError, match="unpack:"):
            run("decompress", checkpoint, tmp_path / "bad.licf", out)
    with pytest.raises(TrainingError, match="no such file"):
        run("decompress", checkpoint, tmp_path / "none.licf", out)
    with pytest.raises(ValueError, match=r"name it \.png"):
        run("decompress", checkpoint, tmp_path / "x.licf", tmp_path / "x.jpg")
    with pytest.raises(TrainingError, match="cannot read the image"):
        run("compress", checkpoint, tmp_path / "none.png", tmp_path / "y.licf")
    with pytest.raises(TrainingError, match="cannot write"):
        run("compress", checkpoint, world / "photos" / "1.png", tmp_path / "absent" / "y.licf")
    assert not out.exists() and not (tmp_path / "y.licf").exists()


def test_unusable_checkpoints_are_told_in_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="evaluate: no checkpoint at"):
        evaluate(tmp_path / "none.pt", world / "photos")
    saved = load_checkpoint(world / "mbt2018-mean" / "checkpoint.pt", "test")
    kept = {name: value for name, value in saved.items() if name not in ("kind", "format")}
    save_checkpoint(tmp_path / "other.pt", {**kept, "config": {**saved["config"], "channels": [8, 16]}})
    with pytest.raises(TrainingError, match="weights do not fit its model") as caught:
        evaluate(tmp_path / "other.pt", world / "photos")
    assert "\n" not in str(caught.value)
    saved["model"]["g_a.0.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", kept)
    with pytest.raises(TrainingError, match=r"weights in .*nan\.pt are not finite"):
        evaluate(tmp_path / "nan.pt", world / "photos")
    with pytest.raises(TrainingError, match="holds no slow weights"):
        ImageCodec(world / "mbt2018" / "checkpoint.pt", slow=True, command="test")


def test_slow_weights_are_taken_by_default(world: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(world / "bmshj2018-factorized" / "checkpoint.pt", "test")
    slow = {name: 0.5 * value for name, value in saved["model"].items() if name.startswith("g_s")}
    kept = {name: value for name, value in saved.items() if name not in ("kind", "format")}
    save_checkpoint(tmp_path / "sma.pt", {**kept, "slow": slow})
    default = ImageCodec(tmp_path / "sma.pt", device="cpu", command="test")
    fast = ImageCodec(tmp_path / "sma.pt", device="cpu", slow=False, command="test")
    assert torch.equal(default.model.g_s[0].bias, slow["g_s.0.bias"])
    assert torch.equal(fast.model.g_s[0].bias, saved["model"]["g_s.0.bias"])
    assert run("compress", tmp_path / "sma.pt", world / "photos" / "1.png", tmp_path / "f.licf", "--no-sma") == 0
    assert run("compress", tmp_path / "sma.pt", world / "photos" / "1.png", tmp_path / "s.licf") == 0
    for name, flag in [("f", False), ("s", True)]:
        assert unpack((tmp_path / f"{name}.licf").read_bytes()).slow is flag
        assert run("decompress", tmp_path / "sma.pt", tmp_path / f"{name}.licf", tmp_path / f"{name}.png") == 0
    assert not np.array_equal(load_rgb(tmp_path / "f.png"), load_rgb(tmp_path / "s.png"))
