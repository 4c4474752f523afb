"""Summaries as they are defined: block by block, token by token, in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from agentctx.kernels.fallback.quant import dequantize_pages
from agentctx.kernels.fallback.store import unpack_pages
from agentctx.kernels.records import KVPages
from agentctx.kernels.reference.hadamard import matrix


def tokens(kv: KVPages, table: Tensor, length: int, block: int) -> tuple[Tensor, Tensor]:
    """K and V `[Hkv, n, D]` in float64 of the n tokens that logical block `block` of a sequence holds."""
    page = int(table[block])
    if not 0 <= page < kv.n_pages:
        raise IndexError(f"block_table names page {page}: the pool has {kv.n_pages} pages")
    marked = -1 if kv.page_valid is None else int(kv.page_valid[page])
    held = marked if marked >= 0 else max(0, min(kv.page_tokens, length - block * kv.page_tokens))
    if kv.quantised:
        k, v = dequantize_pages(kv, torch.tensor([page], device=table.device), torch.float32)
        return k[0, :, :held].double(), v[0, :, :held].double()
    one = replace(kv, k=kv.k[page : page + 1], v=kv.v[page : page + 1])
    one = unpack_pages(one) if kv.format == "packed" else one
    return one.k[0, :, :held].double(), one.v[0, :, :held].double()


def build_summary(
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    kind: str,
    first_block: int,
    data: Tensor,
    thresholds: Tensor | None,
) -> Tensor | None:
    """Write the blocks from `first_block` on into `data`; return the thresholds of hadamard2."""
    page, size = kv.page_tokens, kv.head_dim
    blocks = {
        (b, i): tokens(kv, block_table[b], length, i)
        for b, length in enumerate(context_lens.tolist())
        for i in range(first_block, -(-length // page))
    }
    if kind == "hadamard2" and thresholds is None:
        thresholds = _thresholds([k for k, _ in blocks.values()], kv)
    for (b, i), (k, v) in blocks.items():
        if k.shape[1] == 0 and kind != "submeans":
            continue
        if kind == "minmax":
            high, low = k.amax(1), k.amin(1)
            if data.dim() == 4:
                data[b, :, :, i] = torch.cat([high, low], 1)
            else:
                data[b, :, i] = torch.stack([high, low], 1)
        elif kind == "mean":
            data[b, :, i] = k.mean(1)
        elif kind == "vmax":
            data[b, :, i] = v.norm(dim=-1).amax(1)
        elif kind == "submeans":
            after = blocks[b, i + 1][0] if (b, i + 1) in blocks else k[:, :0]
            for w in range(page // 16):
                seen = torch.cat(
                    [k[:, 16 * w : 16 * w + 32], after[:, : 16 if w == page // 16 - 1 else 0]], 1
                )
                if seen.shape[1]:
                    data[b, :, i * page // 16 + w] = seen.mean(1)
        else:
            assert thresholds is not None
            x, t = k @ matrix(size).to(k.device), thresholds.double().view(-1, 1, 1)
            codes = (x > -t).int() + (x > 0).int() + (x > t).int()
            codes = codes.view(*codes.shape[:2], 4, size // 4)
            shifts = torch.tensor([0, 2, 4, 6], device=k.device).view(4, 1)
            data[b, :, i * page : (i + 1) * page] = 0
            data[b, :, i * page : i * page + k.shape[1]] = (codes << shifts).sum(2).to(torch.uint8)
    return thresholds


def _thresholds(keys: list[Tensor], kv: KVPages) -> Tensor:
    """0.98 of the standard deviation of the rotated keys of each head."""
    if not keys:
        return torch.zeros(kv.n_kv_heads, device=kv.k.device)
    rotated = torch.cat(keys, 1) @ matrix(kv.head_dim).to(kv.k.device)
    return (0.98 * rotated.std((1, 2), correction=0)).nan_to_num().float()
