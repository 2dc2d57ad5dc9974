"""compress() and decompress() of lic_fast.entropy in lic_fast's own format, beside CompressAI's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("compressai")

from compressai import entropy_models as stock
from compressai import zoo
from compressai.models.base import get_scale_table

import lic_fast
from lic_fast import coding, entropy
from lic_fast.coding import BitstreamError

OURS = {"format": "lic_fast"}
HEADER = 80  # bytes: what a container of up to 32 lanes has beside its symbols


def bottleneck(channels=6, seed=1):
    torch.manual_seed(seed)
    made = entropy.EntropyBottleneck(channels)
    with torch.no_grad():
        for values in (*made.matrices, *made.biases, *made.factors):
            values.add_(0.3 * torch.randn_like(values))
    made.solve_quantiles()
    return made.eval()


def latent(shape, widest=8.0, seed=3):
    g = torch.Generator().manual_seed(seed)
    scales = torch.exp(
        torch.log(torch.tensor(0.11)) + torch.rand(shape, generator=g) * torch.log(torch.tensor(widest / 0.11))
    )
    means = torch.randn(shape, generator=g)
    return means + scales * torch.randn(shape, generator=g), scales, means


SHAPES = [(2, 4, 3, 5), (1, 4), (3, 4, 2), (1, 4, 1, 2, 2), (0, 4, 2, 2), (2, 4, 0, 2), (1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["scales", "indexes", "uint8", "int64", "float64"])
def test_gaussian_round_trip(shape, kind):
    """Batches, no symbol, one symbol; what comes back is what quantisation by CompressAI gives, with means or not."""
    model = entropy.GaussianConditional(None)
    y, scales, means = latent(shape)
    levels = model.scale_indexes(scales)
    assert levels.dtype is torch.int32 and levels.shape == scales.shape
    indexes = {
        "scales": scales, "indexes": levels, "uint8": levels.to(torch.uint8), "int64": levels.long(),
        "float64": scales.double(),
    }[kind]  # fmt: skip
    for given in (None, means):
        streams = model.compress(y, indexes, given, **OURS)
        assert len(streams) == len(y) and all(isinstance(stream, bytes) for stream in streams)
        assert streams == model.compress(y, scales, given, **OURS)
        back = model.decompress(streams, indexes, means=given, **OURS)
        assert torch.equal(back, model.quantize(y, "dequantize", given)) and back.dtype is y.dtype
    assert model._quantized_cdf.numel() == 0, "constant tables need none of CompressAI's"
    assert model.decompress(streams, indexes, torch.float64, **OURS).dtype is torch.float64


def test_symbols_are_those_of_compressais_format():
    """Strided inputs, means of one pixel, and values far outside of any table."""
    model = entropy.GaussianConditional(None)
    y, scales, means = latent((2, 5, 8, 6))
    y[0, 0, 0] *= 1e5
    y[1, 2] -= 70000
    y, scales = (t.to(memory_format=torch.channels_last) for t in (y, scales))
    for given in (None, means, means[:, :, :1, :1]):
        theirs = model.build_indexes(scales)
        a = model.decompress(model.compress(y, theirs, given), theirs, means=given)
        b = model.decompress(model.compress(y, scales, given, **OURS), scales, means=given, **OURS)
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale_bound", [0.11, 0.5, 3.7])
def test_the_bound_on_scales_holds(scale_bound):
    model = entropy.GaussianConditional(None, scale_bound=scale_bound)
    scales = torch.exp(torch.linspace(-5, 5, 4000))[None]
    y = torch.round(scales * torch.randn(scales.shape, generator=torch.Generator().manual_seed(1)))
    expected = coding.scale_indexes(scales.clamp(min=scale_bound))
    assert torch.equal(model.scale_indexes(scales), expected)
    assert torch.equal(model.scale_indexes(scales.double()), expected)
    assert torch.equal(
        model.scale_indexes(scales.half()), coding.scale_indexes(scales.half().float().clamp(scale_bound))
    )
    streams = model.compress(y, scales, **OURS)
    assert streams == model.compress(y, expected, **OURS)
    assert torch.equal(model.decompress(streams, scales, **OURS), y)


def test_sizes_beside_compressais():
    model, theirs = entropy.GaussianConditional(None), stock.GaussianConditional(None)
    theirs.update_scale_table(get_scale_table())
    large, medium, small, smallest = (1, 320, 32, 48), (1, 192, 16, 16), (1, 4, 5, 5), (1, 2, 1, 1)
    for widest in (1.0, 8.0, 64.0):
        for shape, most in ((large, -1), (medium, HEADER), (small, HEADER), (smallest, HEADER)):
            y, scales, means = latent(shape, widest)
            (a,) = model.compress(y, scales, means, **OURS)
            (b,) = theirs.compress(y, theirs.build_indexes(scales), means)
            assert len(a) <= len(b) + most, f"{shape}: {len(a)} bytes, CompressAI {len(b)}"
    model = trained_bottleneck()
    z = sample_of(model, (1, 32, 40, 40))
    (a,), (b,) = model.compress(z, **OURS), model.compress(z)
    assert len(a) <= len(b) * 1.002 + HEADER, f"bottleneck: {len(a)} bytes, CompressAI {len(b)}"


def trained_bottleneck():
    """Densities of many widths, from 13 to 3,300 symbols."""
    model = bottleneck(32)
    with torch.no_grad():
        model.matrices[0].add_(torch.linspace(-2, 6, 32)[:, None, None])
    model.solve_quantiles()
    return model


def sample_of(model, shape):
    """Latents drawn from the density by bisection of its cumulative."""
    g = torch.Generator().manual_seed(5)
    c = shape[1]
    target = torch.logit(torch.rand((c, 1, shape[2] * shape[3]), generator=g).clamp(1e-7, 1 - 1e-7))
    low, high = torch.full_like(target, -1e4), torch.full_like(target, 1e4)
    with torch.no_grad():
        for _ in range(60):
            middle = (low + high) / 2
            below = model._logits_cumulative(middle, stop_gradient=True) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low.view(c, *shape[2:])[None]


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 6), (3, 6, 2), (1, 6, 1, 2, 2), (0, 6, 2, 2), (2, 6, 0, 2)])
@pytest.mark.parametrize("size", [1.0, 1000.0, 1e6])
def test_bottleneck_round_trip(shape, size):
    model, z = bottleneck(), size * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    streams = model.compress(z, **OURS)
    back = model.decompress(streams, shape[2:], **OURS)
    assert back.shape == z.shape and torch.equal(back, model(z)[0])
    assert torch.equal(back, model.decompress(model.compress(z), shape[2:]))


def test_bottleneck_of_more_than_256_channels_and_of_one():
    for channels in (1, 300):
        model, z = bottleneck(channels), torch.randn(2, channels, 2, 3, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model.decompress(model.compress(z, **OURS), (2, 3), **OURS), model(z)[0])


def test_tables_are_made_of_the_integers_in_the_state_dict():
    """Counts moved in the stored table change the set; the parameters, to their last bits, do not matter."""
    model, z = bottleneck(), torch.randn(1, 6, 4, 4)
    model.update()
    other = bottleneck(seed=2)
    other.update()
    assert model._lic_fast_tables() != other._lic_fast_tables()
    other.load_state_dict(model.state_dict())
    for values in (*other.matrices, *other.biases, *other.factors):  # another machine's arithmetic
        values.data.mul_(1 + 1e-6)
    other._lic_fast_stamp()
    assert other.compress(z, **OURS) == model.compress(z, **OURS)
    row = model._quantized_cdf[0]
    row[2 - model._offset[0] :][:2] -= 300  # of these two ends one is also that of a pair of symbols
    assert bool((row[: model._cdf_length[0]].diff() > 0).all())
    assert model._lic_fast_tables() != other._lic_fast_tables()
    (stream,) = model.compress(z, **OURS)
    with pytest.raises(BitstreamError, match="was made with the tables"):
        other.decompress([stream], (4, 4), **OURS)


def test_tables_follow_the_parameters_and_are_kept_otherwise():
    model, z = bottleneck(), torch.randn(1, 6, 4, 4)
    before = model._lic_fast_tables()
    assert model._lic_fast_tables() is before
    assert copy.deepcopy(model)._lic_fast_tables() == pickle.loads(pickle.dumps(model))._lic_fast_tables() == before
    assert model.double().float()._lic_fast_tables() == before
    (stream,) = model.compress(z, **OURS)
    model.biases[2].data.add_(0.5)
    assert model._lic_fast_tables() != before
    with pytest.raises(BitstreamError, match="was made with the tables"):
        model.decompress([stream], (4, 4), **OURS)
    gaussian = pickle.loads(pickle.dumps(copy.deepcopy(entropy.GaussianConditional(None))))
    y, scales, means = latent((1, 3, 4, 4))
    assert torch.equal(
        gaussian.decompress(gaussian.compress(y, scales, means, **OURS), scales, means=means, **OURS),
        gaussian.quantize(y, "dequantize", means),
    )


def test_checkpoints_go_both_ways():
    """Through files, strictly, into CompressAI's models and back: the streams stay the same."""
    model = zoo.bmshj2018_hyperprior(1, pretrained=False).eval()
    model.update()
    lic_fast.accelerate(model)
    keys = set(model.state_dict())
    z = torch.randn(1, 128, 3, 3)
    streams = model.entropy_bottleneck.compress(z, **OURS)
    assert set(model.state_dict()) == keys
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    theirs = zoo.bmshj2018_hyperprior(1, pretrained=False).eval()
    theirs.load_state_dict(state, strict=True)
    assert theirs.entropy_bottleneck.compress(z) == model.entropy_bottleneck.compress(z)
    again = zoo.bmshj2018_hyperprior(1, pretrained=False).eval()
    lic_fast.accelerate(again)
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert again.entropy_bottleneck.compress(z, **OURS) == streams
    lic_fast.accelerate(theirs)
    assert theirs.entropy_bottleneck.compress(z, **OURS) == streams
    lic_fast.restore(theirs)
    assert not any(name.startswith("_lic_fast") for name in theirs.entropy_bottleneck.__dict__)


