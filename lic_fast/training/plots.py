"""The pictures of a run: loss.png and the evaluation's plot.png. Drawn without a display."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lic_fast.training.errors import optional_import
from lic_fast.training.files import atomic_write

_POINTS = 2000  # a longer run is drawn as the means of as many stretches
_PANELS = (
    ("loss", "loss", "#1f77b4"),
    ("bpp", "rate [bits / pixel]", "#d95f02"),
    ("psnr", "PSNR [dB]", "#2a9d5c"),
)
_SCORES = (
    ("s_intra", "S_intra: rate and distortion"),
    ("s_intra_shared", "S_intra, shared parameters"),
    ("s_inter", "S_inter: successive updates"),
)


def _figure(width: float, height: float):
    figure = optional_import("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=120)
    optional_import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _write(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _style(axis) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _smoothed(values: list[float], window: int) -> list[float]:
    """Trailing medians over `window` values: a spike of a single step does not bend them. NaN is left out."""
    medians = []
    for end in range(1, len(values) + 1):
        held = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        medians.append(statistics.median(held) if held else math.nan)
    return medians


def plot_training(rows: list[dict[str, str]], path: Path, title: str) -> None:
    """Loss, rate and PSNR over the steps, faint, and their trailing median. Raises TrainingError (disk)."""
    rows = [row for row in rows if row["skipped"] == "0"]
    stride = max(1, len(rows) // _POINTS)
    chunks = [rows[i : i + stride] for i in range(0, len(rows), stride)]
    steps = [int(chunk[-1]["step"]) for chunk in chunks]
    window = max(1, len(chunks) // 20)
    figure = _figure(7.5, 8.0)
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (name, label, colour) in zip(axes, _PANELS, strict=True):
        values = [sum(float(row[name]) for row in chunk) / len(chunk) for chunk in chunks]
        shown = [value if math.isfinite(value) else math.nan for value in values]
        if window > 1:
            axis.plot(
                steps,
                shown,
                color=colour,
                alpha=0.3,
                linewidth=0.8,
                label="step" if stride == 1 else f"mean of {stride} steps",
            )
        axis.plot(
            steps,
            _smoothed(shown, window),
            color=colour,
            linewidth=1.8,
            label=f"median of {window}" if stride == 1 else "trailing median",
        )
        axis.set_ylabel(label)
        finite = [value for value in shown if value > 0]
        if name != "psnr" and finite and max(finite) > 20 * min(finite):
            axis.set_yscale("log")
        _style(axis)
    if window > 1:
        axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    axes[0].set_title(title, fontsize=10)
    _write(figure, path)


def plot_evaluation(points: list[tuple[float, float]], mean: tuple[float, float], path: Path, title: str) -> None:
    """Rate against PSNR, a dot an image and a cross for their mean. Raises TrainingError (disk)."""
    figure = _figure(6.5, 4.8)
    axis = figure.subplots()
    axis.scatter(*zip(*points, strict=True), s=26, color="#1f77b4", alpha=0.75, label=f"image ({len(points)})")
    axis.scatter(*mean, s=110, color="#d62728", marker="X", edgecolor="white", label="mean", zorder=3)
    axis.annotate(f"{mean[0]:.3f} bpp, {mean[1]:.2f} dB", mean, xytext=(8, -14), textcoords="offset points", fontsize=9)
    axis.set_xlabel("rate [bits / pixel], bytes of the file")
    axis.set_ylabel("PSNR [dB]")
    axis.set_title(title, fontsize=10)
    axis.margins(0.12)
    axis.legend(frameon=False, loc="best")
    _style(axis)
    _write(figure, path)


def plot_rates(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    title: str,
    classic: Collection[str] = (),
    focus: Collection[str] = (),
) -> None:
    """(rate, PSNR) of each codec's settings, a line a codec, dashed for those in `classic`; the axes end a little
    beyond those in `focus`, if any. Raises TrainingError (disk).
    """
    figure = _figure(7.0, 5.0)
    axis = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        shown = sorted(point for point in points if math.isfinite(point[1]))
        if shown:
            style = {"linestyle": "--", "marker": "."} if name in classic else {"marker": "o", "markersize": 5}
            axis.plot(*zip(*shown, strict=True), label=name, color=f"C{number}", linewidth=1.6, **style)
    axis.set(xlabel="rate [bits / pixel], bytes of the files", ylabel="PSNR [dB]")
    near = [point for name in focus for point in curves.get(name, ()) if math.isfinite(point[1])]
    if len(near) > 1:
        for limits, values in zip((axis.set_xlim, axis.set_ylim), zip(*near, strict=True), strict=True):
            margin = 0.15 * (max(values) - min(values)) or 0.1
            limits(min(values) - margin, max(values) + margin)
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, loc="lower right")
    _style(axis)
    _write(figure, path)


def plot_diagnostics(runs: dict[str, list[dict[str, str]]], path: Path, title: str) -> None:
    """The scores of each run over the steps, faint, and their trailing medians. Raises TrainingError (disk)."""
    figure = _figure(7.5, 8.0)
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (name, label) in zip(axes, _SCORES, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            stride = max(1, len(points) // _POINTS)
            chunks = [points[i : i + stride] for i in range(0, len(points), stride)]
            steps = [chunk[-1][0] for chunk in chunks]
            values = [statistics.fmean(value for _, value in chunk) for chunk in chunks]
            colour = f"C{number}"
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            smooth = _smoothed(values, max(1, len(chunks) // 20))
            axis.plot(steps, smooth, color=colour, linewidth=1.8, label=run, marker="." if len(steps) == 1 else None)
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.set_ylabel(label)
        _style(axis)
    if len(runs) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("step")
    axes[0].set_title(title, fontsize=10)
    _write(figure, path)


def plot_embedding(rows: list[dict[str, str]], stdet: Any, path: Path, title: str) -> None:
    """Shares over the epochs, explained variance of the embeddable weights, and trajectories of some sampled weights
    beside k * reference + d with the coefficients of now. Raises TrainingError (disk).
    """
    figure = _figure(11.0, 7.5)
    axes = figure.subplots(2, 2)
    weights = stdet.weights
    epochs = [int(row["epoch"]) for row in rows]
    for name in ("true", "dummy"):
        axes[0, 0].plot(epochs, [100 * int(row[name]) / weights for row in rows], label=name, linewidth=1.6)
    axes[0, 0].plot(epochs, [100 * float(row["trainable_share"]) for row in rows], label="trainable", linewidth=1.6)
    axes[0, 0].set(xlabel="epoch", ylabel="share of the weights [%]")
    axes[0, 0].legend(frameon=False, fontsize=8)
    explained = stdet.report().explained
    bins = explained.shape[1]
    below = [0.0] * bins
    for mode, counts in enumerate((explained.double() / explained.sum()).tolist()):
        axes[0, 1].bar([(i + 0.5) / bins for i in range(bins)], counts, 1 / bins, bottom=below, label=f"mode {mode}")
        below = [a + b for a, b in zip(below, counts, strict=True)]
    axes[0, 1].set(xlabel="explained variance over the warm-up", ylabel="share of the embeddable weights")
    axes[0, 1].legend(frameon=False, fontsize=6, ncols=2)
    _plot_trajectories(axes[1], stdet.trajectories(), stdet.schedule.warmup_epochs)
    for axis in axes.flat:
        _style(axis)
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def _plot_trajectories(axes: Any, told: dict[str, Any], warmup: int) -> None:
    """Left: eight weights and what their references make of them. Right: how far off that is, over all sampled."""
    embeddable = (told["mode"] >= 0).nonzero().flatten().tolist()
    epochs = list(range(1, len(told["values"]) + 1))
    for number, i in enumerate(embeddable[:: max(1, len(embeddable) // 8)][:8]):
        start = told["values"][0, i]
        axes[0].plot(epochs, (told["values"][:, i] - start).tolist(), color=f"C{number}", linewidth=1.4)
        axes[0].plot(epochs, (told["rebuilt"][:, i] - start).tolist(), color=f"C{number}", linewidth=1, linestyle="--")
    axes[0].axvline(warmup, color="#555555", linewidth=0.8)
    axes[0].set(xlabel="epoch", ylabel="weight - its first value (dashed: k ref + d)")
    if not embeddable:  # a small sample of references alone
        return
    values = told["values"][:, embeddable]
    off = (told["rebuilt"][:, embeddable] - values).abs() / values.std(0).clamp(min=1e-12)
    for share, style in ((0.5, "-"), (0.9, "--")):
        axes[1].plot(epochs, off.quantile(share, 1).tolist(), style, color="#1f77b4", label=f"{share:.0%} of weights")
    axes[1].axvline(warmup, color="#555555", linewidth=0.8)
    axes[1].set(xlabel="epoch", ylabel="|rebuilt - weight| / its standard deviation", yscale="log")
    axes[1].legend(frameon=False, fontsize=8)
