"""What every list of a block-sparse prefill should hold: the sinks, and the blocks just below the diagonal.

    complete(list of query block i) = (list + {0 .. sink_blocks - 1} + {d - local_blocks .. d - 1}) below d,
    d = (q_offset + i block_q) // page_tokens, rounded down

A merge of sorted lists: a few bytes and comparisons for each entry. The kernel itself knows lists only.
"""

from __future__ import annotations

from torch import Tensor

from agentctx.kernels import checks, choose, prefill
from agentctx.kernels import validate as contents


def complete_lists(
    blocks: Tensor,
    counts: Tensor,
    q_offset: int | Tensor,
    T: int,
    *,
    block_q: int,
    page_tokens: int,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    impl: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add sinks and the local window to lists of logical blocks, `blocks [B, H, M, S]`, `counts [B, H, M]`.

    Returns lists `[B, H, M, S + sink_blocks + local_blocks]` and counts: ascending, unique, below the
    diagonal block, unused slots 0. Entries of the given lists may be in any order and repeat; those at the
    diagonal or above it, which every row of the query block reaches anyway, are dropped. M is `ceil(T /
    block_q)`; `q_offset` is an int or int32 `[B]`.

    Raises ValueError for shapes, dtypes or options that do not fit; with `validate`, IndexError for a count
    outside 0 to S.
    """
    checks.tensor("blocks", blocks, 4)
    batch, heads, query_blocks, slots = blocks.shape
    checks.ints("blocks", blocks, (-1, -1, -1, -1), blocks.device)
    checks.ints("counts", counts, (batch, heads, query_blocks), blocks.device)
    for name, value, least in (
        ("T", T, 0),
        ("block_q", block_q, 1),
        ("page_tokens", page_tokens, 1),
        ("sink_blocks", sink_blocks, 0),
        ("local_blocks", local_blocks, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: {least} or more is needed")
    if query_blocks != -(-T // block_q):
        raise ValueError(f"blocks has {query_blocks} query blocks: {-(-T // block_q)} for T = {T}")
    offset = prefill.offsets(q_offset, batch, blocks.device)
    if validate:
        contents.counts("counts", counts, slots)
    options = (block_q, page_tokens, sink_blocks, local_blocks)
    found: tuple[Tensor, Tensor] = choose.run(
        "complete_lists", impl, blocks.device, blocks, counts, offset, *options
    )
    return found