def test_rows_that_are_no_distributions_are_refused():
    model = bottleneck()
    model.update()
    model._quantized_cdf[0, 1] = 40000
    with pytest.raises(ValueError, match="probabilities must be 0 at least"):
        model.compress(torch.randn(1, 6, 2, 2), **OURS)


def test_wrong_formats_and_streams():
    gaussian, z_model = entropy.GaussianConditional(None), bottleneck()
    y, scales, means = latent((2, 3, 4, 4))
    z = torch.randn(2, 6, 4, 4)
    for call in (
        lambda: gaussian.compress(y, scales, format="other"),
        lambda: gaussian.decompress([b""] * 2, scales, format="other"),
        lambda: z_model.compress(z, format=None),
        lambda: z_model.decompress([b""] * 2, (4, 4), format="LIC_FAST"),
    ):
        with pytest.raises(ValueError, match=r"unknown format, got .*; use one of compressai, lic_fast"):
            call()
    theirs = gaussian.compress(y, gaussian.build_indexes(scales), means)
    streams = gaussian.compress(y, scales, means, **OURS)
    wrong = [
        (theirs, scales, "not a lic_fast stream"),
        ([stream[:-1] for stream in streams], scales, "truncated"),
        ([bytes([*stream[:-9], stream[-9] ^ 1, *stream[-8:]]) for stream in streams], scales, "CRC-32C does not match"),
        (streams, scales * 1.2, "runs out|do not end"),
        (streams, gaussian.build_indexes(scales), "runs out|do not end"),
        (streams, scales[:, :, :2], r"holds \[3, 4, 4\], the indexes are \[3, 2, 4\]"),
        (z_model.compress(z, **OURS), scales, "was made with the tables"),
    ]
    for given, indexes, text in wrong:
        with pytest.raises(BitstreamError, match=text):
            gaussian.decompress(given, indexes, **OURS)
    with pytest.raises(BitstreamError, match="not a lic_fast stream"):
        z_model.decompress(z_model.compress(z), (4, 4), **OURS)
    with pytest.raises(BitstreamError, match="the indexes are"):
        z_model.decompress(z_model.compress(z, **OURS), (4, 5), **OURS)
    with pytest.raises(TypeError, match="a stream is bytes"):
        gaussian.decompress(["text"] * 2, scales, **OURS)
    with pytest.raises(ValueError, match=r"indexes must be in \[0, 244\)"):
        gaussian.compress(y, torch.full(y.shape, 244), **OURS)
    with pytest.raises(ValueError, match="same size"):
        gaussian.compress(y, scales[:1], **OURS)
    with pytest.raises(TypeError, match="must be an fp32 tensor"):
        gaussian.scale_indexes(torch.ones(3, dtype=torch.int32))


