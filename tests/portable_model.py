"""A tiny portable MSPEntropyModel whose every number comes from integer arithmetic: the same under any torch."""

from __future__ import annotations

import torch

from lic_fast.coding import factorized_tables
from lic_fast.entropy import MSPEntropyModel, Profile

CHANNELS = 5
SIZES = Profile(scales=2, groups=2, width=8, depth=1)


def numbers(start: int, count: int, most: int) -> torch.Tensor:
    """Integers from -most to most, scattered."""
    values = [((start + i) * 2654435761 % 2**32 >> 11) % (2 * most + 1) - most for i in range(count)]
    return torch.tensor(values, dtype=torch.int64)


def golden_model() -> MSPEntropyModel:
    model = MSPEntropyModel(CHANNELS, SIZES)
    model.integers = model._new_integers()
    place = 1
    for name, buffer in model.integers.named_buffers():
        kind = name.rpartition(".")[2]
        found = numbers(place, buffer.numel(), 23 if kind == "weight" else 400).view(buffer.shape)
        place += buffer.numel()
        if name.endswith("parameters_of.bias"):
            found[..., : found.shape[-1] // 2] += 9000  # scales about 1.1
        elif kind == "shift":
            half = len(found) // 2
            found[:] = 1 if "parameters_of" in name else 6
            found[half:] = 4 if "parameters_of" in name else 7
        elif kind in ("unit", "units"):
            found = torch.full(buffer.shape, 64.0)
            if kind == "units":
                found[: len(found) // 2], found[len(found) // 2 :] = 2.0**-12, 2.0**-8
        buffer.copy_(found)
    with torch.no_grad():
        model.bottleneck.quantiles[:, 0, 1] = numbers(7, CHANNELS, 40).float() / 16
    probabilities = 2.0 ** -(2.0 + (torch.arange(17) - 8).abs().double()).expand(CHANNELS, -1)
    tables = factorized_tables(probabilities.contiguous(), torch.full((CHANNELS,), -8))
    model.tables = torch.frombuffer(bytearray(tables.serialized), dtype=torch.uint8)
    model.exact = True
    return model.eval()


def golden_latent(height: int, width: int) -> torch.Tensor:
    y = numbers(99, CHANNELS * height * width, 96).view(1, CHANNELS, height, width).float() / 16
    y[0, 0, 0, 0] = 5000.25  # an escape, and beyond what int16 holds
    return y
