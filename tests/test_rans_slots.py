"""coding.Slots: decoders whose memory stays where it is, and what it holds is another container's."""

from __future__ import annotations

import pytest
import torch
from conftest import backend_parameters

import lic_fast
from lic_fast.coding import BitstreamError, Decoder, Encoder, Slots, constant_tables, mixture_parameters, mixture_tables
from lic_fast.functional import rans_check

SIZES = (40, 1, 300)


def coded(seed: int, *, wide: bool = False, lanes: int = 4):
    """(a decoder on the CPU, scales, symbols) of three steps; wide: with escape values, and longer."""
    g = torch.Generator().manual_seed(seed)
    steps, encoder = [], Encoder(constant_tables(), lanes=lanes)
    for n in SIZES:
        scales = torch.exp(torch.rand(n, generator=g) * 4 - 2)
        symbols = (torch.randn(n, generator=g) * scales).round().int() + wide * 100_000
        steps.append((scales, symbols))
        encoder.encode(symbols, scales)
    with lic_fast.use_backend("auto"):
        return Decoder(encoder.flush(), constant_tables()), steps


def decoded(slots: Slots, steps, device: str):
    decoder = slots.decoders[0]
    out = [decoder.decode(scales.to(device)).cpu() for scales, _ in steps]
    slots.finish_()
    rans_check(slots.heads())
    return out


@backend_parameters("rans_coder_decode_")
def test_other_containers_take_the_place(device: str, backend: str) -> None:
    made = [coded(0, wide=True), *(coded(seed) for seed in range(1, 4))]
    assert made[0][0].bytes > made[1][0].bytes
    slots = Slots([made[0][0]], device)
    places = [slots.decoders[0]._stream.data_ptr(), slots.decoders[0]._state.data_ptr()]
    with lic_fast.use_backend(backend):
        for decoder, steps in [*made, made[0], made[0]]:
            assert slots.fits([decoder])
            slots.load_([decoder])
            for ours, (_, symbols) in zip(decoded(slots, steps, device), steps, strict=True):
                assert torch.equal(ours, symbols)
        assert places == [slots.decoders[0]._stream.data_ptr(), slots.decoders[0]._state.data_ptr()]
        slots.load_([made[1][0]])
        with pytest.raises(BitstreamError):  # one step of three
            decoded(slots, made[1][1][:1], device)


@backend_parameters("rans_coder_decode_")
def test_two_containers_of_different_tables(device: str, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    integers = mixture_parameters(
        torch.ones(2, 50), torch.randn(2, 50, generator=g), torch.rand(2, 50), mixture_tables()
    )
    symbols = torch.randint(-3, 4, (50,), generator=g, dtype=torch.int32)
    encoder = Encoder(mixture_tables())
    encoder.encode(symbols, integers)
    second = Decoder(encoder.flush(), mixture_tables())
    first, steps = coded(5)
    slots = Slots([first, second], device, [first.bytes + 3, second.bytes])
    with lic_fast.use_backend(backend):
        assert torch.equal(slots.decoders[1].decode(integers.to(device)).cpu(), symbols)
        assert all(map(torch.equal, decoded(slots, steps, device), [symbols for _, symbols in steps]))


def test_what_does_not_fit_is_refused() -> None:
    short, _ = coded(1)
    long, _ = coded(1, wide=True)
    slots = Slots([short], "cpu")
    for others in ([long], [short, short], [coded(1, lanes=64)[0]], []):
        assert not slots.fits(others)
        with pytest.raises(ValueError, match=r"Slots.load_: containers that do not fit"):
            slots.load_(others)
    with pytest.raises(ValueError, match="do not fit"):
        Slots([long], "cpu", [long.bytes - 1])
    assert slots.fits([short])
