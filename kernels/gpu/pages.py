"""One page of one head as a tile of float32, whatever the format of the pool; shared by several kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import KVPages


def served(kv: KVPages) -> None:
    """Raise Uncovered for pools that no GPU kernel reads."""
    if kv.format == "packed":
        raise Uncovered("packed pages are a layout of the CPU")
    if kv.head_dim > 256:
        raise Uncovered(f"head size {kv.head_dim}: up to 256 is served")


@triton.jit
def load_tile(
    X,  # the page of the head
    scales,  # [D], read where the pool is quantised
    tokens,  # [N]
    channels,  # [DP]
    live,  # [N], tokens to read; the others are 0
    PAGE: tl.constexpr,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # V of quantised pools lies as [D, page]
):
    # [N, DP] in float32
    width: tl.constexpr = D // 2 if FORMAT == "int4" else D
    place = channels % width if FORMAT == "int4" else channels
    inside = live[:, None] & (channels < D)[None, :]
    if TRANSPOSED:  # Triton takes no conditional expression of tensors
        at = place[None, :] * PAGE + tokens[:, None]
    else:
        at = tokens[:, None] * width + place[None, :]
    x = tl.load(X + at, mask=inside, other=0)
    if FORMAT != "paged":
        if FORMAT == "int4":
            byte = x.to(tl.int32)  # 0 to 255; the nibble's sign goes up to bit 31 and comes back
            x = tl.where((channels < width)[None, :], byte << 28, byte << 24) >> 28
        scale = tl.load(scales + channels, mask=channels < D, other=0).to(tl.float32)
        return x.to(tl.float32) * scale[None, :]
    return x.to(tl.float32)
