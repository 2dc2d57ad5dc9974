"""lic-fast compress and decompress: their options, and what they print.

Imports argparse only; torch and CompressAI come with the command that runs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def _budget(text: str) -> dict[str, float | int]:
    """The option of `overfit` that 30s, 2min or 500it stand for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min)|(\d+) ?it", text.strip())
    number = float(found[1] or found[3]) if found else 0.0
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"not a budget, got {text!r}; pass for example 30s, 2min or 500it")
    return {"iterations": int(found[3])} if found[3] else {"seconds": number * (60 if found[2] == "min" else 1)}


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint.pt that lic-fast train wrote")


def add_device(parser: argparse.ArgumentParser, default: str, choices: tuple[str, ...], why: str = "") -> None:
    parser.add_argument(
        "--device", default=default, choices=choices, help=f"where to compute{why} (default: {default})"
    )


def add_no_sma(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-sma", action="store_true", help="the fast weights of a run with --sma, not the slow ones")


def add_compress_parser(subparsers: Any) -> None:
    """Add `compress` to the subparsers of lic-fast."""
    parser = subparsers.add_parser("compress", help="compress a photograph", description="Compress a photograph.")
    add_checkpoint(parser)
    parser.add_argument("image", metavar="IMAGE", help="any picture that PIL reads; coded as 8-bit RGB")
    parser.add_argument("out", metavar="OUT.licf", help="file to write")
    parser.add_argument("--no-verify", action="store_true", help="do not decode the result before writing it")
    parser.add_argument(
        "--lof",
        type=_budget,
        metavar="BUDGET",
        help="search for a better latent first (msp models), for so long: 30s, 2min, or 500it for so many steps; the "
        "file is an ordinary one",
    )
    parser.add_argument(
        "--lmbda", type=float, help="with --lof: weight of the distortion (default: that of the checkpoint's training)"
    )
    _add_sampling(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser, "cpu", ("auto", "cpu", "cuda"), "; a file decodes where it was made, one of msp anywhere")
    add_no_sma(parser)
    parser.set_defaults(run=run_compress)


_SAMPLING = {
    "--seed": ("seed", int, "N", "of the image to paint: another one, of the same latent, for each (default: 0)"),
    "--sampling-steps": ("steps", int, "N", "passes of the network (default: 17, eps models 200)"),
    "--gamma": ("gamma", float, "G", "deviation of the noise to begin with; 0 begins with grey (default: 0.8)"),
    "--eta": ("eta", float, "E", "share of noise in each step: 0 none, 1 as DDPM (default: 0)"),
    "--tile": ("tile", int, "PIXELS", "side of the tiles of a larger image; 0 takes it whole (default: 1024)"),
    "--overlap": ("overlap", int, "PIXELS", "that neighbouring tiles share at least (default: 128)"),
}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "How the file is to be decoded, for cdc models.")
    for flag, (name, kind, metavar, text) in _SAMPLING.items():
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, help=text)


def _told(codec: Any, data: bytes, longest: int) -> str:
    """How the container `data` is sampled, in words that end a line; nothing where its model does not sample."""
    settings = codec.sampling_of(data)
    if not settings:
        return ""
    words = [f"{settings['steps']} steps", *(f"{name} {settings[name]:g}" for name in ("seed", "gamma", "eta"))]
    if 0 < settings["tile"] < longest:
        words.append(f"tiles of {settings['tile']} that share {settings['overlap']}")
    return f"; sampled by {', '.join(words)}"


def run_compress(args: argparse.Namespace) -> int:
    """Write the container; print its bytes, rate and, once verified, PSNR. Raises TrainingError, ValueError."""
    from lic_fast.training.data import load_rgb
    from lic_fast.training.files import atomic_write
    from lic_fast.training.image_codec import ImageCodec, psnr

    if args.lmbda is not None and args.lof is None:
        raise ValueError(f"compress: --lmbda is of --lof alone, got {args.lmbda:g}; pass --lof, for example --lof 30s")
    pixels = load_rgb(Path(args.image))
    codec = ImageCodec(args.checkpoint, device=args.device, slow=False if args.no_sma else None, command="compress")
    codec.sampled_by(**{name: getattr(args, name) for name, *_ in _SAMPLING.values()})
    if not args.quiet:
        codec.show_progress()
    y = None
    if args.lof is not None:
        found = codec.overfit(pixels, lmbda=args.lmbda, progress=not args.quiet, **args.lof)
        y, change = found.y, 100 * (found.after.loss / found.before.loss - 1)
        print(f"latent: cost {found.before.loss:.4f} -> {found.after.loss:.4f} ({change:+.1f} %), {found.steps} steps")
    data, quality = codec.encode(pixels, y), "not verified"
    if not args.no_verify:
        data, decoded = codec.verified(pixels, data, y)
        quality = f"{psnr(pixels, decoded):.2f} dB"
    atomic_write(Path(args.out), data)
    height, width = pixels.shape[:2]
    bpp = 8 * len(data) / (height * width)
    told = _told(codec, data, max(height, width))
    print(f"{args.out}: {len(data)} bytes, {bpp:.4f} bpp, {quality} ({width}x{height}){told}")
    return 0


def add_decompress_parser(subparsers: Any) -> None:
    """Add `decompress` to the subparsers of lic-fast."""
    parser = subparsers.add_parser("decompress", help="decompress a .licf file", description="Decompress a .licf file.")
    add_checkpoint(parser)
    parser.add_argument("stream", metavar="IN.licf", help="file that lic-fast compress wrote")
    parser.add_argument("out", metavar="OUT.png", help="PNG to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser, "auto", ("auto", "cpu", "cuda"), ": auto is the kind of device that made the file")
    parser.set_defaults(run=run_decompress)


def run_decompress(args: argparse.Namespace) -> int:
    """Write the picture as PNG. Raises BitstreamError (a ValueError), TrainingError and OSError."""
    import io

    from lic_fast.codec import unpack
    from lic_fast.training.errors import optional_import
    from lic_fast.training.evaluate import read_stream
    from lic_fast.training.files import atomic_write
    from lic_fast.training.image_codec import ImageCodec

    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"decompress: the output is a PNG, got {args.out}; name it .png")
    data = read_stream(Path(args.stream))
    stream = unpack(data)
    device = ("cuda" if stream.cuda else "cpu") if args.device == "auto" else args.device
    codec = ImageCodec(args.checkpoint, device=device, slow=stream.slow, command="decompress")
    if not args.quiet:
        codec.show_progress()
    pixels = codec.decode(data)
    buffer = io.BytesIO()
    optional_import("PIL.Image").fromarray(pixels).save(buffer, format="PNG")
    atomic_write(Path(args.out), buffer.getvalue())
    told = _told(codec, data, max(stream.height, stream.width))
    print(f"{args.out}: {stream.width}x{stream.height} from {len(data)} bytes{told}")
    return 0
