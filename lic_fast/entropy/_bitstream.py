"""What format="lic_fast" of the drop-ins' compress() and decompress() does: lic_fast's bitstream, docs/BITSTREAM.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..coding import MixtureTables, Tables, decode_batch, encode_batch, factorized_tables

FORMATS = ("compressai", "lic_fast")
_TOTAL = 1 << 16  # of CompressAI's cumulative distributions
_PRECISION = 15


def is_own(function: str, format: str) -> bool:
    """Whether `format` is lic_fast's, not CompressAI's. Raises ValueError where it is neither."""
    if format not in FORMATS:
        raise ValueError(f"{function}: unknown format, got {format!r}; use one of {', '.join(FORMATS)}")
    return format == "lic_fast"


def encode_samples(symbols: Tensor, indexes: Tensor, tables: Tables | MixtureTables) -> list[bytes]:
    """A container for each sample of symbols [B, *], in one call."""
    return encode_batch(symbols.to("cpu", torch.int32), _on_cpu(indexes), tables)


def decode_samples(strings: Sequence[bytes], indexes: Tensor, tables: Tables | MixtureTables) -> Tensor:
    """The symbols of B containers, int32 of the shape of indexes [B, *] (mixtures: [B, P, *]), on the CPU."""
    return decode_batch(strings, _on_cpu(indexes), tables)


def _on_cpu(indexes: Tensor) -> Tensor:
    taken = indexes.dtype in (torch.float32, torch.uint8, torch.int32)
    return indexes.detach().to("cpu", indexes.dtype if taken else torch.int32)


def tables_of_cdfs(cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tables:
    """A level for each of the rows that CompressAI's EntropyModel.update() makes, in integers.

    cdfs int32 [C, L], lengths int32 [C], offsets int32 [C], any device. The state dict of a model holds these, so that
    whoever has the same state dict has the same tables, on every machine: a count by 2**16 is exact, and what follows
    is integers. The precision is the highest, for CompressAI gives every symbol a count, however improbable.
    Raises ValueError for rows that are no cumulative distributions.
    """
    cdfs, lengths, offsets = (t.detach().to("cpu", torch.int64) for t in (cdfs, lengths, offsets))
    counts = cdfs.diff(dim=1)
    in_row = torch.arange(counts.shape[1]) < lengths[:, None] - 2
    counts = torch.where(in_row, counts, 0)[:, : max(1, int(lengths.max()) - 2)]
    return factorized_tables(counts.double() / _TOTAL, offsets, precision=_PRECISION)
