"""Bar plots of the rows: achieved GB/s of every contender, the ceiling as a line, one picture an op."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ._harness import CEILING, OURS
from ._rows import read

_OURS_COLOUR = "#1f6fb2"
_PEER_COLOUR = "#b8bec6"
_LINE_COLOUR = "#c2452d"
_BAR_INCHES = 0.3
_PANEL_KEY = ("case", "inputs", "dtype", "device", "threads")


def _matplotlib(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            'benchmarks: --plot needs matplotlib, which is not installed; run: pip install "lic_fast[bench]"'
        ) from None


def panels(rows: Sequence[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Rows grouped by interleaved run, fastest first: the latest where a comparison was run again."""
    runs: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        key = tuple(row[name] for name in _PANEL_KEY)
        runs.setdefault(key, {}).setdefault(row["utc"], []).append(row)
    latest = [by_time[max(by_time)] for by_time in runs.values()]
    return [sorted(run, key=lambda row: float(row["median_ms"])) for run in latest]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _panel(axes: Any, run: Sequence[dict[str, str]]) -> None:
    ceiling = float(run[0]["ceiling_gbps"])
    bars = [row for row in run if row["backend"] != CEILING]
    rates = [float(row["gbps"]) for row in bars]
    ours = [row["backend"].startswith(OURS) for row in bars]
    places = range(len(bars))
    axes.barh(places, rates, height=0.7, color=[_OURS_COLOUR if mine else _PEER_COLOUR for mine in ours])
    axes.set_yticks(places, [row["backend"] for row in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max([ceiling, *rates]))
    for place, row, rate in zip(places, bars, rates, strict=True):
        text = f"{rate:.3g} GB/s, {_short(float(row['median_ms']))} ms"
        label = axes.annotate(text, (rate, place), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.axvline(ceiling, color=_LINE_COLOUR, linewidth=1.2, linestyle="--", zorder=0)
    axes.text(
        ceiling,
        1.0,
        f"copy {ceiling:.3g}",
        color=_LINE_COLOUR,
        fontsize=7.5,
        ha="center",
        va="bottom",
        transform=axes.get_xaxis_transform(),
    )
    first = run[0]
    axes.set_title(f"{first['case']}, {first['dtype']}", loc="left", fontsize=9, fontweight="bold", pad=24)
    axes.annotate(
        f"{first['inputs']}; {first['device']}, {first['threads']} threads",
        (0, 1),
        (0, 13),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7.5,
        color="#555555",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


def draw(op: str, rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draws the rows of `op` into the PNG `path`. Raises ImportError where matplotlib is missing."""
    figure_class = _matplotlib("figure").Figure
    runs = panels(rows)
    heights = [_BAR_INCHES * len(run) + 0.75 for run in runs]
    figure = figure_class(figsize=(7.5, sum(heights) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, run in zip(all_axes, runs, strict=True):
        _panel(axes, run)
    all_axes[-1].set_xlabel("GB/s, each input read once and each output written once", fontsize=8)
    figure.suptitle(op, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=140, facecolor="white")


def draw_all(ops: Sequence[str], folder: Path) -> list[Path]:
    """Draws <op>.png beside every <op>.csv in `folder`; returns the pictures' paths."""
    drawn = []
    for op in ops:
        rows = read(folder / f"{op}.csv") if (folder / f"{op}.csv").is_file() else []
        if rows:
            drawn.append(folder / f"{op}.png")
            draw(op, rows, drawn[-1])
    return drawn
