"""`lic-fast bench cdc`: measures of perception, rows of quality by steps, and the textbook's decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("pytorch_msssim")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.benchmarks import __main__ as benches  # noqa: E402
from lic_fast.benchmarks import _cdc_perception, cdc  # noqa: E402
from lic_fast.benchmarks._rows import read  # noqa: E402

from lic_fast.codec import CDC  # noqa: E402
from lic_fast.codec._cdc_network import Sizes  # noqa: E402
from lic_fast.training import TrainConfig, train  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Path:
    root = tmp_path_factory.mktemp("cdc")
    (root / "photos").mkdir()
    for seed in range(2):
        small = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        photo = image_module.fromarray(small).resize((100, 90), image_module.Resampling.BICUBIC)
        photo.save(root / "photos" / f"{seed}.png")
    train(
        TrainConfig(
            model="cdc-x-light", output=str(root / "run"), data=str(root / "photos"), channels=(8,), crop=64,
            batch_size=1, steps=3, quiet=True, device="cpu",
        )
    )  # fmt: skip
    return root


def picture(blur: int = 1, noise: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(0).integers(60, 190, (96, 128, 3)).astype(np.float64)
    for axis in (0, 1):
        values = sum(np.roll(values, shift, axis) for shift in range(blur)) / blur
    values += noise * np.random.default_rng(1).standard_normal(values.shape)
    return values.clip(0, 255).astype(np.uint8)


def test_detail_falls_with_blur_and_grows_with_noise() -> None:
    original = picture(2)
    assert cdc.detail(original, original) == 1.0
    assert cdc.detail(original, picture(4)) < 0.7 and cdc.detail(original, picture(2, 40)) > 1.1
    assert cdc.detail(original, np.full_like(original, 9)) == 0.0


def test_patches_are_farther_the_more_a_picture_is_blurred() -> None:
    distances = np.array([cdc.sliced_wasserstein(picture(2), picture(blur)) for blur in (2, 3, 5)])
    assert (distances[0] == 0).all() and (distances[1] > 5).all() and (distances[2] > distances[1]).all()
    moved = np.roll(picture(2), (8, 16), (0, 1))  # other places, the same texture
    assert (np.array(cdc.sliced_wasserstein(picture(2), moved)) < distances[1] / 2)[:2].all()
    assert np.isfinite(cdc.sliced_wasserstein(picture(2)[:40, :33], picture(3)[:40, :33])).all()


def test_patches_of_each_size_see_their_own_faults() -> None:
    original = picture(2)
    fine, _, coarse = cdc.sliced_wasserstein(original, picture(2, 20))
    assert fine > 3 * coarse, "noise is fine"
    fine, _, coarse = cdc.sliced_wasserstein(original, (original.astype(int) + 12).clip(0, 255).astype(np.uint8))
    assert coarse > 20 * fine, "light is coarse"


def test_lpips_says_why_it_is_missing(monkeypatch) -> None:
    import sys

    _cdc_perception._network.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "ImportError" in _cdc_perception.why_no_lpips() or "ModuleNotFound" in _cdc_perception.why_no_lpips()
    assert _cdc_perception.lpips_of(picture(), picture()) is None
    _cdc_perception._network.cache_clear()


def test_quality_has_a_row_for_every_file(world: Path, tmp_path: Path, capsys) -> None:
    line = ["cdc", "--checkpoint", world / "run" / "checkpoint.pt", "--data", world / "photos", "--only", "quality"]
    line += ["--sampling-steps", 1, 3, "--gammas", 0.8, 0, "--output", tmp_path, "--pictures", tmp_path / "seen"]
    line += ["--crop", 80, "--threads", 1]
    assert benches.main([str(word) for word in line]) == 0
    rows = read(tmp_path / "cdc.csv", cdc.COLUMNS)
    keys = {(row["image"], row["sampling_steps"], row["gamma"]) for row in rows}
    assert len(rows) == len(keys) == 8 and {row["trained_steps"] for row in rows} == {"3"}
    for row in rows:
        assert (row["height"], row["width"]) == ("80", "80") and row["ms_ssim"] == "" != row["psnr"]
        assert float(row["bpp"]) == pytest.approx(8 * int(row["bytes"]) / 6400, rel=1e-5) and float(row["swd_fine"]) > 0
    assert len({row["bytes"] for row in rows if row["image"] == "0.png"}) == 1, "steps change no latent"
    for name in ("cdc.png", "seen/cdc_pictures.png"):
        assert image_module.open(tmp_path / name).size[0] > 100
    shown = capsys.readouterr().out
    assert "| 0.8 | 3 |" in shown and ("LPIPS is missing" in shown) == (_cdc_perception.why_no_lpips() is not None)


def test_decoding_is_timed_beside_the_textbook(tmp_path: Path, capsys) -> None:
    line = ["cdc", "--only", "decode", "--model", "cdc-eps-light", "--channels", "8", "--sides", "64", "128"]
    line += ["--decode-steps", "2", "--repeats", "2", "--output", str(tmp_path), "--threads", "1"]
    assert benches.main(line) == 0
    ours, theirs = read(tmp_path / "cdc.csv", cdc.COLUMNS)
    assert ours["backend"] == "lic_fast.CDC.sample" and theirs["backend"] == "textbook eager"
    assert float(theirs["difference"]) < 1e-2 and float(ours["median_ms"]) > 0 and ours["kind"] == "decode"
    assert "interleaved" in capsys.readouterr().out


@pytest.mark.parametrize("predicts", ["x", "eps"])
def test_the_textbook_is_the_codec(predicts: str) -> None:
    """In fp64, for paper-like sizes: more levels than maps, wider than what they condition."""
    torch.manual_seed(0)
    codec = CDC(sizes=Sizes(width=8, map_channels=8), predicts=predicts).eval().double()
    y_hat = 2 * torch.randn(1, 32, 4, 8, dtype=torch.float64)
    start = codec._noise(y_hat.new_zeros((1, 3, 64, 128)), 0, 0, codec.gamma)
    ours = codec.sample(y_hat, steps=3)
    theirs = cdc.textbook_sample(codec, cdc.TextbookUNet(codec.denoiser), y_hat, start, 3)
    assert (ours - theirs).abs().max() < 1e-7 * ours.abs().max().clamp(min=1)


def test_what_the_study_refuses(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        cdc.main(["--only", "quality"])
    with pytest.raises(SystemExit):
        cdc.main(["--only", "decode", "--repeats", "0"])
    assert cdc.main(["--only", "quality", "--checkpoint", "none.pt", "--output", str(tmp_path)]) == 2
    monkeypatch.setattr(cdc, "textbook_sample", lambda codec, unet, y_hat, start, steps: start + 1)
    line = ["--only", "decode", "--model", "cdc-x-light", "--channels", "8", "--sides", "64", "64", "--decode-steps"]
    assert cdc.main([*line, "1", "--repeats", "1", "--output", str(tmp_path)]) == 2
    assert "differs by" in capsys.readouterr().err and not (tmp_path / "cdc.csv").exists()
