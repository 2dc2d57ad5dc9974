"""What a launch over a list keeps between steps: plans (tables on the device) and the pointers that change.

A plan is kept under everything it depends on, so that a step costs one look-up. Plans and pointers belong to a stream,
like tables.py's tables; those that a CUDA graph was captured with are kept for good, and none can be made while a graph
is captured: run one step before.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Entry:
    value: Any
    size: int
    used: int = 0


_PLANS: dict[tuple, _Entry] = {}
_NUMBERS: dict[tuple, _Entry] = {}
_CAPTURED: dict[tuple, Any] = {}
_KEPT = 1 << 23  # int64 in the tables of all plans: 64 MiB. Staggered refreshes have a plan for every step of a cycle
_LEAST = _KEPT >> 7  # what the smallest plan counts for: the keys, on the host, are thousands of addresses
_KEPT_NUMBERS = 64  # lists of pointers, which may change at every step
_clock = itertools.count()
_made = 0  # int64 in all tables that were ever made


def _of_another_stream(store: dict[tuple, _Entry], whole: tuple) -> Any:
    """What a warm-up on another stream has made; the capture waits for its writer anyway."""
    for other, value in (*_CAPTURED.items(), *((k, entry.value) for k, entry in store.items())):
        if other[:2] == whole[:2]:
            return value
    raise RuntimeError("a CUDA graph is being captured and these tensors were never launched; step once before")


def _kept(
    store: dict[tuple, _Entry], most: int, key: Hashable, device: torch.device, build: Callable[[], tuple[Any, int]]
) -> Any:
    on_cuda = device.type == "cuda"
    whole = (key, device, torch.cuda.current_stream(device).cuda_stream if on_cuda else 0)
    entry = store.get(whole)  # once: to hash and to compare thousands of addresses takes its time
    if on_cuda and torch.cuda.is_current_stream_capturing():
        value = entry.value if entry is not None else _of_another_stream(store, whole)
        _CAPTURED[whole] = value
        return value
    if entry is None:
        entry = store[whole] = _Entry(*build(), next(_clock))
        while len(store) > 1 and sum(e.size for e in store.values()) > most:
            del store[min(store, key=lambda k: store[k].used)]
    entry.used = next(_clock)
    return entry.value


def plan(key: Hashable, device: torch.device, build: Callable[[], Any]) -> Any:
    """What build() returned for this key on the current stream."""

    def measured() -> tuple[Any, int]:
        before = _made
        return build(), max(_made - before, _LEAST)

    return _kept(_PLANS, _KEPT, key, device, measured)


def numbers(device: torch.device, *columns: tuple[int, ...]) -> Tensor:
    """The columns side by side, [n, columns] int64 on the device: kept, or sent by one copy from pinned memory."""

    def send() -> tuple[Tensor, int]:
        flat = itertools.chain.from_iterable(zip(*columns, strict=True))
        host = torch.frombuffer(array("q", flat), dtype=torch.int64)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone(), 1

    return _kept(_NUMBERS, _KEPT_NUMBERS, columns, device, send)


def table(rows: Iterable[Sequence[int]], columns: int, device: torch.device) -> Tensor:
    """The rows [n, columns] int64 on the device, shorter ones filled with zeros. Waits: for plans only."""
    global _made
    flat = array("q")
    for row in rows:
        flat.extend((*row, *(0,) * (columns - len(row))))
    _made += len(flat)
    if not flat:
        return torch.zeros((0, columns), dtype=torch.int64, device=device)
    return torch.frombuffer(flat, dtype=torch.int64).view(-1, columns).clone().to(device)
