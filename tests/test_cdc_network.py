"""CDC's networks and schedules beside plain formulas written out here, in fp64, and golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_by_rule
from torch import Tensor
from torch.nn import functional as F

from lic_fast.codec import _cdc_schedule as schedules
from lic_fast.codec._cdc_layers import LinearAttention, ResidualBlock
from lic_fast.codec._cdc_network import ContentCodec, Denoiser, Sizes

SMALL = Sizes(width=4, levels=(1, 2, 3, 4, 4), map_channels=3)


def whole_numbers(module: torch.nn.Module, scale: float = 1 / 97) -> torch.nn.Module:
    """Weights that no generator makes: a linear congruence, the same on every machine and torch."""
    state, number = {}, 1
    for name, p in sorted(module.named_parameters()):
        values = []
        for _ in range(p.numel()):
            number = number * 48271 % 2147483647
            values.append((number >> 8) % 129 - 64)
        fan = max(1, p[0].numel()) if p.dim() > 1 else 4
        state[name] = torch.tensor(values, dtype=torch.float64).view(p.shape) * (scale * 4 / math.sqrt(fan))
        if name.rpartition(".")[2] == "weight" and p.dim() == 1:
            state[name] += 1
    module.load_state_dict({name: value.to(torch.float32) for name, value in state.items()}, strict=False)
    return module


def ramp(*shape: int) -> Tensor:
    count = math.prod(shape)
    return ((torch.arange(count, dtype=torch.float64) * 7919 % 1009) / 504.5 - 1).view(shape).float()


def norm(w: dict, name: str, x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"].view(1, -1, 1, 1) + w[f"{name}.bias"].view(
        1, -1, 1, 1
    )


def conv(w: dict, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)


def block(w: dict, name: str, x: Tensor, t: Tensor | None = None) -> Tensor:
    h = norm(w, f"{name}.norm1", conv(w, f"{name}.conv1", x)).relu()
    if t is not None:
        bias = F.leaky_relu(t, 0.2) @ w[f"{name}.time.weight"].T + w[f"{name}.time.bias"]
        h = h + bias[:, :, None, None]
    h = norm(w, f"{name}.norm2", conv(w, f"{name}.conv2", h)).relu()
    return h + (conv(w, f"{name}.skip", x) if f"{name}.skip.weight" in w else x)


def attention(w: dict, name: str, x: Tensor) -> Tensor:
    """Three steps after each other: q, k, v at every place; sums over places; the map out."""
    b, c, height, width = x.shape
    q, k, v = conv(w, f"{name}.qkv", norm(w, f"{name}.norm", x)).flatten(2).chunk(3, 1)
    seen = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
    mixed = torch.einsum("bde,bdn->ben", seen, q / math.sqrt(c)).reshape(b, c, height, width)
    return x + conv(w, f"{name}.out", mixed)


def denoise(w: dict, sizes: Sizes, x: Tensor, time: Tensor, maps: list[Tensor]) -> Tensor:
    def level(name: str, x: Tensor) -> Tensor:
        return attention(w, f"{name}.attention", block(w, f"{name}.block2", block(w, f"{name}.block1", x, t), t))

    t = F.gelu(time @ w["embed1.weight"].T + w["embed1.bias"]) @ w["embed2.weight"].T + w["embed2.bias"]
    kept, last = [], len(sizes.levels) - 1
    for i in range(last + 1):
        x = level(f"down.{i}", torch.cat([x, maps[i]], 1) if i < len(maps) else x)
        kept.append(x)
        x = conv(w, f"down.{i}.resample", x, 2) if i < last else x
    x = attention(w, "middle_attention", block(w, "middle1", x, t))
    x = block(w, "middle2", x, t)
    for i in range(last):
        x = level(f"up.{i}", torch.cat([x, kept.pop()], 1))
        x = F.conv_transpose2d(x, w[f"up.{i}.resample.weight"], w[f"up.{i}.resample.bias"], 2, 1)
    return conv(w, "out", norm(w, "norm", x))


def weights(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in module.named_parameters()}


def maps_of(sizes: Sizes, b: int, height: int, width: int) -> list[Tensor]:
    channels = [sizes.map_channels, *(sizes.width * m for m in reversed(sizes.synthesis[1:]))]
    return [ramp(b, c, height >> i, width >> i) * 0.7 for i, c in enumerate(channels)]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@torch.no_grad()
def test_denoiser_is_the_formula(last: bool) -> None:
    net, x, time = whole_numbers(Denoiser(SMALL)), ramp(2, 3, 32, 48), torch.tensor([[0.25], [0.875]])
    maps = maps_of(SMALL, 2, 32, 48)
    exact = denoise(weights(net, torch.float64), SMALL, x.double(), time.double(), [m.double() for m in maps])
    eager = denoise(weights(net, torch.float32), SMALL, x, time, maps)
    if last:
        x, maps = (
            x.to(memory_format=torch.channels_last),
            [m.to(memory_format=torch.channels_last) for m in maps],
        )
    for ours in (net(x, time, maps), net(x, time, parts=net.condition(maps))):
        assert_by_rule(ours, eager, exact, 4.0)


@pytest.mark.parametrize(("channels", "out", "large"), [(5, 4, True), (6, 6, False)])
@torch.no_grad()
def test_a_condition_seen_once_is_a_condition_seen_always(channels: int, out: int, large: bool) -> None:
    layer = whole_numbers(ResidualBlock(channels, out, 4, large)).double()
    x, condition, time = ramp(2, 2, 9, 7).double(), ramp(2, channels - 2, 9, 7).double(), ramp(2, 4).double()
    whole = layer(torch.cat([x, condition], 1), time)
    torch.testing.assert_close(layer.forward_with(x, layer.part(condition), time), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_attention_is_its_three_steps_and_sees_every_place() -> None:
    layer = whole_numbers(torch.nn.ModuleDict({"a": LinearAttention(6)})).double()
    x = ramp(2, 6, 5, 4).double()
    torch.testing.assert_close(layer["a"](x), attention(weights(layer, torch.float64), "a", x), rtol=0, atol=1e-12)
    other = x.clone()
    other[:, :, 0, 0] += 1
    assert (layer["a"](x) != layer["a"](other)).any(1).all()


@torch.no_grad()
def test_content_codec_is_the_formula() -> None:
    net, x = whole_numbers(ContentCodec(SMALL)), ramp(1, 3, 64, 128)
    results = []
    for dtype in (torch.float64, torch.float32):
        w, h = weights(net, dtype), x.to(dtype)
        for i in range(4):
            h = conv(w, f"analysis.{i}.down", block(w, f"analysis.{i}.block", h), 2)
        y = h
        for i, stride in enumerate((1, 2, 2)):
            h = conv(w, f"hyper_analysis.{i}", h if i == 0 else F.leaky_relu(h, 0.2), stride)
        z = h
        for i in range(2):
            kernel = w[f"hyper_synthesis.{i}.weight"]
            h = F.leaky_relu(F.conv_transpose2d(h, kernel, w[f"hyper_synthesis.{i}.bias"], 2, 2, 1), 0.2)
        means, scales = conv(w, "hyper_synthesis.2", h).chunk(2, 1)
        h, maps = y, []
        for i in range(4):
            h = block(w, f"synthesis.{i}.block", h)
            h = F.conv_transpose2d(h, w[f"synthesis.{i}.up.weight"], w[f"synthesis.{i}.up.bias"], 2, 1)
            maps.insert(0, h)
        results.append([y, z, means, scales, *maps])
    y = net.analyse(x)
    z = net.hyper_analyse(y)
    ours = [y, z, *net.parameters_of(z), *net.maps(y)]
    for mine, eager, exact in zip(ours, results[1], results[0], strict=True):
        assert_by_rule(mine, eager, exact, 4.0)
    assert [tuple(t.shape[1:]) for t in ours] == [
        (16, 4, 8), (16, 1, 2), (16, 4, 8), (16, 4, 8), (3, 64, 128), (4, 32, 64), (8, 16, 32), (12, 8, 16),
    ]  # fmt: skip


@torch.no_grad()
def test_golden_numbers() -> None:
    """Equal to what the authors' code computes with the same weights."""
    net, content = whole_numbers(Denoiser(SMALL)).double(), whole_numbers(ContentCodec(SMALL)).double()
    x = ramp(1, 3, 64, 64).double()
    y = content.analyse(x)
    f = net(x, torch.tensor([[0.5]], dtype=torch.float64), content.maps(y.round()))
    found = [float(v) for t in (y, content.hyper_analyse(y), f) for v in (t.mean(), t.abs().max(), t.flatten()[5])]
    assert found == pytest.approx(GOLDEN, rel=1e-9, abs=1e-12)


