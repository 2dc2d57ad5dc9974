"""Mixtures in lic_fast.coding: the same integers and bytes from every implementation, and every symbol back."""

from __future__ import annotations

import copy
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rans_mixtures import extreme_floats, mixture, random_integers, random_mixture_case, random_mixture_tables
from rans_streams import EVERYONE, NATIVE, running, split

import lic_fast
from lic_fast.coding import (
    MIXTURE_FAMILIES,
    BitstreamError,
    Decoder,
    Encoder,
    MixtureTables,
    constant_tables,
    decode,
    decode_batch,
    encode,
    encode_batch,
    mixture_parameters,
    mixture_tables,
    rate_report,
)

CASES = int(os.environ.get("LIC_FAST_CASES", "120"))
MUTATIONS = int(os.environ.get("LIC_FAST_MUTATIONS", "1500"))
AT_RANDOM = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EVERY = pytest.mark.parametrize("name", EVERYONE)
BOTH = pytest.mark.parametrize("name", EVERYONE[:2])


def ideal_bytes(symbols, scales, means, weights):
    """Of the exact discretised mixture of Gaussians."""
    d, s, w = (symbols.double() - means.double()).abs(), scales.double(), weights.double()
    masses = torch.special.ndtr((0.5 - d) / s) - torch.special.ndtr((-0.5 - d) / s)
    return float(-(w / w.sum(0) * masses).sum(0).log2().sum()) / 8


@AT_RANDOM
@given(seed=st.integers(0, 2**32))
def test_every_implementation_makes_the_same_bytes(seed):
    symbols, parameters, tables, lanes = random_mixture_case(seed)
    streams = []
    for name in EVERYONE:
        with running(name):
            streams.append(encode(symbols, parameters, tables, lanes=lanes))
    assert all(stream == streams[0] for stream in streams)
    for name in EVERYONE:
        with running(name):
            assert torch.equal(decode(streams[0], parameters, tables), symbols), name


@AT_RANDOM
@given(seed=st.integers(0, 2**32))
def test_steps_come_back_one_by_one(seed):
    symbols, parameters, tables, lanes = random_mixture_case(seed, 400)
    sizes = split(seed, len(symbols))
    streams = []
    for name in EVERYONE:
        with running(name):
            encoder = Encoder(tables, lanes=lanes)
            for step in zip(symbols.split(sizes), parameters.split(sizes, 1), strict=True):
                encoder.encode(*step)
            streams.append(encoder.flush())
    assert all(stream == streams[0] for stream in streams)
    for name in EVERYONE:
        with running(name):
            decoder = Decoder(streams[0], tables)
            assert (decoder.steps, decoder.elements) == (len(sizes), len(symbols))
            parts = [decoder.decode(part) for part in parameters.split(sizes, 1)]
            decoder.finish()
            assert torch.equal(torch.cat(parts), symbols), name


@AT_RANDOM
@given(seed=st.integers(0, 2**32))
def test_parameters_are_the_same_integers_everywhere(seed):
    g, t = random.Random(seed), torch.Generator().manual_seed(seed)
    n, k = g.choice([0, 1, 15, 16, 17, 255, 256, 257, g.randint(0, 900)]), g.randint(1, 16)
    tables, made = g.choice([mixture_tables(g.choice(MIXTURE_FAMILIES)), random_mixture_tables(g)]), []
    floats = [extreme_floats(g, t, (k, n)) for _ in range(3)]
    for name in EVERYONE:
        with running(name):
            made.append(mixture_parameters(*floats, tables))
    assert all(torch.equal(one, made[0]) for one in made)


@pytest.mark.skipif(not NATIVE, reason="the C++ library is not built")
@pytest.mark.parametrize("lanes", ["auto", 32, 96, 1024])
def test_many_symbols(lanes):
    symbols, *floats = mixture(200_000, high=5000.0)
    tables, streams = mixture_tables(), []
    parameters = mixture_parameters(*floats, tables)
    for name in EVERYONE[1:]:
        with running(name):
            streams.append(encode(symbols, parameters, tables, lanes=lanes))
            assert torch.equal(decode(streams[0], parameters, tables), symbols)
    assert all(stream == streams[0] for stream in streams)


@pytest.mark.skipif(not NATIVE, reason="the C++ library is not built")
def test_threads_do_not_change_the_bytes():
    symbols, *floats = mixture(150_000)
    before, streams = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            parameters = mixture_parameters(*floats, mixture_tables())
            streams.append(encode(symbols, parameters, mixture_tables(), lanes=256))
            assert torch.equal(decode(streams[0], parameters, mixture_tables()), symbols)
    finally:
        torch.set_num_threads(before)
    assert streams[0] == streams[1] == streams[2]


