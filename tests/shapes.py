"""Shapes the ops are tested on."""

from __future__ import annotations

import pytest
import torch

ODD = [(), (0,), (1,), (3, 0, 5), (7,), (31,), (1025,), (3, 5, 7), (2, 3, 5, 5), (63, 65)]
# Parameters as they stand in ELIC, TCM and mbt2018: convolutions, transposed convolutions, biases, bottleneck.
REAL = [
    (192, 3, 5, 5),
    (192,),
    (192, 192, 1, 1),
    (96, 192, 3, 3),
    (3, 192, 5, 5),
    (192, 3, 1),
    (192, 1, 3),
    (640, 320),
]


def elic(channels: tuple[int, int] | None = None) -> list[torch.Size]:
    """The shapes of ELIC's 367 parameters (32 M elements), or of a narrow ELIC."""
    Elic2022Official = pytest.importorskip("compressai.models").Elic2022Official
    model = (
        Elic2022Official() if channels is None else Elic2022Official(*channels, groups=[1, 1, 2, 4, channels[1] - 8])
    )
    return [p.shape for p in model.parameters()]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a view with gaps and an offset."""
    wide = torch.full((*tensor.shape, 2), 7, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    return wide[..., 1]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, dense, with the dimensions in reverse order in memory."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
