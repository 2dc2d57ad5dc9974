"""rans_reconstruct_: a step's symbols plus means, written where they belong, on every device and implementation."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rans_streams import EVERYONE, NATIVE, VARIANTS, random_case, running, split

import lic_fast
from lic_fast.coding import BitstreamError, Decoder, Encoder, constant_tables
from lic_fast.functional import rans_check, rans_encode, rans_open, rans_pack, rans_reconstruct_
from lic_fast.ops import rans_coder as op

EVERY = pytest.mark.parametrize("name", EVERYONE)


def opened(symbols, scales, device="cpu", **options):
    """(streams, states, packed) of a batch, on a device."""
    packed = constant_tables().packed
    data, lengths = rans_encode(symbols, scales, packed, **options)
    streams = list(data.split(lengths.tolist()))
    states = [rans_open(stream.clone(), packed) for stream in streams]
    return [s.to(device) for s in streams], [s.to(device) for s in states], packed.to(device)


def latents(batch, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.rand(batch, n, generator=g) * 6 - 2.2)
    symbols = (torch.randn(batch, n, generator=g) * scales).round().int()
    symbols[:, ::97] = 70_000_001  # an escape, and more bits than fp32 has
    return symbols, scales, torch.randn(batch, n, generator=g) * 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_every_implementation_writes_the_same_values(seed):
    symbols, indexes, tables, lanes, skip = random_case(seed, 700)
    n, g = len(symbols), torch.Generator().manual_seed(seed)
    means = torch.randn(n, generator=g) * 10.0 ** int(torch.randint(-3, 6, (), generator=g))
    order, sizes = torch.randperm(n, generator=g).int(), split(seed, n)
    encoder = Encoder(tables, lanes=lanes, skip=skip)
    for places in order.split(sizes):
        encoder.encode(symbols[places.long()], indexes[places.long()])
    stream = encoder.flush()
    expected = symbols.float() + means
    for name in EVERYONE:
        with running(name):
            decoder, values = Decoder(stream, tables), torch.full((n,), torch.nan)
            for places in order.split(sizes):
                decoder.reconstruct_(indexes, means, values, places=places)
            decoder.finish()
            assert torch.equal(values, expected), name


@backend_parameters("rans_coder_reconstruct_")
@pytest.mark.parametrize("means_given", [True, False])
@pytest.mark.parametrize("lanes", [1, 32, 128])
def test_a_batch_of_whole_latents(device, backend, means_given, lanes):
    symbols, scales, means = latents(3, 500)
    streams, states, packed = opened(symbols, scales, device, lanes=lanes)
    own = means.to(device) if means_given else None
    values = torch.full(scales.shape, torch.nan, device=device)
    with lic_fast.use_backend(backend):
        out = rans_reconstruct_(streams, states, scales.to(device), packed, own, values, last=True)
    rans_check(states)
    assert out is values
    assert torch.equal(values.cpu(), symbols.float() + means if means_given else symbols.float())


@backend_parameters("rans_coder_reconstruct_")
def test_a_checkerboard_in_two_steps(device, backend):
    """Anchors first, then the rest from parameters that hang on them; what is not of the step stays as it was."""
    symbols, scales, means = latents(1, 24)
    symbols, scales, means = (x.view(1, 4, 6) for x in (symbols, scales, means))
    places = torch.arange(24, dtype=torch.int32).view(4, 6)
    anchor = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    steps = [places[anchor], places[~anchor]]
    encoder = Encoder(constant_tables())
    for step in steps:
        encoder.encode(symbols.flatten()[step.long()], scales.flatten()[step.long()])
    with lic_fast.use_backend(backend):
        decoder = Decoder(encoder_flush(encoder), constant_tables(), device=device)
        values = torch.full((1, 4, 6), 9.5, device=device)
        decoder.reconstruct_(scales.to(device), means.to(device), values, places=steps[0].to(device))
        assert bool((values[0, ~anchor] == 9.5).all())
        decoder.reconstruct_(scales.to(device), means.to(device), values, places=steps[1].to(device))
        decoder.finish()
    assert torch.equal(values.cpu(), symbols.float() + means)


def encoder_flush(encoder):
    with lic_fast.use_backend("auto"):
        return encoder.flush()


@backend_parameters("rans_coder_reconstruct_")
def test_what_is_wrong_is_said_and_nothing_else_is_written(device, backend):
    symbols, scales, means = latents(2, 300)
    for change, kind, text in [
        ("place", ValueError, "a place outside the values"),
        ("negative place", ValueError, "a place outside the values"),
        ("index", ValueError, "an index is outside the tables"),
        ("scales", BitstreamError, "runs out|do not end where the stream does"),
        ("too few", BitstreamError, "do not end where the stream does"),
        ("too many", BitstreamError, "runs out|do not end where the stream does"),
    ]:
        streams, states, packed = opened(symbols, scales, device)
        guarded = torch.full((4, 300), 9.5, device=device)
        values, indexes, places = guarded[1:3], scales, torch.arange(300, dtype=torch.int32)
        if change == "place":
            places[17] = 300
        elif change == "negative place":
            places[299] = -1
        elif change == "index":
            indexes = op_levels(scales)
            indexes[1, 4] = 244
        elif change == "scales":
            indexes = scales * 1.7
        elif change == "too few":
            places = places[:-1]
        else:
            places = torch.cat([places, places[:1]])
        with lic_fast.use_backend(backend), pytest.raises(kind, match=text):
            rans_reconstruct_(
                streams, states, indexes.to(device), packed, means.to(device), values, places=places.to(device),
                last=True,
            )  # fmt: skip
            rans_check(states)
        assert bool((guarded[::3] == 9.5).all()), change


def op_levels(scales):
    return ((scales.view(torch.int32) >> 19) - 1980).clamp(0, 243)


def test_wrong_arguments():
    symbols, scales, means = latents(1, 10)
    streams, states, packed = opened(symbols, scales)
    values, places = torch.zeros(1, 10), torch.arange(10, dtype=torch.int32)

    def call(indexes=scales, means=means, values=values, places=places):
        rans_reconstruct_(streams, states, indexes, packed, means, values, places=places, last=True)

    for kind, text, arguments in [
        (TypeError, "values must be one of float32", {"values": values.double()}),
        (TypeError, "means must be one of float32", {"means": means.half()}),
        (TypeError, "indexes must be one of int32, uint8, float32", {"indexes": scales.double()}),
        (TypeError, "places must be one of int32", {"places": places.long()}),
        (ValueError, r"places must be \[n\]", {"places": places[None]}),
        (ValueError, "indexes must have the shape of values", {"indexes": scales[:, :9]}),
        (ValueError, "values must be contiguous", {"values": torch.zeros(10, 2).t()[:1]}),
        (ValueError, "values and means share memory", {"means": values}),
        (ValueError, "1 samples need as many streams", {"values": values}),
    ]:
        with pytest.raises(kind, match=text):
            call(**arguments) if "1 samples" not in text else rans_reconstruct_(
                [], [], scales, packed, means, values, last=True
            )
    no_ladder = rans_pack(without_ladder())
    with pytest.raises(ValueError, match="no ladder for scales"):
        rans_reconstruct_(streams, states, scales, no_ladder, means, values, last=True)
    assert rans_reconstruct_([], [], scales[:0], packed, None, values[:0], last=True).shape == (0, 10)
    rans_check([])
    with pytest.raises(ValueError, match="must be a contiguous tensor"):
        encoder = Encoder(constant_tables())
        Decoder(encoder.flush(), constant_tables()).reconstruct_(scales, None, torch.zeros(10, 2).t()[:1])


def without_ladder():
    data = bytearray(constant_tables().serialized)
    data[16:20] = b"\xff" * 4
    return bytes(data)


@EVERY
def test_opcheck(name):
    symbols, scales, means = latents(2, 60)
    streams, states, packed = opened(symbols, scales)
    places = torch.randperm(60).int()
    with running(name):
        arguments = (streams, states, scales, packed, means, places, torch.zeros(2, 60), False)
        torch.library.opcheck(torch.ops.lic_fast.rans_coder_reconstruct_, arguments)


@pytest.mark.skipif(not NATIVE, reason="the C++ library is not built")
def test_the_warp_of_a_gpu_is_among_the_implementations():
    assert 5 in VARIANTS and EVERYONE[-1] == "a GPU's, in lockstep" and op.VARIANT == 0
