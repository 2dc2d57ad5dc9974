"""Entropy coding in lic_fast's own bitstream (docs/BITSTREAM.md): one call for a batch, the same bytes everywhere."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops import rans_coder as _op
from ..ops.rans_coder import container as _container
from . import _check
from .coding import BitstreamError

LADDER_LEVELS = _container.LADDER_LEVELS
MOST_COMPONENTS = 16  # of a mixture
MOST_LANES = 32  # of a stream
_HEAD = struct.Struct("<4sBBHIIi")
_MOST_ROWS, _MOST_LEVELS, _MOST_SIZE, _MOST_SHIFT = 4000, 1 << 16, 255, 15
_SENTENCES = {
    _container.TRUNCATED: "the stream is truncated, it has {got} bytes",
    _container.FOREIGN: "not a lic_fast stream, it does not begin with LFR",
    _container.VERSION: "the stream is of another version, this build reads 1; update lic_fast",
    _container.PROFILE: "the stream is of a profile that this build does not know; update lic_fast",
    _container.FLAGS: "the stream has flags that this build does not know; it is damaged or newer",
    _container.NUMBER: "a number in the header is malformed or too large; the stream is damaged",
    _container.IMPOSSIBLE: "the header has sizes that no encoder writes; the stream is damaged",
    _container.TRAILING: "the stream is followed by other data, it has {got} bytes and needs {need}",
    _container.CHECK: "the CRC-32C does not match; the stream is damaged",
    _container.PADDING: "unused bits are set; the stream is damaged",
    _container.RAN_OUT: "the stream runs out; it is damaged, or was made with other indexes",
    _container.NO_LADDER: "these tables have no ladder for scales, and none to skip on; pass indexes, and skip=0",
    _container.INDEX_OUTSIDE: "an index is outside the tables, or a place outside the values; clamp them",
    _container.LEFT_OVER: "the symbols do not end where the stream does; it is damaged, or was made with other indexes",
}
_STATUS_PROFILE = [_container.STATUS, _container.PROFILE_AT]
_NOT_MIXTURES = "parameters have weights, ranges or means that mixture_parameters never gives; pass what it gives"


def rans_pack(serialized: bytes) -> Tensor:
    """What rans_encode and rans_decode_ look up, from a serialised table set (docs/BITSTREAM.md, section 2), int64 [*].

    Raises TypeError where it is not bytes, ValueError for what is no table set.
    Source: our choice; interleaved rANS tables as in Giesen (2014, arXiv:1402.3392).
    """
    f = "rans_pack"
    if not isinstance(serialized, bytes):
        raise TypeError(f"{f}: a serialised table set must be bytes, got {type(serialized).__name__}")
    if len(serialized) < _HEAD.size or serialized[:4] != b"LFTB":
        raise ValueError(f"{f}: not a table set, it begins with {serialized[:4]!r}; use Tables.serialized")
    _, precision, zero, zeros, rows, levels, ladder = _HEAD.unpack_from(serialized)
    if not (10 <= precision <= 15 and 1 <= rows <= _MOST_ROWS and 1 <= levels <= _MOST_LEVELS) or zero or zeros:
        raise ValueError(
            f"{f}: precision 10 to 15, 1 to {_MOST_ROWS} rows and 1 to {_MOST_LEVELS} levels are needed, "
            f"got {precision}, {rows} and {levels}; split the tables"
        )
    if not -1 <= ladder <= levels - LADDER_LEVELS and ladder != -1:
        raise ValueError(f"{f}: a ladder has {LADDER_LEVELS} levels, got its first at {ladder} of {levels}")
    at = _HEAD.size
    if len(serialized) < at + 4 * rows:
        raise ValueError(f"{f}: the rows are truncated, got {len(serialized)} bytes")
    head = np.frombuffer(serialized, np.dtype([("offset", "<i2"), ("size", "<u2")]), rows, at)
    offsets, sizes = head["offset"].astype(np.int64), head["size"].astype(np.int64)
    at += 4 * rows
    entries = int((sizes + 1).sum())
    if sizes.max() > _MOST_SIZE or len(serialized) != at + 2 * entries + 4 * levels:
        raise ValueError(
            f"{f}: rows of up to {_MOST_SIZE} symbols and their frequencies are needed, got {len(serialized)} bytes "
            f"for {entries} frequencies; make the tables again"
        )
    counts = np.frombuffer(serialized, "<u2", entries, at).astype(np.int64)
    sums = np.add.reduceat(counts, np.concatenate([[0], np.cumsum(sizes + 1)[:-1]]))
    if counts.min() < 1 or (sums != 1 << precision).any():
        raise ValueError(f"{f}: the frequencies of a row must be 1 at least and sum to {1 << precision}; allocate them")
    level = np.frombuffer(
        serialized, np.dtype([("row", "<u2"), ("shift", "u1"), ("zero", "u1")]), levels, at + 2 * entries
    )
    if level["row"].max() >= rows or level["shift"].max() > _MOST_SHIFT or level["zero"].any():
        raise ValueError(
            f"{f}: a level names a row below {rows} and a shift to {_MOST_SHIFT}, got others; check the levels"
        )
    table_hash = int.from_bytes(hashlib.sha256(serialized).digest()[:8], "little", signed=True)
    return _op.pack(
        precision, ladder, table_hash, offsets, sizes, counts, level["row"].astype(np.int64), level["shift"]
    )


def rans_lanes(lanes: int | str, elements: int) -> tuple[int, int]:
    """(lanes of a stream, streams) that `lanes` means for so many elements.

    Raises ValueError for a number that is neither a power of two up to 32 nor a multiple of 32 up to 131072.
    Source: our choice (docs/BITSTREAM.md, section 6).
    """
    if lanes == "auto":
        for most, few in ((256, 1), (2048, 4), (8192, 8), (16384, 16)):
            if elements < most:
                return few, 1
        streams = 1
        while streams < 64 and (2 * streams) ** 2 << 19 <= elements:
            streams *= 2
        return MOST_LANES, streams
    if isinstance(lanes, int) and not isinstance(lanes, bool):
        if lanes in (1, 2, 4, 8, 16, 32):
            return lanes, 1
        if lanes > 0 and lanes % MOST_LANES == 0 and lanes <= MOST_LANES * _container.MOST_STREAMS:
            return MOST_LANES, lanes // MOST_LANES
    raise ValueError(
        f"rans_lanes: lanes must be 'auto', a power of two up to 32 or a multiple of 32 up to 131072, got {lanes!r}"
    )


def _elements(f: str, indexes: object, packed: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What tells how elements are coded, contiguous, and (samples, elements of each)."""
    if not _op.of_mixtures(packed):
        indexes = _rows(f, "indexes", indexes, _op.INDEX_DTYPES)
        return indexes, (indexes.shape[0], indexes.shape[1])
    tensor = _check.tensor(f, "parameters", indexes)
    _check.dtype_in(f, "parameters", tensor, (torch.int32,))
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{f}: parameters must be on the CPU or a GPU, got {tensor.device}; move them with .cpu()")
    planes = tensor.shape[1] if tensor.dim() == 3 else 0
    if planes % 2 or not 4 <= planes <= 2 + 2 * MOST_COMPONENTS:
        raise ValueError(
            f"{f}: parameters must be [B, 2 + 2 K, N] of 1 to {MOST_COMPONENTS} components, got {list(tensor.shape)}; "
            "pass what mixture_parameters gives"
        )
    return tensor.detach().contiguous(), (tensor.shape[0], tensor.shape[2])


