"""Chosen tokens that come before what a sequence holds in its own table.

What an evictor leaves (other tokens in every layer and head), what is left when spans are dropped (the same
ones everywhere) and several readings side by side are one thing: tiles of 64 tokens of one layer and KV head,
in no order that matters, all of them visible to every later token. Tiles lie in pages of the pool, which
serve as bags of them, so heads of different lengths cost what they hold. A past never changes and is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.store import unpack_pages
from agentctx.memory.kv.pool import PAGE_TOKENS, PagePool
from agentctx.memory.kv.table import BlockTable


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """`tiles [layers, Hkv, NT]` and how many tokens they hold, `lens [layers, Hkv]`, both int32: every tile
    is full but the last of a head. The next token stands at position `end`.

    Who has one holds a reference to each of `pages`: made by `over` and `gather`, added by `share`.
    """

    pool: PagePool
    tiles: Tensor
    lens: Tensor
    end: int
    pages: tuple[int, ...]
    longest: int  # the largest of `lens`
    same: bool = True  # every layer and head holds the same tokens

    @classmethod
    def over(cls, table: BlockTable) -> Past:
        """All that a table holds now, where it lies: nothing is copied.

        Who appends to the table afterwards copies its open page first, as with any fork.
        """
        pool, shape = table.pool, table.pool.shape
        pages = table.pages[: -(-table.tokens // PAGE_TOKENS)]
        heads = torch.arange(shape.layers * shape.kv_heads, dtype=torch.int32)
        ids = torch.tensor(pages or [0], dtype=torch.int32)
        tiles = (ids[None] * len(heads) + heads[:, None]).view(shape.layers, shape.kv_heads, -1)
        lens = torch.full((shape.layers, shape.kv_heads), table.tokens, dtype=torch.int32)
        pool.share(pages)
        place = shape.device
        return cls(pool, tiles.to(place), lens.to(place), table.tokens, tuple(pages), table.tokens)

    def share(self) -> Past:
        """The same for one more holder, who closes it."""
        self.pool.share(self.pages)
        return self

    def close(self) -> None:
        """Give up one holder's references."""
        self.pool.release(self.pages)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer in plain order, `[Hkv, 64 NT, D]`; `lens[layer, h]` of head h count."""
        flat, tiles = self.pool.tiles, self.tiles[layer]
        ids = tiles.flatten().long()
        found = KVPages(flat.k[ids], flat.v[ids], PAGE_TOKENS, flat.head_dim, flat.format)
        if found.format == "packed":
            found = unpack_pages(found)
        size = (tiles.shape[0], -1, flat.head_dim)
        return found.k.reshape(size), found.v.reshape(size)
