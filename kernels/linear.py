"""Linear layers with weights of few bits, on the CPU: what one row costs is the reading of its weights.

    y = x W^T,   int4: W = (code - 8) scale + zero, code in 0..15, scale and zero for a group of a row
                 int8: W = code scale, code in -128..127, a scale for a row

Cost with groups of 32 and scales of 16 bits: 5/8 byte a weight, 2 FLOP a weight and row. The product is
torch's own (`_weight_int4pack_mm_for_cpu`); it pays for up to about eight rows, above that a matrix product
in bfloat16 is faster. It works in bfloat16 whatever the dtype of x: with float32 inside it is many times
slower than a plain product. Limits: `out` a multiple of 16, `in` of the group, groups of 32, 64, 128 or 256.
With 8 bits, a byte a weight, there are none; C++ serves float32 and bfloat16, torch works in bfloat16.
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
    `scales` bfloat16 `[in / group, out, 2]`, scale and zero.
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]
    group: int


class Int8Weight(NamedTuple):
    """A weight `[out, in]`: `codes` int8, `scales` bfloat16 `[out]`."""

    codes: Tensor
    scales: Tensor


def pack_int4(weight: Tensor, *, group: int = 32) -> Int4Weight:
    """Quantise `weight [out, in]`: each group's extremes become codes 0 and 15.

    Raises ValueError for shapes that torch's product cannot serve.
    """
    checks.tensor("weight", weight, 2)
    checks.floats("weight", weight)
    _fits("weight", weight, group)
    groups = weight.float().reshape(weight.shape[0], -1, group)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    # Codes are those nearest under the rounded scale and zero.
    step, zero = (x.to(torch.bfloat16).float().unsqueeze(2) for x in (scale, low + 8 * scale))
    codes = ((groups - zero) / torch.where(step > 0, step, 1.0)).round().clamp(-8, 7) + 8
    codes = codes.to(torch.int32).view(weight.shape)
    return _packed(codes, scale, low, group)


def pack_int4_groups(codes: Tensor, scales: Tensor, minima: Tensor) -> Int4Weight:
    """Repack weights that are codes already: value = code * scale + minimum.

    `codes` uint8 `[out, in]`, 0 to 15; `scales` and `minima` float `[out, in / group]`, which gives the
    group. GGUF: Q4_1 as it is, Q4_0 with minimum -8 scale. Nothing is lost but the rounding of scales and
    zeros to bfloat16.

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
    return _packed(codes.to(torch.int32), scales.float(), minima.float(), group)


def int4_linear(x: Tensor, weight: Int4Weight, *, impl: str | None = None) -> Tensor:
    """x `[..., in]` times the transpose of `weight`: `[..., out]` in the dtype of x.

    The product is made in bfloat16. Raises ValueError for another last dimension, dtype or device.
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Int4Weight):
        raise TypeError(f"x is {type(x).__name__}, weight {type(weight).__name__}: Tensor and Int4Weight")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: [..., in] and [out, in]")
    checks.floats("x", x)
    if x.device != weight.scales.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.scales.device}: move one of them")
    found: Tensor = choose.run("int4_linear", impl, x.device, x, weight)
    return found


def pack_int8(weight: Tensor) -> Int8Weight:
    """Quantise `weight [out, in]`: the largest of each row becomes 127."""
    checks.tensor("weight", weight, 2)
    checks.floats("weight", weight)
    largest = weight.abs().amax(1, keepdim=True).float()
    scales = (largest / 127).to(torch.bfloat16)
    codes = weight / torch.where(scales > 0, scales, 1).float()
    return Int8Weight(codes.round_().clamp_(-128, 127).to(torch.int8), scales[:, 0].contiguous())


def int8_linear(x: Tensor, weight: Int8Weight, *, impl: str | None = None) -> Tensor:
    """x `[..., in]` times the transpose of `weight`: `[..., out]` in the dtype of x.

    Raises ValueError for another last dimension, dtype or device, TypeError for no tensor or weight.
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Int8Weight):
        raise TypeError(f"x is {type(x).__name__}, weight {type(weight).__name__}: Tensor and Int8Weight")
    if x.dim() == 0 or x.shape[-1] != weight.codes.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.codes.shape)}: [..., in] and [out, in]")
    checks.floats("x", x)
    if x.device != weight.codes.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.codes.device}: move one of them")
    found: Tensor = choose.run("int8_linear", impl, x.device, x, weight)
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


def _packed(codes: Tensor, scale: Tensor, low: Tensor, group: int) -> Int4Weight:
    zero = low + 8 * scale
    scales = torch.stack([scale.t(), zero.t()], -1).to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return Int4Weight(packed, scales, (codes.shape[0], codes.shape[1]), group)
