"""Linear layers with weights of 4 bits, on the CPU: what one row costs is the reading of its weights.

    y = x W^T,   W = (code - 8) scale + zero,   code in 0..15, a scale and a zero for each group of a row

Cost with groups of 32 and scales of 16 bits: 5/8 byte a weight, 2 FLOP a weight and row. The product is
torch's own (`_weight_int4pack_mm_for_cpu`); it pays for up to about eight rows, above that a matrix product
in bfloat16 is faster. Limits: `out` a multiple of 16, `in` of the group, groups of 32, 64, 128 or 256; x in
the dtype that the scales were packed for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentctx.kernels import checks, choose

GROUPS = (32, 64, 128, 256)
ROWS = 16  # the packed layout interleaves so many rows


class Int4Weight(NamedTuple):
    """A weight `[out, in]`: `packed` uint8 in torch's layout for this processor, not to be stored on disk;
    `scales [in / group, out, 2]`, scale and zero, in the dtype of the activations it serves.
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int


def pack_int4(weight: Tensor, *, group: int = 32, dtype: torch.dtype | None = None) -> Int4Weight:
    """Quantise `weight [out, in]`: each group's extremes become codes 0 and 15.

    `dtype` of the activations, None: that of the weight. Raises ValueError for shapes that torch's product
    cannot serve.
    """
    checks.tensor("weight", weight, 2)
    checks.floats("weight", weight)
    _fits("weight", weight, group)
    groups = weight.float().view(weight.shape[0], -1, group)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    step = torch.where(scale > 0, scale, 1.0)
    codes = ((groups - low.unsqueeze(2)) / step.unsqueeze(2)).round().clamp(0, 15)
    codes = codes.to(torch.int32).view(weight.shape)
    return _packed(codes, scale, low, group, dtype or weight.dtype)


def pack_int4_groups(
    codes: Tensor, scales: Tensor, minima: Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> Int4Weight:
    """Repack weights that are codes already: value = code * scale + minimum.

    `codes` uint8 `[out, in]`, 0 to 15; `scales` and `minima` float `[out, in / group]`, which gives the group.
    GGUF: Q4_1 as it is, Q4_0 with minimum -8 scale. `dtype` of the activations; nothing is lost but the
    rounding of scales and zeros to it.

    Raises ValueError for shapes that torch's product cannot serve, or codes above 15.
    """
    checks.tensor("codes", codes, 2)
    checks.tensor("scales", scales, 2)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes is {codes.dtype}: torch.uint8 is needed")
    checks.tensor("minima", minima, 2)
    rows, count = scales.shape
    if minima.shape != scales.shape or rows != codes.shape[0] or count == 0 or codes.shape[1] % count:
        shapes = f"codes is {list(codes.shape)}, scales {list(scales.shape)}, minima {list(minima.shape)}"
        raise ValueError(f"{shapes}: [out, in] and twice [out, in / group] are needed")
    group = codes.shape[1] // count
    _fits("codes", codes, group)
    if int(codes.max()) > 15:
        raise ValueError(f"codes reach {int(codes.max())}: 0 to 15 is needed, a byte for each")
    return _packed(codes.to(torch.int32), scales.float(), minima.float(), group, dtype)


def int4_linear(x: Tensor, weight: Int4Weight, *, impl: str | None = None) -> Tensor:
    """x `[..., in]` times the transpose of `weight`: `[..., out]` in the dtype of x.

    Raises ValueError for another last dimension, device, or a dtype that the weight was not packed for.
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Int4Weight):
        raise TypeError(f"x is {type(x).__name__}, weight {type(weight).__name__}: Tensor and Int4Weight")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: [..., in] and [out, in]")
    scales = weight.scales
    if x.dtype != scales.dtype:
        raise ValueError(f"x is {x.dtype}: this weight was packed for {scales.dtype}, see dtype= of pack_int4")
    if x.device != scales.device:
        raise ValueError(f"x is on {x.device}, weight on {scales.device}: move one of them")
    found: Tensor = choose.run("int4_linear", impl, x.device, x, weight)
    return found


def _fits(name: str, value: Tensor, group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group is {group}: use one of {GROUPS}")
    rows, columns = value.shape
    if rows == 0 or rows % ROWS or columns == 0 or columns % group:
        raise ValueError(
            f"{name} is {list(value.shape)}: rows in multiples of {ROWS}, columns of the group {group}"
        )
    if value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device}: int4 weights are for the CPU")


def _packed(codes: Tensor, scale: Tensor, low: Tensor, group: int, dtype: torch.dtype) -> Int4Weight:
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype is {dtype}: bfloat16, float16 or float32 is needed")
    zero = low + 8 * scale
    scales = torch.stack([scale.t(), zero.t()], -1).to(dtype).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return Int4Weight(packed, scales, (codes.shape[0], codes.shape[1]), group)
