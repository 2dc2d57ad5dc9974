"""The .licf container: one compressed photograph and all that its decoder must agree on.

    magic "LICF" | version u8 | flags u8 | total bytes u32 | model name (u8 length, ASCII) | digest 16 bytes
    | height u32 | width u32 | [pixel check u32, where flag 2 is set] | latent shape | strings | CRC-32 u32

Little endian. The latent shape and the strings are trees as the model gave them: a tag byte (0 integer,
1 list, 2 dictionary, 3 bytes) and then a LEB128 number (the integer, or how many entries or bytes follow).
The CRC-32 covers everything before it. It finds damage; it does not authenticate: decode streams of a source
you trust. Layout: our choice.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from typing import Any

from ..functional.coding import BitstreamError

MAGIC = b"LICF"
VERSION = 1
FLAG_CUDA = 1  # encoded on a CUDA device
FLAG_CHECK = 2  # carries the CRC-32 of the decoded pixels
FLAG_SLOW = 4  # made with the slow weights of a moving-average run
_KNOWN_FLAGS = FLAG_CUDA | FLAG_CHECK | FLAG_SLOW

_HEAD = struct.Struct("<4sBBI")
_SIZE = struct.Struct("<II")
_U32 = struct.Struct("<I")
_DIGEST_BYTES = 16
_MAX_SIDE = 1 << 16
_MAX_DEPTH = 4
_INT, _LIST, _DICT, _BYTES = range(4)


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a container holds. height and width in pixels of the original; digest 16 bytes.

    `shape` and `strings` are what the model's compress() gave: integers in tuples, bytes in lists, either in
    dictionaries. `check` is the CRC-32 of the decoded 8-bit pixels, or None.
    """

    model: str
    digest: bytes
    height: int
    width: int
    shape: Any
    strings: Any
    cuda: bool = False
    slow: bool = False
    check: int | None = None


def pack(stream: Stream) -> bytes:
    """The container of `stream`. Raises ValueError or TypeError where a field cannot be stored."""
    name = stream.model.encode("ascii")
    if not 1 <= len(name) <= 255:
        raise ValueError(f"pack: the model name must have 1 to 255 ASCII letters, got {len(name)}; shorten it")
    if len(stream.digest) != _DIGEST_BYTES:
        raise ValueError(f"pack: the digest must have {_DIGEST_BYTES} bytes, got {len(stream.digest)}; use BLAKE2b-128")
    if not (0 < stream.height <= _MAX_SIDE and 0 < stream.width <= _MAX_SIDE):
        raise ValueError(
            f"pack: a side must have 1 to {_MAX_SIDE} pixels, got {stream.height} x {stream.width}; split the image"
        )
    flags = FLAG_CUDA * stream.cuda | FLAG_SLOW * stream.slow | FLAG_CHECK * (stream.check is not None)
    body = bytearray([len(name)]) + name + stream.digest + _SIZE.pack(stream.height, stream.width)
    if stream.check is not None:
        body += _U32.pack(stream.check)
    _write_tree(body, stream.shape, 0)
    _write_tree(body, stream.strings, 0)
    total = _HEAD.size + len(body) + _U32.size
    data = _HEAD.pack(MAGIC, VERSION, flags, total) + body
    return data + _U32.pack(zlib.crc32(data))


def unpack(data: bytes) -> Stream:
    """The stream inside the container `data`. Raises BitstreamError, naming what is wrong."""
    reader = _Reader(_checked(bytes(data)))
    flags = reader.data[5]
    name = reader.take(reader.take(1, "model name length")[0], "model name")
    digest = reader.take(_DIGEST_BYTES, "digest")
    height, width = _SIZE.unpack(reader.take(_SIZE.size, "image size"))
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise BitstreamError(f"unpack: impossible image size, got {height} x {width}; the stream is malformed")
    check = _U32.unpack(reader.take(_U32.size, "pixel check"))[0] if flags & FLAG_CHECK else None
    shape = reader.tree("latent shape", {_INT, _LIST, _DICT}, tuple)
    strings = reader.tree("strings", {_LIST, _DICT, _BYTES}, list)
    if reader.left():
        raise BitstreamError(f"unpack: {reader.left()} bytes follow the strings; the stream is malformed")
    if not name.isascii() or not name:
        raise BitstreamError(f"unpack: the model name is not ASCII text, got {name!r}; the stream is malformed")
    return Stream(
        name.decode("ascii"), digest, height, width, shape, strings, bool(flags & FLAG_CUDA),
        bool(flags & FLAG_SLOW), check,
    )  # fmt: skip


