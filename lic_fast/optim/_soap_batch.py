"""The lists that SOAP's ops take, made once for as long as the same parameters have gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import adam_update_, soap_update_
from ..functional.preconditioning import HYPER
from ._soap_state import Counts, Slot

Groups = Sequence[dict[str, Any]]


class Batch:
    """Parameters of one device and dtype whose step is one call of one op."""

    def __init__(self, slots: list[Slot], correct_bias: bool, normalize_grads: bool) -> None:
        self.slots = slots
        self.settings = {"correct_bias": correct_bias, "normalize_grads": normalize_grads}
        self.preconditioned = slots[0].plan.preconditioned
        self.moments = [slot.exp_avg for slot in slots], [slot.exp_avg_sq for slot in slots]
        self.factors = [x for slot in slots for x in slot.GG], [x for slot in slots for x in slot.Q]
        self.counts: Counts = slots[0].counts
        self.device = slots[0].param.device
        self.rows = torch.tensor([slot.row for slot in slots], device=self.device)
        self.groups = sorted({slot.group for slot in slots})
        self._copies: dict[tuple[str, int], Tensor] = {}
        self._key: Any = None
        self._hyper = torch.empty(len(slots), len(HYPER), dtype=torch.float64, device=self.device)

    def run(self, grads: Sequence[Tensor], precision: str) -> None:
        """The ordinary step of all its parameters, after prepare(). Nothing here waits for the device."""
        params = [slot.param for slot in self.slots]
        counts = self.counts.table.index_select(0, self.rows)
        if not self.preconditioned:
            adam_update_(params, grads, *self.moments, counts, self._hyper, **self.settings)
        else:
            walked = [self._walk("param", slot, p) for slot, p in zip(self.slots, params, strict=True)]
            walked_grads = [self._walk("grad", slot, g) for slot, g in zip(self.slots, grads, strict=True)]
            soap_update_(
                walked, walked_grads, *self.moments, *self.factors, counts, self._hyper, precision=precision,
                **self.settings,
            )  # fmt: skip
            for slot, p, view in zip(self.slots, params, walked, strict=True):
                if view.data_ptr() != p.data_ptr():
                    p.copy_(slot.plan.unwalk(view))
        self.counts.table.index_copy_(0, self.rows, counts)

    def _walk(self, kind: str, slot: Slot, tensor: Tensor) -> Tensor:
        """slot.plan.walk; where that is a copy, always in the same place, which recorded work and tables rely on."""
        walked = slot.plan.walk(tensor)
        if walked.data_ptr() == tensor.data_ptr():
            return walked
        kept = self._copies.setdefault((kind, slot.row), walked)
        return kept if kept is walked else kept.copy_(walked)

    def prepare(self, groups: Groups) -> None:
        """Brings the table of hyperparameters [n, 6] up to date with the groups, in place and without a wait."""
        rows, on_device, key = {}, {}, []
        for index in self.groups:
            group = groups[index]
            beta1, beta2 = group["betas"]
            shampoo_beta = group["shampoo_beta"] if group["shampoo_beta"] >= 0 else beta2
            row = [group["lr"], beta1, beta2, shampoo_beta, group["eps"], group["weight_decay"]]
            for column, value in enumerate(row):
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device[index, column], row[column] = value, 0.0
                else:
                    row[column] = float(value)
            rows[index] = row
            key.append(tuple(row))
        if key != self._key:
            table = torch.tensor([rows[slot.group] for slot in self.slots], dtype=torch.float64)
            self._hyper.copy_(table.pin_memory() if self.device.type == "cuda" else table, non_blocking=True)
            self._key = key
        for (index, column), value in on_device.items():
            first, count = self._span(index)
            self._hyper[first : first + count, column].copy_(value.reshape(1).expand(count))

    def _span(self, group: int) -> tuple[int, int]:
        """Where the parameters of a group stand: they are in the order of the groups."""
        members = [i for i, slot in enumerate(self.slots) if slot.group == group]
        return members[0], len(members)


def batches_of(slots: Sequence[Slot], groups: Groups) -> list[Batch]:
    """The slots, which come in the order of the groups, split by what one call can take."""
    kinds = [(bool(group["correct_bias"]), bool(group["normalize_grads"])) for group in groups]
    alike: dict[Any, list[Slot]] = {}
    for slot in slots:
        key = (slot.param.device, slot.param.dtype, slot.plan.preconditioned, *kinds[slot.group])
        alike.setdefault(key, []).append(slot)
    return [Batch(members, *key[3:]) for key, members in alike.items()]
