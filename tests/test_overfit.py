"""Latent overfitting: never worse than without, within its budget, the same twice, and ordinary streams."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressai")
image_module = pytest.importorskip("PIL.Image")

from lic_fast.benchmarks import lof  # noqa: E402
from lic_fast.benchmarks._rows import read  # noqa: E402

from lic_fast.codec import MSPCodec, overfit  # noqa: E402
from lic_fast.entropy import Profile  # noqa: E402
from lic_fast.training import ImageCodec, TrainConfig, TrainingError, coding_commands, train  # noqa: E402
from lic_fast.training.data import load_rgb  # noqa: E402
from lic_fast.training.loss import RateDistortionLoss  # noqa: E402

LMBDA = 0.01
EACH = [("soft", 0.1), ("ste", 0.02), ("sga", 0.02)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(channels: int = 8) -> MSPCodec:
    torch.manual_seed(0)
    codec = MSPCodec(8, channels, profile=Profile(scales=2, groups=min(2, channels), width=8, depth=1)).eval()
    with torch.no_grad():
        codec.g_a[-1].weight *= 30  # untrained, but with symbols other than 0 and a picture that depends on them
        codec.g_s[-1].weight *= 10
        codec.g_s[-1].bias.fill_(0.5)
    codec.update()
    return codec


@pytest.fixture(scope="module")
def codec() -> MSPCodec:
    return made()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    small = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, (48, 80), mode="bicubic").clamp(0, 1)


@torch.no_grad()
def real(codec: MSPCodec, x: torch.Tensor, y: torch.Tensor) -> float:
    output = codec.decoded(y)
    output["x_hat"] = output["x_hat"].clamp(0, 1)
    return float(RateDistortionLoss(LMBDA)(output, x, x.new_zeros(()))["loss"])


@pytest.mark.parametrize("setting", EACH, ids=lambda each: each[0])
def test_every_surrogate_finds_a_cheaper_latent(codec: MSPCodec, x: torch.Tensor, setting) -> None:
    found = overfit(codec, x, lmbda=LMBDA, iterations=40, settings=[setting])
    assert found.after.loss < 0.99 * found.before.loss and found.steps == 40
    assert found.before.loss == pytest.approx(real(codec, x, codec.g_a(x)), rel=1e-5)
    assert found.after.loss == pytest.approx(real(codec, x, found.y), rel=1e-5)
    costs = [cost for _, cost in found.history]
    assert costs == sorted(costs, reverse=True) and costs[-1] == pytest.approx(found.after.loss, rel=1e-5)
    assert sum(gain for _, _, gain in found.legs) == pytest.approx(costs[0] - costs[-1])


def test_the_decoder_gives_what_was_promised(codec: MSPCodec, x: torch.Tensor) -> None:
    found = overfit(codec, x, lmbda=LMBDA, iterations=30)
    coded = codec.compress_latent(found.y)
    x_hat = codec.decompress(**coded)["x_hat"]
    psnr = -10 * math.log10(float((x_hat - x).square().mean()))
    assert psnr == pytest.approx(found.after.psnr, abs=1e-4)
    assert abs(8 * len(coded["strings"][0][0]) - found.after.bits) < 0.003 * found.after.bits + 800


def test_the_codec_is_left_as_it_was(codec: MSPCodec, x: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    kinds = [type(module) for module in codec.modules()]
    for off in (torch.no_grad, torch.inference_mode):  # of a caller: no hindrance
        with off():
            assert overfit(codec, x.clone(), lmbda=LMBDA, iterations=10).legs[0][2] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in codec.state_dict().items())
    assert [type(module) for module in codec.modules()] == kinds
    assert all(p.requires_grad and p.grad is None for p in codec.parameters())


@pytest.mark.parametrize("rate", [1e-30, 1e4, 1e30])
def test_hostile_rates_do_no_harm(codec: MSPCodec, x: torch.Tensor, rate: float) -> None:
    found = overfit(codec, x, lmbda=LMBDA, iterations=12, settings=[(name, rate) for name, _ in EACH])
    assert found.after.loss <= found.before.loss and found.y.isfinite().all()
    assert real(codec, x, found.y) <= real(codec, x, codec.g_a(x)) * (1 + 1e-6)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(torch.arange(gradient.shape[-1]) % 2 == 0, gradient, torch.nan)


class _Poisoned(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, value: float | None) -> None:
        super().__init__()
        self.inner, self.value, self.calls = inner, value, 0

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x_hat = self.inner(_Poison.apply(y))
        return x_hat if self.value is None or self.calls < 4 else x_hat * self.value


@pytest.mark.parametrize("value", [None, math.nan, math.inf], ids=str)
def test_nan_does_no_harm(x: torch.Tensor, value: float | None) -> None:
    """Gradients that are NaN; a synthesis that gives NaN after some calls."""
    codec = made()
    expected = real(codec, x, codec.g_a(x))
    codec.g_s = _Poisoned(codec.g_s, value)
    found = overfit(codec, x, lmbda=LMBDA, iterations=20)
    assert found.before.loss == pytest.approx(expected, rel=1e-5)
    assert found.after.loss <= found.before.loss and found.y.isfinite().all() and found.steps == 20
    if value is None:  # the other half of the gradients still leads somewhere
        assert found.after.loss < found.before.loss


def test_a_model_that_gives_nan_is_told_as_it_is(x: torch.Tensor) -> None:
    codec = made()
    with torch.no_grad():
        codec.g_s[-1].bias.fill_(math.nan)
    found = overfit(codec, x, lmbda=LMBDA, iterations=5)
    assert math.isnan(found.before.loss) and torch.equal(found.y, codec.g_a(x))


def test_a_seed_and_a_number_of_steps_give_one_latent(codec: MSPCodec, x: torch.Tensor) -> None:
    options = {"lmbda": LMBDA, "iterations": 40, "settings": [("sga", 0.02), ("soft", 0.1)]}
    first = overfit(codec, x, seed=3, **options)
    torch.rand(5)  # torch's own generator has no part in it
    second, third = overfit(codec, x, seed=3, **options), overfit(codec, x, seed=4, **options)
    assert torch.equal(first.y, second.y) and first.after == second.after and first.legs == second.legs
    assert not torch.equal(first.y, third.y)


def test_the_budget_is_kept(codec: MSPCodec, x: torch.Tensor) -> None:
    for iterations in (1, 7):
        assert overfit(codec, x, lmbda=LMBDA, iterations=iterations).steps == iterations
    began = time.monotonic()
    found = overfit(codec, x, lmbda=LMBDA, seconds=1.5)
    took, step = time.monotonic() - began, found.seconds / max(1, found.steps)
    assert found.steps > 3 and found.seconds <= took < 1.5 + max(0.5, 10 * step)
    assert overfit(codec, x, lmbda=LMBDA, seconds=3600, iterations=2).steps == 2
    assert overfit(codec, x, lmbda=LMBDA, seconds=1e-9, iterations=2).steps == 0


def test_time_alone_ends_a_search(codec: MSPCodec, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of its own: every reading is 0.01 s later, and no step begins that would end too late."""
    now = [0.0]

    def tick() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(time, "monotonic", tick)
    found = overfit(codec, x, lmbda=LMBDA, seconds=4.0)
    assert 10 < found.steps and 3.0 < found.seconds < 4.1  # a step reads the clock five times or so


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("sides", [(16, 16), (16, 32), (32, 16), (16, 80)], ids=str)
def test_tiny_images(channels: int, sides: tuple[int, int]) -> None:
    codec, x = made(channels), torch.rand(1, 3, *sides)
    found = overfit(codec, x, lmbda=LMBDA, iterations=8, settings=EACH)
    assert found.after.loss <= found.before.loss
    assert codec.decompress(**codec.compress_latent(found.y))["x_hat"].shape == x.shape


