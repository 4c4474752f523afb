"""Stored tokens at other positions: what the methods that move keys share."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.store import unpack_pages
from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV


def moved(x: Tensor, at: Tensor, to: Tensor | int, kv: LayerKV) -> Tensor:
    """Rows `[1, H, T, D]` that stand at positions `at [T]`, turned to `to [T]` or all to one.

    Raises ModelError (unsupported) for a layer whose rotation is not known.
    """
    rotation = kv.scoring.rotation
    if rotation is None:
        raise ModelError(
            f"the rotation of positions in layer {kv.index} is not known, this attention method needs it",
            code="unsupported",
            hint="choose dense, quest or mean",
        )
    return rotation.move(x, at, to if isinstance(to, Tensor) else torch.full_like(at, to))


def tokens_of(kv: LayerKV, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """K and V `[1, Hkv, 64 n, D]` of these blocks (int64 `[n]`) of a sequence, in the order given."""
    ids, pages = kv.table[0, blocks].long(), kv.pages
    some = replace(pages, k=pages.k[ids], v=pages.v[ids])
    plain = unpack_pages(some) if some.format == "packed" else some
    return plain.k.transpose(0, 1).flatten(1, 2)[None], plain.v.transpose(0, 1).flatten(1, 2)[None]


def holding(kv: LayerKV, k: Tensor, v: Tensor) -> LayerKV:
    """The layer as if it held these tokens, K and V `[1, Hkv, N, D]`, and nothing else."""
    count = k.shape[2]
    room = (0, 0, 0, -count % PAGE_TOKENS)
    pages = KVPages.over(F.pad(k[0], room).contiguous(), F.pad(v[0], room).contiguous())
    table = torch.arange(pages.n_pages, dtype=torch.int32, device=k.device)[None]
    return replace(
        kv, pages=pages, table=table, lens=torch.full_like(kv.lens, count), longest=count, notes=()
    )
