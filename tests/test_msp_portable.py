"""Portable streams of MSPEntropyModel: integer networks, which decode anywhere."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("compressai")

from portable_model import CHANNELS, SIZES, golden_latent, golden_model

from lic_fast import explain, use_backend
from lic_fast.coding import BitstreamError
from lic_fast.entropy import MSPEntropyModel, Profile, is_portable

SHAPES = [(1, 1), (1, 2), (2, 1), (1, 9), (3, 3), (7, 5), (8, 8), (9, 16), (33, 2)]
# shape -> the stream of golden_latent(*shape) as the first version wrote it, CRC-32 of the decoded fp32 latent
GOLDEN: dict[tuple[int, int], tuple[str, int]] = {
    (1, 1): (
        "01014c4652010010e06e552bdbb022b2010105000001020be03aba0788137895dbab",
        0xAFB7B861,
    ),
    (4, 6): (
        "0101a9c9af9b314c4652010010e06e552bdbb022b2010d78763a22020cb1319b0a7e6f81abf680f806ee8385bfc5cde12b7d"
        "45ff7f987dffff00c00142b45bfb70034fd9bfff7fff3f94c22d58df40ff3ffe3fffffffbf6792ef8c08047400ffffff7fff"
        "7f187aff3fcbc30741c344ff3fff7fffbfffffffbf0f8e330affbf00c05afeff3ffd9d99425fd8e071dc56ffbfff7fffff88"
        "13f9fffbffeffffefffdfffbfff3fffcfffbfffafff5fffcfffdfff2fff9ff07000300fafff6fff0fff9fff7fff5fffdfff6"
        "fff1fff9fff8fff7fff8fff1fffafffdfff1234f12",
        0xB09E5EE4,
    ),
    (7, 5): (
        "01016b7d6c91a04c4652010010e06e552bdbb022b2010daf01ab01522f0209f9f52b00e5632fc19166a1ef18831d22ff3fff"
        "3f520dffff3d04a84efffffffff098ffffffbf2adde589c1681cbef38b0500d88fffffffff894c9de6e3bfffffffbf1e800e"
        "c094b8ff3ff7fe9c45d7f132c2ff3fffffff3f327a4eae1840acbaffff97cfffffff3f72bdff3ff8bf01807926e8b62d89ff"
        "ffff3fffffff3fedff90d36606aa336bc087bbff3fd5c3fcffaf6607c0e2bf9641010053b707f0ff3f0000ff3fff3ffeff88"
        "130400fcffefffffffeeff0900f4fff1fff8ffeffffcfffcfff8ff0100eefffcfff5fffaff0500f8fff1fff8fffcfffefff0"
        "fff8ff08000400fafffafff9fff9fffdfffcffecfff5fff8fffdfff9fff4fffafff8fff0fff8fffafffaff11dca722",
        0xD84B3F67,
    ),
}


def made(seed: int = 0, channels: int = CHANNELS, profile: str | Profile = SIZES) -> MSPEntropyModel:
    """A model whose parameters are all over the place, made portable on latents like those of the tests."""
    torch.manual_seed(seed)
    model = MSPEntropyModel(channels, profile)
    with torch.no_grad():
        for head in model.network.heads:
            head.parameters_of.weight.mul_(6)
        model.bottleneck.quantiles[:, 0, 1] += torch.randn(channels)
    model.update()
    model.eval().make_portable([torch.randn(2, channels, 16, 24) * 4, torch.randn(1, channels, 5, 5)])
    return model


@pytest.fixture(scope="module")
def model() -> MSPEntropyModel:
    return made()


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def checksum(y_hat: torch.Tensor) -> int:
    return zlib.crc32(y_hat.contiguous().numpy().tobytes())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_gives_the_encoders_latent(model, shape, threads) -> None:
    y = torch.randn(2, CHANNELS, *shape) * 4
    strings = model.compress(y)
    assert all(map(is_portable, strings))
    decoded = model.decompress(strings, shape)
    with torch.no_grad():
        batched, likelihoods = model(y)
        alone = torch.cat([model(sample[None])[0] for sample in y])
    assert torch.equal(decoded, batched) and torch.equal(decoded, alone)  # float networks depend on the batch
    assert bool(((decoded - y).abs() <= 0.5 + 1e-5).all()) and bool((likelihoods > 0).all())


@pytest.mark.parametrize("profile", ["fast", "base", "max"])
def test_profiles_and_backends(profile, threads) -> None:
    model = made(channels=12, profile=profile)
    y = torch.randn(1, 12, 13, 18) * 4
    strings = model.compress(y)
    y_hat = model.decompress(strings, (13, 18))
    found = model.step_parameters(y_hat)
    with use_backend("reference"):
        assert model.compress(y) == strings
        assert torch.equal(model.decompress(strings, (13, 18)), y_hat)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, model.step_parameters(y_hat), strict=True))


@torch.no_grad()
def test_integers_stay_near_the_floats() -> None:
    """Of a model with latents drawn from itself: parameters agree, and so do the bytes."""
    model = made(channels=16, profile="base")
    y = torch.empty(1, 16, 24, 32)
    model._grown(
        y, lambda step, means, p: (torch.randn(means.shape) * (3 if p is None else p[:, : means.shape[1]])).round(),
        model.network,
    )  # fmt: skip
    exact = model.step_parameters(y)
    portable, _ = model.compress(y), setattr(model, "exact", False)
    for (step, integer), (_, real) in zip(exact, model.step_parameters(y), strict=True):
        assert (integer - real).abs().max() <= 0.02 * real.abs().max() + 0.02, step
        assert (integer != real).any()
    (plain,) = model.compress(y)
    assert not is_portable(plain)
    assert abs(len(portable[0]) - len(plain)) <= 0.005 * len(plain)


def test_streams_of_both_kinds_decode_with_one_model(model) -> None:
    y = torch.randn(1, CHANNELS, 8, 8) * 4
    model = copy.deepcopy(model)
    (portable,) = model.compress(y)
    with torch.no_grad():
        exact = model(y)[0]
        model.exact = False
        (plain,) = model.compress(y)
        real = model(y)[0]
    for setting in (True, False):
        model.exact = setting
        decoded = model.decompress([portable, plain], (8, 8))
        assert torch.equal(decoded, torch.cat([exact, real]))


def test_state_dicts_carry_the_integers(model) -> None:
    y = torch.randn(1, CHANNELS, 8, 8) * 4
    strings = model.compress(y)
    wanted = model.decompress(strings, (8, 8))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    loaded = MSPEntropyModel(CHANNELS, SIZES)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    again = made(seed=4)
    again.compress(y)  # its weights are packed by then
    again.load_state_dict(model.state_dict())
    for other in (loaded, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), made(0).double().float()):
        assert other.exact and other.eval().compress(y) == strings
        assert torch.equal(other.decompress(strings, (8, 8)), wanted)
    bare = {name: value for name, value in model.state_dict().items() if not name.startswith("integers.")}
    loaded.load_state_dict(bare)
    assert not loaded.exact and loaded.integers is None
    with pytest.raises(BitstreamError, match="portable profile, and this model no integer networks"):
        loaded.decompress(strings, (8, 8))


def test_training_goes_on_with_the_floats(model) -> None:
    twin, y = copy.deepcopy(model), torch.randn(1, CHANNELS, 8, 8)
    twin.register_module("integers", None)
    outputs = []
    for each in (copy.deepcopy(model).train(), twin.train()):
        torch.manual_seed(0)
        y_hat, likelihoods = each(y.clone().requires_grad_())
        likelihoods.log().sum().backward()
        outputs.append(
            [y_hat.detach(), likelihoods.detach(), *(p.grad for p in each.parameters() if p.grad is not None)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_weights_leave_no_sum_beyond_32_bits(model) -> None:
    from lic_fast.entropy._msp_integer import LIMIT, IntegerConv

    convs = [module for module in model.integers.modules() if isinstance(module, IntegerConv)]
    assert len(convs) == 10  # of the coarser grid, of five parts, and of two heads two each
    for conv in convs:
        most = conv.weight.long().abs().flatten(1).sum(1) * LIMIT + conv.bias.long().abs()
        assert int(most.max()) < 2**31 and bool((most * 4 >= 2**31).any())  # and no bit of them is wasted
        assert bool(((conv.shift >= 0) & (conv.shift < 31)).all())


@pytest.mark.parametrize("value", [1e9, -3e5, 70000.0])
def test_values_far_from_the_calibration_are_coded(model, value) -> None:
    y = torch.full((1, CHANNELS, 6, 6), value)
    y[0, 1, 2, 3] = -value
    with torch.no_grad():
        assert torch.equal(model.decompress(model.compress(y), (6, 6)), model(y)[0])


def test_damage_and_other_integers_are_refused(model) -> None:
    (data,) = model.compress(torch.randn(1, CHANNELS, 8, 8) * 4)
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :]):
            with pytest.raises(BitstreamError):
                model.decompress([damaged], (8, 8))
    other = copy.deepcopy(model)
    head = other.integers.heads[1].parameters_of
    head.bias[:, : head.bias.shape[1] // 2] += 4096 << int(head.shift[0])
    with pytest.raises(BitstreamError, match="parameters of grid 1 are not those of the encoder: other weights;"):
        other.decompress([data], (8, 8))


def test_what_cannot_be_made_portable_is_named() -> None:
    model = MSPEntropyModel(CHANNELS, SIZES)
    y = torch.randn(1, CHANNELS, 8, 8)
    with pytest.raises(ValueError, match="mixtures have no integer networks, got 2"):
        MSPEntropyModel(CHANNELS, SIZES, mixture=2).make_portable(y)
    with pytest.raises(ValueError, match=r"make_portable: y must be \[B, 5, H, W\]"):
        model.make_portable([y, y[:, :4]])
    with pytest.raises(ValueError, match="make_portable: y must be finite"):
        model.make_portable(y * math.nan)
    with pytest.raises(ValueError, match="make_portable: no latents"):
        model.make_portable([])
    with pytest.raises(TypeError, match="floating-point"):
        model.make_portable(y.int())
    assert model.integers is None and not model.exact
    with torch.no_grad():
        model.network.kernel[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the weights are not finite"):
        model.make_portable(y)
    assert model.integers is None and not model.exact


def test_latents_of_zeros_calibrate_too(model) -> None:
    other = copy.deepcopy(model)
    other.make_portable(torch.zeros(1, CHANNELS, 8, 8))
    y = torch.randn(1, CHANNELS, 8, 8) * 4
    with torch.no_grad():
        assert torch.equal(other.decompress(other.compress(y), (8, 8)), other(y)[0])


@pytest.mark.parametrize("shape", GOLDEN, ids=str)
def test_golden_streams_decode_forever(shape, threads) -> None:
    model, (stream, crc) = golden_model(), GOLDEN[shape]
    assert checksum(model.decompress([bytes.fromhex(stream)], shape)) == crc
    assert checksum(model.decompress(model.compress(golden_latent(*shape)), shape)) == crc
    with use_backend("reference"):
        assert checksum(model.decompress([bytes.fromhex(stream)], shape)) == crc


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden_streams_decode_on_a_gpu(backend) -> None:
    model, big = golden_model().cuda(), made(channels=24, profile="base")
    for shape, (stream, crc) in GOLDEN.items():
        with use_backend(backend):
            assert checksum(model.decompress([bytes.fromhex(stream)], shape).cpu()) == crc
    y = torch.randn(1, 24, 33, 18) * 4
    strings = big.compress(y)
    y_hat = big.decompress(strings, (33, 18))
    with use_backend(backend):
        assert big.cuda().compress(y.cuda()) == strings
        assert torch.equal(big.decompress(strings, (33, 18)).cpu(), y_hat)


@pytest.mark.parametrize("simd", ["generic", "avx2", "avx512"])
def test_golden_streams_decode_with_other_instructions(simd) -> None:
    if explain("integer_conv2d", "cpu").reasons["cpp"]:
        pytest.skip("no native library")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "decode_forever", __file__],
        env={**os.environ, "LIC_FAST_SIMD": simd}, cwd=Path(__file__).parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:]
