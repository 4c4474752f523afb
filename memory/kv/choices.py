"""Which tokens of a text an evictor kept: remembered, as it may cost several readings to find out.

A bit for each token, layer and head is a two-thousandth of the keys and values in bfloat16 that it stands for
with heads of 64 channels. In memory only: in another process the blocks come from the disk and the choice is
made again.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

BUDGET = 16 << 20


class Choices:
    """Masks by name, the least recently used given up beyond `budget` bytes."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self._held: OrderedDict[str, tuple[tuple[int, ...], np.ndarray]] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        return sum(bits.nbytes for _, bits in self._held.values())

    def get(self, name: str) -> Tensor | None:
        """The mask of that name, bool."""
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        shape, bits = self._held[name]
        return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape)))).bool().view(shape)

    def put(self, name: str, mask: Tensor) -> None:
        """Remember a mask, bool of any shape; not one that is larger than the budget."""
        bits = np.packbits(mask.cpu().numpy())
        if bits.nbytes > self.budget:
            return
        self._held[name] = tuple(mask.shape), bits
        while self.used_bytes > self.budget:
            self._held.popitem(last=False)
