"""How much a query may want of each block, from the block's summary alone.

    minmax     sum_d max(q_d kmax_d, q_d kmin_d), computed as relu(q) . kmax - relu(-q) . kmin: an upper bound
               of every score in the block (Quest, arXiv 2406.10774)
    mean       q . mean(k)
    submeans   the best q . mean of the runs of 32 keys, one every 16, that touch the block
    hadamard2  the best token of the block, from 2-bit codes of the rotated keys (Adamas, arXiv 2510.18413)

A code of `hadamard2` says in which of four cells, cut at -t, 0 and t, a coordinate of the rotated key lies;
t = 0.98 sigma stands in `summary.scale` for each KV head. `estimate="dot"` multiplies the rotated query, at
full precision, with the mean of a Gaussian in each cell, -1.510, -0.4528, 0.4528 and 1.510 sigma.
`estimate="manhattan"` is minus the L1 distance between the codes of key and query, whole numbers; a query has
no stored threshold and is cut at 0.98 of its own root mean square, so its length does not matter. Byte i of a
token holds the codes of channels i, i + D/4, i + D/2 and i + 3D/4, from the low bits up.

What starts at or past the limit, `min(context_lens, q_pos + 1)`, does not count: a block, a run or a token.
A call reads the summary once: for minmax `8 Hkv NB D` bytes at most, and `4 Hq T NB D` FLOP; rows of the
summary that every query of a group multiplies by 0 are not read. Limits: hadamard2 needs a head size that is
a power of two from 16 on; C++ serves head sizes that are multiples of 16 (minmax: any), no float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import BlockSummary

GROUPS = ("max", "mean", "sum")
ESTIMATES = ("dot", "manhattan")
SUBMEAN_STEP = 16  # a run of 32 keys starts every 16


def block_scores(
    q: Tensor,
    summary: BlockSummary,
    context_lens: Tensor,
    *,
    group: str = "max",
    per_head: bool = False,
    estimate: str = "dot",
    q_pos: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Score every block for every query: float32 `[B, Hkv, T, NB]`, or `[B, Hq, T, NB]` with `per_head`.

    q `[B, Hq, T, D]`; `context_lens [B]` int32; NB is the capacity of the summary. The G query heads of a
    KV head are united by `group`: "max", "mean" or "sum". Blocks past the context, or wholly after `q_pos
    [B, T]` (int32, no limit if None), are -inf. Scores are scaled logits (`scale` defaults to `D ** -0.5`),
    except those of `estimate="manhattan"`, which serve for ranking only. For prefill pass `pool_queries(q,
    block_q)`.

    Raises ValueError for shapes, dtypes, devices or options that do not fit (kind "vmax" is no score),
    IndexError for a context that is negative or longer than the summary.
    """
    scale = arguments(q, summary, context_lens, group, scale)
    if estimate not in ESTIMATES or (estimate != "dot" and summary.kind != "hadamard2"):
        raise ValueError(f"estimate is {estimate!r} for {summary.kind}: dot, or manhattan for hadamard2")
    if q_pos is not None:
        checks.ints("q_pos", q_pos, (q.shape[0], q.shape[2]), q.device)
    if validate:
        contents.no_nan("q", q)
    options = (q_pos, group, per_head, estimate, scale)
    found: Tensor = choose.run("block_scores", impl, q.device, q, summary, context_lens, *options)
    return found


def pool_queries(q: Tensor, block_q: int, *, impl: str | None = None) -> Tensor:
    """Mean query of each run of `block_q` rows: q `[B, Hq, T, D]` to float32 `[B, Hq, ceil(T / block_q), D]`.

    The last mean is over the rows there are. Raises ValueError for a shape, dtype or `block_q` that does not
    fit.
    """
    checks.tensor("q", q, 4)
    checks.floats("q", q)
    if block_q < 1:
        raise ValueError(f"block_q is {block_q}: 1 or more is needed")
    pooled: Tensor = choose.run("pool_queries", impl, q.device, q, block_q)
    return pooled


def arguments(
    q: Tensor, summary: BlockSummary, context_lens: Tensor, group: str, scale: float | None
) -> float:
    """Check what scoring and selection by scores have in common; return the scale."""
    checks.tensor("q", q, 4)
    checks.floats("q", q)
    batch, heads, _, size = q.shape
    if size < 1 or q.stride(3) != 1:
        raise ValueError(f"q is {list(q.shape)}, strides {q.stride()}: q.contiguous() is needed")
    if not isinstance(summary, BlockSummary):
        raise TypeError(f"summary is {type(summary).__name__}: BlockSummary is needed")
    data = summary.data
    if not _fits(summary, batch, size):
        raise ValueError(
            f"summary.data is {data.dtype} {list(data.shape)}, pages of {summary.page_tokens} tokens: "
            f"this is no {summary.kind} summary for q {list(q.shape)}"
        )
    if heads == 0 or heads % data.shape[1]:
        raise ValueError(f"q has {heads} heads: a multiple of summary's {data.shape[1]} is needed")
    if data.device != q.device:
        raise ValueError(f"summary is on {data.device}, q on {q.device}: move one of them")
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}: use one of {', '.join(GROUPS)}")
    checks.ints("context_lens", context_lens, (batch,), q.device)
    return float(size**-0.5 if scale is None else scale)


def _fits(summary: BlockSummary, batch: int, size: int) -> bool:
    """Whether the data are those of the kind. Raises ValueError for a kind that cannot score."""
    kind, data, page = summary.kind, summary.data, summary.page_tokens
    shape, heads = data.shape, data.shape[1] if data.dim() > 1 else 0
    if heads == 0 or shape[0] != batch or page < 1:
        return False
    if kind == "minmax":
        if data.dim() == 4:
            return shape[2] == 2 * size and data.dtype == torch.float32
        return data.dim() == 5 and shape[3:] == (2, size) and data.dtype in checks.FLOATS
    if data.dim() != 4:
        return False
    if kind == "mean":
        return shape[3] == size and data.dtype in checks.FLOATS
    if kind == "submeans":
        whole = page % SUBMEAN_STEP == 0 and shape[2] % max(1, page // SUBMEAN_STEP) == 0
        return whole and shape[3] == size and data.dtype in checks.FLOATS
    if kind == "hadamard2":
        if size < 16 or size & (size - 1):
            raise ValueError(f"q has head size {size}: hadamard2 needs a power of two from 16 on")
        if summary.scale is None or summary.scale.shape != (heads,) or summary.scale.dtype != torch.float32:
            raise ValueError(f"summary.scale must be float32 [{heads}], the threshold of each KV head")
        return shape[3] == size // 4 and data.dtype == torch.uint8 and shape[2] % page == 0
    raise ValueError(f"summary has kind {kind!r}: minmax, mean, submeans or hadamard2 can score")
