"""Which blocks to read: the best by score, with the first and the newest always among them.

`topk_blocks` takes k; `topp_blocks` takes as many as hold the share p of the softmax of the scores (Twilight,
arXiv 2502.02770); `resolve_pages` looks the pages up, so that attention kernels see one level of indirection;
`select_blocks` is a decode step's whole way from queries to lists in one call.

Order: forced blocks before all others, then by falling score; of equals the higher block, which is the newer,
comes first. -0.0 equals 0.0, and NaN ranks as -inf. Forced blocks count within k: where k is smaller than
their number, the newest stay. A call reads `4 H NB` bytes of scores; `select_blocks` reads the summary and
never writes the scores. Limits: none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels import validate as contents
from agentctx.kernels.records import BlockSelection, BlockSummary
from agentctx.kernels.scores import arguments


def topk_blocks(
    scores: Tensor,
    n_blocks: int | Tensor,
    k: int,
    *,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    impl: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best of the first `n_blocks` blocks of each list: `(blocks, counts)`.

    `scores` float32 `[B, H, NB]`, or `[B, H, M, NB]` for a list per query block. `n_blocks`: an int, or int32
    `[B]` or `[B, M]`. `blocks` int32 `[B, H, (M,) k]`, ascending, unused slots 0; `counts` int32
    `[B, H, (M,)]`, `min(k, n_blocks)`. The first `sink_blocks` and the last `local_blocks` of the `n_blocks`
    are always taken, within k.

    Raises ValueError for shapes, dtypes or options that do not fit; IndexError for more blocks than there are
    scores, and with `validate` for NaN.
    """
    _scores(scores, n_blocks, k, sink_blocks, local_blocks, validate)
    options = (n_blocks, k, sink_blocks, local_blocks)
    found: tuple[Tensor, Tensor] = choose.run("topk_blocks", impl, scores.device, scores, *options)
    return found


def topp_blocks(
    scores: Tensor,
    n_blocks: int | Tensor,
    p: float,
    *,
    k_min: int,
    k_max: int,
    sink_blocks: int = 1,
    local_blocks: int = 2,
    impl: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The shortest falling prefix of the blocks whose softmax mass reaches p: `(blocks, counts)`.

    Forced blocks lead the prefix and their mass counts. The length is clamped to `[k_min, k_max]` and to
    `n_blocks`; p = 1 takes every block. S is `k_max`. Scores must be logits (not those of the Manhattan
    estimate). Everything else as in `topk_blocks`; raises ValueError as well for p outside (0, 1] and for
    `k_min > k_max`.
    """
    _scores(scores, n_blocks, k_max, sink_blocks, local_blocks, validate, "k_max")
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}: more than 0 and at most 1 is needed")
    if not 0 <= k_min <= k_max:
        raise ValueError(f"k_min is {k_min}, k_max {k_max}: 0 <= k_min <= k_max is needed")
    options = (n_blocks, float(p), k_min, k_max, sink_blocks, local_blocks)
    found: tuple[Tensor, Tensor] = choose.run("topp_blocks", impl, scores.device, scores, *options)
    return found


def resolve_pages(
    blocks: Tensor,
    counts: Tensor,
    block_table: Tensor,
    *,
    impl: str | None = None,
    validate: bool = False,
) -> BlockSelection:
    """Look up the page of each listed block.

    `blocks` int32 `[B, H, (M,) S]`; `counts` int32 `[B, H, (M,)]`; `block_table` int32 `[B, NB]`. Unused
    slots get page 0. Raises ValueError for shapes or dtypes that do not fit, IndexError for a block outside
    the table or a count outside 0 to S.
    """
    if not isinstance(blocks, Tensor):
        raise TypeError(f"blocks is {type(blocks).__name__}: an int32 tensor is needed")
    if blocks.dim() not in (3, 4):
        raise ValueError(f"blocks is {list(blocks.shape)}: [B, H, S] or [B, H, M, S] is needed")
    checks.ints("blocks", blocks, (-1,) * blocks.dim(), blocks.device)
    checks.ints("counts", counts, tuple(blocks.shape[:-1]), blocks.device)
    checks.ints("block_table", block_table, (blocks.shape[0], -1), blocks.device)
    found: BlockSelection = choose.run("resolve_pages", impl, blocks.device, blocks, counts, block_table)
    if validate:
        contents.selection(found, 2**31 - 1)
    return found


def select_blocks(
    q: Tensor,
    summary: BlockSummary,
    block_table: Tensor,
    context_lens: Tensor,
    k: int,
    *,
    group: str = "max",
    sink_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    impl: str | None = None,
    validate: bool = False,
) -> BlockSelection:
    """One list for each KV head, `[B, Hkv, k]`, in one call of a decode step.

    Equal to `block_scores`, `amax(2)` over the T rows, `topk_blocks` over the blocks of the context and
    `resolve_pages`. Raises what they raise.
    """
    scale = arguments(q, summary, context_lens, group, scale)
    checks.ints("block_table", block_table, (q.shape[0], -1), q.device)
    _options(k, sink_blocks, local_blocks, "k")
    if q.shape[2] < 1:
        raise ValueError(f"q is {list(q.shape)}: at least one query token is needed")
    if validate:
        contents.no_nan("q", q)
        contents.table(block_table, context_lens, summary.page_tokens, 2**31 - 1)
    options = (k, group, sink_blocks, local_blocks, scale)
    found: BlockSelection = choose.run(
        "select_blocks", impl, q.device, q, summary, block_table, context_lens, *options
    )
    return found


def _scores(
    scores: Tensor, n_blocks: int | Tensor, k: int, sink: int, local: int, validate: bool, name: str = "k"
) -> None:
    """Check scores, their number of blocks and the options of a selection."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is {type(scores).__name__}: a tensor is needed")
    if scores.dim() not in (3, 4):
        raise ValueError(f"scores is {list(scores.shape)}: [B, H, NB] or [B, H, M, NB] is needed")
    if scores.dtype != torch.float32:
        raise ValueError(f"scores is {scores.dtype}: float32 is needed")
    if isinstance(n_blocks, Tensor):
        shape = (scores.shape[0], scores.shape[2]) if n_blocks.dim() == 2 else (scores.shape[0],)
        if n_blocks.dim() == 2 and scores.dim() == 3:
            raise ValueError(f"n_blocks is {list(n_blocks.shape)}: [{scores.shape[0]}] is needed")
        checks.ints("n_blocks", n_blocks, shape, scores.device)
    elif not isinstance(n_blocks, int):
        raise TypeError(f"n_blocks is {type(n_blocks).__name__}: an int or an int32 tensor is needed")
    elif not 0 <= n_blocks <= scores.shape[-1]:
        raise IndexError(f"n_blocks is {n_blocks}: there are scores for {scores.shape[-1]}")
    _options(k, sink, local, name)
    if validate:
        contents.no_nan("scores", scores)


def _options(k: int, sink: int, local: int, name: str) -> None:
    if not isinstance(k, int):
        raise TypeError(f"{name} is {type(k).__name__}: an int is needed")
    if k < 1:
        raise ValueError(f"{name} is {k}: 1 or more is needed")
    if sink < 0 or local < 0:
        raise ValueError(f"sink_blocks is {sink}, local_blocks {local}: 0 or more is needed")
