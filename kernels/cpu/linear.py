"""The product of 8 bits in C++: float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.linear import Int8Weight


def int8_linear(lib: Any, x: Tensor, weight: Int8Weight) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Uncovered(f"rows of {x.dtype}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    codes = weight.codes.contiguous()
    team = threads.worth(codes.numel(), 2.0 * codes.numel() * len(rows))
    found: Tensor = lib.int8_linear(rows, codes, weight.scales.contiguous(), team)
    return found.view(*x.shape[:-1], -1) if len(rows) else x.new_empty(*x.shape[:-1], len(codes))