def mixed(batch=2, channels=3, k=3, sides=(5, 4), seed=4):
    """(y [B, C, *], scales, means, weights [B, K * C, *])"""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, k, channels, *sides)
    scales, means = 0.05 + 6 * torch.rand(shape, generator=g) ** 2, 4 * torch.randn(shape, generator=g)
    weights = torch.softmax(torch.randn(shape, generator=g), 1)
    y = means[:, 0] + scales[:, 0] * torch.randn(batch, channels, *sides, generator=g)
    return y, *(t.flatten(1, 2) for t in (scales, means, weights))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_mixtures_come_back(k, batch):
    model = entropy.GaussianMixtureConditional(k)
    y, *floats = mixed(batch, k=k)
    if batch:
        y[0, 1] = 0  # a channel that CompressAI's format leaves out
        y[0, 0, 0, 0] = 1e6  # an escape
    coded, rounded = model.compress(y, *floats, **OURS)
    assert torch.equal(rounded, y.round())
    back = model.decompress(*coded, *floats, **OURS)
    assert back.dtype == torch.float32
    assert torch.equal(back, y.round())


def test_mixtures_cost_what_their_likelihoods_say():
    model = entropy.GaussianMixtureConditional(3).eval()
    y, *floats = mixed(1, 48, sides=(32, 32))
    _, likelihoods = model(y, *floats)
    (strings, *_), _ = model.compress(y, *floats, **OURS)
    ideal = -likelihoods.log2().sum().item() / 8
    assert ideal - 4 < len(strings[0]) < 1.001 * ideal + HEADER + 32


