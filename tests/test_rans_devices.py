"""Streams between devices: what one backend writes every other reads, bit for bit; and what only a GPU can show."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import backend_parameters
from hypothesis import given
from hypothesis import strategies as st
from rans_streams import FEW_AT_RANDOM, INT_MAX, INT_MIN, ON_GPU, by_reference, random_case, running, split

import lic_fast
from lic_fast.coding import (
    BitstreamError,
    Decoder,
    Encoder,
    constant_tables,
    decode,
    decode_batch,
    encode,
    encode_batch,
    factorized_tables,
    rate_report,
)
from lic_fast.functional import rans_check, rans_decode_, rans_open
from lic_fast.reference._rans_container import crc32c


@backend_parameters("rans_coder_encode")
def test_bytes_and_symbols_are_those_of_the_reference(device, backend):
    @FEW_AT_RANDOM
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        symbols, indexes, tables, lanes, skip = random_case(seed, 900)
        expected = by_reference(symbols, indexes, tables, lanes=lanes, skip=skip)
        symbols, indexes = symbols.to(device), indexes.to(device)
        with lic_fast.use_backend(backend):
            assert encode(symbols, indexes, tables, lanes=lanes, skip=skip) == expected
            out = decode(expected, indexes, tables)
            assert out.device == indexes.device and torch.equal(out, symbols)
            sizes = split(seed, len(symbols))
            encoder = Encoder(tables, lanes=lanes, skip=skip)
            for step in zip(symbols.split(sizes), indexes.split(sizes), strict=True):
                encoder.encode(*step)
            decoder = Decoder(encoder.flush(), tables, device=device)
            assert torch.equal(torch.cat([decoder.decode(part) for part in indexes.split(sizes)]), symbols)
            decoder.finish()

    run()


@backend_parameters("rans_coder_encode")
def test_every_level_and_escape(device, backend):
    tables = constant_tables()
    edges = [0, 1, -1, 5, -7, 64, 65, -65, 127, -129, 2**15, -(2**15) - 1, 2**30, INT_MIN, INT_MAX]
    indexes = torch.arange(len(tables), dtype=torch.int32).repeat_interleave(len(edges))
    symbols = torch.tensor(edges, dtype=torch.int32).repeat(len(tables))
    for lanes in (1, 8, 32, 1024):
        expected = by_reference(symbols, indexes, tables, lanes=lanes)
        for own in (indexes.to(device), indexes.to(device, torch.uint8)):
            with lic_fast.use_backend(backend):
                assert encode(symbols.to(device), own, tables, lanes=lanes) == expected
                assert torch.equal(decode(expected, own, tables).cpu(), symbols)


@backend_parameters("rans_coder_encode")
def test_batches(device, backend):
    """Of odd sizes, so that containers lie anywhere in memory; with tables that shared memory does not hold, too."""
    g = torch.Generator().manual_seed(3)
    wide = torch.ones(900, 200, dtype=torch.float64) / 200
    large = factorized_tables(wide, torch.full((900,), -100))
    for tables, indexes in [
        (constant_tables(), torch.exp(torch.rand(5, 3, 67, generator=g) * 5 - 2)),
        (large, torch.randint(900, (5, 3, 67), generator=g, dtype=torch.int32)),
    ]:
        symbols = torch.randint(-99, 99, indexes.shape, generator=g, dtype=torch.int32)
        with running("reference"):
            expected = encode_batch(symbols, indexes, tables, lanes=64)
        with lic_fast.use_backend(backend):
            assert encode_batch(symbols.to(device), indexes.to(device), tables, lanes=64) == expected
            assert torch.equal(decode_batch(expected, indexes.to(device), tables).cpu(), symbols)


@backend_parameters("rans_coder_encode")
def test_damage_comes_to_the_same_end(device, backend):
    g = random.Random(5)

    def outcome(data, indexes, tables, name):
        with lic_fast.use_backend(name):
            try:
                return decode(data, indexes, tables, check=False).cpu()
            except BitstreamError as error:
                return str(error).split(": ", 1)[1]

    refused = 0
    for case in range(150):
        symbols, indexes, tables, lanes, skip = random_case(g.randrange(10**6), 150)
        data = bytearray(by_reference(symbols, indexes, tables, lanes=lanes, skip=skip))
        for _ in range(g.choice([1, 2, 8])):
            data[g.randrange(len(data))] = g.choice([0, 1, 127, 255, g.randrange(256)])
        expected = outcome(bytes(data), indexes, tables, "reference")
        ours = outcome(bytes(data), indexes.to(device), tables, backend)
        same = torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected
        assert same, f"mutation {case}: {ours}, not {expected}"
        refused += isinstance(expected, str)
    assert refused > 50


@backend_parameters("rans_coder_encode")
def test_wrong_arguments_are_refused(device, backend):
    tables = constant_tables()
    scales = torch.full((40,), 0.11, device=device)
    symbols = torch.ones(40, dtype=torch.int32, device=device)
    with lic_fast.use_backend(backend):
        spread = torch.arange(400, dtype=torch.int32, device=device) % 7 - 3
        stream, own = encode(spread, spread * 0.0 + 2.0, tables), spread * 0
        for kind, text, call in [
            (ValueError, r"indexes must be in \[0, 244\), got 244", lambda: encode(symbols, symbols + 243, tables)),
            (ValueError, r"indexes must be in \[0, 244\), got -1", lambda: encode(symbols, symbols - 2, tables)),
            (ValueError, "a skipped level is not 0", lambda: encode(symbols, scales, tables, skip=1)),
            (ValueError, r"outside the tables|must be in \[0, 244\)", lambda: decode(stream, own + 244, tables)),
            (BitstreamError, "runs out|do not end where", lambda: decode(stream, own + 90, tables)),
        ]:
            with pytest.raises(kind, match=text):
                call()


@backend_parameters("rans_coder_encode")
def test_the_check_of_large_containers(device, backend):
    """The check is right over thousands of pieces: the reference reads the container, and says how long it is."""
    g = torch.Generator().manual_seed(1)
    symbols = torch.randint(INT_MIN, INT_MAX, (70_001,), generator=g, dtype=torch.int32)
    scales = torch.full((70_001,), 4.0)
    if backend == "reference":
        symbols, scales = symbols[:700], scales[:700]
    with lic_fast.use_backend(backend):
        stream = encode(symbols.to(device), scales.to(device), constant_tables(), lanes=256)
    assert crc32c(stream[:-4]).to_bytes(4, "little") == stream[-4:]
    report = rate_report(symbols.to(device), scales.to(device), constant_tables(), stream)
    assert report.escapes > 690 and report.stream_bits == 8 * len(stream)


@ON_GPU
def test_a_decoder_inside_a_cuda_graph():
    """Three steps captured once decode every stream of their shape: states and words are all that is put in anew."""
    tables, g = constant_tables(), torch.Generator().manual_seed(9)
    scales = torch.exp(torch.rand(3, 4, 2000, generator=g) * 5 - 2)
    drawn = [(torch.randn(scales.shape, generator=g) * scales).round().int() for _ in range(3)]

    def coded(symbols):
        encoder = Encoder(tables, lanes=64)
        for step in zip(symbols, scales, strict=True):
            encoder.encode(*step)
        data = torch.frombuffer(bytearray(encoder.flush()), dtype=torch.uint8)
        return data, rans_open(data, tables.packed)

    made = [coded(symbols) for symbols in drawn]
    own, packed = scales.cuda(), tables.packed_on(own_device := torch.device("cuda", torch.cuda.current_device()))
    for (data, state), symbols in zip(made, drawn, strict=True):
        stream, start = data.to(own_device), state.to(own_device)
        current = start.clone()

        def steps(stream=stream, current=current):
            return [rans_decode_([stream], [current], own[i].view(1, -1), packed, last=i == 2) for i in range(3)]

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            steps()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = steps()
        for _ in range(2):
            current.copy_(start)
            for part in out:
                part.zero_()
            graph.replay()
            rans_check([current])
            assert torch.equal(torch.stack(out).view(scales.shape).cpu(), symbols)
        graph.replay()  # from where nothing is left
        with pytest.raises(BitstreamError):
            rans_check([current])


@ON_GPU
def test_steps_wait_for_nothing():
    tables, g = constant_tables(), torch.Generator().manual_seed(2)
    scales = torch.exp(torch.rand(5000, generator=g) * 5 - 2)
    symbols = (torch.randn(5000, generator=g) * scales).round().int()
    encoder = Encoder(tables)
    encoder.encode(symbols, scales)
    decoder, own = Decoder(encoder.flush(), tables, device="cuda"), scales.cuda()
    means, values, places = torch.zeros_like(own), torch.empty_like(own), torch.arange(5000).int().cuda()
    lic_fast.explain("rans_coder_decode_", "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.reconstruct_(own, means, values, places=places)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    decoder.finish()
    assert torch.equal(values.cpu(), symbols.float())


@ON_GPU
def test_more_containers_than_one_launch_takes():
    tables, g = constant_tables(), torch.Generator().manual_seed(4)
    scales = torch.exp(torch.rand(2500, 40, generator=g) * 5 - 2)
    symbols = (torch.randn(scales.shape, generator=g) * scales).round().int()
    streams = encode_batch(symbols.cuda(), scales.cuda(), tables, lanes=32)
    assert streams == encode_batch(symbols, scales, tables, lanes=32)
    assert torch.equal(decode_batch(streams, scales.cuda(), tables).cpu(), symbols)
