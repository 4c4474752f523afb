"""A step as a CUDA graph: its launches are recorded once and then started as one.

A sparse decode step is a handful of kernels of some microseconds each; started one by one, the host is slower
than they are. The operations of this folder read no tensor on the host and allocate by shapes alone, so any
sequence of them can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from agentctx.kernels.errors import KernelUnavailable

Result = TypeVar("Result")


def captured(step: Callable[[], Result], *, warm: int = 2) -> Callable[[], Result]:
    """Record `step`, which must do the same work whatever its tensors hold; what comes back replays it.

    A replay reads the tensors that `step` read, where they were: write the next query and the next lengths
    into them in place. It returns the very tensors that the recorded call returned, overwritten; they live as
    long as the function. `warm` calls before the recording compile kernels and fill caches. All tensors must
    be on the current device.

    Raises KernelUnavailable without a GPU, RuntimeError where `step` waits for the GPU or copies from it.
    """
    if not torch.cuda.is_available():
        raise KernelUnavailable("captured: no NVIDIA GPU")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Result:
        graph.replay()
        return result

    return replay
