"""Mixtures (docs/BITSTREAM.md, section 7): the tables that a stream names by their hash, and elements' integers."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..functional.rans_mixture import mixture_parameters as _parameters
from ..functional.rans_mixture import rans_pack_mixture
from ._serialize import MIXTURE_HEAD, Serialized

MIXTURE_FAMILIES = ("gaussian", "laplace", "logistic")
_FOLDER = Path(__file__).parent / "constant_tables"
_UNIT_BITS = 10


class MixtureTables(Serialized):
    """The table that mixtures of a family are coded with, checked once.

    serialized: its bytes. `hash`: 16 hexadecimal digits, which every stream carries. Pickles and copies as its bytes.

    Raises TypeError where it is not bytes, ValueError for what is no such table.
    Source: our choice.
    """

    ladder = -1

    def __init__(self, serialized: bytes) -> None:
        super().__init__(serialized, rans_pack_mixture(serialized))
        self.precision = MIXTURE_HEAD.unpack_from(serialized)[1]

    def __repr__(self) -> str:
        return f"MixtureTables(hash {self.hash})"


@functools.cache
def mixture_tables(family: str = "gaussian") -> MixtureTables:
    """The tables that ship with lic_fast, for mixtures of "gaussian", "laplace" or "logistic". They never change.

    Raises ValueError for another family.
    Source: our choice; lic_fast/coding/_generate_mixture.py made them.
    """
    if family not in MIXTURE_FAMILIES:
        raise ValueError(f"mixture_tables: unknown family, got {family!r}; use one of {', '.join(MIXTURE_FAMILIES)}")
    return MixtureTables((_FOLDER / f"{family}_mixture.bin").read_bytes())


def mixture_parameters(
    scales: Tensor, means: Tensor, weights: Tensor, tables: MixtureTables, *, dim: int = 0
) -> Tensor:
    """The integers that encode() and decode() take for mixtures: int32, 2 + 2 K along dim where scales have K.

    scales, means, weights: fp32 of one shape on the CPU or a GPU, K (1 to 16) components along dim: [K, *] for symbols
    [*]; with dim=1 [B, K, *] for encode_batch. CompressAI's [B, K * C, H, W] is that after view(B, K, C, H, W). Weights
    need not sum to 1 (of logits, take the softmax). Scales are taken between 2**-7 and 2**19.

    All implementations give the same integers for the same floats, but two machines' models may not give the same
    floats: where that matters, run this once and use its result on both sides. From these integers on everything is
    exact on every device.

    Raises ValueError for shapes, TypeError for dtypes, devices and what are not MixtureTables, BackendError for a
    forced backend. Source: our choice (docs/BITSTREAM.md, section 7).
    """
    if not isinstance(tables, MixtureTables):
        raise TypeError(f"mixture_parameters: tables must be MixtureTables, got {type(tables).__name__}")
    packed = tables.packed_on(scales.device) if isinstance(scales, Tensor) else tables.packed
    return _parameters(scales, means, weights, packed, dim=dim)


def mixture_bits(symbols: Tensor, parameters: Tensor, tables: MixtureTables) -> tuple[Tensor, Tensor]:
    """(the ideal length of each symbol under the integers, plain bits included but no escape values; which escape).

    symbols int32 [n], parameters int32 [2 + 2 K, n].
    """
    n, packed = tables.precision, tables.packed
    entries = packed[8:40].view(torch.int32).long() & 0xFFFFFFFF
    words = parameters.long()
    shift, size = words[1] >> 12 & 15, words[1] & 0xFFF
    value = ((symbols.long() - words[0] + (1 << 31)) % (1 << 32) - (1 << 31)) >> shift
    number = value.clamp(min=0).minimum(size + 1)
    edges = []
    for j in (number, number + 1):
        mass = torch.full_like(j, 1 << 31)
        for mean, form in zip(words[2::2], words[3::2], strict=True):
            y = (j << _UNIT_BITS) - mean
            u = (y.abs() * (256 + (form & 255)) >> (form >> 8 & 31)).clamp(max=(1 << 14) - 1)
            entry = entries[u >> 8]
            mass += y.sign() * (form >> 16 & 0xFFFF) * ((entry >> 16) + ((entry & 0xFFFF) * (u & 255) >> 8))
        slots = j + ((mass >> n) * ((1 << n) - 1 - size) >> (32 - n))
        edges.append(torch.where(j == 0, 0, torch.where(j == size + 2, 1 << n, slots)))
    bits = n - (edges[1] - edges[0]).double().log2() + shift
    return bits, (number == 0) | (number > size)


__all__ = ["MIXTURE_FAMILIES", "MixtureTables", "mixture_bits", "mixture_parameters", "mixture_tables"]
