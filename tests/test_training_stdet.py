"""lic-fast train --stdet: files, checkpoints, options, and the weights that are evaluated."""

# ruff: noqa: F401, F811 (fixtures are imported)

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from test_training import one_thread, photos, tiny

from lic_fast.training import ImageCodec, commands, files, loop, models, train

pytest.importorskip("scipy")
STDET = dict(stdet=True, stdet_warmup=3, stdet_epoch_steps=4, stdet_true=0.1, stdet_samples=80, steps=30, lr=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_a_run_embeds_writes_its_files_and_is_decoded(tmp_path: Path, photos: Path, optimizer: str, capsys) -> None:
    result = train(tiny(tmp_path, photos, optimizer=optimizer, sma=True, **STDET))
    run = tmp_path / "run"
    rows = files.read_log(run / "stdet.csv")
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24, 28]
    weights = sum(p.numel() for _, p in models.split_parameters(models.build_model("bmshj2018-factorized", (8, 8)))[0])
    assert [int(row["true"]) for row in rows] == [0, 0, 0, *(round(0.1 * i * weights) for i in range(1, 5))]
    assert float(rows[-1]["trainable_share"]) == pytest.approx(
        1 - (int(rows[-1]["true"]) + int(rows[-1]["dummy"])) / weights
    )
    assert (run / "stdet.png").stat().st_size > 10_000
    assert "true 40.00 %" in result.embedding
    commands._print_summary(result.summary)
    assert "embedded:      epoch 7" in capsys.readouterr().out
    if optimizer == "adam":
        assert int(rows[-1]["state_bytes"]) == 8 * (weights - int(rows[-1]["true"])) < int(rows[0]["state_bytes"])
    saved = loop.load_checkpoint(run / "checkpoint.pt", "test")
    code = saved["stdet"]["embedding"]["code"]
    assert int((code & 0x80 != 0).sum()) == int(rows[-1]["true"])
    slow = ImageCodec(run / "checkpoint.pt", device="cpu", slow=None, command="test")
    for name, parameter in slow.model.named_parameters():
        assert name.endswith("quantiles") or torch.equal(parameter, saved["slow"][name])


def test_the_datas_epochs_are_the_default_and_validation_sees_the_embedded_weights(
    tmp_path, photos, monkeypatch
) -> None:
    seen = []
    measure = loop.Trainer._validation_loss
    monkeypatch.setattr(
        loop.Trainer, "_validation_loss", lambda self: (seen.append(self.stepping.stdet.epoch), measure(self))[1]
    )
    train(tiny(tmp_path, photos, **{**STDET, "stdet_epoch_steps": None, "min_epoch_steps": 4, "steps": 20}))
    rows = files.read_log(tmp_path / "run" / "stdet.csv")
    assert seen == [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]


def test_a_run_without_embedding_is_the_run_without_stdet(tmp_path: Path, photos: Path) -> None:
    plain = tiny(tmp_path, photos, output=str(tmp_path / "plain"), steps=16)
    nothing = dict(stdet_true=0.0, stdet_dummy=(0.0, 0.0), steps=16, lr=plain.lr)
    train(plain)
    train(tiny(tmp_path, photos, output=str(tmp_path / "stdet"), **{**STDET, **nothing}))
    ends = [loop.load_checkpoint(tmp_path / name / "checkpoint.pt", "test")["model"] for name in ("plain", "stdet")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_options_reach_the_config_and_bad_ones_are_told(tmp_path: Path, photos: Path, capsys) -> None:
    parser = argparse.ArgumentParser()
    commands.add_train_parser(parser.add_subparsers())
    words = "train --model m --output o --stdet --stdet-dummy 0.03,0.2 --stdet-gradient chain --stdet-warmup 7"
    args = vars(parser.parse_args(words.split()))
    assert args["stdet_dummy"] == (0.03, 0.2) and args["stdet_gradient"] == "chain" and args["stdet_warmup"] == 7
    with pytest.raises(SystemExit):
        parser.parse_args("train --model m --output o --stdet-dummy 3".split())
    assert "pass for example 0.02,0.25" in capsys.readouterr().err
    config = tiny(tmp_path, photos, **STDET)
    for change, message in (
        ({"stdet_true": 1.5}, "--stdet-true takes a share"),
        ({"stdet_dummy": (-1.0, 0.2)}, "--stdet-dummy takes RATE,MOST"),
        ({"stdet_epoch_steps": 0}, "--stdet-epoch-steps takes at least 1"),
        ({"diagnose": 3}, "give one of both"),
        ({"stdet_modes": 99}, "modes must be at most 63"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **change))
