"""Random sequences in shuffled pages, and right answers to them in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import Bench, Record
from torch import Tensor

from agentctx.kernels.records import KVPages

PAGE = 64


@dataclass(frozen=True)
class Shapes:
    """Head sizes and lengths of the rows; those of a dry run are as small as the kernels let them be."""

    q_heads: int = 32
    kv_heads: int = 8
    size: int = 128
    near: int = 131_072
    far: int = 1_048_576
    budget: int = 64  # blocks of a sparse step
    questions: int = 32  # rows of `attention_mass`
    nsa_tokens: int = 32_768
    nsa_heads: tuple[int, int] = (64, 4)  # the public implementation wants 16 query heads a KV head
    new_tokens: int = 16_384
    sets: int = 6

    @property
    def heads(self) -> dict[str, int]:
        return {"q_heads": self.q_heads, "kv_heads": self.kv_heads, "size": self.size}

    def record(self, tokens: int, rows: int = 1) -> Record:
        return {"B": 1, "Hq": self.q_heads, "Hkv": self.kv_heads, "D": self.size, "T": rows, "tokens": tokens}


LARGE = Shapes()
SMALL = Shapes(
    q_heads=4, kv_heads=2, size=32, near=256, far=320, budget=2, questions=2,
    nsa_tokens=128, nsa_heads=(2, 1), new_tokens=64, sets=1,
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """`sets` sequences of `tokens` tokens in one pool."""

    q: list[Tensor]  # [1, Hq, T, D]
    pool: KVPages
    tables: list[Tensor]  # [1, NB]
    lens: Tensor  # [1]

    def contiguous(self, i: int) -> tuple[Tensor, Tensor]:
        """K and V of sequence i, `[1, Hkv, N, D]`, as a stock cache holds them."""
        k, v = (
            x[self.tables[i][0].long()].transpose(0, 1).flatten(1, 2)[None]
            for x in (self.pool.k, self.pool.v)
        )
        return k, v


def noise(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)


def draw(bench: Bench, of: Shapes, tokens: int, *, sets: int, rows: int = 1) -> Sequences:
    """Fresh standard normal data in a shuffled pool."""
    blocks = tokens // PAGE
    shape = (sets * blocks, of.kv_heads, PAGE, of.size)
    pool = KVPages(noise(bench, *shape), noise(bench, *shape), PAGE, of.size)
    tables = torch.randperm(sets * blocks, device=bench.device).to(torch.int32).view(sets, 1, blocks)
    lens = torch.full((1,), tokens, dtype=torch.int32, device=bench.device)
    return Sequences([noise(bench, 1, of.q_heads, rows, of.size) for _ in range(sets)], pool, [*tables], lens)


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention in float32: q `[1, Hq, T, D]`, k and v `[1, Hkv, N, D]`, `seen [Hkv, T, N]`."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for h in range(k.shape[1]):
        rows = q[0, h * group : (h + 1) * group].float()
        scores = rows @ k[0, h].float().T * q.shape[3] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[h], float("-inf"))
        heads.append(scores.softmax(-1) @ v[0, h].float())
    return torch.cat(heads)[None]
