"""Latent overfitting: an encoder's search for a better latent of one image, for a decoder as it is (docs/LOF.md)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .msp import MSPCodec

__all__ = ["SETTINGS", "SURROGATES", "Cost", "Overfit", "overfit"]

SURROGATES = ("soft", "ste", "sga")
SETTINGS = (("soft", 0.1), ("ste", 0.01), ("soft", 0.03), ("sga", 0.02), ("ste", 0.03))
_FIRST, _LATER = (0.35, 30), (0.08, 15)  # a descent, the first and those after it: share of the budget, least steps
_TEMPERATURES = {"soft": (0.3, 0.1), "sga": (0.5, 0.1)}  # at the beginning and the end of a descent
_FADE = 0.99
_JUDGE_EVERY = 5  # steps, where a surrogate's own cost is not the real one
_MOST_SYMBOL = 1 << 30


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a latent costs: its bits by the likelihoods, the PSNR of its picture in dB, and the rate-distortion cost."""

    bits: float
    psnr: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Overfit:
    """What `overfit` found.

    y: the latent [1, M, h, w], for `codec.compress_latent`. before, after: the costs of the analysis's latent and of y.
    history: (seconds since the start, the least cost so far), whenever it fell. legs: (surrogate, rate, by how much the
    cost fell) of each descent, in order. steps: gradient steps in all. seconds: time in all.
    """

    y: Tensor
    before: Cost
    after: Cost
    history: list[tuple[float, float]]
    legs: list[tuple[str, float, float]]
    steps: int
    seconds: float


def overfit(
    codec: MSPCodec,
    x: Tensor,
    *,
    lmbda: float,
    seconds: float | None = None,
    iterations: int | None = None,
    size: tuple[int, int] | None = None,
    settings: Sequence[tuple[str, float]] = SETTINGS,
    seed: int = 0,
    progress: bool = False,
) -> Overfit:
    """The latent of x that costs least, of those that a search met: bits a pixel + lmbda * 255**2 * MSE.

    codec: a codec with coding tables or without; it is not changed, its parameters get no gradients. x [1, 3, H, W] in
    [0, 1], fp32, on the codec's device, H and W as forward() takes them. lmbda: weight of the distortion, as in
    lic_fast.training. The budget is `seconds`, or gradient steps (`iterations`), or both: whichever ends first. size
    (height, width): how much of x, from its top left, is picture; the rest is padding, whose distortion is free.

    settings: (surrogate, rate), what the search chooses from; the first begins, and has the longest descent. The
    surrogate is what takes the place of rounding in the gradients: "soft" (soft rounding, annealed), "sga" (stochastic
    Gumbel annealing), both with Adam, or "ste" (straight-through), with momentum and one normalisation for all
    elements. rate: the learning rate, in quantisation steps. seed: of the noise of "sga". progress: a bar, by tqdm.

    Only real costs decide: those of the latent rounded as compress() rounds it, of x_hat clamped to [0, 1]. The result
    is the best latent ever met, and never costs more than the analysis's own. With `iterations` alone, the same
    machine, threads and seed give the same latent. Decoders know nothing of it: the stream is an ordinary one.

    Raises ValueError for shapes, budgets and settings, TypeError for another kind of codec, ImportError where progress
    is asked for without tqdm.
    Source: Zhang et al. (arXiv 2210.04112): overfitting of the latent, with a greedy search. Their method is not public
    to us: this search is our reconstruction. "soft" is Agustsson and Theis (NeurIPS 2020, arXiv 2006.09952), "sga" Yang
    et al. (NeurIPS 2020, arXiv 2006.04240).
    """
    began = time.monotonic()
    _check(codec, x, lmbda, seconds, iterations, size, settings)
    clock = _Clock(began, seconds, iterations)
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False), _bar(progress) as bar:
        search = _Search(codec, x.clone(), lmbda, size or x.shape[2:], clock, seed, bar)
        return search.result(search.run(settings))


