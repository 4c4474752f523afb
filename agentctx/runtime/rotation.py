"""How a layer turns queries and keys to their positions (rotary embeddings, Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agentctx.kernels.rope import rope_move


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
