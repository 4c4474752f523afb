"""Native sparse attention on the C++ prefills; the compressed keys are few, and stay with torch."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from agentctx.kernels.cpu.prefill import window_prefill
from agentctx.kernels.cpu.token_prefill import token_sparse_prefill
from agentctx.kernels.fallback.nsa import united
from agentctx.kernels.records import BlockSelection, KVPages


def nsa_forward(
    lib: Any,
    q: Tensor,
    cmp: tuple[Tensor, Tensor],
    slc: KVPages,
    win: KVPages,
    gates: Tensor,
    tables: tuple[Tensor, Tensor],
    cmp_block: int,
    cmp_stride: int,
    n_selected: int,
    window: int,
    q_offset: Tensor,
    scale: float,
) -> tuple[Tensor, BlockSelection]:
    sizes = (cmp_block, cmp_stride, n_selected, window)
    branches = (partial(token_sparse_prefill, lib), partial(window_prefill, lib))
    return united(q, cmp, slc, win, gates, tables, sizes, q_offset, scale, branches)
