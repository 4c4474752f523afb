"""Times that can be compared: calls take turns in one process, and ratios are taken within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], object]


def interleaved(
    calls: Mapping[str, Call], rounds: int, *, dropped: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Microseconds a call took in each round that counts, the median of `repeat` calls after one another.

    The first `dropped` rounds only warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds + dropped):
            for name, call in calls.items():
                taken = []
                for _ in range(repeat):
                    began = time.perf_counter()
                    call()
                    taken.append((time.perf_counter() - began) * 1e6)
                times[name].append(statistics.median(taken))
    finally:
        gc.enable()
    return {name: taken[dropped:] for name, taken in times.items()}


def compared(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The figures of a record: medians, spread, the median ratio within a round, and the noise."""
    low, *_, high = statistics.quantiles(own, n=10) if len(own) > 1 else [*own, *own]
    return {
        "median_us": round(statistics.median(own)),
        "p10_us": round(low),
        "p90_us": round(high),
        "baseline_us": round(statistics.median(other)),
        "ratio": round(statistics.median(b / a for a, b in zip(own, other, strict=True)), 3),
        "noise": round(_noise(own), 3),
        "rounds": len(own),
    }


def _noise(times: Sequence[float]) -> float:
    """The even rounds against the odd ones: the same code twice."""
    odd = times[1::2] or times
    return abs(statistics.median(times[::2]) / statistics.median(odd) - 1)
