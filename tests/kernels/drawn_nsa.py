"""Random cases of native sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels.nsa import nsa_forward
from agentctx.kernels.records import KVPages


class Problem:
    """Random queries, compressed keys, pages of both branches, gates."""

    def __init__(
        self,
        *,
        batch: int = 1,
        kv_heads: int = 1,
        group: int = 1,
        rows: int = 1,
        size: int = 32,
        tokens: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n_blocks = -(-tokens // 64)
        n_compressed = max(0, (tokens - 32) // 16 + 1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        def pages() -> KVPages:
            return KVPages(
                noise(batch * n_blocks, kv_heads, 64, size),
                noise(batch * n_blocks, kv_heads, 64, size),
                64,
                size,
            )

        self.q = noise(batch, kv_heads * group, rows, size)
        self.cmp = (noise(batch, kv_heads, n_compressed, size), noise(batch, kv_heads, n_compressed, size))
        self.slc, self.win = pages(), pages()
        self.gates = torch.rand(batch, kv_heads * group, rows, 3, generator=generator).to(dtype)
        self.offset = tokens - rows

    def run(self, **options: Any) -> Any:
        options = {"q_offset": self.offset, "validate": True} | options
        return nsa_forward(self.q, self.cmp, self.slc, self.win, self.gates, **options)
