"""How much memory there is, and the many ways of a system to say that it is used up."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 0.6  # of what is free when a model is loaded


def spare_bytes(device: str) -> int:
    """What weights and KV together may take by default: 60 % of what is free on `device` now."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0] * SHARE)
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        return int(int(lines["MemAvailable"].split()[0]) * 1024 * SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * SHARE / 2)


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, CUDA's and the CPU allocator's ways of saying so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
