"""Streams that every version decodes, and a decoder written from docs/BITSTREAM.md alone, in plain integers."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from rans_page import Rows, plain_decode
from rans_streams import EVERYONE, running

from lic_fast.coding import Decoder, Encoder, constant_tables, decode, encode, join_tables
from lic_fast.functional.rans import rans_pack

EVERY = pytest.mark.parametrize("name", EVERYONE)
TABLES = {
    "gaussian": constant_tables("gaussian"),
    "laplace": constant_tables("laplace"),
    "both": join_tables(constant_tables("logistic"), constant_tables("gaussian")),
}
# name: (tables, elements of each step or None, lanes, skip, stream)
GOLDEN = {
    "one shot": (
        "gaussian",
        None,
        "auto",
        0,
        """
        4c4652010000e97b93194c65c169010401040505613103040d737c591e00cc0876930f5c4dfa5ee3a77ec5bdbee20b48263f32ef7a13
        4e4701aad8484330f02c9edb2515ccb49051ff7f2ff08e3a497ae337a9bfe70adf8bff3adb2202412b6a5e7cac1a1f391da085b65fe8
        8bc0ac6229213a8d3612fa37ee83a0ff09df89653d7a4d787e01f7e6d02f8904b07d7f9f
        """,
    ),
    "many lanes and escapes": (
        "laplace",
        None,
        64,
        0,
        """
        4c465201000568eee9d072e53a4502040104050501020204000001043042b9ec2386eb30d2a60d3384c83d4311020000002000000000
        00000000000088260ac128bd3860fdd30a41a414d616a54204a861ee9c0181b4351d94833c2c2f48ecf9a86dd70c482adee45b3a85fe
        3f4ea4baac6c5094695b9f28630e05f58b5fa1e8d2ce707c440372bf1673161aebb3d867a79cc7cc9566ebe12888a8d65a570729c8cd
        09f86800e05929abe14df8ff738486e96e93e729806f60df60d3659866200f9c47ef807c254b870f4124a1ca68a4476822fac5a90000
        34feb2183d7a4d78bf807bf3e89744024d071cc4
        """,
    ),
    "skips": (
        "gaussian",
        None,
        4,
        60,
        """
        4c465201000ae97b93194c65c1693c01040104050511280304e5482a51e51d05020818de4b11280056a0c24e3acaa87db417ce8e34a2
        0c012922326db384ce3390d502e21a6e70374088dc42fffffffb14c8f94158b3e79517da69d3a3284baa78c321e06e86faffcd505065
        5f6ae8c099e2a9b1e86d1f863d7a4d787e01f7e6d02f89046c1cbb67
        """,
    ),
    "steps": (
        "both",
        [7, 0, 90, 33],
        32,
        20,
        """
        4c465201001dc7eb6e3e95d3a3ac1401048201041f04042fb0079ed8cdb4a38173841ec860eaa5a146ca1867ab5d508e122f1a8f6cf5
        c86cbefd80e91106dae8cd0268f564ffbf1956269a856d8f647793d747c360db08e8e968f56a6087c9309fef87d68836b171f1ddd7bc
        16895a7ecc8a38c01365fe395336761ad7fb6be4fa3675e1eb013ec832367a381a10fc94d61aa108b28242ae6ac4708b15e2caaf8525
        ffffe8ac86d187b45cc9a375ae8b5d4b79b4a240677e77f04232512ff473dcca153e3d7a4d78bf807bf3e89744028a7c21009413d5b3
        """,
    ),
    "nothing": (
        "gaussian",
        [],
        1,
        0,
        """
        4c4652010010e97b93194c65c16901000000000000000000fd7d4b16
        """,
    ),
}


def inputs(n, skip):
    """Scales over the whole ladder, by their bits, and symbols about as wide; every 29th far outside."""
    scales, symbols = [], []
    for i in range(n):
        key = 1970 + i * 37 % 260
        scales.append(struct.unpack("<f", struct.pack("<I", (key << 19) + i))[0])
        spread = int(2 * scales[-1]) + 1
        symbols.append((i * 2654435761 >> 7) % (2 * spread + 1) - spread)
        if i % 29 == 17:
            symbols[-1] = (-1) ** i * 3**i % 2**32 - 2**31
        if key - 1980 < skip:
            symbols[-1] = 0
    return torch.tensor(symbols, dtype=torch.int32), torch.tensor(scales, dtype=torch.float32)


def made(tables, steps, lanes, skip):
    symbols, scales = inputs((100 if steps is None else sum(steps)), skip)
    if steps is None:
        shape = (1, 4, 5, 5)
        return encode(symbols.view(shape), scales.view(shape), TABLES[tables], lanes=lanes, skip=skip)
    encoder = Encoder(TABLES[tables], lanes=lanes, skip=skip)
    for step in zip(symbols.split(steps), scales.split(steps), strict=True):
        encoder.encode(*step)
    return encoder.flush()


@EVERY
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_streams(name, case):
    tables, steps, lanes, skip, text = GOLDEN[case]
    stream = bytes.fromhex("".join(text.split()))
    symbols, scales = inputs((100 if steps is None else sum(steps)), skip)
    with running(name):
        assert made(tables, steps, lanes, skip) == stream
        if steps is None:
            assert torch.equal(decode(stream, scales.view(1, 4, 5, 5), TABLES[tables]).flatten(), symbols)
        else:
            decoder = Decoder(stream, TABLES[tables])
            assert [decoder.decode(part).tolist() for part in scales.split(steps)] == [
                part.tolist() for part in symbols.split(steps)
            ]
            decoder.finish()


@pytest.mark.parametrize("case", GOLDEN)
def test_a_decoder_written_from_the_page_reads_them(case):
    tables, steps, _, skip, text = GOLDEN[case]
    symbols, scales = inputs((100 if steps is None else sum(steps)), skip)
    ladder = TABLES[tables].ladder
    bits = [struct.unpack("<i", struct.pack("<f", scale))[0] for scale in scales.tolist()]
    indexes = [ladder + min(max((b >> 19) - 1980, 0), 243) for b in bits]
    stream = bytes.fromhex("".join(text.split()))
    rows = Rows(TABLES[tables].serialized, indexes, skip)
    head, found = plain_decode(stream, rows, [100] if steps is None else steps)
    assert found == symbols.tolist() and head == ([len(steps), sum(steps)] if steps is not None else [1, 4, 5, 5])
    assert stream[6:14].hex() == TABLES[tables].hash
    assert int(rans_pack(TABLES[tables].serialized)[5]) == int.from_bytes(stream[6:14], "little", signed=True)


def test_the_check_is_crc32c():
    from lic_fast.reference._rans_container import crc32c

    assert crc32c(b"123456789") == 0xE3069283  # the value every catalogue of CRCs gives
    assert crc32c(b"123456789") != zlib.crc32(b"123456789")
