"""Which coder the drop-in models use: lic_fast's, or CompressAI's own where only the slow reference could run.

Both write and read the same bytes. Streams that run out are refused by lic_fast's; CompressAI's cannot see that a
stream ends and decodes what lies behind it, so that here only streams too short for any symbol are refused.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressai.ans import RansDecoder, RansEncoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from .._dispatch import explain

_START = 1 << 31  # rANS's state before the first symbol
_TOTAL_BITS = 16
_STATE_BYTES = 8
_DAMAGED = (
    "decode: the stream of {} bytes is not one of {} symbols; it is truncated, damaged, or was made with other scales, "
    "means or weights"
)


def prefers_stock(op: str, dtype: torch.dtype) -> bool:
    """Whether auto mode has nothing but the reference for `op` on the CPU, which is slower than CompressAI's way."""
    told = explain(op, "cpu", dtype)
    return told.chosen == "reference" and not told.forced


def _stock() -> bool:
    return prefers_stock("ans_coder_decode_", torch.int32)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Lists of a hundred thousand lists set off Python's search for cycles, which takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def coder_of(model: EntropyModel) -> Coder:
    """The coder that a drop-in keeps for its tables, or a new one for CompressAI's own class."""
    kept = getattr(model, "_lic_fast_coder", None)
    return Coder(model) if kept is None else kept()


class Coder:
    """Codes with the tables of an entropy model as they are now.

    A model whose entropy coder is not "ans" keeps its own, with the tables made into lists once.
    """

    def __init__(self, model: EntropyModel) -> None:
        tables = (model.quantized_cdf, model.cdf_length, model.offset)
        self._rows, self.entropy_coder = len(tables[0]), model.entropy_coder
        self._other = None if model.entropy_coder.name == "ans" else model.entropy_coder
        self._tables: Any = None
        self._lists: Any = None
        if self._other is not None or _stock():
            self._lists = [table.tolist() for table in tables]
        else:
            from ..coding.compressai_format import Tables

            self._tables = Tables(*tables)

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """The stream of int32 symbols, with int32 indexes of the same shape, on the CPU.

        Raises ValueError for an index that is no row of the tables.
        """
        if self._tables is not None:
            from ..coding.compressai_format import encode

            return encode(symbols, indexes, self._tables)
        self._check("encode", indexes)
        pair = symbols.flatten().tolist(), indexes.flatten().tolist()
        if self._other is not None:
            return self._other.encode_with_indexes(*pair, *self._lists)
        return _encode_lists(*pair, *self._lists)

    def decode(self, stream: bytes, indexes: Tensor) -> Tensor:
        """All symbols of a stream, int32 of the shape of `indexes`.

        Raises ValueError for an index that is no row, BitstreamError (a ValueError) for a truncated stream.
        """
        if self._other is None:
            return self.decoder(stream).decode(indexes)
        self._check("decode", indexes)
        symbols = self._other.decode_with_indexes(stream, indexes.flatten().tolist(), *self._lists)
        return torch.tensor(symbols, dtype=torch.int32).view(indexes.shape)

    def decoder(self, stream: bytes) -> Any:
        """What decodes `stream` piece by piece: an object with decode(indexes)."""
        if self._tables is not None:
            from ..coding.compressai_format import Decoder

            return Decoder(stream, self._tables)
        return _CompressAIDecoder(stream, self._lists, self._check)

    def _check(self, what: str, indexes: Tensor) -> None:
        if indexes.numel() and not 0 <= int(indexes.min()) <= int(indexes.max()) < self._rows:
            raise ValueError(
                f"{what}: indexes must be in [0, {self._rows}), got {int(indexes.min())} to {int(indexes.max())}; "
                "clamp them"
            )


def _checked(stream: object) -> bytes:
    if not isinstance(stream, bytes):
        raise TypeError(f"decode: the stream must be bytes, got {type(stream).__name__}")
    if len(stream) < _STATE_BYTES:
        raise ValueError(f"decode: a stream has at least {_STATE_BYTES} bytes, got {len(stream)}; it is truncated")
    return stream


