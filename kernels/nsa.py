"""Native sparse attention (arXiv 2502.11089), forward: three branches, each with a softmax of its own.

    out = g_cmp out_cmp + g_slc out_slc + g_win out_win

    cmp   keys compressed by the model: block i covers the tokens [i stride, i stride + cmp_block) and is seen
          by a row whose position is not before its last token
    slc   the `n_selected` blocks of `slc_block` tokens that the compressed probabilities point at
    win   the last `window` tokens

Importance of a selection block: every compressed block gives its probability to each of its `cmp_block /
cmp_stride` strides; strides inside the selection block are summed, over the G heads too. Block 0, the row's
own block and the one before it are always selected and count within `n_selected`; ties go to the higher
block. Cost, B = 1: `4 Hq D T (NC / 2 + n_selected slc_block + window)` FLOP, bound by arithmetic; decode is
the same with T = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose, prefill
from agentctx.kernels import validate as contents
from agentctx.kernels.records import BlockSelection, KVPages


def nsa_forward(
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    win: KVPages,
    gates: Tensor,
    *,
    cmp_block: int = 32,
    cmp_stride: int = 16,
    slc_block: int = 64,
    n_selected: int = 16,
    window: int = 512,
    q_offset: int | Tensor = 0,
    scale: float | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, BlockSelection]:
    """Return out `[B, Hq, T, D]` in the dtype of q and the selection, `[B, Hkv, T, n_selected]`.

    q `[B, Hq, T, D]`; `cmp` = (k, v) `[B, Hkv, NC, D]`; `gates [B, Hq, T, 3]` in [0, 1], in the order cmp,
    slc, win. `slc` and `win` hold the sequences one behind the other: page `b P / B + i` is block i of
    sequence b, and `slc_block` is `slc.page_tokens`. `q_offset`, an int or int32 `[B]`, is the position of
    row 0; the keys of the T new tokens are in the pages already. A row that sees nothing of a branch gets 0
    from it.

    Raises ValueError for shapes, dtypes, devices or options that do not fit, or pages too few for the tokens;
    with `validate`, IndexError for a NaN in `gates`; KernelUnavailable when a forced `impl` cannot run.
    """
    batch, heads, rows = checks.queries(q, slc)
    checks.queries(q, win)
    _check_tensors(q, cmp, slc, gates)
    if slc_block != slc.page_tokens:
        raise ValueError(f"slc_block is {slc_block}: the pages of slc hold {slc.page_tokens} tokens")
    if cmp_stride < 1 or cmp_block % cmp_stride or slc_block % cmp_stride or cmp_block < 1:
        raise ValueError(f"cmp_stride is {cmp_stride}: it must divide cmp_block {cmp_block} and {slc_block}")
    if n_selected < 3:
        raise ValueError(
            f"n_selected is {n_selected}: 3 or more is needed, block 0, the own and the one before"
        )
    if window < 1:
        raise ValueError(f"window is {window}: 1 or more is needed")
    _check_pools(slc, win, batch, q_offset + rows if isinstance(q_offset, int) else 0)
    offset = prefill.offsets(q_offset, batch, q.device)
    scale = checks.attention_options(scale, 0.0, None, q)
    if validate:
        contents.no_nan("gates", gates)
        for kv in (slc, win):
            contents.table(_table(kv, batch), (offset + rows).clamp_min(0), kv.page_tokens, kv.n_pages)
    tables = (_table(slc, batch), _table(win, batch))
    options = (cmp_block, cmp_stride, n_selected, window, offset, scale)
    found: tuple[Tensor, BlockSelection] = choose.run(
        "nsa_forward", impl, q.device, q, cmp, slc, win, gates, tables, *options
    )
    return found


def _check_tensors(q: Tensor, cmp: tuple[Tensor, Tensor], slc: KVPages, gates: Tensor) -> None:
    batch, heads, rows, size = q.shape
    for name, x in (("cmp[0]", cmp[0]), ("cmp[1]", cmp[1])):
        checks.tensor(name, x, 4)
        if x.shape != (batch, slc.n_kv_heads, cmp[0].shape[2], size) or x.dtype != q.dtype:
            wanted = [batch, slc.n_kv_heads, "NC", size]
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: {q.dtype} {wanted} is needed")
    checks.tensor("gates", gates, 4)
    checks.floats("gates", gates)
    if gates.shape != (batch, heads, rows, 3):
        raise ValueError(f"gates is {list(gates.shape)}: {[batch, heads, rows, 3]} is needed")


def _check_pools(slc: KVPages, win: KVPages, batch: int, tokens: int) -> None:
    """Pools of whole sequences with room for `tokens` tokens of each."""
    if win.n_kv_heads != slc.n_kv_heads:
        raise ValueError(f"win has {win.n_kv_heads} heads, slc {slc.n_kv_heads}: they must be equal")
    for name, kv in (("slc", slc), ("win", win)):
        if batch == 0 or kv.n_pages % batch:
            raise ValueError(f"{name} has {kv.n_pages} pages: a multiple of the batch, {batch}, is needed")
        if tokens > kv.n_pages // batch * kv.page_tokens:
            raise ValueError(f"{name} has {kv.n_pages // batch} pages a sequence: {tokens} tokens are due")


def _table(kv: KVPages, batch: int) -> Tensor:
    return torch.arange(kv.n_pages, dtype=torch.int32, device=kv.k.device).view(batch, -1)
