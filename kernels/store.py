"""Keys and values on their way into pages, and pages on their way between layouts, pools and devices.

`write_kv` costs the bytes of the new tokens twice, and with summaries one reading of the touched blocks; it
does not depend on how much the sequence holds. Layouts are those of `records.KVPages`. The other operations
read and write each page once and compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import PACKED_TOKENS, BlockSummary, KVPages

KINDS = ("minmax", "mean", "submeans", "vmax")


def write_kv(
    kv: KVPages,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    *,
    summary: BlockSummary | Sequence[BlockSummary] | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> None:
    """Write k, v `[B, Hkv, T, D]` in place, at positions `start_pos[b]` and following of each sequence.

    `block_table [B, NB]` int32 gives the page of each block, `start_pos [B]` is int32. The pool is paged or
    packed and of the dtype of k and v. The sequence then ends with the last new token. `summary` (of kinds
    minmax, mean, submeans, vmax) is brought up to date for the blocks that were touched, from their pages;
    the open block counts its valid tokens only. No two sequences may write to one page.

    Raises ValueError for what does not fit, also quantised pools, which take whole pages only
    (`quantize_pages`, `copy_pages`). On the CPU, and elsewhere with `validate`, IndexError for a position
    outside the table or a summary, or a page outside the pool; then nothing was written.
    """
    checks.pages(kv)
    if kv.k_scale is not None:
        raise ValueError(
            f"kv has format {kv.format!r}: only whole pages can be quantised, write to paged ones"
        )
    checks.tensor("k", k, 4)
    checks.tensor("v", v, 4)
    shape, pool = k.shape, kv.k
    if v.shape != shape or shape[1] != pool.shape[1] or shape[3] != kv.head_dim:
        wanted = f"[B, {kv.n_kv_heads}, T, {kv.head_dim}]"
        raise ValueError(f"k is {list(shape)}, v {list(v.shape)}: both must be {wanted} for this pool")
    if not k.dtype == v.dtype == pool.dtype:
        raise ValueError(f"k is {k.dtype}, v {v.dtype}, kv {pool.dtype}: they must be equal")
    device = pool.device
    if not k.device == v.device == device:
        raise ValueError(f"k is on {k.device}, v on {v.device}, kv on {device}: move some of them")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(
            f"k and v have strides {k.stride(3)} and {v.stride(3)} in their last dimension: 1 is needed"
        )
    checks.ints("block_table", block_table, (shape[0], -1), device)
    checks.ints("start_pos", start_pos, (shape[0],), device)
    if summary is None:
        summaries: tuple[BlockSummary, ...] = ()
    else:
        summaries = (summary,) if isinstance(summary, BlockSummary) else tuple(summary)
        for one in summaries:
            _fits(one, kv, shape[0])
    if shape[0] == 0 or shape[2] == 0:
        return
    if validate:
        contents.table(block_table, start_pos, kv.page_tokens, kv.n_pages)
        contents.table(block_table, start_pos + shape[2], kv.page_tokens, kv.n_pages)
        for one in summaries:
            contents.room("start_pos", start_pos, shape[2], _capacity(one))
    choose.run("write_kv", impl, device, kv, k, v, block_table, start_pos, summaries)


def _capacity(summary: BlockSummary) -> int:
    """Tokens that `summary` has room for."""
    data, page = summary.data, summary.page_tokens
    blocks = data.shape[3 if summary.kind == "minmax" and data.dim() == 4 else 2]
    return blocks * 16 if summary.kind == "submeans" else blocks * page


def _fits(summary: BlockSummary, kv: KVPages, batch: int) -> None:
    """Raise ValueError unless `summary` is one that a write can bring up to date."""
    if not isinstance(summary, BlockSummary):
        raise TypeError(f"summary is {type(summary).__name__}: BlockSummary or a sequence of them is needed")
    kind, data, pool = summary.kind, summary.data, kv.k
    lead, size = (batch, pool.shape[1]), kv.head_dim
    shape: tuple[int, ...]
    if kind == "minmax" and data.dim() == 4:
        shape, dtype = (*lead, 2 * size, -1), torch.float32
    elif kind == "minmax":
        shape, dtype = (*lead, -1, 2, size), pool.dtype
    elif kind == "vmax":
        shape, dtype = (*lead, -1), torch.float32
    elif kind in KINDS:
        shape, dtype = (*lead, -1, size), pool.dtype
    else:
        raise ValueError(f"summary has kind {kind!r}: a write updates {', '.join(KINDS)}")
    if summary.page_tokens != kv.page_tokens:
        raise ValueError(f"summary has pages of {summary.page_tokens}, kv of {kv.page_tokens}: build it anew")
    fits = data.dim() == len(shape)
    for want, got in zip(shape, data.shape, strict=False):
        fits = fits and want in (-1, got)
    if not fits or data.dtype != dtype or data.device != pool.device:
        came = f"{data.dtype} {list(data.shape)} on {data.device}"
        raise ValueError(
            f"summary.data is {came}: {dtype} {list(shape)} on {pool.device} is needed for {kind}"
        )


def pack_pages(kv: KVPages, *, impl: str | None = None) -> KVPages:
    """Copy "paged" pages of 64 tokens into the "packed" layout of the CPU kernels; float32 or bfloat16.

    Raises ValueError for another format, page size, dtype or an odd head size.
    """
    checks.pages(kv)
    if kv.format != "paged" or kv.page_tokens != PACKED_TOKENS or kv.head_dim % 2:
        what = f"{kv.format} pages of {kv.page_tokens} tokens, head size {kv.head_dim}"
        raise ValueError(f"kv has {what}: paged pages of {PACKED_TOKENS}, even head size, are needed")
    if kv.k.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kv is {kv.k.dtype}: float32 or bfloat16 is needed")
    packed: KVPages = choose.run("pack_pages", impl, kv.k.device, kv)
    return packed


def unpack_pages(kv: KVPages, *, impl: str | None = None) -> KVPages:
    """Copy "packed" pages back into "paged" ones, bit for bit. Raises ValueError for another format."""
    checks.pages(kv)
    if kv.format != "packed":
        raise ValueError(f"kv has format {kv.format!r}: packed is needed")
    paged: KVPages = choose.run("unpack_pages", impl, kv.k.device, kv)
    return paged


def copy_pages(src: KVPages, dst: KVPages, ids: Tensor, *, impl: str | None = None) -> None:
    """Copy pages `ids[i, 0]` of `src` to pages `ids[i, 1]` of `dst`, bit for bit, with scales and validity.

    Pools of one format and shape on any devices; `ids` int32 `[n, 2]`, best on the CPU, for it is read. The
    pools may be one, if no page is both read and written.

    Raises ValueError for pools that differ, IndexError for a page outside its pool or written twice; then
    nothing was copied.
    """
    checks.pages(src)
    checks.pages(dst)
    for name in ("format", "page_tokens", "head_dim", "n_kv_heads"):
        if (one := getattr(src, name)) != (other := getattr(dst, name)):
            raise ValueError(f"src has {name} {one!r}, dst {other!r}: they must be equal")
    if src.k.dtype != dst.k.dtype:
        raise ValueError(f"src is {src.k.dtype}, dst {dst.k.dtype}: they must be equal")
    if (src.page_valid is None) != (dst.page_valid is None):
        raise ValueError("src and dst: both or neither must have page_valid")
    checks.tensor("ids", ids, 2)
    checks.ints("ids", ids, (-1, 2), ids.device)
    if len(ids) == 0:
        return
    _check_ids(src, dst, ids.tolist())
    tensors = ((src.k, dst.k), (src.v, dst.v), (src.k_scale, dst.k_scale), (src.v_scale, dst.v_scale))
    pairs = tuple(
        (one, other)
        for one, other in (*tensors, (src.page_valid, dst.page_valid))
        if one is not None and other is not None
    )
    choose.run("copy_pages", impl, src.k.device, pairs, ids)


def _check_ids(src: KVPages, dst: KVPages, listed: list[list[int]]) -> None:
    for i, (read, written) in enumerate(listed):
        for column, page, name, pool in ((0, read, "src", src), (1, written, "dst", dst)):
            if not 0 <= page < pool.n_pages:
                raise IndexError(f"ids[{i}, {column}] is {page}: {name} has {pool.n_pages} pages")
    targets = {written for _, written in listed}
    if len(targets) != len(listed):
        raise IndexError("ids[:, 1] names a page twice: each page can be written once")
    one_pool = src.k.untyped_storage().data_ptr() == dst.k.untyped_storage().data_ptr()
    if one_pool and (both := targets.intersection(read for read, _ in listed)):
        raise IndexError(f"ids reads and writes page {min(both)} of one pool: copy in two calls")
