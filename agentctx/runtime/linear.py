"""A linear layer of a frozen model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Linear:
    """`x W^T + b`, for x `[..., in]` and W `[out, in]`."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
