"""The bytes of MSPEntropyModel for one sample (docs/MSP.md, "Stream"), written and read step by step.

    version u8 | flags u8 | check | container of lic_fast.coding, stepwise

check: the CRC-32 of the levels (a byte each) of all steps that have parameters; before its four bytes, for every grid
that such a step of another grid follows, the low byte of the CRC-32 so far, so that a decoder stops there.
"""

from __future__ import annotations

import zlib

from torch import Tensor

from ..coding import BitstreamError, Decoder, Encoder, Tables

_VERSION = 1
_PORTABLE = 1  # flag: made by integer networks, decodes anywhere
_HEAD, _CRC = 2, 4
_MISMATCH = "decompress: the parameters of {} are not those of the encoder: "
_WHY = {
    False: "other weights, or another machine, torch or number of threads, which round otherwise; decode where it was "
    "encoded",
    True: "other weights; decode with those that encoded",
}


def is_portable(stream: bytes) -> bool:
    """Whether a stream of MSPEntropyModel says that integer networks made it, so that it decodes anywhere."""
    return len(stream) > 1 and bool(stream[1] & _PORTABLE)


class _Check:
    """The check of the steps so far."""

    def __init__(self) -> None:
        self.marks, self._crc, self._scale = bytearray(), 0, None

    def add(self, scale: int, levels: Tensor) -> None:
        """The levels of a step of grid `scale`, uint8."""
        if self._scale not in (None, scale):
            self.marks.append(self._crc & 255)
        self._scale, self._crc = scale, zlib.crc32(levels.contiguous().numpy(), self._crc)

    def value(self) -> bytes:
        """What is stored; nothing where no step has parameters."""
        return b"" if self._scale is None else bytes(self.marks) + self._crc.to_bytes(_CRC, "little")


class Writer:
    """Collects the steps of a sample."""

    def __init__(self, tables: Tables, *, portable: bool = False) -> None:
        self._encoder, self._check, self._flags = Encoder(tables), _Check(), _PORTABLE if portable else 0

    def step(self, scale: int, symbols: Tensor, levels: Tensor) -> None:
        """Appends int32 symbols with their levels, both on the CPU and of one shape; scale -1: without parameters."""
        if scale >= 0:
            self._check.add(scale, levels)
        self._encoder.encode(symbols, levels)

    def finish(self) -> bytes:
        """The bytes of all steps."""
        return bytes([_VERSION, self._flags]) + self._check.value() + self._encoder.flush()


class Reader:
    """Reads what a Writer wrote. Raises BitstreamError, naming what is wrong.

    counts: for each step that has elements its scale and how many; the first is that of scale -1. integers: whether
    the decoder has integer networks. `portable` says whether the stream asks for them.
    """

    def __init__(self, data: bytes, tables: Tables, counts: list[tuple[int, int]], integers: bool) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"decompress: a stream must be bytes, got {type(data).__name__}")
        data, elements = bytes(data), sum(count for _, count in counts)
        grids = len({scale for scale, _ in counts}) - 1
        begin = _HEAD + (grids - 1 + _CRC if grids else 0)
        if len(data) < begin:
            raise BitstreamError(f"decompress: a stream has more than {begin} bytes, got {len(data)}; it is truncated")
        if data[0] != _VERSION:
            raise BitstreamError(f"decompress: stream version {data[0]}, this build reads {_VERSION}; update lic_fast")
        if data[1] & ~_PORTABLE:
            raise BitstreamError(
                f"decompress: the stream has unknown flags {data[1]:#04x}, which this build does not read; update "
                "lic_fast"
            )
        self.portable = data[1] == _PORTABLE
        if self.portable and not integers:
            raise BitstreamError(
                "decompress: the stream has the portable profile, and this model no integer networks; load the state "
                "dict of the model that encoded"
            )
        self._expected, self._check = data[_HEAD:begin], _Check()
        self._decoder = Decoder(data[begin:], tables)
        if (self._decoder.steps, self._decoder.elements) != (len(counts), elements):
            raise BitstreamError(
                f"decompress: the stream holds {self._decoder.elements} elements in {self._decoder.steps} steps, a "
                f"latent of this shape has {elements} in {len(counts)}; pass the shape that was encoded"
            )

    def _mismatch(self, which: str) -> BitstreamError:
        return BitstreamError(_MISMATCH.format(which) + _WHY[self.portable])

    def step(self, scale: int, levels: Tensor) -> Tensor:
        """The symbols of the next step, int32 of the shape of its levels."""
        if scale >= 0:
            self._check.add(scale, levels)
            if not self._expected.startswith(self._check.marks):
                raise self._mismatch(f"grid {scale + 1}")
        try:
            return self._decoder.decode(levels)
        except BitstreamError as error:  # its own CRC was right, so that it was decoded with other levels
            raise self._mismatch(f"grid {scale}") from error

    def finish(self) -> None:
        """Checks the parameters of all steps, and that nothing is left over."""
        if self._check.value() != self._expected:
            raise self._mismatch("the finest grids")
        self._decoder.finish()
