"""STDET: most weights of a model come to follow a few reference weights while it trains."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..functional import FlatLayout, sensitivity_accumulate_, stdet_mask_
from . import _stdet_checks as checks
from ._stdet_adam import CompactAdam, unguard, why_not
from ._stdet_embedding import Embedding
from ._stdet_report import Report
from ._stdet_schedule import Schedule, paper_dummy
from ._stdet_snapshots import Snapshots
from .sma import SMA


class STDET:
    """Sensitivity-aware true and dummy embedding training, around an optimizer, in five lines of any loop:

        stdet = STDET(model, torch.optim.Adam(model.parameters(), lr=1e-4), sma=(0.8, 5))
        for epoch in range(70):
            for x in batches:
                stdet.zero_grad(); loss(model(x)).backward()
                stdet.after_backward()    # gradients of embedded weights become 0: clip after this
                stdet.step()
            stdet.epoch_end()

    model_or_params: a module, or the tensors whose weights may be embedded: dense, floating, of one dtype, on one
    device, all in `optimizer`; those that do not require grad and those named `quantiles` are left alone.
    optimizer: Adam, AdamW, SOAP, any other, or SMA around one.

    Up to `warmup_epochs` all weights train and their trajectories are sampled once an epoch. Then a few `modes` are
    found in them (CMD), a reference weight for each; every other weight is fitted as k * reference + d, by least
    squares over all epochs so far. The `embeddable` share with the lowest sensitivity may be embedded: every `period`
    epochs the `true_per_epoch` share of all weights whose k and d have moved least is embedded for good, and the next
    dummy(epoch) share for the time being. References and the rest stay free. What is embedded for good is rebuilt
    after every step, and has no gradient; with Adam and AdamW no moments either.

    Options, the first the default; [P] is stated in the paper, [C] read in CMD's published code, [R] a reconstruction:
      sensitivity   "taylor" mean |w g| over the last epoch of the warm-up, "fisher" g^2, "magnitude" |g|, "random" [R]
      dummy_mode    "project": overwritten once at the end of the epoch, then free; "freeze_epoch": tied until the next
                    event [R]
      gradient      "drop": embedded weights get none; "overwrite": trained as all, overwritten at the ends of epochs,
                    as in [C], nothing is saved; "chain": the references also get the sum of k * gradient [R]
      t_origin      of the argument of dummy: "global" the epoch, "warmup" epochs since the warm-up [R]
      continuity    False; True: d <- w - k r when a weight is embedded for good, so that it does not jump (ours)
      sma           None: as the optimizer is; (alpha, every): the optimizer is wrapped in SMA
      samples       weights whose trajectories are clustered, 1000 [C]; modes 10, at most 63 [C]
      snapshots     "bf16": movements in 2 bytes a weight and epoch on the host; "exact": fp32 (fp64 for fp64)
      fused         "auto": once weights are tied, Adam and AdamW step through one fused kernel and their moments are
                    kept here, without those of embedded weights; the optimizer's own step() is refused then. False, or
                    what why_not names (hooks, amsgrad, ...): the optimizer steps, then weights are rebuilt

    Memory beyond the optimizer's: on the device after the warm-up 1.02 bytes a weight and 8 an embeddable one (7.02 in
    all at 75 %), in the last warm-up epoch 4 a weight; at its end and those of later epochs see docs/STDET.md. On the
    host 2 * warmup_epochs + 4 bytes a weight until the warm-up ends, and 8 an embeddable one after it where period > 1.

    Raises TypeError and ValueError for what is described above and not given, BackendError for a forced backend,
    ImportError where SciPy is missing.

    Source: Zhang et al., Accelerating Learned Image Compression Through Modeling Neural Training Dynamics, TMLR 2025:
    affine embedding, the numbers of the schedule [P]. Its equations are not public. CMD: Betser et al., arXiv
    2312.13247 and its code [C]. docs/STDET.md says which part is which.
    """

    def __init__(
        self, model_or_params: nn.Module | Iterable[Tensor], optimizer: Optimizer, *, warmup_epochs: int = 20,
        embeddable: float = 0.75, true_per_epoch: float = 0.01, dummy: Callable[[int], float] = paper_dummy,
        period: int = 1, modes: int = 10, samples: int = 1000, sensitivity: str = "taylor",
        dummy_mode: str = "project", gradient: str = "drop", t_origin: str = "global", continuity: bool = False,
        sma: tuple[float, int] | None = None, snapshots: str = "bf16", fused: bool | str = "auto", seed: int = 0,
    ) -> None:  # fmt: skip
        checks.options(
            warmup_epochs=warmup_epochs, embeddable=embeddable, true_per_epoch=true_per_epoch, dummy=dummy,
            period=period, modes=modes, samples=samples, sensitivity=sensitivity, dummy_mode=dummy_mode,
            gradient=gradient, t_origin=t_origin, snapshots=snapshots, fused=fused, seed=seed,
        )  # fmt: skip
        if importlib.util.find_spec("scipy") is None:  # told now, not after twenty epochs
            raise ImportError("STDET: clustering needs SciPy; run: pip install scipy")
        self.optimizer = checks.averaged(optimizer, sma)
        self._inner = self.optimizer.optimizer if isinstance(self.optimizer, SMA) else self.optimizer
        self._params, controlled = checks.parameters(model_or_params, self._inner)
        self.schedule = Schedule(warmup_epochs, period, embeddable, true_per_epoch, dummy, t_origin)
        self.modes, self.sensitivity, self.dummy_mode, self.gradient = int(modes), sensitivity, dummy_mode, gradient
        self.continuity, self.fused, self.seed = bool(continuity), fused, int(seed)
        self.epoch = 0
        self._layout = FlatLayout([p.numel() for p in self._params])
        self._controlled = controlled
        self.weights = sum(size for size, mine in zip(self._layout.sizes, controlled, strict=True) if mine)
        self._dtype = torch.float64 if self._params[0].dtype is torch.float64 else torch.float32
        self._laid_out = _laid_out(self._params)  # what is kept of weights is in the order of memory
        precise = snapshots == "exact"
        self._snapshots = Snapshots(self._layout, controlled, int(samples), precise, self._dtype, self.seed)
        self._sensitivity: Tensor | None = None
        self._embedding: Embedding | None = None
        self._adam: CompactAdam | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's: learning-rate schedulers and GradScaler work on either."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all the optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Between backward (and unscaling) and clipping: accumulates sensitivity, drops embedded weights' gradients.

        Once before a step; where gradients of several backwards add up, after the last. Raises RuntimeError where the
        parameters' dtype or memory format is no longer what it was at the start, TypeError for sparse gradients.
        """
        self._check_parameters("after_backward")
        self._align_gradients()
        if self.epoch + 1 == self.schedule.warmup_epochs and self.sensitivity != "random":
            self._accumulate()
        if self._ties():
            if self.gradient == "chain":
                self._embedding.add_chain(self._params)
            grads = [p.new_empty(0) if p.grad is None else p.grad for p in self._params]
            stdet_mask_(grads, self._embedding.code, sizes=self._layout.sizes)

    def _ties(self) -> bool:
        return self._embedding is not None and self._embedding.ties and self.gradient != "overwrite"

    def _check_parameters(self, what: str) -> None:
        """Raises RuntimeError where they hold the average, or are not laid out as at the start."""
        if isinstance(self.optimizer, SMA) and self.optimizer._swapped:
            raise RuntimeError(f"STDET.{what}: the parameters hold the slow weights; leave swap() first")
        if _laid_out(self._params) != self._laid_out:
            raise RuntimeError(
                f"STDET.{what}: dtype or memory format of a parameter has changed; convert the model before STDET"
            )

    def _align_gradients(self) -> None:
        """A gradient lies in memory as its parameter does."""
        for p in self._params:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise TypeError(
                    f"STDET.after_backward: gradients must be dense, got {p.grad.layout}; give sparse=False"
                )
            if p.grad is not None and not _alike(p, p.grad):
                p.grad = torch.empty_like(p).copy_(p.grad)

    def _accumulate(self) -> None:
        if all(p.grad is None for p in self._params):
            return
        if self._sensitivity is None:
            self._sensitivity = torch.zeros(self._layout.starts[-1], dtype=self._dtype, device=self._params[0].device)
        grads = [p.new_empty(0) if p.grad is None else p.grad for p in self._params]
        sensitivity_accumulate_(self._layout.split(self._sensitivity), self._params, grads, kind=self.sensitivity)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer in which embedded weights follow their references; then its average, if it is due.

        closure: as of any torch optimizer, with after_backward() in it; what it returns is returned. Raises
        RuntimeError within swap() of SMA, and where the optimizer's state was loaded past load_state_dict().
        """
        self._check_parameters("step")
        sma = self.optimizer if isinstance(self.optimizer, SMA) else None
        if self._adam is not None and not self._may_fuse():  # hooks, groups or options have come since
            self._adam.give_back(self._embedding.code)
            self._adam = None
        if self._adam is None:
            result = self.optimizer.step() if closure is None else self.optimizer.step(closure)
            if self._ties():
                self._embedding.rebuild(self._params)
                if sma is not None and sma.steps % sma.every == 0:
                    self._embedding.rebuild(self._slow())
            return result
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.optimizer._opt_called = self._inner._opt_called = True  # for schedulers: their own step() runs no more
        slow, alpha, reset = [], 1.0, True
        if sma is not None:
            sma.steps += 1
            if sma.steps % sma.every == 0:
                slow, alpha, reset = self._slow(), sma.alpha, sma.reset
        e = self._embedding
        self._adam.step(e.code, e.base, e.k, e.d, e.refs, slow, alpha, reset)
        return result

    def _slow(self) -> list[Tensor]:
        """The slow weights of SMA in the order of this object's parameters."""
        names = (p for group in self.param_groups for p in group["params"])
        of = dict(zip(names, self.optimizer.slow_weights(), strict=True))
        return [of[p] for p in self._params]

    def _values(self) -> Sequence[Tensor]:
        """What is sampled: the weights at the last average where it resets them, else as they are."""
        averaged = isinstance(self.optimizer, SMA) and self.optimizer.reset
        return self._slow() if averaged else [p.detach() for p in self._params]

    @torch.no_grad()
    def epoch_end(self) -> Report:
        """Closes an epoch: samples, finds the modes, fits, embeds; see the class. Returns report().

        Raises RuntimeError where the last epoch of the warm-up saw no gradients, within swap() of SMA, and where the
        parameters have been converted since the start; ValueError where `dummy` gives no share. Nothing has changed
        then.
        """
        self._check_parameters("epoch_end")
        values = self._values()
        epoch, last = self.epoch + 1, self.schedule.warmup_epochs
        if epoch == last and self.sensitivity != "random" and self._sensitivity is None:
            raise RuntimeError(
                f"STDET.epoch_end: no sensitivity was accumulated in epoch {epoch}, the last of the warm-up; "
                "call after_backward() after every backward()"
            )
        counts = self._counts(epoch)
        self._snapshots.add_sample(values)
        if epoch <= last:
            self._snapshots.add(values)
        if epoch == last:
            self._find()
        elif epoch > last:
            self._embed(counts, values)
        self.epoch = epoch
        return self.report()

    def _counts(self, epoch: int) -> tuple[int, int] | None:
        """(weights embedded for good, dummies) after the event at the end of `epoch`, None where there is none."""
        event, schedule = self.schedule.event(epoch), self.schedule
        if not event:
            return None
        room = self._embedding.embeddable
        target = schedule.true_target(event, self.weights, room)
        return target, schedule.dummies(epoch, self.weights, room, target)

    def _find(self) -> None:
        sensitivity = self._sensitivity
        if sensitivity is None:  # random
            generator = torch.Generator().manual_seed(self.seed + 1)
            sensitivity = torch.rand(self._layout.starts[-1], generator=generator, dtype=self._dtype)
            sensitivity = sensitivity.to(self._params[0].device)
        allowed = self._layout.new_code(sensitivity.device) != FlatLayout.PADDING
        for part, mine in zip(self._layout.split(allowed), self._controlled, strict=True):
            part.logical_and_(torch.tensor(mine, device=part.device))
        sensitivity.masked_fill_(~allowed, float("nan"))
        del allowed
        self._embedding = Embedding.find(
            self._snapshots, self.modes, sensitivity, self.schedule.embeddable, self.weights
        )
        self._sensitivity = None
        self._snapshots.release()
        if self.schedule.period > 1:
            self._embedding.remember()

    def _embed(self, counts: tuple[int, int] | None, values: Sequence[Tensor]) -> None:
        e = self._embedding
        change = e.learn(values)
        if counts is None:
            if self.gradient == "overwrite" and e.true:
                self._rebuild_all()
            return
        if self.schedule.period > 1:
            e.change_since(change)
        target, dummies = counts
        true, dummy = e.draw(change, target - e.true, dummies)
        del change
        e.release_dummies()
        if self.continuity:
            e.continue_from(true, self._params)
        if self._adam is not None:
            self._adam.drop(e.code, true)
        e.embed(true, dummy, freeze=self.dummy_mode == "freeze_epoch")
        del true
        if e.ties and self._adam is None and self._may_fuse():
            self._adam = CompactAdam(self._inner, self._params, self._layout)
            self._adam.take_over(e.code, self._dtype)
        self._rebuild_all(dummy)
        if self.schedule.period > 1:
            e.remember()

    def _may_fuse(self) -> bool:
        allowed = self.fused is not False and self.gradient != "overwrite"
        return allowed and why_not(self.optimizer, self._params) is None

    def _rebuild_all(self, dummies: Tensor | None = None) -> None:
        self._embedding.rebuild(self._params, dummies)
        if isinstance(self.optimizer, SMA):
            self._embedding.rebuild(self._slow(), dummies)

    def report(self) -> Report:
        """Where the training stands: shares, bytes, modes and how well they explain. Print it for a summary."""
        return Report.of(self)

    def trajectories(self) -> dict[str, Tensor]:
        """The sampled weights and what their references make of them now, on the CPU, for plots.

        places [K] int64 (flat); values [epochs, K] fp64; mode [K] int64, -1 where never embedded; rebuilt [epochs, K]
        fp64, NaN there. Raises RuntimeError before the modes are found.
        """
        if self._embedding is None:
            raise RuntimeError("STDET.trajectories: there are no modes before the warm-up ends; train on")
        places, values = self._snapshots.sample, torch.stack(self._snapshots.history)
        mode, k, d = self._embedding.coefficients_at(places)
        at = torch.searchsorted(places, self._embedding.modes.places)
        rebuilt = values[:, at][:, mode.clamp(min=0)] * k + d
        return {"places": places, "values": values, "mode": mode, "rebuilt": rebuilt}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit: tensors, numbers, strings, lists and dictionaries."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "stdet": {
                "settings": self._settings(),
                "epoch": self.epoch,
                "sensitivity": self._sensitivity,
                "snapshots": self._snapshots.state_dict(),
                "embedding": None if self._embedding is None else self._embedding.state_dict(),
                "adam": None if self._adam is None else self._adam.state_dict(),
            },
        }

    def _settings(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "warmup_epochs": schedule.warmup_epochs, "period": schedule.period, "embeddable": schedule.embeddable,
            "true_per_epoch": schedule.true, "t_origin": schedule.t_origin, "modes": self.modes,
            "sensitivity": self.sensitivity, "dummy_mode": self.dummy_mode, "gradient": self.gradient,
            "continuity": self.continuity, "snapshots": "exact" if self._snapshots.precise else "bf16",
            "seed": self.seed, "averaged": isinstance(self.optimizer, SMA),
            "shapes": [list(p.shape) for p in self._params], "strides": _strides(self._params),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what state_dict gave. Raises ValueError, nothing changed, where it is another run's or damaged.

        The model's weights are not in it: load them first. Where the fused step cannot be taken here (fused=False,
        hooks), the optimizer gets its moments back.
        """
        own = checks.state(state_dict, self._settings())
        try:
            epoch, *restored = int(own["epoch"]), *self._restored(own)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"STDET.load_state_dict: the state is damaged ({str(error).splitlines()[0]}); "
                "load one that state_dict() gave"
            ) from error
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.epoch = epoch
        self._embedding, self._adam, self._snapshots, self._sensitivity = restored
        if self._adam is None:
            unguard(self._inner)
        else:
            self._adam.own()

    def _restored(self, own: dict[str, Any]) -> tuple[Embedding | None, CompactAdam | None, Snapshots, Tensor | None]:
        device, embedding, adam, sensitivity = self._params[0].device, None, None, None
        if own["embedding"] is not None:
            embedding = Embedding.from_state(own["embedding"], self._layout, device)
        if own["adam"] is not None:
            adam = CompactAdam(self._inner, self._params, self._layout)
            adam.restore(own["adam"], embedding.code, self._dtype)
        if own["sensitivity"] is not None:
            sensitivity = own["sensitivity"].to(device, self._dtype, copy=True)
            if list(sensitivity.shape) != [self._layout.starts[-1]]:
                raise ValueError("sensitivity does not fit")
        return embedding, adam, self._snapshots.restored(own["snapshots"]), sensitivity


def _laid_out(params: Sequence[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(p.dtype, p.stride()) for p in params]


def _strides(params: Sequence[Tensor]) -> list[list[int]]:
    """Of each parameter; a dimension of 1 has none that matters."""
    return [[s if n > 1 else 0 for n, s in zip(p.shape, p.stride(), strict=True)] for p in params]


def _alike(p: Tensor, grad: Tensor) -> bool:
    return grad.is_contiguous() if p.is_contiguous() else grad.stride() == p.stride()
