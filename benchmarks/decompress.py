"""decompress: a photograph through whole autoregressive models of CompressAI, stock and accelerated, same weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import explain
from . import _rows
from ._harness import OURS, Settings, Timing, collector_off

MODELS = ("mbt2018", "cheng2020_anchor")
QUALITY, REPEATS = 3, 3
_SEED = 29
_OPS = ("ans_coder_encode", "ans_coder_decode_", "context_conv")
_STOCK, _FAST = "compressai", OURS + "accelerated"


def _picture(quick: bool) -> tuple[str, Tensor]:
    """The picture that LIC_FAST_PICTURE names, cut to whole blocks of 64 pixels; else a smooth one, 512 x 768."""
    path = os.environ.get("LIC_FAST_PICTURE")
    if path:
        import numpy as np
        from PIL import Image

        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        height, width = (side // 64 * 64 for side in pixels.shape[2:])
        return f"{Path(path).name}, {height} x {width}", pixels[:, :, :height, :width].contiguous()
    height, width = (64, 128) if quick else (512, 768)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(_SEED))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp_(0, 1)
    return f"smooth noise, {height} x {width}", smooth


def _model(name: str) -> torch.nn.Module:
    """Untrained, but with latents and scales of several units: what is coded is not all zeros."""
    from compressai import zoo

    torch.manual_seed(_SEED)
    model = getattr(zoo, name)(quality=QUALITY, pretrained=False).eval()
    with torch.no_grad():
        [m for m in model.g_a.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight.mul_(20)
        model.entropy_parameters[-1].bias[: model.M] += 2
    model.update()
    return model


def _timed(run: Callable[[], dict]) -> tuple[float, dict]:
    began = time.perf_counter()
    result = run()
    return (time.perf_counter() - began) * 1e3, result


@torch.no_grad()
def _compare(name: str, settings: Settings) -> tuple[list[dict[str, str]], str, int]:
    from ..entropy.autoregressive import accelerated

    model, (described, x) = _model(name), _picture(settings.quick)
    kinds = {_STOCK: type(model), _FAST: accelerated(type(model))}
    spent: dict[tuple[str, str], list[float]] = {(way, k): [] for way in ("compress", "decompress") for k in kinds}
    results = {}
    with collector_off():
        for repeat in range(-1, min(settings.repeats, REPEATS)):
            for contender, kind in kinds.items():
                model.__class__ = kind
                taken, out = _timed(lambda: model.compress(x))
                back, pixels = _timed(lambda out=out: model.decompress(out["strings"], out["shape"]))
                results[contender] = (out["strings"], pixels["x_hat"])
                if repeat >= 0:
                    spent["compress", contender].append(taken)
                    spent["decompress", contender].append(back)
    wrong = results[_STOCK][0] != results[_FAST][0] or not torch.equal(results[_STOCK][1], results[_FAST][1])
    inputs = f"{name}, quality {QUALITY}, untrained; {described}; {len(results[_STOCK][0][0][0])} bytes of y"
    rows, lines = [], [f"decompress: {inputs}"]
    chosen = ", ".join(
        f"{op}: {explain(op, 'cpu', torch.int32 if 'ans' in op else torch.float32).chosen}" for op in _OPS
    )
    for way in ("compress", "decompress"):
        shared = _rows.shared("decompress", way, inputs, "fp32", settings.device)
        stock = Timing.of(spent[way, _STOCK]).median
        for contender in kinds:
            if wrong and contender == _FAST:
                lines.append(f"  * {contender}: REFUSED, its bytes or pixels are not those of the stock class")
                continue
            timing = Timing.of(spent[way, contender])
            cells = {"median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80}
            rows.append(
                {**shared, "backend": contender, "repeats": str(timing.repeats)}
                | {key: f"{value:.6g}" for key, value in cells.items()}
                | ({"chosen": chosen} if contender == _FAST else {})
            )
            mark = "*" if contender == _FAST else " "
            lines.append(f"  {mark} {way:12}{contender:24}{timing.median:10.1f} ms, {stock / timing.median:.2f} x")
    return rows, "\n".join(lines), int(wrong)


def comparisons(settings: Settings) -> Iterator[tuple[list[dict[str, str]], str, int]]:
    """compress and decompress, stock and accelerated in turn, on the CPU only; at most three repetitions."""
    if settings.device.type == "cpu":
        for name in MODELS[:1] if settings.quick else MODELS:
            yield _compare(name, settings)
