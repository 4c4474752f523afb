"""NSA forward of 32K, with keys compressed to the mean of 64, as flash-linear-attention has it."""

from __future__ import annotations

from collections.abc import Iterable

import peers
import torch
from draw import PAGE, Shapes, noise
from measure import Bench, Candidate, Record, Target
from torch import Tensor

from agentctx.kernels.nsa import nsa_forward
from agentctx.kernels.records import KVPages
from agentctx.kernels.roofline import Cost

WINDOW, SELECTED = 512, 16


def run(bench: Bench, of: Shapes) -> Iterable[Record]:
    (heads, kv_heads), tokens = of.nsa_heads, of.nsa_tokens
    q = noise(bench, 1, heads, tokens, of.size)
    k, v = noise(bench, kv_heads, tokens, of.size), noise(bench, kv_heads, tokens, of.size)
    gates = torch.rand(1, heads, tokens, 3, device=bench.device).to(torch.bfloat16)
    pool = KVPages.over(k, v)
    means = tuple(x.view(1, kv_heads, -1, PAGE, of.size).mean(3) for x in (k, v))

    def forward(rows: int, impl: str) -> Tensor:
        """The last `rows` rows."""
        options = {"cmp_block": PAGE, "cmp_stride": PAGE, "n_selected": SELECTED, "window": WINDOW}
        own = (q[:, :, -rows:], means, pool, pool, gates[:, :, -rows:])
        return nsa_forward(*own, q_offset=tokens - rows, impl=impl, **options)[0]

    few = min(64, tokens)
    pairs = tokens * (tokens / PAGE / 2 + SELECTED * PAGE + WINDOW)
    own = Candidate(
        {"operation": "nsa_forward", "cmp_block": PAGE, "n_selected": SELECTED, "window": WINDOW},
        lambda i: forward(tokens, "triton"),
        lambda: (forward(tokens, "triton")[:, :, -few:], forward(few, "torch")),
        Cost(4 * (heads + kv_heads) * tokens * of.size, 4.0 * heads * of.size * pairs),
        {"fla": Target(1.0, 1.2)},
    )
    shape = {"B": 1, "Hq": heads, "Hkv": kv_heads, "D": of.size, "T": tokens, "tokens": tokens}
    baselines = peers.nsa(bench, q, k[None], v[None], gates, WINDOW)
    return bench.compare(shape, [own], baselines, sets=1, graph=False)
