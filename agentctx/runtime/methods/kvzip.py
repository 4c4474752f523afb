"""KVzip: what the model needs to repeat a text is what it needs to answer anything about it.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416. After
reading, the text is fed again, chunk by chunk, and a key is worth the highest attention that it gets from any
row of its chunk, among the keys of the chunk and those of the repetition. One ranking over all layers and
heads. It costs a few times as much as reading the text, so it pays for texts that are asked often.

Ours: no instruction in words, as the engine knows no tokenizer; a chunk is announced by the eight tokens
before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.store import unpack_pages
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.evictor import Evictor, leading, show

if TYPE_CHECKING:
    from agentctx.runtime.context import Context

ROWS = 64  # rows whose scores exist at once
LEAD = 8


@dataclass(frozen=True)
class KVZip(Evictor):
    """The text is repeated in chunks of `chunk` tokens, fewer where the window leaves less room."""

    name: ClassVar[str] = "kvzip"

    chunk: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < PAGE_TOKENS:
            raise ConfigError(f"kvzip: chunk is {self.chunk}", hint=f"at least {PAGE_TOKENS}")

    def choose(self, scores: Tensor) -> Tensor:
        return leading(scores.flatten(), round(self.keep * scores.numel())).view(scores.shape)

    def scores(self, context: Context) -> Tensor:
        tokens, engine = len(context.ids), context.engine
        chunk = min(self.chunk, engine.body.window - tokens - LEAD)
        if chunk < PAGE_TOKENS:
            raise ModelError(
                f"kvzip repeats the text: {tokens:,} tokens leave no room for that in the model's window of "
                f"{engine.body.window:,}",
                code="overflow",
                hint="choose snap or expected",
            )
        shape = engine.pool.shape
        worth = torch.zeros(shape.layers, shape.kv_heads, tokens, device=shape.device)
        for start in range(0, tokens, chunk):
            end = min(start + chunk, tokens)

            def see(q: Tensor, kv: LayerKV, start: int = start, end: int = end) -> None:
                of = worth[kv.index, :, start:end]
                torch.maximum(of, highest(q, kv, start, end, tokens), out=of)

            fork = context.fork()
            try:
                show(fork, context.ids[max(0, start - LEAD) : end], see)
            finally:
                fork.close()
        return worth


def highest(q: Tensor, kv: LayerKV, start: int, end: int, own: int) -> Tensor:
    """The highest attention `[Hkv, end - start]` that keys get from the last rows q `[1, Hq, T, D]` and any
    head of the group, among themselves and the keys from `own` on.
    """
    scoring, heads = kv.scoring, kv.pages.n_kv_heads
    keys = torch.cat([_keys(kv, start, end), _keys(kv, own, kv.longest)], 1).float()
    at = torch.arange(kv.longest - own, device=q.device)
    found = torch.zeros(heads, end - start, device=q.device)
    first = kv.longest - q.shape[2] - own
    for row in range(0, q.shape[2], ROWS):
        some = q[0, :, row : row + ROWS].float()
        logits = some.reshape(heads, -1, some.shape[-1]) @ keys.mT * scoring.scale
        if scoring.softcap:
            logits = scoring.softcap * torch.tanh(logits / scoring.softcap)
        stand = first + row + torch.arange(some.shape[1], device=q.device)
        later = (at > stand[:, None]).repeat(logits.shape[1] // len(stand), 1)
        logits[:, :, end - start :].masked_fill_(later, -torch.inf)
        found = torch.maximum(found, logits.softmax(-1)[..., : end - start].amax(1))
    return found


def _keys(kv: LayerKV, start: int, end: int) -> Tensor:
    """Keys `[Hkv, end - start, D]` of a sequence in plain order."""
    first = start // PAGE_TOKENS
    ids = kv.table[0, first : -(-end // PAGE_TOKENS)].long()
    pages, size = kv.pages, kv.pages.head_dim
    some = KVPages(pages.k[ids], pages.v[ids], PAGE_TOKENS, size, pages.format)
    plain = unpack_pages(some) if some.format == "packed" else some
    keys = plain.k.transpose(0, 1).reshape(pages.n_kv_heads, -1, size)
    return keys[:, start - first * PAGE_TOKENS : end - first * PAGE_TOKENS]
