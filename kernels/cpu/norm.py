"""Norm and gate in C++: float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered


def rms_norm(lib: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    found: Tensor = lib.rms_norm(_served(x), weight.contiguous(), eps, _team(x, 5.0))
    return found


def silu_gate(lib: Any, x: Tensor) -> Tensor:
    found: Tensor = lib.silu_gate(_served(x), _team(x, 15.0))
    return found


def _served(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Uncovered(f"rows of {x.dtype}")
    return x.contiguous()


def _team(x: Tensor, flop: float) -> int:
    """Threads; `flop` for each element."""
    count = x.numel()
    return threads.worth(2.0 * count * x.element_size(), flop * count)
