"""lic-fast train --optimizer soap, with and without the averaged weights."""

# ruff: noqa: F401, F811 (fixtures are imported)

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training import one_thread, photos, tiny

from lic_fast.optim import SOAP
from lic_fast.training import ImageCodec, commands, evaluate, files, loop, models, train


@pytest.mark.parametrize("model", ["bmshj2018-factorized", "elic2022-official"])
def test_slow_weights_have_their_own_names_whatever_the_order_of_the_groups(
    tmp_path: Path, photos: Path, model: str
) -> None:
    channels = (8, 20) if model.startswith("elic") else (8, 8)
    train(tiny(tmp_path, photos, model=model, channels=channels, optimizer="soap", sma=True, sma_every=3, steps=6))
    saved = loop.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "test")
    parameters = set(saved["slow"])
    assert parameters == {n for n, _ in loop.split_parameters(models.build_model(model, channels))[0]}
    for name in parameters:  # step 6 ended with an average, and training goes on from it
        assert torch.equal(saved["slow"][name], saved["model"][name]), name


def test_soap_trains_with_sma_and_is_evaluated_from_the_slow_weights(tmp_path: Path, photos: Path) -> None:
    config = tiny(tmp_path, photos, optimizer="soap", sma=True, lr=3e-3, steps=61)
    result = train(config)
    first = float(files.read_log(tmp_path / "run" / "log.csv")[0]["loss"])
    assert result.final_loss < 0.5 * first and result.optimizer_skipped == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    saved = loop.load_checkpoint(checkpoint, "test")
    slow, fast = (ImageCodec(checkpoint, device="cpu", slow=slow, command="test") for slow in (None, False))
    for name, parameter in slow.model.named_parameters():
        if not name.endswith("quantiles"):
            assert torch.equal(parameter, saved["slow"][name])
            assert torch.equal(fast.model.get_parameter(name), saved["model"][name])
    rows = [evaluate(checkpoint, photos, device="cpu", limit=1, sma=sma)[0] for sma in (True, False)]
    assert rows[0]["psnr"] != rows[1]["psnr"] and all(row["bpp"] > 0 for row in rows)


def test_what_soap_itself_left_out_is_told(tmp_path: Path, photos: Path, monkeypatch, capsys) -> None:
    for skipped in (0, 7):
        monkeypatch.setattr(SOAP, "skipped_steps", property(lambda self, skipped=skipped: skipped))
        result = train(tiny(tmp_path, photos, output=str(tmp_path / str(skipped)), optimizer="soap", sma=True, steps=2))
        commands._print_summary(result.summary)
        assert ("7 updates of single parameters" in capsys.readouterr().out) == bool(skipped)
