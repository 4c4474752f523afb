"""The product in float64 with the weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.linear import Int4Weight, Int8Weight


def dequantised(weight: Int4Weight) -> Tensor:
    """The weight `[out, in]` in float64.

    The packed layout differs between processors, so it is read through the product itself: a row that is 1 in
    one place gives that column, exactly, because nothing else is added.
    """
    rows, columns = weight.shape
    unit = torch.eye(columns, dtype=torch.float32)
    bare = torch.tensor([1.0, 0.0]).expand(columns // weight.group, rows, 2).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    codes: Tensor = product(unit, weight.packed, weight.group, bare).t().double()  # code - 8
    scale, zero = weight.scales.double().repeat_interleave(weight.group, 0).unbind(-1)
    return codes * scale.t() + zero.t()


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    return (x.double() @ dequantised(weight).t()).to(x.dtype)


def int8_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    whole = weight.codes.double() * weight.scales.double()[:, None]
    return (x.double() @ whole.t()).to(x.dtype)
