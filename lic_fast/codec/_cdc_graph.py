"""Work on a GPU, recorded as a CUDA graph when it comes again: all steps of CDC's sampler are one launch then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import asked_for, explain

_MOST = 2  # recordings kept, each with memory of its own: for photographs that stand and that lie


def recordable(device: torch.device) -> bool:
    """Whether a sampler's work on `device` can be recorded now.

    Not under autocast, whose copies of weights end with its block; nor by the reference, which sends numbers from the
    host at every step.
    """
    if device.type != "cuda" or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return False
    return explain("ddim_update", "cuda").chosen not in (None, "reference")


def captured(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(a function that does `work` again, the tensor in which its result is then found)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


def _modes() -> Hashable:
    """What decides, beside the arguments, which kernels run."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    fixed = torch.are_deterministic_algorithms_enabled()
    return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, fixed, asked_for()


class Recordings:
    """The last recordings of one kind of work, by what it was asked for.

    The first run of a key is an ordinary one: it makes the libraries' handles and the kernels' tables, which a capture
    cannot make, and a single image is not worth a capture. The second is recorded, over copies of its inputs. Weights
    are read where they lie, so that an update in place is seen; where one lies elsewhere, all recordings are void.
    A copy of the model begins with none.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[Callable[[], None], Sequence[Tensor], Tensor] | None] = OrderedDict()
        self._places: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()

    def run(
        self,
        key: Hashable,
        weights: Iterable[Tensor],
        inputs: Sequence[Tensor],
        work: Callable[[Sequence[Tensor]], Tensor],
    ) -> Tensor:
        """work(inputs), which must be a function of key, weights and inputs alone."""
        places = [weight.data_ptr() for weight in weights]
        if places != self._places:
            self._places = places
            self._kept.clear()
        device = inputs[0].device
        key = (key, device, _modes(), tuple((each.shape, each.stride(), each.dtype) for each in inputs))
        if key not in self._kept:
            self._kept[key] = None
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
            return work(inputs)
        self._kept.move_to_end(key)
        entry = self._kept[key]
        if entry is None:
            fixed = [each.clone(memory_format=torch.preserve_format) for each in inputs]
            replay, result = captured(lambda: work(fixed))
            entry = self._kept[key] = replay, fixed, result
        replay, fixed, result = entry
        for place, each in zip(fixed, inputs, strict=True):
            place.copy_(each)
        replay()
        return result.clone()
