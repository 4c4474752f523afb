"""Attention of a few new tokens to chosen single tokens, and to summary keys that stand for many.

    out = softmax(scale q K^T + log_weight) V,   lse = ln sum exp(scale q K^T + log_weight)

`token_decode` gathers its keys one by one from the pages: `2 Hkv S D bytes(K)` in pieces of a row, and
`4 Hq T S D` FLOP. `pseudo_attention` reads keys that lie together; with the mean key of a cluster, its mean
value and the log of its size it is the estimate of clustered attention (Vyas, Katharopoulos, Fleuret, 2020).
Both give parts for `merge_lse`. Limits: none in torch; the C++ implementation says in `Uncovered` what it
leaves to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels.records import Attention, KVPages


def token_decode(
    q: Tensor,
    kv: KVPages,
    tokens: Tensor,
    counts: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Attend to the listed tokens, all of them visible to every row.

    q `[B, Hq, T, D]`; `tokens [B, Hkv, S]` int32, `page * page_tokens + slot`, shared by the query heads of a
    KV head; `counts [B, Hkv]` int32, how many of them are in use. Order does not matter; a token listed twice
    counts twice. `scale` defaults to `D ** -0.5`; `softcap` c > 0 turns a score s into `c tanh(s / c)`;
    `out_dtype` defaults to that of q.

    Raises ValueError for shapes, dtypes, devices or options that do not fit; with `validate`, IndexError for
    a token outside the pool or a count above S; KernelUnavailable when a forced `impl` cannot run.
    """
    batch, _, _ = checks.queries(q, kv)
    checks.ints("tokens", tokens, (batch, kv.n_kv_heads, -1), q.device)
    checks.ints("counts", counts, (batch, kv.n_kv_heads), q.device)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    if validate:
        _contents(tokens, counts, kv.n_pages * kv.page_tokens)
    options = (scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run("token_decode", impl, q.device, q, kv, tokens, counts, *options)
    return found


def pseudo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Attention:
    """Attend to keys that are given as they are, each with an additive logit.

    q `[B, Hq, T, D]`; k and v `[B, Hkv, S, D]` in the dtype of q; `log_weight [B, Hkv, S]` float32 is added
    to the score of its key, after the soft cap; -inf hides the slot, whose k and v must still be finite.
    Other options as in `token_decode`.

    Raises ValueError for shapes, dtypes, devices or options that do not fit; KernelUnavailable when a forced
    `impl` cannot run.
    """
    checks.tensor("q", q, 4)
    checks.tensor("k", k, 4)
    checks.floats("q", q)
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads: a multiple of k's {k.shape[1]} is needed")
    batch, heads, slots, size = q.shape[0], k.shape[1], k.shape[2], q.shape[3]
    for name, x, shape, dtype in (
        ("k", k, (batch, heads, slots, size), q.dtype),
        ("v", v, (batch, heads, slots, size), q.dtype),
        ("log_weight", log_weight, (batch, heads, slots), torch.float32),
    ):
        checks.tensor(name, x, len(shape))
        if tuple(x.shape) != shape or x.dtype != dtype or x.device != q.device:
            came = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"{name} is {came}: {dtype} {list(shape)} on {q.device} is needed")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if size and x.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} in its last dimension: 1 is needed, {name}.contiguous()"
            )
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    options = (scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run("pseudo_attention", impl, q.device, q, k, v, log_weight, *options)
    return found


def _contents(tokens: Tensor, counts: Tensor, limit: int) -> None:
    """Raise IndexError for the first count above S, or the first listed token outside the pool."""
    slots = tokens.shape[2]
    if bool((bad := (counts < 0) | (counts > slots)).any()):
        b, h = (int(i) for i in bad.nonzero()[0])
        raise IndexError(f"counts[{b}, {h}] is {int(counts[b, h])}: 0 to {slots} is needed")
    live = torch.arange(slots, device=tokens.device) < counts[..., None]
    if bool((bad := live & ((tokens < 0) | (tokens >= limit))).any()):
        b, h, s = (int(i) for i in bad.nonzero()[0])
        raise IndexError(f"tokens[{b}, {h}, {s}] is {int(tokens[b, h, s])}: the pool has {limit} tokens")
