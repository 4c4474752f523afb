"""Any decoder of transformers as a `Body`: its attention is ours, everything else is its own.

The model is set to `attn_implementation="agentctx"`; nothing of it is patched. What cannot work is refused by
name when the model is taken over, not in the middle of an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agentctx.memory.kv.pool import KVShape
from agentctx.runtime.hf.adopt import refusal, refuse, take_over
from agentctx.runtime.hf.cache import PagedCache
from agentctx.runtime.hf.probe import probe
from agentctx.runtime.rotation import RopeScaling, Rotation
from agentctx.runtime.state import KVState


class HFBody:
    """A transformers causal language model. Raises ModelError (unsupported) for one that it cannot serve."""

    def __init__(self, model: Any) -> None:
        refuse(model)
        self.model = model.eval()
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        device = next(model.parameters()).device
        self.shape = KVShape(config.num_hidden_layers, heads, size, model.dtype, str(device))
        self.window: int = _window(config)
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters())
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._factor: float = (
            getattr(config, "logit_scale", None) or 1.0
        )  # Cohere's name for it, and Granite's
        self._factor /= getattr(config, "logits_scaling", None) or 1.0
        self._head = model.get_output_embeddings()
        self._found: tuple[Rotation | None, ...] | None = None
        take_over(self)

    def forward(self, ids: Tensor, state: KVState) -> Tensor:
        """See `Body`."""
        rotations = self.rotations() if state.method.moves else ()
        cache = PagedCache(state.pool, state=state, rotations=rotations)
        output = self.model.base_model(
            input_ids=ids.to(self.shape.device),
            position_ids=state.positions(ids.shape[1]),
            past_key_values=cache,
            use_cache=True,
        )
        cache.check()
        hidden: Tensor = output.last_hidden_state
        return hidden

    def plain(self) -> HFBody:
        """See `Body`: it has no others."""
        return self

    def rescaled(self, scaling: RopeScaling) -> HFBody:
        """See `Body`. The model itself is changed, and proves itself once more."""
        tables = [
            part for part in self.model.modules() if isinstance(getattr(part, "inv_freq", None), Tensor)
        ]
        if len(tables) != 1 or getattr(tables[0], "rope_type", None) != "default":
            raise refusal(self.model, "its rotary positions are not one plain table, to be scaled")
        inv_freq, tables[0].attention_scaling = scaling.table(tables[0].inv_freq, self.window)
        tables[0].inv_freq.copy_(inv_freq)
        found = HFBody(self.model)
        found.window = scaling.window(self.window)
        return found

    def rotations(self) -> tuple[Rotation | None, ...]:
        """See `Body`. Found out when they are first needed."""
        if self._found is None:
            self._found = probe(self.model, self.window)
        return self._found

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Body`."""
        logits: Tensor = self._head(hidden)
        if self._factor != 1:
            logits = logits * self._factor
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _window(config: Any) -> int:
    """Tokens that the model takes. Longrope has a second rotary table for longer texts: keys turned by one
    cannot be mixed with keys turned by the other, and a text that is read piece by piece begins with the
    first.
    """
    tables = getattr(config, "rope_parameters", None) or {}
    window: int = config.max_position_embeddings
    for table in (tables, *tables.values()):
        if isinstance(table, dict) and table.get("rope_type") == "longrope":
            window = min(window, table["original_max_position_embeddings"])
    return window
