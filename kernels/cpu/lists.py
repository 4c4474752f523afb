"""Complete lists in C++."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def complete_lists(
    lib: Any,
    blocks: Tensor,
    counts: Tensor,
    q_offset: Tensor,
    block_q: int,
    page_tokens: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    full, held = lib.complete_lists(blocks, counts, q_offset, block_q, page_tokens, sink_blocks, local_blocks)
    return full, held
