"""The pages that the C++ reads as tiles (`src/tile.h`)."""

from __future__ import annotations

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import PACKED_TOKENS, KVPages

MOST_CHANNELS = 256


def cover(kv: KVPages) -> None:
    """Raise Uncovered for pages of other sizes."""
    if kv.page_tokens != PACKED_TOKENS:
        raise Uncovered(f"pages of {kv.page_tokens} tokens: {PACKED_TOKENS} are served")
    step = 32 if kv.format == "int4" else 16
    if not 0 < kv.head_dim <= MOST_CHANNELS or kv.head_dim % step:
        raise Uncovered(
            f"head size {kv.head_dim}, {kv.format}: multiples of {step} up to {MOST_CHANNELS} are served"
        )
