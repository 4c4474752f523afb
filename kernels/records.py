"""What kernels take and return. Letters, here and in every file: B sequences, Hq query heads, Hkv KV heads,
G = Hq / Hkv, D head size, T query tokens, N context tokens, P physical pages, NB logical blocks of a
sequence, S slots of a block list. A block is a page; lists, tables and counts are int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = ("paged", "packed", "int8", "int4")
PAGE_SIZES = (16, 32, 64, 128)
PACKED_TOKENS = 64  # a packed page holds this many tokens


class Attention(NamedTuple):
    """`out [B, Hq, T, D]`; `lse [B, Hq, T]` float32, the natural log of the sum of exp of the scores.

    A row that sees no key has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


class BlockSelection(NamedTuple):
    """Which blocks each head reads: `pages` and `blocks` int32 `[B, H, S]`, `counts` int32 `[B, H]`.

    `pages` are physical ids, already resolved; `blocks` the logical ids, ascending. H is Hkv, or Hq for lists
    per query head. Prefill has one more axis, the query blocks, before S: `[B, H, M, S]` and `[B, H, M]`.
    Slots from `counts` on are unused.
    """

    pages: Tensor
    blocks: Tensor
    counts: Tensor


class Centroids(NamedTuple):
    """Clusters of keys: `centroids [H, C, D]`, `assignment [H, N]`, the permutation `order [H, N]` that sorts
    tokens by cluster, and `offsets [H, C + 1]`: cluster c holds `order[h, offsets[c]:offsets[c + 1]]`.
    """

    centroids: Tensor
    assignment: Tensor
    order: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """What is known of each block without reading it; in logical order, one stream per head.

    kind        data
    minmax      on a GPU `[B, Hkv, NBcap, 2, D]` (maximum, minimum) in the dtype of k;
                on a CPU float32 `[B, Hkv, 2 D, NBcap]` (D rows of maxima, then D of minima)
    mean        `[B, Hkv, NBcap, D]` in the dtype of k
    submeans    `[B, Hkv, 4 NBcap, D]` for pages of 64: means of 32 keys every 16
    vmax        float32 `[B, Hkv, NBcap]`: the largest norm of v
    hadamard2   uint8 `[B, Hkv, Ncap, D / 4]`: 2-bit codes of every token
    """

    kind: str
    data: Tensor
    page_tokens: int
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVPages:
    """A pool of pages of keys and values. It allocates nothing later and knows no sequences.

    format   k                                        v
    paged    `[P, Hkv, page, D]`                      the same
    packed   `[P, Hkv, 64 D]`: float32 `[D][64]`,     `[64][D]`,
             bfloat16 `[D/2][64][2]`                  `[32][D][2]` (pairs of tokens)
    int8     int8 `[P, Hkv, page, D]`                 int8 `[P, Hkv, D, page]`
    int4     uint8 `[P, Hkv, page, D/2]`: channel i   uint8 `[P, Hkv, D/2, page]`, the same nibbles
             in the low nibble, i + D/2 in the high

    `k_scale`, `v_scale`: bfloat16 `[P, Hkv, D]`, for int8 and int4. Pages and heads may have any stride.
    `page_valid` int32 `[P]`: where it is 0 or more, so many tokens of the page are visible to every row,
    whatever their position (tokens sorted by cluster, heads of different lengths); where negative, the page
    is in position order as usual. Heads of different lengths use the pool as `[P Hkv, Hkv (stride 0), ...]`
    with tile ids. The unused part of a page may hold stale finite values, never NaN or infinity: 0 * NaN is
    NaN.
    """

    k: Tensor
    v: Tensor
    page_tokens: int
    head_dim: int
    format: str = "paged"
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    page_valid: Tensor | None = None

    @property
    def n_pages(self) -> int:
        return self.k.shape[0]

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def quantised(self) -> bool:
        return self.k_scale is not None

    @classmethod
    def empty(
        cls,
        n_pages: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        page_tokens: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        format: str = "paged",
        device: torch.device | str = "cpu",
    ) -> KVPages:
        """A zero-filled pool; `dtype` is that of the values (ignored by int8 and int4).

        Raises ValueError for an unknown format or page size, or a head size that the format cannot hold.
        """
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}: use one of {', '.join(FORMATS)}")
        if page_tokens not in PAGE_SIZES:
            raise ValueError(f"page_tokens is {page_tokens}: use one of {PAGE_SIZES}")
        if format == "packed" and page_tokens != PACKED_TOKENS:
            raise ValueError(f"page_tokens is {page_tokens}: packed pages hold {PACKED_TOKENS} tokens")
        if format == "packed" and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}: packed pages hold float32 or bfloat16")
        if head_dim < 1 or (head_dim % 2 and format in ("packed", "int4")):
            raise ValueError(f"head_dim is {head_dim}: {format} pages need an even number")

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(n_pages, n_kv_heads, *shape, dtype=of, device=device)

        if format == "paged":
            pool = (zeros(page_tokens, head_dim), zeros(page_tokens, head_dim))
        elif format == "packed":
            pool = (zeros(page_tokens * head_dim), zeros(page_tokens * head_dim))
        else:
            width, of = (head_dim, torch.int8) if format == "int8" else (head_dim // 2, torch.uint8)
            pool = (zeros(page_tokens, width, of=of), zeros(width, page_tokens, of=of))
            scales = (zeros(head_dim, of=torch.bfloat16), zeros(head_dim, of=torch.bfloat16))
            return cls(*pool, page_tokens, head_dim, format, *scales)
        return cls(*pool, page_tokens, head_dim, format)

    @classmethod
    def over(cls, k: Tensor, v: Tensor, *, page_tokens: int = 64) -> KVPages:
        """View contiguous `[Hkv, N, D]` as pages by strides, uncopied; N a multiple of `page_tokens`."""
        if k.dim() != 3 or k.shape != v.shape:
            raise ValueError(f"k {list(k.shape)} and v {list(v.shape)}: both must be [Hkv, N, D]")
        heads, tokens, size = k.shape
        if page_tokens not in PAGE_SIZES or tokens % page_tokens:
            raise ValueError(f"k has {tokens} tokens: pad to a multiple of page_tokens = {page_tokens}")

        def pages(x: Tensor) -> Tensor:
            return x.view(heads, tokens // page_tokens, page_tokens, size).transpose(0, 1)

        return cls(pages(k), pages(v), page_tokens, size)
