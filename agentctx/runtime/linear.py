"""A linear layer of a frozen model, and its twin of fewer bits for a few rows.

One row costs what reading the weights costs: a twin of 4 bits, 5/8 byte a weight, is read in less than half
the time of bfloat16. Many rows cost arithmetic, and there the twin is slower, so both are kept. The head,
which chooses between tokens, gets 8 bits: with 4 it alone costs 2 % of negative log-likelihood, and the other
layers together cost nothing (benchmarks/results/linears.json).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.linear import ROWS, Int4Weight, Int8Weight, int4_linear, int8_linear

FEW = 8  # rows up to which a twin is used
GROUP = 32  # weights of 4 bits that share a scale


class Linear:
    """`x W^T + b`, for x `[..., in]` and W `[out, in]`; up to `FEW` rows of x through `twin` if there is
    one.
    """

    __slots__ = ("bias", "twin", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.twin: Int4Weight | Int8Weight | None = None

    @property
    def fits_int4(self) -> bool:
        """Whether 4 bits can hold the weight: the product interleaves rows and cuts columns into groups."""
        rows, columns = self.weight.shape
        return rows % ROWS == 0 and columns % GROUP == 0

    def plain(self) -> Linear:
        """The same layer without its twin."""
        return Linear(self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.twin is None or x.numel() > FEW * x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        twin = self.twin
        found = int4_linear(x, twin) if isinstance(twin, Int4Weight) else int8_linear(x, twin)
        return found if self.bias is None else found + self.bias
