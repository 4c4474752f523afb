"""One layer as an attention method sees it, and the exact attention over it that every method can fall back
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.prefill import dense_prefill, window_prefill
from agentctx.kernels.records import Attention, BlockSelection, BlockSummary, KVPages
from agentctx.runtime.notes import Notes
from agentctx.runtime.rotation import Rotation

DECODE_TOKENS = 8  # a step of so many new tokens or fewer is decoding
DECODE_ROWS = 64  # rows that the decode kernels pack: new tokens times query heads of a KV head


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights; `window` None sees everything, `sinks` is `[Hq]`.

    `rotation` None: not known, or not a rotation; methods that move positions cannot be used.
    """

    scale: float
    softcap: float = 0.0
    window: int | None = None
    sinks: Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Stored keys and values of one layer, for a batch: `table [B, NB]`, `lens [B]` with the new tokens."""

    index: int
    pages: KVPages
    table: Tensor
    lens: Tensor
    longest: int  # the largest of `lens`
    scoring: Scoring
    reading: bool = True  # a text is being read, as opposed to asked about
    notes: Sequence[Notes] = ()  # of each row
    layers: int = 1  # of the model

    def summary(self, kind: str) -> BlockSummary:
        """Of the stored keys and values, for a view of one row."""
        (notes,) = self.notes
        return notes.summary(self.index, kind, self.pages, self.table, self.lens, self.longest)

    def row(self, row: int) -> LayerKV:
        """One row of the batch."""
        one = slice(row, row + 1)
        lens = self.lens[one]
        table, notes = self.table[one], self.notes[one]
        return replace(self, table=table, lens=lens, longest=int(lens), notes=notes)

    def upto(self, tokens: int) -> LayerKV:
        """The same without what lies beyond the first `tokens`, for a view of one row that has as many."""
        return replace(self, lens=torch.full_like(self.lens, tokens), longest=tokens)

    def exact(self, q: Tensor) -> Attention:
        """Dense attention of q `[B, Hq, T, D]`, within the layer's window if it has one; without sinks."""
        new, scoring = q.shape[2], self.scoring
        scale, softcap = scoring.scale, scoring.softcap
        few = new * (q.shape[1] // self.pages.n_kv_heads) <= DECODE_ROWS and new <= DECODE_TOKENS
        window = scoring.window
        if window is not None and window < self.longest:
            if new > 1:
                return window_prefill(
                    q, self.pages, self.table, self.lens, window=window, scale=scale, softcap=softcap
                )
            chosen = self._window_blocks(window)
            first = (self.lens - window).clamp_min(0)
            return sparse_decode(
                q, self.pages, chosen, self.lens, first_pos=first, scale=scale, softcap=softcap
            )
        attend = dense_decode if few else dense_prefill
        return attend(q, self.pages, self.table, self.lens, scale=scale, softcap=softcap)

    def _window_blocks(self, window: int) -> BlockSelection:
        """The blocks that hold the last `window` tokens of each row."""
        page = self.pages.page_tokens
        slots = min(self.table.shape[1], -(-window // page) + 1)
        first = (self.lens - window).clamp_min(0) // page
        last = (self.lens - 1).clamp_min(0) // page
        blocks = first[:, None] + torch.arange(slots, dtype=torch.int32, device=self.lens.device)
        counts = torch.where(self.lens > 0, last - first + 1, 0).to(torch.int32)
        inside = blocks.clamp_max(self.table.shape[1] - 1)
        heads = self.pages.n_kv_heads
        pages = self.table.gather(1, inside.long())
        return BlockSelection(
            pages[:, None].expand(-1, heads, -1).contiguous(),
            inside.to(torch.int32)[:, None].expand(-1, heads, -1).contiguous(),
            counts[:, None].expand(-1, heads).contiguous(),
        )


def attend_past(
    q: Tensor, pages: KVPages, tiles: Tensor, lens: Tensor, longest: int, scoring: Scoring
) -> Attention:
    """Attention of every row of q `[B, Hq, T, D]` to all tokens of `tiles [Hkv, NT]`; head h has `lens[h]`.

    The heads become the sequences of a batch, and the rows, which see the same, one long query of each.
    """
    batch, heads, new, size = q.shape
    kv_heads, group = len(lens), heads // len(lens)
    rows = q.reshape(batch, kv_heads, group, new, size).permute(1, 2, 0, 3, 4)
    rows = rows.reshape(kv_heads, group, batch * new, size)
    scale, softcap = scoring.scale, scoring.softcap
    if group * batch * new <= DECODE_ROWS:
        flat = rows.reshape(kv_heads, -1, 1, size)
        out, lse = dense_decode(flat, pages, tiles, lens, scale=scale, softcap=softcap)
    else:
        out, lse = dense_prefill(rows, pages, tiles, lens, q_offset=longest, scale=scale, softcap=softcap)
    shape = (kv_heads, group, batch, new)
    return Attention(
        out.reshape(*shape, size).permute(2, 0, 1, 3, 4).reshape(q.shape),
        lse.reshape(shape).permute(2, 0, 1, 3).reshape(q.shape[:3]),
    )


def with_sinks(found: Attention, sinks: Tensor | None) -> Tensor:
    """The output with learned sink logits `[Hq]` in the denominator (they have no value of their own)."""
    if sinks is None:
        return found.out
    share = torch.sigmoid(found.lse - sinks.float()[None, :, None])
    return (found.out.float() * share[..., None]).to(found.out.dtype)
