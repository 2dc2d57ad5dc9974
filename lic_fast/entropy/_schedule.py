"""In which order the elements of a latent are coded: the one object that training, encoding and decoding share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

PHASES = ((1, 1), (0, 1), (1, 0))  # the diagonal has four known neighbours, the other two then have six and more
_MOST_SCALES = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """Elements that are coded together: channels first to last - 1, rows and columns from an offset in a stride.

    scale: -1 for the coarsest grid, which opens the stream; else the grid y[:, :, ::2**scale, ::2**scale], of whose
    2x2 blocks the step codes the element at `phase`.
    """

    index: int
    scale: int
    phase: tuple[int, int]
    group: int
    first: int
    last: int
    offset: tuple[int, int]
    stride: int

    @property
    def place(self) -> dict[str, int]:
        """Where functional.schedule_quantize_ and its like find the step's elements."""
        return {"first": self.first, "row": self.offset[0], "column": self.offset[1], "stride": self.stride}

    def of(self, y: Tensor) -> Tensor:
        """The step's elements of y [B, C, H, W]: a view [B, last - first, h, w], h or w 0 where it has none."""
        i, j = self.offset
        return y[:, self.first : self.last, i :: self.stride, j :: self.stride]

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of of(y) for a latent of height x width."""
        i, j = self.offset
        return max(0, -((i - height) // self.stride)), max(0, -((j - width) // self.stride))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a latent of `channels` channels: scales from the coarsest, phases of 2x2 blocks, channel groups.

    Grid s of a latent is y[:, :, ::2**s, ::2**s]. The stream begins with all channels of grid `scales`, in one step.
    Then, for s = scales - 1 ... 0, grid s + 1 is known, which is phase (0, 0) of the 2x2 blocks of grid s; phases
    (1, 1), (0, 1) and (1, 0) follow, each in `groups` groups of channels. That is 1 + 3 * scales * groups steps,
    whatever the latent's sides, and every element is in one step: nothing is padded, a step may be empty.

    Raises ValueError: scales not 1 to 16, groups not 1 to channels.
    Source: multi-scale and progressive over space and channels, in a number of steps that does not depend on the image,
    is Zhang et al. (arXiv 2210.04112); this order is our reconstruction (docs/MSP.md).
    """

    channels: int
    scales: int = 3
    groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.scales <= _MOST_SCALES:
            raise ValueError(f"Schedule: scales must be 1 to {_MOST_SCALES}, got {self.scales}; 3 suits photographs")
        if not 1 <= self.groups <= self.channels:
            raise ValueError(
                f"Schedule: groups must be 1 to the number of channels, got {self.groups} and {self.channels} channels"
            )
        object.__setattr__(self, "_steps", self._make())

    def __len__(self) -> int:
        return 1 + len(PHASES) * self.scales * self.groups

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the stream."""
        return self._steps

    def at(self, scale: int) -> tuple[Step, ...]:
        """The steps of grid `scale`, in order; those of scale -1 are the coarsest grid's one."""
        return tuple(step for step in self._steps if step.scale == scale)

    def bounds(self, group: int) -> tuple[int, int]:
        """The first channel of a group, and the one behind its last: groups differ by one channel at most."""
        return group * self.channels // self.groups, (group + 1) * self.channels // self.groups

    def _make(self) -> tuple[Step, ...]:
        steps = [Step(0, -1, (0, 0), 0, 0, self.channels, (0, 0), 1 << self.scales)]
        for scale in reversed(range(self.scales)):
            for i, j in PHASES:
                for group in range(self.groups):
                    place = (i << scale, j << scale)
                    steps.append(Step(len(steps), scale, (i, j), group, *self.bounds(group), place, 2 << scale))
        return tuple(steps)

    def counts(self, height: int, width: int) -> list[int]:
        """How many elements of a sample each step has."""
        return [(step.last - step.first) * h * w for step in self._steps for h, w in [step.sides(height, width)]]

    def pack(self, y: Tensor) -> Tensor:
        """The elements of y [B, C, H, W] in the order of the stream, [B, C * H * W]; differentiable.

        Raises ValueError where y is not [B, C, H, W] of C channels.
        """
        if y.dim() != 4 or y.shape[1] != self.channels:
            raise ValueError(f"Schedule.pack: y must be [B, {self.channels}, H, W], got {list(y.shape)}")
        return _Pack.apply(y, self)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """The inverse of pack: [B, C * H * W] to [B, C, H, W]; differentiable. Raises ValueError for the shape."""
        if packed.dim() != 2 or packed.shape[1] != self.channels * height * width:
            raise ValueError(
                f"Schedule.unpack: packed must be [B, {self.channels * height * width}], got {list(packed.shape)}"
            )
        return _Unpack.apply(packed, self, height, width)


def _gather(schedule: Schedule, y: Tensor) -> Tensor:
    return torch.cat([step.of(y).flatten(1) for step in schedule.steps], 1)


def _scatter(schedule: Schedule, packed: Tensor, height: int, width: int) -> Tensor:
    y = packed.new_empty((len(packed), schedule.channels, height, width))
    parts = packed.split(schedule.counts(height, width), 1)
    for step, part in zip(schedule.steps, parts, strict=True):
        place = step.of(y)
        place.copy_(part.view(place.shape))
    return y


# Each is the other's gradient. Autograd's own, of a slice a step, would be a tensor of the latent's size a step.
class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, schedule: Schedule) -> Tensor:
        ctx.schedule, ctx.sides = schedule, y.shape[2:]
        return _gather(schedule, y)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Unpack.apply(gradient, ctx.schedule, *ctx.sides), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, schedule: Schedule, height: int, width: int) -> Tensor:
        ctx.schedule = schedule
        return _scatter(schedule, packed, height, width)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Pack.apply(gradient, ctx.schedule), None, None, None
