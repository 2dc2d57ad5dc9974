"""Table sets: integer distributions that a stream names by their hash (docs/BITSTREAM.md, section 2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..functional.rans import rans_pack
from ._allocate import MOST_SYMBOLS, best_row
from ._serialize import HEAD, LADDER_LEVELS, Serialized, deserialize, serialize

FAMILIES = ("gaussian", "laplace", "logistic")
_FOLDER = Path(__file__).parent / "constant_tables"
_MASS_BITS = 60
_MOST_SHIFT = 15


class Tables(Serialized):
    """A table set, checked once, and what coding with it looks up.

    serialized: the bytes of a set (store these with a model whose tables they are). len() is the number of levels, the
    values that an index may have; `ladder` the first of the 244 levels that scales select, or -1; `hash` 16 hexadecimal
    digits, which every stream carries. Pickles and copies as its bytes.

    Raises TypeError where it is not bytes, ValueError for what is no table set.
    Source: our choice.
    """

    def __init__(self, serialized: bytes) -> None:
        super().__init__(serialized, rans_pack(serialized))
        self.precision, self.ladder = HEAD.unpack_from(serialized)[1], HEAD.unpack_from(serialized)[-1]

    def __len__(self) -> int:
        return HEAD.unpack_from(self.serialized)[5]

    def __repr__(self) -> str:
        return f"Tables({len(self)} levels, hash {self.hash})"


@functools.cache
def constant_tables(family: str = "gaussian") -> Tables:
    """The tables that ship with lic_fast, for scales: "gaussian", "laplace" or "logistic". They never change.

    Raises ValueError for another family.
    Source: our choice; lic_fast/coding/_generate.py made them.
    """
    if family not in FAMILIES:
        raise ValueError(f"constant_tables: unknown family, got {family!r}; use one of {', '.join(FAMILIES)}")
    return Tables((_FOLDER / f"{family}.bin").read_bytes())


def factorized_tables(probabilities: Tensor, first: Tensor, *, precision: int = 14) -> Tables:
    """A level a channel, from a trained model's distributions; store what comes of it with the model.

    probabilities float64 [C, L]: of the symbols first[c] + 0 ... L - 1, what they lack to 1 is the probability of all
    others; first int [C], -32768 to 32767. The same probabilities give the same tables on every machine, but two
    machines' models may differ: send tables, not models. A row keeps up to 255 symbols; wider distributions code their
    low bits plainly.

    Raises ValueError for shapes, values that are no probabilities and precisions other than 10 to 15; TypeError for
    dtypes. Source: our choice.
    """
    f = "factorized_tables"
    if probabilities.dtype is not torch.float64 or first.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{f}: float64 and an integer dtype are needed, got {probabilities.dtype} and {first.dtype}")
    if probabilities.dim() != 2 or first.shape != probabilities.shape[:1] or 0 in probabilities.shape:
        raise ValueError(f"{f}: [C, L] and [C] are needed, got {list(probabilities.shape)} and {list(first.shape)}")
    if not 10 <= precision <= 15:
        raise ValueError(f"{f}: precision must be 10 to 15, got {precision}")
    if not bool((probabilities >= 0).all()) or not bool((probabilities.sum(1) < 1 + 1e-6).all()):
        raise ValueError(f"{f}: probabilities must be 0 at least and sum to 1 at most in each channel; normalise them")
    scaled = [[int(p * (1 << _MASS_BITS)) for p in row] for row in probabilities.tolist()]
    made = [_channel(row, int(start), precision) for row, start in zip(scaled, first.tolist(), strict=True)]
    if any(not -(1 << 15) <= offset < 1 << 15 for (offset, _), _ in made):
        raise ValueError(f"{f}: first must be -32768 to 32767, got {int(first.min())} to {int(first.max())}")
    return Tables(serialize(precision, -1, [row for row, _ in made], [(c, k) for c, (_, k) in enumerate(made)]))


def _channel(masses: list[int], first: int, precision: int) -> tuple[tuple[int, list[int]], int]:
    """((offset, frequencies), shift): the least shift at which the symbols worth a frequency fit a row."""
    beyond = max(0, (1 << _MASS_BITS) - sum(masses))
    worth = 1 << max(0, _MASS_BITS - precision - 3)
    for shift in range(_MOST_SHIFT + 1):
        half = 1 << shift >> 1
        low = (first + half) >> shift
        blocks = [0] * (((first + len(masses) - 1 + half) >> shift) - low + 1)
        for i, mass in enumerate(masses):
            blocks[((first + i + half) >> shift) - low] += mass
        heavy = [i for i, mass in enumerate(blocks) if mass >= worth]
        if not heavy or heavy[-1] - heavy[0] < MOST_SYMBOLS:
            break
    at, frequencies = best_row(blocks, beyond, 1 << precision)
    return (low + at, frequencies), shift


def join_tables(*tables: Tables) -> Tables:
    """One set for streams that mix several: the levels of the first, then those of the second, and so on.

    The ladder is that of the first set that has one, moved by the levels before it. Raises ValueError where none is
    given, precisions differ, or the limits of a set are exceeded. Source: our choice.
    """
    if len({table.precision for table in tables}) != 1:
        raise ValueError(f"join_tables: one precision is needed, got {[table.precision for table in tables]}")
    rows: list[tuple[int, Sequence[int]]] = []
    levels: list[tuple[int, int]] = []
    ladder = -1
    for table in tables:
        _, own_ladder, own_rows, own_levels = deserialize(table.serialized)
        ladder = len(levels) + own_ladder if ladder < 0 <= own_ladder else ladder
        levels += [(row + len(rows), shift) for row, shift in own_levels]
        rows += own_rows
    return Tables(serialize(tables[0].precision, ladder, rows, levels))


__all__ = ["FAMILIES", "LADDER_LEVELS", "Tables", "constant_tables", "factorized_tables", "join_tables"]
