"""Moving keys and values between layouts."""

from __future__ import annotations

from agentctx.kernels import checks, choose
from agentctx.kernels.records import PACKED_TOKENS, KVPages


def pack_pages(kv: KVPages, *, impl: str | None = None) -> KVPages:
    """Copy "paged" pages of 64 tokens into the "packed" layout of the CPU kernels; float32 or bfloat16.

    Raises ValueError for another format, page size, dtype or an odd head size.
    """
    checks.pages(kv)
    if kv.format != "paged" or kv.page_tokens != PACKED_TOKENS or kv.head_dim % 2:
        what = f"{kv.format} pages of {kv.page_tokens} tokens, head size {kv.head_dim}"
        raise ValueError(f"kv has {what}: paged pages of {PACKED_TOKENS}, even head size, are needed")
    if kv.k.element_size() not in (2, 4) or str(kv.k.dtype) == "torch.float16":
        raise ValueError(f"kv is {kv.k.dtype}: float32 or bfloat16 is needed")
    packed: KVPages = choose.run("pack_pages", impl, kv.k.device, kv)
    return packed


def unpack_pages(kv: KVPages, *, impl: str | None = None) -> KVPages:
    """Copy "packed" pages back into "paged" ones, bit for bit. Raises ValueError for another format."""
    checks.pages(kv)
    if kv.format != "packed":
        raise ValueError(f"kv has format {kv.format}: packed is needed")
    paged: KVPages = choose.run("unpack_pages", impl, kv.k.device, kv)
    return paged
