"""Selection by a search for the threshold: one launch, no sort, and the set that a sort would give.

A score becomes an int32 key of the same order. Bit by bit, from the highest, the largest threshold is found
that at least k keys (or, for top-p, the share p of the mass) reach; ties at the threshold go to the highest
blocks. A running sum over the chosen blocks is the slot of each, so lists come out ascending. One program
serves one list and keeps its scores in registers. `select_blocks` is two launches, scores and lists (three
with `hadamard2`, whose queries are rotated first), and resolves the pages on the way. Cost: the scores once.
Limits: 16,384 blocks, 8,192 for top-p (its masses are float64 and would spill); longer rows are left to
torch. What is not looked at on a GPU: a number of blocks beyond the scores counts as their number.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import Config, arch_of, pick
from agentctx.kernels.gpu.scores import STEP, block_scores
from agentctx.kernels.records import BlockSelection, BlockSummary

# `dim` is the largest number of blocks of a list, padded to a power of two.
CONFIGS = (
    Config(dim=1024, blocks={}, warps=4, stages=1),
    Config(dim=4096, blocks={}, warps=8, stages=1),
    Config(dim=8192, blocks={}, warps=16, stages=1),
    Config(dim=16384, blocks={}, warps=16, stages=1),
)
MOST, MOST_BY_MASS = 16384, 8192
RESOLVE = Config(blocks={"S": 256}, warps=4, stages=1)
_LEAST = tl.constexpr(-(2**31))  # of a block that is not there; no score has this key
_FORCED = tl.constexpr(2**31 - 1)  # above the key of +inf


@triton.jit
def _peak(row, ROWS, NB, blocks):
    # [N]: the best of ROWS rows of scores; NaN if any is
    best = tl.load(row + blocks, mask=blocks < NB, other=float("-inf"))
    for t in range(1, ROWS):
        more = tl.load(row + t * NB + blocks, mask=blocks < NB, other=float("-inf"))
        best = tl.maximum(best, more, propagate_nan=tl.PropagateNan.ALL)
    return best


@triton.jit
def _keys(score, blocks, n, SINK: tl.constexpr, LOCAL: tl.constexpr):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where((blocks < SINK) | (blocks >= n - LOCAL), _FORCED, key)
    return tl.where(blocks < n, key, _LEAST)


@triton.jit
def _select(
    scores,  # [B, H, M, ROWS, NB]: the best of ROWS rows is taken
    n_blocks,  # [B, M]
    table,  # [B, TB]
    blocks_out,  # [B, H, M, S]
    pages_out,
    counts_out,  # [B, H, M]
    H,
    M,
    NB,
    NROWS,
    every,  # the number of blocks where there is no tensor of them
    p_bits,  # float64 as its bits
    k_min,
    table_width,
    n_stride_b,
    n_stride_m,
    S: tl.constexpr,
    SP: tl.constexpr,
    N: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_P: tl.constexpr,
    HAS_N: tl.constexpr,
    TOKENS: tl.constexpr,  # n_blocks counts tokens of blocks of this size; 0: blocks
    RESOLVE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    m, b = at % M, at // (M * H)
    n = every
    if HAS_N:
        n = tl.load(n_blocks + b * n_stride_b + m * n_stride_m)
        if TOKENS:
            n = n // TOKENS + (n % TOKENS > 0).to(tl.int32)
    n = tl.minimum(tl.maximum(n, 0), NB)
    blocks = tl.arange(0, N)
    score = _peak(scores + at * NROWS * NB, NROWS, NB, blocks)
    score = tl.where(score == score, score, float("-inf"))
    key = _keys(score, blocks, n, SINK, LOCAL)
    if TOP_P:
        p = p_bits.to(tl.float64, bitcast=True)
        score = tl.where(blocks < n, score, float("-inf"))
        best = tl.max(score, 0)
        gap = score.to(tl.float64) - best.to(tl.float64)
        mass = tl.where(score == best, 1.0, tl.exp(tl.where(score == best, 0.0, gap)))
        mass = tl.where(blocks < n, mass, 0.0)
        goal = p * tl.sum(mass, 0)
        # The largest threshold whose keys hold the goal.
        edge = _LEAST
        if tl.sum(tl.where(key >= 0, mass, 0.0), 0) >= goal:
            edge = 0
        for i in range(31):
            higher = edge + (1 << (30 - i))
            if tl.sum(tl.where(key >= higher, mass, 0.0), 0) >= goal:
                edge = higher
        above = tl.sum((key > edge).to(tl.int32), 0)
        ties = tl.sum((key == edge).to(tl.int32), 0)
        missing = goal - tl.sum(tl.where(key > edge, mass, 0.0), 0)
        each = tl.max(tl.where(key == edge, mass, 0.0), 0)
        wanted = tl.ceil(missing / tl.where(each > 0, each, 1.0))
        wanted = tl.minimum(tl.maximum(wanted, 1.0), ties.to(tl.float64)).to(tl.int32)
        count = above + wanted
        if (p >= 1.0) | (best == float("-inf")):
            count = n
        forced = tl.sum((key == _FORCED).to(tl.int32), 0)
        count = tl.minimum(tl.maximum(tl.maximum(count, forced), k_min), S)
    else:
        count = n + 0
        count = tl.minimum(count, S)
    count = tl.minimum(count, n)
    edge = _LEAST
    if tl.sum((key >= 0).to(tl.int32), 0) >= count:
        edge = 0
    for i in range(31):
        higher = edge + (1 << (30 - i))
        if tl.sum((key >= higher).to(tl.int32), 0) >= count:
            edge = higher
    tied = (key == edge) & (blocks < n)
    missing = count - tl.sum((key > edge).to(tl.int32), 0)
    cut = 0  # the lowest of the tied blocks that are taken
    bits = tl.where(tl.sum(tied.to(tl.int32), 0) > missing, 15, 0)  # of a block, to be searched for
    for i in range(bits):
        higher = cut + (1 << (14 - i))
        if tl.sum((tied & (blocks >= higher)).to(tl.int32), 0) >= missing:
            cut = higher
    chosen = (key > edge) | (tied & (blocks >= cut))
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    slots = tl.arange(0, SP)
    unused = (slots >= count) & (slots < S)
    blocks_out += at * S
    tl.store(blocks_out + slot, blocks, mask=chosen)
    tl.store(blocks_out + slots, tl.zeros([SP], tl.int32), mask=unused)
    if RESOLVE:
        tl.debug_barrier()  # the list is read back, by other threads than those that wrote it
        block = tl.load(blocks_out + slots, mask=slots < count, other=0)
        known = (slots < count) & (block < table_width)
        page = tl.load(table + b * table_width + block, mask=known, other=0)
        tl.store(pages_out + at * S + slots, page, mask=slots < S)
    tl.store(counts_out + at, count)


@triton.jit
def _resolve(blocks, counts, table, out, lists_per_sequence, width, slots, S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * S + tl.arange(0, S)
    inside = slot < slots
    used = inside & (slot < tl.load(counts + row))
    block = tl.load(blocks + row * slots + slot, mask=used, other=0)
    page = tl.load(table + row // lists_per_sequence * width + block, mask=used & (block < width), other=0)
    tl.store(out + row * slots + slot, page, mask=inside)


def topk_blocks(
    scores: Tensor, n_blocks: int | Tensor, k: int, sink_blocks: int, local_blocks: int
) -> tuple[Tensor, Tensor]:
    blocks, _, counts = _launch(scores, n_blocks, k, sink_blocks, local_blocks)
    return blocks, counts


def topp_blocks(
    scores: Tensor,
    n_blocks: int | Tensor,
    p: float,
    k_min: int,
    k_max: int,
    sink_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor]:
    blocks, _, counts = _launch(scores, n_blocks, k_max, sink_blocks, local_blocks, share=p, least=k_min)
    return blocks, counts


def resolve_pages(blocks: Tensor, counts: Tensor, block_table: Tensor) -> BlockSelection:
    given, slots = blocks, blocks.shape[-1]
    blocks, counts, block_table = blocks.contiguous(), counts.contiguous(), block_table.contiguous()
    pages = torch.empty_like(blocks)
    if blocks.numel():
        size = RESOLVE.blocks["S"]
        grid = (counts.numel(), triton.cdiv(slots, size))
        lists = counts.numel() // blocks.shape[0]
        width = block_table.shape[1]
        _resolve[grid](blocks, counts, block_table, pages, lists, width, slots, **RESOLVE.launch)
    return BlockSelection(pages, given, counts)


def select_blocks(
    q: Tensor,
    summary: BlockSummary,
    block_table: Tensor,
    context_lens: Tensor,
    k: int,
    group: str,
    sink_blocks: int,
    local_blocks: int,
    scale: float,
) -> BlockSelection:
    page = summary.page_tokens
    per = {"submeans": page // STEP, "hadamard2": page}.get(summary.kind, 1)
    _fits(summary.data.shape[2] // max(per, 1))
    scores = block_scores(q, summary, context_lens, None, group, False, "dot", scale)
    table = block_table.contiguous()
    blocks, pages, counts = _launch(
        scores.unsqueeze(2), context_lens, k, sink_blocks, local_blocks, table=table, tokens=page
    )
    return BlockSelection(pages[:, :, 0], blocks[:, :, 0], counts[:, :, 0])


def _fits(width: int, most: int = MOST) -> None:
    if width > most:
        raise Uncovered(f"{width} blocks: up to {most} are served")


def _launch(
    scores: Tensor,  # [B, H, (M,) NB]; with a table [B, H, 1, ROWS, NB]
    n_blocks: int | Tensor,
    k: int,
    sink: int,
    local: int,
    *,
    share: float | None = None,
    least: int = 0,
    table: Tensor | None = None,
    tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, pages (the blocks again without a table) and counts."""
    width, rows = scores.shape[-1], scores.shape[-2] if table is not None else 1
    _fits(width, MOST if share is None else MOST_BY_MASS)
    scores = scores.contiguous()
    lead = scores.shape[:-2] if table is not None else scores.shape[:-1]
    device = scores.device
    blocks = torch.empty((*lead, k), dtype=torch.int32, device=device)
    counts = torch.empty(lead, dtype=torch.int32, device=device)
    pages = torch.empty_like(blocks) if table is not None else blocks
    if counts.numel():
        n = n_blocks if isinstance(n_blocks, Tensor) else None
        padded = max(16, triton.next_power_of_2(width))
        row = pick(CONFIGS, arch_of(scores), dim=padded)
        _select[(counts.numel(),)](
            scores,
            counts if n is None else n,
            counts if table is None else table,
            blocks,
            pages,
            counts,
            lead[1],
            lead[2] if len(lead) == 3 else 1,
            width,
            rows,
            0 if n is not None else n_blocks,
            struct.unpack("<q", struct.pack("<d", 1.0 if share is None else share))[0],
            least,
            0 if table is None else table.shape[1],
            0 if n is None else n.stride(0),
            n.stride(1) if n is not None and n.dim() == 2 else 0,
            S=k,
            SP=triton.next_power_of_2(k),
            N=padded,
            SINK=sink,
            LOCAL=local,
            TOP_P=share is not None,
            HAS_N=n is not None,
            TOKENS=tokens,
            RESOLVE=table is not None,
            **row.launch,
        )
    return blocks, pages, counts
