"""`lic-fast bench msp`: equal transforms, runs that are not trained twice, rows of rates and times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("pytorch_msssim")
pytest.importorskip("bjontegaard")
image_module = pytest.importorskip("PIL.Image")

from conftest import devices  # noqa: E402
from lic_fast.benchmarks import _msp_decoding, _msp_peers, _msp_training, msp  # noqa: E402
from lic_fast.benchmarks._rows import read  # noqa: E402

from lic_fast.codec import MSPCodec  # noqa: E402
from lic_fast.training.checkpoint import load_checkpoint  # noqa: E402
from lic_fast.training.models import build_model  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def registered():
    """The checkerboard is in CompressAI's registry only while a study runs in this process."""
    from compressai import registry

    _msp_peers.register()
    yield
    registry.MODELS.pop(_msp_peers.CHECKERBOARD, None)
    _msp_peers._models._registered.cache_clear()


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(2):
        small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        large = image_module.fromarray(small).resize((192, 176), image_module.Resampling.BICUBIC)
        large.save(folder / f"{seed}.png")
    return folder


def test_all_models_have_the_same_transforms() -> None:
    def layers(part: torch.nn.Module) -> list[tuple]:
        return [
            (
                type(m).__name__,
                *(getattr(m, name, None) for name in ("kernel_size", "stride", "padding", "inverse")),
                *((name, tuple(p.shape)) for name, p in m.named_parameters(recurse=False)),
            )
            for m in part.modules()
            if not isinstance(m, torch.nn.Sequential)
        ]

    models = {name: build_model(name, (12, 16)) for name in _msp_peers.NAMES}
    assert isinstance(models[_msp_peers.MSP], MSPCodec)
    first = models[_msp_peers.AUTOREGRESSIVE]
    for name, model in models.items():
        assert layers(model.g_a) == layers(first.g_a) and layers(model.g_s) == layers(first.g_s), name
    sizes = {name: _msp_peers.sized(model) for name, model in models.items()}
    assert len({whole - entropy for whole, entropy in sizes.values()}) == 1
    assert sizes[_msp_peers.CHECKERBOARD] == sizes[_msp_peers.AUTOREGRESSIVE], "only the mask is another"


def test_the_checkerboard_decodes_what_it_coded() -> None:
    torch.manual_seed(0)
    model = build_model(_msp_peers.CHECKERBOARD, (8, 12)).eval()
    model.update()
    x = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        coded = model.compress(x)
        x_hat = model.decompress(coded["strings"], coded["shape"])["x_hat"]
        torch.testing.assert_close(x_hat, model(x)["x_hat"].clamp(0, 1))


def test_steps_of_decoding() -> None:
    steps = {name: _msp_peers.decode_steps(name, 512, 768) for name in _msp_peers.NAMES}
    assert steps == {"msp-base": 19, "mbt2018-mean": 2, "mbt2018-checkerboard": 3, "mbt2018": 1537}
    assert _msp_peers.decode_steps("msp-base", 2160, 3840) == 19
    assert _msp_peers.decode_steps("mbt2018", 500, 700) == 1 + 32 * 44
    assert len(build_model("msp-base", (8, 12)).entropy_model.schedule.steps) == 19


def test_the_rate_falls_in_the_last_part_alone() -> None:
    rates = [_msp_training.falling(step / 10, 0.6) for step in range(12)]
    assert rates[:7] == [1.0] * 7 and rates[10:] == pytest.approx([0.05] * 2)
    assert rates == sorted(rates, reverse=True) and rates[8] == pytest.approx(0.525)
    assert _msp_training.falling(0.5, 0.0) == pytest.approx(0.525)


def test_rows_of_a_small_study(tmp_path, monkeypatch, capsys) -> None:
    photos = pictures(tmp_path / "photos")
    monkeypatch.setattr(msp, "SIDES", ((64, 64),))
    line = f"--data {photos} --test {photos} --steps 2 --tune-steps 3 --lambdas 0.002 0.05 --channels 4 6 --crop 64"
    line += " --tune-crop 128 --batch-size 4 --optimizer adam --quick --repeats 2 --against jpeg"
    line += f" --runs {tmp_path / 'runs'} --output {tmp_path}"
    assert msp.main([*line.split(), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": trained, ") == 8 and "times MSP's" in shown and "us a place" in shown
    rows = read(tmp_path / "msp.csv", msp.COLUMNS)
    stem, tuned = (
        load_checkpoint(tmp_path / "runs" / name / "checkpoint.pt", "test") for name in ("stem/mbt2018", "mbt2018-0.05")
    )
    assert (stem["config"]["batch_size"], stem["config"]["crop"], stem["progress"]["step"]) == (4, 64, 2)
    assert (tuned["config"]["batch_size"], tuned["config"]["crop"], tuned["progress"]["step"]) == (1, 128, 3)
    assert (stem["config"]["lmbda"], tuned["config"]["lmbda"]) == (0.002, 0.05)
    moved = (stem["model"]["g_a.0.weight"] - tuned["model"]["g_a.0.weight"]).abs().max()
    assert 0 < moved < 0.01, "the second training starts from the weights of the first"
    rates = [row for row in rows if row["kind"] == "rate" and row["model"] in _msp_peers.NAMES]
    assert sorted({(row["model"], row["lmbda"]) for row in rates}) == sorted(
        (name, lmbda) for name in _msp_peers.NAMES for lmbda in ("0.002", "0.05")
    )
    assert all(float(row["bpp"]) > 0 and row["images"] == "2" and row["decode_steps"] for row in rates)
    for kind in ("decode", "entropy"):
        backends = sorted((row["model"], row["backend"]) for row in rows if row["kind"] == kind)
        assert len(backends) == 7 and ("mbt2018", "compressai") in backends and ("msp-base", "lic_fast.msp") in backends
        assert all(float(row["median_ms"]) > 0 for row in rows if row["kind"] == kind)
    (row,) = (row for row in rows if row["kind"] == "scaling")
    assert row["decode_steps"] == "19" and float(row["us_a_place"]) == pytest.approx(
        1e3 * float(row["median_ms"]) / 16, rel=1e-4
    )
    assert (tmp_path / "msp_rd.png").stat().st_size > 1000
    assert msp.main([*line.split(), "--device", "cpu", "--only", "train"]) == 0
    assert capsys.readouterr().out.count(": found, ") == 8


@pytest.mark.parametrize("device", devices())
def test_contenders_of_a_device(device: str) -> None:
    contenders = _msp_decoding.untrained_contenders((8, 12), torch.device(device))
    ours = [each.backend for each in contenders if each.model == _msp_peers.MSP]
    assert ours == ["lic_fast.msp"] + ["lic_fast.msp.steps", "lic_fast.msp.lanes256"] * (device == "cuda")
    measured = _msp_decoding.decode_times(contenders, torch.rand(1, 3, 64, 128, device=device), 2)
    parts = sorted((each.contender.model, each.contender.backend, each.part) for each in measured)
    assert parts == sorted((*each[:2], part) for each in contenders for part in ("decode", "entropy"))
    assert all(each.timing.repeats == 2 and each.timing.median > 0 for each in measured)


def test_a_study_that_is_not_trained(tmp_path, capsys) -> None:
    photos = pictures(tmp_path / "photos")
    line = ["--test", str(photos), "--only", "rates", "--runs", str(tmp_path), "--output", str(tmp_path)]
    assert msp.main(line) == 2
    assert "run --only train first" in capsys.readouterr().err and not (tmp_path / "msp.csv").exists()
    with pytest.raises(SystemExit):
        msp.main([*line, "--repeats", "0"])
