"""Portable streams through training and files: which checkpoints make them, which machines may read them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")

from lic_fast.codec import BitstreamError, MSPCodec, pack, unpack
from lic_fast.entropy import Profile
from lic_fast.training.config import TrainConfig
from lic_fast.training.image_codec import ImageCodec
from lic_fast.training.loop import Trainer, train
from lic_fast.training.portable import make_portable


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3))
    return np.kron(coarse, np.ones((16, 16, 1)))[:height, :width].astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("photos")
    for index, (height, width) in enumerate([(100, 90), (64, 64), (70, 130)]):
        image.fromarray(picture(height, width, index)).save(folder / f"{index}.png")
    return folder


def config(photos: Path, output: Path, **options) -> TrainConfig:
    settings = {"steps": 4, "channels": (8, 12), "crop": 64, "batch_size": 2, "quiet": True, "device": "cpu"}
    return TrainConfig(model="msp-fast", output=str(output), data=str(photos), **(settings | options))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, photos) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(config(photos, root / "plain"))
    train(config(photos, root / "sma", sma=True, sma_every=2))
    return root


def opened(path: Path, **options) -> ImageCodec:
    return ImageCodec(path / "checkpoint.pt", device="cpu", command="test", **options)


def test_training_ends_with_a_portable_checkpoint(runs) -> None:
    codec, pixels = opened(runs / "plain"), picture(50, 75)
    assert codec.model.portable
    data, decoded = codec.verified(pixels, codec.encode(pixels))
    assert MSPCodec.decodes_anywhere(unpack(data).strings) and not unpack(data).cuda
    again = opened(runs / "plain")
    assert again.digest == codec.digest and np.array_equal(again.decode(data), decoded)
    bpp, _ = codec.estimate(pixels)
    assert abs(8 * len(data) - bpp * pixels.shape[0] * pixels.shape[1]) < 8 * 200


def test_tables_are_those_of_the_checkpoint_not_made_anew(runs, tmp_path) -> None:
    """Another machine would compute slightly other ones, and refuse the stream for its digest."""
    saved = torch.load(runs / "plain" / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        saved["model"]["entropy_model.bottleneck.matrices.0"].mul_(1.25)
    (tmp_path / "plain").mkdir()
    torch.save(saved, tmp_path / "plain" / "checkpoint.pt")
    tables = [opened(root / "plain").model.entropy_model.tables for root in (runs, tmp_path)]
    assert torch.equal(*tables)


def test_a_stream_of_another_kind_of_device_decodes(runs) -> None:
    codec, pixels = opened(runs / "plain"), picture(50, 75)
    stream = unpack(codec.encode(pixels))
    wanted = codec.decode(pack(stream))
    assert np.array_equal(codec.decode(pack(dataclasses.replace(stream, cuda=True))), wanted)
    codec.model.entropy_model.exact = False
    plain = unpack(codec.encode(pixels))
    assert not MSPCodec.decodes_anywhere(plain.strings)
    with pytest.raises(BitstreamError, match="was made on cuda"):
        codec.decode(pack(dataclasses.replace(plain, cuda=True)))


def test_other_pixels_are_a_warning_where_latents_are_exact(runs, caplog) -> None:
    codec, pixels = opened(runs / "plain"), picture(50, 75)
    stream = unpack(codec.encode(pixels))
    wanted = codec.decode(pack(stream))
    assert not caplog.records
    assert np.array_equal(codec.decode(pack(dataclasses.replace(stream, check=1))), wanted)
    assert "pixels may differ" in caplog.text
    codec.model.entropy_model.exact = False
    with pytest.raises(BitstreamError, match="the pixels are not those the encoder saw"):
        codec.decode(pack(dataclasses.replace(unpack(codec.encode(pixels)), check=1)))


def test_only_the_slow_weights_of_a_run_with_sma_are_portable(runs) -> None:
    slow, fast, pixels = opened(runs / "sma"), opened(runs / "sma", slow=False), picture(50, 75)
    assert slow.model.portable and not fast.model.portable
    for codec in (slow, fast):
        assert codec.decode(codec.encode(pixels)).shape == pixels.shape
    model = slow.model.entropy_model
    found = model.step_parameters(torch.zeros(1, 12, 8, 8))
    model.exact = False
    for (_, integer), (_, real) in zip(found, model.step_parameters(torch.zeros(1, 12, 8, 8)), strict=True):
        torch.testing.assert_close(integer, real, rtol=0.02, atol=0.02)


def test_a_resumed_run_makes_its_integers_anew(runs, photos, tmp_path) -> None:
    train(config(photos, tmp_path / "run", steps=2))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert any(".integers." in name for name in saved["model"])
    resumed = config(photos, tmp_path / "run", steps=4, resume=True)
    trainer = Trainer(resumed)
    trainer.restore(saved)
    assert not trainer.model.portable  # what it saves on the way has no integers of weights of long ago
    train(resumed)
    ours, straight = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        for folder in (tmp_path / "run", runs / "plain")
    )
    assert ours.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in ours.items())


def test_models_that_cannot_be_portable_stay_as_they_are(caplog) -> None:
    assert not make_portable(torch.nn.Linear(2, 2), iter([torch.rand(1, 2)]))
    codec = MSPCodec(8, 8, profile=Profile(1, 1, 8, 1), mixture=2)
    assert not make_portable(codec, iter([torch.rand(2, 3, 32, 32)]))
    assert (
        "will not be portable: MSPEntropyModel.make_portable: mixtures have no integer networks, got 2" in caplog.text
    )
    assert codec.training and not codec.portable


def test_codecs_calibrate_on_images(caplog) -> None:
    codec = MSPCodec(8, 8, profile=Profile(1, 1, 8, 1)).eval()
    codec.update()
    x = torch.rand(2, 3, 48, 32)
    assert not codec.decodes_anywhere(codec.compress(x)["strings"])
    codec.make_portable([x, x[:1]])
    coded = codec.compress(x)
    assert codec.portable and codec.decodes_anywhere(coded["strings"])
    with torch.no_grad():
        wanted = codec(x)["x_hat"].clamp(0, 1)
    torch.testing.assert_close(codec.decompress(**coded)["x_hat"], wanted)
    with pytest.raises(ValueError, match="make_portable: x must be"):
        codec.make_portable(torch.rand(1, 3, 40, 32))
    for other in (None, [], [[]] * 2, {"y": b""}, [b"\1\1"], [["text"]], [[b"\1\0", b"\1\1"]]):
        assert not codec.decodes_anywhere(other)
