"""`lic-fast bench acceleration`: with the same noise an accelerated training is the stock one, rounded differently."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("tqdm")

from lic_fast.benchmarks import acceleration
from lic_fast.benchmarks._rows import read


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rows_and_losses(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(acceleration, "CASES", {"mbt2018-mean": ((8, 12), 2, 64)})
    assert acceleration.main(["--steps", "12", "--models", "mbt2018-mean", "--output", str(tmp_path)]) == 0
    rows = {row["contender"]: row for row in read(tmp_path / "acceleration.csv", acceleration.COLUMNS)}
    assert list(rows) == [acceleration.STOCK, acceleration.SAME, acceleration.OWN]
    assert float(rows[acceleration.STOCK]["parted_all"]) == 0
    # the same noise: rounding alone sets them apart; another noise does at once
    assert float(rows[acceleration.SAME]["parted_all"]) < 1e-4
    assert 1e-6 < float(rows[acceleration.OWN]["parted_10"]) < 0.1
    assert all(float(row["peak_bytes"]) > 0 and float(row["median_ms"]) > 0 for row in rows.values())
    assert "ms a step" in capsys.readouterr().out


def test_bad_options(tmp_path, capsys) -> None:
    assert acceleration.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2
    assert "acceleration: error:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        acceleration.main(["--steps", "9"])


def test_parted() -> None:
    assert acceleration.parted([1.0, 3.0], [1.0, 2.0]) == pytest.approx(0.25)
