"""The coding tables of MSPEntropyModel's coarsest grid."""

from __future__ import annotations

import copy

import torch

from ..coding import Tables, factorized_tables
from ..functional import factorized_rate, pack_factorized
from .entropy_bottleneck import EntropyBottleneck

_WORTH = 2.0**-18  # rarer symbols are cheaper as escapes than as an entry of a table of 2**14
_WIDEST = 2047  # the tables reach so far; what lies beyond is an escape


def coarsest_tables(bottleneck: EntropyBottleneck) -> Tables:
    """A level for each channel of the density, about its median. Raises ValueError where it is not finite."""
    twin = copy.deepcopy(bottleneck).cpu().double()
    medians = twin.quantiles[:, 0, 1].clone()
    twin.solve_quantiles()
    low, high = ((twin.quantiles[:, 0, side] - medians).clamp(-_WIDEST, _WIDEST) for side in (0, 2))
    first, last = low.floor().long(), high.ceil().long()
    symbols = first[None] + torch.arange(int((last - first).max()) + 1)[:, None]
    weights = pack_factorized(list(twin.matrices), list(twin.biases), list(twin.factors))
    options = {"filters": twin.filters, "output": "likelihood"}
    _, probabilities = factorized_rate(symbols + medians[None], weights, **options)
    probabilities[probabilities < _WORTH] = 0
    return factorized_tables(probabilities.t().contiguous(), first)
