"""Adam's moments carried from one eigenbasis to the next, as specified."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._precision import full_precision
from .soap_update import project


def rotate_moments_(
    exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], rotation: Sequence[Tensor], order: Sequence[Tensor]
) -> None:
    """exp_avg goes into the new basis, exp_avg_sq follows the sorting of the old one, both in place.

    Tensor i has k_i axes and owns the next k_i entries of rotation ([d, d] = Q_old^T Q_new, or [0, 0]) and order
    ([d] int64, the place in the old basis of each new column, or [0]): exp_avg's axis is multiplied by rotation^T, and
    exp_avg_sq's entries are taken in that order.
    """
    if not exp_avg:
        return
    with full_precision(exp_avg[0].device):
        _rotate_all_(exp_avg, exp_avg_sq, rotation, order)


def _rotate_all_(exp_avg, exp_avg_sq, rotation, order) -> None:
    first = 0
    for m, v in zip(exp_avg, exp_avg_sq, strict=True):
        axes = slice(first, first + m.dim())
        first = axes.stop
        m.copy_(project(m, rotation[axes]))
        for axis, places in enumerate(order[axes]):
            if places.numel():
                v.copy_(v.index_select(axis, places))