def test_padding_is_free(codec: MSPCodec, x: torch.Tensor) -> None:
    """What lies outside `size` changes nothing where the latent does not: the cost is the picture's."""
    found = overfit(codec, x, lmbda=LMBDA, iterations=30, size=(33, 50))
    output = codec.decoded(found.y)
    mse = (output["x_hat"].clamp(0, 1) - x)[:, :, :33, :50].square().mean()
    bits = -output["likelihoods"]["y"].log2().sum()
    cost = bits / (33 * 50) + LMBDA * 255**2 * mse
    assert found.after.loss == pytest.approx(cost.item(), rel=1e-5)
    assert found.after.loss < found.before.loss


def test_rounding_by_a_function_of_ones_own_is_the_rounding_of_compress(codec: MSPCodec) -> None:
    model = codec.entropy_model
    for sides in [(1, 1), (1, 2), (5, 3), (8, 8)]:
        y = 3 * torch.randn(2, 8, *sides)
        for one, other in zip(model(y, False), model(y, False, quantize=torch.round), strict=True):
            assert torch.equal(one, other.detach())


def test_gradients_go_through_the_contexts(codec: MSPCodec) -> None:
    """With nothing rounded at all, they are those of a function, which differences can tell; in fp64."""
    model = made(4).entropy_model.double()
    y = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sum(model(v, False, quantize=lambda d: 1.1 * d)), (y,))