class _Clock:
    """How much of a budget is spent."""

    def __init__(self, began: float, seconds: float | None, iterations: int | None) -> None:
        self._began, self._seconds, self._iterations = began, seconds, iterations
        self.steps, self._slowest, self.expected = 0, 0.0, 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def spent(self) -> float:
        """The share of the budget that is gone."""
        by_time = 0.0 if self._seconds is None else self.elapsed / self._seconds
        return max(by_time, 0.0 if self._iterations is None else self.steps / self._iterations)

    def share(self, steps: int) -> float:
        """The share of the budget that so many steps take."""
        step = self._slowest or self.expected
        by_time = 0.0 if self._seconds is None else steps * step / self._seconds
        return max(by_time, 0.0 if self._iterations is None else steps / self._iterations)

    def may_step(self, end: float) -> bool:
        """Whether another step, and judging what it leads to, would end before the share `end` is spent."""
        if self._iterations is not None and self.steps + 1 > self._iterations * end + 1e-6:
            return False
        return self._seconds is None or self.elapsed + 1.5 * self._slowest <= self._seconds * end

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step. How long it takes is known from those before; the first is taken for granted."""
        before = self.elapsed
        yield
        self.steps += 1
        self._slowest = max(self.elapsed - before, 0.9 * self._slowest)


class _Round(torch.autograd.Function):
    """The symbols of differences, with the derivative 1."""

    @staticmethod
    def forward(ctx: Any, differences: Tensor) -> Tensor:
        return differences.round().clamp_(-_MOST_SYMBOL, _MOST_SYMBOL)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Soft:
    """Soft rounding: a smooth stair, steeper as the temperature falls."""

    temperature = 1.0

    def __call__(self, differences: Tensor) -> Tensor:
        middle = differences.detach().floor() + 0.5
        slope = 1 / (2 * self.temperature)
        return middle + torch.tanh((differences - middle) * slope) / (2 * math.tanh(slope / 2))


class _Gumbel:
    """A soft choice between the two nearest symbols, with noise: sharper as the temperature falls."""

    temperature = 1.0

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, differences: Tensor) -> Tensor:
        low = differences.detach().floor()
        up = (differences - low).clamp(1e-4, 1 - 1e-4)
        # the chance of `low` is proportional to exp(-atanh(up) / t), that of low + 1 to exp(-atanh(1 - up) / t)
        logits = (torch.atanh(up) - torch.atanh(1 - up)) / self.temperature
        draws = torch.rand(logits.shape, generator=self._generator, device=logits.device, dtype=logits.dtype)
        draws.clamp_(1e-6, 1 - 1e-6)  # the difference of two Gumbel variables is a logistic one
        return low + torch.sigmoid((logits + draws.logit()) / self.temperature)


class _Search:
    """The best latent so far, and descents from it."""

    def __init__(
        self, codec: MSPCodec, x: Tensor, lmbda: float, size: Sequence[int], clock: _Clock, seed: int, bar: Any
    ) -> None:
        # A copy, so that nobody's parameters need be frozen, nor thawed when something fails.
        self.codec = copy.deepcopy(codec).eval().requires_grad_(False)
        self.synthesis = _fused(copy.deepcopy(self.codec.g_s))
        self.x, self.lmbda, self.size, self.clock, self.bar = x, lmbda, tuple(size), clock, bar
        self.generator = torch.Generator(x.device).manual_seed(seed)
        with torch.no_grad():
            self.start = self.codec._analysis(x).contiguous()
        began = clock.elapsed
        self.before = self.judge(self.start)
        clock.expected = 3 * (clock.elapsed - began)  # a step is a pass forward and back
        self.y, self.least = self.start, self.before.loss
        self.history = [(clock.elapsed, self.least)]

    def _cost(self, y: Tensor, quantize: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """(cost, bits, mse) of y; with `quantize`, of what that makes of it."""
        height, width = self.size
        y_hat, likelihoods = self.codec.entropy_model(y, False, quantize=quantize)
        bits = -likelihoods.log2().sum()
        synthesis = self.codec._synthesis if quantize is None else self.synthesis
        x_hat = synthesis(y_hat)[:, :, :height, :width].clamp(0, 1)
        mse = (x_hat - self.x[:, :, :height, :width]).square().mean()
        return bits / (height * width) + self.lmbda * 255**2 * mse, bits, mse

    @torch.no_grad()
    def judge(self, y: Tensor) -> Cost:
        """The real cost of y."""
        loss, bits, mse = (float(value) for value in self._cost(y))
        return Cost(bits, -10 * math.log10(mse) if mse > 0 else math.inf if mse == 0 else math.nan, loss)

    def offer(self, y: Tensor, loss: float) -> None:
        """Keeps y where its real cost is the least so far. NaN never is."""
        if loss < self.least or (math.isnan(self.least) and not math.isnan(loss)):
            self.y, self.least = y.detach().clone(), loss
            self.history.append((self.clock.elapsed, loss))
            self.bar.set_postfix_str(f"cost {self.before.loss:.4f} -> {loss:.4f}", refresh=False)

    def run(self, settings: Sequence[tuple[str, float]]) -> list[tuple[str, float, float]]:
        """Descents until the budget is spent, each from the best latent so far.

        Every setting has its turn, then whichever gained most for its time when it last had one. Where none gains any
        more, all begin anew at half the rates.
        """
        legs: list[tuple[str, float, float]] = []
        settings = list(dict.fromkeys((surrogate, float(rate)) for surrogate, rate in settings))
        gains: dict[tuple[str, float], float] = {}
        while self.clock.may_step(1.0):
            untried = [setting for setting in settings if setting not in gains]
            setting = untried[0] if untried else max(settings, key=lambda each: gains[each])
            share, least = _LATER if legs else _FIRST
            spent, steps = self.clock.spent, self.clock.steps
            gain = self.leg(*setting, max(share, self.clock.share(least)))
            if self.clock.steps == steps:
                break
            legs.append((*setting, gain))
            gains[setting] = gain / max(self.clock.spent - spent, 1e-9)
            if len(gains) == len(settings) and not max(gains.values()) > 0:
                settings, gains = [(surrogate, rate / 2) for surrogate, rate in settings], {}
        return legs

    def result(self, legs: list[tuple[str, float, float]]) -> Overfit:
        """The best latent, judged once more on its own."""
        after = self.judge(self.y)
        if not after.loss < self.before.loss:
            self.y, after = self.start, self.before
        return Overfit(self.y, self.before, after, self.history, legs, self.clock.steps, self.clock.elapsed)

    def leg(self, surrogate: str, rate: float, share: float) -> float:
        """A descent from the best latent, its rate falling to 0 over a share of the budget. Returns what it gained."""
        clock, least, first, count = self.clock, self.least, self.clock.spent, self.clock.steps
        end = min(1.0, first + share)
        if surrogate == "ste":  # from the symbols themselves: an element then changes by the sum of its gradients alone
            y, quantize = self._rounded(self.y), _Round.apply
            optimizer = torch.optim.SGD([y], lr=rate, momentum=0.9, dampening=0.9)
        else:
            y, quantize = self.y.clone(), _Soft() if surrogate == "soft" else _Gumbel(self.generator)
            optimizer = torch.optim.Adam([y], lr=rate)
        # straight-through rounds to what is coded, by the networks that code: its cost is the real one
        real = surrogate == "ste" and not self.codec.entropy_model.exact
        warm, cold = _TEMPERATURES.get(surrogate, (1.0, 1.0))
        power = 0.0
        while clock.may_step(end):
            with clock.step():
                done = min(1.0, (clock.spent - first) / max(end - first, 1e-12))
                optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
                if surrogate != "ste":
                    quantize.temperature = warm * (cold / warm) ** done
                if not real and (clock.steps - count) % _JUDGE_EVERY == _JUDGE_EVERY - 1:
                    self.offer(y, self.judge(y).loss)
                loss, gradient = self._descent(y, quantize)
                if real:
                    self.offer(y, loss)
                y.grad = gradient.nan_to_num_(0, 0, 0)
                if surrogate == "ste":
                    power = max(_FADE * power, float(gradient.square().mean()))
                    y.grad /= power**0.5 or 1.0
                optimizer.step()
            self.bar.update(100 * clock.spent - self.bar.n)
            if not math.isfinite(loss):
                break
        if clock.steps > count:
            self.offer(y, self.judge(y).loss)
        return least - self.least if math.isfinite(least) else 0.0

    @torch.no_grad()
    def _rounded(self, y: Tensor) -> Tensor:
        return self.codec.entropy_model(y, False)[0].clone()

    @torch.enable_grad()
    def _descent(self, y: Tensor, quantize: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """(cost of y as quantize has it, its gradient)."""
        y = y.detach().requires_grad_()
        loss, _, _ = self._cost(y, quantize)
        (gradient,) = torch.autograd.grad(loss, [y])
        return float(loss.detach()), gradient


def _fused(synthesis: nn.Module) -> nn.Module:
    """`synthesis` with lic_fast's GDN in it: the same but for rounding, and gradients in a pass. Not for real costs."""
    from ..entropy import GDN  # which imports compressai

    for module in synthesis.modules():
        if type(module) is GDN.__base__:
            module.__class__ = GDN
    return synthesis


