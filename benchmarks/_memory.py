"""How much memory a call allocates at its peak, beyond what was held before."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def peak_allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that `run` holds at its worst moment beyond those held before it, on `device`.

    On CUDA by the allocator's own count; on the CPU by torch's record of every allocation.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
