"""MSPEntropyModel: its parameters in training and coding, its bytes, and what it refuses."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest
import torch

pytest.importorskip("compressai")

from lic_fast import use_backend
from lic_fast.coding import BitstreamError
from lic_fast.entropy import MSPEntropyModel, Profile

SMALL = Profile(scales=2, groups=2, width=8, depth=1)
SHAPES = [(1, 1), (1, 2), (2, 1), (1, 9), (3, 3), (7, 5), (8, 8), (9, 16), (33, 2)]


def small(*args, **options) -> MSPEntropyModel:
    """A model of its own whose parameters are all over the place, as a trained one's are."""
    return copy.deepcopy(_small(*args, **options))


@functools.cache
def _small(seed: int = 0, channels: int = 5, profile: str | Profile = SMALL, mixture: int = 1) -> MSPEntropyModel:
    torch.manual_seed(seed)
    model = MSPEntropyModel(channels, profile, mixture=mixture)
    with torch.no_grad():
        for head in model.network.heads:
            head.parameters_of.weight.mul_(6)
        model.bottleneck.quantiles[:, 0, 1] += torch.randn(channels)
    model.update()
    return model.eval()


@torch.no_grad()
def sampled(model: MSPEntropyModel, shape: tuple[int, int]) -> torch.Tensor:
    """A latent drawn from the model itself: what it promises is then what it costs."""
    y = torch.empty(1, model.schedule.channels, *shape)

    def code(step, means, parameters):
        scales = parameters[:, : means.shape[1]].clamp(min=0.11) if parameters is not None else 3.0
        return (torch.randn(means.shape) * scales).round()

    model._grown(y, code)
    return y


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_gives_the_encoders_latent(shape: tuple[int, int], threads: int) -> None:
    model = small()
    y = torch.randn(2, 5, *shape) * 4
    strings = model.compress(y)
    decoded = model.decompress(strings, shape)
    with torch.no_grad():
        expected = torch.cat([model(sample[None])[0] for sample in y])
    assert torch.equal(decoded, expected)
    assert bool(((decoded - y).abs() <= 0.5 + 1e-5).all())
    assert model.compress(y) == strings


