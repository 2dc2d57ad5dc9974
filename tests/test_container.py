"""The .licf container: what goes in comes out, and no damaged stream is taken for a good one."""

from __future__ import annotations

import random
import struct
import zlib

import pytest

from lic_fast.codec import BitstreamError, Stream, pack, unpack

DIGEST = bytes(range(16))
PLAIN = Stream("bmshj2018-factorized", DIGEST, 37, 61, (3, 4), [[b"\x00\x01payload" * 3]])
NESTED = Stream(
    "elic2022-official",
    DIGEST,
    512,
    768,
    {"y": ((16, 32, 48), (16, 32, 48)), "hyper": (8, 12)},
    [[b"a"], [b""], [bytes(range(256))]],
    slow=True,
    check=0xDEADBEEF,
)


@pytest.mark.parametrize("stream", [PLAIN, NESTED], ids=["plain", "nested"])
def test_round_trip(stream: Stream) -> None:
    assert unpack(pack(stream)) == stream


@pytest.mark.parametrize("stream", [PLAIN, NESTED], ids=["plain", "nested"])
def test_every_truncation_is_refused(stream: Stream) -> None:
    data = pack(stream)
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(data[:length])


@pytest.mark.parametrize("stream", [PLAIN, NESTED], ids=["plain", "nested"])
def test_every_flipped_byte_is_refused(stream: Stream) -> None:
    data = pack(stream)
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            with pytest.raises(BitstreamError):
                unpack(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])


def _sealed(data: bytes) -> bytes:
    """`data` with its length and CRC-32 made right again, as a malicious writer would."""
    body = data[:6] + struct.pack("<I", len(data)) + data[10:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def test_malformed_streams_with_a_good_checksum_raise_only_bitstream_errors() -> None:
    generator = random.Random(0)
    data, refused = pack(NESTED), 0
    for _ in range(4000):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(10, len(data) - 4)] = generator.randrange(256)
        if generator.random() < 0.5:
            del damaged[generator.randrange(20, len(damaged) - 5) : -4]
        try:
            unpack(_sealed(bytes(damaged)))
        except BitstreamError:
            refused += 1
    assert refused > 1000


def test_announced_sizes_are_checked_before_anything_is_allocated() -> None:
    data = pack(PLAIN)
    at = data.index(b"\x00\x01payload") - 2  # the tag and the length of the only string
    huge = data[:at] + bytes([3]) + b"\xff\xff\xff\xff\x0f" + data[at + 2 :]
    with pytest.raises(BitstreamError, match="4294967295 bytes"):
        unpack(_sealed(huge))
    at -= 4  # the tag of the outer list
    with pytest.raises(BitstreamError, match="announces 4294967295 entries"):
        unpack(_sealed(data[:at] + bytes([1]) + b"\xff\xff\xff\xff\x0f" + data[at + 2 :]))


def test_a_size_of_zero_pixels_is_refused() -> None:
    data = bytearray(pack(PLAIN))
    at = 10 + 1 + len(PLAIN.model) + 16
    data[at : at + 4] = bytes(4)
    with pytest.raises(BitstreamError, match="impossible image size, got 0 x 61"):
        unpack(_sealed(bytes(data)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "truncated"),
        (b"\x89PNG\r\n\x1a\n and more", "not a LICF container"),
        (pack(PLAIN)[:4] + b"\x09" + pack(PLAIN)[5:], "container version 9, this build reads 1"),
        (pack(PLAIN)[:5] + b"\x80" + pack(PLAIN)[6:], "unknown flags 0x80"),
        (pack(PLAIN) + b"x", "followed by other data"),
        (pack(PLAIN)[:-9], "truncated"),
        (pack(PLAIN)[:-1] + bytes([pack(PLAIN)[-1] ^ 1]), "CRC-32"),
    ],
)
def test_the_message_names_what_is_wrong(data: bytes, said: str) -> None:
    with pytest.raises(BitstreamError, match=said) as caught:
        unpack(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": ""}, ValueError),
        ({"digest": b"short"}, ValueError),
        ({"height": 0}, ValueError),
        ({"width": 1 << 17}, ValueError),
        ({"shape": (-1, 2)}, ValueError),
        ({"shape": (1.5, 2)}, TypeError),
        ({"strings": [[["deep", [[[[b""]]]]]]]}, (TypeError, ValueError)),
    ],
)
def test_pack_refuses_what_it_cannot_store(changes: dict, error: type) -> None:
    with pytest.raises(error, match="pack:"):
        pack(Stream(**{**vars(PLAIN), **changes}))
