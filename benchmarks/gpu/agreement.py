"""Every Triton operation against its float64 reference, on small problems, before anything is timed.

The problem is drawn on the CPU, where the reference answers it; the kernels get a copy on the device. Numbers
agree within the tolerance of the dtype, relative to their norm; infinities must be the same, lists equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from measure import FAILURES, Bench, Record, reason
from torch import Tensor

from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.hadamard import hadamard
from agentctx.kernels.mass import attention_mass
from agentctx.kernels.merge import merge_lse
from agentctx.kernels.nsa import nsa_forward
from agentctx.kernels.prefill import (
    block_sparse_prefill,
    dense_prefill,
    token_sparse_prefill,
    window_prefill,
)
from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import Attention, BlockSelection, BlockSummary, KVPages
from agentctx.kernels.rope import rope, rope_move
from agentctx.kernels.scores import block_scores, pool_queries
from agentctx.kernels.selection import resolve_pages, select_blocks, topk_blocks, topp_blocks
from agentctx.kernels.store import copy_pages, write_kv
from agentctx.kernels.summary import build_summary
from agentctx.kernels.tokens import pseudo_attention, token_decode

ALLOWED = 6e-3
BATCH, KV_HEADS, GROUP, PAGE = 2, 2, 3, 64
LENS = (130, 200)
BLOCKS = 4  # of a table
WINDOW = {"window": 70, "sink_tokens": 5}


@dataclass(frozen=True)
class Problem:
    """All that the operations are given."""

    q: Tensor  # [B, Hq, 1, D]
    rows: Tensor  # [B, Hq, T, D]
    kv: KVPages
    kv8: KVPages
    kv4: KVPages
    table: Tensor
    lens: Tensor
    chosen: BlockSelection
    listed: BlockSelection  # for each query block of `rows`
    each: BlockSelection  # for each row
    k: Tensor  # [B, Hkv, 40, D]: keys by themselves
    v: Tensor
    log_weight: Tensor
    tokens: Tensor
    token_counts: Tensor
    parts: tuple[Attention, ...]
    summaries: dict[str, BlockSummary]
    gates: Tensor
    positions: Tensor
    inv_freq: Tensor


def drawn(size: int, rows: int) -> Problem:
    """A random problem on the CPU; `rows` of prefill end the sequences."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads, pages = KV_HEADS * GROUP, BATCH * BLOCKS
    k, v = (noise(pages, KV_HEADS, PAGE, size) for _ in range(2))
    kv = KVPages(k, v, PAGE, size)
    kv8, kv4 = (quantize_pages(k, v, bits, impl="reference") for bits in (8, 4))
    table = torch.randperm(pages, generator=generator).to(torch.int32).view(BATCH, BLOCKS)
    lens = torch.tensor(LENS, dtype=torch.int32)

    def lists(*lead: int, blocks: int) -> BlockSelection:
        ids = torch.arange(blocks, dtype=torch.int32).expand(*lead, blocks).contiguous()
        counts = torch.full(lead, blocks, dtype=torch.int32)
        return resolve_pages(ids, counts, table, impl="reference")

    summaries = {
        kind: build_summary(kv, table, lens, kind, out=_empty(kind, size), impl="reference")
        for kind in ("minmax", "mean", "submeans", "vmax", "hadamard2")
    }
    part = Attention(noise(BATCH, heads, 1, size), noise(BATCH, heads, 1, dtype=torch.float32))
    return Problem(
        q=noise(BATCH, heads, 1, size),
        rows=noise(BATCH, heads, rows, size),
        kv=kv,
        kv8=kv8,
        kv4=kv4,
        table=table,
        lens=lens,
        chosen=lists(BATCH, KV_HEADS, blocks=2),
        listed=lists(BATCH, KV_HEADS, -(-rows // 32), blocks=1),
        each=lists(BATCH, KV_HEADS, rows, blocks=2),
        k=noise(BATCH, KV_HEADS, 40, size),
        v=noise(BATCH, KV_HEADS, 40, size),
        log_weight=noise(BATCH, KV_HEADS, 40, dtype=torch.float32),
        tokens=torch.randint(pages * PAGE, (BATCH, KV_HEADS, 50), generator=generator, dtype=torch.int32),
        token_counts=torch.tensor([[50, 3], [0, 41]], dtype=torch.int32),
        parts=(part, Attention(noise(BATCH, heads, 1, size), part.lse.neg())),
        summaries=summaries,
        gates=noise(BATCH, heads, rows, 3).sigmoid(),
        positions=torch.arange(rows, dtype=torch.int32) * 999,
        inv_freq=500_000.0 ** (-torch.arange(0, size, 2) / size),
    )


def _empty(kind: str, size: int) -> BlockSummary | None:
    """Extremes in the layout of the GPU; other kinds have one layout."""
    if kind != "minmax":
        return None
    return BlockSummary(kind, torch.zeros(BATCH, KV_HEADS, 64, 2, size, dtype=torch.bfloat16), PAGE)


def _summary(p: Problem, kind: str, impl: str) -> Tensor:
    kept = p.summaries[kind]
    fresh = replace(kept, data=torch.zeros_like(kept.data))
    given = {"thresholds": kept.scale} if kind == "hadamard2" else {}
    return build_summary(p.kv, p.table, p.lens, kind, out=fresh, impl=impl, **given).data


def _written(p: Problem, impl: str) -> tuple[Tensor, ...]:
    pool = replace(p.kv, k=p.kv.k.clone(), v=p.kv.v.clone())
    kept = {
        kind: replace(p.summaries[kind], data=p.summaries[kind].data.clone()) for kind in ("minmax", "mean")
    }
    write_kv(pool, p.k, p.v, p.table, p.lens, summary=tuple(kept.values()), impl=impl)
    return (pool.k, pool.v, *(one.data for one in kept.values()))


def _copied(p: Problem, impl: str) -> tuple[Tensor, ...]:
    pool = replace(p.kv8, **{name: getattr(p.kv8, name).clone() for name in ("k", "v", "k_scale", "v_scale")})
    copy_pages(p.kv8, pool, torch.tensor([[0, 3], [5, 1]], dtype=torch.int32), impl=impl)
    return pool.k, pool.v, pool.k_scale, pool.v_scale


def _codes(p: Problem, bits: int, impl: str) -> tuple[Tensor, ...]:
    pool = quantize_pages(p.kv.k, p.kv.v, bits, impl=impl)
    return pool.k, pool.v, pool.k_scale, pool.v_scale


def _ranked(p: Problem, impl: str) -> Tensor:
    """Scores for selection, the same whatever the implementation."""
    return p.log_weight.to(torch.float32)


CALLS: dict[str, Callable[[Problem, str], Any]] = {
    "dense_decode": lambda p, impl: dense_decode(p.q, p.kv, p.table, p.lens, impl=impl),
    "dense_decode int8": lambda p, impl: dense_decode(p.q, p.kv8, p.table, p.lens, impl=impl),
    "dense_decode int4": lambda p, impl: dense_decode(p.q, p.kv4, p.table, p.lens, impl=impl),
    "sparse_decode": lambda p, impl: sparse_decode(p.q, p.kv, p.chosen, p.lens, splits=2, impl=impl),
    "token_decode": lambda p, impl: token_decode(p.q, p.kv, p.tokens, p.token_counts, impl=impl),
    "pseudo_attention": lambda p, impl: pseudo_attention(p.q, p.k, p.v, p.log_weight, impl=impl),
    "merge_lse": lambda p, impl: merge_lse(p.parts, impl=impl),
    "dense_prefill": lambda p, impl: dense_prefill(p.rows, p.kv, p.table, p.lens, impl=impl),
    "window_prefill": lambda p, impl: window_prefill(p.rows, p.kv, p.table, p.lens, **WINDOW, impl=impl),
    "block_sparse_prefill": lambda p, impl: block_sparse_prefill(
        p.rows, p.kv, p.listed, p.table, p.lens, block_q=32, impl=impl
    ),
    "token_sparse_prefill": lambda p, impl: token_sparse_prefill(p.rows, p.kv, p.each, p.lens, impl=impl),
    **{
        f"build_summary {kind}": lambda p, impl, kind=kind: _summary(p, kind, impl)
        for kind in ("minmax", "mean", "submeans", "vmax", "hadamard2")
    },
    **{
        f"block_scores {kind}": lambda p, impl, kind=kind: block_scores(
            p.q, p.summaries[kind], p.lens, impl=impl
        )
        for kind in ("minmax", "mean", "submeans", "hadamard2")
    },
    "hadamard": lambda p, impl: hadamard(p.rows, impl=impl),
    "pool_queries": lambda p, impl: pool_queries(p.rows, 16, impl=impl),
    "topk_blocks": lambda p, impl: topk_blocks(_ranked(p, impl), 40, 7, impl=impl),
    "topp_blocks": lambda p, impl: topp_blocks(_ranked(p, impl), 40, 0.7, k_min=4, k_max=30, impl=impl),
    "resolve_pages": lambda p, impl: resolve_pages(p.chosen.blocks, p.chosen.counts, p.table, impl=impl),
    "select_blocks": lambda p, impl: select_blocks(
        p.q, p.summaries["minmax"], p.table, p.lens, 3, impl=impl
    ),
    "quantize_pages 8": lambda p, impl: _codes(p, 8, impl),
    "quantize_pages 4": lambda p, impl: _codes(p, 4, impl),
    "dequantize_pages": lambda p, impl: dequantize_pages(p.kv4, p.table[0], torch.float32, impl=impl),
    "attention_mass": lambda p, impl: attention_mass(p.rows, p.kv, p.table, p.lens, impl=impl),
    "rope": lambda p, impl: rope(p.rows, p.positions, p.inv_freq, impl=impl),
    "rope_move": lambda p, impl: rope_move(
        p.rows, p.positions, p.positions.flip(0).contiguous(), p.inv_freq, impl=impl
    ),
    "nsa_forward": lambda p, impl: nsa_forward(
        p.rows, (p.k[:, :, :12], p.v[:, :, :12]), p.kv, p.kv, p.gates,
        n_selected=3, window=70, q_offset=LENS[0], impl=impl,
    ),
    "write_kv": _written,
    "copy_pages": _copied,
}  # fmt: skip


def moved(value: Any, device: torch.device) -> Any:
    """A copy of all tensors in `value`."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: moved(x, device) for name, x in value.items()}
    if isinstance(value, tuple):
        there = [moved(x, device) for x in value]
        return type(value)(*there) if hasattr(value, "_fields") else tuple(there)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for x in value:
            yield from tensors(x)


def distance(got: Any, want: Any) -> float:
    """The largest relative distance of tensors in `got` and `want`. Raises ValueError if they differ."""
    worst = 0.0
    for one, other in zip(tensors(got), tensors(want), strict=True):
        one, other = one.cpu(), other.cpu()
        if one.shape != other.shape or one.dtype != other.dtype:
            raise ValueError(f"{one.dtype} {list(one.shape)} for {other.dtype} {list(other.shape)}")
        if not one.dtype.is_floating_point:
            if not torch.equal(one, other):
                raise ValueError(f"{int((one != other).sum())} of {one.numel()} whole numbers differ")
            continue
        endless = other.isinf()
        if not torch.equal(one[endless], other[endless]):
            raise ValueError("infinities differ")
        one, other = one[~endless].double(), other[~endless].double()
        worst = max(worst, float((one - other).norm() / other.norm().clamp_min(1e-30)))
    if not worst <= ALLOWED:
        raise ValueError(f"{worst:.1e} away from the reference, {ALLOWED:.0e} is allowed")
    return worst


def run(bench: Bench) -> Iterator[Record]:
    """A record for each operation."""
    problem = drawn(32, 16) if bench.dry else drawn(128, 96)
    there = moved(problem, bench.device)
    for name, call in CALLS.items():
        try:
            record: Record = {
                "operation": name,
                "error": distance(call(there, "triton"), call(problem, "reference")),
            }
        except FAILURES as error:
            record = {"operation": name, "reason": reason(error)}
        print(f"  {name}: {record.get('reason', 'agrees')}", flush=True)
        yield record
