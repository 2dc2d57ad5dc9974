"""Parameters, gradients and steps for the tests of SOAP."""

from __future__ import annotations

import torch

SHAPES = [
    (8, 6, 3, 3),
    (6, 8, 1, 1),
    (12, 5),
    (7,),
    (4, 3, 2, 3, 3),
    (3, 10, 5, 5),
    (5, 1, 3, 3),
    (2, 3, 4),
    (9, 4),
    (1,),
]


def parameters(shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(*lists, seed, scale=1.0):
    """The same random gradients to the parameters of every list."""
    g = torch.Generator().manual_seed(1000 + seed)
    for together in zip(*lists, strict=True):
        value = torch.randn(together[0].shape, generator=g, dtype=torch.float64) * scale
        for p in together:
            p.grad = value.to(p.dtype, copy=True)


def train(optimizer, params, steps, first=0):
    for t in range(first, first + steps):
        give_gradients(params, seed=t)
        optimizer.step()


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)
