"""rans_coder: lic_fast's own bitstream from int32 symbols and fp32 scales to bytes and back, beside other coders.

Every contender gets the symbols and scales as tensors and gives bytes (or the symbols); what it needs in between, lists
or arrays or indexes, counts. "indexes given" leaves build_indexes out. Each is checked by decoding what it encoded.
Then GaussianConditional's compress() and decompress() in both formats: from y, scales and means to strings and back.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..coding import constant_tables, decode, encode, mixture_parameters, mixture_tables
from ..ops import rans_coder as _op
from . import _rans_cuda
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings

SYMBOLS, QUICK_SYMBOLS = 1_500_000, 1 << 11
_MIXTURE_SYMBOLS = 1 << 17  # CompressAI takes seconds for these
_SEED = 19
_SCALES = (("scales 0.11 to 64", 64.0), ("scales 0.11 to 4", 4.0), ("scales 0.11 to 1", 1.0))
_LATENTS = ((1, 320, 32, 48), (1, 192, 32, 48))
_VARIANTS = {1: "scalar", 2: "AVX2", 3: "AVX-512, loads", 4: "AVX-512, gathers"}  # 5 is for tests


@dataclass(frozen=True)
class Contender:
    name: str
    encode: Callable[[], bytes]
    decode: Callable[[bytes], Tensor]


def _inputs(count: int, widest: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    low, high = torch.tensor([0.11, widest]).log()
    scales = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
    return (torch.randn(count, generator=generator) * scales).round().int(), scales


def _in_variant(variant: int, run: Callable) -> Callable:
    def call(*arguments: object) -> object:
        before, _op.VARIANT = _op.VARIANT, variant
        try:
            return run(*arguments)
        finally:
            _op.VARIANT = before

    return call


def _ours(symbols: Tensor, scales: Tensor, settings: Settings) -> tuple[list[Contender], dict[str, str]]:
    tables = constant_tables()
    levels = torch.from_numpy(np.clip((scales.view(torch.int32).numpy() >> 19) - 1980, 0, 243).astype(np.uint8))
    usable, left_out = backends("rans_coder_encode", settings.device, torch.int32)
    if "reference" in usable and not settings.quick:
        usable.remove("reference")
        left_out[OURS + "reference"] = "plain NumPy, seconds for this many symbols; --quick times it"

    def coder(name: str, indexes: Tensor, wrap: Callable, lanes: int | str = "auto") -> Contender:
        return Contender(
            OURS + name,
            wrap(lambda: encode(symbols, indexes, tables, lanes=lanes)),
            wrap(lambda stream: decode(stream, indexes, tables)),
        )

    found = [coder(name, scales, lambda run, name=name: _forced(name, run)) for name in usable]
    if "cpp" in usable:
        found.append(coder("cpp, levels given", levels, lambda run: run))
        found.append(coder("cpp, 64 lanes", scales, lambda run: run, 64))
        mask = _native.op("cpp", "rans_coder_variants")()
        for variant, name in _VARIANTS.items():
            if mask >> variant & 1:
                found.append(coder(f"cpp, {name}", scales, lambda run, v=variant: _in_variant(v, run)))
    return found, left_out


def _forced(name: str, run: Callable) -> Callable:
    return lambda *arguments: forced(name, lambda: run(*arguments))()


def _compressai(symbols: Tensor, scales: Tensor) -> list[Contender]:
    from compressai.ans import RansDecoder, RansEncoder
    from compressai.entropy_models import GaussianConditional
    from compressai.models.base import get_scale_table

    model = GaussianConditional([float(s) for s in get_scale_table()])
    model.update()
    raw = [model.quantized_cdf, model.cdf_length, model.offset]
    built = model.build_indexes(scales)

    def pair(name: str, indexes: Callable[[], Tensor]) -> Contender:
        return Contender(
            name,
            lambda: RansEncoder().encode_with_indexes(
                symbols.tolist(), indexes().tolist(), *(table.tolist() for table in raw)
            ),
            lambda stream: torch.tensor(
                RansDecoder().decode_with_indexes(stream, indexes().tolist(), *(table.tolist() for table in raw)),
                dtype=torch.int32,
            ),
        )

    return [
        pair("compressai, indexes given", lambda: built),
        pair("compressai, build_indexes", lambda: model.build_indexes(scales)),
    ]


def _constriction(symbols: Tensor, scales: Tensor) -> Contender:
    import constriction

    model = constriction.stream.model.QuantizedGaussian(-1024, 1024)
    means = np.zeros(len(symbols), np.float32)

    def coded() -> bytes:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols.numpy(), model, means, scales.numpy())
        return coder.get_compressed().tobytes()

    def decoded(stream: bytes) -> Tensor:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream, np.uint32))
        return torch.from_numpy(coder.decode(model, means, scales.numpy()))

    return Contender("constriction", coded, decoded)


def _torchac(symbols: Tensor, scales: Tensor) -> Contender:
    import torchac

    reach = int(symbols.abs().max()) + 1
    edges = torch.arange(-reach, reach + 2) - 0.5

    def cdf() -> Tensor:
        return torch.special.ndtr(edges / scales[:, None]).clamp(0, 1)

    return Contender(
        "torchac, with its CDFs",
        lambda: torchac.encode_float_cdf(cdf(), (symbols + reach).short()),
        lambda stream: torchac.decode_float_cdf(cdf(), stream).int() - reach,
    )


def _contenders(symbols: Tensor, scales: Tensor, settings: Settings) -> tuple[list[Contender], dict[str, str]]:
    found, left_out = _ours(symbols, scales, settings)
    for name, make in (("compressai", _compressai), ("constriction", _constriction), ("torchac", _torchac)):
        if importlib.util.find_spec(name) is None:
            left_out[name] = f"not installed; run: pip install {name}"
        elif name == "torchac" and not settings.quick:
            left_out[name] = "its tables of CDFs take gigabytes for this many symbols; --quick times it"
        else:
            made = make(symbols, scales)
            found += made if isinstance(made, list) else [made]
    return found, left_out


def _conditionals(y: Tensor, scales: Tensor, means: Tensor) -> list[Contender]:
    import compressai.entropy_models as stock
    from compressai.models.base import get_scale_table

    from ..entropy import GaussianConditional

    def contender(name: str, model: Any, indexes: Callable[[], Tensor], **format: str) -> Contender:
        return Contender(
            name,
            lambda: model.compress(y, indexes(), means, **format)[0],
            lambda stream: model.decompress([stream], indexes(), means=means, **format),
        )

    table = get_scale_table().tolist()
    models = [GaussianConditional(table), stock.GaussianConditional(table)]
    for model in models:
        model.update()
    ours, theirs = models
    return [
        contender(OURS + "format lic_fast, scales", ours, lambda: scales, format="lic_fast"),
        contender(OURS + "format lic_fast, scale_indexes", ours, lambda: ours.scale_indexes(scales), format="lic_fast"),
        contender(OURS + "format compressai", ours, lambda: ours.build_indexes(scales)),
        contender("compressai", theirs, lambda: theirs.build_indexes(scales)),
    ]


def _model_groups(settings: Settings) -> Iterator[Group]:
    """A GaussianConditional's latents in both formats."""
    if importlib.util.find_spec("compressai") is None:
        return
    for shape in _LATENTS:
        shape = (1, 8, *shape[2:]) if settings.quick else shape
        residual, scales = (t.view(shape) for t in _inputs(math.prod(shape), 4.0))
        means = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED + 1))
        y = residual + means
        contenders = _conditionals(y, scales, means)
        expected = Expected([((y - means).round() + means).double()], [0.0], [torch.float32])
        streams = {one.name: one.encode() for one in contenders}
        sizes = [len(streams[one.name]) for one in (contenders[0], contenders[-1])]
        for direction in ("compress", "decompress"):
            yield Group(
                op="rans_coder",
                case=f"GaussianConditional.{direction}",
                inputs=f"{list(shape)}, {sizes[0]} bytes, in CompressAI's format {sizes[1]}",
                dtype="fp32",
                device=settings.device,
                cases=[_case(one, direction == "compress", streams[one.name], 12 * y.numel()) for one in contenders],
                expected=expected,
            )


