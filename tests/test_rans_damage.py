"""Containers that are truncated, damaged, foreign, newer, or decoded with something else: an error that says so."""

from __future__ import annotations

import os
import random

import pytest
import torch
from rans_streams import EVERYONE, NATIVE, random_case, running

import lic_fast
from lic_fast.coding import BitstreamError, Decoder, Encoder, constant_tables, decode, encode
from lic_fast.reference._rans_container import crc32c

MUTATIONS = int(os.environ.get("LIC_FAST_MUTATIONS", "1500"))
BOTH = pytest.mark.parametrize("name", EVERYONE[:2])


def resealed(data):
    """With the check that damage would have to match."""
    return bytes(data[:-4]) + crc32c(bytes(data[:-4])).to_bytes(4, "little")


@pytest.fixture(scope="module")
def sample():
    g = torch.Generator().manual_seed(1)
    scales = torch.exp(torch.rand(700, generator=g) * 6 - 2)
    symbols = (torch.randn(700, generator=g) * scales).round().int()
    symbols[::100] = 10**6
    return encode(symbols, scales, constant_tables(), lanes=64), symbols, scales


@BOTH
def test_every_truncation_is_noticed(name, sample):
    stream, _, scales = sample
    with running(name):
        for length in range(len(stream)):
            with pytest.raises(BitstreamError, match="truncated"):
                decode(stream[:length], scales, constant_tables())
        with pytest.raises(BitstreamError, match=rf"followed by other data, it has {len(stream) + 1} bytes and needs"):
            decode(stream + b"\0", scales, constant_tables())


@BOTH
def test_every_flipped_bit_is_noticed(name, sample):
    stream, _, scales = sample
    with running(name):
        for bit in range(0, 8 * len(stream), 1 if NATIVE else 7):
            data = bytearray(stream)
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError):
                decode(data, scales, constant_tables())


@BOTH
@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 0x50, "not a lic_fast stream"),
        (3, 2, "of another version, this build reads 1"),
        (4, 2, "of a profile that this build does not know"),
        (4, 1, "the stream is one of mixtures"),
        (5, 0xC5, "flags that this build does not know"),
        (5, 7, "flags that this build does not know"),
        (7, 1, "was made with the tables"),
        (14, 0, "sizes that no encoder writes"),
        (15, 9, "a number in the header is malformed or too large"),
    ],
)
def test_headers_say_what_is_wrong(name, sample, at, value, text):
    stream, _, scales = sample
    data = bytearray(stream)
    data[at] = value
    with running(name), pytest.raises(BitstreamError, match=text):
        decode(resealed(data), scales, constant_tables())


@BOTH
def test_what_does_not_belong_together_is_refused(name, sample):
    stream, symbols, scales = sample
    tables = constant_tables()
    with running(name):
        for call, text in [
            (lambda: decode(stream, scales.view(7, 100), tables), r"holds \[700\], the indexes are \[7, 100\]"),
            (lambda: decode(stream, scales[:-1], tables), r"holds \[700\], the indexes are \[699\]"),
            (lambda: decode(stream, scales, constant_tables("laplace")), "was made with the tables"),
            (lambda: decode(stream, scales * 1.3, tables), "runs out|do not end where the stream does"),
            (lambda: decode(stream, scales.flip(0), tables), "runs out|do not end where the stream does"),
            (lambda: Decoder(stream, tables), "was not made step by step"),
        ]:
            with pytest.raises(BitstreamError, match=text):
                call()
        encoder = Encoder(tables)
        encoder.encode(symbols, scales)
        stepwise = encoder.flush()
        with pytest.raises(BitstreamError, match="holds 700 symbols in 1 steps"):
            decode(stepwise, scales, tables)
        for parts in ([350], [350, 350], [700, 1]):
            decoder = Decoder(stepwise, tables)
            with pytest.raises(BitstreamError):
                for n in parts:
                    decoder.decode(torch.cat([scales, scales])[:n])
                decoder.finish()


def outcome(data, indexes, tables):
    try:
        return decode(data, indexes, tables, check=False)
    except BitstreamError as error:
        return str(error).replace("rans_decode_", "").replace("rans_open", "")


def test_damage_that_no_check_sees_does_no_harm():
    """Without the CRC every implementation comes to the same end: the same symbols, or the same complaint."""
    g = random.Random(11)
    refused = 0
    for case in range(MUTATIONS):
        symbols, indexes, tables, lanes, skip = random_case(g.randrange(10**6), 150)
        data = bytearray(encode(symbols, indexes, tables, lanes=lanes, skip=skip))
        for _ in range(g.choice([1, 1, 2, 8])):
            what, at = g.randrange(4), g.randrange(min(len(data), g.choice([40, 100, 10**6])))
            if what < 2:
                data[at] = g.choice([0, 1, 127, 128, 255, g.randrange(256)])
            elif what == 2:
                del data[at : at + g.randint(1, 3)]
            else:
                data[at:at] = bytes(g.randrange(256) for _ in range(g.randint(1, 3)))
            if not data:
                break
        results = []
        for name in EVERYONE:
            with running(name):
                results.append(outcome(bytes(data), indexes, tables))
        for result in results[1:]:
            same = torch.equal(result, results[0]) if isinstance(result, torch.Tensor) else result == results[0]
            assert same, f"mutation {case}: {results}"
        refused += isinstance(results[0], str)
    assert refused > MUTATIONS // 2


@BOTH
def test_sizes_in_a_header_cost_no_memory(name):
    """A header that promises 2**48 symbols, or 4096 streams, is refused by its length."""
    head = b"LFR\1\0\x05" + bytes.fromhex(constant_tables().hash)
    huge = b"\x80\x80\x80\x80\x80\x80\x40"  # 2**48
    for rest in (
        b"\x01\x01" + huge + huge + huge + b"\0",
        b"\x80\x20\x01" + huge + bytes(100),
        b"\xff\xff\xff\xff\xff\xff\xff",
    ):
        with running(name), pytest.raises(BitstreamError, match=r"truncated|malformed"):
            decode(resealed(head + rest + bytes(40)), torch.ones(3), constant_tables())


def test_forced_backends_do_not_fall_back(sample):
    stream, _, scales = sample
    with lic_fast.use_backend("triton"), pytest.raises(lic_fast.BackendError, match="no triton implementation"):
        decode(stream, scales, constant_tables())
