"""Gradient-conflict scores: against arithmetic by hand, and without a trace on the training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from lic_fast import cli  # noqa: E402
from lic_fast.optim import SMA, SOAP  # noqa: E402
from lic_fast.training import TrainConfig, TrainingError, diagnostics, files, loop, train  # noqa: E402
from lic_fast.training.checkpoint import load_checkpoint  # noqa: E402
from lic_fast.training.diagnostics import Diagnostics, cosine, preconditioned, s_intra  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(4):
        small = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image_module.fromarray(small).resize((96, 80)).save(folder / f"{index}.png")
    return folder


def tiny(output: Path, photos: Path, **changes) -> TrainConfig:
    settings = dict(
        model="bmshj2018-factorized", output=str(output), data=str(photos), channels=(8, 8), crop=64, batch_size=2,
        steps=10, min_epoch_steps=4, quiet=True, device="cpu", lr=1e-3,
    )  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def scores(run: Path) -> list[dict[str, str]]:
    return files.read_log(run / "diagnostics.csv")


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().reshape(-1), b.double().reshape(-1)
    return float(a @ b / (a.norm() * b.norm()))


def two_terms(w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rate that only w has, and a distortion of both."""
    return (w * torch.tensor([[1.0, 2.0], [3.0, -4.0]])).sum(), (w**2).sum() + 5 * (v**3).sum()


def test_both_scores_of_sgd_by_hand() -> None:
    w, v = torch.nn.Parameter(torch.tensor([[1.0, 1.0], [2.0, 0.5]])), torch.nn.Parameter(torch.tensor([0.5]))
    optimizer = torch.optim.SGD([w, v], lr=0.1)
    measured = Diagnostics(optimizer, [w, v], every=2)
    updates, rows = [], []
    for step in (1, 2, 3):
        rate, distortion = two_terms(w, v)
        g_rate = torch.tensor([1.0, 2.0, 3.0, -4.0, 0.0])
        g_distortion = torch.cat([2 * w.detach().reshape(-1), 15 * v.detach() ** 2])
        measured.before_update(rate, distortion, step)
        assert w.grad is None or step > 1, "the gradients of the training are not touched"
        optimizer.zero_grad()
        (rate + distortion).backward()
        before = torch.cat([w.detach().reshape(-1), v.detach()])
        optimizer.step()
        updates.append(torch.cat([w.detach().reshape(-1), v.detach()]) - before)
        rows.append(measured.after_update())
        if step == 2:
            assert rows[-1]["s_intra"] == pytest.approx(angle(g_rate, g_distortion), rel=1e-6)
            assert rows[-1]["s_intra_shared"] == pytest.approx(angle(g_rate[:4], g_distortion[:4]), rel=1e-6)
        else:
            assert rows[-1]["s_intra"] is None and rows[-1]["s_intra_shared"] is None
    assert rows[0]["s_inter"] is None, "there is no update before the first"
    for row, new, old in zip(rows[1:], updates[1:], updates, strict=False):
        assert row["s_inter"] == pytest.approx(angle(new, old), rel=1e-6)


def test_adam_divides_by_the_root_of_its_second_moment() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = torch.optim.Adam([w], lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    rate, distortion = torch.tensor([1.0, 1.0, -3.0]), torch.tensor([0.5, -2.0, 1.0])
    assert s_intra(optimizer, [w], [rate], [distortion]) == (None, None), "no preconditioner before the first step"
    gradients = [torch.tensor([3.0, 0.1, 1.0]), torch.tensor([-1.0, 0.2, 2.0])]
    for gradient in gradients:
        w.grad = gradient
        optimizer.step()
    v_hat = (0.99 * 0.01 * gradients[0] ** 2 + 0.01 * gradients[1] ** 2) / (1 - 0.99**2)
    scale = 1 / (v_hat.sqrt() + 1e-3)
    expected = angle(rate * scale, distortion * scale)
    assert s_intra(optimizer, [w], [rate], [distortion]) == pytest.approx((expected, expected), rel=1e-6)
    assert s_intra(optimizer, [w], [rate], [None]) == (None, None), "one gradient is zero: no angle"
    wrapped = Diagnostics(SMA(optimizer), [w], every=1)
    assert wrapped.optimizer is optimizer


def test_soap_divides_in_its_eigenbasis() -> None:
    w = torch.nn.Parameter(torch.zeros(2, 1, 3))
    optimizer = SOAP([w], lr=0.01, eps=0.5, precondition_frequency=100)
    for _ in range(2):
        w.grad = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (2, 3))
    state = optimizer.state[w]
    assert len(state["Q"][1]) == 0
    state["Q"][0].copy_(left)
    state["Q"][2].copy_(right)
    state["exp_avg_sq"].copy_(torch.arange(1.0, 7.0).reshape(2, 1, 3) ** 2)
    rate, distortion = (torch.randn(2, 1, 3, generator=generator) for _ in range(2))

    def by_hand(g: torch.Tensor) -> torch.Tensor:
        inside = left.T @ g[:, 0] @ right
        return left @ (inside / (torch.arange(1.0, 7.0).reshape(2, 3) + 0.5)) @ right.T

    torch.testing.assert_close(preconditioned(optimizer, optimizer.param_groups[0], w, rate)[:, 0], by_hand(rate))
    expected = angle(by_hand(rate), by_hand(distortion))
    assert s_intra(optimizer, [w], [rate], [distortion]) == pytest.approx((expected, expected), rel=1e-5)
    assert expected != pytest.approx(angle(rate, distortion), rel=1e-2)


