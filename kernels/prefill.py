"""Attention of many new tokens over the pages of a sequence: lists of blocks, a window, or everything.

    out = softmax(scale q K^T) V,   lse = ln sum exp(scale q K^T),   over the keys that a row sees

Row t stands at position `q_offset + t`. In every operation it sees a key at position j only if `j <=
q_offset + t` and `j < context_lens`; the operations differ in what they leave out:

    dense_prefill           nothing
    window_prefill          keys with `position - j >= window` and `j >= sink_tokens`
    block_sparse_prefill    keys of blocks below the diagonal that are not listed for the row's query block
    token_sparse_prefill    keys of blocks that are not listed for the row

`page_valid`: where a row reaches a page whose `page_valid` is 0 or more, it sees that many tokens of it. A
row reaches every page that is listed for it, and an unlisted one if it sees some position of it.

Cost of a call, B = 1: `4 Hq D` FLOP for each pair of a row and a visible key, and the bytes of the keys once
for each query block of a KV head (`block_sparse_prefill`: `FLOP / block_q` a byte, so large blocks pay).
Bound by arithmetic, but for `token_sparse_prefill`, whose lists differ from row to row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import Attention, BlockSelection, KVPages


def dense_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Causal attention to every token of the sequence.

    q `[B, Hq, T, D]`; `block_table [B, NB]` int32, the page of each block; `context_lens [B]` int32, tokens
    held, the T new ones included. `q_offset`, an int or int32 `[B]`, is the position of row 0, by default
    `context_lens - T`; it may be negative (rows before position 0 see nothing), and neither it nor T need be
    a multiple of anything. `scale` defaults to `D ** -0.5`; `softcap` c > 0 turns a score s into
    `c tanh(s / c)`; `out_dtype` defaults to that of q.

    Raises ValueError for shapes, dtypes, devices or options that do not fit; with `validate`, IndexError
    for a page that does not exist; KernelUnavailable when a forced `impl` cannot run.
    """
    batch, _, rows = checks.queries(q, kv)
    _table(q, kv, block_table, context_lens, validate)
    offset = offsets(context_lens - rows if q_offset is None else q_offset, batch, q.device)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    options = (offset, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run("dense_prefill", impl, q.device, q, kv, block_table, context_lens, *options)
    return found


def window_prefill(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    window: int,
    sink_tokens: int = 0,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Causal attention to the last `window` tokens, the row's own included, and the first `sink_tokens`.

    Exact to the token (the Lambda shape of arXiv 2309.17453). Everything else as in `dense_prefill`; also
    raises ValueError for a window below 1.
    """
    batch, _, rows = checks.queries(q, kv)
    _table(q, kv, block_table, context_lens, validate)
    if window < 1:
        raise ValueError(f"window is {window}: 1 or more is needed")
    checks.window_options(None, sink_tokens, batch, q.device)
    offset = offsets(context_lens - rows if q_offset is None else q_offset, batch, q.device)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    options = (window, sink_tokens, offset, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run(
        "window_prefill", impl, q.device, q, kv, block_table, context_lens, *options
    )
    return found


def block_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    q_offset: int | Tensor | None = None,
    block_q: int = 128,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Attend to the listed blocks, and to the diagonal.

    Query block i is the rows from `i block_q` on; its first block on the diagonal is `d = (q_offset + i
    block_q) // page_tokens`, rounded down. A row sees a key at or before its own position if the key's block
    is listed for i, or is d or later. `selection` holds a list for each query block, `[B, H, ceil(T /
    block_q), S]` with H = Hkv (shared by G heads) or Hq; entries are ascending, unique and below d, so a
    listed block is visible as a whole. Sinks and the local window are the lists' business: see
    `lists.complete_lists`. Listed blocks are read from `selection.pages`, the diagonal from `block_table`.

    Everything else as in `dense_prefill`; also raises ValueError for a `block_q` below 1, and with
    `validate` IndexError for a list out of order or an entry that is not below d.
    """
    batch, heads, rows = checks.queries(q, kv)
    if block_q < 1:
        raise ValueError(f"block_q is {block_q}: 1 or more is needed")
    blocks = -(-rows // block_q)
    checks.selection(selection, (batch, blocks), (kv.n_kv_heads, heads), q)
    _table(q, kv, block_table, context_lens, validate)
    offset = offsets(context_lens - rows if q_offset is None else q_offset, batch, q.device)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    if validate:
        starts = offset[:, None, None] + block_q * torch.arange(blocks, device=q.device)
        contents.selection(selection, kv.n_pages, starts // kv.page_tokens)
    options = (offset, block_q, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run(
        "block_sparse_prefill", impl, q.device, q, kv, selection, block_table, context_lens, *options
    )
    return found


def token_sparse_prefill(
    q: Tensor,
    kv: KVPages,
    selection: BlockSelection,
    context_lens: Tensor,
    *,
    q_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Attention:
    """Attend to the blocks listed for each row: one list per token and head.

    `selection` is `[B, H, T, S]` with H = Hkv (shared by G heads) or Hq. A row sees the keys of its listed
    blocks up to its own position, so a list may hold the row's own block. Everything else as in
    `dense_prefill`; with `validate`, IndexError also for a list that is not ascending and unique.
    """
    batch, heads, rows = checks.queries(q, kv)
    checks.selection(selection, (batch, rows), (kv.n_kv_heads, heads), q)
    checks.ints("context_lens", context_lens, (batch,), q.device)
    offset = offsets(context_lens - rows if q_offset is None else q_offset, batch, q.device)
    scale = checks.attention_options(scale, softcap, out_dtype, q)
    if validate:
        contents.selection(selection, kv.n_pages)
    options = (offset, scale, softcap, out_dtype or q.dtype)
    found: Attention = choose.run(
        "token_sparse_prefill", impl, q.device, q, kv, selection, context_lens, *options
    )
    return found


def offsets(q_offset: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """The position of row 0 of each sequence, int32 `[B]`."""
    if isinstance(q_offset, int):
        return torch.full((batch,), q_offset, dtype=torch.int32, device=device)
    checks.ints("q_offset", q_offset, (batch,), device)
    return q_offset


def _table(q: Tensor, kv: KVPages, block_table: Tensor, context_lens: Tensor, validate: bool) -> None:
    checks.ints("block_table", block_table, (q.shape[0], -1), q.device)
    checks.ints("context_lens", context_lens, (q.shape[0],), q.device)
    if validate:
        contents.table(block_table, context_lens, kv.page_tokens, kv.n_pages)
