"""What the tests of mixtures share: mixtures as models have them, extreme ones, and any integers that are allowed."""

from __future__ import annotations

import random
import struct

import torch
from rans_streams import INT_MAX, INT_MIN

from lic_fast.coding import MIXTURE_FAMILIES, MixtureTables, mixture_parameters, mixture_tables
from lic_fast.coding._serialize import MIXTURE_HEAD, MIXTURE_MAGIC


def mixture(n, components=3, low=0.11, high=64.0, seed=0):
    """(symbols, scales, means, weights [K, n]) as a trained model has them: scales about one, means within them."""
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([low, high]).log()
    about = torch.exp(low + (high - low) * torch.rand(1, n, generator=g))
    scales = (about * torch.exp(0.5 * torch.randn(components, n, generator=g))).clamp(min=0.11)
    means = 0.7 * about * torch.randn(components, n, generator=g) + 3 * torch.randn(1, n, generator=g)
    weights = torch.softmax(torch.randn(components, n, generator=g), 0)
    chosen = (torch.rand(n, generator=g) > weights.cumsum(0)[:-1]).sum(0, keepdim=True)
    y = means.gather(0, chosen) + scales.gather(0, chosen) * torch.randn(1, n, generator=g)
    return y[0].round().int(), scales, means, weights


def random_mixture_tables(g):
    """Of any precision: half masses that rise evenly, ever less, at once or hardly; any reach."""
    kind, half, pairs = g.randrange(4), 0, b""
    for i in range(64):
        left = 65535 - half
        slope = [65535 // 64, left // 5, 0 if i else left, g.randrange(4)][kind]
        pairs += struct.pack("<HH", half, slope)
        half += slope
    head = MIXTURE_HEAD.pack(MIXTURE_MAGIC, g.randint(12, 16), g.randint(1, 15), 0)
    return MixtureTables(head + pairs + struct.pack("<17H", *(g.randrange(257) for _ in range(17))))


def extreme_floats(g, t, shape):
    """Floats that no model should give, among some that it may."""
    values = torch.randn(shape, generator=t) * g.choice([0.01, 1.0, 100.0, 1e6, 1e12])
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1.0, 2.0**31, -(2.0**31), 0.5, 1.5, 3e38])
    chosen = torch.rand(shape, generator=t) < g.choice([0.0, 0.1, 0.6])
    return torch.where(chosen, odd[torch.randint(len(odd), shape, generator=t)], values)


def random_mixture_case(seed, most=1500):
    """(symbols, parameters, tables, lanes): models' mixtures, extreme ones, and integers at random."""
    g, t = random.Random(seed), torch.Generator().manual_seed(seed)
    n = g.choice([0, 1, 2, 31, 32, 33, 63, 64, 65, g.randint(0, 300), g.randint(0, most)])
    k = g.choice([1, 2, 3, 3, 4, 5, 16])
    tables = random_mixture_tables(g) if g.random() < 0.3 else mixture_tables(g.choice(MIXTURE_FAMILIES))
    lanes = g.choice(["auto", 1, 2, 4, 8, 16, 32, 64, 96, 256, 1024])
    kind = g.choice(["model", "model", "extreme", "integers"])
    symbols, *floats = mixture(n, k, 0.11, g.choice([0.5, 8.0, 300.0, 1e5]), seed)
    if kind == "extreme":
        floats = [extreme_floats(g, t, (k, n)) for _ in range(3)]
    parameters = mixture_parameters(*floats, tables)
    if kind == "integers" and n:
        parameters = random_integers(t, k, n)
        symbols = parameters[0] + torch.randint(-5, 1030, (n,), generator=t).int()
    for _ in range(g.choice([0, 0, 3, n])):
        if n:
            symbols[g.randrange(n)] = g.choice([INT_MIN, INT_MAX, g.randint(INT_MIN, INT_MAX), 128, -129, 40000])
    return symbols, parameters, tables, lanes


def random_integers(t, k, n):
    """Any parameters that are allowed: all hints, shifts, sizes, forms; means up to their limits."""

    def uniform(low, high, *shape):
        return torch.randint(low, high, shape, generator=t)

    words = torch.empty((2 + 2 * k, n), dtype=torch.int32)
    words[0] = uniform(INT_MIN, INT_MAX + 1, n)
    sizes = torch.stack([uniform(1, 9, n), uniform(1, 1024, n), torch.full((n,), 1023)])
    words[1] = sizes[uniform(0, 3, n), torch.arange(n)] | uniform(0, 1 << 19, n) << 12
    words[1] += (uniform(0, 2, n) << 31).int()
    near = uniform(-2000, 300000, k, n)
    words[2::2] = torch.where(uniform(0, 8, k, n) == 0, uniform(-(1 << 21), (1 << 21) + 1, k, n), near)
    cuts = torch.cat([uniform(0, 32769, k - 1, n).sort(0).values, torch.full((1, n), 32768)])
    weights = torch.diff(cuts, dim=0, prepend=torch.zeros(1, n, dtype=torch.long))
    words[3::2] = (weights << 16 | uniform(0, 1 << 13, k, n)).int()
    return words