def test_what_has_no_angle_is_none() -> None:
    x = torch.tensor([1.0, 2.0])
    assert cosine([]) is None and cosine([(x, 0 * x)]) is None and cosine([(x, x * math.nan)]) is None
    assert cosine([(x, 2 * x), (x, 2 * x)]) == pytest.approx(1)
    optimizer = SOAP([w := torch.nn.Parameter(torch.zeros(2, 3, 4))], merge_dims=True)
    w.grad = torch.ones(2, 3, 4)
    optimizer.step()
    with pytest.raises(ValueError, match="merge_dims=False"):
        s_intra(optimizer, [w], [w.grad], [w.grad])


@pytest.mark.parametrize(
    "method",
    [{}, {"optimizer": "soap", "sma": True}, {"optimizer": "adam-fused", "amp": "bf16", "channels_last": True}],
    ids=["adam", "soap-sma", "amp"],
)
def test_measuring_changes_nothing(tmp_path: Path, photos: Path, method: dict) -> None:
    runs = tiny(tmp_path / "plain", photos, **method), tiny(tmp_path / "measured", photos, diagnose=2, **method)
    ends = []
    for config in runs:
        train(config)
        ends.append(load_checkpoint(Path(config.output) / "checkpoint.pt", "test"))
    logs = [files.read_log(Path(config.output) / "log.csv") for config in runs]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k not in files.TIMINGS} == {
            k: v for k, v in other.items() if k not in files.TIMINGS
        }
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name]), name
    assert torch.equal(ends[0]["rng"]["cpu"], ends[1]["rng"]["cpu"])
    rows = scores(tmp_path / "measured")
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [bool(row["s_intra"]) for row in rows] == [step % 2 == 0 for step in range(1, 11)] or method
    assert all(-1 <= float(row[name]) <= 1 for row in rows for name in diagnostics.COLUMNS[1:] if row[name])
    assert rows[-1]["s_intra"] and rows[-1]["s_inter"] and not rows[0]["s_inter"]
    assert image_module.open(tmp_path / "measured" / "diagnostics.png").size[0] > 500
    assert not list((tmp_path / "plain").glob("diagnostics*"))


def test_the_gradients_are_those_of_the_two_terms(tmp_path: Path, photos: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(diagnostics, "s_intra", lambda optimizer, parameters, *both: seen.append(both) or (0.5, 0.5))
    trainer = loop.Trainer(tiny(tmp_path / "run", photos, diagnose=1, clip=0))
    trainer._step(next(trainer._batches()))
    ((rate, distortion),) = seen
    assert any(g is None for g in rate), "the decoder has no rate"
    for parameter, r, d in zip(trainer.main, rate, distortion, strict=True):
        parts = [g for g in (r, d) if g is not None]
        torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_goes_on_with_its_scores(tmp_path: Path, photos: Path) -> None:
    whole, parts = (tiny(tmp_path / name, photos, diagnose=3, optimizer="soap") for name in ("whole", "parts"))
    train(whole)
    train(dataclasses.replace(parts, steps=5))
    with (tmp_path / "parts" / "diagnostics.csv").open("a") as file:
        file.write("6,0.5,0.5,0.5\n7,0.")  # after the checkpoint, and cut off
    train(dataclasses.replace(parts, resume=True))
    assert scores(tmp_path / "whole") == scores(tmp_path / "parts")


def test_a_skipped_step_has_no_score(tmp_path: Path, photos: Path, monkeypatch) -> None:
    trainer = loop.Trainer(tiny(tmp_path / "run", photos, diagnose=1))
    batches = trainer._batches()
    rows = []
    for step in range(1, 7):
        batch = next(batches)
        with monkeypatch.context() as patched:
            if step == 3:
                patched.setattr(trainer.model, "aux_loss", lambda: torch.tensor(math.nan, requires_grad=True))
            rows.append(trainer._step(batch))
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [row["s_inter"] is not None for row in rows] == [False, True, False, False, True, True]


def test_runs_are_laid_over_one_another(tmp_path: Path, photos: Path, capsys) -> None:
    runs = [str(tmp_path / name) for name in ("adam", "soap")]
    for run in runs:
        train(tiny(Path(run), photos, steps=6, diagnose=2, optimizer=Path(run).name))
    picture = tmp_path / "new" / "both.png"
    assert cli.main(["diagnostics", *runs, "--output", str(picture)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["run", *runs] and shown[1].split()[1] == "6"
    assert image_module.open(picture).size[0] > 500
    train(tiny(tmp_path / "none", photos, steps=1))
    with pytest.raises(TrainingError, match=r"no scores in .*diagnostics\.csv; train with --diagnose"):
        diagnostics.compare([tmp_path / "none"], picture)


def test_wrong_settings_are_told(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ValueError, match="--diagnose takes 0"):
        train(tiny(tmp_path / "run", photos, diagnose=-1))
    with pytest.raises(ValueError, match="run without --compile"):
        train(tiny(tmp_path / "run", photos, diagnose=1, compile=True))
    assert not (tmp_path / "run").exists()
