"""MSP beside its peers: rate and distortion at an equal budget of training, and seconds of decoding.

`lic-fast bench msp --data TRAIN --test KODAK`. One analysis and one synthesis (those of mbt2018) are trained with four
probability models of the latent - MSP's base profile, a mean-scale hyperprior, a checkerboard context, mbt2018's
autoregressive one - with the same loop, steps, batches and schedule: at the first lambda, and from there at every
lambda at a lower learning rate. Then all of them code the photographs under --test to real files
(BD-rates beside mbt2018), and one image is decoded by each in one interleaved run: the whole of it, and from bytes to
y_hat alone. Last, the entropy part of MSP at several sizes of one photograph. Times are the CPU's; with --device cuda
the GPU's, until it has the pixels: of MSP with a CUDA graph, without, and with 256 chains, at 2K too. Checkpoints are
kept in --runs: what is trained already is not trained again, and a stopped run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..training import TrainingError
from ..training.data import open_photos
from ..training.models import build_model, resolve_device
from ..training.plots import plot_rates
from ._rows import RowsError, append, commit, default_output, device_name, now

PHASES = ("train", "rates", "decode", "scaling")
COLUMNS = ("kind", "model", "backend", "channels", "weights", "lmbda", "steps", "batch_size", "crop", "optimizer")
COLUMNS += (
    "lr",
    "tune_steps",
    "tune_crop",
    "tune_lr",
    "seed",
    "photographs",
    "parameters",
    "entropy_parameters",
    "decode_steps",
    "images",
    "bpp",
)
COLUMNS += ("psnr", "ms_ssim", "bd_rate", "overlap", "height", "width", "bytes", "median_ms", "p20_ms", "p80_ms")
COLUMNS += ("us_a_place", "repeats", "device", "threads", "torch", "lic_fast", "commit", "utc")
ZOO_SIZE = (128, 192)
DECODED = (512, 768)
LARGE = (1080, 1920)  # what a GPU decodes too
SIDES = ((512, 768), (1080, 1920), (2160, 3840))


class Study:
    """The options, the trained checkpoints, and the rows that come of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from . import _msp_decoding, _msp_peers, _msp_training

        self.decoding, self.peers, self.training = _msp_decoding, _msp_peers, _msp_training
        self.options = options
        self.path = options.output / "msp.csv"
        self.peers.register()
        self.device = resolve_device(options.device, "msp")
        self.timed_on = self.device if options.device == "cuda" else torch.device("cpu")

    def checkpoints(self, train: bool) -> dict[tuple[str, float], Path]:
        """The checkpoint of every model and lambda, trained where there is none. Raises TrainingError where not."""
        found = {}
        for lmbda in self.options.lambdas:
            for model in self.peers.NAMES:
                run = self.training.run_of(model, lmbda, self.options)
                done = run.finished()
                if train:
                    run.train()
                    print(f"{model}, lambda {lmbda:g}: {'found' if done else 'trained'}, {run.path}", flush=True)
                elif not done:
                    raise TrainingError(f"msp: {run.config.output} is not trained to its end; run --only train first")
                found[model, lmbda] = run.path
        return found

    def _row(self, kind: str, model: str, device: torch.device, **cells: object) -> dict[str, str]:
        shared = {
            "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "lic_fast": __version__, "commit": commit(), "utc": now(),
        }  # fmt: skip
        row = {"kind": kind, "model": model, **cells, **shared}
        return {
            name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
            for name, value in row.items()
        }

    def _budget(self) -> dict[str, object]:
        options = self.options
        photographs = len(open_photos(options.data, "msp", cached=False)) if options.data else "scikit-image"
        return {
            "channels": " ".join(map(str, options.channels)), "weights": "trained", "steps": options.steps,
            "batch_size": options.batch_size, "crop": options.crop, "optimizer": options.optimizer, "lr": options.lr,
            "tune_steps": options.tune_steps, "tune_crop": options.tune_crop, "tune_lr": options.tune_lr,
            "seed": options.seed, "photographs": photographs,
        }  # fmt: skip

    def rates(self) -> str:
        """A row a model and lambda; all of them and some classic codecs on the same photographs."""
        from ..training.comparison import compare, comparison_table

        options, found = self.options, self.checkpoints(train=False)
        anchor = self.peers.AUTOREGRESSIVE
        compared = compare(
            [f"{model}={path}" for (model, _), path in found.items()], options.test, against=options.against,
            anchor=anchor, output=options.runs / "comparison", device=options.device, limit=options.images,
        )  # fmt: skip
        differences = {row["codec"]: row for row in compared.bd_rates}
        sizes = {name: self.peers.sized(build_model(name, tuple(options.channels))) for name in self.peers.NAMES}
        rows, shared = [], self._budget()
        for point in compared.points:
            name, difference = point["codec"], differences.get(point["codec"], {})
            cells: dict[str, Any] = {key: point[key] for key in ("images", "bpp", "psnr", "ms_ssim")}
            cells |= {"bd_rate": difference.get("bd_rate_psnr"), "overlap": difference.get("overlap_psnr")}
            if name in sizes:
                cells |= shared | {"lmbda": point["setting"].removeprefix("lambda ")}
                cells |= dict(zip(("parameters", "entropy_parameters"), sizes[name], strict=True))
                cells["decode_steps"] = self.peers.decode_steps(name, *DECODED)
            else:
                cells["weights"] = point["setting"]
            rows.append(self._row("rate", name, self.device, **cells))
        append(self.path, rows, COLUMNS)
        learned = {name: compared.curve(name) for name in (*self.peers.NAMES, *options.against)}
        budget = f"{options.steps} + {options.tune_steps} steps of training a model"
        title = f"{compared.points[0]['images']} photographs, means; {budget}"
        plot_rates(learned, options.output / "msp_rd.png", title, options.against, self.peers.NAMES)
        return comparison_table(compared)

    def decode(self) -> str:
        """Rows of decoding one image: trained models of the study's sizes, and untrained ones of the zoo's."""
        options, found = self.options, self.checkpoints(train=False)
        middle = sorted(options.lambdas)[len(options.lambdas) // 2]
        sets = {
            ("trained", tuple(options.channels)): lambda: self.decoding.trained_contenders(
                {name: found[name, middle] for name in self.peers.NAMES}, self.timed_on
            ),
            ("untrained", ZOO_SIZE): lambda: self.decoding.untrained_contenders(ZOO_SIZE, self.timed_on),
        }
        lines = []
        for (weights, channels), make in list(sets.items())[: 1 if options.quick else 2]:
            contenders = make()
            budget = self._budget() | {"lmbda": middle} if weights == "trained" else {"weights": weights}
            budget |= {"channels": " ".join(map(str, channels))}
            for sides in (options.sides, LARGE) if self.timed_on.type == "cuda" else (options.sides,):
                of_size = [  # pixel by pixel, a large image takes minutes
                    each for each in contenders if sides == options.sides or each.model != self.peers.AUTOREGRESSIVE
                ]
                x = self.decoding.picture(_first(options.test), *sides).to(self.timed_on)
                lines.append(f"decoding {x.shape[2]} x {x.shape[3]}, channels {channels}, {weights}")
                lines += self._decoded(of_size, x, budget)
        return "\n".join(lines)

    def _decoded(self, contenders: Sequence[Any], x: torch.Tensor, budget: dict[str, object]) -> list[str]:
        measured, rows = self.decoding.decode_times(contenders, x, self.options.repeats), []
        for contender, part, timing, size in measured:
            cells = {
                **budget, "backend": contender.backend, "height": x.shape[2], "width": x.shape[3], "bytes": size,
                "decode_steps": self.peers.decode_steps(contender.model, *x.shape[2:]), **_cells(timing),
            }  # fmt: skip
            rows.append(self._row(part, contender.model, self.timed_on, **cells))
        append(self.path, rows, COLUMNS)
        return self._ratios(measured)

    def _ratios(self, measured: Sequence[Any]) -> list[str]:
        ours = {m.part: m.timing.median for m in measured if m.contender.backend == self.decoding.OWN}
        lines = []
        for part, timing, contender, size in sorted(
            ((m.part, m.timing, m.contender, m.size) for m in measured), key=lambda each: (each[0], each[1].median)
        ):
            times = timing.median / ours[part]
            lines.append(
                f"  {part:8}{contender.model:22}{contender.backend:22}{timing.median:10.1f} ms "
                f"({timing.p20:.1f} to {timing.p80:.1f}), {times:7.1f} times MSP's, {size} bytes"
            )
        return lines

    def scaling(self) -> str:
        """Rows of MSP's entropy part by the size of the image."""
        options, found = self.options, self.checkpoints(train=False)
        middle = sorted(options.lambdas)[len(options.lambdas) // 2]
        contender, *_ = self.decoding.trained_contenders({self.peers.MSP: found[self.peers.MSP, middle]}, self.timed_on)
        sides = SIDES[:1] if options.quick else SIDES
        times = self.decoding.scaling_times(
            contender.module, options.large or _first(options.test), sides, options.repeats
        )
        rows, lines, budget = [], [], self._budget()
        for (height, width), (timing, size) in times.items():
            places = self.decoding.latent_pixels(height, width)
            steps, each = self.peers.decode_steps(self.peers.MSP, height, width), 1e3 * timing.median / places
            cells = {
                **budget, "lmbda": middle, "backend": contender.backend, "decode_steps": steps, "height": height,
                "width": width, "bytes": size, "us_a_place": each, **_cells(timing),
            }  # fmt: skip
            rows.append(self._row("scaling", self.peers.MSP, self.timed_on, **cells))
            lines.append(
                f"  {height} x {width}: {steps} steps, {timing.median:.1f} ms, {each:.2f} us a place of the latent"
            )
        append(self.path, rows, COLUMNS)
        return "\n".join(["entropy part of MSP, from bytes to y_hat", *lines])


def _cells(timing: Any) -> dict[str, object]:
    return {
        "median_ms": timing.median, "p20_ms": timing.p20, "p80_ms": timing.p80, "repeats": timing.repeats,
    }  # fmt: skip


def _first(folder: str) -> Path:
    return Path(open_photos(folder, "msp", limit=1, cached=False).paths[0])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lic-fast bench msp", description="MSP beside its peers.")
    parser.add_argument("--data", metavar="DIR", help="photographs to train on (default: those inside scikit-image)")
    parser.add_argument("--test", required=True, metavar="DIR", help="photographs to code, Kodak for example")
    parser.add_argument("--images", type=int, default=None, metavar="N", help="only the first N of --test")
    parser.add_argument("--large", type=Path, default=None, metavar="FILE", help="a photograph of UHD for the sizes")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--against", nargs="*", default=["jpeg", "webp", "avif"], metavar="CODEC")
    parser.add_argument("--lambdas", nargs="+", type=float, default=[0.013, 0.0035, 0.0483], help="in this order")
    parser.add_argument("--channels", nargs=2, type=int, default=[48, 64], metavar=("N", "M"))
    parser.add_argument("--steps", type=int, default=2400, metavar="N")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N")
    parser.add_argument("--crop", type=int, default=256, metavar="PIXELS")
    parser.add_argument("--tune-steps", type=int, default=500, metavar="N", help="at every lambda, after --steps")
    parser.add_argument("--tune-crop", type=int, default=256, metavar="PIXELS")
    parser.add_argument("--tune-lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="soap", metavar="NAME")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of a timing")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch has")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="decoding is timed on the CPU, but for cuda"
    )
    parser.add_argument("--quick", action="store_true", help="a small image, and the trained models only; for CI")
    parser.add_argument("--runs", type=Path, default=Path("lic_fast_msp"), help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    options = parser.parse_args(argv)
    if min(options.repeats, options.steps, options.tune_steps) < 1:
        parser.error("--repeats, --steps and --tune-steps must be at least 1")
    options.output = options.output or default_output()
    options.sides = (64, 128) if options.quick else DECODED
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, codes, times; appends to msp.csv, draws msp_rd.png; returns the exit code."""
    options = _options(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        study = Study(options)
        if "train" in options.only:
            study.checkpoints(train=True)
        for phase in PHASES[1:]:
            if phase in options.only:
                print(getattr(study, phase)(), end="\n\n", flush=True)
    except (TrainingError, ValueError, ImportError, RowsError, OSError) as error:
        print(f"msp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"rows: {study.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
