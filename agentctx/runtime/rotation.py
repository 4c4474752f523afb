"""How a layer turns queries and keys to their positions (rotary embeddings, Su et al., arXiv 2104.09864), and
how its angles are stretched for texts longer than those it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.kernels.rope import rope_move

FAST, SLOW = (
    32,
    1,
)  # turns in the trained window: YaRN keeps channels with more, stretches those with less


@dataclass(frozen=True, slots=True)
class Rotation:
    """One layer's: the first `rotary_dim` channels turn, in pairs of a `style`, by `inv_freq`.

    `rotary_dim` None is all of them, 0 a layer that does not rotate. Keys carry the factor `scaling` already;
    moving them keeps it.
    """

    inv_freq: Tensor
    style: str = "half"
    rotary_dim: int | None = None
    scaling: float = 1.0

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """x `[B, H, T, D]` at positions `old` as it would be at `new`, both int `[T]` or `[B, T]`."""
        if self.rotary_dim == 0:
            return x
        return rope_move(x, old, new, self.inv_freq, style=self.style, rotary_dim=self.rotary_dim)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Tables for `factor` times the trained window, by a rule.

    `linear`: every angle is divided (Chen et al., arXiv 2306.15595). `ntk`: a larger base, so that the
    slowest channel is divided and the fastest stays. `yarn`: each channel by its turns within the window, and
    sharper attention (Peng et al., arXiv 2309.00071).
    """

    kind: str
    factor: float

    def window(self, trained: int) -> int:
        """Tokens of the stretched window."""
        return int(trained * self.factor)

    def table(self, inv_freq: Tensor, trained: int) -> tuple[Tensor, float]:
        """The angles per position, float32 as `inv_freq [R / 2]`, and the factor on queries and on keys."""
        size = 2 * len(inv_freq)
        if self.kind == "linear":
            return inv_freq / self.factor, 1.0
        if self.kind == "ntk":
            steps = torch.arange(0, size, 2, device=inv_freq.device)
            return inv_freq * self.factor ** (-steps / (size - 2)), 1.0
        step = -math.log(float(inv_freq[1]))  # of the logarithm of the wavelength, from channel to channel
        fast, slow = (math.log(trained / (2 * math.pi * turns)) / step for turns in (FAST, SLOW))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), size - 1)
        ramp = (torch.arange(size // 2, device=inv_freq.device) - low) / max(high - low, 1e-3)
        kept = 1 - ramp.clamp(0, 1)
        return inv_freq * (kept + (1 - kept) / self.factor), 0.1 * math.log(self.factor) + 1.0
