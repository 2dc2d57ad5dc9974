"""The trajectories of the warm-up, kept on the host, and the modes that are found in them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import FlatLayout, cmd_assign, in_memory_order
from ._cmd import ModeSums, find_modes, sample_places

CHUNK = 1 << 18  # weights whose trajectories are on the device at once
BINS = 20  # of explained variance


class Snapshots:
    """All weights once an epoch, [epochs, places] on the host, and those of a sample exactly, for good.

    precise=False keeps what each weight has moved since the first snapshot, in bf16 (a correlation does not see the
    starting point, and the movement has all of bf16's digits), beside the starting point itself: 2 bytes a weight and
    epoch, and 4. precise=True keeps the weights themselves in `dtype`.
    """

    def __init__(
        self, layout: FlatLayout, controlled: Sequence[bool], samples: int, precise: bool, dtype: torch.dtype, seed: int
    ) -> None:
        self.layout, self.precise, self.dtype = layout, precise, dtype
        sizes = [size if taken else 0 for size, taken in zip(layout.sizes, controlled, strict=True)]
        self.sample = sample_places(layout.starts, sizes, samples, seed)
        self.history: list[Tensor] = []  # [samples] fp64 an epoch
        self.rows: list[Tensor] = []  # [places] an epoch of the warm-up
        self.start: Tensor | None = None  # [places]

    def add_sample(self, values: Sequence[Tensor]) -> None:
        """Keeps the exact values of the sampled weights."""
        tensor = torch.searchsorted(torch.tensor(self.layout.starts[1:]), self.sample, right=True)
        exact = torch.empty(len(self.sample), dtype=torch.float64)
        for t in tensor.unique().tolist():
            inside = tensor == t
            within = (self.sample[inside] - self.layout.starts[t]).to(values[t].device)
            exact[inside] = in_memory_order(values[t])[within].double().cpu()
        self.history.append(exact)

    def add(self, values: Sequence[Tensor]) -> None:
        """Keeps all weights; `values` are dense, one tensor for each of the layout's."""
        places, first = self.layout.starts[-1], not self.rows
        if first and not self.precise:
            self.start = torch.zeros(places, dtype=self.dtype)
        row = torch.zeros(places, dtype=self.dtype if self.precise else torch.bfloat16)
        starts = [None] * len(values) if self.start is None else self.layout.split(self.start)
        for part, start, value in zip(self.layout.split(row), starts, values, strict=True):
            own = in_memory_order(value).to("cpu", self.dtype)
            if start is None:
                part.copy_(own)
            else:
                if first:
                    start.copy_(own)
                part.copy_(own - start)
        self.rows.append(row)

    def find_modes(self, modes: int) -> Modes:
        """References and their trajectories. Raises ImportError where SciPy is missing."""
        trajectories = torch.stack(self.history[: len(self.rows)], 1)
        rows, labels = find_modes(trajectories, modes)
        return Modes(self.sample[rows], trajectories[rows], torch.bincount(torch.tensor(labels), minlength=len(rows)))

    def assign(self, modes: Modes, embeddable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(code, k, d) on the device of `embeddable` [places] bool; counts explained variances into modes.explained.

        The trajectories visit the device CHUNK weights at a time.
        """
        device, layout = embeddable.device, self.layout
        code = layout.new_code(device)
        total = int(embeddable.count_nonzero())
        k, d = (torch.empty(total, dtype=self.dtype, device=device) for _ in range(2))
        refs, filled = modes.trajectories.to(device), 0
        for begin in range(0, layout.starts[-1], CHUNK):
            end = min(begin + CHUNK, layout.starts[-1])
            chosen = embeddable[begin:end]
            rows = torch.stack([row[begin:end] for row in self.rows]).to(device)
            mode, factor, shift, correlation = cmd_assign(rows, refs)
            if self.start is not None:
                shift += self.start[begin:end].to(device)
            code[begin:end] = torch.where(chosen, mode, code[begin:end])
            at = chosen.nonzero().squeeze(1)
            stop = filled + len(at)
            k[filled:stop], d[filled:stop] = factor.index_select(0, at), shift.index_select(0, at)
            modes.count_explained(mode.index_select(0, at), correlation.index_select(0, at))
            filled = stop
        return code, k, d

    def release(self) -> None:
        """Forgets all but the sample: the modes are found."""
        self.rows, self.start = [], None

    def state_dict(self) -> dict[str, Any]:
        history = torch.stack(self.history) if self.history else None
        return {"sample": self.sample, "history": history, "rows": list(self.rows), "start": self.start}

    def restored(self, state: dict[str, Any]) -> Snapshots:
        """One of the same layout that holds what state_dict gave. Raises ValueError where it does not fit."""
        other = copy.copy(self)
        other.sample, places = state["sample"].cpu(), self.layout.starts[-1]
        other.history = [] if state["history"] is None else list(state["history"].cpu().unbind(0))
        other.start = None if state["start"] is None else state["start"].cpu().clone()
        other.rows = [row.cpu() for row in state["rows"]]
        kept = [*other.rows, *([] if other.start is None else [other.start])]
        if any(list(x.shape) != [places] for x in kept) or any(x.shape != other.sample.shape for x in other.history):
            raise ValueError("snapshots do not fit")
        return other


class Modes:
    """The modes: their references' places and trajectories, sizes in the sample, and how well they explain weights."""

    def __init__(self, places: Tensor, trajectories: Tensor, sampled: Tensor) -> None:
        self.places, self.trajectories, self.sampled = places, trajectories, sampled
        self.explained = torch.zeros(len(places), BINS, dtype=torch.int64)
        self.sums = ModeSums(trajectories)

    def count_explained(self, mode: Tensor, correlation: Tensor) -> None:
        """Counts embeddable weights by mode and by the share of their variance that the reference explains."""
        share = (correlation.double().square() * BINS).long().clamp_(0, BINS - 1)
        cells = torch.bincount(mode.long() * BINS + share, minlength=self.explained.numel())
        self.explained += cells.cpu().view_as(self.explained)

    def state_dict(self) -> dict[str, Any]:
        return {
            "places": self.places, "trajectories": self.trajectories, "sampled": self.sampled,
            "explained": self.explained, "sums": self.sums.state_dict(),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Modes:
        modes = cls(state["places"].cpu(), state["trajectories"].cpu(), state["sampled"].cpu())
        modes.explained, modes.sums = state["explained"].cpu(), ModeSums.from_state(state["sums"])
        return modes
