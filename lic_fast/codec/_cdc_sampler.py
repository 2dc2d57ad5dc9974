"""CDC's sampler: from a latent to an image by steps of the U-Net, of the whole image or of tiles that overlap."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..functional import ddim_update
from ..functional.coding import BitstreamError
from . import _cdc_schedule as schedules
from ._cdc_graph import recordable
from ._cdc_tiles import Span, cut, outer, windows
from ._tiles import halo_of

if TYPE_CHECKING:
    from .cdc import CDC

TO_INITIAL, _TO_STEPS = 0, 1  # keys of the noise, in the upper half of the generator's seed
_HEADER = struct.Struct("<BIHffHH")  # version and the settings: what a decode depends on beside the latents
_HEADER_VERSION = 2
_MOST_STEPS = (1 << 16) - 1
_MOST_SIDE = (1 << 16) - 1


class Settings(NamedTuple):
    """How an image is sampled; CDC says what each means. tile, overlap: pixels; tile 0 is the whole image."""

    seed: int
    steps: int
    gamma: float
    eta: float
    tile: int
    overlap: int

    def check(self, function: str, trained_steps: int, grid: int) -> Settings:
        """These settings. Raises ValueError where one is out of range; grid: what tiles are multiples of."""
        most = min(_MOST_STEPS, trained_steps)
        if not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 32):
            raise ValueError(f"CDC.{function}: seed must be an integer in [0, 2**32), got {self.seed!r}")
        if not (isinstance(self.steps, int) and 1 <= self.steps <= most):
            raise ValueError(f"CDC.{function}: steps must be 1 to {most}, got {self.steps!r}")
        for name, value, limit in (("gamma", self.gamma, 16.0), ("eta", self.eta, 1.0)):
            if not 0 <= value <= limit:
                raise ValueError(f"CDC.{function}: {name} must be in [0, {limit:g}], got {value!r}")
        for name, value in (("tile", self.tile), ("overlap", self.overlap)):
            if not (isinstance(value, int) and 0 <= value <= _MOST_SIDE and value % grid == 0):
                raise ValueError(f"CDC.{function}: {name} must be a multiple of {grid} below 65536, got {value!r}")
        if self.tile and not 0 < self.overlap <= self.tile // 2:
            raise ValueError(
                f"CDC.{function}: overlap must be {grid} to half of a tile, got {self.overlap} of {self.tile}; "
                "tile=0 samples the whole image at once"
            )
        return self

    def packed(self) -> bytes:
        return _HEADER.pack(_HEADER_VERSION, *self)

    def as_decoded(self) -> Settings:
        """As a decoder has them: gamma and eta rounded to fp32."""
        return self.unpacked(self.packed())

    @classmethod
    def unpacked(cls, header: bytes) -> Settings:
        """What packed() packed, not checked. Raises BitstreamError for another form."""
        if len(header) != _HEADER.size or header[0] != _HEADER_VERSION:
            raise BitstreamError(
                f"CDC.decompress: the sampler's settings must be {_HEADER.size} bytes of version {_HEADER_VERSION}, "
                f"got {len(header)} that begin with {header[:1]!r}; the stream is damaged or of another build"
            )
        return cls(*_HEADER.unpack(header)[1:])


def laid_out(x: Tensor) -> Tensor:
    """x channels-last on the CPU, where convolutions and channel_norm are faster so."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def normal(like: Tensor, seed: int | Tensor, amount: float) -> Tensor:
    """[1, ...] of like's other sides: normal noise of this deviation, the generator's for this seed."""
    zero = torch.zeros_like(like[:1], memory_format=torch.contiguous_format)
    return ddim_update(zero, zero, a=0.0, b=0.0, noise=amount, seed=seed) if amount else zero


