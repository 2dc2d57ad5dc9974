"""Stepwise containers in fixed places of a device, where others can take their place."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .rans import Decoder

_BYTES_AT, _HEAD = 1, 32  # of a state (docs: reference/_rans_container.py)
_WORD = 8


class Slots:
    """Decoders of containers that all lie, words and states, in one piece of memory of a device.

    decoders: opened on the CPU, which stay as they are; `decoders` here decode the same on `device`, whose steps read
    and write fixed places, so that a CUDA graph can hold them. load_() puts other containers into these places, in one
    copy that nothing waits for. rooms: the most bytes of a container that each slot takes (default: as many as it has).

    Raises ValueError for rooms that are too small, TypeError for decoders that are not on the CPU. Source: our choice.
    """

    def __init__(
        self, decoders: Sequence[Decoder], device: torch.device | str, rooms: Sequence[int] | None = None
    ) -> None:
        device = torch.device(device)
        self.rooms = [decoder.bytes for decoder in decoders] if rooms is None else list(rooms)
        self._places: list[tuple[slice, slice]] = []  # of the state, of the words
        end = 0
        for decoder, room in zip(decoders, self.rooms, strict=True):
            words = end + _WORD * decoder._state.numel()
            self._places.append((slice(end, words), slice(words, words + room)))
            end = words + -(-room // _WORD) * _WORD
        # What lies behind a container in its slot is never read, but copied.
        self._staged = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._memory = self._staged if device.type == "cpu" else torch.empty_like(self._staged, device=device)
        self.decoders = [self._here(decoder, *places) for decoder, places in zip(decoders, self._places, strict=True)]
        self.load_(decoders)

    def _here(self, decoder: Decoder, state: slice, words: slice) -> Decoder:
        made = copy.copy(decoder)
        made._stream, made._state = self._memory[words], self._memory[state].view(torch.int64)
        made._packed = decoder._tables.packed_on(self._memory.device)
        return made

    @property
    def device(self) -> torch.device:
        """Where they decode."""
        return self._memory.device

    def fits(self, decoders: Sequence[Decoder]) -> bool:
        """Whether load_() takes these: as many containers, of as many streams and the same tables, short enough."""
        return len(decoders) == len(self.decoders) and all(
            there._state.numel() == here._state.numel() and there._tables == here._tables and there.bytes <= room
            for there, here, room in zip(decoders, self.decoders, self.rooms, strict=True)
        )

    def load_(self, decoders: Sequence[Decoder]) -> None:
        """Puts containers, opened on the CPU, where those before were. Waits for nothing: what decodes the containers
        before must have been waited for. Raises ValueError where they do not fit, TypeError where they are elsewhere.
        """
        if not self.fits(decoders):
            raise ValueError(
                f"Slots.load_: containers that do not fit, got {[d.bytes for d in decoders]} bytes for rooms "
                f"of {self.rooms}, or of other tables or numbers of streams; make new slots"
            )
        for decoder, (state, words), room in zip(decoders, self._places, self.rooms, strict=True):
            if not (decoder._stream.is_cpu and decoder._state.is_cpu):
                raise TypeError(
                    f"Slots.load_: decoders must be on the CPU, got {decoder._stream.device}; open them there"
                )
            head = self._staged[state].view(torch.int64)
            head.copy_(decoder._state)
            head[_BYTES_AT] = room  # a step is told the room, the same for all: how far it may read, and no more
            self._staged[words][: decoder.bytes].copy_(decoder._stream)
        if self._memory is not self._staged:
            self._memory.copy_(self._staged, non_blocking=True)

    def heads(self) -> list[Tensor]:
        """What rans_check takes, of each container; nothing is waited for."""
        return [decoder._state[:_HEAD] for decoder in self.decoders]

    def finish_(self) -> None:
        """Decoder.finish for all, except that on a GPU rans_check(heads()) says what is wrong, and waits for it."""
        for decoder in self.decoders:
            decoder._end()
