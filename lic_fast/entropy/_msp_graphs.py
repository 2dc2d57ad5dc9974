"""Decoding work recorded as CUDA graphs: one for each kind of image, of which the last few are kept."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..coding import Decoder, Slots

_MOST = 4  # kinds of images
_LEAST_ROOM = 4096  # bytes of a container
_one_capture = threading.Lock()  # at a time in a process: PyTorch's rule
Work = Callable[[Slots], tuple[Tensor, Any]]


class Recording:
    """work(slots) as a CUDA graph of `device`, in the pool of `beside`: recordings that never run at the same time."""

    def __init__(self, work: Work, slots: Slots, device: torch.device, beside: Recording | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        stream = torch.cuda.Stream(device)
        mode = "thread_local"  # what other threads ask of the device in the meantime is theirs
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool, stream, mode):
            self._made = work(slots)

    def replay(self) -> tuple[Tensor, Any]:
        """What work gave, anew, where it always is. Waits for nothing."""
        self._graph.replay()
        return self._made


@dataclasses.dataclass
class _Kind:
    """What is known of one kind of image: where its containers lie, which weights its work reads, the recording."""

    slots: Slots
    weights: list[Hashable]
    recording: Recording | None = None
    kept: list[Tensor] = dataclasses.field(default_factory=list)  # what the recording reads lives as long as it does


class Graphs:
    """Does work on containers in fixed places, and from the second image of a kind on replays a recording of it.

    The first image is decoded as without graphs: that makes the kernels, their tables, the libraries' handles and
    plans, which a capture cannot make. A recording is void where weights have changed or moved, or where a container is
    longer than its room, a power of two that held the longest of its kind before. Copies and pickles have none.
    """

    def __init__(self) -> None:
        self._kinds: collections.OrderedDict[Hashable, _Kind] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def run(
        self,
        key: Hashable,
        decoders: Sequence[Decoder],
        device: torch.device,
        modules: Iterable[nn.Module],
        work: Work,
        judge: Callable[[Any], None],
    ) -> Tensor:
        """The tensor of work(slots) for these containers, once judge(log), log being what work gave too, is content.

        key: equal for work that is the same but for the containers and the weights, which are those that `modules` have
        themselves. judge waits for the device. Raises what work and judge raise.
        """
        # What inference mode makes cannot be written outside of it. Two threads would write into the same slots.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            modules = list(modules)
            weights, kind = _fingerprint(modules), self._kinds.pop(key, None)
            if kind is None or kind.weights != weights or not kind.slots.fits(decoders):
                kind = _Kind(Slots(decoders, device, _rooms(decoders, kind)), weights)
                result, log = work(kind.slots)
            else:
                kind.slots.load_(decoders)
                if kind.recording is None:
                    with _one_capture:
                        kind.recording = Recording(work, kind.slots, device, self._any_recording())
                    kind.kept = _tensors(modules)
                result, log = kind.recording.replay()
                result = result.clone()  # the next one writes where it lies
            while len(self._kinds) >= _MOST:
                self._kinds.popitem(last=False)
            self._kinds[key] = kind
            judge(log)
            return result

    def _any_recording(self) -> Recording | None:
        return next((kind.recording for kind in self._kinds.values() if kind.recording is not None), None)


def _rooms(decoders: Sequence[Decoder], before: _Kind | None) -> list[int]:
    least = [_LEAST_ROOM] * len(decoders) if before is None else before.slots.rooms
    return [1 << (max(d.bytes, room) - 1).bit_length() for d, room in zip(decoders, least, strict=True)]


def _fingerprint(modules: list[nn.Module]) -> list[Hashable]:
    """Another one where a module has become another class, or its weights have changed or moved."""
    found: list[Hashable] = []
    for module in modules:
        found.append(module.__class__)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
    return found


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    """The weights, and what modules have made of them for their kernels."""
    found: list[Any] = []
    for module in modules:
        found += [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [each for each in found if isinstance(each, Tensor)]