def test_errors(codec: MSPCodec, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"lmbda": LMBDA, "iterations": 2}
    for change, text in [
        ({"lmbda": -1.0}, "lmbda must be positive"), ({"lmbda": math.nan}, "lmbda must be positive"),
        ({"iterations": None}, "no budget"), ({"iterations": 0}, "iterations must be a whole"),
        ({"iterations": 2.5}, "iterations must be a whole"), ({"seconds": 0}, "seconds must be positive"),
        ({"seconds": math.inf}, "seconds must be positive"), ({"size": (49, 80)}, "size must be"),
        ({"size": (1, 2, 3)}, "size must be"), ({"settings": []}, "settings must be"),
        ({"settings": [("hard", 0.1)]}, "settings must be"), ({"settings": [("ste", 0.0)]}, "settings must be"),
        ({"settings": ["ste"]}, "settings must be"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            overfit(codec, x, **(good | change))
    for wrong, text in [(x[0], "one image"), (x.repeat(2, 1, 1, 1), "one image"), (x * math.nan, "finite")]:
        with pytest.raises(ValueError, match=text):
            overfit(codec, wrong, **good)
    with pytest.raises(ValueError, match="multiples of 16"):
        overfit(codec, x[:, :, :40], **good)
    with pytest.raises(TypeError, match="float32"):
        overfit(codec, x.double(), **good)
    with pytest.raises(TypeError, match="MSPCodec"):
        overfit(torch.nn.Identity(), x, **good)
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="tqdm is not installed"):
        overfit(codec, x, progress=True, **good)


# Through the commands


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread) -> Path:
    """photos/ of odd sizes, a briefly trained msp model, and a model of another kind."""
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name)
    root = tmp_path_factory.mktemp("lof")
    (root / "photos").mkdir()
    for index, (height, width) in enumerate([(101, 77), (1, 1), (64, 90)]):
        small = image_module.fromarray(np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((width, height), image_module.Resampling.BICUBIC).save(root / "photos" / f"{index}.png")
    for name, steps in (("msp-fast", 40), ("mbt2018-mean", 2)):
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
    for add in (coding_commands.add_compress_parser, coding_commands.add_decompress_parser):
        add(subparsers)
    args = parser.parse_args([str(word) for word in line])
    return args.run(args)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("extra", [[], ["--no-verify"], ["--lmbda", "0.05"]], ids=str)
def test_files_are_ordinary(world: Path, tmp_path: Path, capsys, index: int, extra: list[str]) -> None:
    checkpoint, source = world / "msp-fast" / "checkpoint.pt", world / "photos" / f"{index}.png"
    coded, decoded = tmp_path / "a.licf", tmp_path / "a.png"
    assert run("compress", checkpoint, source, coded, "--lof", "20it", "--quiet", *extra) == 0
    printed = capsys.readouterr()
    assert "latent: cost" in printed.out and "20 steps" in printed.out and "overfit" not in printed.err
    assert run("decompress", checkpoint, coded, decoded) == 0
    assert load_rgb(decoded).shape == load_rgb(source).shape


def test_a_bar_unless_quiet(world: Path, tmp_path: Path, capsys) -> None:
    run("compress", world / "msp-fast" / "checkpoint.pt", world / "photos" / "0.png", tmp_path / "a", "--lof", "1s")
    assert "overfit" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["30", "s", "-3s", "0s", "0it", "1.5it", "3h", "", "1e3s", "nans"])
def test_budgets_that_are_none(world: Path, text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        run("compress", "c.pt", "a.png", "a.licf", f"--lof={text}")
    assert "not a budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, budget", [("30s", {"seconds": 30}), ("1.5 min", {"seconds": 90}), ("500it", {"iterations": 500})]
)
def test_budgets(text: str, budget: dict[str, float]) -> None:
    assert coding_commands._budget(text) == budget


def test_what_the_command_refuses(world: Path, tmp_path: Path) -> None:
    source, out = world / "photos" / "0.png", tmp_path / "a.licf"
    with pytest.raises(TrainingError, match="latents of mbt2018-mean cannot be overfitted"):
        run("compress", world / "mbt2018-mean" / "checkpoint.pt", source, out, "--lof", "3it")
    with pytest.raises(ValueError, match="--lmbda is of --lof alone"):
        run("compress", world / "msp-fast" / "checkpoint.pt", source, out, "--lmbda", "0.1")
    with pytest.raises(ValueError, match="lmbda must be positive"):
        run("compress", world / "msp-fast" / "checkpoint.pt", source, out, "--lof", "3it", "--lmbda", "-1")
    assert not out.exists()


def test_the_benchmark(world: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--checkpoint", str(world / "msp-fast" / "checkpoint.pt"), "--data", str(world / "photos"), "--quiet"]
    line += ["--output", str(tmp_path), "--limit", "1", "--iterations", "40"]
    assert lof.main(line) == 0
    (row,) = read(tmp_path / "lof.csv", lof.COLUMNS)
    assert float(row["cost"]) < float(row["cost_before"]) and float(row["real_cost"]) < float(row["real_cost_before"])
    assert row["steps"] == "40" and (tmp_path / "lof.png").stat().st_size > 1000
    assert "| mean change |" in capsys.readouterr().out
    monkeypatch.setattr(ImageCodec, "decode", lambda self, data: load_rgb(world / "photos" / "0.png") // 2)
    assert lof.main(line) == 2 and "promised" in capsys.readouterr().err
    assert len(read(tmp_path / "lof.csv", lof.COLUMNS)) == 1
