"""lic_fast.coding: the same bytes from every implementation, and every symbol back."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rans_streams import EVERYONE, INT_MAX, INT_MIN, NATIVE, random_case, running, split

import lic_fast
from lic_fast.coding import (
    Decoder,
    Encoder,
    constant_tables,
    decode,
    decode_batch,
    encode,
    encode_batch,
    rate_report,
    scale_indexes,
)

CASES = int(os.environ.get("LIC_FAST_CASES", "120"))
AT_RANDOM = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EVERY = pytest.mark.parametrize("name", EVERYONE)


def gaussian(n, low, high, seed=0):
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([low, high]).log()
    scales = torch.exp(low + (high - low) * torch.rand(n, generator=g))
    return (torch.randn(n, generator=g) * scales).round().int(), scales


def ideal_bytes(symbols, scales):
    """Of the exact discretised Gaussian."""
    d, s = symbols.abs().double(), scales.double()
    masses = torch.special.ndtr((0.5 - d) / s) - torch.special.ndtr((-0.5 - d) / s)
    assert float(masses.min()) > 0
    return float(-masses.log2().sum()) / 8


@AT_RANDOM
@given(seed=st.integers(0, 2**32))
def test_every_implementation_makes_the_same_bytes(seed):
    symbols, indexes, tables, lanes, skip = random_case(seed)
    streams = []
    for name in EVERYONE:
        with running(name):
            streams.append(encode(symbols, indexes, tables, lanes=lanes, skip=skip))
    assert all(stream == streams[0] for stream in streams)
    for name in EVERYONE:
        with running(name):
            assert torch.equal(decode(streams[0], indexes, tables), symbols), name


@AT_RANDOM
@given(seed=st.integers(0, 2**32))
def test_steps_come_back_one_by_one(seed):
    symbols, indexes, tables, lanes, skip = random_case(seed, 600)
    sizes = split(seed, len(symbols))
    streams = []
    for name in EVERYONE:
        with running(name):
            encoder = Encoder(tables, lanes=lanes, skip=skip)
            for step in zip(symbols.split(sizes), indexes.split(sizes), strict=True):
                encoder.encode(*step)
            streams.append(encoder.flush())
    assert all(stream == streams[0] for stream in streams)
    for name in EVERYONE:
        with running(name):
            decoder = Decoder(streams[0], tables)
            assert (decoder.steps, decoder.elements) == (len(sizes), len(symbols))
            parts = [decoder.decode(part) for part in indexes.split(sizes)]
            decoder.finish()
            assert torch.equal(torch.cat(parts), symbols), name


@EVERY
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64, 1024])
def test_every_level_and_every_escape(name, lanes):
    tables = constant_tables()
    edges = [0, 1, -1, 5, -7, 64, 65, -65, 127, 128, -128, -129, 2**15, -(2**15) - 1, 2**30, INT_MIN, INT_MAX]
    indexes = torch.arange(len(tables), dtype=torch.int32).repeat_interleave(len(edges))
    symbols = torch.tensor(edges, dtype=torch.int32).repeat(len(tables))
    with running(name):
        stream = encode(symbols, indexes, tables, lanes=lanes)
        assert torch.equal(decode(stream, indexes, tables), symbols)
        assert torch.equal(decode(stream, indexes.to(torch.uint8), tables), symbols)


@pytest.mark.parametrize("lanes", ["auto", 32, 96, 1024])
def test_a_million_symbols(lanes):
    symbols, scales = gaussian(1_000_000, 0.05, 5000.0)
    streams = []
    for name in EVERYONE if lanes == 1024 else EVERYONE[1:]:
        with running(name):
            streams.append(encode(symbols, scales, constant_tables(), lanes=lanes))
            assert torch.equal(decode(streams[0], scales, constant_tables()), symbols)
    assert all(stream == streams[0] for stream in streams)


@pytest.mark.skipif(not NATIVE, reason="the C++ library is not built")
def test_threads_do_not_change_the_bytes():
    symbols, scales = gaussian(300_000, 0.11, 64.0)
    before, streams = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            streams.append(encode(symbols, scales, constant_tables(), lanes=256))
            assert torch.equal(decode(streams[0], scales, constant_tables()), symbols)
    finally:
        torch.set_num_threads(before)
    assert streams[0] == streams[1] == streams[2]


def test_eight_threads_at_once():
    failures = []

    def work(seed):
        for i in range(6):
            symbols, scales = gaussian(20_000 if NATIVE else 500, 0.11, 64.0, seed * 100 + i)
            stream = encode(symbols, scales, constant_tables(), lanes=64)
            if not torch.equal(decode(stream, scales, constant_tables()), symbols):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@EVERY
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 0), (1, 7), (5,)])
def test_batches_are_single_containers(name, shape):
    symbols, scales = (x.view(shape) for x in gaussian(torch.Size(shape).numel(), 0.11, 20.0))
    with running(name):
        streams = encode_batch(symbols, scales, constant_tables())
        assert streams == [encode(s, i, constant_tables()) for s, i in zip(symbols, scales, strict=True)]
        assert torch.equal(decode_batch(streams, scales, constant_tables()), symbols)
        assert encode_batch(symbols[:0], scales[:0], constant_tables()) == []
        assert decode_batch([], scales[:0], constant_tables()).shape == (0, *shape[1:])


def test_strided_and_scalar_inputs():
    symbols, scales = (x.view(20, 50).t() for x in gaussian(1000, 0.11, 20.0))
    stream = encode(symbols, scales, constant_tables())
    assert stream == encode(symbols.contiguous(), scales.contiguous(), constant_tables())
    for given_as in (
        stream,
        bytearray(stream),
        memoryview(stream),
        torch.frombuffer(bytearray(stream), dtype=torch.uint8),
    ):
        assert torch.equal(decode(given_as, scales, constant_tables()), symbols)
    one = torch.tensor(-3, dtype=torch.int32)
    assert decode(encode(one, torch.tensor(2.0), constant_tables()), torch.tensor(2.0), constant_tables()) == one


def test_scales_select_levels_by_their_bits():
    scales = torch.tensor(
        [-1.0, 0.0, 1e-30, 0.109375, 0.11, 0.11328125, 0.125, 1.0, 15.99, 16.0, 3968.0, 1e30, torch.inf]
    )
    expected = [0, 0, 0, 0, 0, 1, 4, 52, 115, 116, 243, 243, 243]
    assert scale_indexes(scales).tolist() == expected
    assert scale_indexes(torch.tensor([torch.nan]), first=7).tolist() == [250]
    assert scale_indexes(scales.view(13, 1)).shape == (13, 1)
    symbols = torch.arange(13, dtype=torch.int32)
    for name in EVERYONE:
        with running(name):
            by_scales = encode(symbols, scales, constant_tables())
            assert by_scales == encode(symbols, scale_indexes(scales), constant_tables())
    with pytest.raises(TypeError, match=r"scale_indexes: scales must be an fp32 tensor, got torch.float64"):
        scale_indexes(scales.double())


@pytest.mark.parametrize(
    ("n", "low", "high", "percent", "most"),
    [
        (1_500_000, 0.11, 64.0, 0.06, 0),
        (1_500_000, 0.11, 1.0, 0.13, 0),
        (1000, 0.11, 64.0, 0, 40),
        (1000, 0.11, 1.0, 0, 40),
    ],
)
def test_overhead_over_the_exact_gaussian(n, low, high, percent, most):
    if not NATIVE and n > 1000:
        pytest.skip("seconds in plain Python")
    for seed in range(1 if n > 1000 else 20):
        symbols, scales = gaussian(n, low, high, seed)
        ideal = ideal_bytes(symbols, scales)
        over = len(encode(symbols, scales, constant_tables())) - ideal
        assert over <= most + percent / 100 * ideal, f"{over:.1f} bytes over {ideal:.1f}"


def test_rate_report_adds_up():
    symbols, scales = gaussian(20_000, 0.11, 64.0)
    symbols[5] = 10**6
    stream = encode(symbols, scales, constant_tables(), lanes=64)
    report = rate_report(symbols, scales, constant_tables(), stream, estimated_bits=8.0 * 9000)
    assert report.stream_bits == 8 * len(stream) and report.escapes >= 1 and report.symbols == 20_000
    assert 0 < report.overhead_bits < report.header_bits + 64 * 20
    assert 64 * 20 <= report.lane_bits <= 64 * 35 and report.header_bits < 8 * 60
    assert "bits a symbol" in str(report)


def test_wrong_arguments():
    symbols, scales = gaussian(10, 0.11, 64.0)
    tables = constant_tables()
    nine = [x.view([1] * 8 + [10]) for x in (symbols, scales)]
    cases = [
        (TypeError, "symbols must be one of int32", lambda: encode(symbols.long(), scales, tables)),
        (TypeError, "indexes must be one of int32, uint8, float32", lambda: encode(symbols, scales.double(), tables)),
        (TypeError, "tensors are needed, got list", lambda: encode([1], scales, tables)),
        (TypeError, "tables must be", lambda: encode(symbols, scales, tables.packed)),
        (ValueError, "shapes must agree", lambda: encode(symbols, scales[:9], tables)),
        (ValueError, r"indexes must be in \[0, 244\), got -1 to -1", lambda: encode(symbols, symbols * 0 - 1, tables)),
        (ValueError, r"got 244 to 244", lambda: encode(symbols, (symbols * 0 + 244).to(torch.uint8), tables)),
        (ValueError, "lanes must be", lambda: encode(symbols, scales, tables, lanes=48)),
        (ValueError, "lanes must be", lambda: encode(symbols, scales, tables, lanes=True)),
        (ValueError, "skip must be 0 to 244", lambda: encode(symbols, scales, tables, skip=245)),
        (ValueError, "a shape has at most 8 sides", lambda: encode(*nine, tables)),
        (TypeError, "got str", lambda: decode("LFR", scales, tables)),
    ]  # fmt: skip
    for kind, text, call in cases:
        for name in EVERYONE[:2]:
            with running(name), pytest.raises(kind, match=text):
                call()
    for name in EVERYONE:
        with running(name), pytest.raises(ValueError, match="a symbol of a skipped level is not 0"):
            encode(torch.ones(3, dtype=torch.int32), torch.full((3,), 0.1), tables, skip=1)


@pytest.mark.parametrize("op", ["rans_coder_encode", "rans_coder_open", "rans_coder_decode_", "rans_coder_mixture"])
def test_backends_are_explained(op):
    told = lic_fast.explain(op, "cpu")
    assert told.reasons["reference"] is None and told.chosen == ("cpp" if NATIVE else "reference")


@EVERY
def test_opcheck_and_compile(name):
    tables = constant_tables()
    symbols, scales = (x[None] for x in gaussian(200, 0.11, 20.0))
    head = torch.frombuffer(bytearray(encode(symbols[0], scales[0], tables)[:14] + b"\1\1\xc8\1"), dtype=torch.uint8)
    with running(name):
        arguments = (symbols, scales, tables.packed, head, torch.tensor([200]), 1, 1, 0)
        torch.library.opcheck(torch.ops.lic_fast.rans_coder_encode, arguments)
        stream, lengths = torch.ops.lic_fast.rans_coder_encode(*arguments)
        assert stream.numpy().tobytes() == encode(symbols[0], scales[0], tables) and lengths.tolist() == [len(stream)]
        torch.library.opcheck(torch.ops.lic_fast.rans_coder_open, (stream, True))
        state = torch.ops.lic_fast.rans_coder_open(stream, True)
        out = torch.zeros_like(symbols)
        torch.library.opcheck(
            torch.ops.lic_fast.rans_coder_decode_, ([stream], [state.clone()], scales, tables.packed, out, False)
        )

        def decoded(state):
            out = torch.zeros_like(symbols)
            torch.ops.lic_fast.rans_coder_decode_([stream], [state], scales, tables.packed, out, True)
            return out

        assert torch.equal(torch.compile(decoded, fullgraph=True, backend="aot_eager")(state), symbols)
        assert state[0] == 0
