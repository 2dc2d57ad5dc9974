"""Makes the constant tables: python -m lic_fast.coding._generate FOLDER. The files that ship were made by this.

The code of a level is the best one for scales that are log-uniform within it: the mean of the distribution over eight
scales in the middle of as many equal parts (on the logarithm), by mpmath to 40 digits, rounded to multiples of 2**-100;
from there on integers. It lies in the package because the tables of a trained model are made by the same allocation,
and anyone who has torch has mpmath (torch needs sympy, sympy needs mpmath).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ._allocate import MOST_SYMBOLS, best_row
from ._serialize import LADDER_LEVELS, serialize

PRECISION = 14
_FIRST = 1980  # the upper 13 bits of the first level's scales
_NODES = 8
_DIGITS = 40
_MASS_BITS = 100
_OWN_ROWS = {"gaussian": 116, "laplace": 100, "logistic": 100}  # levels before the first one with plain bits
_OCTAVE = 16


def _bounds(mpmath: Any, level: int) -> tuple[Any, Any]:
    def edge(key: int) -> Any:
        return mpmath.mpf(_OCTAVE + key % _OCTAVE) / _OCTAVE * mpmath.mpf(2) ** (key // _OCTAVE - 127)

    return edge(_FIRST + level), edge(_FIRST + level + 1)


def tail(mpmath: Any, family: str, x: Any) -> Any:
    """The mass beyond x >= 0 of the family at scale 1."""
    if family == "gaussian":
        return mpmath.erfc(x / mpmath.sqrt(2)) / 2
    if family == "laplace":
        return mpmath.exp(-x) / 2
    return 1 / (1 + mpmath.exp(x))


def make_row(family: str, level: int) -> tuple[int, list[int]]:
    """(offset, frequencies with the escape's last) of a level that has its own row."""
    import mpmath

    with mpmath.workdps(_DIGITS):
        low, high = _bounds(mpmath, level)
        scales = [low * (high / low) ** ((2 * i + mpmath.mpf(1)) / (2 * _NODES)) for i in range(_NODES)]
        reach = MOST_SYMBOLS // 2
        tails = [sum(tail(mpmath, family, (v + mpmath.mpf(0.5)) / s) for s in scales) for v in range(reach + 1)]
        masses = [int(mpmath.nint(mpmath.ldexp(tail / _NODES, _MASS_BITS))) for tail in tails]
    half = [masses[v - 1] - masses[v] for v in range(1, reach + 1)]
    middle = (1 << _MASS_BITS) - 2 * masses[0]
    first, frequencies = best_row([*half[::-1], middle, *half], 2 * masses[-1], 1 << PRECISION)
    return first - reach, frequencies


def make_levels(family: str) -> list[tuple[int, int]]:
    """(row, shift) of the 244 levels."""
    own = _OWN_ROWS[family]
    return [
        (level, 0) if level < own else (own - _OCTAVE + (level - own) % _OCTAVE, 1 + (level - own) // _OCTAVE)
        for level in range(LADDER_LEVELS)
    ]


def make(family: str) -> bytes:
    """The serialised table set."""
    rows = [make_row(family, level) for level in range(_OWN_ROWS[family])]
    return serialize(PRECISION, 0, rows, make_levels(family))


def main(folder: Path) -> None:
    for family in _OWN_ROWS:
        (folder / f"{family}.bin").write_bytes(make(family))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
