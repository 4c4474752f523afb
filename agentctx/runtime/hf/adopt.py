"""Taking over a model: what cannot work is refused by name, and the rest has to prove itself at once.

The proof is one short text, answered by the model's own attention and by ours in two steps. It costs two
dozen tokens of computation and finds what no list of names does: keys that never arrive, arguments that
change the scores, logits that are made in another way.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.pool import PagePool
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.body import Body
from agentctx.runtime.hf.attention import NAME, register
from agentctx.runtime.hf.cache import PagedCache
from agentctx.runtime.memory import is_out_of_memory
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.state import KVState

TOKENS = 12
FIRST = 7  # tokens of the first step
MOST_OFF = {torch.float32: 1e-3}  # of the norm of a token's logits, for half of the tokens
ROUNDED_OFF = 0.1  # the same in bfloat16 and float16, where an expert may be chosen differently
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})


class TransformersBody(Body, Protocol):
    """A body around a transformers model."""

    model: Any


def refuse(model: Any) -> None:
    """Raise ModelError (unsupported) for what is known not to work."""
    config = model.config.get_text_config()
    reasons = {
        "it has an encoder": getattr(config, "is_encoder_decoder", False),
        "it keeps compressed keys (multi-head latent attention)": hasattr(config, "kv_lora_rank"),
        "its code does not take an attention function": not getattr(
            model, "_supports_attention_backend", False
        ),
        "it keeps a state, or keys in chunks": not LAYER_KINDS.issuperset(
            getattr(config, "layer_types", None) or ()
        ),
        "it does not say how many tokens it takes": not hasattr(config, "max_position_embeddings"),
    }
    for reason, true in reasons.items():
        if true:
            raise refusal(model, reason)


def take_over(body: TransformersBody) -> None:
    """Set the body's model to our attention, once it has proved that its logits stay what they are.

    Raises ModelError (unsupported) if they do not; then the model has its own attention again.
    """
    model = body.model
    before = model.config._attn_implementation
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (vocabulary // 3 + 7 * torch.arange(TOKENS, device=body.shape.device))[None] % vocabulary
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        want = model(input_ids=ids, use_cache=False).logits
        register()
        model.set_attn_implementation(NAME)
        try:
            off = _difference(_answer(body, ids), want)
        except (ModelError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            model.set_attn_implementation(before)
            if is_out_of_memory(error):
                raise
            raise refusal(model, str(error)) from error
    if not off <= MOST_OFF.get(model.dtype, ROUNDED_OFF):
        model.set_attn_implementation(before)
        raise refusal(model, f"its logits would change by {off:.2g} of their size")


def refusal(model: Any, reason: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot run on agentctx's runtime: {reason}",
        code="unsupported",
        hint="choose a model of a supported family (README, models)",
    )


def _answer(body: TransformersBody, ids: Tensor) -> Tensor:
    """Logits of `ids [1, T]` in two steps over pages: the engine's way, then that of `generate`."""
    pool = PagePool(body.shape, budget=body.shape.page_bytes)
    state = KVState(pool, [BlockTable(pool)], Dense(), [0])
    first = body.logits(body.forward(ids[:, :FIRST], state))
    cache = PagedCache(pool, state=state)
    rest: Tensor = body.model(input_ids=ids[:, FIRST:], past_key_values=cache).logits
    cache.check()
    return torch.cat([first, rest], 1)


def _difference(got: Tensor, want: Tensor) -> float:
    """Relative to the norm of each token's logits, the median over tokens."""
    return float(((got - want).float().norm(dim=-1) / want.float().norm(dim=-1)).median())
