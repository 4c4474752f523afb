"""What figures depend on: the machine, the versions, the load. And the memory a piece of work took."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentctx import __version__

PEERS = ("torch", "transformers", "llama-cpp-python")


def environment() -> dict[str, Any]:
    """Date, commit, device, versions, threads: what every result is written with."""
    import torch

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": {
            "name": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "load": load(),
        },
        "versions": {"agentctx": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PEERS},
        "threads": torch.get_num_threads(),
    }


def forget_peak() -> None:
    """Count the peak from now on, where the system allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int | None:
    """The most memory that this process held since `forget_peak`; None where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def load() -> float:
    """Processes that want to run, the mean of a minute: above the threads in use, times mean less."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """Of the source tree, empty for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=root, check=False
    )
    return said.stdout.strip()
