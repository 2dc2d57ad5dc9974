"""Decoding streams of MSPEntropyModel: from bytes to y_hat, or to pixels, as one piece of work of a device.

The work is the networks, the levels of scales, the symbols and the values of all steps, one after the other, and waits
for nothing. What a stream is checked by is collected on the device, and read once, behind it: only then is it known
whether the values mean anything. On a GPU the work is recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import _dispatch
from ..coding import BitstreamError, Slots, Tables
from ..functional import rans_check
from ._msp_coding import coder_device, decoding
from ._msp_stream import Reader

if TYPE_CHECKING:
    from .msp import MSPEntropyModel

_HEAD_BYTES = 256  # of Slots.heads()


class Then(Hashable, Protocol):
    """What is made of y_hat [1, C, H, W], in the same graph: equal ones do the same, with weights in `modules()`."""

    def __call__(self, y_hat: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]:
        """Those whose weights it reads."""


class Log(NamedTuple):
    """What judges a decoded stream: the heads of its containers' states, then the levels of its steps, as bytes."""

    data: Tensor
    containers: int
    sizes: list[int]  # bytes of each step

    @classmethod
    def of(cls, slots: Slots, levels: list[Tensor]) -> Log:
        """In one tensor on the device, so that the host waits once."""
        parts = [part.view(torch.uint8).flatten() for part in (*slots.heads(), *levels)]
        return cls(torch.cat(parts), len(slots.decoders), [part.numel() for part in parts[len(slots.decoders) :]])

    def judge(self, reader: Reader, failed: BitstreamError | None = None) -> None:
        """Waits for the device. Raises BitstreamError where the values are not the encoder's."""
        data = self.data
        if not data.is_cpu:  # to pinned memory, at the speed of the bus
            data = torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data)
        heads, levels = data.split([_HEAD_BYTES * self.containers, sum(self.sizes)])
        if failed is None:
            failed = _said(list(heads.view(torch.int64).view(self.containers, -1)))
        reader.check(levels.split(self.sizes) if self.sizes else (), failed)


def _said(heads: list[Tensor]) -> BitstreamError | None:
    try:
        rans_check(heads)
    except BitstreamError as error:
        return error
    return None


def decompress(model: MSPEntropyModel, strings: Sequence[bytes], shape: Sequence[int], then: Then | None) -> Tensor:
    """MSPEntropyModel.decompress."""
    height, width = (int(side) for side in shape)
    if height < 1 or width < 1:
        raise ValueError(f"MSPEntropyModel.decompress: shape must be (H, W), 1 at least, got {tuple(shape)}")
    tables = model._codable("decompress")
    sizes = zip(model.schedule.steps, model.schedule.counts(height, width), strict=True)
    counts = [(step.scale, count) for step, count in sizes if count]
    portable = model.integers is not None
    # before anything is allocated
    readers = [Reader(stream, tables, counts, portable, model._mixtures) for stream in strings]
    if len(readers) == 1:
        return _decode(model, readers[0], (height, width), tables, then)
    none = torch.empty(0, model.schedule.channels, height, width, device=model.bottleneck.quantiles.device)
    y_hat = torch.cat([none, *(_decode(model, reader, (height, width), tables, None) for reader in readers)])
    return y_hat if then is None else then(y_hat)  # of all at once: of one by one, pixels could round otherwise


def _decode(
    model: MSPEntropyModel, reader: Reader, shape: tuple[int, int], tables: Tables, then: Then | None
) -> Tensor:
    """y_hat [1, C, *shape] of an opened stream, or what `then` makes of it. Raises BitstreamError."""
    device, network = model.bottleneck.quantiles.device, model.integers if reader.portable else model.network

    def steps(slots: Slots, levels: list[Tensor]) -> Tensor:
        y_hat = torch.empty((1, model.schedule.channels, *shape), device=device)
        visit = decoding(slots, y_hat, model._medians(), tables, model._mixtures, levels)
        model._coded(y_hat, visit, network)
        slots.finish_()
        return y_hat

    def whole(slots: Slots) -> tuple[Tensor, Log]:
        levels: list[Tensor] = []
        y_hat = steps(slots, levels)
        log = Log.of(slots, levels)
        return y_hat if then is None else then(y_hat), log

    if graphs_apply(model, device):
        key = (shape, reader.portable, device, then, _numerics())
        modules = (model, model.bottleneck, *network.modules(), *(() if then is None else then.modules()))
        return model._graphs.run(key, reader.decoders, device, modules, whole, lambda log: log.judge(reader))
    slots, levels, failed = Slots(reader.decoders, coder_device(device)), [], None
    y_hat = torch.empty(0)
    try:
        y_hat = steps(slots, levels)
    except BitstreamError as error:  # decoders on the CPU speak up at once
        failed = error
    Log.of(slots, levels).judge(reader, failed)
    return y_hat if then is None else then(y_hat)


def graphs_apply(model: MSPEntropyModel, device: torch.device) -> bool:
    """Whether images are decoded by CUDA graphs. Not within autocast, which `then` may hang on."""
    asked = model.cuda_graph and device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    return asked and coder_device(device) == device


def _numerics() -> tuple[Hashable, ...]:
    """What decides, beside shapes and weights, which kernels run: a recording has those of its time."""
    cudnn = torch.backends.cudnn
    return (
        _dispatch.asked_for(), cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
