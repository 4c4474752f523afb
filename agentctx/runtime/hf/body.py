"""Any decoder of transformers as a `Body`: its attention is ours, everything else is its own.

The model is set to `attn_implementation="agentctx"`; nothing of it is patched. What cannot work is refused by
name when the model is taken over, not in the middle of an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import KVShape
from agentctx.runtime.hf.attention import NAME, register
from agentctx.runtime.hf.cache import PagedCache
from agentctx.runtime.state import KVState


class HFBody:
    """A transformers causal language model."""

    def __init__(self, model: Any) -> None:
        self.model = _adopted(model)
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        device = next(model.parameters()).device
        self.shape = KVShape(config.num_hidden_layers, heads, size, model.dtype, str(device))
        self.window: int = config.max_position_embeddings
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters())
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._head = model.get_output_embeddings()

    def forward(self, ids: Tensor, state: KVState) -> Tensor:
        """See `Body`."""
        cache = PagedCache(state.pool, state=state)
        output = self.model.base_model(
            input_ids=ids.to(self.shape.device),
            position_ids=state.positions(ids.shape[1]),
            past_key_values=cache,
            use_cache=True,
        )
        cache.check()
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Body`."""
        logits: Tensor = self._head(hidden)
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _adopted(model: Any) -> Any:
    """The model with our attention. Raises ModelError (unsupported) for what it could not serve."""
    config = model.config.get_text_config()
    refused = {
        "it has an encoder": getattr(config, "is_encoder_decoder", False),
        "it keeps compressed keys (multi-head latent attention)": hasattr(config, "kv_lora_rank"),
        "its code does not take an attention function": not getattr(
            model, "_supports_attention_backend", False
        ),
        "it scales its logits": any(
            getattr(config, name, None) for name in ("logit_scale", "logits_scaling")
        ),
        "it keeps a state, not keys": any(
            kind not in ("full_attention", "sliding_attention")
            for kind in getattr(config, "layer_types", None) or ()
        ),
    }
    for reason, true in refused.items():
        if true:
            raise ModelError(
                f"{type(model).__name__} cannot run on agentctx's runtime: {reason}",
                code="unsupported",
                hint="choose a model of a supported family (README, models)",
            )
    register()
    model.set_attn_implementation(NAME)
    return model.eval()
