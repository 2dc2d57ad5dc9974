"""`python -m lic_fast.benchmarks [op ...] [options]`: checks, times, prints, and appends rows."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import OPS, WHOLE, parameters
from ._contenders import DTYPES
from ._harness import Settings, run_group
from ._rows import RowsError, append, default_output, rows, table

STUDIES = ("convergence", "nqm", "acceleration", "lof", "msp", "cdc")  # with options of their own
_QUICK_REPEATS = 5
_CEILING_MIB = {"cpu": 256, "cuda": 1024}


def _parser(models: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lic_fast.benchmarks",
        description="Times lic_fast beside its peers on real models' tensors, after checking every result.",
        epilog=f"ops: {', '.join((*OPS, *WHOLE))}; or, with options of its own, `convergence`: steps to a loss, or "
        "`nqm`: the variance that averaging weights leaves, beside its closed forms, or `acceleration`: training "
        "steps and decoding with and without lic_fast.accelerate, or `lof`: what overfitting the latent gains, "
        "or `msp`: the MSP entropy model beside its peers, or `cdc`: CDC by the steps of its sampler",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="what to time (default: every op)")
    parser.add_argument("--list", action="store_true", help="list the ops and stop")
    parser.add_argument("--plot", action="store_true", help="draw the rows already written and stop")
    parser.add_argument("--models", nargs="+", choices=models, metavar="MODEL", help=", ".join(models))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--repeats", type=int, default=None, help=f"30; with --quick {_QUICK_REPEATS}; soap: steps")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch has")
    parser.add_argument("--tied", nargs="+", type=int, default=[50], help="percent, affine_reconstruct and stdet only")
    parser.add_argument("--quick", action="store_true", help=f"{models[0]}, {_QUICK_REPEATS} repeats; for CI")
    parser.add_argument("--ceiling-mib", type=int, default=None, help="size of the copy (256; on CUDA 1024)")
    parser.add_argument("--output", type=Path, default=None, help=f"folder of the rows ({default_output()})")
    return parser


def _complaint(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, in one line, or None."""
    options.ops = [op.rstrip("_") for op in options.ops]  # the name of a function in place is taken too
    unknown = [op for op in options.ops if op not in (*OPS, *WHOLE)]
    if unknown:
        return f"unknown op, got {unknown[0]!r}; use one of {', '.join((*OPS, *WHOLE))}"
    for name in ("repeats", "threads", "ceiling_mib"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {value}"
    if not all(0 <= percent <= 100 for percent in options.tied):
        return f"--tied must be percentages, got {options.tied}"
    if options.device not in (None, "cpu", "cuda"):
        return f"--device must be cpu or cuda, got {options.device!r}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is usable here, got --device cuda; use --device cpu"
    return None


def _settings(options: argparse.Namespace, models: Mapping[str, Callable[[], Sequence[Tensor]]]) -> Settings:
    names = options.models or ([next(iter(models))] if options.quick else list(models))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(
        models={name: models[name] for name in names},
        dtypes=options.dtype,
        device=torch.device(device),
        repeats=options.repeats or (_QUICK_REPEATS if options.quick else 30),
        tied=options.tied,
        quick=options.quick,
        ceiling_mib=options.ceiling_mib or _CEILING_MIB[device],
        output=options.output or default_output(),
    )


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def _comparisons(op: str, settings: Settings) -> Iterator[tuple[list[dict[str, str]], str, int]]:
    """(rows, the same as text, how many results were refused) of each interleaved run."""
    if op in WHOLE:
        yield from _module(op).comparisons(settings)
        return
    for group in _module(op).groups(settings):
        outcome = run_group(group, settings)
        yield rows(group, outcome), table(group, outcome), len(outcome.refused)
        del group, outcome


def _run(ops: Sequence[str], settings: Settings) -> int:
    refused = 0
    for op in ops:
        path = settings.output / f"{op}.csv"
        for new, text, wrong in _comparisons(op, settings):
            append(path, new)
            print(text, end="\n\n", flush=True)
            refused += wrong
        if path.is_file():
            print(f"rows: {path}")
    if refused:
        print(f"benchmarks: {refused} results are wrong and have no row; see REFUSED above", file=sys.stderr)
    return 1 if refused else 0


def _plot(ops: Sequence[str], folder: Path) -> int:
    drawn = _module("plot").draw_all(ops, folder)
    for path in drawn:
        print(f"plot: {path}")
    if not drawn:
        print(f"benchmarks: no rows to plot in {folder}; run the benchmarks first", file=sys.stderr)
    return 0 if drawn else 1


def main(argv: Sequence[str], models: Mapping[str, Callable[[], Sequence[Tensor]]] | None = None) -> int:
    """Runs the benchmarks that `argv` names; returns 0, 1 where a result was wrong or missing, 2 for misuse.

    models: name -> function that returns fp32 tensors, instead of the real ones.
    """
    if argv and argv[0] in STUDIES:
        return int(_module(argv[0]).main(argv[1:]))
    models = models or parameters.MODELS
    options = _parser(list(models)).parse_args(argv)
    complaint = _complaint(options)
    if complaint is not None:
        print(f"benchmarks: {complaint}", file=sys.stderr)
        return 2
    ops = options.ops or [*OPS, *WHOLE]
    if options.list:
        for op in ops:
            print(f"{op:20} {(_module(op).__doc__ or '').splitlines()[0]}")
        return 0
    threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.plot:
            return _plot(ops, options.output or default_output())
        settings = _settings(options, models)
        for model in settings.models.values():
            model()  # a missing package shows here, before anything is timed
        return _run(ops, settings)
    except (ImportError, RowsError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
