"""lic_fast::rans_coder_*: the bitstream of docs/BITSTREAM.md, tensors in and out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import _native
from .._dispatch import Impl, OpSpec, register
from ..reference import _rans_container as container
from ..reference.rans_coder import rans_coder_decode_ as reference_decode_
from ..reference.rans_coder import rans_coder_encode as reference_encode
from ..reference.rans_coder import rans_coder_mixture as reference_mixture
from ..reference.rans_coder import rans_coder_open as reference_open
from ..reference.rans_coder import rans_coder_reconstruct_ as reference_reconstruct_
from ..reference.rans_coder import shares
from ._library import define

__all__ = [
    "DECODE_",
    "ENCODE",
    "HASH_WORD",
    "INDEX_DTYPES",
    "MIXTURE",
    "OPEN",
    "RECONSTRUCT_",
    "container",
    "of_mixtures",
    "pack",
    "pack_mixture",
    "shares",
]

INDEX_DTYPES = (torch.int32, torch.uint8, torch.float32)
_HEAD = 8  # 64-bit words: precision, rows, levels, stride, ladder, hash, 0, 0
HASH_WORD = 5
_BUCKETS = 256
_MIXTURE_WORDS = 88
_LINE = 32  # entries of 2 bytes: a cache line
VARIANT = 0  # of csrc/cpu/rans_stream.h: the best of this processor; tests set the others
_SENTINELS = 3  # entries of 2**precision at the end of a row, so that four can be read at once


def pack(
    precision: int,
    ladder: int,
    table_hash: int,
    offsets: np.ndarray,
    sizes: np.ndarray,
    counts: np.ndarray,
    level_rows: np.ndarray,
    level_shifts: np.ndarray,
) -> Tensor:
    """Checked tables as csrc/common/rans.h reads them, int64 [*]: header, levels, starts, buckets.

    offsets, sizes [R]; counts: the frequencies of all rows, the escape's last in each; level_rows, level_shifts [V]. A
    row takes an odd number of cache lines, lest all rows begin in the same few sets of a cache.
    """
    rows, total = len(sizes), 1 << precision
    stride = (-(-(int(sizes.max()) + 1 + _SENTINELS) // _LINE) | 1) * _LINE
    first = np.concatenate([[0], np.cumsum(sizes + 1)])
    starts = np.full((rows, stride), total, np.uint16)
    buckets = np.zeros((rows, _BUCKETS), np.uint8)
    slots = np.arange(_BUCKETS) << (precision - 8)
    for row in range(rows):
        ends = np.cumsum(counts[first[row] : first[row + 1]])
        starts[row, 0], starts[row, 1 : len(ends) + 1] = 0, ends
        buckets[row] = np.searchsorted(ends, slots, side="right")
    keys = level_rows.astype(np.uint32) | level_shifts.astype(np.uint32) << 12
    keys |= offsets[level_rows].astype(np.uint32) << 16
    levels = np.zeros((-(-len(keys) // 256) * 256, 2), np.uint32)
    levels[: len(keys)] = np.stack([keys, sizes[level_rows].astype(np.uint32)], 1)
    head = np.array([precision, rows, len(keys), stride, ladder, table_hash, 0, 0], np.int64)
    parts = [levels.tobytes(), starts.tobytes() + bytes(8), buckets.tobytes() + bytes(8)]
    return torch.from_numpy(np.concatenate([head, *(np.frombuffer(part, np.int64) for part in parts)]))


def pack_mixture(
    precision: int, steps: int, table_hash: int, halves: np.ndarray, slopes: np.ndarray, reach: np.ndarray
) -> Tensor:
    """Checked tables of mixtures as csrc/common/rans_mixture.h reads them, int64 [88].

    Header, entries (halves, slopes [64]), reach [17], quantiles. The header's second word, 0, tells them from those
    that have rows. Quantiles, in 256ths of a scale for 64 equal parts of the slots, say where a search begins.
    """
    entries = halves.astype(np.uint32) << 16 | slopes.astype(np.uint32)
    target = np.abs(np.arange(64) * 2 - 63) << 10  # the middle of a part, as a half mass
    at = np.interp(target, np.append(halves, halves[-1] + slopes[-1]), np.arange(65)) * 256 / steps
    quantiles = np.rint(np.sign(np.arange(64) - 31.5) * at).astype(np.int32)
    head = np.array([precision, 0, len(entries), steps, -1, table_hash, 0, 0], np.int64)
    reaches = np.zeros(32, np.uint32)
    reaches[: len(reach)] = reach
    return torch.from_numpy(np.concatenate([head, *(part.view(np.int64) for part in (entries, reaches, quantiles))]))


def of_mixtures(packed: Tensor) -> bool:
    """Whether packed tables are pack_mixture's, by their size, which no others have: nothing is read on a GPU."""
    return packed.numel() == _MIXTURE_WORDS


