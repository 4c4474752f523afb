"""The Walsh-Hadamard rotation: spreads a channel that sticks out over all channels before they are coded.

    y = H x / sqrt(D),   H[i, j] = (-1) ** popcount(i & j)

It is its own inverse and keeps dot products. Cost: `D log2 D` additions a vector, bound by memory. Limits:
D a power of two.
"""

from __future__ import annotations

from torch import Tensor

from agentctx.kernels import checks, choose


def hadamard(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Rotate `x [..., D]` along its last dimension; the result has the shape and dtype of x.

    Raises ValueError unless D is a power of two and x is bfloat16, float16 or float32.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}: a tensor is needed")
    checks.floats("x", x)
    size = x.shape[-1] if x.dim() else 0
    if size < 1 or size & (size - 1):
        raise ValueError(f"x is {list(x.shape)}: a last dimension that is a power of two is needed")
    rotated: Tensor = choose.run("hadamard", impl, x.device, x)
    return rotated
