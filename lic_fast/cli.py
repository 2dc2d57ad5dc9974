"""The command line: lic-fast doctor | build | bench | train | evaluate | compress | decompress | diagnostics."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__, _build
from ._dispatch import BackendError
from .training import coding_commands, commands
from .training.errors import TrainingError

# What a user can cause; anything else is a defect of ours and keeps its traceback.
EXPECTED = (BackendError, _build.BuildError, TrainingError, ValueError, TypeError, OSError, ImportError)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    print(doctor.report())
    return 0


def _build_command(args: argparse.Namespace) -> int:
    plan, log = _build.build_in_place(args.libraries or os.environ.get("LIC_FAST_BUILD", "auto"))
    for backend, reason in plan.libraries.items():
        print(f"{_build.LIBRARIES[backend]}: {'built' if reason is None else 'left out: ' + reason}")
    print(f"log: {log}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    return int(importlib.import_module("lic_fast.benchmarks.__main__").main(args.arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lic-fast", description="Custom kernels for learned image compression: train, evaluate, measure."
    )
    parser.add_argument("--version", action="version", version=f"lic_fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor = subparsers.add_parser("doctor", help="say which backends are usable, and what mends the others")
    doctor.set_defaults(run=_doctor)
    build = subparsers.add_parser("build", help="compile the native libraries in place")
    build.add_argument(
        "--libraries",
        choices=_build.MODES,
        help="auto: what this machine can (default, or LIC_FAST_BUILD); cpp, cuda: these or an error; none",
    )
    build.set_defaults(run=_build_command)
    bench = subparsers.add_parser("bench", help="microbenchmark the ops against their peers", add_help=False)
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)
    commands.add_train_parser(subparsers)
    commands.add_evaluate_parser(subparsers)
    coding_commands.add_compress_parser(subparsers)
    coding_commands.add_decompress_parser(subparsers)
    commands.add_diagnostics_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 where the result is bad, 2 with one line where the input is."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # its options are the benchmarks' own
        args = argparse.Namespace(run=_bench, arguments=arguments[1:])
    else:
        args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("lic-fast: stopped", file=sys.stderr)
        return 130
    except EXPECTED as error:
        if os.environ.get("LIC_FAST_TRACEBACK"):
            raise
        print(f"lic-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
