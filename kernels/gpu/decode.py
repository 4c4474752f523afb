"""Decode attention in Triton: the rows of a list share one dot, work is split over the list (split-K), and
the last split to end unites the parts (`combine.py`).

One program per split of a list reads `2 tokens D` elements and computes `4 rows tokens D` FLOP; it is bound
by memory. A page of 64 tokens or more is one address, smaller ones are gathered within a tile. Dense decode
reads the block table as a list that all heads share, without the blocks that a window hides. Limits (else
torch): head sizes that are multiples of 16 up to 256, at most 64 rows of a list (G T, or T where lists are
per query head; 32 over quantised pages), formats paged, int8 and int4.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.gpu.decode_paged import attend_paged
from agentctx.kernels.gpu.decode_quant import attend_quantised
from agentctx.kernels.gpu.splits import covered_rows, folded, outputs, workspace
from agentctx.kernels.records import Attention, BlockSelection, KVPages

# Buffers of K and V double at 5 stages, because the page id is loaded one stage ahead of them.
CONFIGS = (
    Config(kinds=("bf16", "fp16"), dim=128, rows=16, blocks={"N": 64}, warps=4, stages=5),
    Config(kinds=("bf16", "fp16"), dim=128, rows=64, blocks={"N": 64}, warps=4, stages=5),
    Config(kinds=("bf16", "fp16"), dim=256, rows=16, blocks={"N": 32}, warps=4, stages=5),
    Config(kinds=("bf16", "fp16"), dim=256, rows=64, blocks={"N": 32}, warps=8, stages=5),
    Config(kinds=("fp32",), dim=128, rows=16, blocks={"N": 32}, warps=8, stages=5),
    Config(kinds=("fp32",), dim=256, rows=64, blocks={"N": 16}, warps=8, stages=5),
    Config(kinds=("int8",), dim=128, rows=16, blocks={"N": 64}, warps=4, stages=5),
    Config(kinds=("int4",), dim=128, rows=16, blocks={"N": 64}, warps=4, stages=7),
    Config(kinds=("int8", "int4"), dim=256, rows=32, blocks={"N": 32}, warps=8, stages=5),
)


def dense_decode(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
    splits: int | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    table = block_table[:, None].expand(-1, kv.n_kv_heads, -1)
    window = (first_pos, sink_tokens, tail)
    return _decode(q, kv, table, None, None, context_lens, *window, splits, scale, softcap, out_dtype)


def sparse_decode(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
    splits: int | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    window = (first_pos, sink_tokens, tail)
    return _decode(q, kv, *selection, context_lens, *window, splits, scale, softcap, out_dtype)


def _decode(
    q: Tensor,
    kv: KVPages,
    pages: Tensor,
    blocks: Tensor | None,
    counts: Tensor | None,
    lens: Tensor,
    first_pos: Tensor | None,
    sink_tokens: int,
    tail: tuple[Tensor, Tensor] | None,
    splits: int | None,
    scale: float,
    softcap: float,
    out_dtype: torch.dtype,
) -> Attention:
    """Attend to the lists `pages [B, L, S]`; without `blocks` and `counts`, to whole block tables."""
    batch, heads, tokens, size = q.shape
    lists, slots = pages.shape[1:]
    rows = covered_rows(q, lists)
    if kv.format == "packed":
        raise Uncovered("packed pages belong to the CPU")
    if kv.n_pages == 0:
        raise Uncovered("a pool without pages")
    out, lse = outputs(q, slots, out_dtype)
    if not (out.numel() and slots):
        return Attention(out, lse)
    dense, quantised = counts is None, kv.quantised
    config = pick(CONFIGS, arch_of(q), dim=size, rows=rows, kind=KINDS[kv.k.dtype])
    n = min(config.blocks["N"], kv.page_tokens) if quantised else config.blocks["N"]
    parts = workspace(q, lists, -(-slots * kv.page_tokens // n), splits)
    pages, blocks = pages if pages.stride(2) == 1 else pages.contiguous(), pages if blocks is None else blocks
    blocks = blocks if blocks.stride(2) == 1 else blocks.contiguous()
    k_scale = q if kv.k_scale is None else kv.k_scale
    v_scale = q if kv.v_scale is None else kv.v_scale
    (attend_quantised if quantised else attend_paged)[parts.splits, lists, batch](
        *(q, kv.k, kv.v, k_scale, v_scale, pages, blocks),
        *((lens if counts is None else counts).contiguous(), lens.contiguous()),
        lens if first_pos is None else first_pos.contiguous(),
        lens if kv.page_valid is None else kv.page_valid.contiguous(),
        *((q, q) if tail is None else (tail[0].contiguous(), tail[1].contiguous())),
        *(out, lse, parts.out, parts.lse, parts.tickets),
        *(*folded(scale, softcap), sink_tokens, slots, parts.splits, tokens),
        *(*q.stride()[:3], *kv.k.stride()[:2], *kv.v.stride()[:2]),
        *(*k_scale.stride()[:2], *v_scale.stride()[:2], *pages.stride()[:2], *blocks.stride()[:2]),
        **_sizes(heads // lists, lists // kv.n_kv_heads, rows, kv),
        N=n,
        DENSE=dense,
        CAPPED=softcap > 0,
        WINDOW=first_pos is not None,
        VALID=kv.page_valid is not None,
        TAIL=tail is not None,
        ALONE=parts.splits == 1,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return Attention(out, lse)


def _sizes(group: int, share: int, rows: int, kv: KVPages) -> dict[str, int | bool]:
    size = kv.head_dim
    least = 32 if kv.quantised else 16  # a product takes 16 channels, and quantised ones come in two halves
    padded = {"ROWS": triton.next_power_of_2(rows), "DP": max(least, triton.next_power_of_2(size))}
    own = {"GROUP": group, "SHARE": share, "D": size, "PAGE": kv.page_tokens}
    return own | padded | {"INT4": kv.format == "int4"}