@pytest.mark.parametrize("profile", ["fast", "base", "max"])
def test_profiles_decode_what_they_encode(profile: str, threads: int) -> None:
    model = small(channels=24, profile=profile)
    y = torch.randn(1, 24, 13, 18) * 4
    decoded = model.decompress(model.compress(y), (13, 18))
    with torch.no_grad():
        assert torch.equal(decoded, model(y)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_in_training_are_those_of_coding(shape: tuple[int, int], threads: int) -> None:
    """Teacher-forced, in the traversal that training takes, and grown step by step, as encoder and decoder do."""
    model = small()
    grown: list[torch.Tensor] = []
    y_hat = torch.empty(1, 5, *shape)
    noise = torch.randn(1, 5, *shape) * 4

    def code(step, means, parameters):
        grown.extend([] if parameters is None else [parameters.clone()])
        return (step.of(noise) - means).round()

    with torch.no_grad():
        model._grown(y_hat, code)
    forced = model.step_parameters(y_hat)
    assert len(forced) == len(grown)
    assert all(torch.equal(parameters, own) for (_, parameters), own in zip(forced, grown, strict=True))
    trained: list[torch.Tensor] = []
    model.threads = None
    with torch.no_grad():
        grown.clear()
        model._grown(y_hat, code)
    model.train()._given(
        y_hat.clone().requires_grad_(), lambda step, p: None if p is None else trained.append(p.detach())
    )
    assert all(torch.equal(one, other) for one, other in zip(trained, grown, strict=True))


@pytest.mark.parametrize(("profile", "channels", "shape"), [("fast", 8, (64, 64)), ("base", 64, (31, 21))])
def test_streams_do_not_depend_on_the_number_of_threads(profile: str, channels: int, shape: tuple[int, int]) -> None:
    """Convolutions do: on an AVX-512 machine, most steps of both cases have other parameters with threads = None."""
    torch.manual_seed(0)
    model = MSPEntropyModel(channels, profile).eval()
    model.update()
    y = torch.randn(1, channels, *shape) * 4
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((model.compress(y), [parameters for _, parameters in model.step_parameters(y)]))
            assert torch.get_num_threads() == count
            assert torch.equal(model.decompress(found[0][0], shape), model(y)[0])
    finally:
        torch.set_num_threads(before)
    for strings, parameters in found[1:]:
        assert strings == found[0][0]
        assert all(torch.equal(own, first) for own, first in zip(parameters, found[0][1], strict=True))


def test_backends_read_each_others_streams() -> None:
    model = small()
    y = torch.randn(1, 5, 9, 8) * 4
    strings = model.compress(y)
    y_hat = model.decompress(strings, (9, 8))
    with use_backend("reference"):
        assert model.compress(y) == strings
        assert torch.equal(model.decompress(strings, (9, 8)), y_hat)
        assert model.update(force=True) and model.compress(y) == strings


def test_memory_formats_do_not_matter() -> None:
    model = small()
    y = torch.randn(1, 5, 12, 10) * 4
    assert model.compress(y.contiguous(memory_format=torch.channels_last)) == model.compress(y)
    assert model.compress(y.transpose(2, 3).contiguous().transpose(2, 3)) == model.compress(y)


@pytest.mark.parametrize("profile", ["fast", "base", "max"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (16, 16), (32, 48)], ids=str)
def test_real_bytes_are_those_of_the_likelihoods(profile: str, shape: tuple[int, int]) -> None:
    model = small(channels=16, profile=profile)
    y = sampled(model, shape)
    with torch.no_grad():
        y_hat, likelihoods = model(y)
    estimate = -likelihoods.double().log2().sum().item() / 8
    (data,) = model.compress(y)
    assert torch.equal(model.decompress([data], shape), y_hat)
    assert abs(len(data) - estimate) <= 0.003 * estimate + 100, (len(data), estimate)


def test_likelihoods_are_probabilities_of_what_is_coded() -> None:
    """Over all values of one element, the others fixed, they sum to 1: in a step of the network, and the coarsest."""
    model = small()
    base = sampled(model, (4, 4))
    for place in [(0, 2, 3, 3), (0, 1, 0, 0)]:
        offsets = torch.arange(-400, 401, dtype=torch.float32)
        many = base.expand(len(offsets), -1, -1, -1).clone()
        many[(slice(None), *place[1:])] += offsets
        with torch.no_grad():
            likelihoods = model._likelihoods(many, _flat(model, many))
        own = likelihoods[:, _position(model, place)]
        assert own.double().sum().item() == pytest.approx(1, abs=2e-3)


def _flat(model: MSPEntropyModel, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([p.reshape(len(y), 2, -1) for _, p in model.step_parameters(y)], 2)


def _position(model: MSPEntropyModel, place: tuple[int, ...]) -> int:
    mark = torch.zeros(1, 5, 4, 4)
    mark[place] = 1
    return int(model.schedule.pack(mark).argmax())


@pytest.mark.parametrize("mixture", [1, 3])
def test_training_reaches_every_parameter(mixture: int) -> None:
    model = small(mixture=mixture).train()
    y = (torch.randn(2, 5, 9, 8) * 4).requires_grad_()
    y_hat, likelihoods = model(y)
    assert y_hat.shape == likelihoods.shape == y.shape
    assert bool(((likelihoods > 0) & (likelihoods <= 1)).all())
    (-likelihoods.log2().sum() + (y_hat - y.detach()).square().sum() + model.aux_loss()).backward()
    for name, parameter in [("y", y), *model.named_parameters()]:
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert name.endswith("bias") or bool((parameter.grad != 0).any()), name


def test_the_latent_rounds_about_the_means_with_the_derivative_one() -> None:
    model = small().train()
    y = (torch.randn(1, 5, 9, 8) * 4).requires_grad_()
    y_hat, _ = model(y)
    assert bool(((y_hat - y).abs() <= 0.5 + 1e-5).all())
    (slope,) = torch.autograd.grad(y_hat.sum(), y)
    assert torch.equal(slope, torch.ones_like(y))


def test_a_mixture_of_one_family_twice_is_one_gaussian() -> None:
    model = small(mixture=2)
    with torch.no_grad():
        for head in model.network.heads:
            weight, bias = head.parameters_of.weight, head.parameters_of.bias
            c = len(bias) // 6
            for first in (0, 2 * c, 4 * c):
                weight[first + c : first + 2 * c] = weight[first : first + c]
                bias[first + c : first + 2 * c] = bias[first : first + c]
        y = torch.randn(1, 5, 8, 8)
        y_hat, likelihoods = model(y)
        assert torch.equal(model.schedule.pack(y_hat)[:, 20:], model.schedule.pack(y)[:, 20:].round())
        parameters = torch.cat([p.reshape(1, 6, -1) for _, p in model.step_parameters(y_hat)], 2)
        alone = parameters[:, [0, 2]].contiguous()
        single = small()
        single.bottleneck.load_state_dict(model.bottleneck.state_dict())
        expected = model.schedule.unpack(single._likelihoods(y_hat, alone), 8, 8)
    torch.testing.assert_close(likelihoods, expected, rtol=1e-4, atol=1e-7)


def test_amp_trains_and_gives_fp32_likelihoods() -> None:
    model = small().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_hat, likelihoods = model(torch.randn(1, 5, 8, 8, dtype=torch.bfloat16))
    assert y_hat.dtype == likelihoods.dtype == torch.float32
    y = torch.randn(1, 5, 8, 8)
    model.eval()
    strings = model.compress(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.compress(y) == strings and torch.equal(
            model.decompress(strings, (8, 8)), model.decompress(strings, (8, 8))
        )


def test_state_dict_pickle_and_copies_keep_the_stream() -> None:
    model = small()
    y = torch.randn(1, 5, 8, 8) * 4
    strings = model.compress(y)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    loaded = MSPEntropyModel(5, SMALL)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for other in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.decompress(strings, (8, 8)), model.decompress(strings, (8, 8)))


@pytest.mark.parametrize("value", [1e9, -3e5, 70000.0])
def test_values_far_from_the_density_are_coded(value: float) -> None:
    model = small()
    y = torch.full((1, 5, 6, 6), value)
    y[0, 1, 2, 3] = -value
    with torch.no_grad():
        assert torch.equal(model.decompress(model.compress(y), (6, 6)), model(y)[0])


@pytest.fixture(scope="module")
def coded():
    model = small()
    y = torch.randn(1, 5, 8, 8) * 4
    return model, model.compress(y)[0], model.decompress(model.compress(y), (8, 8))


def test_every_truncation_is_refused(coded) -> None:
    model, data, _ = coded
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            model.decompress([data[:length]], (8, 8))


def test_every_flipped_byte_is_refused(coded) -> None:
    model, data, _ = coded
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            with pytest.raises(BitstreamError):
                model.decompress([data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]], (8, 8))


def test_other_weights_are_refused_before_they_decode_noise(coded) -> None:
    model, data, _ = coded
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.heads[1].parameters_of.bias.mul_(1.5)
    with pytest.raises(BitstreamError, match="parameters of grid 1 are not those of the encoder"):
        other.decompress([data], (8, 8))
    density = small(seed=1)
    with pytest.raises(BitstreamError, match="made with the tables"):
        density.decompress([data], (8, 8))


@pytest.mark.parametrize("at", range(2, 7))
def test_every_byte_of_the_check_is_compared(coded, at: int) -> None:
    """One for the first of two grids, which agrees by chance once in 256, and the four of all levels."""
    model, data, _ = coded
    damaged = bytearray(data)
    damaged[at] ^= 0x40
    with pytest.raises(BitstreamError, match="parameters of grid 1" if at == 2 else "parameters of the finest grids"):
        model.decompress([bytes(damaged)], (8, 8))


@pytest.mark.parametrize(("at", "value", "said"), [(0, 9, "version 9"), (1, 1, "portable profile"), (1, 4, "0x04")])
def test_newer_streams_are_named(coded, at: int, value: int, said: str) -> None:
    model, data, _ = coded
    changed = bytearray(data)
    changed[at] = value
    with pytest.raises(BitstreamError, match=said) as caught:
        model.decompress([bytes(changed)], (8, 8))
    assert "\n" not in str(caught.value)


def test_another_shape_is_refused(coded) -> None:
    model, data, _ = coded
    for shape in [(8, 9), (4, 16), (7, 8), (1, 1), (800, 800)]:
        with pytest.raises(BitstreamError):
            model.decompress([data], shape)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="profile must be one of fast, base, max"):
        MSPEntropyModel(5, "quick")
    with pytest.raises(ValueError, match="mixture must be 1 to 16"):
        MSPEntropyModel(5, mixture=17)
    model = MSPEntropyModel(5, SMALL)
    y = torch.zeros(1, 5, 4, 4)
    with pytest.raises(ValueError, match=r"call update\(\)"):
        model.compress(y)
    model.update()
    for wrong in (torch.zeros(1, 4, 4, 4), torch.zeros(1, 5, 4), torch.zeros(1, 5, 0, 4)):
        with pytest.raises(ValueError, match=r"y must be \[B, 5, H, W\]"):
            model.compress(wrong)
    with pytest.raises(TypeError, match="floating-point"):
        model.compress(y.int())
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite"):
            model.compress(torch.full_like(y, bad))
    with pytest.raises(ValueError, match=r"shape must be \(H, W\)"):
        model.decompress([], (0, 4))
    with pytest.raises(TypeError, match="must be bytes"):
        model.decompress(["text"], (4, 4))
    with pytest.raises(ValueError, match="mixtures have no integer networks, got 3"):
        small(mixture=3).make_portable(y)
    with pytest.raises(TypeError, match="fp32 parameters"):
        small().double().compress(y)


