"""When weights are embedded, and how many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def paper_dummy(t: int) -> float:
    """The share of dummies at epoch t in STDET's Table 11: min(2 % * t, 25 %)."""
    return min(0.02 * t, 0.25)


@dataclass(frozen=True)
class Schedule:
    """warmup_epochs, period: epochs. embeddable, true: shares of all weights; true is what one event adds.

    dummy: from an epoch number, counted from the start of training (t_origin="global") or from the end of the warm-up
    ("warmup"), to a share.
    """

    warmup_epochs: int
    period: int
    embeddable: float
    true: float
    dummy: Callable[[int], float]
    t_origin: str

    def event(self, epoch: int) -> int:
        """The number of the event at the end of `epoch` (from 1), or 0 where there is none."""
        past = epoch - self.warmup_epochs
        return past // self.period if past > 0 and past % self.period == 0 else 0

    def true_target(self, event: int, weights: int, embeddable: int) -> int:
        """How many weights are embedded for good after `event`: event * true of all, rounded, at most the embeddable.

        Rounded in all and not event by event, so that fifty events of 1 % make 50 %.
        """
        return min(round(event * self.true * weights), embeddable)

    def dummies(self, epoch: int, weights: int, embeddable: int, true: int) -> int:
        """How many dummies are drawn at the end of `epoch`, beside `true` weights embedded for good.

        Raises ValueError where `dummy` gives no share.
        """
        t = epoch if self.t_origin == "global" else epoch - self.warmup_epochs
        share = float(self.dummy(t))
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"STDET: dummy({t}) must be a share in [0, 1], got {share!r}; correct the function")
        return min(round(share * weights), embeddable - true)
