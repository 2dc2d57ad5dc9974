"""What STDET tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .stdet import STDET


@dataclass(frozen=True, eq=False)
class Report:
    """epoch: closed so far. weights: that may be embedded, and the 25 % that never are. true, dummy: embedded now.

    trainable_share: of the weights, neither true nor dummy. state_bytes: what the optimizer holds on the device beside
    the parameters; dense_state_bytes: what it would hold with two moments for every weight. embedding_bytes: code, k
    and d. host_bytes: trajectories, and k and d at the last event where period > 1. mode_sizes [M]: embeddable weights
    of each mode. explained [M, 20]: of these, how many have which share of their variance over the warm-up explained by
    the reference, in steps of 5 %.
    """

    epoch: int
    weights: int
    embeddable: int
    true: int
    dummy: int
    state_bytes: int
    dense_state_bytes: int
    embedding_bytes: int
    host_bytes: int
    fused: bool
    explained: Tensor

    @property
    def trainable_share(self) -> float:
        return 1.0 - (self.true + self.dummy) / self.weights

    @property
    def mode_sizes(self) -> list[int]:
        return self.explained.sum(1).tolist()

    @property
    def mean_explained(self) -> float:
        """The mean explained variance of embeddable weights, to half a bin; NaN before the modes are found."""
        bins = self.explained.shape[1]
        centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        total = int(self.explained.sum())
        return float((self.explained.sum(0) * centres).sum()) / total if total else float("nan")

    @classmethod
    def of(cls, stdet: STDET) -> Report:
        e, adam, snapshots = stdet._embedding, stdet._adam, stdet._snapshots
        if adam is not None:
            state = adam.bytes()
        else:
            inner = stdet._inner.state.values()
            tensors = (x for held in inner for value in held.values() for x in _tensors(value))
            state = sum(x.numel() * x.element_size() for x in tensors if x.dim())
        size = torch.empty(0, dtype=stdet._dtype).element_size()
        kept = [*snapshots.rows, snapshots.start, *snapshots.history]
        host = sum(x.numel() * x.element_size() for x in kept if x is not None)
        return cls(
            epoch=stdet.epoch, weights=stdet.weights, embeddable=0 if e is None else e.embeddable,
            true=0 if e is None else e.true, dummy=0 if e is None else e.dummy, state_bytes=state,
            dense_state_bytes=2 * size * stdet._layout.elements, embedding_bytes=0 if e is None else e.bytes(),
            host_bytes=host + (0 if e is None else e.host_bytes()), fused=adam is not None,
            explained=torch.zeros(0, 20, dtype=torch.int64) if e is None else e.modes.explained,
        )  # fmt: skip

    def __str__(self) -> str:
        share = (f"{100 * part / self.weights:.2f} %" for part in (self.embeddable, self.true, self.dummy))
        embeddable, true, dummy = share
        return (
            f"epoch {self.epoch}: {self.weights} weights, embeddable {embeddable}, true {true}, dummy {dummy}, "
            f"trainable {100 * self.trainable_share:.2f} %; optimizer state {self.state_bytes / 2**20:.1f} of "
            f"{self.dense_state_bytes / 2**20:.1f} MiB, embedding {self.embedding_bytes / 2**20:.1f} MiB, host "
            f"{self.host_bytes / 2**20:.1f} MiB; {len(self.mode_sizes)} modes explain {self.mean_explained:.3f} of the "
            "variance"
        )


def _tensors(value: object) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, Tensor)]
