"""Random sequences: contiguous K and V as a stock cache holds them, and the same in shuffled pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.store import pack_pages

Q_HEADS, KV_HEADS, SIZE, PAGE = 9, 3, 64, 64
GROUP = Q_HEADS // KV_HEADS
HEADS = {"q_heads": Q_HEADS, "kv_heads": KV_HEADS, "size": SIZE}


@dataclass(frozen=True)
class Sequences:
    """`sets` sequences of `tokens` tokens in one pool."""

    q: list[Tensor]  # [1, Hq, T, D]
    k: list[Tensor]  # [1, Hkv, N, D]
    v: list[Tensor]
    paged: KVPages
    packed: KVPages
    tables: list[Tensor]  # [1, NB]
    lens: Tensor  # [1]

    @property
    def tokens(self) -> int:
        return self.k[0].shape[2]

    @property
    def blocks(self) -> int:
        return self.tokens // PAGE

    @property
    def shape(self) -> dict[str, int]:
        heads = {"B": 1, "Hq": Q_HEADS, "Hkv": KV_HEADS, "D": SIZE}
        return {**heads, "T": self.q[0].shape[2], "tokens": self.tokens}


def draw(tokens: int, dtype: torch.dtype, sets: int, rows: int = 1) -> Sequences:
    """Fresh random data, seeded; every value standard normal."""
    generator = torch.Generator().manual_seed(tokens)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    blocks = tokens // PAGE
    at = torch.randperm(sets * blocks, generator=generator)
    q = [noise(1, Q_HEADS, rows, SIZE) for _ in range(sets)]
    k = [noise(1, KV_HEADS, tokens, SIZE) for _ in range(sets)]
    v = [noise(1, KV_HEADS, tokens, SIZE) for _ in range(sets)]
    paged = KVPages.empty(sets * blocks, KV_HEADS, SIZE, dtype=dtype)
    for own, pool in ((k, paged.k), (v, paged.v)):
        for i, x in enumerate(own):
            pool[at[i * blocks : (i + 1) * blocks]] = x[0].view(KV_HEADS, blocks, PAGE, SIZE).transpose(0, 1)
    tables = list(at.to(torch.int32).view(sets, 1, blocks))
    return Sequences(q, k, v, paged, pack_pages(paged), tables, torch.tensor([tokens], dtype=torch.int32))


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention in float64: q `[H, T, D]`, k and v `[N, D]`, `seen [T, N]`; all H heads share k and v."""
    scores = q.double() @ k.double().T * SIZE**-0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v.double()
