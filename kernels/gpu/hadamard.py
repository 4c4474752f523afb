"""The rotation on tensor cores: products with rows of 1 and -1, exact in bfloat16.

A float32 row is the sum of three bfloat16 rows, so its three products are right to float32. Cost: the bytes
of x once each way, 2 D FLOP an element (6 D in float32), far below what memory takes. Limits: D from 16 to
256; other sizes are left to torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import Config, arch_of, pick

CONFIGS = (
    Config(dim=128, kinds=("bf16", "fp16"), blocks={"R": 64, "N": 32}, warps=4, stages=1),
    Config(dim=64, blocks={"R": 32, "N": 32}, warps=4, stages=1),
    Config(dim=128, blocks={"R": 32, "N": 32}, warps=8, stages=1),
    Config(blocks={"R": 16, "N": 32}, warps=8, stages=1),
)


@triton.jit
def signs(first, N: tl.constexpr, D: tl.constexpr):
    # [D, N]: columns first to first + N of the matrix, not yet divided by sqrt(D)
    common = tl.arange(0, D)[:, None] & (first + tl.arange(0, N))[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1 - 2 * (common & 1)


@triton.jit
def rotated(x, first, N: tl.constexpr, D: tl.constexpr):
    # x [R, D] -> float32 [R, N], columns first to first + N of the rotated rows
    h = signs(first, N, D)
    if x.dtype == tl.float32:
        h = h.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(high, h, tl.dot(middle, h, tl.dot(low, h)))
    else:
        y = tl.dot(x, h.to(x.dtype))
    return y * (D**-0.5)


@triton.jit
def _rotate(X, Y, rows, R: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d, n = tl.arange(0, D), tl.arange(0, N)
    live = row[:, None] < rows
    x = tl.load(X + row[:, None] * D + d[None, :], mask=live, other=0)
    for first in range(0, D, N):
        y = rotated(x, first, N, D)
        tl.store(Y + row[:, None] * D + first + n[None, :], y.to(Y.dtype.element_ty), mask=live)


def hadamard(x: Tensor) -> Tensor:
    return rotate(x, x.dtype)


def rotate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The rotation of x in another dtype than its own."""
    size = x.shape[-1]
    if not 16 <= size <= 256:
        raise Uncovered(f"last dimension {size}: 16 to 256 are served")
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // size
    if rows:
        kind = {torch.float32: "fp32", torch.float16: "fp16"}.get(x.dtype, "bf16")
        row = pick(CONFIGS, arch_of(x), dim=size, kind=kind)
        grid = (triton.cdiv(rows, row.blocks["R"]),)
        _rotate[grid](x, out, rows, D=size, **row.launch | {"N": min(size, row.blocks["N"])})
    return out
