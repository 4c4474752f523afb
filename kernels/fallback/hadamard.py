"""The rotation by butterflies, log2 D of them over the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    size = x.shape[-1]
    y: Tensor = x.float()
    step = 1
    while step < size:
        low, high = y.reshape(*x.shape[:-1], size // (2 * step), 2, step).unbind(-2)
        y = torch.stack((low + high, low - high), -2)
        step *= 2
    return y.reshape(x.shape).mul(size**-0.5).to(x.dtype)