def _checked(data: bytes) -> bytes:
    """`data`, once its magic, version, flags, length and CRC-32 are those of a container we read."""
    if len(data) < _HEAD.size:
        raise BitstreamError(f"unpack: a container has at least {_HEAD.size} bytes, got {len(data)}; it is truncated")
    magic, version, flags, total = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise BitstreamError(f"unpack: not a LICF container, it begins with {magic!r}; pass a .licf file")
    if version != VERSION:
        raise BitstreamError(f"unpack: container version {version}, this build reads {VERSION}; update lic_fast")
    if flags & ~_KNOWN_FLAGS:
        raise BitstreamError(f"unpack: unknown flags {flags:#04x}; the stream is damaged or newer than this build")
    if len(data) != total:
        what = "truncated" if len(data) < total else "followed by other data"
        raise BitstreamError(f"unpack: the container has {total} bytes, got {len(data)}; it is {what}")
    if total < _HEAD.size + _U32.size or _U32.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
        raise BitstreamError("unpack: the CRC-32 does not match; the stream is damaged")
    return data[:-4]


def _write_tree(out: bytearray, node: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"pack: nested deeper than {_MAX_DEPTH} levels; flatten the strings")
    if isinstance(node, bool) or not isinstance(node, (int, bytes, list, tuple, dict)):
        raise TypeError(f"pack: shapes and strings hold integers, bytes, lists and dictionaries, got {type(node)}")
    if isinstance(node, int):
        _write_number(out, _INT, node)
    elif isinstance(node, bytes):
        _write_number(out, _BYTES, len(node))
        out += node
    else:
        _write_number(out, _DICT if isinstance(node, dict) else _LIST, len(node))
        for entry in node:
            if isinstance(node, dict):
                _write_tree(out, entry.encode("ascii"), depth + 1)
            _write_tree(out, node[entry] if isinstance(node, dict) else entry, depth + 1)


def _write_number(out: bytearray, tag: int, value: int) -> None:
    if not 0 <= value < 1 << 32:
        raise ValueError(f"pack: numbers are 0 to 2**32 - 1, got {value}; the shape or a string is too large")
    out.append(tag)
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


class _Reader:
    """Takes the fields of a checked container in order; never reads or allocates past its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = _HEAD.size

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise BitstreamError(f"unpack: the {what} needs {count} bytes, {self.left()} are left; malformed stream")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, what: str) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1, what)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        if byte >= 128 or value >= 1 << 32:
            raise BitstreamError(f"unpack: a number of the {what} exceeds 32 bits; the stream is malformed")
        return value

    def tree(self, what: str, allowed: set[int], sequence: type, depth: int = 0) -> Any:
        tag, count = self.take(1, what)[0], self.number(what)
        if tag not in allowed or depth > _MAX_DEPTH:
            raise BitstreamError(f"unpack: unexpected entry in the {what}, got tag {tag} at depth {depth}; malformed")
        if tag == _INT:
            return count
        if tag == _BYTES:
            return self.take(count, what)
        if count > self.left():  # every entry takes at least a byte
            raise BitstreamError(
                f"unpack: the {what} announces {count} entries, {self.left()} bytes are left; malformed"
            )
        if tag == _LIST:
            return sequence([self.tree(what, allowed, sequence, depth + 1) for _ in range(count)])
        pairs = [(self._key(what), self.tree(what, allowed, sequence, depth + 1)) for _ in range(count)]
        return dict(pairs)

    def _key(self, what: str) -> str:
        tag, count = self.take(1, what)[0], self.number(what)
        key = self.take(count, what)
        if tag != _BYTES or not key.isascii():
            raise BitstreamError(f"unpack: a key of the {what} is not ASCII text, got {key!r}; malformed stream")
        return key.decode("ascii")
