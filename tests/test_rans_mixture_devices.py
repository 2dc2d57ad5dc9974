"""Mixtures between devices: what one backend writes every other reads, bit for bit; and what only a GPU can show."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from conftest import backend_parameters
from hypothesis import given
from hypothesis import strategies as st
from rans_mixtures import extreme_floats, mixture, random_integers, random_mixture_case, random_mixture_tables
from rans_streams import EVERYONE, FEW_AT_RANDOM, INT_MAX, INT_MIN, NATIVE, ON_GPU, by_reference, running, split

import lic_fast
from lic_fast.coding import (
    BitstreamError,
    Decoder,
    Encoder,
    decode,
    decode_batch,
    encode,
    encode_batch,
    mixture_parameters,
    mixture_tables,
    rate_report,
)
from lic_fast.functional import rans_check, rans_decode_, rans_open, rans_reconstruct_

EVERY = pytest.mark.parametrize("name", EVERYONE)


@backend_parameters("rans_coder_encode")
def test_bytes_and_symbols_are_those_of_the_reference(device, backend):
    @FEW_AT_RANDOM
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        symbols, parameters, tables, lanes = random_mixture_case(seed, 900)
        expected = by_reference(symbols, parameters, tables, lanes=lanes)
        symbols, parameters = symbols.to(device), parameters.to(device)
        with lic_fast.use_backend(backend):
            assert encode(symbols, parameters, tables, lanes=lanes) == expected
            out = decode(expected, parameters, tables)
            assert out.device == parameters.device and torch.equal(out, symbols)
            sizes = split(seed, len(symbols))
            encoder = Encoder(tables, lanes=lanes)
            for step in zip(symbols.split(sizes), parameters.split(sizes, 1), strict=True):
                encoder.encode(*step)
            decoder = Decoder(encoder.flush(), tables, device=device)
            assert torch.equal(torch.cat([decoder.decode(part) for part in parameters.split(sizes, 1)]), symbols)
            decoder.finish()

    run()


@backend_parameters("rans_coder_mixture")
def test_parameters_are_those_of_the_reference(device, backend):
    @FEW_AT_RANDOM
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        g, t = random.Random(seed), torch.Generator().manual_seed(seed)
        n, k = g.choice([0, 1, 255, 256, 257, g.randint(0, 900)]), g.randint(1, 16)
        tables = g.choice([mixture_tables(), random_mixture_tables(g)])
        floats = [extreme_floats(g, t, (2, k, n)) for _ in range(3)]
        with running("reference"):
            expected = mixture_parameters(*floats, tables, dim=1)
        with lic_fast.use_backend(backend):
            ours = mixture_parameters(*(x.to(device) for x in floats), tables, dim=1)
        assert ours.device.type == device and torch.equal(ours.cpu(), expected)

    run()


@EVERY
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64, 1024])
def test_every_number_and_escape_of_every_number_of_components(name, lanes):
    t, g = torch.Generator().manual_seed(lanes), random.Random(lanes)
    edges = [-(1 << 20), -1, 0, 1, 2, 3, 500, 511, 1022, 1023, 1024, 1025, 70000]
    for k in range(1, 17) if name != "reference" else (1, 3, 16):
        tables, parameters = random_mixture_tables(g), random_integers(t, k, 12).repeat_interleave(len(edges), 1)
        shift = (parameters[1] >> 12 & 15).long()
        raw = torch.randint(1 << 15, shift.shape, generator=t) & ((1 << shift) - 1)
        symbols = parameters[0].long() + (torch.tensor(edges).repeat(12) << shift) + raw
        symbols = ((symbols + (1 << 31)) % (1 << 32) - (1 << 31)).int()
        symbols[::11] = torch.tensor([INT_MIN, INT_MAX]).int().repeat(100)[: len(symbols[::11])]
        expected = by_reference(symbols, parameters, tables, lanes=lanes)
        with running(name):
            assert encode(symbols, parameters, tables, lanes=lanes) == expected
            assert torch.equal(decode(expected, parameters, tables), symbols)


@backend_parameters("rans_coder_encode")
def test_batches(device, backend):
    """Of odd sizes, so that containers lie anywhere in memory; strided, too."""
    t, tables = torch.Generator().manual_seed(3), mixture_tables("logistic")
    for k in (1, 2, 3, 4, 9):
        parameters = torch.stack([random_integers(t, k, 201) for _ in range(5)]).view(5, 2 + 2 * k, 3, 67)
        symbols = parameters[:, 0] + torch.randint(-9, 1030, (5, 3, 67), generator=t).int()
        with running("reference"):
            expected = encode_batch(symbols, parameters, tables, lanes=64)
        own, apart = symbols.to(device), parameters.to(device).movedim(1, -1).contiguous().movedim(-1, 1)
        with lic_fast.use_backend(backend):
            assert encode_batch(own, apart, tables, lanes=64) == expected
            assert torch.equal(decode_batch(expected, apart, tables).cpu(), symbols)


@backend_parameters("rans_coder_encode")
def test_damage_comes_to_the_same_end(device, backend):
    g = random.Random(5)

    def outcome(data, parameters, tables, name):
        with lic_fast.use_backend(name):
            try:
                return decode(data, parameters, tables, check=False).cpu()
            except BitstreamError as error:
                return str(error).split(": ", 1)[1]

    refused = 0
    for case in range(150):
        symbols, parameters, tables, lanes = random_mixture_case(g.randrange(10**6), 150)
        data = bytearray(by_reference(symbols, parameters, tables, lanes=lanes))
        for _ in range(g.choice([1, 2, 8])):
            data[g.randrange(len(data))] = g.choice([0, 1, 127, 255, g.randrange(256)])
        expected = outcome(bytes(data), parameters, tables, "reference")
        ours = outcome(bytes(data), parameters.to(device), tables, backend)
        same = torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected
        assert same, f"mutation {case}: {ours}, not {expected}"
        refused += isinstance(expected, str)
    assert refused > 50


def spoilt(parameters):
    """One word of one element beyond each of the limits."""
    for plane, change in [(1, -(1 << 12)), (1, 1024), (2, 1 << 22), (4, -(1 << 22)), (3, 1 << 16), (5, -(1 << 16))]:
        words = parameters.clone()
        words[plane, 77] = (words[plane, 77] & ~0xFFF) | (change & 0xFFF) if plane == 1 else words[plane, 77] + change
        yield words


@backend_parameters("rans_coder_encode")
def test_integers_beyond_their_limits_are_refused(device, backend):
    symbols, *floats = mixture(300)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    assert bool((parameters[3::2, 77] >> 16).min() >= 1)
    stream = encode(symbols, parameters, tables, lanes=32)
    text = "parameters have weights, ranges or means that mixture_parameters never gives"
    with lic_fast.use_backend(backend):
        for words in (w.to(device) for w in spoilt(parameters)):
            with pytest.raises(ValueError, match=text):
                encode(symbols.to(device), words, tables)
            with pytest.raises(ValueError, match=text):
                decode(stream, words, tables)
        with pytest.raises(BitstreamError, match=r"runs out|do not end where"):
            decode(stream, parameters.to(device).flip(1), tables)


@EVERY
def test_every_lane_is_looked_at(name):
    """In any lane, of rows that are full or not, and in none that rests."""
    symbols, *floats = mixture(70)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    stream = encode(symbols, parameters, tables, lanes=32)
    for at in (0, 1, 31, 32, 63, 64, 69):
        words = parameters.clone()
        words[1, at] &= ~0xFFF
        with running(name), pytest.raises(ValueError, match="never gives"):
            decode(stream, words, tables)
        with running(name), pytest.raises(ValueError, match="never gives"):
            encode(symbols, words, tables, lanes=32)


def test_eight_threads_at_once():
    failures = []

    def work(seed):
        for i in range(4):
            symbols, *floats = mixture(20_000 if NATIVE else 300, seed=seed * 100 + i)
            parameters = mixture_parameters(*floats, mixture_tables())
            stream = encode(symbols, parameters, mixture_tables(), lanes=64)
            if not torch.equal(decode(stream, parameters, mixture_tables()), symbols):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_single_symbol_and_strided_inputs():
    symbols, *floats = mixture(1000)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    apart = parameters.view(8, 20, 50).transpose(1, 2)
    turned = symbols.view(20, 50).t()
    stream = encode(turned, apart, tables)
    assert stream == encode(turned.contiguous(), apart.contiguous(), tables)
    assert torch.equal(decode(memoryview(stream), apart, tables), turned)
    strided = mixture_parameters(*(x.view(3, 20, 50).transpose(1, 2) for x in floats), tables)
    assert torch.equal(strided, apart)
    one, own = symbols[7], parameters[:, 7]
    assert decode(encode(one, own, tables), own, tables) == one


def test_mixtures_are_not_reconstructed():
    symbols, *floats = mixture(10)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    stream = torch.frombuffer(bytearray(encode(symbols, parameters, tables)), dtype=torch.uint8)
    state = rans_open(stream, tables.packed)
    with pytest.raises(ValueError, match="tables of levels are needed, got those of mixtures"):
        rans_reconstruct_([stream], [state], parameters[None], tables.packed, None, torch.zeros(1, 10), last=True)


@ON_GPU
def test_parameters_and_steps_inside_a_cuda_graph():
    """From floats to symbols, captured once: it decodes every stream of its shape."""
    tables, drawn = mixture_tables(), [mixture(6000, seed=i) for i in range(3)]
    device = torch.device("cuda", torch.cuda.current_device())
    packed = tables.packed_on(device)
    made = []
    for symbols, *floats in drawn:
        parameters, encoder = mixture_parameters(*floats, tables), Encoder(tables, lanes=64)
        for step in zip(symbols.split(2000), parameters.split(2000, 1), strict=True):
            encoder.encode(*step)
        data = torch.frombuffer(bytearray(encoder.flush()), dtype=torch.uint8)
        made.append((data, rans_open(data, tables.packed)))
    for (data, state), (symbols, *floats) in zip(made, drawn, strict=True):
        stream, start, own = data.to(device), state.to(device), [x.to(device) for x in floats]
        current = start.clone()

        def steps(stream=stream, current=current, own=own):
            parts = mixture_parameters(*own, tables).split(2000, 1)
            return [rans_decode_([stream], [current], parts[i][None], packed, last=i == 2) for i in range(3)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = steps()
        for _ in range(2):
            current.copy_(start)
            graph.replay()
            rans_check([current])
            assert torch.equal(torch.cat(out, 1)[0].cpu(), symbols)
        graph.replay()  # from where nothing is left
        with pytest.raises(BitstreamError):
            rans_check([current])


@ON_GPU
def test_steps_wait_for_nothing():
    tables = mixture_tables()
    symbols, *floats = mixture(5000)
    encoder = Encoder(tables)
    encoder.encode(symbols, mixture_parameters(*floats, tables))
    decoder, own = Decoder(encoder.flush(), tables, device="cuda"), [x.cuda() for x in floats]
    mixture_parameters(*own, tables)  # loads what is loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = decoder.decode(mixture_parameters(*own, tables))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    decoder.finish()
    assert torch.equal(out.cpu(), symbols)


@ON_GPU
@pytest.mark.parametrize("components", [1, 2, 3, 4, 7])
def test_many_symbols_on_a_gpu(components):
    tables = mixture_tables()
    symbols, *floats = mixture(300_000, components)
    parameters = mixture_parameters(*(x.cuda() for x in floats), tables)
    assert torch.equal(parameters.cpu(), mixture_parameters(*floats, tables))
    stream = encode(symbols.cuda(), parameters, tables, lanes=2048)
    assert stream == encode(symbols, parameters.cpu(), tables, lanes=2048)
    assert torch.equal(decode(stream, parameters, tables).cpu(), symbols)
    assert rate_report(symbols.cuda(), parameters, tables, stream).stream_bits == 8 * len(stream)