class _CompressAIDecoder:
    def __init__(self, stream: bytes, lists: list, check: Any) -> None:
        self._decoder, self._lists, self._check = RansDecoder(), lists, check
        self._decoder.set_stream(_checked(stream))

    def decode(self, indexes: Tensor) -> Tensor:
        self._check("decode", indexes)
        symbols = self._decoder.decode_stream(indexes.flatten().tolist(), *self._lists)
        return torch.tensor(symbols, dtype=torch.int32).view(indexes.shape)


def _encode_lists(symbols: list, indexes: list, cdfs: list, lengths: list, offsets: list) -> bytes:
    """RansEncoder().encode_with_indexes, which writes outside its buffer where there are fewer than two symbols."""
    if not symbols:
        return _START.to_bytes(_STATE_BYTES, "little")
    if len(symbols) == 1:
        (row,) = indexes
        value = symbols[0] - offsets[row]
        if 0 <= value < lengths[row] - 2:  # an escape takes two symbols and more
            start, end = cdfs[row][value], cdfs[row][value + 1]
            state = (_START // (end - start) << _TOTAL_BITS) + _START % (end - start) + start
            return state.to_bytes(_STATE_BYTES, "little")
    return RansEncoder().encode_with_indexes(symbols, indexes, cdfs, lengths, offsets)


def encode_intervals(starts: Tensor, ends: Tensor) -> bytes:
    """The stream of symbols given as intervals [start, end) of 2**16, int32 [N] on the CPU, whatever their tables.

    A table of its own for each symbol needs no more than its interval: what lies before it is one symbol, what lies
    behind is the escape, which nothing takes. CompressAI's coder does it: lic_fast's prepares tables for many symbols.
    Raises ValueError for an empty interval, or one that reaches 2**16.
    """
    starts, ends = starts[:, None], ends[:, None]
    total = torch.full_like(starts, 1 << _TOTAL_BITS)
    if bool((ends <= starts).any()) or bool((ends >= total).any()):
        raise ValueError("encode: a symbol has no frequency; the mixture's table is damaged, check scales and weights")
    first = starts == 0
    cdfs = torch.cat([0 * starts, torch.where(first, ends, starts), torch.where(first, total, ends), total], 1)
    lengths, symbols = (4 - first.int()).flatten(), (1 - first.int()).flatten()
    indexes, offsets = torch.arange(len(symbols), dtype=torch.int32), torch.zeros_like(lengths)
    with _no_collection():
        return _encode_lists(*map(Tensor.tolist, (symbols, indexes, cdfs, lengths, offsets)))


def decode_rows(stream: bytes, parts: Iterable[Tensor], count: int) -> Tensor:
    """The symbols [count] of a stream whose every symbol has a table of its own: row i of the parts' cdfs.

    parts: int32 [n, L] on the CPU, n summing to `count`; one is used at a time. CompressAI's decoder does not see where
    a stream ends: it gets one that is long enough, and what it decodes is coded again, which gives the stream's bytes.
    Raises ValueError for a stream that is truncated or damaged, or was made with other tables.
    """
    decoder = RansDecoder()
    decoder.set_stream(_checked(stream) + bytes(4 * count + _STATE_BYTES))
    empty = torch.empty(0, dtype=torch.int32)
    symbols, starts, ends = [empty], [empty], [empty]
    for cdfs in parts:
        indexes = torch.arange(len(cdfs), dtype=torch.int32)
        tables = (cdfs, torch.full_like(indexes, cdfs.shape[1]), torch.zeros_like(indexes))
        with _no_collection():
            values = torch.tensor(decoder.decode_stream(*map(Tensor.tolist, (indexes, *tables))))
        if not bool(((values >= 0) & (values < cdfs.shape[1] - 2)).all()):
            raise ValueError(_DAMAGED.format(len(stream), count))
        symbols.append(values.int())
        for bounds, side in ((starts, 0), (ends, 1)):
            bounds.append(cdfs.gather(1, values[:, None] + side).flatten())
    if not stream.startswith(encode_intervals(torch.cat(starts), torch.cat(ends))):
        raise ValueError(_DAMAGED.format(len(stream), count))
    return torch.cat(symbols)
