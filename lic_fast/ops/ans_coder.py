"""lic_fast::ans_coder_encode and ans_coder_decode_: CompressAI's bitstream format, tensors in and out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import _native
from .._dispatch import Impl, OpSpec, register
from ..reference.ans_coder import DONE, INDEX_OUTSIDE, MALFORMED, RAN_OUT
from ..reference.ans_coder import ans_coder_decode_ as reference_decode_
from ..reference.ans_coder import ans_coder_encode as reference_encode
from ._library import define, plain

__all__ = ["DECODE_", "DONE", "ENCODE", "INDEX_OUTSIDE", "MALFORMED", "RAN_OUT", "attempt_decode", "pack"]

TOTAL = 1 << 16  # of the frequencies of a row
_FEWEST_BUCKET_BITS, _MOST_BUCKET_BITS = 6, 12
_ROW = np.dtype([(name, "<u4") for name in ("offset", "escape", "symbol", "bucket", "shift", "unused")])
_ENCODING = np.dtype([("reciprocal", "<u8"), ("bias", "<u4"), ("complement", "<u2"), ("shift", "<u2")])
_DECODING = np.dtype([("start", "<u2"), ("last", "<u2")])


def pack(cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tensor:
    """Checked tables as csrc/cpu/ans_coder.h reads them, int64 [*]: header, rows, encodings, decodings, buckets.

    20 bytes a symbol, and for a row 24 bytes and its buckets: at least twice as many as it has symbols, from 64 to
    4096, of 2 bytes.
    """
    sizes = lengths.numpy().astype(np.int64) - 1
    table = cdfs.numpy().astype(np.int64)
    used = np.arange(table.shape[1] - 1)[None, :] < sizes[:, None]
    start, frequency = table[:, :-1][used], np.diff(table, axis=1)[used]
    bits = np.clip(np.ceil(np.log2(sizes)).astype(np.int64) + 1, _FEWEST_BUCKET_BITS, _MOST_BUCKET_BITS)
    rows = np.zeros(len(sizes), _ROW)
    rows["offset"] = offsets.numpy().view(np.uint32)
    rows["escape"] = sizes - 1
    rows["symbol"] = np.cumsum(sizes) - sizes
    rows["bucket"] = np.cumsum(1 << bits) - (1 << bits)
    rows["shift"] = 16 - bits
    parts = [rows, _encodings(start, frequency), _decodings(start, frequency), _buckets(table, used, sizes, bits)]
    header = np.array([len(rows), len(start), (1 << bits).sum(), 0], np.int64)
    words = [header, *(_padded(part) for part in parts)]
    return torch.from_numpy(np.concatenate(words))


def _padded(part: np.ndarray) -> np.ndarray:
    data = part.tobytes()
    return np.frombuffer(data + bytes(-len(data) % 8), np.int64)


def _encodings(start: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """x // f is the high product of x < 2**63 and ceil(2**(63 + s) / f), s = ceil(log2(f)), shifted by s - 1: exact.

    The step x // f * 2**16 + x % f + start is then x + bias + (x // f) * (2**16 - f). A frequency of 1 has no such
    reciprocal in 64 bits: its high product is x - 1, which the bias makes good.
    """
    f = frequency.astype(np.uint64)
    exponent = np.zeros(len(f), np.uint64)
    for bit in range(16):
        exponent += (f > (1 << bit)).astype(np.uint64)
    quotient, rest = np.divmod(np.uint64(1 << 63), f)
    reciprocal = (quotient << exponent) + ((rest << exponent) + f - np.uint64(1)) // f
    one = frequency == 1
    encoding = np.zeros(len(f), _ENCODING)
    encoding["reciprocal"] = np.where(one, np.uint64((1 << 64) - 1), reciprocal)
    encoding["bias"] = start + np.where(one, TOTAL - 1, 0)
    encoding["complement"] = TOTAL - frequency
    encoding["shift"] = np.where(one, 0, exponent.astype(np.int64) - 1)
    return encoding


def _decodings(start: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    decoding = np.zeros(len(start) // 2 * 2 + 2, _DECODING)
    decoding["start"][: len(start)] = start
    decoding["last"][: len(start)] = frequency - 1
    return decoding


def _buckets(table: np.ndarray, used: np.ndarray, sizes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """For each bucket of a row the symbol that holds the bucket's first slot."""
    return np.concatenate(
        [
            np.searchsorted(row[: size + 1], np.arange(1 << b) << (16 - b), side="right") - 1
            for row, size, b in zip(table, sizes, bits, strict=True)
        ]
    ).astype(np.uint16)


def _native_encode(symbols: Tensor, indexes: Tensor, *tables: Tensor) -> Tensor:
    return _native.op("cpp", "ans_coder_encode")(symbols.contiguous(), indexes.contiguous(), tables[-1])


def _native_decode_(stream: Tensor, state: Tensor, indexes: Tensor, *tables: Tensor) -> Tensor:
    indexes = indexes.contiguous()
    symbols = torch.empty(indexes.shape, dtype=torch.int32)
    state[2] = _native.op("cpp", "ans_coder_decode_out")(stream, state, indexes, tables[-1], symbols)
    return symbols


def _why_not(device: str) -> str | None:
    return _native.why_not("cpp", device)


_ORDER = {"cpu": ("cpp", "reference")}
ENCODE = register(
    OpSpec(
        "ans_coder_encode",
        {
            "cpp": Impl(_native_encode, ("cpu",), (torch.int32,), _why_not),
            "reference": Impl(lambda *args: reference_encode(*args[:-1]), ("cpu",), (torch.int32,)),
        },
        _ORDER,
    )
)
DECODE_ = register(
    OpSpec(
        "ans_coder_decode_",
        {
            "cpp": Impl(_native_decode_, ("cpu",), (torch.int32,), _why_not),
            "reference": Impl(lambda *args: reference_decode_(*args[:-1]), ("cpu",), (torch.int32,)),
        },
        _ORDER,
    )
)


def attempt_decode(stream: Tensor, state: Tensor, indexes: Tensor, packed: Tensor) -> tuple[int, Tensor] | None:
    """(outcome, symbols) by the shortest way, where the native kernel is the choice; else None."""
    if not (plain(indexes) and indexes.is_contiguous() and DECODE_.choose("cpu", torch.int32) == "cpp"):
        return None
    symbols = torch.empty(indexes.shape, dtype=torch.int32)
    return _native.op("cpp", "ans_coder_decode_out")(stream, state, indexes, packed, symbols), symbols


def _encode(symbols: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor, packed: Tensor) -> Tensor:
    return ENCODE(symbols, symbols, indexes, cdfs, lengths, offsets, packed)


def _fake_encode(symbols: Tensor, *_: Tensor) -> Tensor:
    return symbols.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _decode_(
    stream: Tensor, state: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor, packed: Tensor
) -> Tensor:
    return DECODE_(indexes, stream, state, indexes, cdfs, lengths, offsets, packed)


def _fake_decode_(stream: Tensor, state: Tensor, indexes: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(indexes.shape, dtype=torch.int32, device=indexes.device)


_TABLES = "Tensor cdfs, Tensor lengths, Tensor offsets, Tensor packed"
define(f"ans_coder_encode(Tensor symbols, Tensor indexes, {_TABLES}) -> Tensor", _encode, _fake_encode)
define(
    f"ans_coder_decode_(Tensor stream, Tensor(a!) state, Tensor indexes, {_TABLES}) -> Tensor", _decode_, _fake_decode_
)
