"""What only moves bytes, against copy bandwidth: rotary positions, quantisation, summaries, writes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from draw import PAGE, Shapes, draw, noise
from measure import Bench, Candidate, Record, Target
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages
from agentctx.kernels.rope import rope
from agentctx.kernels.store import write_kv
from agentctx.kernels.summary import build_summary

MOVES = {"roofline": Target(0.6, 0.8)}
KINDS = ("minmax", "mean", "submeans", "vmax", "hadamard2")


def rotary(bench: Bench, of: Shapes) -> Iterable[Record]:
    x = [noise(bench, 1, of.q_heads, of.new_tokens, of.size) for _ in range(min(3, of.sets))]
    at = torch.arange(of.new_tokens, dtype=torch.int32, device=bench.device)
    frequencies = 500_000.0 ** (-torch.arange(0, of.size, 2, device=bench.device) / of.size)

    def turned(i: int, impl: str) -> Tensor:
        return rope(x[i], at, frequencies, impl=impl)

    own = Candidate(
        {"operation": "rope"},
        lambda i: turned(i, "triton"),
        lambda: (turned(0, "triton"), turned(0, "torch")),
        roofline.rope(of.q_heads, of.size, of.new_tokens, element=2),
        MOVES,
    )
    return bench.compare(of.record(of.new_tokens, of.new_tokens), [own], {}, sets=len(x))


def coded(bench: Bench, of: Shapes) -> Iterable[Record]:
    sets, pages = min(3, of.sets), of.near // PAGE
    shape = (pages, of.kv_heads, PAGE, of.size)
    pairs = [(noise(bench, *shape), noise(bench, *shape)) for _ in range(sets)]
    ids = torch.arange(pages, dtype=torch.int32, device=bench.device)

    def check(bits: int) -> tuple[Tensor, Tensor]:
        found = [quantize_pages(*pairs[0], bits, impl=impl) for impl in ("triton", "torch")]
        got, want = (torch.stack(dequantize_pages(x, ids, torch.float32, impl="torch")) for x in found)
        return got, want

    candidates = [
        Candidate(
            {"operation": "quantize_pages", "bits": bits},
            lambda i, bits=bits: quantize_pages(*pairs[i], bits, impl="triton"),
            lambda bits=bits: check(bits),
            roofline.quantize_pages(of.kv_heads, of.size, of.near, bits, element=2),
            MOVES,
        )
        for bits in (8, 4)
    ]
    return bench.compare(of.record(of.near), candidates, {}, sets=sets)


def summaries(bench: Bench, of: Shapes) -> Iterable[Record]:
    sets = min(3, of.sets)
    data = draw(bench, of, of.near, sets=sets)
    cut = torch.full((of.kv_heads,), 0.98, device=bench.device)
    candidates = []
    for kind in KINDS:
        given = cut if kind == "hadamard2" else None
        kept = build_summary(data.pool, data.tables[0], data.lens, kind, thresholds=given, impl="triton")

        def build(i: int, kind: str = kind, given: Tensor | None = given, kept=kept) -> Tensor:
            tables = (data.tables[i], data.lens, kind)
            return build_summary(data.pool, *tables, out=kept, thresholds=given, impl="triton").data

        def check(kind: str = kind, given: Tensor | None = given, build=build, kept=kept):
            found = build(0).clone()
            again = build_summary(
                data.pool, data.tables[0], data.lens, kind, out=kept, thresholds=given, impl="torch"
            )
            return found, again.data

        element = 1.0 if kind == "hadamard2" else 2.0
        candidates.append(
            Candidate(
                {"operation": "build_summary", "summary": kind},
                build,
                check,
                roofline.build_summary(
                    kind, of.kv_heads, of.size, of.near, element=2, summary_element=element
                ),
                MOVES,
            )
        )
    return bench.compare(of.record(of.near), candidates, {}, sets=sets)


def writes(bench: Bench, of: Shapes) -> Iterable[Record]:
    """New tokens into pages: many, as in prefill, and one."""
    for tokens in (of.new_tokens, 1):
        sets = min(3, of.sets)
        data = draw(bench, of, of.new_tokens, sets=sets)
        new = [[noise(bench, 1, of.kv_heads, tokens, of.size) for _ in range(2)] for _ in range(sets)]
        start = torch.zeros(1, dtype=torch.int32, device=bench.device)

        def write(i: int, impl: str, pool: KVPages, data=data, new=new, start=start) -> None:
            write_kv(pool, *new[i], data.tables[i], start, impl=impl)

        def check(write=write, data=data) -> tuple[Tensor, Tensor]:
            found = []
            for impl in ("triton", "torch"):
                pool = KVPages(data.pool.k.clone(), data.pool.v.clone(), PAGE, data.pool.head_dim)
                write(0, impl, pool)
                found.append(torch.stack((pool.k, pool.v)))
            return found[0], found[1]

        own = Candidate(
            {"operation": "write_kv"},
            lambda i, write=write, data=data: write(i, "triton", data.pool),
            check,
            roofline.write_kv(of.kv_heads, of.size, tokens, element=2),
            MOVES if tokens > 1 else {},
        )
        yield from bench.compare(of.record(of.new_tokens, tokens), [own], {}, sets=sets)
