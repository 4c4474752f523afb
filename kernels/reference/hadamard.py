"""The rotation as a product with the whole matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matrix(size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix `[D, D]`, float64, in natural order."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(size)


def hadamard(x: Tensor) -> Tensor:
    rotated: Tensor = x.double() @ matrix(x.shape[-1]).to(x.device)
    return rotated.to(x.dtype)