def _native_encode(*arguments: object) -> tuple[Tensor, Tensor]:
    return _native.op("cpp", "rans_coder_encode")(*arguments, VARIANT)


def _native_open(stream: Tensor, check: bool) -> Tensor:
    return _native.op("cpp", "rans_coder_open")(stream, check)


def _native_decode_(*arguments: object) -> None:
    _native.op("cpp", "rans_coder_decode_out")(*arguments, VARIANT)


def _native_mixture(*arguments: object) -> Tensor:
    return _native.op("cpp", "rans_coder_mixture")(*arguments, VARIANT)


def _native_reconstruct_(*arguments: object) -> None:
    _native.op("cpp", "rans_coder_reconstruct_out")(*arguments, VARIANT)


def _cuda(name: str) -> Callable[..., object]:
    return lambda *arguments: _native.op("cuda", name)(*arguments)


def _why_not(backend: str) -> Callable[[str], str | None]:
    return lambda device: _native.why_not(backend, device)


_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda",)}


def _spec(
    name: str,
    native: Callable,
    reference: Callable,
    dtypes: tuple[torch.dtype, ...],
    on_cuda: str,
    cuda_takes: str = "cuda",
) -> OpSpec:
    impls = {
        "cuda": Impl(_cuda(on_cuda), (cuda_takes,), dtypes, _why_not("cuda")),
        "cpp": Impl(native, ("cpu",), dtypes, _why_not("cpp")),
        "reference": Impl(reference, ("cpu",), dtypes),
    }
    return register(OpSpec(name, impls, _ORDER))


ENCODE = _spec("rans_coder_encode", _native_encode, reference_encode, (torch.int32,), "rans_coder_encode")
# What a header says the host must know: the CUDA library opens containers on the CPU too.
OPEN = _spec("rans_coder_open", _native_open, reference_open, (torch.uint8,), "rans_coder_open", "cpu")
DECODE_ = _spec("rans_coder_decode_", _native_decode_, reference_decode_, INDEX_DTYPES, "rans_coder_decode_out")
RECONSTRUCT_ = _spec(
    "rans_coder_reconstruct_", _native_reconstruct_, reference_reconstruct_, INDEX_DTYPES, "rans_coder_reconstruct_out"
)
MIXTURE = _spec("rans_coder_mixture", _native_mixture, reference_mixture, (torch.float32,), "rans_coder_mixture")


def _encode(symbols: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return ENCODE(symbols, symbols, *rest)


def _fake_encode(symbols: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    stream = symbols.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
    return stream, torch.empty(max(symbols.shape[0], 1), dtype=torch.int64)


def _open(stream: Tensor, check: bool) -> Tensor:
    return OPEN(stream, stream, check)


def _fake_open(stream: Tensor, check: bool) -> Tensor:
    return stream.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _decode_(
    streams: list[Tensor], states: list[Tensor], indexes: Tensor, packed: Tensor, symbols: Tensor, last: bool
) -> None:
    DECODE_(indexes, streams, states, indexes, packed, symbols, last)


def _fake_decode_(*_: object) -> None:
    return None


def _mixture(scales: Tensor, means: Tensor, weights: Tensor, packed: Tensor) -> Tensor:
    return MIXTURE(scales, scales, means, weights, packed)


def _fake_mixture(scales: Tensor, means: Tensor, weights: Tensor, packed: Tensor) -> Tensor:
    batch, components, n = scales.shape
    return scales.new_empty((batch, 2 + 2 * components, n), dtype=torch.int32)


def _reconstruct_(
    streams: list[Tensor],
    states: list[Tensor],
    indexes: Tensor,
    packed: Tensor,
    means: Tensor | None,
    places: Tensor | None,
    values: Tensor,
    last: bool,
) -> None:
    RECONSTRUCT_(indexes, streams, states, indexes, packed, means, places, values, last)


define(
    "rans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed, Tensor head, Tensor steps, int lanes, "
    "int streams, int skip) -> (Tensor, Tensor)",
    _encode,
    _fake_encode,
)
define("rans_coder_open(Tensor stream, bool check) -> Tensor", _open, _fake_open)
define(
    "rans_coder_mixture(Tensor scales, Tensor means, Tensor weights, Tensor packed) -> Tensor", _mixture, _fake_mixture
)
define(
    "rans_coder_decode_(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor(b!) symbols, "
    "bool last) -> ()",
    _decode_,
    _fake_decode_,
)
define(
    "rans_coder_reconstruct_(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor? means, "
    "Tensor? places, Tensor(b!) values, bool last) -> ()",
    _reconstruct_,
    _fake_decode_,
)
