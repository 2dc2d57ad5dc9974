"""ans_coder: CompressAI's bitstreams between tensors and bytes, beside its own coder, whose lists count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..coding.compressai_format import Tables, decode, encode
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings

SYMBOLS, QUICK_SYMBOLS = 1 << 20, 1 << 11
_SEED = 19
_SCALES = (("scales 0.11 to 4", 4.0), ("scales 0.11 to 64", 64.0))


def _inputs(count: int, widest: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    from compressai.entropy_models import GaussianConditional
    from compressai.models.base import get_scale_table

    model = GaussianConditional([float(s) for s in get_scale_table()])
    model.update()
    generator = torch.Generator().manual_seed(_SEED)
    low, high = torch.tensor([0.11, widest]).log()
    scales = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
    symbols = (torch.randn(count, generator=generator) * scales).round().int()
    return symbols, model.build_indexes(scales).int(), [model.quantized_cdf, model.cdf_length, model.offset]


def _bytes(stream: bytes) -> list[Tensor]:
    return [torch.frombuffer(bytearray(stream), dtype=torch.uint8).float()]


def _group(direction: str, name: str, count: int, widest: float, settings: Settings) -> Group:
    from compressai.ans import RansDecoder, RansEncoder

    symbols, indexes, raw = _inputs(count, widest)
    tables = Tables(*raw)

    def lists() -> list[list]:
        return [t.tolist() for t in (indexes, *raw)]

    stream = RansEncoder().encode_with_indexes(symbols.tolist(), *lists())
    moved = count * 8 + len(stream)
    if direction == "encode":
        ours: Callable[[], object] = lambda: encode(symbols, indexes, tables)  # noqa: E731
        theirs: Callable[[], object] = lambda: RansEncoder().encode_with_indexes(symbols.tolist(), *lists())  # noqa: E731
        outputs, expected = _bytes, _bytes(stream)[0]
    else:
        ours = lambda: decode(stream, indexes, tables)  # noqa: E731
        theirs = lambda: torch.tensor(RansDecoder().decode_with_indexes(stream, *lists()), dtype=torch.int32)  # noqa: E731
        outputs, expected = (lambda decoded: [decoded.float()]), symbols.float()
    usable, left_out = backends("ans_coder_encode", settings.device, torch.int32)
    if "reference" in usable and not settings.quick:
        usable.remove("reference")
        left_out[OURS + "reference"] = "plain Python, seconds for this many symbols; --quick times it"
    cases = [Case(OURS + b, forced(b, ours), outputs, moved, 0) for b in usable]
    peer = Case("compressai.ans, with its lists", theirs, outputs, moved, 0)
    return Group(
        op="ans_coder",
        case=f"{direction}, {name}",
        inputs=f"{count} symbols, {8 * len(stream) / count:.3f} bits each",
        dtype="int32",
        device=settings.device,
        cases=[*cases, peer],
        expected=Expected([expected.double()], [0.0], [torch.float32]),
        left_out=left_out,
    )


def groups(settings: Settings) -> Iterator[Group]:
    """Encoding and decoding at two spreads of scales, on the CPU only; --quick takes fewer symbols."""
    if settings.device.type != "cpu":
        return
    count = QUICK_SYMBOLS if settings.quick else SYMBOLS
    for name, widest in _SCALES:
        for direction in ("encode", "decode"):
            yield _group(direction, name, count, widest, settings)
