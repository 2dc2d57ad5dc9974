"""MSPCodec: CompressAI's forms, training, and files through the commands."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.codec import MSP_NAMES, BitstreamError, MSPCodec, unpack  # noqa: E402
from lic_fast.entropy import Profile  # noqa: E402
from lic_fast.training import ImageCodec, TrainConfig, coding_commands, commands, train  # noqa: E402
from lic_fast.training.data import load_rgb  # noqa: E402
from lic_fast.training.models import build_model, resolve_channels, split_parameters  # noqa: E402

SMALL = Profile(scales=2, groups=2, width=8, depth=1)


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
def codecs() -> dict[str, MSPCodec]:
    torch.manual_seed(0)
    made = {kind: MSPCodec(8, 8, profile=SMALL, transforms=kind).eval() for kind in ("light", "elic")}
    for codec in made.values():
        codec.update()
    return made


@pytest.mark.parametrize("kind", ["light", "elic"])
@pytest.mark.parametrize("sides", [(16, 16), (48, 80), (112, 64)], ids=str)
def test_decoding_gives_the_forward_pass(codecs, kind: str, sides: tuple[int, int]) -> None:
    codec, x = codecs[kind], torch.rand(1, 3, *sides)
    coded = codec.compress(x)
    assert coded["shape"] == (sides[0] // 16, sides[1] // 16) and isinstance(coded["strings"][0][0], bytes)
    decoded = codec.decompress(**coded)["x_hat"]
    with torch.no_grad():
        output = codec(x)
    assert torch.equal(decoded, output["x_hat"].clamp(0, 1)) and decoded.shape == x.shape
    assert output["likelihoods"]["y"].shape == (1, 8, *coded["shape"])


def test_a_batch_is_its_samples(codecs) -> None:
    codec, x = codecs["light"], torch.rand(3, 3, 32, 48)
    coded = codec.compress(x)
    assert codec.decompress(**coded)["x_hat"].shape == x.shape
    alone = [codec.decompress([[string]], coded["shape"])["x_hat"] for string in coded["strings"][0]]
    torch.testing.assert_close(codec.decompress(**coded)["x_hat"], torch.cat(alone))


def test_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    codec = MSPCodec(8, 8, profile=SMALL)
    x = torch.rand(2, 3, 128, 128)
    output = codec(x)
    bits = -output["likelihoods"]["y"].log2().sum()
    (bits / x.numel() + (output["x_hat"] - x).square().mean() + codec.aux_loss()).backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_what_the_codec_refuses(codecs) -> None:
    codec = codecs["light"]
    for wrong in (torch.rand(1, 3, 40, 48), torch.rand(1, 1, 48, 48), torch.rand(3, 48, 48), torch.rand(1, 3, 0, 16)):
        for method in (codec, codec.compress):
            with pytest.raises(ValueError, match="multiples of 16"):
                method(wrong)
    with pytest.raises(ValueError, match="transforms must be one of light, elic"):
        MSPCodec(8, 8, transforms="heavy")
    with pytest.raises(ValueError, match="unknown name"):
        MSPCodec.from_name("msp-quick")
    coded = codec.compress(torch.rand(1, 3, 48, 48))
    with pytest.raises(BitstreamError, match="one list of bytes"):
        codec.decompress(coded["strings"] * 2, coded["shape"])


def test_names_sizes_and_parameters() -> None:
    assert {*MSP_NAMES} == {f"msp-{profile}{suffix}" for profile in ("fast", "base", "max") for suffix in ("", "-elic")}
    assert resolve_channels("msp-base", None, 0.0130) == (128, 192)
    assert resolve_channels("msp-base", None, 0.0483) == (192, 320)
    assert resolve_channels("msp-max-elic", None, 0.0130) == (192, 320)
    with pytest.raises(ValueError, match="M of msp-max is too small"):
        resolve_channels("msp-max", (8, 3), 0.0130)
    for name, steps in [("msp-fast", 10), ("msp-base-elic", 19), ("msp-max", 37)]:
        codec = build_model(name, (8, 12))
        assert len(codec.entropy_model.schedule) == steps
        assert [name for name, _ in split_parameters(codec)[1]] == ["entropy_model.bottleneck.quantiles"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Path:
    """photos/ with odd sizes, and two trained checkpoints."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("msp")
    (root / "photos").mkdir()
    for index, (height, width) in enumerate([(200, 170), (1, 1), (101, 259)]):
        image_module.fromarray(picture(height, width, index)).save(root / "photos" / f"{index}.png")
    for name, steps in (("msp-fast", 60), ("msp-base", 2)):
        train(
            TrainConfig(
                model=name, output=str(root / name), data=str(root / "photos"), channels=(8, 12), crop=64,
                batch_size=2, steps=steps, lr=2e-3, quiet=True, device="cpu",
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


def test_training_lowers_the_loss(world: Path) -> None:
    with (world / "msp-fast" / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", ["msp-fast", "msp-base"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_files_through_the_commands(world: Path, name: str, index: int, tmp_path: Path) -> None:
    checkpoint, source = world / name / "checkpoint.pt", world / "photos" / f"{index}.png"
    coded, decoded = tmp_path / "a.licf", tmp_path / "a.png"
    assert run("compress", checkpoint, source, coded) == 0
    assert run("decompress", checkpoint, coded, decoded) == 0
    codec = ImageCodec(checkpoint, device="cpu", command="test")
    pixels = load_rgb(decoded)
    assert pixels.shape == load_rgb(source).shape
    assert np.array_equal(pixels, codec.decode(coded.read_bytes()))
    assert unpack(coded.read_bytes()).model == name


def test_evaluate_measures_what_the_likelihoods_promise(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_msssim")
    assert run("evaluate", world / "msp-fast" / "checkpoint.pt", world / "photos", "--output", tmp_path) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))[:3]
    for row in rows:
        pixels = int(row["height"]) * int(row["width"])
        real, promised = (float(row[key]) * pixels / 8 for key in ("bpp", "bpp_estimated"))
        container = 65 + len("msp-fast")  # the .licf around the stream: digest, sizes, CRC-32
        assert abs(real - promised) <= 0.003 * promised + 100 + container, (real, promised)


def test_damage_and_other_checkpoints_are_named(world: Path, tmp_path: Path) -> None:
    checkpoint, other = (world / name / "checkpoint.pt" for name in ("msp-fast", "msp-base"))
    coded, out = tmp_path / "a.licf", tmp_path / "a.png"
    run("compress", checkpoint, world / "photos" / "2.png", coded)
    data = coded.read_bytes()
    with pytest.raises(BitstreamError, match="made with msp-fast, got a checkpoint of msp-base"):
        run("decompress", other, coded, out)
    for damaged in (data[:-1], data[: len(data) // 2], data[:-9] + b"x" + data[-8:]):
        coded.write_bytes(damaged)
        with pytest.raises(BitstreamError) as caught:
            run("decompress", checkpoint, coded, out)
        assert "\n" not in str(caught.value)
    assert not out.exists()
