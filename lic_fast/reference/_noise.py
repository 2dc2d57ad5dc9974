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


# log2(1 + f) / f for 1 + f in [sqrt(1/2), sqrt(2)], to 2e-7; then z / x with erf(z / sqrt(2)) = x, to 7e-8, as a
# polynomial in v = w / 11.5 - 1 with w = -log2(1 - x^2) in [0, 23]. From the constant term on; ours, by Lawson's
# iteration in fp64.
_LOG = (
    1.442694902420044, -0.7213528156280518, 0.48092323541641235, -0.3602396249771118, 0.28709882497787476,
    -0.2488771378993988, 0.23404155671596527, -0.14580978453159332,
)  # fmt: skip
_NORMAL = (
    3.7566518783569336, 1.9913569688796997, -0.45618733763694763, 0.17676332592964172, -0.050427135080099106,
    -0.02488126792013645, 0.05982644483447075, -0.05564600229263306, 0.04564310982823372, -0.04216134175658226,
    -0.0008689965470694005, 0.05037187412381172, -0.02765994891524315, -0.012469040229916573, 0.009670699015259743,
)  # fmt: skip


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Every product and sum is rounded to fp32, on every backend: coefficients are fp32 numbers."""
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def normal_noise(seed: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise of `like`'s shape, fp32: twice uniform_noise(seed, like), through the inverse of erf.

    2**24 values, symmetric about 0, none beyond 5.42. Only sums, products and the bits of fp32 are used, each rounded
    by itself, so that every backend and device gives the same bits. Off the exact inverse by 7e-7 at most.
    """
    x = uniform_noise(seed, like, torch.float32) * 2
    t = 1 - x.abs()
    s = t * (2 - t)  # 1 - x^2
    bits = s.contiguous().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1
    w = exponent.float() + f * _horner(f, _LOG)  # log2(s)
    return x * _horner(w * (-1 / 11.5) - 1, _NORMAL)


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