def test_no_streams_give_no_samples() -> None:
    model = small()
    assert model.compress(torch.zeros(0, 5, 4, 4)) == []
    assert model.decompress([], (4, 4)).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("mixture", [2, 3])
@pytest.mark.parametrize("sides", [(1, 1), (3, 2), (16, 23)], ids=str)
def test_mixtures_come_back_at_what_they_promise(mixture: int, sides: tuple[int, int]) -> None:
    model = small(mixture=mixture)
    y = 4 * torch.randn(2, 5, *sides, generator=torch.Generator().manual_seed(3))
    strings = model.compress(y)
    promised = [model(sample[None], False) for sample in y]
    assert torch.equal(model.decompress(strings, sides), torch.cat([y_hat for y_hat, _ in promised]))
    for string, (_, likelihoods) in zip(strings, promised, strict=True):
        bits = -likelihoods.log2().sum().item()
        assert len(string) <= 1.003 * bits / 8 + 120  # far tails cost less than they promise: they escape


def test_streams_of_mixtures_and_of_one_gaussian_are_told_apart() -> None:
    one, three, other = small(), small(mixture=3), small(mixture=3)
    with torch.no_grad():
        other.network.heads[0].parameters_of.bias += 0.5
    y = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(3))
    with pytest.raises(BitstreamError, match="this model codes by one Gaussian, the stream by mixtures"):
        one.decompress(three.compress(y), (8, 8))
    with pytest.raises(BitstreamError, match="this model codes by mixtures, the stream by one Gaussian"):
        three.decompress(one.compress(y), (8, 8))
    with pytest.raises(BitstreamError, match="are not those of the encoder"):
        other.decompress(three.compress(y), (8, 8))
    data = three.compress(y)[0]
    for damaged in (data[:9], data[:-1], data[: len(data) // 2], data + b"x"):
        with pytest.raises(BitstreamError):
            three.decompress([damaged], (8, 8))