class _Course(NamedTuple):
    """What is the same for all tiles of an image, and for all images sampled alike."""

    steps: tuple[schedules.Step, ...]
    clamp: float | None
    whole: tuple[int, int] | None  # height and width of the image, where it is sampled in tiles

    def run(self, denoiser: Any, inputs: Sequence[Tensor], advance: Callable[[], None] | None) -> Tensor:
        """The image [B, 3, H, W] at the end of the steps. inputs: x, seeds [steps], rows, columns, and the maps.

        rows, columns: which of the whole image these are; not read without `whole`. advance: called before each step.
        """
        x, seeds, rows, columns, *maps = inputs
        parts = denoiser.condition([laid_out(each) for each in maps])
        for number, step in enumerate(self.steps):
            if advance is not None:
                advance()
            x = laid_out(x)
            f = denoiser(x, x.new_full((len(x), 1), step.time), parts=parts).to(x.dtype)
            fixed = {"a": step.a, "b": step.b, "clamp": self.clamp}
            seed = seeds[number : number + 1]
            if not step.noise:
                x = ddim_update(x, f, **fixed)
            elif self.whole is None:
                fixed |= {"noise": step.noise, "seed": seed}
                x = torch.cat([ddim_update(*each, **fixed) for each in zip(x.split(1), f.split(1), strict=True)])
            else:  # the same sum: a pixel has one noise, whichever tile it is in
                noise = normal(x.new_empty((1, 3, *self.whole)), seed, step.noise)
                x = ddim_update(x, f, **fixed) + noise.index_select(2, rows).index_select(3, columns)
        return x.contiguous()


def sampled(codec: CDC, y_hat: Tensor, settings: Settings) -> Tensor:
    """The image [B, 3, H, W] in [-1, 1], not clamped, of y_hat [B, M, h, w]: CDC.sample()'s, settings checked."""
    factor, grid = codec.sizes.downsampling, codec.sizes.multiple
    height, width = (factor * side for side in y_hat.shape[2:])
    spans = [cut(side, settings.tile, settings.overlap, grid) for side in (height, width)]
    for side, along in zip((height, width), spans, strict=True):
        if along[-1][1] != side:
            raise ValueError(f"CDC.sample: sides in tiles must be multiples of {grid}, got {height} x {width} pixels")
    steps = tuple(schedules.ddim_steps(codec.abar, settings.steps, settings.eta, codec.predicts))
    tiles = [(rows, columns) for rows in range(len(spans[0])) for columns in range(len(spans[1]))]
    course = _Course(steps, 1.0 if codec.predicts == "x" else None, (height, width) if len(tiles) > 1 else None)
    image = y_hat.new_zeros((len(y_hat), 3, height, width))
    start = codec._noise(image, settings.seed, TO_INITIAL, settings.gamma)
    seeds = torch.tensor([settings.seed | (_TO_STEPS + i) << 32 for i in range(len(steps))], device=y_hat.device)
    bar = iter([] if codec.progress is None else codec.progress([*steps] * len(tiles)))
    weights = [windows(along) for along in spans]
    for row, column in tiles:
        (top, bottom), (left, right) = spans[0][row], spans[1][column]
        x = start[:, :, top:bottom, left:right]
        places = [torch.arange(*span, device=x.device) for span in ((top, bottom), (left, right))]
        maps = _maps(codec, y_hat, ((top, bottom), (left, right)))
        found = _run(codec, course, [x, seeds, *places, *maps], lambda: next(bar, None))
        if len(tiles) == 1:
            image = found
        else:
            down, across = weights[0][row].to(image), weights[1][column].to(image)
            image[:, :, top:bottom, left:right] += found * (down[:, None] * across)
    next(bar, None)  # so that a bar sees its end
    return image


def _run(codec: CDC, course: _Course, inputs: Sequence[Tensor], advance: Callable[[], None]) -> Tensor:
    """course.run(), on a GPU recorded where it is run again; then a bar moves by all its steps at once."""
    if not (codec.cuda_graph and recordable(inputs[0].device)):
        return course.run(codec.denoiser, inputs, advance)
    result = codec._recordings.run(
        course, codec.denoiser.parameters(), inputs, lambda given: course.run(codec.denoiser, given, None)
    )
    for _ in course.steps:
        advance()
    return result


def _maps(codec: CDC, y_hat: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """What conditions the U-Net on this part of the image: the whole image's maps, up to rounding."""
    factor = codec.sizes.downsampling
    inner = [(first // factor, end // factor) for first, end in spans]
    sides = y_hat.shape[2:]
    if all(span == (0, side) for span, side in zip(inner, sides, strict=True)):
        return codec.content.maps(y_hat)
    halo = halo_of(codec.content.synthesis, factor)
    beyond = [outer(span, side, halo) for span, side in zip(inner, sides, strict=True)]
    (top, bottom), (left, right) = beyond
    found = []
    for level, each in enumerate(codec.content.maps(y_hat[:, :, top:bottom, left:right])):
        scale = factor >> level
        rows, columns = (slice((a - o) * scale, (b - o) * scale) for (a, b), (o, _) in zip(inner, beyond, strict=True))
        found.append(each[:, :, rows, columns])
    return found
