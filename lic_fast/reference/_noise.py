"""Uniform noise from a counter-based generator, and the quantisation around it; shared by the likelihoods."""

from __future__ import annotations

import torch
from torch import Tensor

NONE, NOISE, STE, DEQUANTIZE = range(4)

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_words(seed: Tensor, n: int) -> Tensor:
    """The first n words [n] int64, each in [0, 2**32), of Philox4x32-10 (Salmon et al., SC 2011).

    seed [1] int64: its low and high half are the key. Word i is word i % 4 of the block with counter i // 4.
    """
    counter = torch.arange((n + 3) // 4, device=seed.device)
    c0, c1 = counter & _MASK, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]  # modulo 2**64, which int64 keeps
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _STEPS[0]) & _MASK, (k1 + _STEPS[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:n]


def uniform_noise(seed: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise in (-0.5, 0.5) of `like`'s shape: 2**24 values, symmetric about 0, each exact in fp32.

    Element i, counted in row-major order whatever the layout in memory, takes word i of philox_words: its upper 24
    bits k become (2 k + 1 - 2**24) / 2**25.
    """
    words = philox_words(seed, like.numel())
    return ((((words >> 8) << 1) + (1 - (1 << 24))).to(dtype) * 2.0**-25).reshape(like.shape)


def quantize(y: Tensor, centre: Tensor | None, seed: Tensor | None, mode: int, dtype: torch.dtype) -> Tensor:
    """y as the likelihood sees it, in the dtype of the arithmetic: unchanged, with noise, or rounded about `centre`."""
    value = y.to(dtype)
    if mode == NONE:
        return value
    if mode == NOISE:
        return value + uniform_noise(seed, y, dtype)
    if centre is None:
        return torch.round(value)
    return torch.round(value - centre.to(dtype)) + centre.to(dtype)
