"""The products that torch has for weights of few bits on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.linear import Int4Weight, Int8Weight

WHOLE = 32  # columns


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    size, shape = weight.shape[0], x.shape
    rows = x if x.dim() == 2 else x.reshape(-1, shape[-1])
    if rows.dtype != torch.bfloat16 or not rows.is_contiguous():
        rows = rows.to(torch.bfloat16).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty(*shape[:-1], size)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    found: Tensor = product(rows, weight.packed, weight.group, weight.scales)
    if found.dtype != x.dtype:
        found = found.to(x.dtype)
    return found if x.dim() == 2 else found.view(*shape[:-1], size)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], len(weight.codes))
    if x.shape[-1] % WHOLE:  # torch's product ends the process there
        found = (rows @ weight.codes.to(rows.dtype).t()) * weight.scales
    else:
        found = torch.ops.aten._weight_int8pack_mm(rows, weight.codes, weight.scales)
    return found.to(x.dtype).view(*x.shape[:-1], -1)
