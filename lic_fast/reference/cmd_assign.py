"""Assignment of every weight to the mode with whose reference it moves most alike, as specified."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 16  # elements at a time, so that what is in between stays small


def directions(refs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R [M, T], mean [M], norm [M]) of the references' trajectories [M, T] fp64: refs = mean + norm * R.

    Where a reference does not move, or its movement is not finite, R, mean and norm are 0.
    """
    first = refs[:, :1]
    moved = refs - first
    middle = moved.mean(1, keepdim=True)
    centred = moved - middle
    norm = (centred * centred).sum(1, keepdim=True).sqrt()
    moves = (norm > 0) & norm.isfinite()
    zero = norm.new_zeros(())
    tables = torch.where(moves, centred / norm, zero), torch.where(moves, first + middle, zero)
    return tables[0], tables[1].flatten(), torch.where(moves, norm, zero).flatten()


def cmd_assign(
    snapshots: Tensor, directions: Tensor, mean: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mode [n] uint8, k, d, correlation [n]) of the trajectories in the columns of snapshots [T, n].

    In fp64, y_t = x_t - x_0, each sum over t = 1, 2, ... in this order: num_m = sum of y_t R[m, t],
    spread = sum of y_t^2 - (sum of y_t)^2 / T, at least 0. The mode is the first with the largest |num|; k = num / norm
    (0 where norm is), d = x_0 + (sum of y_t) / T - k mean, correlation = |num| / sqrt(spread), at most 1. A weight that
    does not move (spread 0): mode 0, k = 0, d its mean, correlation 0. Where the sum of y_t^2 is not finite: mode 0,
    k = 0, d the last snapshot, correlation 0.
    """
    parts = [_block(x, directions, mean, norm) for x in snapshots.split(_BLOCK, dim=1)]
    mode, k, d, correlation = (torch.cat(column) for column in zip(*parts, strict=True))
    dtype = torch.float64 if snapshots.dtype is torch.float64 else torch.float32
    return mode, k.to(dtype), d.to(dtype), correlation.to(dtype)


def _block(x: Tensor, directions: Tensor, mean: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = x[0].double()
    num = first.new_zeros((len(norm), len(first)))
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for t in range(1, len(x)):
        y = x[t].double() - first
        num = num + y * directions[:, t : t + 1]
        total = total + y
        squares = squares + y * y
    epochs = torch.full((), len(x), dtype=torch.float64, device=x.device)  # a tensor: a number may become a reciprocal
    spread = (squares - total * total / epochs).clamp(min=0)
    finite = squares.isfinite()
    moves = finite & (spread > 0)

    mode = torch.where(moves, num.abs(), 0.0).argmax(0)  # of equals the first
    num = torch.where(moves, num.gather(0, mode[None])[0], 0.0)
    k = torch.where(norm[mode] > 0, num / norm[mode], 0.0)
    d = (first + total / epochs) - k * mean[mode]
    d = torch.where(finite, d, x[-1].double())
    correlation = torch.where(moves, num.abs() / spread.sqrt(), 0.0).clamp(max=1)
    return mode.to(torch.uint8), k, d, correlation
