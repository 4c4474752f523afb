"""The definition of prefill with a list for each row: a query block of one row, and no diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import Attention, BlockSelection, KVPages
from agentctx.kernels.reference.prefill import by_query_block


def token_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    q_offset: Tensor,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    heads = q.shape[1] // selection.counts.shape[1]

    def listed(b: int, head: int, row: int) -> tuple[list[int], list[int], int]:
        at = (b, head // heads, row)
        count = int(selection.counts[at])
        return selection.pages[at][:count].tolist(), selection.blocks[at][:count].tolist(), count

    return by_query_block(q, kv, context_lens, q_offset, 1, listed, scale, softcap, out_dtype)
