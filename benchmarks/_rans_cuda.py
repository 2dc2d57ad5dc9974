"""rans_coder on a GPU: what lies there is coded there, by tables and by mixtures, beside the way over the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..coding import (
    MixtureTables,
    Tables,
    constant_tables,
    decode_batch,
    encode_batch,
    mixture_parameters,
    mixture_tables,
)
from ..functional import rans_decode_, rans_encode, rans_open
from ._contenders import backends, forced
from ._harness import OURS, Case, Expected, Group, Settings

# Name, samples, symbols of each, lanes: of a Kodak image's latent (320 channels of 24 x 38 and some), and many of them.
_CASES = (
    ("a latent", 1, 295_000, 512),
    ("a latent, 2048 lanes", 1, 295_000, 2048),
    ("64 latents", 64, 295_000, 512),
    ("64 latents, 2048 lanes", 64, 295_000, 2048),
)
_QUICK = (("a few", 3, 2000, 64),)

Inputs = Callable[[int, float], tuple[Tensor, Tensor]]  # symbols [n] and scales [n] up to a widest
MixtureInputs = Callable[[int], tuple[Tensor, list[Tensor]]]  # symbols [n] and scales, means, weights [3, n]


@dataclass(frozen=True)
class _Batch:
    """Symbols int32 [B, N] on the device, and what tells how they are coded there."""

    symbols: Tensor
    elements: Tensor  # scales [B, N], or a mixture's integers [B, 2 + 2 K, N]
    tables: Tables | MixtureTables
    lanes: int

    def streams(self) -> list[bytes]:
        return encode_batch(self.symbols, self.elements, self.tables, lanes=self.lanes)

    def moved(self, streams: list[bytes]) -> int:
        """Bytes that coding reads and writes at the least."""
        return 4 * (self.symbols.numel() + self.elements.numel()) + sum(map(len, streams))


class _Streams:
    """A batch's containers on the device; prepare() puts their states back to the beginning."""

    def __init__(self, batch: _Batch, streams: list[bytes]) -> None:
        device, packed = batch.elements.device, batch.tables.packed
        self.elements, self.packed = batch.elements, batch.tables.packed_on(device)
        held = [torch.frombuffer(bytearray(stream), dtype=torch.uint8) for stream in streams]
        first = torch.cat([rans_open(stream, packed) for stream in held])
        self.first = first.to(device)
        self.now = self.first.clone()
        self.states = list(self.now.split([len(first) // len(held)] * len(held)))
        self.streams = [stream.to(device) for stream in held]

    def prepare(self) -> None:
        self.now.copy_(self.first)

    def decode(self) -> Tensor:
        return rans_decode_(self.streams, self.states, self.elements, self.packed, last=True)

    def graph(self) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.decode()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            symbols = self.decode()
        return lambda: graph.replay() or symbols


def _decoding(batch: _Batch, streams: list[bytes]) -> list[Case]:
    made, moved = _Streams(batch, streams), batch.moved(streams)

    def back(symbols: Tensor) -> list[Tensor]:
        return [symbols.float()]

    def from_bytes() -> Tensor:
        return decode_batch(streams, batch.elements, batch.tables)

    def over_the_cpu() -> Tensor:
        return decode_batch(streams, batch.elements.cpu(), batch.tables).to(batch.elements.device)

    return [
        Case(OURS + "cuda", forced("cuda", made.decode), back, moved, 0, made.prepare),
        Case(OURS + "cuda, in a graph", forced("cuda", made.graph)(), back, moved, 0, made.prepare),
        Case(OURS + "cuda, from bytes", forced("cuda", from_bytes), back, moved, 0),
        Case(OURS + "cpp, over the CPU", over_the_cpu, back, moved, 0),
    ]


def _encoding(batch: _Batch, streams: list[bytes]) -> list[Case]:
    moved, packed = batch.moved(streams), batch.tables.packed_on(batch.symbols.device)

    def from_bytes(containers: list[bytes]) -> list[Tensor]:
        return [decode_batch(containers, batch.elements, batch.tables).float()]

    def from_containers(made: tuple[Tensor, Tensor]) -> list[Tensor]:
        stream, lengths = made
        return from_bytes([part.cpu().numpy().tobytes() for part in stream.split(lengths.tolist())])

    def to_containers() -> tuple[Tensor, Tensor]:
        return rans_encode(batch.symbols, batch.elements, packed, lanes=batch.lanes)

    def over_the_cpu() -> list[bytes]:
        return encode_batch(batch.symbols.cpu(), batch.elements.cpu(), batch.tables, lanes=batch.lanes)

    return [
        Case(OURS + "cuda", forced("cuda", to_containers), from_containers, moved, 0),
        Case(OURS + "cuda, to bytes", forced("cuda", batch.streams), from_bytes, moved, 0),
        Case(OURS + "cpp, over the CPU", over_the_cpu, from_bytes, moved, 0),
    ]


def _both_ways(name: str, batch: _Batch, settings: Settings, left_out: dict[str, str]) -> Iterator[Group]:
    streams = batch.streams()
    samples, count = batch.symbols.shape
    bits = 8 * sum(map(len, streams)) / batch.symbols.numel()
    for direction, cases in (("decode", _decoding(batch, streams)), ("encode", _encoding(batch, streams))):
        yield Group(
            op="rans_coder",
            case=f"{direction}, {name}",
            inputs=f"{samples} x {count} symbols in {batch.lanes} lanes, {bits:.4f} bits each",
            dtype="int32",
            device=settings.device,
            cases=cases,
            expected=Expected([batch.symbols.double()], [0.0], [torch.float32]),
            left_out=left_out,
        )


def _parameters(floats: list[Tensor], settings: Settings, left_out: dict[str, str]) -> Group:
    """From floats to a mixture's integers; the CPU's are what the GPU's have to be."""
    tables, held = mixture_tables(), [x.cpu() for x in floats]
    expected = mixture_parameters(*held, tables, dim=1)
    moved = 4 * (3 * floats[0].numel() + expected.numel())

    def halves(words: Tensor) -> list[Tensor]:  # fp32 holds 16 bits of a word exactly
        return [(words >> 16).float(), (words & 0xFFFF).float()]

    def over_the_cpu() -> Tensor:
        return mixture_parameters(*(x.cpu() for x in floats), tables, dim=1).to(settings.device)

    exact = [half.double() for half in halves(expected.to(settings.device))]
    return Group(
        op="rans_coder",
        case="mixture_parameters",
        inputs=f"{len(floats[0])} x {floats[0].shape[-1]} mixtures of 3",
        dtype="fp32",
        device=settings.device,
        cases=[
            Case(OURS + "cuda", forced("cuda", lambda: mixture_parameters(*floats, tables, dim=1)), halves, moved, 0),
            Case(OURS + "cpp, over the CPU", over_the_cpu, halves, moved, 0),
        ],
        expected=Expected(exact, [0.0, 0.0], [torch.float32, torch.float32]),
        left_out=left_out,
    )


def groups(settings: Settings, inputs: Inputs, mixtures: MixtureInputs) -> Iterator[Group]:
    """Encoding and decoding of latents that lie on the GPU, by scales and by mixtures of three."""
    usable, left_out = backends("rans_coder_decode_", settings.device, torch.float32)
    if "cuda" not in usable:
        return
    for name, samples, count, lanes in _QUICK if settings.quick else _CASES:
        symbols, scales = (x.view(samples, count).to(settings.device) for x in inputs(samples * count, 64.0))
        yield from _both_ways(name, _Batch(symbols, scales, constant_tables(), lanes), settings, left_out)
    for name, samples, count, lanes in _QUICK if settings.quick else (_CASES[1], _CASES[3]):
        symbols, floats = mixtures(samples * count)
        floats = [x.view(3, samples, count).transpose(0, 1).contiguous().to(settings.device) for x in floats]
        symbols, tables = symbols.view(samples, count).to(settings.device), mixture_tables()
        yield _parameters(floats, settings, left_out)
        words = mixture_parameters(*floats, tables, dim=1)
        yield from _both_ways(f"mixtures of 3, {name}", _Batch(symbols, words, tables, lanes), settings, left_out)
