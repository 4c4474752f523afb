"""How much attention each context token gets: for retrieval by attention, citations and eviction.

    mass[n] = sum over heads h and rows t of heads[h] exp(s[h, t, n] - lse[h, t]),   s the scaled scores

Two passes over K, none over V: the first finds the lse of every row, the second adds up the columns; with
`lse` given the first is skipped. The matrix of T x N scores never exists. Cost of a pass, B = 1: `2 Hq T N
D` FLOP and `Hkv N D bytes(K)`; bound by arithmetic from some ten rows on. Sums have a fixed order, so
results are reproducible and do not depend on the number of threads. Limits: C++ serves pages of 64 in
float32, bfloat16, int8 and int4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import KVPages


def attention_mass(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    q_pos: Tensor | None = None,
    heads: Tensor | None = None,
    lse: Tensor | None = None,
    per: str = "token",
    per_head: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str | None = None,
    validate: bool = False,
) -> Tensor:
    """The attention that each token (`per="token"`) or block (`per="block"`) gets from all rows of q.

    q `[B, Hq, T, D]`; `block_table [B, NB]`, `context_lens [B]` int32. Row t stands at `q_pos[b, t]`, int32
    `[B, T]`, by default at `context_lens - T + t`, and sees no later key. `heads [Hq]` float32 weighs the
    heads (0 leaves one out). `lse [B, Hq, T]` float32 of a forward pass that may have seen more keys makes
    the masses shares of that whole; without it the masses of a sequence sum to the weights of its rows that
    see a key. Returns float32 `[B, N]`, N = NB page_tokens, or `[B, NB]`; with `per_head` `[B, Hq, ...]`,
    weighed but not added up. Tokens past the context have mass 0.

    Raises ValueError for shapes, dtypes, devices or options that do not fit; with `validate` IndexError for a
    page that does not exist or NaN in `lse`; KernelUnavailable when a forced `impl` cannot run.
    """
    batch, n_heads, rows = checks.queries(q, kv)
    checks.ints("block_table", block_table, (batch, -1), q.device)
    checks.ints("context_lens", context_lens, (batch,), q.device)
    if q_pos is not None:
        checks.ints("q_pos", q_pos, (batch, rows), q.device)
    for name, value, shape in (("heads", heads, (n_heads,)), ("lse", lse, (batch, n_heads, rows))):
        if value is None:
            continue
        checks.tensor(name, value, len(shape))
        if value.dtype != torch.float32 or tuple(value.shape) != shape or value.device != q.device:
            came = f"{value.dtype} {list(value.shape)} on {value.device}"
            raise ValueError(f"{name} is {came}: float32 {list(shape)} on {q.device} is needed")
    if per not in ("token", "block"):
        raise ValueError(f"per is {per!r}: 'token' or 'block' is needed")
    scale = checks.attention_options(scale, softcap, None, q)
    if validate:
        contents.table(block_table, context_lens, kv.page_tokens, kv.n_pages)
        if lse is not None:
            contents.no_nan("lse", lse)
    options = (q_pos, heads, lse, per, per_head, scale, softcap)
    mass: Tensor = choose.run("attention_mass", impl, q.device, q, kv, block_table, context_lens, *options)
    return mass


def span_sums(mass: Tensor, spans: Tensor, *, impl: str | None = None, validate: bool = False) -> Tensor:
    """Add up `mass [B, N]` float32 over half-open token ranges, `spans [n, 2]` int32; returns `[B, n]`
    float32.

    Raises ValueError for shapes, dtypes or devices that do not fit; with `validate` IndexError for a span
    that does not lie within 0 to N or ends before it starts.
    """
    checks.tensor("mass", mass, 2)
    if mass.dtype != torch.float32:
        raise ValueError(f"mass is {mass.dtype}: float32 is needed")
    checks.ints("spans", spans, (-1, 2), mass.device)
    if validate:
        start, end = spans.unbind(1)
        if bool((bad := (start < 0) | (end < start) | (end > mass.shape[1])).any()):
            i = int(bad.nonzero()[0])
            raise IndexError(
                f"spans[{i}] is {spans[i].tolist()}: ascending within 0 to {mass.shape[1]} is needed"
            )
    sums: Tensor = choose.run("span_sums", impl, mass.device, mass, spans)
    return sums
