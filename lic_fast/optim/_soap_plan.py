"""How SOAP sees a parameter: which axes have a factor, and in which order the kernels walk them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_AXES = 5


def merged(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """`shape` with neighbouring axes merged while their product is at most `most`, as nikhilvyas/SOAP merges them."""
    result: list[int] = []
    current = 1
    for size in shape:
        if current * size <= most:
            current *= size
        elif current > 1:
            result.append(current)
            current = size
        else:
            result.append(size)
            current = 1
    if current > 1 or not result:
        result.append(current)
    return tuple(result)


@dataclass(frozen=True)
class Plan:
    """The axes of one shape of parameter. Equal plans are one object's worth of layout: their states are stacked.

    axes: the sizes after merging, in the parameter's order; factored: which of them have a factor (GG and Q); order:
    the axes longer than 1 as the kernels walk them, the two longest last. Axes of size 1 have the identity as factor
    and are left out.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    factored: tuple[bool, ...]
    order: tuple[int, ...]
    channels_last: bool  # the parameter's own axes are (out, height, width, in), and merging wants them NCHW
    _strides: dict[tuple[int, ...], tuple[int, ...] | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def preconditioned(self) -> bool:
        """Whether any axis has a factor; without one the tensor takes plain Adam steps."""
        return any(self.factored)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the walked view."""
        return tuple(self.axes[a] for a in self.order)

    def factor_sizes(self) -> list[int]:
        """For each walked axis the size of its factor, 0 where it has none."""
        return [self.axes[a] if self.factored[a] else 0 for a in self.order]

    def step_flops(self) -> int:
        """Useful floating-point operations of an ordinary step: two projections and half a Gram matrix an axis."""
        n = math.prod(self.shape)
        return sum(5 * n * d for d in self.factor_sizes()) + 20 * n

    def refresh_flops(self) -> int:
        """Of a refresh of all factors, and of carrying the moments over."""
        n = math.prod(self.shape)
        return sum(14 * d**3 + 2 * n * d for d in self.factor_sizes())

    def walk(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the parameter's shape, as the kernels walk it: a view, or a copy where no view exists."""
        key = tensor.stride()
        if key not in self._strides:
            like = torch.empty_strided(self.shape, key, device="meta")
            try:
                self._strides[key] = self._walked(like, like.__class__.view).stride()
            except RuntimeError:  # merging axes that do not lie together
                self._strides[key] = None
        strides = self._strides[key]
        if strides is None:
            return self._walked(tensor, torch.Tensor.reshape).contiguous()
        return tensor.as_strided(self.sizes, strides)

    def merge(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the parameter's shape, with the shape `axes`."""
        return (tensor.permute(0, 3, 1, 2) if self.channels_last else tensor).reshape(self.axes)

    def unwalk(self, state: Tensor) -> Tensor:
        """The inverse of walk for a contiguous tensor of `sizes`: a view with the parameter's shape."""
        inverse = sorted(range(len(self.order)), key=lambda i: self.order[i])
        x = state.permute(inverse)
        if not self.channels_last:
            return x.view(self.shape)
        n, h, w, c = self.shape
        return x.view(n, c, h, w).permute(0, 2, 3, 1)

    def _walked(self, tensor: Tensor, reshape) -> Tensor:
        if self.channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
        kept = sorted(self.order)
        tensor = reshape(tensor, tuple(self.axes[a] for a in kept))
        return tensor.permute([kept.index(a) for a in self.order])


@functools.cache
def plan_of(
    shape: tuple[int, ...], precondition: bool, precondition_1d: bool, merge: bool, most: int, channels_last: bool
) -> Plan:
    """The plan for a parameter of `shape` under a group's settings. Raises ValueError for more than 5 axes."""
    nhwc = merge and channels_last and len(shape) == 4
    axes = shape
    if merge and len(shape) > 1:
        axes = merged((shape[0], shape[3], shape[1], shape[2]) if nhwc else shape, most)
    allowed = precondition and math.prod(shape) > 0 and (len(shape) > 1 or precondition_1d)
    factored = tuple(allowed and 1 < size <= most for size in axes)
    kept = [a for a, size in enumerate(axes) if size != 1]
    if any(factored) and len(kept) > MOST_AXES:
        raise ValueError(
            f"SOAP: a parameter has more than {MOST_AXES} axes longer than 1, got shape {list(shape)}; "
            f"put it into a group with precondition=False, or set merge_dims=True"
        )
    longest = sorted(kept, key=lambda a: (axes[a], -a))[-2:]  # the kernels' matrix, its long side the row
    return Plan(shape, axes, factored, (*(a for a in kept if a not in longest), *longest), nhwc)
