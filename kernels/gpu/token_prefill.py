"""Prefill with a list for each row, in Triton: a program is one token, its rows the heads that share a list.

Lists differ from row to row, so K and V are read once for each row: `2 D bytes` a listed token and KV head,
`4 G D` FLOP for it. Bound by memory (mostly the L2 cache, where neighbouring rows meet the same blocks).
Limits: those of `prefill`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.gpu.configs import Config
from agentctx.kernels.gpu.tiles import (
    LOG2E,
    accumulate,
    configuration,
    finish,
    keys,
    page_valid,
    scores,
    strides,
    uncovered,
    values,
)
from agentctx.kernels.records import Attention, BlockSelection, KVPages

# Few rows: copies are what matters, and one level of lists needs 5 stages for two buffers.
CONFIGS = (
    Config(dim=64, kinds=("fp32",), blocks={"BN": 32}, warps=4, stages=2),
    Config(kinds=("fp32",), blocks={"BN": 16}, warps=4, stages=2),
    Config(dim=128, blocks={"BN": 64}, warps=4, stages=5),
    Config(blocks={"BN": 32}, warps=4, stages=5),
)


@triton.jit
def token_prefill_kernel(
    q, k, v, k_scale, v_scale, valid, pages, blocks, counts, lens, offsets, out, lse,
    rows, slots, scale, softcap,
    q_b, q_h, q_t, k_p, k_h, v_p, v_h, ks_p, ks_h, vs_p, vs_h,
    LISTS: tl.constexpr, GROUP: tl.constexpr, KV_LISTS: tl.constexpr, HAS_VALID: tl.constexpr,
    CAPPED: tl.constexpr, FORMAT: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: (T, lists, B). GROUP heads share a list, KV_LISTS lists a KV head."""
    SUB: tl.constexpr = PAGE // BN
    DTYPE: tl.constexpr = q.dtype.element_ty
    row, which, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = (which // KV_LISTS).to(tl.int64)

    # q [BM, BD]: the heads of the list
    member = tl.arange(0, BM)
    channel = tl.arange(0, BD)
    inside = (member < GROUP)[:, None] & (channel < D)[None, :]
    head = (which * GROUP + member).to(tl.int64)
    q += b.to(tl.int64) * q_b + row.to(tl.int64) * q_t
    queries = tl.load(q + head[:, None] * q_h + channel[None, :], mask=inside, other=0.0)

    limit = tl.minimum(tl.load(offsets + b) + row, tl.load(lens + b) - 1)  # the last position it sees
    chosen = (b * LISTS + which).to(tl.int64) * rows + row
    pages += chosen * slots
    blocks += chosen * slots
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for s in range(tl.load(counts + chosen) * SUB):
        page = tl.load(pages + s // SUB).to(tl.int64)
        at = s % SUB * BN
        k_tile = keys(k, k_scale, page, kv_head, k_p, k_h, ks_p, ks_h, at, D, BN, BD, FORMAT, DTYPE)
        sc = scores(queries, k_tile, scale, softcap, CAPPED)
        slot = at + tl.arange(0, BN)
        seen = tl.load(blocks + s // SUB) * PAGE + slot <= limit
        if HAS_VALID:
            held = tl.load(valid + page)
            seen = tl.where(held >= 0, slot < held, seen)
        sc = tl.where(seen[None, :], sc, float("-inf"))
        v_tile = values(v, v_scale, page, kv_head, v_p, v_h, vs_p, vs_h, at, D, PAGE, BN, BD, FORMAT, DTYPE)
        top, total, acc = accumulate(sc, v_tile, top, total, acc)

    # out [BM, BD], lse [BM]
    result, natural = finish(top, total, acc)
    rest = (b * LISTS * GROUP + head) * rows + row
    tl.store(out + rest[:, None] * D + channel[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + rest, natural, mask=member < GROUP)


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
    uncovered(q, kv)
    batch, heads, rows, size = q.shape
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not rows:
        return Attention(out, lse)
    pages, blocks, counts, lens, offsets = (x.contiguous() for x in (*selection, context_lens, q_offset))
    lists = counts.shape[1]
    config = configuration(CONFIGS, q, kv, heads // lists)
    k_scale, v_scale = kv.k_scale, kv.v_scale
    token_prefill_kernel[(rows, lists, batch)](
        q, kv.k, kv.v, k_scale, v_scale, page_valid(kv), pages, blocks, counts, lens, offsets, out, lse,
        rows, pages.shape[-1], scale * LOG2E.value, softcap, *q.stride()[:3], *strides(kv),
        LISTS=lists, GROUP=heads // lists, KV_LISTS=lists // kv.n_kv_heads,
        HAS_VALID=kv.page_valid is not None, CAPPED=softcap > 0, FORMAT=kv.format, PAGE=kv.page_tokens,
        D=size, BM=triton.next_power_of_2(heads // lists), BD=max(16, triton.next_power_of_2(size)),
        **(config.launch | {"BN": min(config.blocks["BN"], kv.page_tokens)}),
    )  # fmt: skip
    return Attention(out, lse)
