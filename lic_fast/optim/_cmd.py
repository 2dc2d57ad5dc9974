"""CMD: which weights move alike. Samples weights, clusters their trajectories, chooses a reference for each mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sample_counts(sizes: Sequence[int], samples: int) -> list[int]:
    """How many weights of each tensor are sampled: half of the budget evenly by tensor, half by size.

    No more than a tensor has; what is left over goes to the largest tensors. At most `samples` in all, and all weights
    where there are no more than that.
    """
    total, layers = sum(sizes), sum(size > 0 for size in sizes)
    if total <= samples:
        return list(sizes)
    even = samples // (2 * max(layers, 1))
    counts = [min(size, even + int(size / total * samples / 2)) for size in sizes]
    left = samples - sum(counts)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        more = min(left, sizes[i] - counts[i])
        counts[i], left = counts[i] + more, left - more
    return counts


def sample_places(starts: Sequence[int], sizes: Sequence[int], samples: int, seed: int) -> Tensor:
    """Flat places [K] int64, ascending, of the weights whose trajectories are clustered.

    By tensor and by size as sample_counts says; where half of the budget does not reach every tensor, uniformly among
    all weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if samples // 2 < sum(size > 0 for size in sizes) and samples < sum(sizes):
        chosen = torch.randperm(sum(sizes), generator=generator)[:samples].sort().values
        ends = torch.tensor(sizes).cumsum(0)
        tensor = torch.searchsorted(ends, chosen, right=True)
        return torch.tensor(starts)[tensor] + chosen - (ends - torch.tensor(sizes))[tensor]
    picked = []
    for start, size, count in zip(starts, sizes, sample_counts(sizes, samples), strict=False):
        picked.append(start + torch.randperm(size, generator=generator)[:count].sort().values)
    return torch.cat(picked) if picked else torch.empty(0, dtype=torch.int64)


def find_modes(trajectories: Tensor, modes: int) -> tuple[list[int], list[int]]:
    """The modes of trajectories [K, T] fp64 on the CPU: (a reference row for each mode, the mode of each row).

    Rows are clustered by complete linkage of the Euclidean distances between the rows of the matrix of absolute
    correlations (0 for a row that does not move), into at most `modes` modes, the largest first. The reference of a
    mode is its member with the largest mean absolute correlation to its members, the first of equals.

    Raises ImportError where SciPy is missing. Source: CMD (Betser et al., arXiv 2312.13247), as in its published code.
    """
    hierarchy, distance = _scipy()
    rows = len(trajectories)
    if rows < 2:
        return list(range(rows)), [0] * rows
    likeness = _absolute_correlations(trajectories).numpy()
    tree = hierarchy.linkage(distance.pdist(likeness), method="complete")
    labels = hierarchy.fcluster(tree, modes, criterion="maxclust").tolist()
    members: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        members.setdefault(label, []).append(row)
    clusters = sorted(members.values(), key=lambda rows: (-len(rows), rows[0]))
    references, of_row = [], [0] * rows
    for mode, cluster in enumerate(clusters):
        within = likeness[cluster][:, cluster].mean(axis=1)
        references.append(cluster[int(within.argmax())])
        for row in cluster:
            of_row[row] = mode
    return references, of_row


def _absolute_correlations(trajectories: Tensor) -> Tensor:
    centred = trajectories - trajectories[:, :1]  # exact enough where weights move little around a large value
    centred = centred - centred.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    unit = torch.where(norm > 0, centred / norm, torch.zeros_like(centred))
    likeness = (unit @ unit.T).abs_().clamp_(max=1.0).nan_to_num_(0.0)
    likeness = torch.maximum(likeness, likeness.T)  # symmetric to the bit, so that equals are equal
    likeness.diagonal().copy_((norm.flatten() > 0).double())
    return likeness


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial import distance
    except ImportError as error:
        raise ImportError("STDET: clustering needs SciPy; run: pip install scipy") from error
    return hierarchy, distance


class ModeSums:
    """Per mode: the epochs seen, the mean of the reference and its sum of squares around it; all that least squares
    needs of the past.
    """

    def __init__(self, trajectories: Tensor) -> None:
        """trajectories [M, T] fp64: the references' values so far."""
        self.epochs = trajectories.shape[1]
        self.mean = trajectories.mean(1)
        self.spread = (trajectories - self.mean[:, None]).square().sum(1)

    def gains(self, refs: Tensor) -> Tensor:
        """Takes up the references' new values [M] fp64; returns [M, 4]: r, the gains of k and d, their norm.

        With e = w - k r - d, least squares over all epochs moves k by e * gain_k and d by e * gain_d.
        Source: recursive least squares, algebraically CMD's online update.
        """
        self.epochs += 1
        delta = refs - self.mean
        self.mean = self.mean + delta / self.epochs
        rest = refs - self.mean
        self.spread = self.spread + delta * rest
        moves = self.spread > 1e-14 * self.epochs * self.mean.square()
        gain_k = torch.where(moves, rest / self.spread, torch.zeros_like(rest))
        gain_d = 1.0 / self.epochs - self.mean * gain_k
        return torch.stack([refs, gain_k, gain_d, torch.hypot(gain_k, gain_d)], 1)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "mean": self.mean, "spread": self.spread}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ModeSums:
        sums = cls.__new__(cls)
        sums.epochs = int(state["epochs"])
        sums.mean, sums.spread = (state[name].double().cpu() for name in ("mean", "spread"))
        return sums
