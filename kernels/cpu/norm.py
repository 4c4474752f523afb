"""The norm in C++: float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered


def rms_norm(lib: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Uncovered(f"rows of {x.dtype}")
    team = threads.worth(2.0 * x.numel() * x.element_size(), 5.0 * x.numel())
    found: Tensor = lib.rms_norm(x.contiguous(), weight.contiguous(), eps, team)
    return found