# mean, largest magnitude and element 5 of the latent, the hyperlatent and the U-Net's result, computed by the authors'
# code in fp64 with these weights
GOLDEN = [
    -3.1234246096292955, 67.1139641790574, 8.47462780316308, 4.4607631842638025, 21.77046282415275, -5.482771466926655,
    0.5443667392655326, 6.120315576207362, -0.5649025482650689,
]  # fmt: skip


def test_schedules() -> None:
    cosine, linear = schedules.cosine(8193), schedules.linear(20000)
    for abar, count in ((cosine, 8193), (linear, 20000)):
        assert abar.dtype is torch.float64 and len(abar) == count and (abar.diff() < 0).all()
        assert 0.999 < abar[0] < 1 and 0 < abar[-1] < 1e-4
    betas = 1 - linear[1:] / linear[:-1]
    assert betas[-1].item() == pytest.approx(1e-3, rel=1e-9) and 1 - linear[0].item() == pytest.approx(5e-6, rel=1e-9)
    middle = 4096
    angle = (middle / 8194 * 8194 / 8193 + 0.008) / 1.008 * math.pi / 2  # the i-th of 8194 points on [0, 8194]
    at_zero = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine[middle - 1].item() == pytest.approx(math.cos(angle) ** 2 / at_zero, rel=1e-9)