def _rows(f: str, name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    tensor = _check.tensor(f, name, value)
    _check.dtype_in(f, name, tensor, dtypes)
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{f}: {name} must be on the CPU or a GPU, got {tensor.device}; move it with .cpu()")
    if tensor.dim() != 2:
        raise ValueError(f"{f}: {name} must be [B, N], got {list(tensor.shape)}; flatten each sample")
    return tensor.detach().contiguous()


def _outside(f: str, indexes: Tensor, packed: Tensor) -> str:
    if _op.of_mixtures(packed):
        return f"{f}: {_NOT_MIXTURES}"
    return (
        f"{f}: indexes must be in [0, {int(packed[2])}), got {int(indexes.min())} to {int(indexes.max())}; clamp them"
    )


def _check_ladder(f: str, indexes: Tensor, packed: Tensor, skip: int) -> None:
    _check.same_device(f, ("indexes", indexes), ("packed", packed))
    if skip and _op.of_mixtures(packed):
        raise ValueError(f"{f}: mixtures are never skipped, got skip={skip}; pass skip=0")
    if packed.is_cpu and (indexes.dtype is torch.float32 or skip) and int(packed[4]) < 0:
        raise ValueError(f"{f}: these tables have no ladder for scales, and none to skip on; pass indexes, and skip=0")


def rans_encode(
    symbols: Tensor,
    indexes: Tensor,
    packed: Tensor,
    *,
    shape: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    lanes: int | str = "auto",
    skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """Containers of B samples, one after the other as uint8 [bytes], and how long each is, int64 [B].

    symbols int32 [B, N], any values; indexes [B, N]: int32 or uint8 levels of the tables, or fp32 scales, of which the
    kernel takes the level itself; or a mixture's integers, int32 [B, 2 + 2 K, N]. packed: of rans_pack, or of
    rans_pack_mixture for mixtures. All three on the CPU or on one GPU, where the containers then are; the lengths are
    on the CPU. shape: of a sample, of N elements (default [N]); or steps: the
    elements of each step of a stepwise stream, N in all. skip: elements of the first `skip` levels of the ladder are 0
    and not coded.

    Raises ValueError for shapes, lanes, indexes outside the tables, and symbols other than 0 where they are skipped;
    TypeError for dtypes and devices; BackendError for a forced backend.
    Source: docs/BITSTREAM.md; interleaved rANS by Giesen (2014, arXiv:1402.3392), out-of-band escapes and tail our
    choice.
    """
    f = "rans_encode"
    symbols, (indexes, held) = _rows(f, "symbols", symbols, (torch.int32,)), _elements(f, indexes, packed)
    if symbols.shape != held:
        raise ValueError(f"{f}: shapes must agree, got {list(symbols.shape)} and {list(held)}; expand one")
    _check.same_device(f, ("symbols", symbols), ("indexes", indexes))
    if not 0 <= skip <= LADDER_LEVELS:
        raise ValueError(f"{f}: skip must be 0 to {LADDER_LEVELS} levels, got {skip}")
    _check_ladder(f, indexes, packed, skip)
    n = symbols.shape[1]
    sizes = [n] if steps is None else [int(step) for step in steps]
    sides = [n] if shape is None else [int(side) for side in shape]
    if (steps is None and math.prod(sides) != n) or sum(sizes) != n or min(sizes, default=0) < 0:
        raise ValueError(f"{f}: shape or steps must hold the {n} elements of a sample, got {sides} and {sizes}")
    if len(sides) > _container.MOST_DIMENSIONS:
        raise ValueError(f"{f}: a shape has at most {_container.MOST_DIMENSIONS} sides, got {sides}; flatten some")
    width, streams = rans_lanes(lanes, n)
    flags = width.bit_length() - 1 | 8 * bool(skip) | 16 * (steps is not None)
    head = (
        b"LFR\1"
        + bytes([int(_op.of_mixtures(packed)), flags])
        + int(packed[_op.HASH_WORD]).to_bytes(8, "little", signed=True)
    )
    head += (bytes([skip]) if skip else b"") + _container.varint(streams)
    counts = [len(sides), *sides] if steps is None else [len(sizes), n]
    head += b"".join(_container.varint(count) for count in counts)
    stream, lengths = torch.ops.lic_fast.rans_coder_encode(
        symbols, indexes, packed, torch.frombuffer(bytearray(head), dtype=torch.uint8),
        torch.tensor(sizes, dtype=torch.int64), width, streams, skip,
    )  # fmt: skip
    _raise_for_encoder(f, -int(lengths[0]), indexes, packed)
    return stream, lengths[: len(symbols)]


def _raise_for_encoder(f: str, status: int, indexes: Tensor, packed: Tensor) -> None:
    if status == _container.INDEX_OUTSIDE:
        raise ValueError(_outside(f, indexes, packed))
    if status == _container.NO_LADDER:
        raise ValueError(f"{f}: {_SENTENCES[status]}")
    if status == _container.NOT_ZERO:
        raise ValueError(f"{f}: a symbol of a skipped level is not 0; set those to 0 before, or pass skip=0")


def rans_open(stream: Tensor, packed: Tensor, *, check: bool = True) -> Tensor:
    """The state of a container that a decoder starts from, int64 [32 + 24 W] (docs: reference/_rans_container.py).

    stream: uint8 [bytes] on the CPU, contiguous. check: whether the CRC is looked at; the rest always is.

    Raises BitstreamError, naming what is wrong: truncated, followed by other data, damaged, foreign, newer than this
    build, or made with other tables. TypeError for dtypes and devices. Source: as rans_encode.
    """
    f = "rans_open"
    _check.dtype_in(f, "stream", _check.tensor(f, "stream", stream), (torch.uint8,))
    if not stream.is_cpu or stream.dim() != 1 or not stream.is_contiguous():
        raise TypeError(
            f"{f}: a stream is uint8 [bytes], contiguous on the CPU, got {list(stream.shape)} {stream.device}"
        )
    state = torch.ops.lic_fast.rans_coder_open(stream, check)
    status, need, hashed = int(state[0]), int(state[_container.BYTES]), int(state[_container.HASH])
    if status:
        raise BitstreamError(f"{f}: {_SENTENCES[status].format(got=stream.numel(), need=need)}")
    if hashed != int(packed[_op.HASH_WORD]):
        name = hashed.to_bytes(8, "little", signed=True).hex()
        raise BitstreamError(f"{f}: the stream was made with the tables {name}, which these are not; pass those")
    mixtures = _op.of_mixtures(packed)
    if int(state[_container.PROFILE_AT]) != int(mixtures):
        kinds = ("tables", "mixtures") if mixtures else ("mixtures", "tables")
        raise BitstreamError(f"{f}: the stream is one of {kinds[0]}, decoded as one of {kinds[1]}; pass those")
    return state


def _step(
    f: str, streams: Sequence[Tensor], states: Sequence[Tensor], indexes: Tensor, packed: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    if not len(streams) == len(states) == len(indexes):
        raise ValueError(
            f"{f}: {len(indexes)} samples need as many streams and states, got {len(streams)} and {len(states)}"
        )
    for tensor in (*streams, *states):
        _check.same_device(f, ("indexes", indexes), ("a stream or state", tensor))
    _check_ladder(f, indexes, packed, 0)
    return list(streams), list(states)


def rans_decode_(
    streams: Sequence[Tensor], states: Sequence[Tensor], indexes: Tensor, packed: Tensor, *, last: bool
) -> Tensor:
    """The next step of B containers, int32 [B, n]; the states, of rans_open, move on.

    indexes [B, n], or mixtures' integers [B, 2 + 2 K, n]: as the encoder had them. last: whether this is the last step,
    after which nothing may be left over. All tensors lie on the CPU, or on one GPU, where nothing is waited for: what
    goes wrong is kept in the states until rans_check is called, and the symbols mean nothing before that.

    Raises BitstreamError where a stream runs out, or ends elsewhere; ValueError for shapes and indexes outside the
    tables, TypeError for dtypes and devices, BackendError for a forced backend. After an error the states mean nothing.
    Source: as rans_encode.
    """
    f = "rans_decode_"
    indexes, held = _elements(f, indexes, packed)
    streams, states = _step(f, streams, states, indexes, packed)
    symbols = torch.empty(held, dtype=torch.int32, device=indexes.device)
    if len(indexes) == 0:
        return symbols
    torch.ops.lic_fast.rans_coder_decode_(streams, states, indexes, packed, symbols, last)
    if indexes.is_cpu:
        if int(states[0][0]) == _container.INDEX_OUTSIDE:
            raise ValueError(_outside(f, indexes, packed))
        _raise_for(f, int(states[0][0]))
    return symbols


def rans_reconstruct_(
    streams: Sequence[Tensor],
    states: Sequence[Tensor],
    indexes: Tensor,
    packed: Tensor,
    means: Tensor | None,
    values: Tensor,
    *,
    places: Tensor | None = None,
    last: bool,
) -> Tensor:
    """The next step of B containers as values of a latent: symbols plus means, written where they belong.

    values fp32 [B, M], contiguous, written in place and returned; indexes, means (or None) of its shape, fp32 means.
    places int32 [n], each once: the step's element i has its index, its mean and its value there; None: all M, in
    order. The rest as in rans_decode_; on a GPU one launch, which a CUDA graph can hold.

    Raises what rans_decode_ raises; ValueError and TypeError for means, places and values too.
    Source: as rans_encode; the fusion is our choice.
    """
    f = "rans_reconstruct_"
    if _op.of_mixtures(packed):
        raise ValueError(f"{f}: tables of levels are needed, got those of mixtures; use rans_decode_, and add means")
    indexes = _rows(f, "indexes", indexes, _op.INDEX_DTYPES)
    _check.dtype_in(f, "values", _check.tensor(f, "values", values), (torch.float32,))
    _check.same_shape(f, ("values", values), ("indexes", indexes), ("means", means))
    if not values.is_contiguous():
        raise ValueError(f"{f}: values must be contiguous, got strides {values.stride()}; write into a contiguous one")
    _check.no_gradient(f, "values", [values])
    others = [("indexes", indexes)]
    if means is not None:
        means = _rows(f, "means", means, (torch.float32,))
        others.append(("means", means))
    if places is not None:
        _check.dtype_in(f, "places", _check.tensor(f, "places", places), (torch.int32,))
        if places.dim() != 1 or (values.shape[1] == 0 and len(places)):
            raise ValueError(f"{f}: places must be [n] in [0, {values.shape[1]}), got {list(places.shape)}")
        places = places.contiguous()
        others.append(("places", places))
    for other in others:
        _check.same_device(f, ("values", values), other)
        _check.no_overlap(f, ("values", values), other)
    streams, states = _step(f, streams, states, indexes, packed)
    if len(indexes) == 0:
        return values
    torch.ops.lic_fast.rans_coder_reconstruct_(streams, states, indexes, packed, means, places, values, last)
    if values.is_cpu:
        _raise_for(f, int(states[0][0]))
    return values


def rans_check(states: Sequence[Tensor]) -> None:
    """Waits for the steps decoded on a GPU, and says what went wrong in any; on the CPU they have said it themselves.

    states: those that rans_decode_ and rans_reconstruct_ moved on.

    Raises BitstreamError where a stream ran out, or ended elsewhere; ValueError for indexes outside the tables,
    mixtures' integers outside their limits, places outside the values, and scales for tables without a ladder.
    Source: our choice.
    """
    if len(states):
        for status, profile in torch.stack([state[: _container.HEAD] for state in states])[:, _STATUS_PROFILE].tolist():
            if profile and status == _container.INDEX_OUTSIDE:
                raise ValueError(f"rans_check: {_NOT_MIXTURES}")
            _raise_for("rans_check", status)


def _raise_for(f: str, status: int) -> None:
    if status in (_container.INDEX_OUTSIDE, _container.NO_LADDER):
        raise ValueError(f"{f}: {_SENTENCES[status]}")
    if status:
        text = _SENTENCES[status]
        raise BitstreamError(f"{f}: {text}")
