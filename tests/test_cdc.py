"""CDC: training's output, streams, the sampler, and what is refused."""

from __future__ import annotations

import copy
import math
import struct
import sys

import pytest
import torch

pytest.importorskip("compressai")

from lic_fast.codec import CDC, CDC_NAMES, BitstreamError
from lic_fast.codec._cdc_network import Sizes
from lic_fast.codec._cdc_schedule import ddim_steps
from lic_fast.reference._noise import normal_noise
from lic_fast.training.loss import RateDistortionLoss
from lic_fast.training.models import build_model, resolve_channels, split_parameters

SMALL = Sizes(width=8, levels=(1, 2, 2, 2, 2), map_channels=4)
KINDS = ("x", "eps")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run faster on one thread, and do not fight other processes for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(predicts: str, seed: int = 0) -> CDC:
    torch.manual_seed(seed)
    codec = CDC(sizes=SMALL, predicts=predicts).eval()
    with torch.no_grad():
        codec.content.hyper_synthesis[-1].bias[SMALL.channels("latent")[-1] :] += torch.rand(32)  # scales that differ
    codec.update()
    return codec


@pytest.fixture(scope="module")
def codecs() -> dict[str, CDC]:
    return {predicts: made(predicts) for predicts in KINDS}


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("sides", [(64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"seed": 2**32 - 1, "steps": 3, "gamma": 0.0, "eta": 0.5}], ids=["own", "all"]
)
def test_a_stream_has_one_decoding(codecs, predicts: str, sides, settings) -> None:
    codec, x = codecs[predicts], torch.rand(1, 3, *sides)
    codec.steps = 2
    coded = codec.compress(x, **settings)
    assert tuple(coded["shape"]) == (sides[0] // 64, sides[1] // 64)
    first, again = codec.decompress(**coded)["x_hat"], copy.deepcopy(codec).decompress(**coded)["x_hat"]
    assert first.shape == x.shape and torch.equal(first, again) and 0 <= first.min() and first.max() <= 1
    with torch.no_grad():
        y_hat, likelihoods = codec._latents(codec.content.analyse(2 * x - 1))
    assert torch.equal(codec.latents(**coded)[0], y_hat)
    assert torch.equal(codec.reconstruct(x, **settings)["x_hat"], first)
    promised = sum(-each.log2().sum().item() for each in likelihoods.values()) / 8
    assert abs(len(coded["strings"][0][0]) + len(coded["strings"][1][0]) - promised) < 0.02 * promised + 100


def test_seed_steps_and_eta_change_the_image_and_nothing_else(codecs) -> None:
    codec, x = codecs["x"], torch.rand(1, 3, 64, 64)
    one = {"seed": 1, "steps": 4, "gamma": 0.8, "eta": 0.0}
    first = codec.compress(x, **one)
    for change in ({"seed": 2}, {"steps": 5}, {"gamma": 0.7}, {"eta": 1.0}):
        other = codec.compress(x, **(one | change))
        assert other["strings"][:2] == first["strings"][:2]
        assert not torch.equal(codec.decompress(**other)["x_hat"], codec.decompress(**first)["x_hat"])
    no_noise = [codec.compress(x, seed=seed, steps=2, gamma=0.0, eta=0.0) for seed in (1, 2)]
    assert torch.equal(*(codec.decompress(**coded)["x_hat"] for coded in no_noise))


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@torch.no_grad()
def test_sampling_is_the_plain_loop(codecs, predicts: str, eta: float) -> None:
    """In fp64, with the U-Net fed its maps at every step, and the update written as the specification has it."""
    from lic_fast.reference.ddim_update import ddim_update

    codec = copy.deepcopy(codecs[predicts]).double()
    y_hat = torch.randn(1, 32, 4, 4, dtype=torch.float64)
    maps, seed = codec.content.maps(y_hat), 11
    zero = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    x = ddim_update(zero, zero, torch.tensor([seed]), 0.0, 0.0, 1.0, 0.8)
    for number, step in enumerate(ddim_steps(codec.abar, 4, eta, predicts)):
        f = codec.denoiser(x, torch.tensor([[step.time]], dtype=torch.float64), maps)
        key = torch.tensor([seed | (number + 1) << 32]) if step.noise else None
        x = ddim_update(x, f, key, step.a, step.b, 1.0 if predicts == "x" else math.inf, step.noise)
    ours = codec.sample(y_hat, seed=seed, steps=4, gamma=0.8, eta=eta)
    assert (ours - x).abs().max() < 1e-9 * x.abs().max()
    if eta:
        both = codec.sample(torch.cat([y_hat, y_hat]), seed=seed, steps=4, gamma=0.8, eta=eta)
        torch.testing.assert_close(both, torch.cat([ours, ours]), rtol=1e-9, atol=1e-9)


def test_a_batch_is_its_samples_and_may_be_sampled_differently(codecs) -> None:
    codec, x = codecs["x"], torch.rand(2, 3, 64, 64)
    coded = codec.compress(x, steps=2)
    other = codec.compress(x[1:], steps=3, seed=9)
    mixed = [[coded["strings"][part][0], other["strings"][part][0]] for part in range(3)]
    found = codec.decompress(mixed, coded["shape"])["x_hat"]
    assert torch.equal(found[:1], codec.decompress([[p[0]] for p in coded["strings"]], coded["shape"])["x_hat"])
    assert torch.equal(found[1:], codec.decompress(**other)["x_hat"])


def test_progress_sees_every_step(codecs) -> None:
    codec, seen = copy.deepcopy(codecs["x"]), []
    codec.progress = lambda steps: (seen.append(step.time) or step for step in steps)
    codec.sample(torch.zeros(1, 32, 4, 4), steps=5)
    assert len(seen) == 5 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("predicts", KINDS)
def test_the_loss_of_training_is_the_papers(codecs, predicts: str) -> None:
    """With the draws it made: the weighted squared error of the prediction, and bits by likelihoods with noise."""
    codec = copy.deepcopy(codecs[predicts]).double().train()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    drawn = []
    codec._drawn = lambda image: drawn.append(CDC._drawn(codec, image)) or drawn[-1]
    seen = []
    codec.denoiser.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    output = codec(x)
    (times, seed), (noisy, time, _, predicted) = drawn[0], seen[0]
    noise = normal_noise(seed, x).double()
    abar = codec.abar[times].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, abar.sqrt() * (2 * x - 1) + (1 - abar).sqrt() * noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(time, times[:, None].double() / len(codec.abar), rtol=0, atol=1e-12)
    error = (predicted - (2 * x - 1 if predicts == "x" else noise)).square().mean((1, 2, 3))
    weight = (abar / (1 - abar)).flatten().clamp(max=5) if predicts == "x" else 1
    torch.testing.assert_close(output["distortion"], (weight * error).mean(), rtol=1e-5, atol=0)
    terms = RateDistortionLoss(0.01)(output, x.float(), x.new_zeros(()))
    bits = sum(-each.float().log2().sum() for each in output["likelihoods"].values())
    wanted = bits / (2 * 64 * 64) + 0.01 * 255**2 / 4 * output["distortion"].float()
    torch.testing.assert_close(terms["loss"], wanted)


def test_the_signal_to_noise_weight_is_bounded() -> None:
    assert made("x")._table[0, 2] == 5 and made("eps")._table[:, 2].unique().tolist() == [1.0]


@pytest.mark.parametrize("predicts", KINDS)
def test_gradients_reach_every_weight_and_rounding_lets_them_pass(predicts: str) -> None:
    codec = made(predicts).train()
    output = codec(torch.rand(2, 3, 64, 64))
    bits = sum(-each.log2().sum() for each in output["likelihoods"].values())
    (bits / 8192 + output["distortion"] + codec.aux_loss()).backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    codec.zero_grad()
    codec(torch.rand(2, 3, 64, 64))["distortion"].backward()
    assert codec.content.analysis[0]["block"].conv1.weight.grad.abs().sum() > 0


def test_validation_repeats_and_training_does_not(codecs) -> None:
    codec, x = copy.deepcopy(codecs["x"]), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert codec(x)["distortion"] == codec(x)["distortion"]
        codec.train()
        assert codec(x)["distortion"] != codec(x)["distortion"]
        seeded = [(torch.manual_seed(4), codec(x)["distortion"])[1] for _ in range(2)]
        assert seeded[0] == seeded[1]


def test_averages_of_weights_sample_too(codecs) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    codec = copy.deepcopy(codecs["x"])
    average = AveragedModel(codec, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(codec)
    with torch.no_grad():
        for p in codec.parameters():
            p.add_(0.01)
    average.update_parameters(codec)
    inner = average.module
    inner.update(force=True)
    weight = codec.denoiser.out.weight
    torch.testing.assert_close(inner.denoiser.out.weight, weight - 0.009, rtol=0, atol=1e-6)
    x = torch.rand(1, 3, 64, 64)
    coded = inner.compress(x, steps=1)
    assert inner.decompress(**coded)["x_hat"].shape == x.shape


def test_what_the_codec_refuses(codecs, monkeypatch) -> None:
    codec = codecs["x"]
    for wrong in (torch.rand(1, 3, 40, 64), torch.rand(1, 1, 64, 64), torch.rand(3, 64, 64), torch.rand(1, 3, 0, 64)):
        for method in (codec, codec.compress, codec.reconstruct):
            with pytest.raises(ValueError, match="multiples of 64"):
                method(wrong)
    x = torch.rand(1, 3, 64, 64)
    for settings, message in (
        ({"seed": -1}, "seed must be an"), ({"seed": 1.5}, "seed must"), ({"steps": 0}, "steps must be 1 to"),
        ({"steps": 9000}, "steps must be 1 to 8193"), ({"gamma": -1.0}, "gamma must be in"), ({"eta": 2.0}, "eta must"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            codec.compress(x, **settings)
    with pytest.raises(ValueError, match="not finite"):
        codec.compress(x * float("nan"))
    with pytest.raises(ValueError, match=r"call \.eval"):
        copy.deepcopy(codec).train().reconstruct(x)
    with pytest.raises(ValueError, match='predicts must be "x" or "eps"'):
        CDC(sizes=SMALL, predicts="v")
    with pytest.raises(ValueError, match=r"rho must be in \[0, 1\)"):
        CDC(sizes=SMALL, rho=1.0)
    with pytest.raises(ValueError, match="unknown name, got 'cdc'"):
        CDC.from_name("cdc")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"pip install lic_fast\[perceptual\]"):
        CDC(sizes=SMALL, rho=0.9)


def test_the_perceptual_loss_is_weighed_in(monkeypatch) -> None:
    class Distance(torch.nn.Module):
        """What lpips.LPIPS looks like from outside."""

        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg"
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.abs().max() > 1e-3 and b.min() < 0  # images in [-1, 1]
            return self.weight * (a - b).abs().mean((1, 2, 3), keepdim=True)

    package = type(sys)("lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    torch.manual_seed(0)
    codec = CDC(sizes=SMALL, rho=0.9).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = codec(x)
        codec.rho = 0.0
        plain = codec(x)["distortion"]
    seen = 2 * (output["x_hat"] - x).abs().mean()
    torch.testing.assert_close(output["distortion"], 0.1 * plain + 0.9 * seen)
    assert not any("perceptual" in name for name in codec.state_dict())


def damaged(header: bytes, **change: object) -> bytes:
    names = ("version", "seed", "steps", "gamma", "eta", "tile", "overlap")
    values = dict(zip(names, struct.unpack("<BIHffHH", header), strict=True)) | change
    return struct.pack("<BIHffHH", *values.values())


def test_damaged_settings_are_bitstream_errors(codecs) -> None:
    codec = codecs["x"]
    y, z, header = codec.compress(torch.rand(1, 3, 64, 64), steps=2)["strings"]
    shape = (1, 1)
    cases = [
        ([y, z], "three lists"), ([y, z, []], "three lists"), ([y, z, [header[0][:-1]]], "19 bytes"),
        ([y, z, [damaged(header[0], version=1)]], "of another build"),
        ([y, z, [damaged(header[0], version=3)]], "of another build"),
        ([y, z, [damaged(header[0], steps=0)]], "steps must be"), ([y, z, [damaged(header[0], steps=9000)]], "steps"),
        ([y, z, [damaged(header[0], gamma=float("nan"))]], "gamma"), ([y, z, [damaged(header[0], eta=-1.0)]], "eta"),
        ([[y[0][:-1]], z, header], "bytes|stream"), ([z, y, header], "stream"),
        ([y, [z[0][:-2] + b"xx"], header], "stream"),
    ]  # fmt: skip
    for strings, message in cases:
        with pytest.raises(BitstreamError, match=message) as caught:
            codec.decompress(strings, shape)
        assert "\n" not in str(caught.value)
    with pytest.raises(BitstreamError):
        codec.decompress([y, z, header], (2, 1))


def test_names_sizes_and_parameters() -> None:
    assert {*CDC_NAMES} == {"cdc-x", "cdc-x-lpips", "cdc-eps", "cdc-x-light", "cdc-eps-light"}
    assert resolve_channels("cdc-x", None, 0.013) == (64,) and resolve_channels("cdc-eps-light", None, 0.1) == (32,)
    assert resolve_channels("cdc-x", (12,), 0.013) == (12,)
    with torch.device("meta"):
        whole = CDC.from_name("cdc-x")
        assert whole.denoiser.down[0]["block1"].conv1.in_channels == 67
        assert CDC.from_name("cdc-eps").denoiser.down[0]["block1"].conv1.in_channels == 6
    assert sum(p.numel() for p in whole.parameters()) == 53_885_891
    small = build_model("cdc-x", (8,))
    assert small.sizes.width == 8 and small.content.synthesis[-1]["up"].out_channels == 8
    assert [name for name, _ in split_parameters(small)[1]] == ["entropy_bottleneck.quantiles"]
