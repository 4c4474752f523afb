"""One attention out of several over disjoint keys, as if they had been attended to at once.

    m = max lse_i,   w_i = exp(lse_i - m),   out = sum w_i out_i / sum w_i,   lse = m + ln sum w_i

The step that unites the splits of FlashDecoding (Dao, Haziza, Massa, Sizov, 2023), exact but for rounding.
It reads and writes `(n + 1) B Hq T D` elements and computes `2 n` FLOP for each; only partial results move,
never keys. Limits: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentctx.kernels import checks, choose
from agentctx.kernels.records import Attention


def merge_lse(
    parts: Sequence[Attention], *, out_dtype: torch.dtype | None = None, impl: str | None = None
) -> Attention:
    """The exact union of `parts`, attentions of the same rows over disjoint sets of keys.

    Each part is `out [B, Hq, T, D]` (bfloat16, float16 or float32, not necessarily the same) and
    `lse [B, Hq, T]` float32. A part counts nothing where its lse is -inf; rows where all are give 0 and -inf;
    NaN propagates. The order of the parts does not matter but for rounding. The result is on the device of
    the first part; parts from elsewhere are copied, to a GPU without blocking, best from pinned memory.
    `out_dtype` defaults to that of the first part.

    Raises ValueError for no parts, or for shapes or dtypes that do not fit.
    """
    if not parts:
        raise ValueError("parts is empty: at least one attention is needed")
    for i, part in enumerate(parts):
        if not isinstance(part, Attention):
            raise TypeError(f"parts[{i}] is {type(part).__name__}: Attention is needed")
        out, lse = part
        if not i:
            checks.tensor("parts[0].out", out, 4)
            shape, device = out.shape, out.device
        checks.floats(f"parts[{i}].out", out)
        if out.shape != shape or lse.shape != shape[:3] or lse.dtype != torch.float32:
            came = f"out {list(out.shape)} and {lse.dtype} lse {list(lse.shape)}"
            raise ValueError(f"parts[{i}] has {came}: {list(shape)} and float32 {list(shape[:3])} are needed")
        if out.device != lse.device:
            raise ValueError(f"parts[{i}] has out on {out.device}, lse on {lse.device}: move one of them")
    if out_dtype is not None and out_dtype not in checks.FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}: bfloat16, float16 or float32 is needed")
    if any(part.out.device != device for part in parts):
        # Not without blocking to the CPU: it would be read before it is there.
        wait = device.type == "cpu"
        parts = [Attention(*(x.to(device, non_blocking=not wait) for x in part)) for part in parts]
    united: Attention = choose.run("merge_lse", impl, device, parts, out_dtype or parts[0].out.dtype)
    return united
