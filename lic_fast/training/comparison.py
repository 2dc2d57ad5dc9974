"""Several checkpoints and classic codecs on the same photographs: a rate-distortion table, BD-rates, a plot."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lic_fast.training.classic import ClassicCodec, usual_qualities
from lic_fast.training.data import open_photos
from lic_fast.training.errors import optional_import
from lic_fast.training.files import make_folder
from lic_fast.training.image_codec import ImageCodec
from lic_fast.training.measure import COLUMNS, MEASURED, aligned, mean_row, measure, write_csv
from lic_fast.training.plots import plot_rates

_BD_COLUMNS = ("codec", "anchor", "bd_rate_psnr", "overlap_psnr", "bd_rate_ms_ssim", "overlap_ms_ssim", "note")
_LEAST_OVERLAP = 0.5  # of both curves together; below, a BD-rate is of a small part of them, and is noted as such
_logger = logging.getLogger("lic_fast.training")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a curve: a checkpoint, or a classic codec at one quality."""

    curve: str
    name: str
    codec: Any


@dataclasses.dataclass(frozen=True)
class Comparison:
    """rows: one an image and setting; points: their means, one a setting; bd_rates: one a curve beside the anchor's."""

    rows: list[dict[str, Any]]
    points: list[dict[str, Any]]
    bd_rates: list[dict[str, Any]]
    anchor: str

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(bpp, PSNR) of the settings of codec `name`, means over the images."""
        return [(point["bpp"], point["psnr"]) for point in self.points if point["codec"] == name]

    @property
    def curves(self) -> list[str]:
        return list(dict.fromkeys(point["codec"] for point in self.points))


def bd_rate(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(Bjontegaard's mean difference of the rate of `test` from that of `anchor` in percent, overlap of the curves).

    Points are (rate, quality), two at least a curve, in any order; rates are interpolated piecewise cubically over the
    quality (pchip). The overlap is the share of the qualities of either that both have; where it is 0 there is no
    difference, NaN. Raises ValueError for fewer points and for curves on which a higher quality takes no more bits;
    ImportError without the package bjontegaard.
    """
    curves = [sorted(points, key=lambda point: point[1]) for points in (anchor, test)]
    for points in curves:
        if len(points) < 2:
            raise ValueError(
                f"bd_rate: a curve needs two points, got {len(points)}; give more checkpoints or qualities"
            )
        pairs = itertools.pairwise(points)
        if not all(a[0] < b[0] and a[1] < b[1] for a, b in pairs):
            raise ValueError(
                "bd_rate: a curve does not rise, got a higher quality at no more bits; leave such points out"
            )
    first, second = ([quality for _, quality in points] for points in curves)
    shared = max(0.0, min(first[-1], second[-1]) - max(first[0], second[0]))
    overlap = shared / (max(first[-1], second[-1]) - min(first[0], second[0]))
    if overlap == 0:
        return math.nan, 0.0
    rates = [[rate for rate, _ in points] for points in curves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small overlaps, which are told beside the figure
        package = optional_import("bjontegaard")
        value = package.bd_rate(
            rates[0], first, rates[1], second, method="pchip", require_matching_points=False, min_overlap=0
        )
    return float(value), overlap


def compare(
    checkpoints: Sequence[str | Path],
    folder: str | Path,
    *,
    against: Sequence[str] = (),
    anchor: str | None = None,
    qualities: Mapping[str, Sequence[float]] | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    sma: bool = True,
    limit: int | None = None,
) -> Comparison:
    """Code and decode every photograph under `folder` with every checkpoint, and with the classic codecs `against`.

    checkpoints: paths, or NAME=PATH. Those of one name, which is by default their model's, make one curve. against:
    names of lic_fast.training.classic.CLASSIC, each at its usual qualities, or at those of `qualities`. Points of a
    curve are means of bpp, PSNR and MS-SSIM over the images, from the bytes of real files. anchor: the curve from which
    the BD-rates are counted (default: the first classic codec, or the first checkpoint's).

    Writes results.csv (a row an image and setting), points.csv (their means), bd_rate.csv and plot.png into `output`
    (default: lic_fast_comparison). Raises TrainingError, ValueError, ImportError.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: limit is out of range, got {limit}; --limit takes at least 1")
    for name in ("matplotlib", "pytorch_msssim", "tqdm"):
        optional_import(name)
    settings = _settings(checkpoints, against, qualities or {}, device, sma)
    curves = list(dict.fromkeys(setting.curve for setting in settings))
    anchor = anchor or (against[0] if against else curves[0])
    if anchor not in curves:
        raise ValueError(f"evaluate: unknown anchor, got {anchor!r}; use one of {', '.join(curves)}")
    if len(curves) > 1:
        optional_import("bjontegaard")  # what is missing shows now, and not after an hour of coding
    photos = open_photos(str(folder), "evaluate", limit=limit, cached=False)
    if photos.warning():
        _logger.warning("evaluate: %s", photos.warning())
    target = Path("lic_fast_comparison" if output is None else output)
    make_folder(target)
    measured = _measured(settings, photos)
    rows = [row for own in measured for row in own]
    compared = Comparison(rows, [_point(own) for own in measured], [], anchor)
    compared.bd_rates.extend(_bd_row(compared, name) for name in compared.curves if name != anchor)
    write_csv(rows, target / "results.csv", ("codec", "setting", *COLUMNS))
    write_csv(compared.points, target / "points.csv", ("codec", "setting", "images", *MEASURED))
    write_csv(compared.bd_rates, target / "bd_rate.csv", _BD_COLUMNS)
    title = f"{len(photos)} photographs, means; BD-rates beside {anchor}"
    plot_rates({name: compared.curve(name) for name in curves}, target / "plot.png", title, against)
    return compared


def _settings(
    checkpoints: Sequence[str | Path],
    against: Sequence[str],
    qualities: Mapping[str, Sequence[float]],
    device: str,
    sma: bool,
) -> list[Setting]:
    """All codecs, made before anything is coded, so that what is wrong shows first."""
    unasked = [name for name in qualities if name not in against]
    if unasked:
        raise ValueError(
            f"evaluate: qualities of a codec that is not compared, got {unasked[0]!r}; add it to --against"
        )
    settings = []
    for name in dict.fromkeys(against):
        for quality in qualities.get(name) or usual_qualities(name):
            label = f"distance {quality:g}" if name == "jxl" else f"quality {quality:g}"
            settings.append(Setting(name, label, ClassicCodec(name, quality)))
    learned = []
    for given in map(str, checkpoints):
        curve, path = given.split("=", 1) if "=" in given and not Path(given).exists() else (None, given)
        codec = ImageCodec(path, device=device, slow=None if sma else False, command="evaluate")
        if (curve or codec.config.model) in against:
            raise ValueError(f"evaluate: {curve!r} is the name of a classic codec; name the checkpoint otherwise")
        learned.append(Setting(curve or codec.config.model, f"lambda {codec.config.lmbda:g}", codec))
    return [*learned, *settings]


def _measured(settings: Sequence[Setting], photos: Any) -> list[list[dict[str, Any]]]:
    """The rows of each setting; a photograph is read once."""
    rows: list[list[dict[str, Any]]] = [[] for _ in settings]
    with optional_import("tqdm").tqdm(total=len(settings) * len(photos), unit="image", disable=None) as bar:
        for index, image in enumerate(photos.names):
            pixels = photos.read(index)
            for setting, own in zip(settings, rows, strict=True):
                bar.set_postfix_str(f"{setting.curve}, {setting.name}", refresh=False)
                own.append({"codec": setting.curve, "setting": setting.name} | measure(setting.codec, image, pixels))
                bar.update()
    return rows


def _point(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of one setting."""
    mean = mean_row(rows)
    shared = {"codec": rows[0]["codec"], "setting": rows[0]["setting"], "images": len(rows)}
    return shared | {name: mean[name] for name in MEASURED}


def _bd_row(compared: Comparison, name: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_BD_COLUMNS) | {"codec": name, "anchor": compared.anchor}
    notes = []
    for metric, scale in (("psnr", lambda value: value), ("ms_ssim", _decibel)):
        curves = []
        for wanted in (compared.anchor, name):
            own = [point for point in compared.points if point["codec"] == wanted and point[metric] is not None]
            points = [(point["bpp"], scale(point[metric])) for point in own]
            curves.append([point for point in points if math.isfinite(point[1])])
        try:
            value, overlap = bd_rate(*curves)
        except ValueError as error:
            notes.append(f"{metric}: {str(error).removeprefix('bd_rate: ')}")
            continue
        row[f"overlap_{metric}"] = overlap
        row[f"bd_rate_{metric}"] = None if math.isnan(value) else value
        if overlap < _LEAST_OVERLAP:
            notes.append(f"{metric}: the curves share {overlap:.0%} of their range")
    row["note"] = "; ".join(notes)
    return row


def _decibel(ms_ssim: float) -> float:
    return -10 * math.log10(1 - ms_ssim) if ms_ssim < 1 else math.inf


def comparison_table(compared: Comparison) -> str:
    """The points and the BD-rates as aligned text."""
    formats = {name: "{:.4f}" if name.startswith("bpp") else "{:.3f}" for name in MEASURED}
    formats |= {"psnr": "{:.2f}", "ms_ssim": "{:.5f}"}
    lines = [("codec", "setting", "bpp", "bpp est.", "PSNR dB", "MS-SSIM", "enc s", "dec s")]
    for point in compared.points:
        cells = ("" if point[name] is None else formats[name].format(point[name]) for name in MEASURED)
        lines.append((point["codec"], point["setting"], *cells))
    text = aligned(lines)
    text.insert(1, "-" * max(map(len, text)))
    if compared.bd_rates:
        lines = [(f"BD-rate beside {compared.anchor}", "PSNR", "overlap", "MS-SSIM", "overlap", "")]
        for row in compared.bd_rates:
            cells = []
            for metric in ("psnr", "ms_ssim"):
                value, overlap = row[f"bd_rate_{metric}"], row[f"overlap_{metric}"]
                cells += ["" if value is None else f"{value:+.2f} %", "" if overlap is None else f"{overlap:.0%}"]
            lines.append((row["codec"], *cells, row["note"]))
        text += ["", *aligned(lines)]
    return "\n".join(text)