@BOTH
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 0), (1, 7), (5,)])
def test_batches_are_single_containers(name, shape):
    tables, n = mixture_tables(), torch.Size(shape).numel()
    symbols, *floats = mixture(n)
    symbols = symbols.view(shape)
    with running(name):
        parameters = mixture_parameters(*(x.view(3, *shape).movedim(0, 1) for x in floats), tables, dim=1)
        assert parameters.shape == (shape[0], 8, *shape[1:])
        streams = encode_batch(symbols, parameters, tables)
        assert streams == [encode(s, p, tables) for s, p in zip(symbols, parameters, strict=True)]
        assert torch.equal(decode_batch(streams, parameters, tables), symbols)
        assert encode_batch(symbols[:0], parameters[:0], tables) == []
        assert decode_batch([], parameters[:0], tables).shape == (0, *shape[1:])
        assert torch.equal(decode(streams[0], parameters[0], tables), symbols[0])


@BOTH
def test_every_value_of_a_range_has_a_slot(name):
    """Ranges of any place and size, symbols in, at and beyond their ends."""
    tables = mixture_tables()
    t = torch.Generator().manual_seed(3)
    parameters = random_integers(t, 2, 400)
    size, shift = parameters[1] & 0xFFF, parameters[1] >> 12 & 15
    places = [0 * size, size * 0 + 1, size, size + 1, size + 2, size // 2, size * 0 - 1, size * 0 + 70000]
    with running(name):
        for place in places:
            symbols = (parameters[0].long() + (place.long() << shift) + (1 << 31)) % (1 << 32) - (1 << 31)
            symbols = symbols.int()
            stream = encode(symbols, parameters, tables)
            assert torch.equal(decode(stream, parameters, tables), symbols)
            assert rate_report(symbols, parameters, tables, stream).escapes == int(((place < 1) | (place > size)).sum())


@pytest.mark.parametrize(("high", "percent"), [(64.0, 0.12), (4.0, 0.09), (1.0, 0.14)])
def test_overhead_over_the_exact_mixture(high, percent):
    if not NATIVE:
        pytest.skip("seconds in plain Python")
    symbols, *floats = mixture(600_000, high=high)
    ideal = ideal_bytes(symbols, *floats)
    stream = encode(symbols, mixture_parameters(*floats, mixture_tables()), mixture_tables())
    assert len(stream) <= ideal * (1 + percent / 100), f"{100 * (len(stream) / ideal - 1):.4f} % over {ideal:.0f}"


@pytest.mark.parametrize("family", MIXTURE_FAMILIES)
def test_one_component_is_its_family(family):
    """Integers under which a symbol's length is that of the exact distribution, in its body."""
    tables, scale = mixture_tables(family), 5.0
    one = torch.ones(1, 21)
    parameters = mixture_parameters(one * scale, one * 0.3, one, tables)
    symbols = torch.arange(-10, 11, dtype=torch.int32)
    x = torch.stack([symbols - 0.8, symbols + 0.2]).double() / scale
    low, high = {
        "gaussian": torch.special.ndtr,
        "laplace": lambda x: torch.where(x < 0, x.exp() / 2, 1 - (-x).exp() / 2),
        "logistic": torch.sigmoid,
    }[family](x)
    stream = encode(symbols, parameters, tables)
    exact = float(-(high - low).log2().sum())
    assert abs(rate_report(symbols, parameters, tables, stream).table_bits - exact) < 0.01 * exact


def test_rate_report_adds_up():
    symbols, *floats = mixture(5000)
    symbols[5] = 10**6
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    stream = encode(symbols, parameters, tables, lanes=64)
    report = rate_report(symbols, parameters, tables, stream, estimated_bits=8 * ideal_bytes(symbols[:5], *(
        x[:, :5] for x in floats)))  # fmt: skip
    assert report.stream_bits == 8 * len(stream) and report.escapes >= 1 and report.symbols == 5000
    assert 0 < report.overhead_bits < report.header_bits + 64 * 20


def test_tables_are_what_was_made():
    folder = Path(lic_fast.__file__).parent / "coding" / "constant_tables"
    hashes = {"gaussian": "e03d826442ad23cf", "laplace": "7f7ea301c54a037f", "logistic": "9cf8bd0403059c8f"}
    from lic_fast.coding._generate_mixture import make

    for family in MIXTURE_FAMILIES:
        tables = mixture_tables(family)
        assert tables.hash == hashes[family] and tables.precision == 14
        assert make(family) == (folder / f"{family}_mixture.bin").read_bytes()
        assert pickle.loads(pickle.dumps(tables)) == tables == copy.deepcopy(tables)
        assert hash(tables) == hash(MixtureTables(tables.serialized)) and tables.hash in repr(tables)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(0, 1, "not a table of mixtures"), (4, 17, "precision 12 to 16"), (5, 0, "1 to 15 entries"), (8, 1, "half masses"),
     (10, 3, "half masses"), (-1, 9, "a reach is at most 256")],
)  # fmt: skip
def test_damaged_tables_are_refused(at, value, text):
    data = bytearray(mixture_tables().serialized)
    data[at] = value
    with pytest.raises(ValueError, match=text):
        MixtureTables(bytes(data))
    with pytest.raises(TypeError, match="must be bytes"):
        MixtureTables(data)
    with pytest.raises(ValueError, match="not a table of mixtures"):
        MixtureTables(bytes(data)[:-1])


