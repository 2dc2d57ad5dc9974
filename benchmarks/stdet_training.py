"""stdet_training: what STDET adds to a step of mbt2018-mean, and how long and large its ends of epochs are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import explain
from ..optim import STDET
from ..training.loss import RateDistortionLoss
from ..training.models import build_model, resolve_channels, split_parameters
from . import _rows, parameters
from ._harness import OURS, Settings, Timing, collector_off
from ._memory import peak_allocated

MODEL, BATCH, CROP = "mbt2018-mean", 4, 128
WARMUP, EVENTS, SAMPLES = 20, 10, 1000  # of the ends of epochs: the paper's warm-up, and CMD's sample
_OPS = ("stdet_adam_step_", "stdet_mask_", "rls_update_", "sensitivity_accumulate_", "cmd_assign", "embed_select")
_NOISE = 1e-3
_SEED = 23


def _chosen(device: torch.device) -> str:
    return ", ".join(f"{op}: {explain(op, device).chosen}" for op in _OPS)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def _timed(run: Callable[[], object], device: torch.device) -> float:
    began = _clock(device)
    run()
    return _clock(device) - began


class _Walk:
    """Weights that move along a few random directions, as trajectories that CMD can cluster."""

    def __init__(self, params: Sequence[Parameter], modes: int = 8) -> None:
        self._params = params
        self._generator = torch.Generator(params[0].device).manual_seed(_SEED)
        draw = {"generator": self._generator, "device": params[0].device}
        self._of = [torch.randint(modes, p.shape, **draw) for p in params]
        self._modes, self._draw = modes, draw

    @torch.no_grad()
    def advance(self) -> None:
        moved = torch.randn(self._modes, **self._draw)
        for p, which in zip(self._params, self._of, strict=True):
            p.add_(moved[which] + 0.2 * torch.randn(p.shape, **self._draw), alpha=_NOISE)


class _Contender:
    """Parameters of its own, and what a loop does with gradients after backward, clipping apart."""

    def __init__(self, name: str, values: Sequence[Tensor], ready: str | None, fused: bool = False) -> None:
        self.name = name
        self.params = [Parameter(v.clone()) for v in values]
        adam = torch.optim.Adam(self.params, lr=1e-6, fused=fused)
        if ready is None:
            self.update = adam.step
            return
        self.stdet = stdet = STDET(
            self.params, adam, warmup_epochs=2, true_per_epoch=0.5, dummy=lambda t: 0.0, samples=SAMPLES
        )
        walk = _Walk(self.params)
        ends = {"warm-up": 0, "sensitivity": 1, "embedded": 3}[ready]
        for epoch in range(ends):
            for p in self.params:
                p.grad = torch.full_like(p, _NOISE)
            stdet.after_backward()
            if epoch == 0:
                stdet.step()
            walk.advance()
            stdet.epoch_end()
        self.update = self._stepped

    def _stepped(self) -> None:
        self.stdet.after_backward()
        self.stdet.step()

    def feed(self, gradients: Sequence[Tensor]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g.clone()


def _contenders(values: Sequence[Tensor], device: torch.device) -> list[_Contender]:
    own = [("", "warm-up"), (", last epoch of the warm-up", "sensitivity"), (", 50 % embedded", "embedded")]
    return [
        _Contender("torch.optim.Adam", values, None),
        _Contender("torch.optim.Adam(fused=True)", values, None, fused=True),
        *(_Contender(f"{OURS}STDET(Adam){when}", values, ready) for when, ready in own),
    ]


def _row(shared: dict[str, str], backend: str, samples: Sequence[float], **more: float | int | None) -> dict[str, str]:
    timing = Timing.of(samples)
    cells = {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
    told = {name: f"{value:.6g}" for name, value in {**cells, **more}.items() if value is not None}
    return {**shared, "backend": backend, "repeats": str(timing.repeats), **told}


def _training(settings: Settings) -> tuple[list[dict[str, str]], str]:
    """The update of each contender beside one forward and backward pass of the model, in turn."""
    torch.manual_seed(_SEED)
    device = settings.device
    channels = (8, 12) if settings.quick else resolve_channels(MODEL, None, 0.013)
    model = build_model(MODEL, channels).to(device)
    criterion = RateDistortionLoss(0.013)
    main = [p for _, p in split_parameters(model)[0]]
    entered = _contenders([p.detach() for p in main], device)
    times: dict[str, list[float]] = {name: [] for name in ["model", *(c.name for c in entered)]}

    def pass_once() -> None:
        model.zero_grad()
        x = torch.rand(BATCH, 3, CROP, CROP, device=device)
        criterion(model(x), x, x.new_zeros(()))["loss"].backward()

    with collector_off():
        for repeat in range(-2, settings.repeats):
            spent = {"model": _timed(pass_once, device)}
            gradients = [p.grad for p in main]
            for contender in entered:
                contender.feed(gradients)
                spent[contender.name] = _timed(contender.update, device)
            for name, value in spent.items():
                if repeat >= 0:
                    times[name].append(value)
    inputs = parameters.label(MODEL, main)
    same = _rows.shared("stdet_training", f"update, batch {BATCH}, crop {CROP}", inputs, "fp32", device)
    passes, plain = (Timing.of(times[name]).median for name in ("model", "torch.optim.Adam"))
    rows = [_row(same, "model, forward and backward", times["model"], step_ms=passes)]
    lines = [f"stdet_training: {same['case']} | {inputs} | {same['device']}, {same['threads']} threads"]
    lines.append(f"    {'model, forward and backward':52}{passes:10.2f} ms")
    for contender in entered:
        own = Timing.of(times[contender.name]).median
        added = (own - plain) / (passes + plain)
        ours = contender.name.startswith(OURS)
        more = {"chosen": _chosen(device)} if ours else {}
        rows.append({**_row(same, contender.name, times[contender.name], step_ms=passes + own, added=added), **more})
        lines.append(f"  {'*' if ours else ' '} {contender.name:52}{own:10.2f} ms, {added:+.2%} of a step")
    return rows, "\n".join(lines)


def _ends(name: str, values: Sequence[Tensor], settings: Settings) -> tuple[list[dict[str, str]], str]:
    """Ends of epochs on a model's tensors: in the warm-up, at its end, and where weights are embedded."""
    device = settings.device
    warmup, events = (3, 3) if settings.quick else (WARMUP, EVENTS)
    params = [Parameter(v.clone()) for v in values]
    stdet = STDET(
        params, torch.optim.Adam(params, lr=1e-6), warmup_epochs=warmup, true_per_epoch=0.5 / events, samples=SAMPLES
    )
    walk = _Walk(params)
    times: dict[str, list[float]] = {"in the warm-up": [], "its end, modes found": [], "weights embedded": []}
    peaks = dict.fromkeys(times, 0)
    kinds = ["in the warm-up"] * (warmup - 1) + ["its end, modes found"] + ["weights embedded"] * events
    for epoch, kind in enumerate(kinds, 1):
        walk.advance()
        for p in params:
            p.grad = torch.full_like(p, _NOISE)
        stdet.after_backward()
        stdet.step()
        for p in params:
            p.grad = None
        if epoch in (2, warmup, warmup + 1, len(kinds)):  # on a copy: recording every allocation takes time
            twin = partial(copy.deepcopy, (params, stdet))
            peaks[kind] = max(peaks[kind], peak_allocated(twin, lambda pair: pair[1].epoch_end(), device))
        times[kind].append(_timed(stdet.epoch_end, device))
    weights = sum(p.numel() for p in params)
    inputs = parameters.label(name, params)
    same = _rows.shared("stdet_training", "end of an epoch", inputs, "fp32", device)
    lines = [f"stdet_training: {same['case']} | {inputs} | {same['device']}, {same['threads']} threads"]
    rows = []
    for kind, samples in times.items():
        peak = peaks[kind] / weights
        state = stdet.report().state_bytes / stdet.report().dense_state_bytes if kind == "weights embedded" else None
        row = _row(same, f"{OURS}STDET, {kind}", samples, peak_bytes=peak, state=state)
        rows.append({**row, "chosen": _chosen(device)})
        told = "" if state is None else f", optimizer state at last {state:.1%} of Adam's"
        lines.append(f"  * {kind:24}{Timing.of(samples).median:10.1f} ms, at most {peak:.2f} bytes a weight more{told}")
    return rows, "\n".join(lines)


def comparisons(settings: Settings) -> Iterator[tuple[list[dict[str, str]], str, int]]:
    """Training steps of one model, then the ends of epochs on the tensors of each. fp32 only; nothing is refused."""
    yield *_training(settings), 0
    for name, model in settings.models.items():
        yield *_ends(name, parameters.load(model, device=settings.device, quantiles=False), settings), 0
