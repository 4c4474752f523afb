"""Summaries of blocks: what a scorer reads in place of the keys.

kind        of the valid tokens of a block
minmax      the extremes of each channel of k (Quest): they bound every score in the block
mean        the mean key
submeans    means of 32 keys every 16; the last one of a block reaches into the next block
vmax        the largest norm of v
hadamard2   two bits for each channel of every rotated key: `(x > -t) + (x > 0) + (x > t)` (Adamas)

Built from the pages once, and from `first_block` on when tokens were added. Cost: the bytes of K (vmax: V) of
those blocks, one or two FLOP an element (hadamard2: `log2 D` more); bound by memory. The layouts are those of
`records.BlockSummary`, in the logical order of the blocks. Limits: hadamard2 needs D a power of two, 4 or
more; C++ serves pages of 64 in float32, bfloat16, int8 and int4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import BlockSummary, KVPages

KINDS = ("minmax", "mean", "submeans", "vmax", "hadamard2")
SUBMEAN_STEP = 16  # tokens between two sub-block means, which cover twice as many
_CAPACITY = 64  # blocks are allocated in multiples of it


def build_summary(
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    kind: str,
    *,
    first_block: int = 0,
    out: BlockSummary | None = None,
    thresholds: Tensor | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> BlockSummary:
    """Summarise the blocks from `first_block` to the end of each sequence.

    `block_table [B, NB]`, `context_lens [B]` int32. A block that is not full is summarised over its tokens.
    `out`, a summary of the same kind, is updated in place and returned; when the table has outgrown it, a
    larger copy is returned. The blocks before `first_block` stay as they are, but for the sub-block mean
    that reaches into it; blocks past the context are not written (zero in a new summary). `thresholds
    [Hkv]` float32, for hadamard2: default those of `out`, else 0.98 of the standard deviation of the
    rotated keys that this call reads; the used ones are in `scale` of the result. Means have the dtype of
    k, of quantised pages bfloat16; extremes are exact (on a GPU those of quantised pages are float32).

    Raises ValueError for an unknown kind, or shapes, dtypes, devices and options that do not fit; with
    `validate` IndexError for a page that does not exist; KernelUnavailable when a forced `impl` cannot run.
    """
    checks.pages(kv)
    device = kv.k.device
    checks.ints("block_table", block_table, (-1, -1), device)
    batch, blocks = block_table.shape
    checks.ints("context_lens", context_lens, (batch,), device)
    size, heads = kv.head_dim, kv.n_kv_heads
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: use one of {', '.join(KINDS)}")
    if not 0 <= first_block <= blocks:
        raise ValueError(f"first_block is {first_block}: 0 to the {blocks} blocks of the table is needed")
    if kind == "hadamard2" and (size < 4 or size & (size - 1)):
        raise ValueError(f"kv has head size {size}: hadamard2 needs a power of two, 4 or more")
    if thresholds is not None:
        if kind != "hadamard2":
            raise ValueError(f"thresholds belong to hadamard2, kind is {kind}")
        checks.tensor("thresholds", thresholds, 1)
        if thresholds.dtype != torch.float32 or len(thresholds) != heads or thresholds.device != device:
            came = f"{thresholds.dtype} {list(thresholds.shape)} on {thresholds.device}"
            raise ValueError(f"thresholds is {came}: float32 [{heads}] on {device} is needed")
    if validate:
        contents.table(block_table, context_lens, kv.page_tokens, kv.n_pages)
    data = _storage(kv, kind, batch, blocks, out, impl)
    if thresholds is None and out is not None:
        thresholds = out.scale
    first = max(0, first_block - 1) if kind == "submeans" else first_block
    options = (kind, first, data, thresholds)
    scale: Tensor | None = choose.run("build_summary", impl, device, kv, block_table, context_lens, *options)
    if out is not None and data is out.data and scale is out.scale:
        return out
    return BlockSummary(kind, data, kv.page_tokens, scale)


def _storage(
    kv: KVPages, kind: str, batch: int, blocks: int, out: BlockSummary | None, impl: str | None
) -> Tensor:
    """The data of `out` if it holds `blocks`, else zeros that do, with what `out` holds copied."""
    capacity = -(-blocks // _CAPACITY) * _CAPACITY
    device = kv.k.device
    by_channel = device.type == "cpu" and impl != "triton" if out is None else out.data.dim() == 4
    shape, axis, dtype = _layout(kv, kind, batch, capacity, by_channel)
    if out is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    had = out.data
    alike = had.dim() == len(shape) and all(
        got == want for i, (got, want) in enumerate(zip(had.shape, shape, strict=True)) if i != axis
    )
    if out.kind != kind or out.page_tokens != kv.page_tokens or not alike or had.dtype != dtype:
        came = f"{out.kind} {had.dtype} {list(had.shape)} of pages of {out.page_tokens}"
        wanted = f"{kind} {dtype} {list(shape)} of pages of {kv.page_tokens}"
        raise ValueError(f"out is {came}: {wanted} is needed (more blocks are fine)")
    if had.device != device or not had.is_contiguous():
        raise ValueError(
            f"out.data is on {had.device}, strides {had.stride()}: contiguous on {device} is needed"
        )
    if had.shape[axis] >= shape[axis]:
        return had
    grown = torch.zeros(shape, dtype=dtype, device=device)
    grown.narrow(axis, 0, had.shape[axis]).copy_(had)
    return grown


def _layout(
    kv: KVPages, kind: str, batch: int, capacity: int, by_channel: bool
) -> tuple[tuple[int, ...], int, torch.dtype]:
    """Shape of the data, the axis that counts blocks, and the dtype; see `records.BlockSummary`."""
    lead, size = (batch, kv.n_kv_heads), kv.head_dim
    means = torch.bfloat16 if kv.quantised else kv.k.dtype
    if kind == "minmax" and by_channel:
        return (*lead, 2 * size, capacity), 3, torch.float32
    if kind == "minmax":
        return (*lead, capacity, 2, size), 2, torch.float32 if kv.quantised else means
    if kind == "mean":
        return (*lead, capacity, size), 2, means
    if kind == "submeans":
        return (*lead, capacity * kv.page_tokens // SUBMEAN_STEP, size), 2, means
    if kind == "vmax":
        return (*lead, capacity), 2, torch.float32
    return (*lead, capacity * kv.page_tokens, size // 4), 2, torch.uint8
