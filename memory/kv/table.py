"""Which pages hold a sequence, in order. Forks share pages; a page is copied when a second owner writes to
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agentctx.memory.kv.pool import PAGE_TOKENS, PagePool


class BlockTable:
    """The pages of one sequence and how many of their tokens are held."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.tokens = 0
        self.pages: list[int] = []
        self.ids = torch.zeros(1, dtype=torch.int32)  # the pages, at least one entry; never changed in place

    def reserve(self, tokens: int) -> None:
        """Own room for `tokens` tokens in all: new pages, and a copy of the open page if it is shared.

        Raises ModelError (out_of_memory); then nothing has changed.
        """
        wanted = -(-tokens // PAGE_TOKENS)
        split = bool(self.tokens % PAGE_TOKENS) and not self.pool.claim(
            self.pages[self.tokens // PAGE_TOKENS]
        )
        missing = max(0, wanted - len(self.pages))
        if not split and not missing:
            return
        fresh = self.pool.take(missing + split)
        if split:
            at, own = self.tokens // PAGE_TOKENS, fresh.pop()
            self.pool.copy(self.pages[at], own)
            self.pool.release([self.pages[at]])
            self.pages[at] = own
        self.pages += fresh
        self._publish()

    def append(self, page: int, tokens: int) -> None:
        """Go on with a page that others hold as well; `tokens` are held then in all."""
        self.pool.share([page])
        self.pages.append(page)
        self.tokens = tokens
        self._publish()

    def adopt(self, pages: Sequence[int], tokens: int) -> None:
        """Begin with pages that others hold as well."""
        self.pool.share(pages)
        self.pages, self.tokens = list(pages), tokens
        self._publish()

    def read(self, first: int) -> tuple[Tensor, Tensor]:
        """K and V of its tokens from `first` on, `[layers, Hkv, n, D]`; n is 1 or more."""
        page, skip = divmod(first, PAGE_TOKENS)
        found = [self.pool.read(one, PAGE_TOKENS) for one in self.pages[page:]]
        size = self.tokens - first
        k, v = (torch.cat(x, 2)[:, :, skip : skip + size] for x in zip(*found, strict=True))
        return k, v

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Go on with tokens whose K and V `[layers, Hkv, n, D]` are known.

        Raises ModelError (out_of_memory); then nothing has changed.
        """
        first, before = divmod(self.tokens, PAGE_TOKENS)
        tokens = self.tokens + k.shape[2]
        self.reserve(tokens)
        if before:
            head = self.pool.read(self.pages[first], before)
            k, v = (torch.cat(x, 2) for x in zip(head, (k, v), strict=True))
        for number, start in enumerate(range(0, k.shape[2], PAGE_TOKENS), first):
            piece = slice(start, start + PAGE_TOKENS)
            self.pool.write(self.pages[number], k[:, :, piece], v[:, :, piece])
        self.tokens = tokens
        self.pool.filled(self.pages[: tokens // PAGE_TOKENS])

    def crop(self, tokens: int) -> None:
        """Forget what is beyond the first `tokens`."""
        keep = -(-tokens // PAGE_TOKENS)
        self.pool.release(self.pages[keep:])
        self.pages, self.tokens = self.pages[:keep], min(self.tokens, tokens)
        self._publish()

    def fork(self) -> BlockTable:
        """A second sequence with the same past; no token is copied."""
        twin = BlockTable(self.pool)
        twin.adopt(self.pages[: -(-self.tokens // PAGE_TOKENS)], self.tokens)
        return twin

    def close(self) -> None:
        """Give the pages back."""
        self.crop(0)

    def _publish(self) -> None:
        self.ids = torch.tensor(self.pages or [0], dtype=torch.int32)


def stacked(tables: Sequence[BlockTable]) -> Tensor:
    """The tables of a batch as int32 `[B, NB]`; short rows are filled with page 0, which lengths hide."""
    if len(tables) == 1:
        return tables[0].ids[None]
    width = max(len(table.ids) for table in tables)
    rows = torch.zeros(len(tables), width, dtype=torch.int32)
    for row, table in zip(rows, tables, strict=True):
        row[: len(table.ids)] = table.ids
    return rows
