"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..functional.preconditioning import FLOATS
from ._soap_batch import Batch, batches_of
from ._soap_checks import check_group, check_options, settings_of, squares_fit
from ._soap_distributed import Shares
from ._soap_graphs import Graphs
from ._soap_plan import Plan, plan_of
from ._soap_refresh import first_bases_, refresh_, spread
from ._soap_state import Counts, Slot, allocate, fill, misfit, state_dtype


class SOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner, with the arguments and steps of nikhilvyas/SOAP.

    params: parameters, dictionaries of groups, or lic_fast.optim.param_groups(model); fp32, bf16, fp16 or fp64, any
    number of axes (those of size 1 do not count; at most 5 longer ones where preconditioned). State is fp32, fp64
    for fp64 parameters: two moments of the parameter's size, and GG and Q [d, d] for each axis of 1 < d <=
    max_precond_dim. Tensors of one axis take plain Adam steps, unless precondition_1d.

    lr, betas, eps, weight_decay (decoupled, applied last), correct_bias: of Adam; lr and weight_decay may be 0-d
    tensors. shampoo_beta < 0 stands for betas[1]. precondition_frequency: steps between two refreshes of the
    eigenbases. normalize_grads divides each update by its root mean square. merge_dims merges neighbouring axes up to
    max_precond_dim, with data_format="channels_last" for parameters stored as (out, height, width, in).
    precondition=False: plain Adam steps. Groups may differ in all of these but data_format, and training may change
    them, except what shapes a state (max_precond_dim, merge_dims, precondition_1d, precondition) once there is one.

    The first step of a parameter only initialises its factors. A step whose gradient is not finite leaves the parameter
    and GG as they are and is counted in skipped_steps; the next refresh still comes when it was due. No gradient (None)
    is no step. state holds views into the stacks: values can be written into them, but an entry that is replaced by
    another tensor is not seen; deleting a parameter's state makes its next step a first one.

    refresh: "auto" (the measured choice), "cholesky_qr", "qr" (Householder in fp64) or "eigh" (fresh eigenvectors).
    stagger spreads the refreshes of the parameters over the steps between, so that no step is slow. refresh_memory
    bounds the bytes that a refresh takes for itself (at least one parameter's worth). precision: of a GPU's
    projections, see lic_fast.functional.soap_update_. capturable records an ordinary and a refreshing step as CUDA
    graphs. process_group: a torch.distributed group whose ranks hold equal parameters and gradients (DDP): each
    parameter's state and work belong to one rank, and its new value goes to all; state_dict and load_state_dict are
    then calls of all ranks together.

    Raises ValueError for a setting out of range and a state that does not fit (nothing changes then), TypeError for
    complex parameters, RuntimeError for sparse gradients, BackendError for a forced backend.

    Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024). What Zhang & Zhu (arXiv 2601.20769)
    set for learned image compression is not public: the defaults are those of nikhilvyas/SOAP.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        data_format: str = "channels_first",
        correct_bias: bool = True,
        *,
        precondition: bool = True,
        refresh: str = "auto",
        stagger: bool = False,
        refresh_memory: int | None = None,
        precision: str = "tf32x3",
        capturable: bool = False,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency, "max_precond_dim": max_precond_dim,
            "merge_dims": merge_dims, "precondition_1d": precondition_1d, "normalize_grads": normalize_grads,
            "correct_bias": correct_bias, "precondition": precondition,
        }  # fmt: skip
        self._options = {
            "data_format": data_format, "refresh": refresh, "stagger": stagger, "refresh_memory": refresh_memory,
            "precision": precision, "capturable": capturable,
        }  # fmt: skip
        check_options(**self._options)
        self._shares = None if process_group is None else Shares(process_group)
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._slots: dict[Tensor, Slot] = {}
        self._counts: dict[torch.device, Counts] = {}
        self._active: list[Slot] = []
        self._settings: list[tuple[Any, ...]] = []
        self._batches: list[Batch] = []
        self._graphs: Graphs | None = None
        self.refreshed_matrices = 0
        self.refreshed_flops = 0

    def __getstate__(self) -> dict[str, Any]:
        if self._shares is not None:
            raise TypeError("SOAP: an optimizer with a process_group cannot be copied or pickled; use its state_dict()")
        return super().__getstate__() | {"_options": self._options, "_shares": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)
        states = {p: dict(saved) for p, saved in self.state.items() if saved}
        self._take_up(*self._restored(self.param_groups, states, "SOAP: the copied state"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; keys left out take the defaults. Raises as the constructor does; nothing changes then."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"SOAP: a parameter group must be a dict with 'params', got {type(param_group).__name__}")
        given = param_group["params"]
        group = {**self.defaults, **param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        check_group(group)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if len(set(map(id, tensors))) != len(tensors):
            raise ValueError(f"SOAP: a parameter stands twice in a group, got {len(tensors)}; list each once")
        for p in tensors:
            if isinstance(p, Tensor) and p.requires_grad:
                self._plan(p, group)
        super().add_param_group(group)
        if self._shares is not None:
            added = self.param_groups[-1]
            self._shares.assign([(p, self._plan(p, added)) for p in added["params"]])

    def _owns(self, p: Tensor) -> bool:
        return self._shares is None or self._shares.owns(p)

    @property
    def skipped_steps(self) -> int:
        """How many times a parameter (of this rank's) was left alone because its gradient was not finite.

        Waits for the device.
        """
        first = sum(group.get("skipped_first_steps", 0) for group in self.param_groups)
        return first + sum(int(bank.table[:, 1].sum()) for bank in self._counts.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active, new = self._with_gradients()
        if active:
            self._ordinary_and_refreshing(active)
        if new:
            self._initialise(new)
        if self._shares is not None:
            self._shares.exchange(p for group in self.param_groups for p in group["params"])
        return loss

    def _ordinary_and_refreshing(self, active: list[Slot]) -> None:
        settings = [settings_of(group) for group in self.param_groups]
        if active != self._active or settings != self._settings:
            for group in self.param_groups:
                check_group(group)
            self._rebatch(active)
            self._active, self._settings = active, settings
        for batch in self._batches:
            batch.prepare(self.param_groups)
        due = self._due(active)
        if self._graphs is None:
            self._work(due, [slot.param.grad for batch in self._batches for slot in batch.slots])
        else:
            grads = self._graphs.gradients()
            recorded = due if self._options["refresh"] != "eigh" else []  # eigh looks at its result: it cannot be
            self._graphs.run(tuple(map(id, recorded)), lambda: self._work(recorded, grads))
            if due and not recorded:
                refresh_(due, self._options["refresh"], self._options["refresh_memory"])
        for slot in active:
            slot.attempts += 1
        self.refreshed_matrices += sum(f is not None for slot in due for f in slot.factors)
        self.refreshed_flops += sum(slot.plan.refresh_flops() for slot in due)

    def _rebatch(self, active: list[Slot]) -> None:
        batches = batches_of(active, self.param_groups)
        kinds = [(batch.slots, batch.settings) for batch in batches]
        if kinds == [(batch.slots, batch.settings) for batch in self._batches]:
            return  # only numbers have changed, which the batches look up at every step
        self._batches = batches
        on_gpu = all(slot.param.is_cuda for slot in active)
        recorded = [slot.param for batch in batches for slot in batch.slots]
        self._graphs = Graphs(recorded) if self._options["capturable"] and on_gpu else None

    def _work(self, due: list[Slot], grads: list[Tensor]) -> None:
        """What happens on the device: the step of every batch, then the refresh of the parameters that are due."""
        first = 0
        for batch in self._batches:
            batch.run(grads[first : first + len(batch.slots)], self._options["precision"])
            first += len(batch.slots)
        if due:
            refresh_(due, self._options["refresh"], self._options["refresh_memory"])

    def _due(self, active: list[Slot]) -> list[Slot]:
        every = [group["precondition_frequency"] for group in self.param_groups]
        return [slot for slot in active if slot.factors and (slot.attempts + 1 + slot.phase) % every[slot.group] == 0]

    def _with_gradients(self) -> tuple[list[Slot], list[tuple[Tensor, int, Plan]]]:
        """(slots of the parameters that have a gradient, those of them without a slot yet)."""
        active, new = [], []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None or not self._owns(p):
                    continue
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"SOAP: gradients must be dense, got {p.grad.layout} for a parameter of shape "
                        f"{list(p.shape)}; train it with torch.optim.SparseAdam"
                    )
                slot = self._slots.get(p)
                if slot is None or self.state.get(p) is not slot.entry:  # none yet, or the user has dropped it
                    new.append((p, index, self._plan(p, group)))
                    continue
                if slot.kind != (p.shape, p.dtype, p.device):
                    raise RuntimeError(
                        f"SOAP: a parameter is another than its state was made for, got {p.dtype} {list(p.shape)} on "
                        f"{p.device} for {slot.kind[1]} {list(slot.kind[0])} on {slot.kind[2]}; make a new optimizer"
                    )
                if slot.group != index:
                    slot.group, self._active = index, []
                active.append(slot)
        return active, new

    def _plan(self, p: Tensor, group: dict[str, Any]) -> Plan:
        if p.dtype not in FLOATS:
            raise TypeError(f"SOAP: a parameter must be fp32, bf16, fp16 or fp64, got {p.dtype}")
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"SOAP: a parameter's elements share memory, got shape {list(p.shape)} with strides "
                f"{list(p.stride())}; clone it"
            )
        return plan_of(
            tuple(p.shape), bool(group["precondition"]), bool(group["precondition_1d"]), bool(group["merge_dims"]),
            int(group["max_precond_dim"]), self._options["data_format"] == "channels_last",
        )  # fmt: skip

    def _initialise(self, new: list[tuple[Tensor, int, Plan]]) -> None:
        """The first step of parameters: GG of the gradient, Q its eigenvectors; nothing else moves."""
        requests = []
        for request in new:
            p, index, _ = request
            if squares_fit(p.grad, state_dtype(p)):
                requests.append(request)
            else:
                group = self.param_groups[index]
                group["skipped_first_steps"] = group.get("skipped_first_steps", 0) + 1
        kept = {p for group in self.param_groups for p in group["params"]} - {p for p, _, _ in requests}
        kept &= {p for p, slot in self._slots.items() if self.state.get(p) is slot.entry}
        slots = self._admit(requests, [slot for p, slot in self._slots.items() if p in kept], self._counts)
        first_bases_(slots, self.param_groups)
        self._take_up([*(self._slots[p] for p in self._slots if p in kept), *slots], self._counts)

    def _admit(
        self, requests: list[tuple[Tensor, int, Plan]], old: list[Slot], counts: dict[torch.device, Counts]
    ) -> list[Slot]:
        slots = allocate(requests, counts)
        if self._options["stagger"]:
            spread(slots, old, self.param_groups)
        return slots

    def _take_up(self, slots: list[Slot], counts: dict[torch.device, Counts]) -> None:
        """Makes these the slots, and optimizer.state what they publish."""
        self._slots, self._counts = {slot.param: slot for slot in slots}, counts
        self._active, self._batches = [], []  # the table of counts has moved: what was recorded would write the old one
        for p in [p for p in self.state if p not in self._slots]:
            del self.state[p]
        for slot in slots:  # all of them: the table of counts may have moved
            slot.publish(self.state)

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; with a process_group the states of all ranks, and a call of all ranks."""
        if self._shares is None:
            return super().state_dict()
        own = self.state
        plans = [(p, self._plan(p, group)) for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            gathered = self._shares.gather(dict(own), plans)
        try:
            self.state = defaultdict(dict, gathered)
            return super().state_dict()
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what state_dict gave, or a state_dict of nikhilvyas/SOAP. Nothing changes on an error."""
        hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        given = state_dict.copy()
        for hook in hooks[0].values():
            changed = hook(self, given)
            given = given if changed is None else changed
        groups, states = self._checked(given)
        slots, counts = self._restored(groups, states, "SOAP.load_state_dict: the state")
        self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:  # the groups in torch's way; the states have been restored, and the hooks see the whole
            super().load_state_dict({"state": {}, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = hooks
        self._forget()
        self._take_up(slots, counts)
        for hook in hooks[1].values():
            hook(self)

    def _checked(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """The groups of a state_dict with our defaults where it has none, and its states by parameter."""
        groups, saved_states = state_dict["param_groups"], state_dict["state"]
        sizes = [[len(group["params"]) for group in some] for some in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"SOAP.load_state_dict: the parameter groups do not fit, got sizes {sizes[0]} for {sizes[1]}; "
                f"load the state of the same model"
            )
        merged = [{**self.defaults, **group} for group in groups]
        states = {}
        for mine, saved in zip(self.param_groups, merged, strict=True):
            check_group({**saved, "params": mine["params"]})
            pairs = zip(mine["params"], saved["params"], strict=True)
            states |= {p: saved_states[key] for p, key in pairs if saved_states.get(key)}
        return merged, states

    def _restored(
        self, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]], what: str
    ) -> tuple[list[Slot], dict[torch.device, Counts]]:
        """New slots with these states, and their counts; nothing of this optimizer changes."""
        requests = []
        params = [group["params"] for group in self.param_groups]
        for index, (group, members) in enumerate(zip(groups, params, strict=True)):
            for place, p in enumerate(members):
                if p in states and self._owns(p):
                    plan = self._plan(p, group)
                    reason = misfit(p, plan, states[p])
                    if reason is not None:
                        raise ValueError(
                            f"{what} of parameter {place} of group {index} does not fit: {reason}; load the state of "
                            f"the same model and settings"
                        )
                    requests.append((p, index, plan))
        counts: dict[torch.device, Counts] = {}
        with torch.no_grad():
            slots = self._admit(requests, [], counts)
            for slot in slots:
                fill(slot, states[slot.param])
        return slots, counts
