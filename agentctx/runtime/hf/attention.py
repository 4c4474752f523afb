"""The attention function and the mask function that models are set to: `attn_implementation="agentctx"`.

Nothing is patched: both are registered under that name with transformers' own interfaces. A mask is never of
size T x L; it is None without padding, else the `[B, L]` one that was given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from agentctx.kernels.records import Attention, KVPages
from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.hf.cache import MARK, KVLayer, pads_of
from agentctx.runtime.layer import LayerKV, Scoring, with_sinks

NAME = "agentctx"
INERT = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_hidden_states", "output_router_logits"}
)


def register() -> None:
    """Make `attn_implementation="agentctx"` known to transformers; again is harmless."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_layout: Any,
) -> Tensor | None:
    """The given `[B, L]` mask, or None if it hides nothing; windows are the attention function's business.

    Raises ModelError (unsupported) for a mask that is not causal or a cache with room that is not filled.
    """
    if not allow_is_causal_skip:  # how transformers marks a mask that is more than causal, window and padding
        raise _unsupported("a mask that is not causal (packed texts, groups of tokens that see each other)")
    if kv_offset + kv_length != int(q_offset) + q_length:
        raise _unsupported("a cache of a fixed size")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]` of the new tokens. Returns `[B, T, Hq, D]`.

    Raises ModelError (unsupported) for an argument that would change the result and is not known.
    """
    _refuse(others, dropout, output_attentions)
    if is_causal is False:
        raise _unsupported("attention to later tokens")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _unsupported(f"a mask of shape {list(attention_mask.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, MARK, None)
    rotation = layer.rotation if isinstance(layer, KVLayer) else None
    scoring = Scoring(scale, softcap or 0.0, sliding_window, s_aux, rotation)
    if isinstance(layer, KVLayer):
        layer.pending = False
        state = layer.cache.rows(query.shape[0], attention_mask)
        found = state.attend(layer.index, query, key, value, scoring)
    else:
        found = _without_cache(query, key, value, attention_mask, scoring)
    return with_sinks(found, s_aux).transpose(1, 2).contiguous(), None


def _without_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Attention:
    """A pass that keeps nothing: the same arithmetic over pages made for it."""
    batch, heads, new, size = k.shape
    pads = pads_of(None if mask is None else mask[:, -new:], batch)
    blocks = -(-new // PAGE_TOKENS)
    room = blocks * PAGE_TOKENS - new

    def pages(x: Tensor) -> Tensor:
        """Rows without their padding, cut into pages."""
        shifted = [F.pad(row[:, pad:], (0, 0, 0, pad + room)) for row, pad in zip(x, pads, strict=True)]
        cut = torch.stack(shifted).view(batch, heads, blocks, PAGE_TOKENS, size)
        return cut.transpose(1, 2).flatten(0, 1).contiguous()

    table = torch.arange(batch * blocks, dtype=torch.int32, device=q.device).view(batch, blocks)
    lens = torch.tensor([new - pad for pad in pads], dtype=torch.int32, device=q.device)
    pool = KVPages(pages(k), pages(v), PAGE_TOKENS, size)
    return LayerKV(0, pool, table, lens, new, scoring).exact(q)


def _refuse(others: dict[str, Any], dropout: float, output_attentions: bool | None) -> None:
    if output_attentions:
        raise _unsupported("output_attentions: the weights are never formed (see Reading.score_spans)")
    if dropout:
        raise _unsupported(f"dropout={dropout} (call model.eval())")
    for name, value in others.items():
        if value is not None and name not in INERT:
            raise _unsupported(f"the attention argument {name}")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"{what} is not supported by agentctx's attention",
        code="unsupported",
        hint='load the model with attn_implementation="sdpa", or choose another model',
    )
