"""Integer frequencies that cost the fewest bits: exact, the same on every machine for the same integers."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

_LOG_BITS = 96  # binary digits of the logarithms
ESCAPE_BITS = 16  # what an escape costs beside its frequency: a value of two bytes
MOST_SYMBOLS = 255  # of a row, beside its escape


@functools.lru_cache(maxsize=1 << 16)
def log_step(f: int) -> int:
    """ln((f + 1) / f) in units of 2**-96, by the series of 2 atanh(1 / (2 f + 1)) in integers."""
    odd = 2 * f + 1
    power, total, k = (2 << _LOG_BITS + 16) // odd, 0, 1
    while power:
        total += power // k
        power //= odd * odd
        k += 2
    return total >> 16


@functools.cache
def _log_table(total: int) -> list[int]:
    """ln(f) in units of 2**-96 for f from 0 (not defined: 0) to `total`."""
    logs = [0, 0]
    for f in range(1, total):
        logs.append(logs[-1] + log_step(f))
    return logs


def allocate(masses: Sequence[int], total: int) -> list[int]:
    """Frequencies >= 1 with the given sum that make -sum(mass * log(frequency)) as small as any can.

    masses: integers >= 0, not more than `total` of them. The gain of one more falls with the frequency, so a
    distribution is the best where the largest gain of one more is no larger than the smallest loss of one less. Among
    equals the earlier symbol gets it.
    """
    whole = sum(masses) or 1
    f = [max(1, mass * total // whole) for mass in masses]
    gains = [(-mass * log_step(f[i]), i) for i, mass in enumerate(masses)]
    losses = [(mass * log_step(f[i] - 1), -i) for i, mass in enumerate(masses) if f[i] > 1]
    heapq.heapify(gains)
    heapq.heapify(losses)

    def change(i: int, step: int) -> None:
        f[i] += step
        heapq.heappush(gains, (-masses[i] * log_step(f[i]), i))
        if f[i] > 1:
            heapq.heappush(losses, (masses[i] * log_step(f[i] - 1), -i))

    def top(heap: list[tuple[int, int]], sign: int) -> tuple[int, int]:
        while True:  # entries of frequencies that have changed since are stale
            value, i = heap[0][0], sign * heap[0][1]
            now = -masses[i] * log_step(f[i]) if sign > 0 else masses[i] * log_step(f[i] - 1) if f[i] > 1 else None
            if now == value:
                return abs(value), i
            heapq.heappop(heap)

    missing = total - sum(f)
    while missing > 0:
        change(top(gains, 1)[1], 1)
        missing -= 1
    while missing < 0:
        change(top(losses, -1)[1], -1)
        missing += 1
    while losses:
        gain, into = top(gains, 1)
        loss, out = top(losses, -1)
        if gain <= loss or into == out:
            return f
        change(out, -1)
        change(into, 1)
    return f


def code_length(masses: Sequence[int], frequencies: Sequence[int], total: int) -> int:
    """sum(mass * ln(total / frequency)), in units of 2**-96."""
    logs = _log_table(total)
    return sum(mass * (logs[total] - logs[f]) for mass, f in zip(masses, frequencies, strict=True))


def best_row(masses: Sequence[int], beyond: int, total: int) -> tuple[int, list[int]]:
    """The first symbol of the best row and its frequencies, the escape's last.

    masses: of consecutive symbols, `beyond`: of all others; whatever the row leaves out costs an escape. Symbols are
    dropped from the ends, the lighter first, as long as that makes the code shorter.
    """
    low, high, outside = 0, len(masses), beyond
    while high - low > MOST_SYMBOLS or (high > low and min(masses[low], masses[high - 1]) == 0):
        low, high, outside = _drop(masses, low, high, outside)
    best, cost = _cost(masses, low, high, outside, total)
    while high > low:
        shorter = _drop(masses, low, high, outside)
        frequencies, length = _cost(masses, *shorter, total)
        if length > cost:
            break
        (low, high, outside), best, cost = shorter, frequencies, length
    return low, best


def _drop(masses: Sequence[int], low: int, high: int, outside: int) -> tuple[int, int, int]:
    """One symbol fewer; both ends where they weigh the same, so that what is symmetric stays so."""
    if high - low > 1 and masses[low] == masses[high - 1]:
        return low + 1, high - 1, outside + 2 * masses[low]
    if masses[low] < masses[high - 1]:
        return low + 1, high, outside + masses[low]
    return low, high - 1, outside + masses[high - 1]


def _cost(masses: Sequence[int], low: int, high: int, outside: int, total: int) -> tuple[list[int], int]:
    inside = [*masses[low:high], outside]
    frequencies = allocate(inside, total)
    escape = outside * ESCAPE_BITS * _log_table(total)[2]
    return frequencies, code_length(inside, frequencies, total) + escape
