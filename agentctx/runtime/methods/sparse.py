"""What every method that reads a part of what is stored has in common: when it does, and for which rows.

A row is one new token. Whatever a row reads depends on its position and on what was stored before it, never
on the rows it is computed with: so any cut of a text into pieces, a batch, a fork and a second try give the
same. Methods that let rows share a choice while reading tie it to an absolute grid (`Dense.grid`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.dense import Dense


@dataclass(frozen=True)
class Sparse(Dense):
    """Rows at positions from `limit` on are read in part, those before see everything, as in `Dense`."""

    while_reading: ClassVar[bool] = False
    while_asking: ClassVar[bool] = False

    @property
    def writes(self) -> str:
        return f"{self!r} grid={self.grid}" if self.while_reading else ""

    @property
    @abstractmethod
    def limit(self) -> int:
        """Tokens that are always read densely."""

    @abstractmethod
    def part(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention of rows q `[1, Hq, T, D]`, the last of a sequence, all at or past the limit."""

    def serves(self, kv: LayerKV) -> bool:
        """Whether the layer may be read in part."""
        return kv.scoring.window is None

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        active = self.while_reading if kv.reading else self.while_asking
        if not active or kv.longest <= self.limit or not self.serves(kv):
            return kv.exact(q)
        if q.shape[0] == 1:
            return self._row(q, kv)
        rows = [self._row(q[row : row + 1], kv.row(row)) for row in range(q.shape[0])]
        return joined(rows, 0)

    def _row(self, q: Tensor, kv: LayerKV) -> Attention:
        """One sequence; columns before its first token are padding."""
        pad = max(0, q.shape[2] - kv.longest)
        if pad:
            found = self._row(q[:, :, pad:], kv)
            return Attention(F.pad(found.out, (0, 0, pad, 0)), F.pad(found.lse, (pad, 0), value=-torch.inf))
        dense = self.limit - (kv.longest - q.shape[2])
        if dense <= 0:
            return self.part(q, kv)
        if dense >= q.shape[2]:
            return kv.exact(q)
        before = kv.upto(self.limit).exact(q[:, :, :dense])
        return joined([before, self.part(q[:, :, dense:], kv)], 2)


def joined(parts: list[Attention], axis: int) -> Attention:
    """Attentions of different rows (axis 2) or sequences (axis 0) as one."""
    return Attention(
        torch.cat([part.out for part in parts], axis), torch.cat([part.lse for part in parts], axis)
    )


def positions(q: Tensor, kv: LayerKV) -> Tensor:
    """Where the rows of a sequence stand, int32 `[1, T]`."""
    return torch.arange(kv.longest - q.shape[2], kv.longest, dtype=torch.int32, device=q.device)[None]
