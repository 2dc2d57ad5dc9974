"""How much memory a call allocates at its peak, beyond what was held before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

_MARK = 3_141_595  # bytes of an allocation that nothing else makes: where the call begins


def peak_allocated(prepare: Callable[[], Any], run: Callable[[Any], object], device: torch.device) -> int:
    """Bytes of tensors that run(prepare()) holds at its worst moment beyond those held when it began, on `device`.

    On CUDA by the allocator's own count. On the CPU by torch's record of every allocation, which knows the size of
    what is freed only where it saw it made: `prepare` makes whatever `run` may free.
    """
    gc.collect()
    if device.type == "cuda":
        prepared = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(prepared)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prepared = prepare()
        gc.collect()
        torch.empty(_MARK, dtype=torch.uint8)
        run(prepared)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held = peak = 0
    for size in sizes[sizes.index(_MARK) + 2 :]:
        held += size
        peak = max(peak, held)
    return peak
