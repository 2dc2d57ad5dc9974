"""The demo and `lic-fast bench convergence`: what they count, and what they do not train twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.benchmarks import convergence, demo  # noqa: E402

from lic_fast import cli  # noqa: E402
from lic_fast.training import files, train  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (convergence, demo):
        monkeypatch.setattr(module, "CHANNELS", (8, 8))
        monkeypatch.setattr(module, "CROP", 64)
        monkeypatch.setattr(module, "BATCH", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image_module.fromarray(pixels).resize((96, 80)).save(folder / f"{index:02}.png")
    return folder


def curve(*losses: float) -> convergence.Curve:
    rows = [{"step": str(10 * i), "loss": str(x), "seconds": str(i)} for i, x in enumerate(losses, 1)]
    return convergence.Curve.of(rows)


def test_a_curve_is_a_trailing_mean_of_three() -> None:
    held = curve(9, 6, 3, 3, 0)
    assert held.losses == pytest.approx([9, 7.5, 6, 4, 2]) and held.steps == [10, 20, 30, 40, 50]
    assert held.final == pytest.approx(2) and held.reaches(4) == 3 and held.reaches(1) is None
    assert curve(1, 1, float("inf")).final == float("inf")


def test_the_table_counts_in_steps_of_the_first_method() -> None:
    curves = {"adam": [curve(9, 6, 3, 3), curve(8, 8, 8, 8)], "soap": [curve(4, 4, 1, 1), curve(9, 9, 9, 9)]}
    lines = convergence._table(curves, (0, 7), "adam").splitlines()
    assert lines[1].split() == ["0", "4.0000", "40", "(100%),", "4.0", "10", "(25%),", "1.0"]
    assert lines[2].split()[:5] == ["7", "8.0000", "10", "(25%),", "1.0"] and lines[2].rstrip().endswith("not reached")
    assert "62% (25% to 100%)" in lines[3] and "not by every seed" in lines[3]


def test_runs_are_kept_and_not_trained_twice(tmp_path: Path, photos: Path, monkeypatch, capsys) -> None:
    argv = ["bench", "convergence", "--data", str(photos), "--steps", "4", "--every", "2", "--device", "cpu"]
    argv += ["--lrs", "adam=1e-3,3e-3", "soap=3e-3", "--output", str(tmp_path / "rows"), "--seeds", "0"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "the end of its grid: widen it with --lrs" in shown and "own final loss, mean" in shown
    rows = convergence.read(tmp_path / "rows" / "convergence.csv", convergence.COLUMNS)
    assert [(row["method"], row["lr"], row["step"]) for row in rows] == [
        (method, lr, step) for method, lr in (("adam", "0.001"), ("adam", "0.003"), ("soap", "0.003")) for step in "24"
    ]
    assert {row["held_out"] for row in rows} == {"2"} and {row["backend"] == "" for row in rows} == {True, False}
    assert (tmp_path / "rows" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    trained = []
    again = convergence.Bench._train
    monkeypatch.setattr(convergence.Bench, "_train", lambda *given: trained.append(given[2]["seed"]) or again(*given))
    assert cli.main([*argv, "1"]) == 0
    assert trained == ["1", "1"], "the best of each grid, with the new seed alone"


def test_a_run_that_diverges_is_given_up(tmp_path: Path, photos: Path, caplog) -> None:
    argv = ["--data", str(photos), "--steps", "30", "--every", "6", "--device", "cpu", "--methods", "adam"]
    assert convergence.main([*argv, "--lrs", "adam=1e6,1e-3", "--seeds", "0", "--output", str(tmp_path)]) == 0
    assert len(caplog.records) == 10
    rows = convergence.read(tmp_path / "convergence.csv", convergence.COLUMNS)
    bad = [float(row["loss"]) for row in rows if row["lr"] == "1e+06"]
    assert len(bad) == 5 and bad[2:] == [float("inf")] * 3
    assert all(np.isfinite(float(row["loss"])) for row in rows if row["lr"] == "0.001")


def test_misuse_is_told_in_one_line(tmp_path: Path, photos: Path, capsys) -> None:
    for name in sorted(photos.iterdir())[9:]:
        name.unlink()
    for folder, said in ((tmp_path / "none", "not a folder"), (photos, "give a --data of at least 10")):
        assert convergence.main(["--data", str(folder), "--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    for wrong in (["--every", "0"], ["--lrs", "adam=x"], ["--lrs", "soup=1"], ["--lrs", "soap=-1"]):
        with pytest.raises(SystemExit):
            convergence.main(["--data", str(photos), *wrong])


def test_the_demo_says_where_each_run_reached_the_stock_runs_loss(
    tmp_path: Path, photos: Path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(demo, "_run", train)  # in this process: the sizes are patched here
    assert demo.main(["--data", str(photos), "--steps", "12", "--output", str(tmp_path / "demo")]) == 0
    shown = capfd.readouterr().out
    assert f"({len(demo.OPS['fast'])} ops)" in shown or "ops), " in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("stock's, reached at step")]
    held = demo.Curve.of(tmp_path / "demo" / "stock")
    assert held.reaches(held.losses[-1]) in line and held.reaches(0.0) == "never"
    assert len(files.read_log(tmp_path / "demo" / "fast" / "log.csv")) == 12
    assert {"loss.png", "photograph.licf", "photograph.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}