@pytest.mark.parametrize("predicts", ["x", "eps"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_ddim_steps_are_the_textbooks(predicts: str, eta: float, count: int) -> None:
    """Predict x_0 and the noise from one another, then go to the next level: Song et al., eq. 12."""
    abar = schedules.cosine(999) if predicts == "x" else schedules.linear(999)
    places = [round(i * 998 / (count - 1) - 0.499) for i in range(count)] if count > 1 else [998]
    steps = list(schedules.ddim_steps(abar, count, eta, predicts))
    assert len(steps) == count
    for number, step in enumerate(steps):
        i = count - 1 - number
        now = abar[places[i]].float().double().item()
        after = abar[places[i - 1]].float().double().item() if i else 1.0
        x, f = 0.7, -0.4
        x0 = f if predicts == "x" else (x - math.sqrt(1 - now) * f) / math.sqrt(now)
        noise = f if predicts == "eps" else (x - math.sqrt(now) * f) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        mean = math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - sigma**2)) * noise
        assert step.a * x + step.b * f == pytest.approx(mean, rel=1e-9, abs=1e-9) and step.noise == pytest.approx(sigma)
        assert step.time == pytest.approx(places[i] / 999 if predicts == "x" else i / count)
    assert steps[-1].noise == 0 and (predicts == "eps" or (steps[-1].a, steps[-1].b) == (0, 1))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="latent and synthesis must meet"):
        ContentCodec(Sizes(synthesis=(3, 3, 2, 1)))
    with pytest.raises(ValueError, match="more levels than there are maps"):
        Denoiser(Sizes(levels=(1, 2, 3, 4)))
    assert (Sizes().downsampling, Sizes().multiple, Sizes(levels=(1,) * 8).multiple) == (16, 64, 128)