class _NoBar:
    n = 0.0

    def update(self, amount: float) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Any]:
    if not progress:
        yield _NoBar()
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        raise ImportError(
            'overfit: tqdm is not installed, and a progress bar needs it; run: pip install "lic_fast[train]"'
        ) from None
    with tqdm(total=100.0, desc="overfit", bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar:
        yield bar


def _check(
    codec: object, x: object, lmbda: float, seconds: float | None, iterations: int | None,
    size: tuple[int, int] | None, settings: Sequence[tuple[str, float]],
) -> None:  # fmt: skip
    def positive(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value) and value > 0

    if not isinstance(codec, MSPCodec):
        raise TypeError(f"overfit: codec must be an MSPCodec, got {type(codec).__name__}")
    if not isinstance(x, Tensor) or x.dtype is not torch.float32:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"overfit: x must be a float32 tensor, got {kind}; convert it")
    here = next(codec.parameters()).device
    if x.device != here:
        raise TypeError(f"overfit: x must be on the codec's device, {here}, got {x.device}; move it")
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(f"overfit: x must be one image, [1, 3, H, W], got {list(x.shape)}; pass them one by one")
    codec._checked("overfit", x)
    if not bool(x.isfinite().all()):
        raise ValueError("overfit: x must be finite, got NaN or Inf; look for where they came from")
    if not positive(lmbda):
        raise ValueError(
            f"overfit: lmbda must be positive, got {lmbda!r}; pass the one that the codec was trained with"
        )
    if seconds is None and iterations is None:
        raise ValueError("overfit: no budget, got neither seconds nor iterations; pass one, for example seconds=30")
    if seconds is not None and not positive(seconds):
        raise ValueError(f"overfit: seconds must be positive, got {seconds!r}")
    if iterations is not None and (not isinstance(iterations, int) or iterations < 1):
        raise ValueError(f"overfit: iterations must be a whole number, 1 at least, got {iterations!r}")
    if size is not None and not (len(size) == 2 and all(0 < a <= b for a, b in zip(size, x.shape[2:], strict=True))):
        raise ValueError(f"overfit: size must be (height, width) within {tuple(x.shape[2:])}, got {size!r}")
    pairs = bool(settings) and all(isinstance(each, (tuple, list)) and len(each) == 2 for each in settings)
    if not pairs or any(name not in SURROGATES or not positive(rate) for name, rate in settings):
        raise ValueError(
            f"overfit: settings must be (surrogate, positive rate), of {', '.join(SURROGATES)}, got {settings!r}"
        )
