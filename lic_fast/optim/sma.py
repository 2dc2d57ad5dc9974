"""Sampling-then-moving average of the weights that any optimizer trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..functional import sma_update_


class SMA(Optimizer):
    """Wraps an optimizer: every `every` steps, slow <- slow + alpha * (fast - slow), then fast <- slow where reset.

    optimizer: any torch optimizer; its param_groups, state and defaults are this object's own, so learning-rate
    schedulers, GradScaler (give its unscale_ and step the same one of the two) and add_param_group work on either.
    alpha in [0, 1] weighs the new point; alpha=1 copies it, and is the plain optimizer to the bit. every >= 1 counts
    steps that were taken (a step that GradScaler skips is none). reset=False leaves the trained weights alone and only
    keeps the average, for swap().

    The slow weights are fp32 (fp64 for fp64 parameters) and start as the weights before the first step. state_dict
    holds the wrapped optimizer's, the slow weights and the count; a resumed run continues bit for bit. Parameters that
    do not require grad are left alone. The moments of the wrapped optimizer stay as they are when the weights are
    reset.

    Raises TypeError where `optimizer` is no torch optimizer and for complex parameters, ValueError for alpha, every and
    a foreign state_dict.

    Source: SMA in Zhang et al., TMLR 2025 (alpha = 0.8, 5 optimizer steps). The paper's equation is not public: this
    form is a reconstruction, that of Lookahead (Zhang et al., NeurIPS 2019), whose defaults are the same two numbers.
    `reset` covers the other reading, a moving average beside the training.
    """

    def __init__(self, optimizer: Optimizer, alpha: float = 0.8, every: int = 5, reset: bool = True) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"SMA: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, SMA):
            raise TypeError("SMA: optimizer is already averaged by SMA; wrap the optimizer inside it once")
        _check_numbers(alpha, every)
        self.optimizer = optimizer
        self.alpha, self.every, self.reset = float(alpha), int(every), bool(reset)
        self.steps = 0
        self._slow: dict[Tensor, Tensor] = {}
        self._swapped = False
        super().__init__(optimizer.param_groups, optimizer.defaults)  # sets up step hooks; owns no groups

    # What Optimizer.__init__ would store belongs to the wrapped optimizer.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        pass

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        # as torch's own: neither hooks nor the `step` that a scheduler put on this object go into a copy
        names = ("optimizer", "alpha", "every", "reset", "steps", "_slow", "_swapped")
        return {name: self.__dict__[name] for name in names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer; its slow weights start at its weights of now."""
        if any(param_group is group for group in self.optimizer.param_groups):
            return  # Optimizer.__init__ hands the wrapped groups back
        self.optimizer.add_param_group(param_group)
        self._slow_list()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the wrapped optimizer, then the average on every `every`-th; returns what the former returns."""
        self._not_swapped("step")
        self._slow_list()  # before the first step, so that slow starts at the initial weights
        result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            self.sync()
        return result

    @torch.no_grad()
    def sync(self) -> None:
        """Averages now, whatever the count: for the end of an epoch or of training."""
        self._not_swapped("sync")
        slow = self._slow_list()
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for s, p in zip(slow, self._parameters(), strict=True):
            if not p.requires_grad:
                continue  # frozen: whatever it holds is meant
            pair = by_device.setdefault(p.device, ([], []))
            pair[0].append(s)
            pair[1].append(p)
        for slows, params in by_device.values():
            if self.alpha == 1.0:  # slow + (fast - slow) would round
                torch._foreach_copy_(slows, params)
            else:
                sma_update_(slows, params, alpha=self.alpha, reset=self.reset)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the block the parameters hold the slow weights; afterwards their own again, bit for bit.

        Costs one copy of the parameters while it lasts. step and sync raise RuntimeError within it.
        """
        self._not_swapped("swap")
        params, slow = self._parameters(), self._slow_list()
        with torch.no_grad():
            own = [p.detach().clone() for p in params]
            torch._foreach_copy_(params, slow)
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            with torch.no_grad():
                torch._foreach_copy_(params, own)

    def restart(self) -> None:
        """Forgets the average: the slow weights begin again at the weights of now. For weights loaded from outside."""
        self._not_swapped("restart")
        self._slow.clear()
        self._slow_list()

    def slow_weights(self) -> list[Tensor]:
        """The slow weights, in the order of the parameters in param_groups."""
        return self._slow_list()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state_dict, alpha, every, reset, the step count and the slow weights."""
        own = {"alpha": self.alpha, "every": self.every, "reset": self.reset, "steps": self.steps}
        return {"optimizer": self.optimizer.state_dict(), "sma": own | {"slow": self._slow_list()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what state_dict gave; alpha, every and reset come from it too. Nothing changes on an error."""
        self._not_swapped("load_state_dict")
        if set(state_dict) != {"optimizer", "sma"}:
            raise ValueError(
                f"SMA.load_state_dict: not a state of SMA, got keys {sorted(map(str, state_dict))}; "
                f"load it into the optimizer it came from"
            )
        own, params = state_dict["sma"], self._parameters()
        if set(own) != {"alpha", "every", "reset", "steps", "slow"} or own["steps"] < 0:
            raise ValueError("SMA.load_state_dict: the state is incomplete or damaged; load one that state_dict() gave")
        _check_numbers(own["alpha"], own["every"])
        got = [tuple(s.shape) for s in own["slow"]]
        if got != [tuple(p.shape) for p in params]:
            raise ValueError(
                f"SMA.load_state_dict: the slow weights do not fit, got {len(got)} tensors for {len(params)} "
                f"parameters or other shapes; load the state of the same model"
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.alpha, self.every, self.reset = float(own["alpha"]), int(own["every"]), bool(own["reset"])
        self.steps = int(own["steps"])
        self._slow = {
            p: s.detach().to(device=p.device, dtype=_slow_dtype(p), copy=True)
            for p, s in zip(params, own["slow"], strict=True)
        }

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _slow_list(self) -> list[Tensor]:
        """Slow weights for all parameters, made where missing from the weights of now."""
        params = self._parameters()
        with torch.inference_mode(False), torch.no_grad():  # a first swap() may come inside inference_mode
            for p in params:
                if p not in self._slow:
                    if p.is_complex():
                        raise TypeError(f"SMA: a parameter must be of a floating dtype, got {p.dtype}")
                    self._slow[p] = p.detach().to(_slow_dtype(p), copy=True)
        return [self._slow[p] for p in params]

    def _not_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"SMA.{what}: the parameters hold the slow weights; leave swap() first")


def _check_numbers(alpha: float, every: int) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"SMA: alpha must be in [0, 1], got {alpha!r}")
    if int(every) != every or every < 1:
        raise ValueError(f"SMA: every must be a whole number of steps >= 1, got {every!r}")


def _slow_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32
