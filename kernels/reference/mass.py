"""Masses from the whole matrix of probabilities, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import KVPages
from agentctx.kernels.reference.summary import tokens


def attention_mass(
    q: Tensor,
    kv: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    q_pos: Tensor | None,
    heads: Tensor | None,
    lse: Tensor | None,
    per: str,
    per_head: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    batch, n_heads, rows, _ = q.shape
    page, blocks, group = kv.page_tokens, block_table.shape[1], n_heads // kv.n_kv_heads
    mass = torch.zeros(batch, n_heads, blocks * page, dtype=torch.float64, device=q.device)
    for b, length in enumerate(context_lens.tolist()):
        for t in range(rows):
            position = length - rows + t if q_pos is None else int(q_pos[b, t])
            keys: list[Tensor] = []
            columns: list[int] = []
            for i in range(-(-length // page)):
                k, _ = tokens(kv, block_table[b], length, i)
                ordered = kv.page_valid is None or int(kv.page_valid[block_table[b, i]]) < 0
                seen = min(k.shape[1], max(0, position + 1 - i * page)) if ordered else k.shape[1]
                keys.append(k[:, :seen])
                columns += range(i * page, i * page + seen)
            if not columns:
                continue
            k = torch.cat(keys, 1).repeat_interleave(group, 0)  # [Hq, n, D]
            scores = (k @ q[b, :, t].double().unsqueeze(2)).squeeze(2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            whole = torch.logsumexp(scores, 1) if lse is None else lse[b, :, t].double()
            weights = torch.exp(scores - whole[:, None])
            weights[whole.isinf()] = 0
            mass[b][:, columns] += weights
    if heads is not None:
        mass = mass * heads.double()[:, None]
    if not per_head:
        mass = mass.sum(1)
    return (mass if per == "token" else mass.view(*mass.shape[:-1], blocks, page).sum(-1)).float()


def span_sums(mass: Tensor, spans: Tensor) -> Tensor:
    sums = [mass[:, start:end].double().sum(1) for start, end in spans.tolist()]
    return torch.stack(sums, 1).float() if sums else mass.new_zeros(len(mass), 0)
