"""The rotation in C++ (`src/hadamard.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered


def hadamard(lib: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        raise Uncovered("float16")
    if not 16 <= x.shape[-1] <= 1024:
        raise Uncovered(f"last dimension {x.shape[-1]}: 16 to 1024 are served")
    many = threads.worth(2 * x.numel() * x.element_size(), 10 * x.numel())
    rotated: Tensor = lib.hadamard(x.contiguous(), many)
    return rotated
