"""Rotary positions in C++: float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered


def _team(x: Tensor) -> int:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Uncovered(f"rows of {x.dtype}")
    n = x.numel()
    return threads.worth(2.0 * n * x.element_size(), 6.0 * n)


def rope(
    lib: Any,
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    style: str,
    attention_scaling: float,
    out: Tensor | None,
) -> Tensor:
    team = _team(x)
    to = torch.empty_like(x) if out is None else out
    interleaved = style == "interleaved"
    lib.rope(x, to, positions, inv_freq, None, inv_freq, inverse, interleaved, attention_scaling, team)
    return to


def rope_move(
    lib: Any,
    x: Tensor,
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    new_inv_freq: Tensor,
    style: str,
) -> Tensor:
    team = _team(x)
    to = torch.empty_like(x)
    interleaved = style == "interleaved"
    lib.rope(x, to, new_positions, new_inv_freq, old_positions, inv_freq, False, interleaved, 1.0, team)
    return to
