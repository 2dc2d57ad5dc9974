"""Mutated .licf files of MSPCodec through `lic-fast decompress`: an error in one line, or the picture; never else."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast import cli  # noqa: E402
from lic_fast.codec import unpack  # noqa: E402
from lic_fast.reference._rans_container import crc32c  # noqa: E402
from lic_fast.training import ImageCodec, TrainConfig, image_codec, train  # noqa: E402
from lic_fast.training.data import load_rgb  # noqa: E402

MUTATIONS = int(os.environ.get("LIC_FAST_MUTATIONS", "600"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image_module.fromarray(small).resize((75, 66)).save(root / "photo.png")
    train(
        TrainConfig(
            model="msp-fast", output=str(root / "run"), data=str(root), channels=(8, 8), crop=64, batch_size=2,
            steps=4, lr=2e-3, quiet=True, device="cpu",
        )
    )  # fmt: skip
    return root


@pytest.fixture
def checkpoint(world: Path, monkeypatch) -> Path:
    """The checkpoint, read once: the commands make a codec of it each time they run."""
    path = world / "run" / "checkpoint.pt"
    codec = ImageCodec(path, device="cpu", command="decompress")
    monkeypatch.setattr(image_codec, "ImageCodec", lambda *args, **kwargs: codec)
    return path


def sealed(data: bytearray) -> bytes:
    """The length and the CRC-32 of the container made right."""
    if len(data) >= 14:
        data[6:10] = struct.pack("<I", len(data))
        data[-4:] = struct.pack("<I", zlib.crc32(bytes(data[:-4])))
    return bytes(data)


def mutated(g: random.Random, data: bytes, stream: bytes) -> bytes:
    """data, which holds stream, with damage that some of the checks are made to accept."""
    made = bytearray(data)
    kind = g.choice(["any", "inner", "inner, sealed", "cut", "grown"])
    if kind == "cut":
        made = made[: g.randrange(len(made))]
    elif kind == "grown":
        made += g.randbytes(g.randint(1, 9))
    elif kind == "any":
        for _ in range(g.choice([1, 1, 2, 8])):
            made[g.randrange(len(made))] = g.randrange(256)
    else:
        at = data.index(stream)
        inner = bytearray(stream)
        for _ in range(g.choice([1, 1, 3])):
            inner[g.randrange(len(inner))] ^= 1 << g.randrange(8)
        if kind == "inner, sealed":
            begin = bytes(inner).find(b"LFR")
            if begin >= 0:
                inner[-4:] = struct.pack("<I", crc32c(bytes(inner[begin:-4])))
        made[at : at + len(stream)] = inner
    return sealed(made) if g.random() < 0.8 else bytes(made)


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not verified"])
def test_mutated_files(world: Path, checkpoint: Path, tmp_path: Path, capsys, verified: bool) -> None:
    source, coded, out = world / "photo.png", tmp_path / "a.licf", tmp_path / "a.png"
    line = ["compress", str(checkpoint), str(source), str(coded)]
    assert cli.main(line if verified else [*line, "--no-verify"]) == 0
    data = coded.read_bytes()
    stream = unpack(data).strings[0][0]
    assert cli.main(["decompress", str(checkpoint), str(coded), str(out)]) == 0
    right = load_rgb(out)
    out.unlink()
    g, refused = random.Random(7 + verified), 0
    for _ in range(MUTATIONS // 2):
        damaged = mutated(g, data, stream)
        coded.write_bytes(damaged)
        capsys.readouterr()
        code = cli.main(["decompress", str(checkpoint), str(coded), str(out)])
        said = capsys.readouterr().err
        left = sorted(path.name for path in tmp_path.iterdir())
        if code == 0:
            picture = load_rgb(out)
            if verified and unpack(damaged).check == unpack(data).check:
                assert np.array_equal(picture[: right.shape[0], : right.shape[1]], right[: picture.shape[0]])
            out.unlink()
        else:
            refused += 1
            assert code == 2 and said.startswith("lic-fast: error: ") and said.count("\n") == 1, (code, said)
            assert left == ["a.licf"], left
    assert refused >= 0.9 * (MUTATIONS // 2)