def test_mixtures_bound_scales_as_the_likelihood_does():
    model = entropy.GaussianMixtureConditional(2)
    y, scales, means, weights = mixed(1, k=2)
    small, bound = torch.full_like(scales, 1e-3), torch.full_like(scales, 0.11)
    coded = [model.compress(y, s, means, weights, **OURS)[0][0] for s in (small, bound)]
    assert coded[0] == coded[1]


def test_bad_mixtures():
    model = entropy.GaussianMixtureConditional(2)
    y, *floats = mixed(1, k=2)
    (strings, abs_max, bitmap), _ = model.compress(y, *floats, **OURS)
    with pytest.raises(ValueError, match="a list of streams"):
        model.decompress(strings[0], abs_max, bitmap, *floats, **OURS)
    with pytest.raises(BitstreamError, match="truncated"):
        model.decompress([strings[0][:-3]], abs_max, bitmap, *floats, **OURS)
    with pytest.raises(ValueError, match="unknown format"):
        model.compress(y, *floats, format="other")
    with pytest.raises(ValueError, match="1 to 16 components"):
        y, *floats = mixed(1, k=17)
        entropy.GaussianMixtureConditional(17).compress(y, *floats, **OURS)


def test_compressais_format_is_the_default():
    model, theirs = entropy.GaussianConditional(None), stock.GaussianConditional(None)
    theirs.update_scale_table(get_scale_table())
    y, scales, means = latent((2, 3, 4, 4))
    indexes = theirs.build_indexes(scales)
    expected = theirs.compress(y, indexes, means)
    assert model.compress(y, indexes, means) == model.compress(y, indexes, means, format="compressai") == expected
