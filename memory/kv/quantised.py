"""A pool whose full pages are held in 8 or 4 bits: within the same bytes, about two or four times the tokens.

After KIVI (Liu et al., arXiv 2402.02750), which leaves the latest tokens as they are, because they are read
most: a page begins open, in the model's dtype. It is sealed, turned into codes and scales, when it is full
and lies further back than the last `LOCAL` blocks of its sequence, or earlier if open pages run out. (KIVI
has scales for each token of the values; here they are for each channel, as `kernels.quant` has them.)

For a pass, each layer's pages are decoded into a scratch of the plain layout, one layer at a time, so that
every attention method works on them and summaries are of decoded values. What is saved is memory; a step
decodes all that its sequences hold, whatever the method reads of it. The scratch, as much as one layer of
that takes plainly, is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages
from agentctx.kernels.store import pack_pages
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.dtype import KVDtype
from agentctx.memory.kv.pool import PAGE_TOKENS, KVShape, PagePool

LOCAL = 4  # blocks behind the open one that stay as they are
OPEN_SHARE = 16  # one page in so many of a pool of the plain kind
LEAST_OPEN = 24  # a pass of 512 tokens, the local blocks, and forks


PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pool_of(shape: KVShape, *, budget: int, kv_dtype: KVDtype = "auto") -> PagePool:
    """A pool for a model of a shape; "auto" is the dtype that the model computes in.

    Raises ConfigError for another plain dtype than that, or what is none; ModelError (out_of_memory) for a
    budget below a page.
    """
    if kv_dtype in ("int8", "int4"):
        return QuantisedPool(shape, budget=budget, bits=8 if kv_dtype == "int8" else 4)
    if kv_dtype != "auto" and PLAIN.get(kv_dtype) != shape.dtype:
        raise ConfigError(
            f"kv_dtype is {kv_dtype!r}, the model computes in {str(shape.dtype).removeprefix('torch.')}",
            hint=f"one of {', '.join(get_args(KVDtype))}; auto is what the model computes in",
        )
    return PagePool(shape, budget=budget)


class Where(NamedTuple):
    """Where the pages of a batch are during a pass: `sealed` ids, `slots` of open ones, and its tables.

    `seen [B, NB]` numbers the sealed ones first; `written [B, NB]` are slots.
    """

    sealed: Tensor
    slots: Tensor
    seen: Tensor
    written: Tensor


class QuantisedPool(PagePool):
    """Pages of 8 or 4 `bits`; open ones in the dtype of `shape`. Everything else as in `PagePool`."""

    unsettled = (LOCAL + 1) * PAGE_TOKENS

    def __init__(self, shape: KVShape, *, budget: int, bits: int) -> None:
        width = shape.head_dim * bits // 8
        held = budget // shape.page_bytes
        slots = min(max(held // OPEN_SHARE, LEAST_OPEN), held // 2)
        self._sealable: dict[int, None] = {}  # open pages that are full, the first to be so first
        self._slots: list[int] = []  # free ones
        self._slot: dict[int, int] = {}  # of open pages
        super().__init__(shape, budget=slots * shape.page_bytes)  # a page of which is a slot
        self.bits, self.budget = bits, budget
        self.sealed_bytes = 2 * shape.layers * shape.kv_heads * (PAGE_TOKENS * width + 2 * shape.head_dim)
        self.capacity = (budget - slots * shape.page_bytes) // self.sealed_bytes
        self._references = [0] * self.capacity
        self._slots, self._free = self._free, list(range(self.capacity - 1, -1, -1))
        size = (self.capacity, shape.layers, shape.kv_heads)
        self._codes = [self._zeros((*size, PAGE_TOKENS * width), torch.uint8) for _ in "kv"]
        self._scales = [self._zeros((*size, shape.head_dim), torch.bfloat16) for _ in "kv"]

    @property
    def tiles(self) -> KVPages:
        raise ModelError(
            f"KV of {self.bits} bits cannot be evicted, narrowed or composed",
            code="unsupported",
            hint="set kv_dtype to auto",
        )

    @property
    def free_pages(self) -> int:
        return min(len(self._free), len(self._slots) + len(self._sealable))

    @property
    def used_pages(self) -> int:
        return self.capacity - len(self._free)

    @property
    def used_bytes(self) -> int:
        return len(self._slot) * self.shape.page_bytes + self.sealed_bytes * (
            self.used_pages - len(self._slot)
        )

    def take(self, count: int) -> list[int]:
        if count > self.free_pages and self.spare:
            self.spare(count)
        if count > self.free_pages:
            raise self._full(count)
        self.seal(list(self._sealable)[: max(0, count - len(self._slots))])
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self._slot[page] = self._slots.pop()
        return pages

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
                self._sealable.pop(page, None)
                if page in self._slot:
                    self._slots.append(self._slot.pop(page))

    def claim(self, page: int) -> bool:
        self._sealable.pop(page, None)  # it may have been full, and was cut
        return page in self._slot and super().claim(page)

    def filled(self, pages: Sequence[int]) -> None:
        """These pages of one sequence, in its order, are full: those behind the local ones are sealed."""
        for page in pages:
            if page in self._slot:
                self._sealable.setdefault(page)
        self.seal([page for page in pages[: max(0, len(pages) - LOCAL)] if page in self._slot])

    def seal(self, pages: Sequence[int]) -> None:
        """Quantise open pages that are full."""
        for page in pages:
            k, v = self.read(page, PAGE_TOKENS)
            found = quantize_pages(k.contiguous(), v.contiguous(), self.bits)
            assert found.k_scale is not None and found.v_scale is not None
            for own, codes in zip(self._codes, (found.k, found.v), strict=True):
                own[page] = codes.view(torch.uint8).flatten(2)
            for own, scale in zip(self._scales, (found.k_scale, found.v_scale), strict=True):
                own[page] = scale
            self._slots.append(self._slot.pop(page))
            self._sealable.pop(page, None)

    def copy(self, source: int, target: int) -> None:
        self.write(target, *self.read(source, PAGE_TOKENS))

    def read(self, page: int, tokens: int) -> tuple[Tensor, Tensor]:
        if page in self._slot:
            return super().read(self._slot[page], tokens)
        layers = torch.arange(self.shape.layers, dtype=torch.int32, device=self.shape.device)
        k, v = dequantize_pages(self._coded(page), layers, self.shape.dtype)
        return k[:, :, :tokens], v[:, :, :tokens]

    def write(self, page: int, k: Tensor, v: Tensor) -> None:
        super().write(self._slot[page], k, v)

    def where(self, table: Tensor) -> Where:
        ids, seen = torch.unique(table.cpu(), return_inverse=True)
        listed: list[int] = ids.tolist()
        is_open = torch.tensor([page in self._slot for page in listed])
        order = torch.argsort(is_open.int(), stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        slots = torch.tensor([self._slot.get(page, 0) for page in listed])
        tensors = (ids[~is_open].int(), slots[is_open], rank[seen].int(), slots[seen].int())
        return Where(*(x.to(self.shape.device) for x in tensors))

    def into(self, layer: int, where: Where) -> tuple[KVPages, Tensor]:
        return self.layers[layer], where.written

    def shown(self, layer: int, where: Where) -> tuple[KVPages, Tensor]:
        opened, slots = self.layers[layer], where.slots.long()
        k, v = opened.k[slots], opened.v[slots]
        if len(where.sealed):
            coded = dequantize_pages(self._coded((slice(None), layer)), where.sealed, k.dtype)
            found = KVPages(*coded, PAGE_TOKENS, opened.head_dim)
            if opened.format == "packed":
                found = pack_pages(found)
            k, v = torch.cat([found.k, k]), torch.cat([found.v, v])
        return KVPages(k, v, PAGE_TOKENS, opened.head_dim, opened.format), where.seen

    def _coded(self, index: int | tuple[slice, int]) -> KVPages:
        """A page of every layer, or all pages of one."""
        size, form = self.shape.head_dim, f"int{self.bits}"
        k, v = (codes[index] for codes in self._codes)
        k, v = k.view(*k.shape[:2], PAGE_TOKENS, -1), v.view(*v.shape[:2], -1, PAGE_TOKENS)
        if self.bits == 8:
            k, v = k.view(torch.int8), v.view(torch.int8)
        return KVPages(k, v, PAGE_TOKENS, size, form, *(scale[index] for scale in self._scales))
