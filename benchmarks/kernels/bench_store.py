"""What moves bytes: rope, quantisation, summaries, writing. The baseline copies the same number of bytes, so
a ratio is a share of the copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Bench, Candidate, compare
from sequences import KV_HEADS, Q_HEADS, SIZE, Sequences, draw
from torch import Tensor

from agentctx.kernels import roofline
from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages
from agentctx.kernels.roofline import Cost
from agentctx.kernels.rope import rope
from agentctx.kernels.store import unpack_pages, write_kv
from agentctx.kernels.summary import build_summary

TOKENS = 16384
SETS = 4
Answer = Callable[[str, int], Tensor]  # of an implementation, on one of the sets


def run(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of each operation that is bound by memory."""
    tokens = TOKENS // 4 if bench.quick else TOKENS
    found: dict[str, list[dict[str, Any]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        data = draw(tokens, dtype, SETS)
        for operation, options, cost, answer in operations(data, dtype):
            how = {"operation": operation, **options}
            source = torch.randn(int(cost.bytes / 8) or 1)  # the copy reads half of the bytes and writes half
            target = torch.empty_like(source)
            candidates = [
                Candidate(
                    impl,
                    impl,
                    ("copy",),
                    lambda i, answer=answer, impl=impl: answer(impl, i),
                    lambda answer=answer, impl=impl: (answer(impl, 0), answer("reference", 0)),
                    cost,
                    how,
                )
                for impl in ("cpp", "torch")
            ]
            calls = {"copy": lambda _, source=source, target=target: target.copy_(source)}
            found.setdefault(operation, []).extend(
                compare(bench, data.shape, dtype, candidates, calls, sets=SETS, batch=SETS, seconds=1.0)
            )
    return found


def operations(data: Sequences, dtype: torch.dtype) -> list[tuple[str, dict[str, Any], Cost, Answer]]:
    """Each operation with its options, its least work and how to call it."""
    tokens, element = data.tokens, float(dtype.itemsize)
    frequencies = 10000.0 ** (-torch.arange(0, SIZE, 2).float() / SIZE)
    positions = torch.arange(tokens, dtype=torch.int32)
    queries = [torch.randn(1, Q_HEADS, tokens, SIZE).to(dtype) for _ in range(SETS)]
    turned = torch.empty_like(queries[0])

    def turn(impl: str, i: int) -> Tensor:
        return rope(
            queries[i], positions, frequencies, out=None if impl == "reference" else turned, impl=impl
        )

    pools = [(data.paged.k[at], data.paged.v[at]) for at in (table[0].long() for table in data.tables)]
    every = torch.arange(data.blocks, dtype=torch.int32)

    def quantise(bits: int) -> Answer:
        def packed(impl: str, i: int) -> Tensor:
            made = quantize_pages(*pools[i], bits, impl=impl)
            return dequantize_pages(made, every, torch.float32)[0] if i == 0 else made.k

        return packed

    def summarise(kind: str) -> Answer:
        return lambda impl, i: build_summary(data.paged, data.tables[i], data.lens, kind, impl=impl).data

    pool = KVPages.empty(data.blocks, KV_HEADS, SIZE, dtype=dtype, format="packed")
    table, start = every[None], torch.zeros(1, dtype=torch.int32)

    def write(impl: str, i: int) -> Tensor:
        write_kv(pool, data.k[i], data.v[i], table, start, impl=impl)
        return unpack_pages(pool).k if i == 0 else pool.k

    kv = {"kv_heads": KV_HEADS, "size": SIZE, "tokens": tokens, "element": element}
    made: list[tuple[str, dict[str, Any], Cost, Answer]] = [
        ("rope", {"style": "half"}, roofline.rope(Q_HEADS, SIZE, tokens, element=element), turn),
        ("write_kv", {"format": "packed"}, roofline.write_kv(**kv), write),
    ]
    for bits in (8, 4):
        made.append(
            ("quantize_pages", {"bits": bits}, roofline.quantize_pages(**kv, bits=bits), quantise(bits))
        )
    for kind in ("minmax", "mean"):
        summary = 4.0 if kind == "minmax" else element
        cost = roofline.build_summary(kind, **kv, summary_element=summary)
        made.append(("build_summary", {"kind": kind}, cost, summarise(kind)))
    return made
