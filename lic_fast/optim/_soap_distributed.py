"""SOAP's work and state shared among the ranks of a group: each parameter belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._soap_plan import Plan
from ._soap_state import allocate


class Shares:
    """Who owns which parameter, and the exchange of what the owners have."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._sources = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._load = [[0.0, 0.0] for _ in range(self.size)]  # of steps, of refreshes
        self._owner: dict[Tensor, int] = {}

    def assign(self, params: Sequence[tuple[Tensor, Plan]]) -> None:
        """Gives each parameter to the rank with the least work so far, the dearest first: the same on all ranks.

        Ordinary steps and refreshes are balanced together, each as a share of all of it, since in both all wait for the
        slowest.
        """
        work = {p: (plan.step_flops(), plan.refresh_flops()) for p, plan in params}
        whole = [max(1, sum(kind)) for kind in zip(*work.values(), strict=True)]
        shares = {p: [flops / total for flops, total in zip(kinds, whole, strict=True)] for p, kinds in work.items()}
        for p in sorted(shares, key=lambda p: -max(shares[p])):
            loads = [[a + b for a, b in zip(load, shares[p], strict=True)] for load in self._load]
            rank = min(range(self.size), key=lambda rank: max(loads[rank]))
            self._owner[p], self._load[rank] = rank, loads[rank]

    def owns(self, p: Tensor) -> bool:
        """Whether `p` belongs to this rank."""
        return self._owner[p] == self.rank

    def exchange(self, params: Iterable[Tensor]) -> None:
        """Every parameter that requires grad takes its owner's values, bit for bit."""
        self._broadcast([(self._owner[p], p) for p in params if p.requires_grad])

    def _broadcast(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Fills each tensor from its owner's, in one flat message for each owner, dtype and device."""
        messages: dict[Any, list[Tensor]] = {}
        for owner, tensor in tensors:
            messages.setdefault((owner, tensor.dtype, tensor.device), []).append(tensor)
        pending = []
        for (owner, dtype, device), members in messages.items():
            flat = torch.empty(sum(t.numel() for t in members), dtype=dtype, device=device)
            pieces = [x.view(t.shape) for x, t in zip(flat.split([t.numel() for t in members]), members, strict=True)]
            if owner == self.rank:
                torch._foreach_copy_(pieces, members)
            work = dist.broadcast(flat, self._sources[owner], group=self.group, async_op=True)
            pending.append((work, owner, members, pieces))
        for work, owner, members, pieces in pending:
            work.wait()
            if owner != self.rank:
                torch._foreach_copy_(members, pieces)

    def gather(self, states: dict[Tensor, dict[str, Any]], plans: Sequence[tuple[Tensor, Plan]]) -> dict[Tensor, Any]:
        """The states of all parameters that have one on their owner, on every rank. All ranks call it together."""
        if not plans:
            return {}
        flags = torch.tensor([int(p in states) for p, _ in plans], device=plans[0][0].device)
        dist.all_reduce(flags, group=self.group)
        present = [pair for pair, flag in zip(plans, flags.tolist(), strict=True) if flag]
        missing = [(p, 0, plan) for p, plan in present if p not in states]
        full = states | {slot.param: slot.public() for slot in allocate(missing, {})}
        tensors = []
        for p, _ in present:
            for value in full[p].values():
                matrices = value if isinstance(value, list) else [value]
                tensors += [(self._owner[p], x) for x in matrices if isinstance(x, Tensor)]
        self._broadcast(tensors)
        return full
