"""The bytes of MSPEntropyModel for one sample (docs/MSP.md, "Stream"), written and read step by step.

    version u8 | flags u8 | check | container of lic_fast.coding, stepwise

check: the CRC-32 of the levels (a byte each) of all steps that have parameters; before its four bytes, for every grid
that such a step of another grid follows, the low byte of the CRC-32 so far, which says where two machines part.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from torch import Tensor

from ..coding import BitstreamError, Decoder, Encoder, MixtureTables, Tables

_VERSION = 1
_PORTABLE = 1  # flag: made by integer networks, decodes anywhere
_MIXTURES = 2  # flag: a second container, of mixtures, for all steps but the first
_LENGTH = struct.Struct("<I")  # of the first container, where there are two
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
        """The levels of a step of grid `scale`, uint8, or its mixtures' integers, int32."""
        if self._scale not in (None, scale):
            self.marks.append(self._crc & 255)
        self._scale, self._crc = scale, zlib.crc32(levels.contiguous().numpy(), self._crc)

    def value(self) -> bytes:
        """What is stored; nothing where no step has parameters."""
        return b"" if self._scale is None else bytes(self.marks) + self._crc.to_bytes(_CRC, "little")


class Writer:
    """Collects the steps of a sample; those of finer grids by `mixtures`, where they are such. lanes: of Encoder."""

    def __init__(
        self,
        tables: Tables,
        mixtures: MixtureTables | None = None,
        *,
        portable: bool = False,
        lanes: int | str = "auto",
    ) -> None:
        self._coarsest = Encoder(tables, lanes=lanes)
        self._finer = self._coarsest if mixtures is None else Encoder(mixtures, lanes=lanes)
        self._check, self._flags = _Check(), _PORTABLE * portable | _MIXTURES * (mixtures is not None)

    def step(self, scale: int, symbols: Tensor, levels: Tensor) -> None:
        """Appends int32 symbols with their levels or integers, on the CPU; scale -1: without parameters."""
        if scale >= 0:
            self._check.add(scale, levels)
        (self._finer if scale >= 0 else self._coarsest).encode(symbols, levels)

    def finish(self) -> bytes:
        """The bytes of all steps."""
        data, payload = bytes([_VERSION, self._flags]) + self._check.value(), self._coarsest.flush()
        if self._flags & _MIXTURES:
            payload = _LENGTH.pack(len(payload)) + payload + self._finer.flush()
        return data + payload


class Reader:
    """Opens what a Writer wrote, and judges in the end what was decoded of it. Raises BitstreamError, naming what is
    wrong.

    counts: for each step that has elements its scale and how many; the first is that of scale -1. integers: whether
    the decoder has integer networks. `portable` says whether the stream asks for them. mixtures: as in Writer.
    `decoders`, on the CPU: of all steps; or of the first, and of the others, where those are mixtures.
    """

    def __init__(
        self,
        data: bytes,
        tables: Tables,
        counts: list[tuple[int, int]],
        integers: bool,
        mixtures: MixtureTables | None = None,
    ) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"decompress: a stream must be bytes, got {type(data).__name__}")
        data = bytes(data)
        grids = len({scale for scale, _ in counts}) - 1
        begin = _HEAD + (grids - 1 + _CRC if grids else 0)
        if len(data) < begin:
            raise BitstreamError(f"decompress: a stream has more than {begin} bytes, got {len(data)}; it is truncated")
        if data[0] != _VERSION:
            raise BitstreamError(f"decompress: stream version {data[0]}, this build reads {_VERSION}; update lic_fast")
        if data[1] & ~(_PORTABLE | _MIXTURES):
            raise BitstreamError(
                f"decompress: the stream has unknown flags {data[1]:#04x}, which this build does not read; update "
                "lic_fast"
            )
        self.portable = bool(data[1] & _PORTABLE)
        if self.portable and not integers:
            raise BitstreamError(
                "decompress: the stream has the portable profile, and this model no integer networks; load the state "
                "dict of the model that encoded"
            )
        if bool(data[1] & _MIXTURES) != (mixtures is not None):
            kinds = ("one Gaussian", "mixtures") if mixtures is None else ("mixtures", "one Gaussian")
            raise BitstreamError(
                f"decompress: this model codes by {kinds[0]}, the stream by {kinds[1]}; pass its model"
            )
        self._expected, self._counts = data[_HEAD:begin], counts
        if mixtures is None:
            self.decoders = [_opened(data[begin:], tables, counts)]
            return
        at = begin + _LENGTH.size
        if len(data) < at or len(data) < at + _LENGTH.unpack_from(data, begin)[0]:
            raise BitstreamError(f"decompress: the coarsest grid ends behind byte {len(data)}; the stream is truncated")
        end = at + _LENGTH.unpack_from(data, begin)[0]
        self.decoders = [_opened(data[at:end], tables, counts[:1]), _opened(data[end:], mixtures, counts[1:])]

    def _mismatch(self, which: str) -> BitstreamError:
        return BitstreamError(_MISMATCH.format(which) + _WHY[self.portable])

    def check(self, levels: Sequence[Tensor], failed: BitstreamError | None = None) -> None:
        """Compares the levels, or mixtures' integers, that steps with parameters were decoded by with the encoder's.

        levels: one a step, on the CPU. failed: what a decoder said of the last of them, or of the end.
        """
        if failed is not None and not levels:
            raise failed
        check, scale, finer = _Check(), -1, self._counts[1:]
        for (scale, _), own in zip(finer, levels, strict=False):
            check.add(scale, own)
            if not self._expected.startswith(check.marks):
                raise self._mismatch(f"grid {scale + 1}") from failed
        if len(levels) < len(finer):  # each container's own CRC was right, so that it was decoded by other levels
            raise self._mismatch(f"grid {scale}") from failed
        if check.value() != self._expected:
            raise self._mismatch("the finest grids") from failed
        if failed is not None:
            raise failed


def _opened(data: bytes, tables: Tables | MixtureTables, counts: list[tuple[int, int]]) -> Decoder:
    decoder, elements = Decoder(data, tables), sum(count for _, count in counts)
    if (decoder.steps, decoder.elements) != (len(counts), elements):
        raise BitstreamError(
            f"decompress: the stream holds {decoder.elements} elements in {decoder.steps} steps, a latent of this "
            f"shape has {elements} in {len(counts)}; pass the shape that was encoded"
        )
    return decoder
