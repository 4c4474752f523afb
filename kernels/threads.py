"""How many threads a call of the C++ kernels is worth.

On an idle machine a parallel region costs microseconds; with a core busy elsewhere it costs a scheduler
quantum, thousands of microseconds. So the cost is measured, once for each process, and a call takes more
than one thread only when its estimated time is well above it. The number of threads is torch's; it is never
set here.
"""

from __future__ import annotations

import functools
import time

import torch

from agentctx.kernels.cpu import build

BYTES_PER_US = 8_000.0  # what one thread reads, a cautious figure for a server core
FLOP_PER_US = 50_000.0  # what one thread computes
WORTH = 4.0  # a region must save several times what it costs


@functools.cache
def region_overhead_us(threads: int) -> float:
    """The median cost of an empty parallel region over `threads` threads, in microseconds.

    Infinite where the best level has no library: a forced level then stays on its thread.
    """
    if build.reason(build.best()):
        return float("inf")
    region = build.load(build.best()).region
    times = []
    for _ in range(15):
        began = time.perf_counter()
        region(threads)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2] * 1e6


def worth(bytes_read: float, flop: float) -> int:
    """Threads for a call that reads `bytes_read` and computes `flop`: torch's number, or 1."""
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    single = max(bytes_read / BYTES_PER_US, flop / FLOP_PER_US)
    saved = single * (1 - 1 / threads)
    if saved < 20.0:
        return 1
    return threads if saved > WORTH * region_overhead_us(threads) else 1