def _case(one: Contender, encodes: bool, stream: bytes, bytes_beside: int) -> Case:
    run = one.encode if encodes else lambda: one.decode(stream)
    outputs = (lambda result: [one.decode(result).float()]) if encodes else lambda symbols: [symbols.float()]
    return Case(one.name, run, outputs, bytes_beside + len(stream), 0)


def _mixture(count: int) -> tuple[Tensor, list[Tensor]]:
    """Symbols [n] and the scales, means and weights [3, n] of the mixtures they were drawn from."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    about = torch.exp(-2.2 + 5 * torch.rand(1, count, generator=generator))
    scales = (about * torch.exp(0.5 * normal(3, count))).clamp(min=0.11)
    means = 0.7 * about * normal(3, count) + 3 * normal(1, count)
    weights = torch.softmax(normal(3, count), 0)
    chosen = (torch.rand(count, generator=generator) > weights.cumsum(0)[:-1]).sum(0, keepdim=True)
    y = means.gather(0, chosen) + scales.gather(0, chosen) * normal(1, count)
    return y[0].round().int(), [scales, means, weights]


def _mixture_contenders(settings: Settings) -> tuple[Tensor, list[Contender], dict[str, str]]:
    """From fp32 parameters to bytes and back: mixture_parameters counts, on both sides."""
    symbols, floats = _mixture(QUICK_SYMBOLS if settings.quick else _MIXTURE_SYMBOLS)
    tables, left_out = mixture_tables(), {}
    given = mixture_parameters(*floats, tables)

    def ours(name: str, wrap: Callable, parameters: Callable[[], Tensor]) -> Contender:
        return Contender(
            OURS + name,
            wrap(lambda: encode(symbols, parameters(), tables)),
            wrap(lambda stream: decode(stream, parameters(), tables)),
        )

    found = [ours("best", lambda run: run, lambda: mixture_parameters(*floats, tables))]
    found.append(ours("best, parameters given", lambda run: run, lambda: given))
    mask = _native.op("cpp", "rans_coder_variants")() if _native.why_not("cpp", "cpu") is None else 0
    for variant, name in _VARIANTS.items():
        if mask >> variant & 1:
            wrap = lambda run, v=variant: _in_variant(v, run)  # noqa: E731
            found.append(ours(f"cpp, {name}, parameters given", wrap, lambda: given))
    if importlib.util.find_spec("compressai") is None:
        left_out["compressai"] = "not installed; run: pip install compressai"
    else:
        found.append(_compressai_mixture(symbols, floats))
    return symbols, found, left_out


def _compressai_mixture(symbols: Tensor, floats: list[Tensor]) -> Contender:
    from compressai.entropy_models import GaussianMixtureConditional

    model, y = GaussianMixtureConditional(K=3), symbols.float().view(1, -1, 32, 32)

    def own() -> list[Tensor]:  # compress() bounds scales in place
        return [x.reshape(1, -1, 32, 32).clone() for x in floats]

    said: dict[bytes, tuple] = {}

    def coded() -> bytes:
        (stream, *rest), _ = model.compress(y, *own())
        said[stream] = tuple(rest)
        return stream

    def decoded(stream: bytes) -> Tensor:
        return model.decompress(stream, *said[stream], *own()).flatten().int()

    return Contender("compressai, GaussianMixtureConditional", coded, decoded)


def groups(settings: Settings) -> Iterator[Group]:
    """Encoding and decoding at three spreads of scales, of mixtures and of two latents; on a GPU, of what lies there.

    --quick takes fewer symbols.
    """
    if settings.device.type != "cpu":
        yield from _rans_cuda.groups(settings, _inputs, _mixture)
        return
    count = QUICK_SYMBOLS if settings.quick else SYMBOLS
    for name, widest in _SCALES:
        symbols, scales = _inputs(count, widest)
        yield from _both_ways(symbols, *_contenders(symbols, scales, settings), name, settings)
    yield from _both_ways(*_mixture_contenders(settings), "mixtures of 3", settings)
    yield from _model_groups(settings)


def _both_ways(
    symbols: Tensor, contenders: list[Contender], left_out: dict[str, str], name: str, settings: Settings
) -> Iterator[Group]:
    count = symbols.numel()
    expected = Expected([symbols.double()], [0.0], [torch.float32])
    streams = {one.name: one.encode() for one in contenders}
    ours = streams[contenders[0].name]
    for direction in ("encode", "decode"):
        yield Group(
            op="rans_coder",
            case=f"{direction}, {name}",
            inputs=f"{count} symbols, {8 * len(ours) / count:.4f} bits each",
            dtype="int32",
            device=settings.device,
            cases=[_case(one, direction == "encode", streams[one.name], count * 8) for one in contenders],
            expected=expected,
            left_out=left_out,
        )
