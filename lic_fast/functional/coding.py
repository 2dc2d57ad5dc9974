"""Entropy coding: the bitstream format of CompressAI's rANS coder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ans_coder as _op
from . import _check

_TOTAL = _op.TOTAL


class BitstreamError(ValueError):
    """A stream that cannot be decoded: truncated, damaged, foreign, newer, or made with other weights."""


def ans_pack(cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tensor:
    """What ans_encode and ans_decode_ look up, from cumulative distributions; checks these once for all.

    cdfs [M, L], lengths [M], offsets [M] int32 on the CPU, contiguous: row m of cdfs is 0 at first, grows strictly for
    lengths[m] entries (2 to L), and its last is 2**16; what follows is not looked at. Its last symbol is the escape.
    Returns int64 [*]: 20 bytes a symbol, 24 a row, and for each row 64 to 4096 buckets of 2 bytes, at least twice as
    many as it has symbols.

    Raises ValueError for shapes and values, TypeError for dtypes and devices.
    Source: the tables of CompressAI's EntropyModel.update(); exact reciprocals as in Alverson (1991).
    """
    f = "ans_pack"
    for name, value, dims in (("cdfs", cdfs, 2), ("lengths", lengths, 1), ("offsets", offsets, 1)):
        _codeable(f, name, value)
        if value.dim() != dims or len(value) != len(cdfs) or not value.is_contiguous():
            raise ValueError(
                f"{f}: cdfs must be [M, L], lengths and offsets [M], contiguous, got {name} {list(value.shape)}"
            )
    if len(cdfs) == 0 or cdfs.shape[1] < 2:
        raise ValueError(f"{f}: cdfs must have a row and two columns at least, got {list(cdfs.shape)}; call update()")
    if not bool(((lengths >= 2) & (lengths <= cdfs.shape[1])).all()):
        raise ValueError(f"{f}: lengths must be 2 to {cdfs.shape[1]}, got {lengths.min()} to {lengths.max()}")
    ends = torch.gather(cdfs, 1, lengths.long()[:, None] - 1)[:, 0]
    grows = (cdfs.diff(dim=1) > 0) | (torch.arange(1, cdfs.shape[1])[None, :] >= lengths[:, None])
    wrong = (cdfs[:, 0] != 0) | (ends != _TOTAL) | ~grows.all(1)
    if bool(wrong.any()):
        raise ValueError(
            f"{f}: a row of cdfs must grow strictly from 0 to {_TOTAL}, got row {int(wrong.nonzero()[0])} otherwise; "
            "every symbol needs a frequency"
        )
    return _op.pack(cdfs, lengths, offsets)


def ans_encode(
    symbols: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor, packed: Tensor
) -> Tensor:
    """The stream of CompressAI's RansEncoder.encode_with_indexes, as uint8 [bytes].

    symbols, indexes int32 of one shape on the CPU, coded in the order of a contiguous copy; indexes in [0, M). cdfs,
    lengths, offsets: those that `packed` was made of by ans_pack. Every int32 symbol has a code.

    Raises ValueError for shapes and for an index outside [0, M), TypeError for dtypes and devices, BackendError for a
    forced backend.
    Source: CompressAI (Begaint et al., 2020, arXiv:2011.03029), rANS by Giesen's rans64.
    """
    f = "ans_encode"
    for name, value in (("symbols", symbols), ("indexes", indexes)):
        _codeable(f, name, value)
    _check.same_shape(f, ("symbols", symbols), ("indexes", indexes))
    stream = torch.ops.lic_fast.ans_coder_encode(symbols, indexes, cdfs, lengths, offsets, packed)
    if stream.numel() == 0:
        raise ValueError(_outside(f, indexes, cdfs))
    return stream


def ans_decode_(
    stream: Tensor, state: Tensor, indexes: Tensor, cdfs: Tensor, lengths: Tensor, offsets: Tensor, packed: Tensor
) -> Tensor:
    """The next symbols of a stream, int32 of the shape of indexes; state moves on, and stays where this raises.

    stream uint8 [bytes]; state int64 [3]: the coder's 64 bits (at first those of the stream's first 8 bytes), how many
    words of 4 bytes are read (at first 2), and room for the outcome; indexes int32 on the CPU, read in the order of a
    contiguous copy. The others: see ans_encode.

    Raises BitstreamError where the stream runs out or holds a value of more than 32 bits, ValueError for an index
    outside [0, M), TypeError for dtypes and devices, BackendError for a forced backend.
    Source: as ans_encode.
    """
    f = "ans_decode_"
    if type(indexes) is not Tensor or indexes.dtype is not torch.int32 or not indexes.is_cpu:
        _codeable(f, "indexes", indexes)
    attempt = _op.attempt_decode(stream, state, indexes, packed)
    if attempt is None:
        symbols = torch.ops.lic_fast.ans_coder_decode_(stream, state, indexes, cdfs, lengths, offsets, packed)
        outcome = int(state[2])
    else:
        outcome, symbols = attempt
    if outcome != _op.DONE:
        if outcome == _op.INDEX_OUTSIDE:
            raise ValueError(_outside(f, indexes, cdfs))
        what = "runs out" if outcome == _op.RAN_OUT else "holds a value of more than 32 bits"
        raise BitstreamError(
            f"{f}: the stream of {stream.numel()} bytes {what} within {indexes.numel()} symbols; it is damaged, or was "
            "made with other tables or indexes"
        )
    return symbols


def _codeable(f: str, name: str, value: object) -> None:
    value = _check.tensor(f, name, value)
    _check.dtype_in(f, name, value, (torch.int32,))
    if value.device.type != "cpu":
        raise TypeError(f"{f}: {name} must be on the CPU, got {value.device}; move it with .cpu()")


def _outside(f: str, indexes: Tensor, cdfs: Tensor) -> str:
    return f"{f}: indexes must be in [0, {len(cdfs)}), got {int(indexes.min())} to {int(indexes.max())}; clamp them"
