"""Keys and values in 8 or 4 bits: symmetric, one bfloat16 scale for each page, head and channel.

    scale = bfloat16(max |x| / L),   code = clamp(round(x / scale), -L, L),   L = 127 or 7

over the tokens of a page. Rounding is to even; the scale is rounded first, so a code may meet its limit a
little early, by less than half a step. Every implementation gives the same codes and scales, and a page that
was dequantised to float32 gives its own codes again. A channel whose scale would fall below the smallest
normal number (1.2e-38) counts as zeros. Cost: the bytes of the values once, of the codes once, about 8 FLOP
a value. Values must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels.records import PAGE_SIZES, KVPages


def quantize_pages(k: Tensor, v: Tensor, bits: int, *, impl: str | None = None) -> KVPages:
    """Quantise whole pages; k, v `[P, Hkv, page_tokens, D]`, D even for 4 bits.

    Raises ValueError for bits other than 4 and 8, or shapes and dtypes that do not fit.
    """
    checks.tensor("k", k, 4)
    checks.tensor("v", v, 4)
    checks.floats("k", k)
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}: 4 or 8 is needed")
    if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        came = f"k is {k.dtype} {list(k.shape)} on {k.device}, v {v.dtype} {list(v.shape)} on {v.device}"
        raise ValueError(f"{came}: they must be alike")
    if k.shape[2] not in PAGE_SIZES:
        raise ValueError(f"k has pages of {k.shape[2]} tokens: use one of {PAGE_SIZES}, whole pages only")
    if k.shape[1] == 0 or k.shape[3] == 0 or (bits == 4 and k.shape[3] % 2):
        raise ValueError(f"k is {list(k.shape)}: heads and channels are needed, for int4 an even head size")
    for name, x in (("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(f"{name} has stride {x.stride(3)} in its last dimension: {name}.contiguous()")
    pages: KVPages = choose.run("quantize_pages", impl, k.device, k, v, bits)
    return pages


def dequantize_pages(
    kv: KVPages, pages: Tensor, dtype: torch.dtype, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """K and V `[n, Hkv, page_tokens, D]` in `dtype` of the pages listed in `pages` (int32 `[n]`).

    Raises ValueError for pools that are not quantised; on the CPU IndexError for a page outside the pool.
    """
    checks.pages(kv)
    if not kv.quantised:
        raise ValueError(f"kv has format {kv.format!r}: int8 or int4 is needed")
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype is {dtype}: bfloat16, float16 or float32 is needed")
    checks.ints("pages", pages, (-1,), kv.k.device)
    found: tuple[Tensor, Tensor] = choose.run("dequantize_pages", impl, kv.k.device, kv, pages, dtype)
    return found
