"""Makes the mixtures' tables: python -m lic_fast.coding._generate_mixture FOLDER. It made the files that ship.

By mpmath to 40 digits, then integers (docs/BITSTREAM.md, section 7).
"""

from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path
from typing import Any

from ._generate import tail
from ._serialize import MIXTURE_HEAD, MIXTURE_MAGIC

PRECISION = 14
STEPS = {"gaussian": 14, "laplace": 6, "logistic": 6}  # entries that make one scale
_ENTRIES = 64
_HALF_BITS = 17  # a half mass is a multiple of 2**-17
_BEYOND_BITS = 17  # a component's tail beyond its reach has this probability, times its weight
_WEIGHT_BITS = 15
_DIGITS = 40


def _quantile(mpmath: Any, family: str, beyond: Any) -> Any:
    """The x at which the family's tail is `beyond`, by bisection."""
    low, high = mpmath.mpf(0), mpmath.mpf(64)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(mpmath, family, middle) > beyond else (low, middle)
    return low


def make(family: str, precision: int = PRECISION) -> bytes:
    """The serialised table of a family."""
    import mpmath

    with mpmath.workdps(_DIGITS):
        halves = [
            int(mpmath.nint(mpmath.ldexp(0.5 - tail(mpmath, family, mpmath.mpf(i) / STEPS[family]), _HALF_BITS)))
            for i in range(_ENTRIES + 1)
        ]
        halves = [min(half, (1 << _HALF_BITS - 1) - 1) for half in halves]
        reach = [0]
        for length in range(1, _WEIGHT_BITS + 2):
            beyond = mpmath.mpf(2) ** (_WEIGHT_BITS - _BEYOND_BITS - length + mpmath.mpf(0.5))
            reach.append(int(mpmath.nint(16 * _quantile(mpmath, family, min(beyond, mpmath.mpf(0.5))))))
    head = MIXTURE_HEAD.pack(MIXTURE_MAGIC, precision, STEPS[family], 0)
    pairs = [(half, after - half) for half, after in itertools.pairwise(halves)]
    return head + b"".join(struct.pack("<HH", *pair) for pair in pairs) + struct.pack("<17H", *reach)


def main(folder: Path) -> None:
    for family in STEPS:
        (folder / f"{family}_mixture.bin").write_bytes(make(family))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
