"""Adam's moments without those of embedded weights, and the fused step that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..functional import FlatLayout, in_memory_order, stdet_adam_step_
from .sma import SMA

CHUNK = 1 << 18  # places that are looked at at once: what that takes is not a matter of the model's size


def why_not(outer: Optimizer, params: Sequence[Tensor]) -> str | None:
    """The reason the fused step of `params` cannot stand in for this optimizer's own, or None.

    Asked at every step, for hooks, groups and options come and go.
    """
    optimizer = outer.optimizer if isinstance(outer, SMA) else outer
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"the fused step is Adam's, not {type(optimizer).__name__}'s"
    for group in optimizer.param_groups:
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            if group[name]:
                return f"the fused step has no {name}"
        if isinstance(group["lr"], Tensor) or any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "the fused step takes lr and betas as numbers"
    for hooked in (outer, optimizer):
        hooks = (*hooked._optimizer_step_pre_hooks.values(), *hooked._optimizer_step_post_hooks.values())
        if any(hook is not refuse for hook in hooks):
            return "the optimizer has step hooks"
    if {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad} != set(params):
        return "the optimizer trains other parameters than at the start"
    return None


def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> NoReturn:
    """A hook before the own step of an optimizer whose moments are here: it would start without them."""
    raise RuntimeError(
        f"STDET: {type(optimizer).__name__}.step was called, but STDET keeps its moments since weights are tied; "
        "call step() of STDET"
    )


def unguard(optimizer: Optimizer) -> None:
    """The optimizer's own step runs again."""
    hooks = optimizer._optimizer_step_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refuse]:
        del hooks[key]


class CompactAdam:
    """The moments of an Adam or AdamW in flat tensors [elements that are not STATELESS], and its steps."""

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], layout: FlatLayout) -> None:
        self.optimizer, self.params, self.layout = optimizer, list(params), layout
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
        self.own()

    def own(self) -> None:
        """The optimizer has no moments, and its own step is refused."""
        for p in self.params:
            self.optimizer.state.pop(p, None)
        self._guard()

    def _guard(self) -> None:
        if refuse not in self.optimizer._optimizer_step_pre_hooks.values():  # torch copies no hooks
            self.optimizer.register_step_pre_hook(refuse)

    def give_back(self, code: Tensor) -> None:
        """Puts the moments back into the optimizer's state, zeros for elements that have none."""
        unguard(self.optimizer)
        groups, begin = self._groups(), 0
        for p, part, count in zip(self.params, self.layout.split(code), self.counts, strict=True):
            has = part & FlatLayout.STATELESS == 0
            end = begin + int(has.sum())
            if count:
                on_device = groups[p].get("fused") or groups[p]["capturable"]
                state = {"step": torch.tensor(float(count), device=p.device if on_device else "cpu")}
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p)
                    in_memory_order(state[name])[has] = getattr(self, name)[begin:end].to(p.dtype)
                self.optimizer.state[p] = state
            begin = end

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self.optimizer.param_groups for p in group["params"]}

    def drop(self, code: Tensor, more: Tensor) -> None:
        """Releases the moments of the elements of `more` [places] bool, which have had a place under `code` so far.

        Front to back within the tensors that hold them, then once into smaller ones, one after the other.
        """
        begin = kept = 0
        for first in range(0, len(code), CHUNK):
            had = code[first : first + CHUNK] & FlatLayout.STATELESS == 0
            keep = ~more[first : first + CHUNK][had]
            at, end = keep.nonzero().squeeze(1), begin + len(keep)
            for values in (self.exp_avg, self.exp_avg_sq):
                values[kept : kept + len(at)] = values[begin:end].index_select(0, at)
            begin, kept = end, kept + len(at)
        del values
        self.exp_avg = self.exp_avg[:kept].clone()
        self.exp_avg_sq = self.exp_avg_sq[:kept].clone()

    def step(
        self, code: Tensor, base: Tensor, k: Tensor, d: Tensor, refs: Tensor, slow: Sequence[Tensor], alpha: float,
        reset: bool,
    ) -> None:  # fmt: skip
        """One step of all parameters; `slow` where it averages.

        Raises RuntimeError where moments have come back to the optimizer: something was loaded into it alone.
        """
        if any(p in self.optimizer.state for p in self.params):
            raise RuntimeError(
                "STDET.step: the optimizer's state was loaded past STDET, which keeps its moments; "
                "load with load_state_dict() of STDET"
            )
        self._guard()
        groups, grads, rows = self._groups(), [], []
        known: dict[tuple[int, int], list[float]] = {}
        for i, p in enumerate(self.params):
            group = groups[p]
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

    def restore(self, state: dict[str, Any], code: Tensor, dtype: torch.dtype) -> None:
        """Takes up what state_dict gave; the optimizer is left alone until own(). Raises ValueError."""
        if type(self.optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            raise ValueError(f"the moments are Adam's, the optimizer is {type(self.optimizer).__name__}")
        self.counts = [int(count) for count in state["counts"]]
        places = int((code & FlatLayout.STATELESS == 0).sum())
        for name in ("exp_avg", "exp_avg_sq"):
            setattr(self, name, state[name].to(code.device, dtype, copy=True))
            if list(getattr(self, name).shape) != [places] or len(self.counts) != len(self.params):
                raise ValueError(f"{name} does not fit")


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
