"""The union of attentions in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agentctx.kernels import threads
from agentctx.kernels.errors import Uncovered
from agentctx.kernels.records import Attention


def merge_lse(lib: Any, parts: Sequence[Attention], out_dtype: torch.dtype) -> Attention:
    if torch.float16 in (out_dtype, *(part.out.dtype for part in parts)):
        raise Uncovered("float16")
    if not parts[0].out.is_cpu:
        raise Uncovered(f"tensors on {parts[0].out.device}")
    outs, lses = zip(*parts, strict=True)
    elements = (len(parts) + 1) * outs[0].numel()
    found = lib.merge_lse(outs, lses, out_dtype == torch.bfloat16, threads.worth(4 * elements, 2 * elements))
    return Attention(*found)
