"""How a model turns its keys, found by looking at them.

A token that is alone sees only itself, so what flows through the layers does not depend on its position;
its keys do. One pass over a batch of such tokens, each at another position, therefore shows in every layer
the same key turned by different angles. A model's own tables (its buffers named `*inv_freq`) are tried on it
until one explains what is seen. Norms before the rotation, and factors on it, are in the key at position 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from agentctx.kernels.rope import rope
from agentctx.runtime.rotation import Rotation

PLACES = (0, 1, 5, 131, 1000, 4001)  # the far ones tell slow channels apart; those within the window are used
CLOSE = {torch.float32: 1e-4}  # of the largest channel
ROUNDED_CLOSE = 2e-2  # in bfloat16 and float16


class _Recorder(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keeps the keys of one layer, and nothing for later."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys = key_states
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


def probe(model: Any, window: int) -> tuple[Rotation | None, ...]:
    """The rotation of every layer; None where no table explains it: its keys must stay where they are.

    `window`: tokens within which the model's tables do not change.
    """
    config = model.config.get_text_config()
    recorders = [_Recorder() for _ in range(config.num_hidden_layers)]  # type: ignore[no-untyped-call]
    device = next(model.parameters()).device
    places = torch.tensor([place for place in PLACES if place < window], device=device)
    token = model.get_input_embeddings().weight.shape[0] // 3
    with torch.inference_mode():
        model.base_model(
            input_ids=torch.full((len(places), 1), token, device=device),
            position_ids=places[:, None],
            past_key_values=Cache(layers=list(recorders)),
            use_cache=True,
        )
    tables = _tables(model)
    return tuple(_explained(recorder.keys, places, tables) for recorder in recorders)


def _tables(model: Any) -> list[tuple[Tensor, float]]:
    """Every different table of the model in use, with the factor on the turned channels."""
    found: list[tuple[Tensor, float]] = []
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
                continue
            scaling = getattr(module, name.removesuffix("inv_freq") + "attention_scaling", 1.0)
            if not any(len(seen) == len(table) and torch.equal(seen, table) for seen, _ in found):
                found.append((table.detach().float().clone(), float(scaling)))
    return found


def _explained(keys: Tensor | None, places: Tensor, tables: list[tuple[Tensor, float]]) -> Rotation | None:
    """keys `[P, Hkv, 1, D]` of one token at the places, the first of which is 0."""
    if keys is None:  # the layer uses those of another
        return None
    first = keys[:1].expand_as(keys).contiguous()
    found = keys.float()
    limit = CLOSE.get(keys.dtype, ROUNDED_CLOSE) * float(first.abs().max())

    def fits(guess: Tensor) -> bool:
        return float((guess.float() - found).abs().max()) <= limit

    if fits(first):
        return Rotation(keys.new_zeros(0, dtype=torch.float32), rotary_dim=0)
    for inv_freq, scaling in tables:
        size = 2 * len(inv_freq)
        for style in ("half", "interleaved"):
            if size <= keys.shape[-1] and fits(
                rope(first, places[:, None], inv_freq, style=style, rotary_dim=size)
            ):
                return Rotation(inv_freq, style, size, scaling)
    return None