def test_wrong_arguments():
    symbols, *floats = mixture(10)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    scales, means, weights = floats
    heavier, wider, farther = parameters.clone(), parameters.clone(), parameters.clone()
    heavier[3, 4] += 1 << 16
    wider[1, 9] = 1024
    farther[2, 0] = (1 << 21) + 1
    empty = parameters.clone()
    empty[1] = 0
    stream = encode(symbols, parameters, tables)
    encoder = Encoder(tables)
    encoder.encode(symbols, parameters)
    cases = [
        *((ValueError, "parameters have weights, ranges or means", lambda p=p: encode(symbols, p, tables))
          for p in (heavier, wider, farther, empty)),
        (ValueError, "parameters have weights, ranges or means", lambda: decode(stream, heavier, tables)),
        (TypeError, "parameters must be one of int32", lambda: encode(symbols, parameters.long(), tables)),
        (TypeError, "symbols must be one of int32", lambda: encode(symbols.long(), parameters, tables)),
        (ValueError, "shapes must agree", lambda: encode(symbols, parameters[:, :9], tables)),
        (ValueError, "shapes must agree", lambda: encode(symbols, symbols, tables)),
        (ValueError, "of 1 to 16 components, got", lambda: encode(symbols, parameters[:3], tables)),
        (ValueError, "of 1 to 16 components, got", lambda: encode(symbols, parameters[:2], tables)),
        (ValueError, r"parameters must be \[2 \+ 2 K, \*\]", lambda: decode(stream, torch.tensor(1), tables)),
        (ValueError, "mixtures are never skipped, got skip=1", lambda: encode(symbols, parameters, tables, skip=1)),
        (TypeError, "must be lic_fast.coding.Tables or MixtureTables", lambda: encode(symbols, parameters, None)),
        (TypeError, "parameters must be int32", lambda: Encoder(tables).encode(symbols, parameters.float())),
        (ValueError, "as many components, got 2 after 3", lambda: encoder.encode(symbols, parameters[:6])),
        (TypeError, "tables must be MixtureTables", lambda: mixture_parameters(*floats, constant_tables())),
        (TypeError, "means must be one of", lambda: mixture_parameters(scales, means.double(), weights, tables)),
        (ValueError, "means", lambda: mixture_parameters(scales, means[:2], weights, tables)),
        (ValueError, "1 to 16 components along dim 2", lambda: mixture_parameters(*floats, tables, dim=2)),
        (ValueError, "unknown family, got 'cauchy'", lambda: mixture_tables("cauchy")),
    ]  # fmt: skip
    for kind, text, call in cases:
        for name in EVERYONE[:2]:
            with running(name), pytest.raises(kind, match=text):
                call()


@BOTH
def test_profiles_are_told_apart(name):
    symbols, *floats = mixture(300)
    tables = mixture_tables()
    parameters = mixture_parameters(*floats, tables)
    with running(name):
        stream = encode(symbols, parameters, tables)
        assert stream[4] == 1 and stream[6:14].hex() == tables.hash
        for call, text in [
            (lambda: decode(stream, floats[0][0], constant_tables()), "was made with the tables"),
            (lambda: decode(stream, parameters, mixture_tables("laplace")), "was made with the tables"),
            (lambda: decode(encode(symbols, floats[0][0], constant_tables()), parameters, tables), "with the tables"),
            (lambda: decode(stream[:4] + b"\0" + stream[5:], parameters, tables, check=False), "is one of tables"),
            (lambda: decode(stream, parameters[:, :299], tables), r"holds \[300\], the indexes are \[299\]"),
            (lambda: decode(stream, parameters.flip(1), tables), "runs out|do not end where the stream does"),
            (lambda: Decoder(stream, tables), "was not made step by step"),
            (lambda: decode(stream[:5] + bytes([stream[5] | 8]) + stream[6:], parameters, tables), "has flags"),
        ]:
            with pytest.raises(BitstreamError, match=text):
                call()


def outcome(data, parameters, tables):
    try:
        return decode(data, parameters, tables, check=False)
    except BitstreamError as error:
        return str(error)


def test_damage_that_no_check_sees_does_no_harm():
    g, refused = random.Random(12), 0
    for case in range(MUTATIONS // 3):
        symbols, parameters, tables, lanes = random_mixture_case(g.randrange(10**6), 100)
        data = bytearray(encode(symbols, parameters, tables, lanes=lanes))
        for _ in range(g.choice([1, 1, 2, 8])):
            at = g.randrange(min(len(data), g.choice([40, 100, 10**6])))
            data[at] = g.choice([0, 1, 127, 128, 255, g.randrange(256)])
        results = []
        for name in EVERYONE:
            with running(name):
                results.append(outcome(bytes(data), parameters, tables))
        for result in results[1:]:
            same = torch.equal(result, results[0]) if isinstance(result, torch.Tensor) else result == results[0]
            assert same, f"mutation {case}: {results}"
        refused += isinstance(results[0], str)
    assert refused > MUTATIONS // 9


@BOTH
def test_opcheck(name):
    _, *floats = mixture(50)
    packed = mixture_tables().packed
    with running(name):
        torch.library.opcheck(torch.ops.lic_fast.rans_coder_mixture, (*(x[None] for x in floats), packed))
