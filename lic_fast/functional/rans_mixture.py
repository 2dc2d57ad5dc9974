"""Mixtures in lic_fast's bitstream (docs/BITSTREAM.md, section 7): their table, and their integers."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
from torch import Tensor

from ..ops import rans_coder as _op
from . import _check
from .rans import MOST_COMPONENTS

_HEAD = struct.Struct("<4sBBH")
_ENTRIES, _LENGTHS = 64, 17
_BYTES = _HEAD.size + 4 * _ENTRIES + 2 * _LENGTHS
_MOST_REACH = 256  # 16 scales


def rans_pack_mixture(serialized: bytes) -> Tensor:
    """What coding with mixtures looks up, from a serialised table of half masses (docs/BITSTREAM.md), int64 [*].

    Raises TypeError where it is not bytes, ValueError for what is no such table.
    Source: our choice.
    """
    f = "rans_pack_mixture"
    if not isinstance(serialized, bytes):
        raise TypeError(f"{f}: a serialised table must be bytes, got {type(serialized).__name__}")
    if len(serialized) != _BYTES or serialized[:4] != b"LFMX":
        raise ValueError(
            f"{f}: not a table of mixtures, it begins with {serialized[:4]!r} and has {len(serialized)} bytes; use "
            "MixtureTables.serialized"
        )
    _, precision, steps, zeros = _HEAD.unpack_from(serialized)
    if not (12 <= precision <= 16 and 1 <= steps <= 15) or zeros:
        raise ValueError(f"{f}: precision 12 to 16 and 1 to 15 entries a scale are needed, got {precision} and {steps}")
    pairs = np.frombuffer(serialized, "<u2", 2 * _ENTRIES, _HEAD.size).astype(np.int64).reshape(_ENTRIES, 2)
    halves, slopes = pairs.T
    if halves[0] or (halves[1:] != (halves + slopes)[:-1]).any() or halves[-1] + slopes[-1] > 0xFFFF:
        raise ValueError(f"{f}: half masses must rise from 0 to 65535 at most, each by what it says; make them again")
    reach = np.frombuffer(serialized, "<u2", _LENGTHS, _BYTES - 2 * _LENGTHS).astype(np.int64)
    if reach.max() > _MOST_REACH:
        raise ValueError(f"{f}: a reach is at most {_MOST_REACH}, got {reach.max()}; make the table again")
    table_hash = int.from_bytes(hashlib.sha256(serialized).digest()[:8], "little", signed=True)
    return _op.pack_mixture(precision, steps, table_hash, halves, slopes, reach)


def mixture_parameters(scales: Tensor, means: Tensor, weights: Tensor, packed: Tensor, *, dim: int = 0) -> Tensor:
    """The integers that code elements of mixtures, int32, of the shape of scales with 2 + 2 K for K along dim.

    scales, means, weights: fp32 [*, K, *] of one shape, K (1 to 16) components along dim. Scales are taken between
    2**-7 and 2**19; weights need not sum to 1; means may be anything in the range of int32. packed: of
    rans_pack_mixture. All on the CPU or on one GPU, where nothing is waited for.

    No transcendental function takes part, and every operation is rounded by itself: all implementations of lic_fast
    give the same integers for the same floats. But two machines' models may not give the same floats: run this once,
    where that matters, and use its result on both sides.

    Raises ValueError for shapes, TypeError for dtypes and devices, BackendError for a forced backend.
    Source: our choice (docs/BITSTREAM.md, section 7).
    """
    f = "mixture_parameters"
    tensors = []
    for name, value in (("scales", scales), ("means", means), ("weights", weights)):
        tensor = _check.tensor(f, name, value)
        _check.dtype_in(f, name, tensor, (torch.float32,))
        if tensor.device.type not in ("cpu", "cuda"):
            raise TypeError(f"{f}: {name} must be on the CPU or a GPU, got {tensor.device}; move it with .cpu()")
        tensors.append(tensor.detach())
    named = list(zip(("scales", "means", "weights"), tensors, strict=True))
    _check.same_shape(f, *named)
    for other in (*named[1:], ("packed", packed)):
        _check.same_device(f, named[0], other)
    shape = list(scales.shape)
    if not -len(shape) <= dim < len(shape) or not 1 <= shape[dim] <= MOST_COMPONENTS:
        raise ValueError(f"{f}: 1 to {MOST_COMPONENTS} components along dim {dim} are needed, got {shape}; pass dim")
    dim %= len(shape)
    # one sample's planes must lie one after the other
    before, after = shape[:dim], shape[dim + 1 :]
    planes = [tensor.reshape(torch.Size(before).numel(), shape[dim], torch.Size(after).numel()) for tensor in tensors]
    words = torch.ops.lic_fast.rans_coder_mixture(*(plane.contiguous() for plane in planes), packed)
    return words.view(*before, 2 + 2 * shape[dim], *after)
