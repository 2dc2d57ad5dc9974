"""Adam's moments without those of embedded weights, and the fused step that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..functional import FlatLayout, in_memory_order, stdet_adam_step_

CHUNK = 1 << 18  # places that are looked at at once: what that takes is not a matter of the model's size


def why_not(optimizer: Optimizer) -> str | None:
    """The reason the fused step cannot stand in for this optimizer's own, or None."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"the fused step is Adam's, not {type(optimizer).__name__}'s"
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            if group[name]:
                return f"the fused step has no {name}"
        if isinstance(group["lr"], Tensor) or any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "the fused step takes lr and betas as numbers"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has step hooks"
    return None


class CompactAdam:
    """The moments of an Adam or AdamW in flat tensors [elements that are not STATELESS], and its steps."""

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], layout: FlatLayout) -> None:
        self.optimizer, self.params, self.layout = optimizer, list(params), layout
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.groups = [groups[p] for p in self.params]
        self.exp_avg = self.exp_avg_sq = torch.empty(0)
        self.counts = [0] * len(self.params)
        self._absent = self.params[0].new_empty(0).detach()

    def take_over(self, code: Tensor, dtype: torch.dtype) -> None:
        """Moves the moments of all elements that have a place out of the optimizer's state, tensor by tensor."""
        parts = self.layout.split(code)
        sizes = [int((part & FlatLayout.STATELESS == 0).count_nonzero()) for part in parts]
        states = [self.optimizer.state.get(p, {}) for p in self.params]
        self.counts = [int(state.get("step", 0)) for state in states]
        for name in ("exp_avg", "exp_avg_sq"):
            flat = torch.zeros(sum(sizes), dtype=dtype, device=code.device)
            for p, state, part, own in zip(self.params, states, parts, flat.split(sizes), strict=True):
                if name in state:
                    moments = torch.empty_like(p, dtype=dtype).copy_(state.pop(name))
                    own.copy_(in_memory_order(moments)[part & FlatLayout.STATELESS == 0])
            setattr(self, name, flat)
        for p in self.params:
            self.optimizer.state.pop(p, None)

    def drop(self, code: Tensor, more: Tensor) -> None:
        """Releases the moments of the elements of `more` [places] bool, which have had a place under `code` so far.

        Front to back within the tensors that hold them, then once into smaller ones, one after the other.
        """
        for name in ("exp_avg", "exp_avg_sq"):
            values, begin, kept = getattr(self, name), 0, 0
            for first in range(0, len(code), CHUNK):
                had = code[first : first + CHUNK] & FlatLayout.STATELESS == 0
                keep = ~more[first : first + CHUNK][had]
                end = begin + len(keep)
                left = values[begin:end][keep]
                values[kept : kept + len(left)] = left
                begin, kept = end, kept + len(left)
            setattr(self, name, values[:kept].clone())
            del values

    def step(
        self, code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor, slow: Sequence[Tensor], alpha: float,
        reset: bool,
    ) -> None:  # fmt: skip
        """One step of all parameters; `slow` where it averages."""
        grads, rows = [], []
        known: dict[tuple[int, int], list[float]] = {}
        for i, (p, group) in enumerate(zip(self.params, self.groups, strict=True)):
            grads.append(self._absent if p.grad is None else p.grad)
            self.counts[i] += p.grad is not None
            key = (id(group), self.counts[i])
            if key not in known:
                known[key] = _row(group, self.counts[i], type(self.optimizer) is torch.optim.AdamW)
            rows.append(known[key])
        stdet_adam_step_(
            self.params, grads, slow, code, base, k, d, self.exp_avg, self.exp_avg_sq, refs,
            torch.tensor(rows, dtype=torch.float64), alpha=alpha, reset=reset,
        )  # fmt: skip

    def bytes(self) -> int:
        """Of the moments."""
        return sum(x.numel() * x.element_size() for x in (self.exp_avg, self.exp_avg_sq))

    def state_dict(self) -> dict[str, Any]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, Any], dtype: torch.dtype) -> None:
        device = self.params[0].device
        self.exp_avg, self.exp_avg_sq = (state[name].to(device, dtype, copy=True) for name in ("exp_avg", "exp_avg_sq"))
        self.counts = [int(count) for count in state["counts"]]
        for p in self.params:
            self.optimizer.state.pop(p, None)


def _row(group: dict[str, Any], count: int, decoupled: bool) -> list[float]:
    beta1, beta2 = group["betas"]
    decoupled = decoupled or bool(group.get("decoupled_weight_decay", False))
    decay = float(group["weight_decay"])
    if count == 0:  # no gradient yet: the row is not read
        return [0.0, beta1, beta2, 1.0, group["eps"], 0.0, 0.0]
    return [
        group["lr"] / (1.0 - beta1**count), beta1, beta2, (1.0 - beta2**count) ** -0.5, group["eps"],
        0.0 if decoupled else decay, group["lr"] * decay if decoupled else 0.0,
    ]  # fmt: skip
