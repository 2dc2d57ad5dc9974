"""What the tests of lic_fast.coding share: every implementation, and cases at random."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings

import lic_fast
from lic_fast import _native
from lic_fast.coding import Tables, constant_tables, encode, join_tables, scale_indexes
from lic_fast.coding._serialize import serialize
from lic_fast.ops import rans_coder as op

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NATIVE = lic_fast.explain("rans_coder_encode", "cpu", torch.int32).reasons["cpp"] is None
_NAMES = ["best", "scalar", "avx2", "avx512, loads", "avx512, gathers", "a GPU's, in lockstep"]
_FOUND = _native.op("cpp", "rans_coder_variants")() if NATIVE else 0
VARIANTS = [i for i in range(len(_NAMES)) if _FOUND >> i & 1]
EVERYONE = ["reference", *(_NAMES[i] for i in VARIANTS)]


FEW_AT_RANDOM = settings(  # for each device
    max_examples=int(os.environ.get("LIC_FAST_CASES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or lic_fast.explain("rans_coder_decode_", "cuda").reasons["cuda"] is not None,
    reason="no CUDA device, or the CUDA library is not built",
)


@contextmanager
def running(name):
    """Everything coded in the block is coded by one implementation."""
    before = op.VARIANT
    op.VARIANT = 0 if name == "reference" else _NAMES.index(name)
    try:
        with lic_fast.use_backend("reference" if name == "reference" else "cpp"):
            yield
    finally:
        op.VARIANT = before


def by_reference(symbols, indexes, tables, **options):
    """The container that the reference makes."""
    with running("reference"):
        return encode(symbols, indexes, tables, **options)


def random_tables(g, precision=None, rows=None):
    """Rows of every kind: only an escape, flat, steep, 255 symbols; all shifts; a ladder among the levels."""
    n = precision or g.choice([10, 11, 14, 15])
    made = []
    for _ in range(rows or g.randint(1, 6)):
        size = g.choice([0, 1, 2, 7, g.randint(0, min(255, 2**n - 1)), min(255, 2**n - 1)])
        cuts = sorted(g.sample(range(1, 2**n), size))
        made.append((g.randint(-300, 300), [b - a for a, b in zip([0, *cuts], [*cuts, 2**n], strict=True)]))
    levels = [(g.randrange(len(made)), g.choice([0, 0, 0, 1, 3, 8, 15])) for _ in range(244 + g.randint(0, 30))]
    return Tables(serialize(n, g.choice([-1, 0, len(levels) - 244]), made, levels))


def random_case(seed, most=3000):
    """(symbols, indexes, tables, lanes, skip): of any size, with escapes, extremes, scales or levels."""
    g = random.Random(seed)
    t = torch.Generator().manual_seed(seed)
    n = g.choice([0, 1, 2, 31, 32, 33, 63, 64, 65, g.randint(0, 300), g.randint(0, most)])
    lanes = g.choice(["auto", 1, 2, 4, 8, 16, 32, 64, 96, 256, 1024])
    tables = g.choice([constant_tables("gaussian"), constant_tables("logistic"), random_tables(g)])
    if g.random() < 0.1:
        tables = join_tables(random_tables(g, 14), constant_tables("laplace"))
    kind = g.choice(["scales", "uint8", "int32"])
    if kind == "scales" and tables.ladder >= 0:
        indexes = torch.exp(torch.rand(n, generator=t) * g.choice([1.0, 4.0, 12.0]) - 2.3)
        widths = indexes
    else:
        least = min(len(tables), 256) if kind == "uint8" else len(tables)
        indexes = torch.randint(least, (n,), generator=t).to(torch.uint8 if kind == "uint8" else torch.int32)
        widths = torch.full((n,), g.choice([0.2, 3.0, 300.0]))
    symbols = (torch.randn(n, generator=t) * widths * g.choice([0.0, 1.0, 1.0, 4.0])).clamp(-1e9, 1e9).round().int()
    for _ in range(g.choice([0, 0, 3, n])):
        if n:
            symbols[g.randrange(n)] = g.choice([INT_MIN, INT_MAX, g.randint(INT_MIN, INT_MAX), 128, -129, 40000])
    skip = g.choice([0, 0, 1, 40, 244]) if tables.ladder >= 0 else 0
    if skip:
        rungs = levels_of(indexes, tables) - tables.ladder
        symbols[(rungs >= 0) & (rungs < skip)] = 0
    return symbols, indexes, tables, lanes, skip


def levels_of(indexes, tables):
    return scale_indexes(indexes, first=tables.ladder) if indexes.dtype is torch.float32 else indexes.int()


def split(seed, n):
    """A step's sizes, zeros among them, that sum to n."""
    g = random.Random(seed)
    cuts = sorted(g.randint(0, n) for _ in range(g.randint(0, 6)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
