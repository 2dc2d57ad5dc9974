"""CompressAI's bitstreams, byte for byte, between tensors and bytes.

A stream is little-endian words of 32 bits: the low and the high word of the coder's final state, then what the state
gave away, in the order in which the decoder takes it back. A symbol outside its table is an escape and its value in
nibbles. There is no header, length or check sum: a decoder needs the same tables and indexes, and cannot tell a wrong
stream from a right one until it runs out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional.coding import BitstreamError, ans_decode_, ans_encode, ans_pack

_STATE_BYTES = 8


class Tables:
    """Cumulative distributions, checked once, and what coding with them looks up.

    cdfs int32 [M, L], lengths int32 [M], offsets int32 [M], any device (copied to the CPU): an EntropyModel's
    quantized_cdf, cdf_length and offset. Row m holds lengths[m] entries from 0 to 2**16, each larger than the one
    before it, and codes the symbols offsets[m] + 0 ... lengths[m] - 3 in the table, all others by the escape, its last
    symbol. Memory beside these: 20 bytes a symbol, 24 a row, and 128 bytes to 8 KiB of buckets a row; about 0.9 MiB
    for the 64 rows of a GaussianConditional.

    Raises ValueError for shapes and values, TypeError for dtypes.
    Source: the tables of CompressAI's EntropyModel.update().
    """

    def __init__(self, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> None:
        own = []
        for name, value in (("cdfs", cdfs), ("lengths", lengths), ("offsets", offsets)):
            if not isinstance(value, Tensor):
                raise TypeError(f"Tables: {name} must be a tensor, got {type(value).__name__}")
            own.append(value.detach().to("cpu", copy=True).contiguous())
        self.cdfs, self.lengths, self.offsets = own
        self.packed = ans_pack(*own)
        self._arguments = (*own, self.packed)

    def __len__(self) -> int:
        return len(self.cdfs)


def _known(function: str, tables: object) -> tuple[Tensor, ...]:
    if not isinstance(tables, Tables):
        raise TypeError(f"{function}: tables must be Tables, got {type(tables).__name__}; build them once")
    return tables._arguments


def encode(symbols: Tensor, indexes: Tensor, tables: Tables) -> bytes:
    """The bytes that CompressAI's RansEncoder().encode_with_indexes makes of the same symbols, indexes and tables.

    symbols, indexes: int32 [N] (or any one shape, coded in the order of a contiguous copy) on the CPU; indexes in
    [0, M). Every int32 symbol has a code. CompressAI agrees where a symbol is less than 2**27 away from its row's
    table; beyond that its encoder hangs, and beyond 2**30 its decoder errs. For N of 0 and 1 CompressAI writes outside
    its buffer (and often crashes): the bytes are what its flush would give, 0000008000000000 for N = 0.

    Raises ValueError for shapes and for an index outside [0, M), before anything is coded, TypeError for dtypes and
    devices, BackendError for a forced backend.
    Source: CompressAI (Begaint et al., 2020, arXiv:2011.03029), rANS by Giesen's rans64.
    """
    return ans_encode(symbols, indexes, *_known("encode", tables)).numpy().tobytes()


def decode(stream: bytes, indexes: Tensor, tables: Tables) -> Tensor:
    """The symbols of a whole stream, int32 of the shape of indexes: RansDecoder().decode_with_indexes.

    Words that are left over are not an error, as in CompressAI. Raises BitstreamError for a stream that runs out or
    holds a value of more than 32 bits, ValueError for an index outside [0, M), TypeError for other types, dtypes and
    devices, BackendError for a forced backend. Source: as encode.
    """
    return Decoder(stream, tables).decode(indexes)


class Decoder:
    """Decodes a stream piece by piece, as RansDecoder's set_stream and decode_stream do.

    Raises BitstreamError for a stream of fewer than 8 bytes, TypeError for what is not bytes.
    """

    def __init__(self, stream: bytes, tables: Tables) -> None:
        self._tables = _known("Decoder", tables)
        if not isinstance(stream, (bytes, bytearray, memoryview)):
            raise TypeError(f"Decoder: the stream must be bytes, got {type(stream).__name__}")
        data = bytearray(stream)
        if len(data) < _STATE_BYTES:
            raise BitstreamError(
                f"Decoder: a stream has at least {_STATE_BYTES} bytes, got {len(data)}; it is truncated"
            )
        first = int.from_bytes(data[:_STATE_BYTES], "little", signed=True)
        self._stream = torch.frombuffer(data, dtype=torch.uint8)
        self._state = torch.tensor([first, _STATE_BYTES // 4, 0], dtype=torch.int64)

    def decode(self, indexes: Tensor) -> Tensor:
        """The next symbols, int32 of the shape of indexes (int32 on the CPU). An error leaves the place as it was.

        Raises what the function decode raises.
        """
        return ans_decode_(self._stream, self._state, indexes, *self._tables)


class Encoder:
    """Collects symbols piece by piece and codes them all at once, as BufferedRansEncoder does.

    Pieces are copied: their tensors may be reused.
    """

    def __init__(self, tables: Tables) -> None:
        self._arguments = _known("Encoder", tables)
        self._tables = tables
        self._pieces: list[tuple[Tensor, Tensor]] = []

    def encode(self, symbols: Tensor, indexes: Tensor) -> None:
        """Appends symbols and their indexes, int32 of one shape on the CPU.

        Raises ValueError where the shapes differ, TypeError for dtypes; indexes are checked by flush.
        """
        if not (isinstance(symbols, Tensor) and isinstance(indexes, Tensor)):
            raise TypeError(
                f"Encoder.encode: tensors are needed, got {type(symbols).__name__}, {type(indexes).__name__}"
            )
        if symbols.dtype is not torch.int32 or indexes.dtype is not torch.int32:
            raise TypeError(f"Encoder.encode: int32 is needed, got {symbols.dtype} and {indexes.dtype}; convert them")
        if symbols.shape != indexes.shape:
            raise ValueError(
                f"Encoder.encode: shapes must agree, got {list(symbols.shape)} and {list(indexes.shape)}; expand one"
            )
        self._pieces.append((symbols.flatten().clone(), indexes.flatten().clone()))

    def flush(self) -> bytes:
        """The stream of all symbols so far, and starts anew. Raises what the function encode raises."""
        empty = torch.empty(0, dtype=torch.int32)
        symbols, indexes = (torch.cat([empty, *(piece[i] for piece in self._pieces)]) for i in range(2))
        stream = encode(symbols, indexes, self._tables)
        self._pieces.clear()
        return stream
