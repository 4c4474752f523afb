"""The pages of texts that were read, by the names of their blocks: what begins alike is read once.

This holds a reference to every page it knows and gives up the least recently used when the pool runs out, so
it takes what memory is left and never what a sequence needs. (vLLM calls it automatic prefix caching.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from agentctx.memory.kv.chain import Block
from agentctx.memory.kv.pool import PagePool


class PrefixIndex:
    """Names of blocks to pages of one pool."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._pages: OrderedDict[str, int] = OrderedDict()
        pool.spare = self.free

    def get(self, name: str) -> int | None:
        """The page of a block."""
        return self._pages.get(name)

    def used(self, names: Sequence[str]) -> None:
        """These blocks of one text, in its order, were used now. Its end is given up before its beginning,
        without which it would be worth nothing.
        """
        for name in reversed(names):
            if name in self._pages:
                self._pages.move_to_end(name)

    def add(self, blocks: Iterable[Block], pages: Sequence[int]) -> None:
        """Know these blocks; what is known already stays."""
        for block, page in zip(blocks, pages, strict=True):
            if block.name not in self._pages:
                self._pages[block.name] = page
                self.pool.share([page])

    def free(self, wanted: int) -> None:
        """Give up pages that nobody else holds, the least recently used first, until `wanted` are free."""
        for name, page in list(self._pages.items()):
            if self.pool.free_pages >= wanted:
                return
            if not self.pool.shared(page):
                del self._pages[name]
                self.pool.release([page])

    def clear(self) -> None:
        """Forget everything."""
        self.pool.release(self._pages.values())
        self._pages.clear()
