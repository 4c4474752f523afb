"""A linear layer of a frozen model, and its twin of 4 bits for a few rows.

One row costs what reading the weights costs: a twin of 5/8 byte a weight is read in less than half the time
of bfloat16. Many rows cost arithmetic, and there the twin is slower, so both are kept.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.linear import ROWS, Int4Weight, int4_linear

FEW = 8  # rows up to which the twin is faster
GROUP = 32  # weights that share a scale


class Linear:
    """`x W^T + b`, for x `[..., in]` and W `[out, in]`; up to `FEW` rows of x through `twin` if there is
    one.
    """

    __slots__ = ("bias", "twin", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.twin: Int4Weight | None = None

    @property
    def can_twin(self) -> bool:
        """Whether 4 bits can hold the weight: the product interleaves rows and cuts columns into groups."""
        rows, columns = self.weight.shape
        return rows % ROWS == 0 and columns % GROUP == 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.twin is None or x.numel() > FEW * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        found = int4_linear(x, self.twin)
        return found if self.bias is None else found + self.bias
