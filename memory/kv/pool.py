"""Pages of keys and values for every layer of a model, within a budget of bytes that is never exceeded.

A page id stands for the same 64 tokens in every layer, so a sequence has one table, not one for each layer.
The memory is reserved at once and committed by the system page by page as it is first written: it starts as
zeros, grows without a copy, and what is not used costs nothing. Pages are shared by reference counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.store import pack_pages, unpack_pages
from agentctx.memory.errors import ModelError

PAGE_TOKENS = 64
_BITS = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True)
class KVShape:
    """The keys and values of one token: `layers` times `kv_heads` times `head_dim`, for each of K and V."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.token_bytes

    @property
    def format(self) -> str:
        """Packed on a CPU that has kernels for it, else plain."""
        fits = self.dtype in (torch.float32, torch.bfloat16) and self.head_dim % 2 == 0
        return "packed" if self.device == "cpu" and fits else "paged"


class PagePool:
    """`layers[i]` holds the pages of layer i. Not safe for several threads at once: its engine has one.

    Raises ModelError (out_of_memory) where `budget` bytes do not hold the pages that are asked for.
    """

    def __init__(self, shape: KVShape, *, budget: int) -> None:
        self.shape = shape
        self.capacity = budget // shape.page_bytes
        self.budget = budget
        self._free: list[int] = []
        if self.capacity < 1:
            raise self._full(1)
        inner = (PAGE_TOKENS, shape.head_dim)
        size = (self.capacity, shape.layers, shape.kv_heads)
        self._size = (*size, prod(inner)) if shape.format == "packed" else (*size, *inner)
        self._k, self._v = self._zeros(), self._zeros()  # a page of all layers in one piece
        self.layers = tuple(
            KVPages(self._k[:, layer], self._v[:, layer], PAGE_TOKENS, shape.head_dim, shape.format)
            for layer in range(shape.layers)
        )
        self.tiles = KVPages(  # of one layer and head each: tile (page * layers + layer) * Hkv + head
            self._k.flatten(0, 2)[:, None],
            self._v.flatten(0, 2)[:, None],
            PAGE_TOKENS,
            shape.head_dim,
            shape.format,
        )
        self._references = [0] * self.capacity
        self._free = list(range(self.capacity - 1, -1, -1))  # the lowest ids first: the least is committed
        self.spare: Callable[[int], None] | None = None  # asked to release pages when too few are free

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def used_pages(self) -> int:
        return self.capacity - len(self._free)

    @property
    def used_bytes(self) -> int:
        return self.used_pages * self.shape.page_bytes

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each; all or none."""
        if count > len(self._free) and self.spare:
            self.spare(count)
        if count > len(self._free):
            raise self._full(count)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page; a page without any is free."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._references[page] > 1

    def copy(self, source: int, target: int) -> None:
        """Copy a page in every layer."""
        self._k[target] = self._k[source]
        self._v[target] = self._v[source]

    def read(self, page: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of the first tokens of a page, `[layers, Hkv, tokens, D]`, in plain order."""
        pages = self._page(page)
        if pages.format == "packed":
            pages = unpack_pages(pages)
        return pages.k[:, :, :tokens], pages.v[:, :, :tokens]

    def write(self, page: int, k: Tensor, v: Tensor) -> None:
        """Fill a page from its beginning with K and V `[layers, Hkv, tokens, D]` in plain order."""
        room = (0, 0, 0, PAGE_TOKENS - k.shape[2])
        pages = KVPages(F.pad(k, room), F.pad(v, room), PAGE_TOKENS, self.shape.head_dim)
        if self.shape.format == "packed":
            pages = pack_pages(pages)
        self._k[page], self._v[page] = pages.k, pages.v

    def fill(self, tiles: Tensor, k: Tensor, v: Tensor) -> None:
        """Fill `tiles [n]`, ids of `self.tiles`, with K and V `[tokens, D]` in plain order, 64 n or fewer."""
        room = (0, 0, 0, len(tiles) * PAGE_TOKENS - len(k))
        size = (len(tiles), 1, PAGE_TOKENS, self.shape.head_dim)
        pages = KVPages(F.pad(k, room).view(size), F.pad(v, room).view(size), PAGE_TOKENS, size[-1])
        if self.shape.format == "packed":
            pages = pack_pages(pages)
        self.tiles.k[tiles.long()], self.tiles.v[tiles.long()] = pages.k, pages.v

    def _page(self, page: int) -> KVPages:
        """The layers of one page as the pages of a pool."""
        return KVPages(self._k[page], self._v[page], PAGE_TOKENS, self.shape.head_dim, self.shape.format)

    def _zeros(self) -> Tensor:
        if self.shape.device != "cpu":
            return torch.zeros(self._size, dtype=self.shape.dtype, device=self.shape.device)
        try:  # torch.zeros would commit all of it
            lazy = np.zeros(self._size, dtype=_BITS[self.shape.dtype.itemsize])
        except MemoryError as error:
            raise ModelError(
                f"the system does not reserve {self.budget / 1e9:.1f} GB for KV",
                code="out_of_memory",
                hint="lower memory_bytes",
            ) from error
        return torch.from_numpy(lazy).view(self.shape.dtype)

    def _full(self, wanted: int) -> ModelError:
        tokens = len(self._free) * PAGE_TOKENS
        return ModelError(
            f"the KV memory of {self.budget / 1e6:,.0f} MB has room for {tokens:,} more tokens, "
            f"{wanted * PAGE_TOKENS:,} are needed",
            code="out_of_memory",
            hint="raise memory_bytes, close readings, or read less at once",
        )
