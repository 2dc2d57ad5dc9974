"""lic-fast train, evaluate and diagnostics: their options, and what they print.

Imports argparse and the plain config only; torch and CompressAI come with the command that runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lic_fast.training.coding_commands import add_device, add_no_sma
from lic_fast.training.config import DEFAULT_EPOCHS, LAMBDAS, TrainConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _channels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not whole numbers, got {text!r}; pass for example 128,192") from None


def _dummy(text: str) -> tuple[float, float]:
    try:
        rate, most = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not RATE,MOST, got {text!r}; pass for example 0.02,0.25") from None
    return rate, most


def add_train_parser(subparsers: Any) -> None:
    """Add `train` to the subparsers of lic-fast."""
    parser = subparsers.add_parser(
        "train",
        argument_default=argparse.SUPPRESS,  # --resume takes what was not given from the run
        help="train an image model of CompressAI, or lic_fast's own",
        description="Train an image model; write checkpoint.pt, log.csv, config.json and loss.png.",
    )

    def option(flag: str, text: str, **kwargs: Any) -> None:
        default = _DEFAULTS[kwargs.get("dest", flag[2:].replace("-", "_"))]
        shown = not (default is None or isinstance(default, bool) or default is dataclasses.MISSING)
        parser.add_argument(flag, help=f"{text} (default: {default})" if shown else text, **kwargs)

    option("--model", "an image model, for example mbt2018-mean or msp-base; an unknown name lists them all")
    option("--output", "folder of the run", metavar="DIR", required=True)
    option(
        "--resume",
        "go on with the run in --output exactly; options left out are those of the run",
        action="store_true",
    )
    _add_data_options(option)
    _add_method_options(option)
    _add_stdet_options(option)
    _add_machine_options(option)
    parser.set_defaults(run=run_train)


def _add_data_options(option: Any) -> None:
    option(
        "--data",
        "folder of photographs, searched in depth (default: those inside scikit-image)",
        metavar="DIR",
    )
    option(
        "--val",
        "folder of photographs for the validation loss (default: every 10th of --data by name, from 10 on; "
        "256 at most)",
        metavar="DIR",
    )
    option("--steps", "stop after so many steps", type=int, metavar="N")
    option("--epochs", f"stop after so many epochs (default: {DEFAULT_EPOCHS})", type=int, metavar="N")
    option("--batch-size", "crops a step", type=int, metavar="N")
    option(
        "--crop",
        "side of a crop, a multiple of 64; smaller photographs are mirrored",
        type=int,
        metavar="PIXELS",
    )
    option(
        "--min-epoch-steps",
        "a small folder is visited again until an epoch has so many",
        type=int,
        metavar="N",
    )
    option("--seed", "of the weights, the order, the crops and the noise", type=int, metavar="N")


def _add_method_options(option: Any) -> None:
    lambdas = ", ".join(f"{value:g}" for value in LAMBDAS)
    option("--lmbda", f"weight of the distortion; the usual ones are {lambdas}; any positive number", type=float)
    option("--channels", "sizes other than the model's own", type=_channels, metavar="N[,M]")
    option("--optimizer", "adam, adam-fused or soap", metavar="NAME")
    option("--lr", "learning rate; about 3e-3 suits soap", type=float)
    option("--aux-lr", "learning rate of the quantiles (Adam on the auxiliary loss)", type=float)
    option("--clip", "largest norm of the gradient; 0 is off", type=float)
    option("--patience", "epochs without progress before the learning rate falls", type=int, metavar="EPOCHS")
    option("--lr-factor", "by which it falls", type=float)
    option("--sma", "keep a slow moving average of the weights and step from it", action="store_true")
    option("--sma-alpha", "share of the new weights in the slow ones", type=float)
    option("--sma-every", "steps between two averages", type=int, metavar="STEPS")
    option(
        "--max-nonfinite",
        "stop after so many skipped steps in a row (NaN or infinity)",
        type=int,
        metavar="N",
    )


def _add_stdet_options(option: Any) -> None:
    option(
        "--stdet", "let most weights follow a few references (STDET); writes stdet.csv, stdet.png", action="store_true"
    )
    option("--stdet-warmup", "epochs before the references are found", type=int, metavar="EPOCHS")
    option(
        "--stdet-embeddable", "share of the weights, the least sensitive, that may follow", type=float, metavar="SHARE"
    )
    option("--stdet-true", "share embedded for good at each event", type=float, metavar="SHARE")
    option(
        "--stdet-dummy", "share embedded for a while at epoch t: min(RATE * t, MOST)", type=_dummy, metavar="RATE,MOST"
    )
    option("--stdet-period", "epochs between two events", type=int, metavar="EPOCHS")
    option("--stdet-epoch-steps", "steps of an epoch of STDET (default: the data's epoch)", type=int, metavar="STEPS")
    option("--stdet-modes", "references, at most 63", type=int, metavar="N")
    option("--stdet-samples", "weights whose trajectories are clustered", type=int, metavar="N")
    for flag, text, choices in (
        ("--stdet-sensitivity", "how weights are ranked", ("taylor", "fisher", "magnitude", "random")),
        ("--stdet-dummy-mode", "what becomes of dummies between events", ("project", "freeze_epoch")),
        ("--stdet-gradient", "what becomes of the gradients of embedded weights", ("drop", "overwrite", "chain")),
        ("--stdet-origin", "from where t counts", ("global", "warmup")),
    ):
        option(flag, text, choices=choices)
    option("--stdet-continuity", "shift a weight's line so that embedding does not move it", action="store_true")


def _add_machine_options(option: Any) -> None:
    option("--device", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    option("--backend", "lic_fast backend to insist on", metavar="NAME")
    option("--amp", "bf16: transforms in bfloat16, entropy models in fp32", choices=("off", "bf16"))
    option("--channels-last", "channels-last memory format", action="store_true")
    option("--compile", "torch.compile the model", action="store_true")
    option(
        "--no-accelerate",
        "CompressAI's own layers and entropy models, to compare",
        dest="accelerate",
        action="store_false",
    )
    option("--workers", "processes that read photographs; 0 reads in this one", type=int, metavar="N")
    option("--checkpoint-every", "save also after so many steps, not only each epoch", type=int, metavar="STEPS")
    option(
        "--diagnose",
        "write diagnostics.csv and diagnostics.png: whether the gradients of rate and distortion agree (every so many "
        "steps, 10 if not said; two more backward passes), and each update with the one before; 0 is off",
        type=int,
        nargs="?",
        const=10,
        metavar="EVERY",
    )
    option("--quiet", "no progress bar", action="store_true")


def run_train(args: argparse.Namespace) -> int:
    """Train and print the summary. Raises what `lic_fast.training.train` does."""
    given = {name: value for name, value in vars(args).items() if name in _DEFAULTS}
    from lic_fast.training import loop

    if given.get("resume"):
        config = loop.resumed_config(given.pop("output"), given)
    elif "model" not in given:
        raise ValueError("train: no model, got no --model; pass one, for example --model mbt2018-mean")
    else:
        config = TrainConfig(**given)
    _print_summary(loop.train(config).summary)
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    memory, left_out = summary["peak_memory_bytes"], summary["optimizer_skipped"]
    step, update = 1e3 * summary["step_seconds"], 1e3 * summary["optimizer_seconds"]
    lines = {
        "model": summary["model"],
        "steps": f"{summary['steps']} ({summary['epochs']} full epochs), {summary['skipped']} skipped",
        "final loss": f"{summary['final_loss']:.4f} (mean of the last tenth of the steps)",
        "final rate": f"{summary['final_bpp']:.4f} bpp at {summary['final_psnr']:.2f} dB (the same)",
        "time": f"{summary['seconds']:.1f} s",
        "a step": f"{step:.1f} ms, {update:.2f} ms of it the optimizers (medians, without data loading)",
        "peak memory": "unknown" if memory is None else f"{memory / 2**20:.0f} MiB",
        **({"embedded": summary["embedding"]} if summary["embedding"] else {}),
        **({"left out": f"{left_out} updates of single parameters, by the optimizer"} if left_out else {}),
        "broken images": str(summary["broken_images"]),
        "written to": summary["output"],
    }
    print("\n".join(f"{name + ':':15}{value}" for name, value in lines.items()))


def add_evaluate_parser(subparsers: Any) -> None:
    """Add `evaluate` to the subparsers of lic-fast."""
    parser = subparsers.add_parser(
        "evaluate",
        help="rate and quality of checkpoints, from real files, beside one another and classic codecs",
        description="Code and decode every photograph; print a table, write results.csv and plot.png. Several "
        "checkpoints, or --against, are compared: points.csv and bd_rate.csv besides.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a checkpoint.pt that lic-fast train wrote, or NAME=PATH; those of one name (default: their model's) "
        "make one curve",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of photographs, searched in depth")
    parser.add_argument(
        "--output", metavar="DIR", help="default: evaluate, beside the checkpoint; of several, lic_fast_comparison"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images by name")
    parser.add_argument(
        "--against", type=_names, default=(), metavar="CODEC,...", help="of jpeg, jpeg2000, webp, avif, jxl"
    )
    parser.add_argument(
        "--qualities",
        type=_qualities,
        action="append",
        default=[],
        metavar="CODEC=Q,...",
        help="other settings of a classic codec than the usual; once a codec",
    )
    parser.add_argument(
        "--anchor", metavar="NAME", help="BD-rates are beside this curve (default: the first of --against)"
    )
    add_device(parser, "auto", ("auto", "cpu", "cuda"))
    add_no_sma(parser)
    parser.set_defaults(run=run_evaluate)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _qualities(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, values = text.partition("=")
    try:
        return name, tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not CODEC=Q,Q, got {text!r}; pass for example jpeg=20,50,80") from None


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate and print the table. Raises what `lic_fast.training.evaluate` and `compare` do."""
    from lic_fast.training.comparison import compare, comparison_table
    from lic_fast.training.evaluate import evaluate, table

    shared = {"output": args.output, "device": args.device, "sma": not args.no_sma, "limit": args.limit}
    if len(args.checkpoints) > 1 or args.against:
        options = {"against": args.against, "anchor": args.anchor, "qualities": dict(args.qualities)}
        print(comparison_table(compare(args.checkpoints, args.folder, **options, **shared)))
    elif args.anchor or args.qualities:
        raise ValueError(
            "evaluate: one checkpoint is compared with nothing, got --anchor or --qualities; add --against"
        )
    else:
        print(table(evaluate(args.checkpoints[0], args.folder, **shared)))
    return 0


def add_diagnostics_parser(subparsers: Any) -> None:
    """Add `diagnostics` to the subparsers of lic-fast."""
    parser = subparsers.add_parser(
        "diagnostics",
        help="lay the gradient conflicts of runs over one another",
        description="Draw the scores of runs trained with --diagnose in one picture, and print their means.",
    )
    parser.add_argument("folders", nargs="+", metavar="RUN", help="the --output of lic-fast train --diagnose")
    parser.add_argument("--output", required=True, metavar="PNG", help="picture to write")
    parser.set_defaults(run=run_diagnostics)


def run_diagnostics(args: argparse.Namespace) -> int:
    """Draw, and print the table. Raises TrainingError."""
    from lic_fast.training.diagnostics import compare

    print(compare(args.folders, args.output))
    return 0
