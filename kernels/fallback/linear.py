"""The product that torch has for weights of 4 bits on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.linear import Int4Weight


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    found: Tensor = product(rows, weight.packed, weight.group, weight.scales)
    return found.view(*x.shape[:-1], weight.shape[0])
