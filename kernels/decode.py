"""Attention of a few new tokens over the pages of a sequence, all of them or a list.

    out = softmax(scale q K^T) V,   lse = ln sum exp(scale q K^T),   over the visible keys of the listed
    blocks

Every listed page is read once and serves the G query heads of its KV head. Cost of a call, B = 1: the bytes
of the listed K and V, `2 Hkv tokens D bytes(K)`, and `4 Hq T tokens D` FLOP; it is bound by memory. Work is
split over the list, and the parts are united by their lse (FlashDecoding). Limits: none in torch; the C++
and Triton implementations say in `Uncovered` what they leave to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import Attention, BlockSelection, KVPages


def dense_decode(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    first_pos: Tensor | None = None,
    sink_tokens: int = 0,
    tail: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Attend to every visible token of the sequence.

    q `[B, Hq, T, D]`; `block_table [B, NB]` int32, the page of each block; `context_lens [B]` int32, tokens
    held, the T new ones included. Row t stands at position `context_lens - T + t` and sees no later key.
    `first_pos [B]` hides keys with `sink_tokens <= position < first_pos`. `tail`: K and V `[B, Hkv,
    page_tokens, D]` in the dtype of q of the block that is not full, `context_lens // page_tokens`, for
    quantised pages. `splits`: parts of the work, None chooses; results do not depend on the number of
    threads. `scale` defaults to `D ** -0.5`; `softcap` c > 0 turns a score s into `c tanh(s / c)`;
    `out_dtype` defaults to that of q.

    Raises ValueError for shapes, dtypes, devices or options that do not fit; with `validate`, IndexError
    for a page that does not exist; KernelUnavailable when a forced `impl` cannot run.
    """
    batch, _, _ = checks.queries(q, kv)
    checks.ints("block_table", block_table, (batch, -1), q.device)
    checks.ints("context_lens", context_lens, (batch,), q.device)
    checks.window_options(first_pos, sink_tokens, batch, q.device)
    checks.tail(tail, kv, q)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    if validate:
        contents.table(block_table, context_lens, kv.page_tokens, kv.n_pages)
    options = (first_pos, sink_tokens, tail, splits, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run("dense_decode", impl, q.device, q, kv, block_table, context_lens, *options)
    return found


def sparse_decode(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    *,
    first_pos: Tensor | None = None,
    sink_tokens: int = 0,
    tail: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Attend to the visible tokens of the listed blocks only.

    `selection` holds one list per KV head, `[B, Hkv, S]`, shared by its G query heads, or one per query
    head, `[B, Hq, S]`, which loses the sharing. Empty lists and counts of different lengths are legal; the
    order of a list does not matter. With `tail`, the block `context_lens // page_tokens` is read from there
    if it is listed. Everything else as in `dense_decode`.
    """
    batch, heads, _ = checks.queries(q, kv)
    checks.selection(selection, (batch,), (kv.n_kv_heads, heads), q)
    checks.ints("context_lens", context_lens, (batch,), q.device)
    checks.window_options(first_pos, sink_tokens, batch, q.device)
    checks.tail(tail, kv, q)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    if validate:
        contents.selection(selection, kv.n_pages)
    options = (first_pos, sink_tokens, tail, splits, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run("sparse_decode", impl, q.device, q, kv, selection, context_lens, *options)
    return found
